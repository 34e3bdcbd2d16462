// The rows of `normalize` and `geodesic_mixup`. Compiled once for every instruction set by for_each_isa.h.

#include "geodesic_terms.h"

// out = a * by_a + b * by_b; stream: write past the caches
template <class T>
IPRM_INLINE void combine(
    T* out,
    const T* a,
    typename Lanes<T>::Scalar by_a,
    const T* b,
    typename Lanes<T>::Scalar by_b,
    int64_t columns,
    bool stream = false) {
  const Tail<T> tail(columns);
  for (int64_t i = 0; stream && i < tail.whole; i += Lanes<T>::kCount)
    store_past_caches(out + i, load(a + i) * by_a + load(b + i) * by_b);
  for (int64_t i = 0; !stream && i < tail.whole; i += Lanes<T>::kCount) store(out + i, load(a + i) * by_a + load(b + i) * by_b);
  if (tail) tail.write(out, tail.values(a) * by_a + tail.values(b) * by_b);
}

// out = a * by_a + b * by_b, shortened to length 1 if rounding has made it longer
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
    int64_t columns,
    bool stream) {
  const Tail<T> tail(columns);
  const auto combined = [&](int64_t i) { return load(a + i) * by_a + load(b + i) * by_b + load(c + i) * by_c; };
  for (int64_t i = 0; stream && i < tail.whole; i += Lanes<T>::kCount) store_past_caches(out + i, combined(i));
  for (int64_t i = 0; !stream && i < tail.whole; i += Lanes<T>::kCount) store(out + i, combined(i));
  if (tail) tail.write(out, tail.values(a) * by_a + tail.values(b) * by_b + tail.values(c) * by_c);
}

IPRM_INLINE bool is_zero(float value) { return value == 0; }
IPRM_INLINE bool is_zero(double value) { return value == 0; }
template <class T>
IPRM_INLINE bool is_zero(T value) {
  return (value.bits & 0x7fff) == 0;
}

// Whether all of a gradient row is zero although `sum`, of what it leads to, is not finite: the gradient of the row would be 0 * inf
// and is zero instead. Elsewhere a zero row gives zeros by itself and is not looked at.
template <class T, class S>
bool unselected(const T* grad, int64_t columns, S sum) {
  if (sum - sum == S(0)) return false;
  for (int64_t i = 0; i < columns; ++i)
    if (!is_zero(grad[i])) return false;
  return true;
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
    if (unselected(g_row, args.columns, inverse + dots[0])) {
      std::memset(out, 0, args.columns * sizeof(T));
      continue;
    }
    combine(out, g_row, inverse, x_row, -dots[0] * inverse * inverse * inverse, args.columns);
  }
}

// Rows whose row mathematics is computed at once: at most the lanes of a vector, and at most as many as stay in the first-level
// cache until their second read, 16 KiB of both sides.
template <class T>
int64_t rows_at_once(int64_t columns) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(1, columns * sizeof(T)), 1, Lanes<T>::kCount);
}

template <class T>
void geodesic_mixup_rows(const MixupArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t step = rows_at_once<T>(args.columns);
  RowReader<T> x(args.x, args.columns, step), y(args.y, args.columns, step);
  const VectorView<S> weight(args.weight);
  S* stats = static_cast<S*>(args.stats);
  const S eps = S(args.eps);
  const bool stream = past_caches(args.z, args.rows, args.columns * sizeof(T));
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = std::min(step, end - first);
    const T *x_rows[kCount], *y_rows[kCount];
    alignas(64) S products[3][kCount], weights[kCount] = {}, from_x[kCount], from_y[kCount];
    for (int64_t i = 0; i < count; ++i) {
      x_rows[i] = x(first + i);
      y_rows[i] = y(first + i);
      weights[i] = weight[first + i];
      if (args.known) continue;
      S row[3];
      gram(x_rows[i], y_rows[i], args.columns, row);
      for (int k = 0; k < 3; ++k) products[k][i] = row[k];
    }
    if (!args.known)
      write_stats(stats, args.rows, first, products[0], products[1], products[2], count, eps, x_rows, y_rows, args.columns);
    mix_coefficients(from_x, from_y, load(weights), stats, args.rows, first, count, eps);
    for (int64_t i = 0; i < count; ++i) {
      T* z = static_cast<T*>(args.z) + (first + i) * args.columns;
      if (stats[2 * args.rows + first + i] < kNearAntipode<S>)
        combine_no_longer_than_one(z, x_rows[i], from_x[i], y_rows[i], from_y[i], args.columns);
      else combine(z, x_rows[i], from_x[i], y_rows[i], from_y[i], args.columns, stream);
    }
  }
  if (stream) settle_stores();
}

