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

// ||x||, ||y|| and c of rows from their products, into (3, rows) statistics
template <class S>
IPRM_INLINE void write_stats(S* stats, int64_t rows, int64_t row, const S* xx, const S* yy, const S* xy, int64_t count, S eps) {
  store_rows(stats + row, square_root(load_rows(xx, count)), count);
  store_rows(stats + rows + row, square_root(load_rows(yy, count)), count);
  for (int64_t i = 0; i < count; ++i) stats[2 * rows + row + i] = cosine(xx[i], yy[i], xy[i], eps);
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
