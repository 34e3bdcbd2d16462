// Inner products of two rows, for the rows of `geodesic_mixup` and of the head step. Included behind simd.h, once for every
// instruction set, so it has no include guard.

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