template <class T>
void geodesic_mixup_backward_rows(const MixupBackwardArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const int64_t step = rows_at_once<T>(args.columns);
  RowReader<T> x(args.x, args.columns, step), y(args.y, args.columns, step), grad(args.grad, args.columns, step);
  const VectorView<S> weight(args.weight);
  const S *x_norms = static_cast<const S*>(args.stats), *y_norms = x_norms + args.rows, *cosines = y_norms + args.rows;
  T* outputs[2] = {static_cast<T*>(args.grad_x), static_cast<T*>(args.grad_y)};
  S* grad_w = static_cast<S*>(args.grad_w);
  const S eps = S(args.eps);
  const bool stream[2] = {
      past_caches(outputs[0], args.rows, args.columns * sizeof(T)), past_caches(outputs[1], args.rows, args.columns * sizeof(T))};
  for (int64_t first = begin; first < end; first += step) {
    const int64_t count = std::min(step, end - first);
    const T *x_rows[kCount], *y_rows[kCount], *g_rows[kCount];
    alignas(64) S g_x[kCount] = {}, g_y[kCount] = {}, weights[kCount] = {}, from_g[2][kCount],
        from_x[2][kCount], from_y[2][kCount];
    for (int64_t i = 0; i < count; ++i) {
      x_rows[i] = x(first + i);
      y_rows[i] = y(first + i);
      g_rows[i] = grad(first + i);
      weights[i] = weight[first + i];
      S row[2];
      dot_both(g_rows[i], x_rows[i], y_rows[i], args.columns, row);
      g_x[i] = row[0];
      g_y[i] = row[1];
    }
    const V saved = load_rows(cosines + first, count);
    const MixRow<S, V> mix(load(weights), load_rows(x_norms + first, count), load_rows(y_norms + first, count), saved, eps);
    const MixGradient<S, V> to(mix, load(g_x), load(g_y));
    if (grad_w) store_rows(grad_w + first, to.weight, count);
    store(from_g[0], to.x_from_g);
    store(from_x[0], to.x_from_x);
    store(from_y[0], to.x_from_y);
    store(from_g[1], to.y_from_g);
    store(from_x[1], to.y_from_x);
    store(from_y[1], to.y_from_y);
    for (int64_t i = 0; i < count; ++i) {
      const S norms[2] = {x_norms[first + i], y_norms[first + i]};
      S sum = g_x[i] + g_y[i];
      for (int side = 0; side < 2; ++side) sum += from_g[side][i] + from_x[side][i] + from_y[side][i];
      const bool nothing = unselected(g_rows[i], args.columns, sum);
      if (nothing && grad_w) grad_w[first + i] = 0;
      for (int side = 0; side < 2; ++side) {
        if (outputs[side] == nullptr) continue;
        T* out = outputs[side] + (first + i) * args.columns;
        if (nothing || norms[side] <= eps) std::memset(out, 0, args.columns * sizeof(T));
        else combine(out, g_rows[i], from_g[side][i], x_rows[i], from_x[side][i], y_rows[i], from_y[side][i], args.columns, stream[side]);
      }
    }
  }
  if (stream[0] || stream[1]) settle_stores();
}
