// The rows of `batch_kl`. Compiled once for every instruction set by for_each_isa.h.

#include "../core/divergence.h"

template <class T>
IPRM_INLINE typename Lanes<T>::Scalar row_max(const T* row, const Tail<T>& tail) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  V largest = tail ? tail.values(row, kLowest) : V{} + kLowest;
  for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount) largest = lanewise_max(largest, load(row + i));
  return max_lanes<S>(largest);
}

// sum exp(row - top), the exponentials left in `exps`, zero in lanes past the end
template <class T>
IPRM_INLINE typename Lanes<T>::Scalar exp_sum(
    const T* row, const Tail<T>& tail, typename Lanes<T>::Scalar top, typename Lanes<T>::Scalar* exps) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  V sum = {};
  if (tail) {  // first, as its lanes that overlap are written again
    sum = exp(tail.unseen(row, kLowest) - top);
    store(exps + (tail.whole > 0 ? tail.columns - kCount : 0), sum);
  }
  for (int64_t i = 0; i < tail.whole; i += kCount) {
    const V value = exp(load(row + i) - top);
    store(exps + i, value);
    sum += value;
  }
  return sum_lanes<S>(sum);
}

// P, Q and d = log P - log Q of some columns, the logits subtracted first: that is exact where they are close
template <class V, class S>
struct Probabilities {
  V p, q, d;

  IPRM_INLINE Probabilities(V p_logits, V q_logits, S p_lse, S q_lse)
      : p(exp(p_logits - p_lse)), q(exp(q_logits - q_lse)), d((p_logits - q_logits) - (p_lse - q_lse)) {}
  IPRM_INLINE Probabilities(V p, V q, V d) : p(p), q(q), d(d) {}
};

// P phi(d) = P d + Q - P, by the series where that cancels; Q where P is zero
template <class V, class S>
IPRM_INLINE V kl_terms(const Probabilities<V, S>& at) {
  constexpr S kClose = S(kExcessSeriesBelow);
  const V series = at.p * (at.d * at.d) * excess_series<S>(at.d);
  const V closed = at.p * at.d + (at.q - at.p);
  const V terms = (at.d < kClose) & (at.d > -kClose) ? series : closed;
  return at.p == S(0) ? at.q : terms;
}

// sum_k P phi(d), P and Q being the exponentials times one number
template <class T>
IPRM_INLINE typename Lanes<T>::Scalar kl_sum(
    const T* p,
    const T* q,
    const Tail<T>& tail,
    const typename Lanes<T>::Scalar* p_exps,
    const typename Lanes<T>::Scalar* q_exps,
    typename Lanes<T>::Scalar p_scale,
    typename Lanes<T>::Scalar q_scale,
    typename Lanes<T>::Scalar lse_difference) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  using At = Probabilities<V, S>;
  constexpr int64_t kCount = Lanes<T>::kCount;
  V sum = {};
  if (tail) {
    const int64_t from = tail.whole > 0 ? tail.columns - kCount : 0;
    const V terms = kl_terms<V, S>(
        At(load(p_exps + from) * p_scale, load(q_exps + from) * q_scale, tail.values(p) - tail.values(q) - lse_difference));
    sum = tail.only_unseen(terms);
  }
  for (int64_t i = 0; i < tail.whole; i += kCount)
    sum += kl_terms<V, S>(
        At(load(p_exps + i) * p_scale, load(q_exps + i) * q_scale, load(p + i) - load(q + i) - lse_difference));
  return sum_lanes<S>(sum);
}

