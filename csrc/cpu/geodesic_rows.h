// The rows of `normalize` and `geodesic_mixup`. Compiled once for every instruction set by for_each_isa.h.

#include "geodesic_terms.h"

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

// out = a * by_a + b * by_b
template <class T>
IPRM_INLINE void combine(
    T* out, const T* a, typename Lanes<T>::Scalar by_a, const T* b, typename Lanes<T>::Scalar by_b, int64_t columns) {
  const Tail<T> tail(columns);
  for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount) store(out + i, load(a + i) * by_a + load(b + i) * by_b);
  if (tail) tail.write(out, tail.values(a) * by_a + tail.values(b) * by_b);
}

// out = a * by_a + b * by_b, shortened to length 1 where rounding has made it longer
template <class T>
void combine_no_longer_than_one(
    T* out, const T* a, typename Lanes<T>::Scalar by_a, const T* b, typename Lanes<T>::Scalar by_b, int64_t columns) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<T>::Vec;
  const Tail<T> tail(columns);
  const auto combined = [&](V one, V other) { return one * by_a + other * by_b; };
  const auto square = [&](V one, V other) { return combined(one, other) * combined(one, other); };
  V sum = {};
  for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount) sum += square(load(a + i), load(b + i));
  if (tail) sum += tail.only_unseen(square(tail.values(a), tail.values(b)));
  const S length = std::sqrt(sum_lanes<S>(sum)), shorter = length > S(1) ? S(1) / length : S(1);
  for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount) store(out + i, combined(load(a + i), load(b + i)) * shorter);
  if (tail) tail.write(out, combined(tail.values(a), tail.values(b)) * shorter);
}

// out = a * by_a + b * by_b + c * by_c
template <class T>
IPRM_INLINE void combine(
    T* out,
    const T* a,
    typename Lanes<T>::Scalar by_a,
    const T* b,
    typename Lanes<T>::Scalar by_b,
    const T* c,
    typename Lanes<T>::Scalar by_c,
    int64_t columns) {
  const Tail<T> tail(columns);
  for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount)
    store(out + i, load(a + i) * by_a + load(b + i) * by_b + load(c + i) * by_c);
  if (tail) tail.write(out, tail.values(a) * by_a + tail.values(b) * by_b + tail.values(c) * by_c);
}

template <class T>
void normalize_rows(const NormalizeArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  RowReader<T> x(args.x, args.columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* x_row = x(row);
    T* out = static_cast<T*>(args.out) + row * args.columns;
    S products[2];
    dot_both(x_row, x_row, x_row, args.columns, products);
    const S norm = std::sqrt(products[0]);
    static_cast<S*>(args.norm)[row] = norm;
    combine(out, x_row, inverse_norm(norm, S(args.eps)), x_row, S(0), args.columns);
  }
}

template <class T>
void normalize_backward_rows(const NormalizeBackwardArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  RowReader<T> x(args.x, args.columns), grad(args.grad, args.columns);
  const VectorView<S> norms(args.norm);
  for (int64_t row = begin; row < end; ++row) {
    const T *x_row = x(row), *g_row = grad(row);
    T* out = static_cast<T*>(args.grad_x) + row * args.columns;
    const S norm = norms[row], inverse = inverse_norm(norm, S(args.eps));
    if (norm <= S(args.eps)) {
      std::memset(out, 0, args.columns * sizeof(T));
      continue;
    }
    S dots[2];
    dot_both(g_row, x_row, x_row, args.columns, dots);
    combine(out, g_row, inverse, x_row, -dots[0] * inverse * inverse * inverse, args.columns);
  }
}

template <class T>
void geodesic_mixup_rows(const MixupArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  RowReader<T> x(args.x, args.columns), y(args.y, args.columns);
  const VectorView<S> weight(args.weight);
  S* stats = static_cast<S*>(args.stats);
  const S eps = S(args.eps);
  for (int64_t row = begin; row < end; ++row) {
    const T *x_row = x(row), *y_row = y(row);
    S products[3];
    gram(x_row, y_row, args.columns, products);
    const S x_norm = std::sqrt(products[0]), y_norm = std::sqrt(products[1]);
    const S c = products[2] * inverse_norm(x_norm, eps) * inverse_norm(y_norm, eps);
    stats[row] = x_norm;
    stats[args.rows + row] = y_norm;
    stats[2 * args.rows + row] = c;
    const MixCoefficients<S> mix(weight[row], x_norm, y_norm, c, eps);
    T* z = static_cast<T*>(args.z) + row * args.columns;
    if (c < kNearAntipode<S>) combine_no_longer_than_one(z, x_row, mix.from_x, y_row, mix.from_y, args.columns);
    else combine(z, x_row, mix.from_x, y_row, mix.from_y, args.columns);
  }
}

template <class T>
void geodesic_mixup_backward_rows(const MixupBackwardArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  RowReader<T> x(args.x, args.columns), y(args.y, args.columns), grad(args.grad, args.columns);
  const VectorView<S> weight(args.weight);
  const S* stats = static_cast<const S*>(args.stats);
  T *grad_x = static_cast<T*>(args.grad_x), *grad_y = static_cast<T*>(args.grad_y);
  S* grad_w = static_cast<S*>(args.grad_w);
  for (int64_t row = begin; row < end; ++row) {
    const T *x_row = x(row), *y_row = y(row), *g_row = grad(row);
    S products[2];
    dot_both(g_row, x_row, y_row, args.columns, products);
    const S c = stats[2 * args.rows + row];
    const MixRow<S> mix(weight[row], stats[row], stats[args.rows + row], c, S(args.eps));
    const MixGradient<S> to(mix, c, products[0], products[1]);
    const int64_t offset = row * args.columns;
    if (grad_w) grad_w[row] = to.weight;
    if (grad_x && mix.x_dead) std::memset(grad_x + offset, 0, args.columns * sizeof(T));
    else if (grad_x) combine(grad_x + offset, g_row, to.x_from_g, y_row, to.x_from_y, x_row, to.x_from_x, args.columns);
    if (grad_y && mix.y_dead) std::memset(grad_y + offset, 0, args.columns * sizeof(T));
    else if (grad_y) combine(grad_y + offset, g_row, to.y_from_g, x_row, to.y_from_x, y_row, to.y_from_y, args.columns);
  }
}
