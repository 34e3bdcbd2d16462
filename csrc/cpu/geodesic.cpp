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
  const int64_t rows = rows_of(x, "x"), columns = columns_of(x, "x");
  const ScalarType dtype = floating_type(x, "x"), arithmetic = arithmetic_type(dtype);
  Arguments arguments;
  arguments.reads(x, "x", {rows, columns}, dtype);
  arguments.writes(out, "out", {rows, columns}, dtype);
  arguments.writes(norm, "norm", {rows}, arithmetic);
  arguments.check_outputs();
  const NormalizeArgs args{MatrixView(x), eps, out.mutable_data_ptr(), norm.mutable_data_ptr(), columns};
  dispatch_type(dtype, [&]<class T>() {
    const auto kernel = IPRM_BEST(normalize_rows<T>);
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

void normalize_backward(const Tensor& grad, const Tensor& x, const Tensor& norm, double eps, const Tensor& grad_x) {
  const int64_t rows = rows_of(x, "x"), columns = columns_of(x, "x");
  const ScalarType dtype = floating_type(x, "x");
  Arguments arguments;
  arguments.reads(grad, "grad", {rows, columns}, dtype);
  arguments.reads(x, "x", {rows, columns}, dtype);
  arguments.reads(norm, "norm", {rows}, arithmetic_type(dtype));
  arguments.writes(grad_x, "grad_x", {rows, columns}, dtype);
  arguments.check_outputs();
  if (columns == 0) return;  // there may be any number of such rows
  const NormalizeBackwardArgs args{MatrixView(grad), MatrixView(x), norm, eps, grad_x.mutable_data_ptr(), columns};
  dispatch_type(dtype, [&]<class T>() {
    const auto kernel = IPRM_BEST(normalize_backward_rows<T>);
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

void mixup(
    const Tensor& x, const Tensor& y, const Tensor& weight, double eps, const Tensor& z, const Tensor& stats, bool known) {
  const int64_t rows = rows_of(x, "x"), columns = columns_of(x, "x");
  const ScalarType dtype = floating_type(x, "x"), arithmetic = arithmetic_type(dtype);
  Arguments arguments;
  arguments.reads(x, "x", {rows, columns}, dtype);
  arguments.reads(y, "y", {rows, columns}, dtype);
  arguments.reads(weight, "weight", {rows}, arithmetic);
  arguments.writes(z, "z", {rows, columns}, dtype);
  if (known) arguments.reads_contiguous(stats, "stats", {3, rows}, arithmetic);
  else arguments.writes(stats, "stats", {3, rows}, arithmetic);
  arguments.check_outputs();
  const MixupArgs args{
      MatrixView(x), MatrixView(y), weight, eps, z.mutable_data_ptr(), stats.mutable_data_ptr(), rows, columns, known};
  dispatch_type(dtype, [&]<class T>() {
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
  const int64_t rows = rows_of(x, "x"), columns = columns_of(x, "x");
  const ScalarType dtype = floating_type(x, "x"), arithmetic = arithmetic_type(dtype);
  Arguments arguments;
  arguments.reads(grad, "grad", {rows, columns}, dtype);
  arguments.reads(x, "x", {rows, columns}, dtype);
  arguments.reads(y, "y", {rows, columns}, dtype);
  arguments.reads(weight, "weight", {rows}, arithmetic);
  arguments.reads_contiguous(stats, "stats", {3, rows}, arithmetic);
  arguments.writes(grad_x, "grad_x", {rows, columns}, dtype);
  arguments.writes(grad_y, "grad_y", {rows, columns}, dtype);
  arguments.writes(grad_w, "grad_w", {rows}, arithmetic);
  arguments.check_outputs();
  const MixupBackwardArgs args{
      MatrixView(grad), MatrixView(x),        MatrixView(y),        weight, stats.const_data_ptr(), eps,
      output<void>(grad_x), output<void>(grad_y), output<void>(grad_w), rows, columns};
  dispatch_type(dtype, [&]<class T>() {
    for (void* out : {args.grad_x, args.grad_y})
      if (out) prefer_huge_pages(out, rows * columns * sizeof(T));
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