// A row is one long chain: maximum, exponentials, their sum, its logarithm, terms, their sum. Rows therefore go through each
// link together, some 2,048 logits at a time, so that the pipeline is filled by their independence and what the next link
// reads is still in the first-level cache.
template <class T>
void batch_kl_rows(const KlArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  constexpr int64_t kMostRows = 16;
  const int64_t step = std::clamp<int64_t>(2048 / args.columns, 1, kMostRows);
  const int64_t width = std::max(args.columns, Lanes<T>::kCount);
  const Tail<T> tail(args.columns);
  RowReader<T> p(args.p, args.columns, kMostRows), q(args.q, args.columns, kMostRows);
  std::vector<S> exps(2 * step * width);
  S *kl = static_cast<S*>(args.kl), *p_lse = static_cast<S*>(args.stats), *q_lse = p_lse + args.rows;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = std::min(step, end - first);
    const T *p_rows[kMostRows], *q_rows[kMostRows];
    S tops[2][kMostRows], sums[2][kMostRows], logs[2][kMostRows], ratios[kMostRows];
    for (S& sum : sums[0]) sum = 1;
    for (S& sum : sums[1]) sum = 1;
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
    for (int side = 0; side < 2; ++side)
      for (int64_t i = 0; i < kMostRows; i += Lanes<S>::kCount) store(logs[side] + i, log(load(sums[side] + i)));
    for (int64_t i = 0; i < kMostRows; ++i) ratios[i] = sums[0][i] / sums[1][i];
    for (int64_t i = 0; i < kMostRows; i += Lanes<S>::kCount) store(ratios + i, log(load(ratios + i)));
    for (int64_t i = 0; i < count; ++i) {
      p_lse[first + i] = tops[0][i] + logs[0][i];
      q_lse[first + i] = tops[1][i] + logs[1][i];
      kl[first + i] = kl_sum(
          p_rows[i], q_rows[i], tail, p_exps + i * width, q_exps + i * width, S(1) / sums[0][i], S(1) / sums[1][i],
          (tops[0][i] - tops[1][i]) + ratios[i]);  // not the difference of two rounded logarithms, 5 times less exact
    }
  }
}

// dp = g P (d - KL), dq = g (Q - P), the latter as P (phi(d) - d) where P and Q are close
template <class V, class S>
IPRM_INLINE void kl_gradients(const Probabilities<V, S>& at, S kl, S grad, V* dp, V* dq) {
  constexpr S kClose = S(kExcessSeriesBelow);
  const V zero = {};
  const auto absent = at.p == S(0);
  *dp = grad * (kl != kl ? V{} + kl : absent ? zero : at.p * (at.d - kl));
  const V close = at.p * (at.d * at.d * excess_series<S>(at.d) - at.d);
  *dq = grad * ((at.d < kClose) & (at.d > -kClose) & ~absent ? close : at.q - at.p);
}

template <class T>
void batch_kl_backward_rows(const KlBackwardArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const Tail<T> tail(args.columns);
  RowReader<T> p(args.p, args.columns), q(args.q, args.columns);
  const VectorView<S> grad(args.grad);
  const S *kl = static_cast<const S*>(args.kl), *stats = static_cast<const S*>(args.stats);
  T *grad_p = static_cast<T*>(args.grad_p), *grad_q = static_cast<T*>(args.grad_q);
  for (int64_t row = begin; row < end; ++row) {
    const T *p_row = p(row), *q_row = q(row);
    const S p_lse = stats[row], q_lse = stats[args.rows + row];
    const int64_t offset = row * args.columns;
    V dp, dq;
    for (int64_t i = 0; i < tail.whole; i += kCount) {
      kl_gradients(Probabilities<V, S>(load(p_row + i), load(q_row + i), p_lse, q_lse), kl[row], grad[row], &dp, &dq);
      if (grad_p) store(grad_p + offset + i, dp);
      if (grad_q) store(grad_q + offset + i, dq);
    }
    if (tail) {
      kl_gradients(Probabilities<V, S>(tail.values(p_row), tail.values(q_row), p_lse, q_lse), kl[row], grad[row], &dp, &dq);
      if (grad_p) tail.write(grad_p + offset, dp);
      if (grad_q) tail.write(grad_q + offset, dq);
    }
  }
}
