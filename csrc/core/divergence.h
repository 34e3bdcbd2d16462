// The terms of the Kullback-Leibler divergence, for scalars (device) and for vectors of them (CPU). Included inside the
// namespace that uses it, once for every instruction set on the CPU, so it has no include guard.

// phi(d) = d + exp(-d) - 1 >= 0. Below this |d| the sum cancels, and its series is taken.
constexpr double kExcessSeriesBelow = 0.5;

// phi(d) / d^2 = sum (-d)^n / (n + 2)!, full relative accuracy for |d| < kExcessSeriesBelow. V: T, or a vector of them.
template <class T, class V>
IPRM_INLINE V excess_series(V d) {
  constexpr int kTerms = sizeof(T) == 4 ? 9 : 15;
  T factorial = 1;
  for (int n = 2; n <= kTerms + 1; ++n) factorial *= T(n);
  V sum = d - d;
  for (int n = kTerms + 1; n > 1; --n) {
    sum = T(1) / factorial - d * sum;
    factorial /= T(n);
  }
  return sum;
}
