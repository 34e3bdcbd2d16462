// Inner products of two rows, and the row mathematics of several rows at once, for `geodesic_mixup` and the head step.
// Included behind simd.h, once for every instruction set, so it has no include guard.

#include "../core/slerp.h"

// <x, x>, <y, y>, <x, y> in one pass. Two accumulators each, six chains in all, hide the latency of the additions.
template <class T>
IPRM_INLINE void gram(const T* x, const T* y, int64_t columns, typename Lanes<T>::Scalar* result) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const Tail<T> tail(columns);
  V xx[2] = {}, yy[2] = {}, xy[2] = {};
  for (int64_t i = 0; i < tail.whole; i += kCount) {
    const V a = load(x + i), b = load(y + i);
    const int chain = i / kCount % 2;
    xx[chain] += a * a;
    yy[chain] += b * b;
    xy[chain] += a * b;
  }
  if (tail) {
    const V a = tail.unseen(x), b = tail.unseen(y);
    xx[0] += a * a;
    yy[0] += b * b;
    xy[0] += a * b;
  }
  result[0] = sum_lanes<S>(xx[0] + xx[1]);
  result[1] = sum_lanes<S>(yy[0] + yy[1]);
  result[2] = sum_lanes<S>(xy[0] + xy[1]);
}

// <g, x>, <g, y> in one pass
template <class T>
IPRM_INLINE void dot_both(const T* g, const T* x, const T* y, int64_t columns, typename Lanes<T>::Scalar* result) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const Tail<T> tail(columns);
  V gx[2] = {}, gy[2] = {};
  for (int64_t i = 0; i < tail.whole; i += kCount) {
    const V a = load(g + i);
    const int chain = i / kCount % 2;
    gx[chain] += a * load(x + i);
    gy[chain] += a * load(y + i);
  }
  if (tail) {
    const V a = tail.unseen(g);
    gx[0] += a * tail.unseen(x);
    gy[0] += a * tail.unseen(y);
  }
  result[0] = sum_lanes<S>(gx[0] + gx[1]);
  result[1] = sum_lanes<S>(gy[0] + gy[1]);
}

// 1 + c = |x^ + y^|^2 / 2, whose relative error near the antipode is some ulps over sin(theta); the row is in the first-level
// cache. A dead row is no unit vector.
template <class T, class S>
S antipodal_gap(const T* x, const T* y, int64_t columns, S x_norm, S y_norm, S c, S eps) {
  using V = typename Lanes<T>::Vec;
  if (!(x_norm > eps && y_norm > eps)) return S(1) + c;
  const S inv_x = S(1) / x_norm, inv_y = S(1) / y_norm;
  const Tail<T> tail(columns);
  const auto square = [&](V a, V b) { return (a * inv_x + b * inv_y) * (a * inv_x + b * inv_y); };
  V sum = {};
  for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount) sum += square(load(x + i), load(y + i));
  if (tail) sum += tail.only_unseen(square(tail.values(x), tail.values(y)));
  return sum_lanes<S>(sum) / S(2);
}

// ||x||, ||y|| and the saved c of rows from their products, into (3, rows) statistics
template <class T, class S>
IPRM_INLINE void write_stats(
    S* stats, int64_t rows, int64_t row, const S* xx, const S* yy, const S* xy, int64_t count, S eps, const T* const* x,
    const T* const* y, int64_t columns) {
  S *x_norm = stats + row, *y_norm = x_norm + rows, *saved = y_norm + rows;
  store_rows(x_norm, square_root(load_rows(xx, count)), count);
  store_rows(y_norm, square_root(load_rows(yy, count)), count);
  for (int64_t i = 0; i < count; ++i) {
    const S c = cosine(xx[i], yy[i], xy[i], eps);
    saved[i] = c;
    if (c < kNearAntipode<S>)
      saved[i] = saved_cosine(c, antipodal_gap(x[i], y[i], columns, x_norm[i], y_norm[i], c, eps));
  }
}

// Mix coefficients of rows from (3, rows) statistics, stored in from_x and from_y as whole vectors
template <class S>
IPRM_INLINE void mix_coefficients(
    S* from_x, S* from_y, typename Lanes<S>::Vec weight, const S* stats, int64_t rows, int64_t row, int64_t count, S eps) {
  using V = typename Lanes<S>::Vec;
  const MixCoefficients<S, V> mix(
      weight, load_rows(stats + row, count), load_rows(stats + rows + row, count), load_rows(stats + 2 * rows + row, count), eps);
  store(from_x, mix.from_x);
  store(from_y, mix.from_y);
}
