// normalize and geodesic_mixup on the CPU: forward reads x and y once from memory and writes z, backward reads x, y and g once
// and writes the two gradients. A row is visited twice, the second time in the first-level cache.
#include <cstring>

#include "rows.h"

namespace iprm {

struct NormalizeArgs {
  MatrixView x;
  double eps;
  void *out, *norm;
  int64_t columns;
};

struct NormalizeBackwardArgs {
  MatrixView grad, x;
  Tensor norm;
  double eps;
  void* grad_x;
  int64_t columns;
};

struct MixupArgs {
  MatrixView x, y;
  Tensor weight;
  double eps;
  void *z, *stats;
  int64_t rows, columns;
  bool known;  // stats already hold the statistics
};

struct MixupBackwardArgs {
  MatrixView grad, x, y;
  Tensor weight;
  const void* stats;
  double eps;
  void *grad_x, *grad_y, *grad_w;  // null if not needed
  int64_t rows, columns;
};

}  // namespace iprm

#define IPRM_ROWS "geodesic_rows.h"
#include "for_each_isa.h"

namespace iprm {
namespace {

void normalize(const Tensor& x, double eps, const Tensor& out, const Tensor& norm) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_matrix(x, "x", rows, columns, dtype);
  check_output(out, "out", rows, columns, dtype);
  check_output(norm, "norm", rows, arithmetic);
  const NormalizeArgs args{MatrixView(x), eps, out.mutable_data_ptr(), norm.mutable_data_ptr(), columns};
  dispatch_type(x.scalar_type(), [&]<class T>() {
    const auto kernel = IPRM_BEST(normalize_rows<T>);
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

void normalize_backward(const Tensor& grad, const Tensor& x, const Tensor& norm, double eps, const Tensor& grad_x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType dtype = x.scalar_type();
  check_matrix(x, "x", rows, columns, dtype);
  check_matrix(grad, "grad", rows, columns, dtype);
  check_vector(norm, "norm", rows, arithmetic_type(dtype));
  check_output(grad_x, "grad_x", rows, columns, dtype);
  const NormalizeBackwardArgs args{MatrixView(grad), MatrixView(x), norm, eps, grad_x.mutable_data_ptr(), columns};
  dispatch_type(x.scalar_type(), [&]<class T>() {
    const auto kernel = IPRM_BEST(normalize_backward_rows<T>);
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

void mixup(
    const Tensor& x, const Tensor& y, const Tensor& weight, double eps, const Tensor& z, const Tensor& stats, bool known) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_matrix(x, "x", rows, columns, dtype);
  check_matrix(y, "y", rows, columns, dtype);
  check_vector(weight, "weight", rows, arithmetic);
  check_output(z, "z", rows, columns, dtype);
  check_output(stats, "stats", 3, rows, arithmetic);
  const MixupArgs args{
      MatrixView(x), MatrixView(y), weight, eps, z.mutable_data_ptr(), stats.mutable_data_ptr(), rows, columns, known};
  dispatch_type(x.scalar_type(), [&]<class T>() {
    prefer_huge_pages(args.z, rows * columns * sizeof(T));
    const auto kernel = IPRM_BEST(geodesic_mixup_rows<T>);
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

void geodesic_mixup(
    const Tensor& x, const Tensor& y, const Tensor& weight, double eps, const Tensor& z, const Tensor& stats) {
  mixup(x, y, weight, eps, z, stats, false);
}

void geodesic_remix(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& stats, double eps, const Tensor& z) {
  mixup(x, y, weight, eps, z, stats, true);
}

void geodesic_mixup_backward(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& y,
    const Tensor& weight,
    const Tensor& stats,
    double eps,
    const std::optional<Tensor>& grad_x,
    const std::optional<Tensor>& grad_y,
    const std::optional<Tensor>& grad_w) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_matrix(grad, "grad", rows, columns, dtype);
  check_matrix(x, "x", rows, columns, dtype);
  check_matrix(y, "y", rows, columns, dtype);
  check_vector(weight, "weight", rows, arithmetic);
  check_output(stats, "stats", 3, rows, arithmetic);
  if (grad_x) check_output(*grad_x, "grad_x", rows, columns, dtype);
  if (grad_y) check_output(*grad_y, "grad_y", rows, columns, dtype);
  if (grad_w) check_output(*grad_w, "grad_w", rows, arithmetic);
  const MixupBackwardArgs args{
      MatrixView(grad), MatrixView(x),        MatrixView(y),        weight, stats.const_data_ptr(), eps,
      output<void>(grad_x), output<void>(grad_y), output<void>(grad_w), rows, columns};
  dispatch_type(x.scalar_type(), [&]<class T>() {
    for (void* out : {args.grad_x, args.grad_y}) prefer_huge_pages(out, rows * columns * sizeof(T));
    const auto kernel = IPRM_BEST(geodesic_mixup_backward_rows<T>);
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) {
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_backward", TORCH_BOX(&normalize_backward));
  m.impl("geodesic_mixup", TORCH_BOX(&geodesic_mixup));
  m.impl("geodesic_mixup_backward", TORCH_BOX(&geodesic_mixup_backward));
  m.impl("geodesic_remix", TORCH_BOX(&geodesic_remix));
}

}  // namespace iprm
