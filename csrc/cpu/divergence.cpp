// batch_kl and strength_weights on the CPU. No softmax is written to memory: a row is read for its maximum and sum, then for its
// terms.
#include <cstring>

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
constexpr int64_t kSum = 0, kMean = 1, kNone = 2;

// `value`, or its gradient: one number, or with kNone one per row.
template <class Add>
void add_value(int64_t reduction, int64_t rows, const Add& add) {
  STD_TORCH_CHECK(reduction >= kSum && reduction <= kNone, "reduction: expected 0, 1 or 2, got ", reduction);
  if (reduction == kNone) add(Arguments::Shape{rows});
  else add(Arguments::Shape{});
}

void batch_kl(
    const Tensor& p_logits, const Tensor& q_logits, int64_t reduction, const Tensor& value, const Tensor& stats) {
  const int64_t rows = rows_of(p_logits, "p_logits"), columns = columns_of(p_logits, "p_logits");
  const ScalarType dtype = floating_type(p_logits, "p_logits"), arithmetic = arithmetic_type(dtype);
  Arguments arguments;
  arguments.reads(p_logits, "p_logits", {rows, columns}, dtype);
  arguments.reads(q_logits, "q_logits", {rows, columns}, dtype);
  add_value(reduction, rows, [&](auto shape) { arguments.writes(value, "value", shape, arithmetic); });
  arguments.writes(stats, "stats", {5, rows}, arithmetic);
  arguments.check_outputs();
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
  const int64_t rows = rows_of(q_logits, "q_logits"), columns = columns_of(q_logits, "q_logits");
  const ScalarType dtype = floating_type(q_logits, "q_logits");
  Arguments arguments;
  arguments.reads(p_logits, "p_logits", {rows, columns}, dtype);
  arguments.reads(other_logits, "other_logits", {rows, columns}, dtype);
  arguments.reads(q_logits, "q_logits", {rows, columns}, dtype);
  arguments.writes(kl, "kl", {2}, arithmetic_type(dtype));
  arguments.check_outputs();
  dispatch_type(dtype, [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    if (columns == 0) {  // there may be any number of such rows
      std::fill_n(output<S>(kl), 2, S(0));
      return;
    }
    const int64_t count = product(10, rows, "rows");  // of statistics: (5, B) for each side
    const Tensor memory = torch::stable::new_empty(kl, {count});
    S* stats = output<S>(memory);
    const MatrixView q(q_logits);
    const KlArgs args[2] = {
        {MatrixView(p_logits), q, stats, rows, columns}, {MatrixView(other_logits), q, stats + 5 * rows, rows, columns}};
    const auto kernel = IPRM_BEST(batch_kl_rows<T>);
    parallel_rows(rows, 2 * kExpCost * columns, [&](int64_t begin, int64_t end) {
      for (const KlArgs& side : args) kernel(side, begin, end);
    });
    for (int side = 0; side < 2; ++side) output<S>(kl)[side] = S(ordered_sum(stats + (5 * side + 4) * rows, rows));
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
  const int64_t rows = rows_of(p_logits, "p_logits"), columns = columns_of(p_logits, "p_logits");
  const ScalarType dtype = floating_type(p_logits, "p_logits"), arithmetic = arithmetic_type(dtype);
  Arguments arguments;
  add_value(reduction, rows, [&](auto shape) { arguments.reads(grad, "grad", shape, arithmetic); });
  arguments.reads(p_logits, "p_logits", {rows, columns}, dtype);
  arguments.reads(q_logits, "q_logits", {rows, columns}, dtype);
  arguments.reads_contiguous(stats, "stats", {5, rows}, arithmetic);
  arguments.writes(grad_p, "grad_p", {rows, columns}, dtype);
  arguments.writes(grad_q, "grad_q", {rows, columns}, dtype);
  arguments.check_outputs();
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
void dispatch_wide(ScalarType dtype, const Work& work) {
  return dtype == ScalarType::Float ? work.template operator()<float>() : work.template operator()<double>();
}

void strength_weights(const Tensor& kl, const Tensor& strength) {
  const int64_t count = count_of(kl, "kl");
  const ScalarType dtype = wide_type(kl, "kl");
  Arguments arguments;
  arguments.reads(kl, "kl", {count}, dtype);
  arguments.writes(strength, "strength", {count}, dtype);
  arguments.check_outputs();
  if (count == 0) return;
  dispatch_wide(dtype, [&]<class S>() { strength_weights_of(VectorView<S>(kl), count, output<S>(strength)); });
}

void strength_weights_backward(const Tensor& grad, const Tensor& kl, const Tensor& grad_kl) {
  const int64_t count = count_of(kl, "kl");
  const ScalarType dtype = wide_type(kl, "kl");
  Arguments arguments;
  arguments.reads(grad, "grad", {count}, dtype);
  arguments.reads(kl, "kl", {count}, dtype);
  arguments.writes(grad_kl, "grad_kl", {count}, dtype);
  arguments.check_outputs();
  dispatch_wide(dtype, [&]<class S>() {
    strength_weights_backward_of(VectorView<S>(grad), VectorView<S>(kl), count, output<S>(grad_kl));
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
