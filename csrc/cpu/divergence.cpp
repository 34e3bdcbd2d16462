// batch_kl and strength_weights on the CPU. No softmax is written to memory: a row is read for its maximum and sum, then for its
// terms.
#include <cstring>
#include <memory>

#include "../core/strength.h"
#include "rows.h"

namespace iprm {

struct KlArgs {
  MatrixView p, q;
  void* stats;  // (5, B): max p, sum exp(p - max p), the same two for q, KL
  int64_t rows, columns;
};

struct KlBackwardArgs {
  const void* grad;  // () or (B,)
  int64_t grad_stride;  // 0 if one value serves all rows
  double scale;         // of grad
  MatrixView p, q;
  const void* stats;
  void *grad_p, *grad_q;  // null if not needed
  int64_t rows, columns;
};

}  // namespace iprm

#define IPRM_ROWS "divergence_rows.h"
#include "for_each_isa.h"

namespace iprm {
namespace {

// Indices into REDUCTIONS of iprm_kernels/convention.py, after "sum". The schema takes an int because torch 2.13 leaks every string
// that passes through the stable ABI (ToImpl<std::string>), at least 48 bytes per call.
constexpr int64_t kMean = 1, kNone = 2;

void batch_kl(
    const Tensor& p_logits, const Tensor& q_logits, int64_t reduction, const Tensor& value, const Tensor& stats) {
  const int64_t rows = p_logits.size(0), columns = p_logits.size(1);
  const ScalarType dtype = p_logits.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_matrix(p_logits, "p_logits", rows, columns, dtype);
  check_matrix(q_logits, "q_logits", rows, columns, dtype);
  check_output(stats, "stats", 5, rows, arithmetic);
  if (reduction == kNone) check_output(value, "value", rows, arithmetic);
  else check_scalar(value, "value", arithmetic);
  const KlArgs args{MatrixView(p_logits), MatrixView(q_logits), stats.mutable_data_ptr(), rows, columns};
  dispatch_type(dtype, [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const auto kernel = IPRM_BEST(batch_kl_rows<T>);
    parallel_rows(rows, kExpCost * columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    const S* kl = output<S>(stats) + 4 * rows;
    if (reduction == kNone) std::copy_n(kl, rows, output<S>(value));
    else *output<S>(value) = S(ordered_sum(kl, rows) / (reduction == kMean ? double(rows) : 1.0));
  });
}

void batch_kl_pair(const Tensor& p_logits, const Tensor& other_logits, const Tensor& q_logits, const Tensor& kl) {
  const int64_t rows = q_logits.size(0), columns = q_logits.size(1);
  const ScalarType dtype = q_logits.scalar_type();
  check_matrix(p_logits, "p_logits", rows, columns, dtype);
  check_matrix(other_logits, "other_logits", rows, columns, dtype);
  check_matrix(q_logits, "q_logits", rows, columns, dtype);
  check_output(kl, "kl", 2, arithmetic_type(dtype));
  dispatch_type(dtype, [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const auto stats = std::make_unique_for_overwrite<S[]>(10 * rows);
    const MatrixView q(q_logits);
    const KlArgs args[2] = {
        {MatrixView(p_logits), q, stats.get(), rows, columns}, {MatrixView(other_logits), q, stats.get() + 5 * rows, rows, columns}};
    const auto kernel = IPRM_BEST(batch_kl_rows<T>);
    parallel_rows(rows, 2 * kExpCost * columns, [&](int64_t begin, int64_t end) {
      for (const KlArgs& side : args) kernel(side, begin, end);
    });
    for (int side = 0; side < 2; ++side) output<S>(kl)[side] = S(ordered_sum(stats.get() + (5 * side + 4) * rows, rows));
  });
}

void batch_kl_backward(
    const Tensor& grad,
    const Tensor& p_logits,
    const Tensor& q_logits,
    const Tensor& stats,
    int64_t reduction,
    const std::optional<Tensor>& grad_p,
    const std::optional<Tensor>& grad_q) {
  const int64_t rows = p_logits.size(0), columns = p_logits.size(1);
  const ScalarType dtype = p_logits.scalar_type(), arithmetic = arithmetic_type(dtype);
  if (reduction == kNone) check_vector(grad, "grad", rows, arithmetic);
  else check_scalar(grad, "grad", arithmetic);
  check_matrix(p_logits, "p_logits", rows, columns, dtype);
  check_matrix(q_logits, "q_logits", rows, columns, dtype);
  check_output(stats, "stats", 5, rows, arithmetic);
  if (grad_p) check_output(*grad_p, "grad_p", rows, columns, dtype);
  if (grad_q) check_output(*grad_q, "grad_q", rows, columns, dtype);
  const int64_t grad_stride = reduction == kNone ? grad.stride(0) : 0;
  const KlBackwardArgs args{
      grad.const_data_ptr(), grad_stride, reduction == kMean ? 1.0 / double(rows) : 1.0, MatrixView(p_logits),
      MatrixView(q_logits), stats.const_data_ptr(), output<void>(grad_p), output<void>(grad_q), rows, columns};
  dispatch_type(dtype, [&]<class T>() {
    const auto kernel = IPRM_BEST(batch_kl_backward_rows<T>);
    parallel_rows(rows, kExpCost * columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

// dw_m/dKL_j = 1 / (KL_m (sum_i KL_j / KL_i)^2) for m != j; columns sum to zero; zero where there is no derivative (several KL
// zero, or one infinite); NaN if any KL is NaN
template <class S>
void strength_weights_backward_of(const VectorView<S>& grad, const VectorView<S>& kl, int64_t count, S* grad_kl) {
  bool any_nan = false;
  for (int64_t m = 0; m < count; ++m) any_nan |= std::isnan(kl[m]);
  for (int64_t j = 0; j < count; ++j) {
    S column = 1, total = 0;
    for (int64_t i = 0; i < count; ++i)
      if (i != j) column += kl[j] / kl[i];
    for (int64_t m = 0; m < count; ++m) {
      const bool defined = kl[m] != S(0) && !std::isinf(kl[m]) && !std::isinf(kl[j]) && (any_nan || column == column);
      if (m != j && defined) total += (grad[m] - grad[j]) / (kl[m] * column * column);
    }
    grad_kl[j] = total;
  }
}

template <class Work>
void dispatch_kl_type(const Tensor& kl, const Work& work) {
  const ScalarType dtype = kl.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "kl: expected float32 or float64");
  return dtype == ScalarType::Float ? work.template operator()<float>() : work.template operator()<double>();
}

void strength_weights(const Tensor& kl, const Tensor& strength) {
  check_vector(kl, "kl", kl.size(0), kl.scalar_type());
  check_output(strength, "strength", kl.size(0), kl.scalar_type());
  dispatch_kl_type(kl, [&]<class S>() {
    strength_weights_of(VectorView<S>(kl), kl.size(0), output<S>(strength));
  });
}

void strength_weights_backward(const Tensor& grad, const Tensor& kl, const Tensor& grad_kl) {
  check_vector(kl, "kl", kl.size(0), kl.scalar_type());
  check_vector(grad, "grad", kl.size(0), kl.scalar_type());
  check_output(grad_kl, "grad_kl", kl.size(0), kl.scalar_type());
  dispatch_kl_type(kl, [&]<class S>() {
    strength_weights_backward_of(VectorView<S>(grad), VectorView<S>(kl), kl.size(0), output<S>(grad_kl));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) {
  m.impl("batch_kl", TORCH_BOX(&batch_kl));
  m.impl("batch_kl_backward", TORCH_BOX(&batch_kl_backward));
  m.impl("batch_kl_pair", TORCH_BOX(&batch_kl_pair));
  m.impl("strength_weights", TORCH_BOX(&strength_weights));
  m.impl("strength_weights_backward", TORCH_BOX(&strength_weights_backward));
}

}  // namespace iprm
