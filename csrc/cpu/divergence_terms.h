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

// adds value to high, and the rounding error to low
template <class V>
IPRM_INLINE void add_exactly(V& high, V& low, V value) {
  const V sum = high + value, back = sum - high;
  low += (high - (sum - back)) + (value - back);
  high = sum;
}

// The sum of high and low over all lanes.
template <class S, class V>
IPRM_INLINE S sum_lanes_exactly(V high, V low) {
  if constexpr (sizeof(V) == 2 * sizeof(S)) {
    S sum = high[0], rest = low[0] + low[1];
    add_exactly(sum, rest, high[1]);
    return sum + rest;
  } else {
    typedef S Half __attribute__((vector_size(sizeof(V) / 2)));
    Half highs[2], lows[2];
    __builtin_memcpy(highs, &high, sizeof(V));
    __builtin_memcpy(lows, &low, sizeof(V));
    Half sum = highs[0], rest = lows[0] + lows[1];
    add_exactly(sum, rest, highs[1]);
    return sum_lanes_exactly<S>(sum, rest);
  }
}

// sum exp(row - top); stores the exponentials in `exps`, zero in lanes past the end. For close rows log P - log Q is as small as
// an ulp or two of the sums, so the sums are rounded only once, for any order in which an instruction set adds its lanes.
template <class T>
IPRM_INLINE typename Lanes<T>::Scalar exp_sum(
    const T* row, const Tail<T>& tail, typename Lanes<T>::Scalar top, typename Lanes<T>::Scalar* exps) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  constexpr S kLowest = -std::numeric_limits<S>::infinity();
  V sum = {}, rest = {};
  if (tail) {  // first, because the main loop overwrites its overlapping lanes
    sum = exp(tail.unseen(row, kLowest) - top);
    store(exps + (tail.whole > 0 ? tail.columns - kCount : 0), sum);
  }
  for (int64_t i = 0; i < tail.whole; i += kCount) {
    const V value = exp(load(row + i) - top);
    store(exps + i, value);
    add_exactly(sum, rest, value);
  }
  return sum_lanes_exactly<S>(sum, rest);
}

// Columns per running sum, 32 vectors, after which a new one starts: a single running sum of 20,000 terms is wrong by 1e-6.
template <class T>
constexpr int64_t kPartialSum = 32 * Lanes<T>::kCount;

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
