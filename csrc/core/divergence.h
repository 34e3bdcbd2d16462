// The terms of the Kullback-Leibler divergence, for scalars (device) and for vectors of them (CPU). Included inside the
// namespace that uses it, once for every instruction set on the CPU, so it has no include guard.

// phi(d) = d + exp(-d) - 1 >= 0. Below this |d| the sum cancels, and the series is used instead.
constexpr double kExcessSeriesBelow = 0.5;

template <class T>
constexpr int kExcessSeriesTerms = sizeof(T) == 4 ? 9 : 15;

// phi(d) / d^2 = sum (-d)^n / (n + 2)!, full relative accuracy for |d| < kExcessSeriesBelow. V: T, or a vector of them.
template <class T, class V>
IPRM_INLINE V excess_series(V d) {
  constexpr int kTerms = kExcessSeriesTerms<T>;
  T factorial = 1;
  for (int n = 2; n <= kTerms + 1; ++n) factorial *= T(n);
  V sum = d - d;
  for (int n = kTerms + 1; n > 1; --n) {
    sum = T(1) / factorial - d * sum;
    factorial /= T(n);
  }
  return sum;
}

// The statistics of a row's softmax: its maximum, and the sum of exp(logit - maximum).
template <class S>
struct Softmax {
  S top, sum;
};

// x - y rounded, and its rounding error (Knuth's two-sum), which is NaN where the difference is infinite
template <class V>
IPRM_INLINE V difference(V x, V y, V* rest) {
  const V high = x - y, back = high - x;
  *rest = (x - (high - back)) - (y + back);
  return high;
}

// d = log P - log Q. Logits are taken relative to their row's maximum, and d includes the rounding error of that subtraction: a
// common offset changes nothing, and the difference of close logits is exact. log_ratio is log(p.sum / q.sum), because the
// difference of two rounded logarithms is 5 times less exact.
template <class V, class S>
IPRM_INLINE V log_quotient(V p_logits, V q_logits, const Softmax<S>& p, const Softmax<S>& q, S log_ratio) {
  V p_rest, q_rest;
  const V a = difference(p_logits, V{} + p.top, &p_rest), b = difference(q_logits, V{} + q.top, &q_rest);
  return (a - b) + (p_rest - q_rest) - log_ratio;
}

// P phi(d) = P d + Q - P, by the series where the sum cancels; Q where P is zero; infinite where only Q is zero. A NaN in d, from
// an infinite difference, enters none of these.
template <class S, class V>
IPRM_INLINE V kl_terms(V p, V q, V d, V p_logits, V q_logits) {
  constexpr S kClose = S(kExcessSeriesBelow);
  constexpr S kLowest = -S(__builtin_inff());
  const V series = p * (d * d) * excess_series<S>(d);
  const V closed = p * d + (q - p);
  const V terms = (d < kClose) & (d > -kClose) ? series : closed;
  const V possible = p == S(0) ? q : terms;
  return (q_logits == kLowest) & (p_logits != kLowest) ? V{} - kLowest : possible;
}
