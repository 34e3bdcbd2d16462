// Softmax and Kullback-Leibler terms of one row, for the rows of `batch_kl` and of the head step. Included behind simd.h, once
// for every instruction set, so it has no include guard.

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

// Columns after which a running sum is put aside and begun anew, 32 vectors: a sum of 20,000 terms in one run is wrong by 1e-6.
template <class T>
constexpr int64_t kPartialSum = 32 * Lanes<T>::kCount;

// sum exp(row - top), the exponentials left in `exps`, zero in lanes past the end
template <class T>
IPRM_INLINE typename Lanes<T>::Scalar exp_sum(
    const T* row, const Tail<T>& tail, typename Lanes<T>::Scalar top, typename Lanes<T>::Scalar* exps) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  V sum = {}, part = {};
  if (tail) {  // first, as its lanes that overlap are written again
    sum = exp(tail.unseen(row, kLowest) - top);
    store(exps + (tail.whole > 0 ? tail.columns - kCount : 0), sum);
  }
  for (int64_t i = 0; i < tail.whole; i += kCount) {
    const V value = exp(load(row + i) - top);
    store(exps + i, value);
    part += value;
    if (i % kPartialSum<T> == 0) {
      sum += part;
      part = V{};
    }
  }
  return sum_lanes<S>(sum + part);
}

// What a row's softmax is made of: its maximum, and the sum of its exponentials from there.
template <class S>
struct Softmax {
  S top, sum;
};

// x - y rounded, and what rounding took from it (Knuth's two-sum), NaN where the difference is infinite
template <class V>
IPRM_INLINE V difference(V x, V y, V* rest) {
  const V high = x - y, back = high - x;
  *rest = (x - (high - back)) - (y + back);
  return high;
}

// d = log P - log Q. Logits are taken relative to their row's maximum, and the rounding of that goes into d: so a common offset
// changes nothing, and the difference of close logits is exact. log_ratio: log(p.sum / q.sum), not the difference of two rounded
// logarithms, which is 5 times less exact.
template <class V, class S>
IPRM_INLINE V log_quotient(V p_logits, V q_logits, const Softmax<S>& p, const Softmax<S>& q, S log_ratio) {
  V p_rest, q_rest;
  const V a = difference(p_logits, V{} + p.top, &p_rest), b = difference(q_logits, V{} + q.top, &q_rest);
  return (a - b) + (p_rest - q_rest) - log_ratio;
}

// P phi(d) = P d + Q - P, by the series where that cancels; Q where P is zero; infinite where Q alone is impossible. A d that is
// NaN, of an infinite difference, is in none of these.
template <class S, class V>
IPRM_INLINE V kl_terms(V p, V q, V d, V p_logits, V q_logits) {
  constexpr S kClose = S(kExcessSeriesBelow);
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  const V series = p * (d * d) * excess_series<S>(d);
  const V closed = p * d + (q - p);
  const V terms = (d < kClose) & (d > -kClose) ? series : closed;
  const V possible = p == S(0) ? q : terms;
  return (q_logits == kLowest) & (p_logits != kLowest) ? V{} - kLowest : possible;
}

// sum_k P phi(d), from the exponentials of both rows
template <class T>
IPRM_INLINE typename Lanes<T>::Scalar kl_sum(
    const T* p,
    const T* q,
    const Tail<T>& tail,
    const typename Lanes<T>::Scalar* p_exps,
    const typename Lanes<T>::Scalar* q_exps,
    const Softmax<typename Lanes<T>::Scalar>& of_p,
    const Softmax<typename Lanes<T>::Scalar>& of_q,
    typename Lanes<T>::Scalar log_ratio) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const S p_scale = S(1) / of_p.sum, q_scale = S(1) / of_q.sum;
  V sum = {}, part = {};
  const auto term = [&](V p_logits, V q_logits, int64_t at) {
    const V d = log_quotient<V, S>(p_logits, q_logits, of_p, of_q, log_ratio);
    return kl_terms<S>(load(p_exps + at) * p_scale, load(q_exps + at) * q_scale, d, p_logits, q_logits);
  };
  if (tail) sum = tail.only_unseen(term(tail.values(p), tail.values(q), tail.whole > 0 ? tail.columns - kCount : 0));
  for (int64_t i = 0; i < tail.whole; i += kCount) {
    part += term(load(p + i), load(q + i), i);
    if (i % kPartialSum<T> == 0) {
      sum += part;
      part = V{};
    }
  }
  return sum_lanes<S>(sum + part);
}
