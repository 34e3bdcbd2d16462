// The rows of `batch_kl`. Compiled once for every instruction set by for_each_isa.h.

#include "divergence_terms.h"

// A row is one long dependency chain: maximum, exponentials, their sum, its logarithm, terms, their sum. Rows therefore go
// through each stage together, some 2,048 logits at a time: independent rows fill the pipeline, and the inputs of the next stage
// are still in the first-level cache.
template <class T>
void batch_kl_rows(const KlArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  constexpr int64_t kMostRows = 16;
  const int64_t step = std::clamp<int64_t>(2048 / std::max<int64_t>(1, args.columns), 1, kMostRows);
  const int64_t width = std::max(args.columns, Lanes<T>::kCount);
  const Tail<T> tail(args.columns);
  RowReader<T> p(args.p, args.columns, kMostRows), q(args.q, args.columns, kMostRows);
  std::vector<S> exps(2 * step * width);
  S* stats = static_cast<S*>(args.stats);
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = std::min(step, end - first);
    const T *p_rows[kMostRows], *q_rows[kMostRows];
    S tops[2][kMostRows], sums[2][kMostRows], ratios[kMostRows];
    for (S& ratio : ratios) ratio = 1;
    S *p_exps = exps.data(), *q_exps = p_exps + step * width;
    for (int64_t i = 0; i < count; ++i) {
      p_rows[i] = p(first + i);
      q_rows[i] = q(first + i);
      tops[0][i] = row_max(p_rows[i], tail);
      tops[1][i] = row_max(q_rows[i], tail);
    }
    for (int64_t i = 0; i < count; ++i) {
      sums[0][i] = exp_sum(p_rows[i], tail, tops[0][i], p_exps + i * width);
      sums[1][i] = exp_sum(q_rows[i], tail, tops[1][i], q_exps + i * width);
    }
    for (int64_t i = 0; i < count; ++i) ratios[i] = sums[0][i] / sums[1][i];
    for (int64_t i = 0; i < kMostRows; i += Lanes<S>::kCount) store(ratios + i, log(load(ratios + i)));
    for (int64_t i = 0; i < count; ++i) {
      const Softmax<S> of_p{tops[0][i], sums[0][i]}, of_q{tops[1][i], sums[1][i]};
      const S kl = kl_sum(p_rows[i], q_rows[i], tail, p_exps + i * width, q_exps + i * width, of_p, of_q, ratios[i]);
      const S values[5] = {of_p.top, of_p.sum, of_q.top, of_q.sum, kl};
      for (int k = 0; k < 5; ++k) stats[k * args.rows + first + i] = values[k];
    }
  }
}

// dp = g P (d - KL), dq = g (Q - P); where P and Q are close, Q - P is P (phi(d) - d)
template <class V, class S>
IPRM_INLINE void kl_gradients(V p, V q, V d, S kl, S grad, V* dp, V* dq) {
  constexpr S kClose = S(kExcessSeriesBelow);
  const V zero = {};
  const auto absent = p == S(0);
  *dp = grad * (kl != kl ? zero + kl : absent ? zero : p * (d - kl));
  const V close = p * (d * d * excess_series<S>(d) - d);
  *dq = grad * ((d < kClose) & (d > -kClose) & ~absent ? close : q - p);
}

template <class T>
void batch_kl_backward_rows(const KlBackwardArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const Tail<T> tail(args.columns);
  RowReader<T> p(args.p, args.columns), q(args.q, args.columns);
  const S *grads = static_cast<const S*>(args.grad), *stats = static_cast<const S*>(args.stats);
  T *grad_p = static_cast<T*>(args.grad_p), *grad_q = static_cast<T*>(args.grad_q);
  for (int64_t row = begin; row < end; ++row) {
    const T *p_row = p(row), *q_row = q(row);
    const Softmax<S> of_p{stats[row], stats[args.rows + row]};
    const Softmax<S> of_q{stats[2 * args.rows + row], stats[3 * args.rows + row]};
    const S kl = stats[4 * args.rows + row], grad = grads[row * args.grad_stride] * S(args.scale);
    const S p_scale = S(1) / of_p.sum, q_scale = S(1) / of_q.sum, log_ratio = std::log(of_p.sum / of_q.sum);
    const int64_t offset = row * args.columns;
    if (grad == S(0)) {  // exactly zero, also where the KL is not finite
      if (grad_p) std::memset(grad_p + offset, 0, args.columns * sizeof(T));
      if (grad_q) std::memset(grad_q + offset, 0, args.columns * sizeof(T));
      continue;
    }
    V dp, dq;
    const auto gradients = [&](V p_logits, V q_logits) {
      const V d = log_quotient<V, S>(p_logits, q_logits, of_p, of_q, log_ratio);
      kl_gradients(exp(p_logits - of_p.top) * p_scale, exp(q_logits - of_q.top) * q_scale, d, kl, grad, &dp, &dq);
    };
    for (int64_t i = 0; i < tail.whole; i += kCount) {
      gradients(load(p_row + i), load(q_row + i));
      if (grad_p) store(grad_p + offset + i, dp);
      if (grad_q) store(grad_q + offset + i, dq);
    }
    if (tail) {
      gradients(tail.values(p_row), tail.values(q_row));
      if (grad_p) tail.write(grad_p + offset, dp);
      if (grad_q) tail.write(grad_q + offset, dq);
    }
  }
}
