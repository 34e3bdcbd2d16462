// The rows of the linear head step, from features to logits, losses and their gradients. Compiled once for every instruction
// set by for_each_isa.h. Features are read in tiles of kTileRows rows; what follows the projections is work on rows of C
// numbers.

// Rows of a matrix of any strides in the arithmetic type: a pointer where they are that already, else a copy in `slots` turns.
template <class T>
class ArithmeticRows {
  using S = typename Lanes<T>::Scalar;

 public:
  ArithmeticRows(const MatrixView& view, int64_t columns, int64_t slots)
      : rows_(view, columns, slots), columns_(columns), slots_(slots), copies_(std::is_same_v<T, S> ? 0 : columns * slots) {}

  IPRM_INLINE const S* operator()(int64_t row) {
    const T* from = rows_(row);
    if constexpr (std::is_same_v<T, S>) {
      return from;
    } else {
      const Tail<T> tail(columns_);
      S* copy = copies_.data() + row % slots_ * columns_;
      for (int64_t i = 0; i < tail.whole; i += Lanes<T>::kCount) store(copy + i, load(from + i));
      if (tail) Tail<S>(columns_).write(copy, tail.values(from));
      return copy;
    }
  }

 private:
  RowReader<T> rows_;
  int64_t columns_, slots_;
  std::vector<S> copies_;
};

// The exponentials of a row, left in `exps`.
template <class S>
Softmax<S> softmax_of(const S* row, const Tail<S>& tail, S* exps) {
  const S top = row_max(row, tail);
  return {top, exp_sum(row, tail, top, exps)};
}

// out = from + bias
template <class S>
IPRM_INLINE void biased(S* out, const S* from, const S* bias, const Tail<S>& tail) {
  using V = typename Lanes<S>::Vec;
  const auto add = [&](int64_t i) { return load(from + i) + (bias ? load(bias + i) : V{}); };
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount) store(out + i, add(i));
  if (tail) tail.write(out, tail.values(from) + (bias ? tail.values(bias) : V{}));
}

// out = a * by_a + v * by_v + bias
template <class S>
IPRM_INLINE void mixed_logits(S* out, const S* a, const S* v, S by_a, S by_v, const S* bias, const Tail<S>& tail) {
  using V = typename Lanes<S>::Vec;
  const auto mixed = [&](V of_a, V of_v, V of_bias) { return of_a * by_a + of_v * by_v + of_bias; };
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount)
    store(out + i, mixed(load(a + i), load(v + i), bias ? load(bias + i) : V{}));
  if (tail) tail.write(out, mixed(tail.values(a), tail.values(v), bias ? tail.values(bias) : V{}));
}

// `from` in the storage type
template <class T, class S>
void write_row(T* to, const S* from, int64_t columns) {
  const Tail<S> tail(columns);
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount) store(to + i, load(from + i));
  if (tail) Tail<T>(columns).write(to, tail.values(from));
}

// Projections of x and y on their two heads, their norms and c; then the probe with the weight lambda, and KL of either
// modality's prediction from it.
template <class T>
void head_probe_rows(const HeadProbeArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  constexpr int64_t kCount = Lanes<S>::kCount;
  const int64_t classes = args.classes, columns = args.columns, padded = std::max(classes, Lanes<S>::kCount);
  const S* heads[3] = {
      static_cast<const S*>(args.weight_mix), static_cast<const S*>(args.weight_x), static_cast<const S*>(args.weight_y)};
  std::vector<const S*> w[2];  // of x, of y: the rows of the mixture's head, then of their own
  for (int side = 0; side < 2; ++side)
    for (const S* head : {heads[0], heads[1 + side]})
      for (int64_t k = 0; k < classes; ++k) w[side].push_back(head + k * columns);
  ArithmeticRows<T> features[2] = {{args.x, columns, kTileRows}, {args.y, columns, kTileRows}};
  std::vector<S> tile(2 * kTileRows * 2 * classes), scratch(3 * padded);
  S *z = scratch.data(), *exps = z + padded, *z_exps = exps + padded;
  S* projected[2] = {static_cast<S*>(args.a), static_cast<S*>(args.v)};
  S* own[2] = {static_cast<S*>(args.u_x), static_cast<S*>(args.u_y)};
  T* logits[2] = {static_cast<T*>(args.logits_x), static_cast<T*>(args.logits_y)};
  const S* bias[3] = {
      static_cast<const S*>(args.bias_x), static_cast<const S*>(args.bias_y), static_cast<const S*>(args.bias_mix)};
  S *stats = static_cast<S*>(args.stats), *kl = static_cast<S*>(args.kl_rows);
  const S eps = S(kHeadEps);
  const auto weight = typename Lanes<S>::Vec{} + *static_cast<const S*>(args.weight);
  const Tail<S> tail(classes);
  static_assert(kTileRows <= kCount);
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int count = int(std::min<int64_t>(kTileRows, end - first));
    const S* rows[2][kTileRows];
    for (int side = 0; side < 2; ++side) {
      for (int r = 0; r < kTileRows; ++r) rows[side][r] = r < count ? features[side](first + r) : rows[side][count - 1];
      project_tile<S>(
          rows[side], count, w[side].data(), 2 * classes, columns, &tile[side * kTileRows * 2 * classes], 2 * classes);
    }
    alignas(64) S products[3][kCount] = {}, from_x[kCount], from_y[kCount];
    for (int r = 0; r < count; ++r) {
      S row[3];
      gram(rows[0][r], rows[1][r], columns, row);
      for (int k = 0; k < 3; ++k) products[k][r] = row[k];
    }
    write_stats(stats, args.rows, first, products[0], products[1], products[2], count, eps);
    mix_coefficients(from_x, from_y, weight, stats, args.rows, first, count, eps);
    for (int r = 0; r < count; ++r) {
      const int64_t row = first + r;
      for (int side = 0; side < 2; ++side) {
        const S* from = &tile[(side * kTileRows + r) * 2 * classes];
        std::copy_n(from, classes, projected[side] + row * classes);
        biased(own[side] + row * classes, from + classes, bias[side], tail);
        if (logits[side]) write_row(logits[side] + row * classes, own[side] + row * classes, classes);
      }
      mixed_logits(z, projected[0] + row * classes, projected[1] + row * classes, from_x[r], from_y[r], bias[2], tail);
      const Softmax<S> of_z = softmax_of(z, tail, z_exps);
      for (int side = 0; side < 2; ++side) {
        const S* u = own[side] + row * classes;
        const Softmax<S> of_u = softmax_of(u, tail, exps);
        kl[side * args.rows + row] = kl_sum(u, z, tail, exps, z_exps, of_u, of_z, std::log(of_u.sum / of_z.sum));
      }
    }
  }
}

// -(1 - smoothing) log P_label - smoothing / C sum log P
template <class S>
S cross_entropy(const S* logits, const Tail<S>& tail, const Label& label, S smoothing, S* exps) {
  if (!label.counted) return S(0);
  if (label.wrong) return std::numeric_limits<S>::quiet_NaN();
  const Softmax<S> of = softmax_of(logits, tail, exps);
  const S top = of.top, log_sum = std::log(of.sum);
  const S sharp = (top - logits[label.index]) + log_sum;
  if (smoothing == S(0)) return sharp;
  S mean = 0;
  for (int64_t k = 0; k < tail.columns; ++k) mean += top - logits[k];
  return (S(1) - smoothing) * sharp + smoothing * (mean / S(tail.columns) + log_sum);
}

// The mixture with the weight just measured, and the cross entropies of it, x and y.
template <class T>
void head_rebalance_rows(const HeadRebalanceArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  const int64_t classes = args.classes, padded = std::max(classes, Lanes<S>::kCount);
  std::vector<S> scratch(2 * padded);
  S *z = scratch.data(), *exps = z + padded, *losses = static_cast<S*>(args.loss_rows);
  const S *stats = static_cast<const S*>(args.stats), *bias = static_cast<const S*>(args.bias_mix);
  const auto weight = typename Lanes<S>::Vec{} + *static_cast<const S*>(args.strength);
  const Tail<S> tail(classes);
  constexpr int64_t kCount = Lanes<S>::kCount;
  for (int64_t first = begin; first < end; first += kCount) {
    const int64_t count = std::min(kCount, end - first);
    alignas(64) S from_x[kCount], from_y[kCount];
    mix_coefficients(from_x, from_y, weight, stats, args.rows, first, count, S(kHeadEps));
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t offset = row * classes;
      const S *a = static_cast<const S*>(args.a) + offset, *v = static_cast<const S*>(args.v) + offset;
      mixed_logits(z, a, v, from_x[row - first], from_y[row - first], bias, tail);
      write_row(static_cast<T*>(args.logits_mix) + offset, z, classes);
      const Label label(args.target[row], classes, args.ignore_index);
      const S* heads[3] = {z, static_cast<const S*>(args.u_x) + offset, static_cast<const S*>(args.u_y) + offset};
      for (int k = 0; k < 3; ++k)
        losses[k * args.rows + row] = cross_entropy(heads[k], tail, label, S(args.label_smoothing), exps);
    }
  }
}

// scale (P - (1 - smoothing) onehot - smoothing / C) + what came to the logits themselves
template <class T, class S>
void logit_gradient(
    S* out, const S* logits, const Tail<S>& tail, const Label& label, S scale, S smoothing, const T* upstream) {
  const int64_t classes = tail.columns;
  if (!label.counted) {
    std::fill_n(out, classes, S(0));
  } else {
    if (label.wrong) scale = std::numeric_limits<S>::quiet_NaN();
    const S sum = softmax_of(logits, tail, out).sum;
    const S off = scale * smoothing / S(classes);
    for (int64_t k = 0; k < classes; ++k) out[k] = out[k] * (scale / sum) - off;
    if (!label.wrong) out[label.index] -= scale * (S(1) - smoothing);
  }
  if (upstream == nullptr) return;
  // the tail overlaps columns that the loop changes in place, so it is added up before and written after
  typename Lanes<S>::Vec rest = {};
  if (tail) rest = tail.values(out) + Tail<T>(classes).values(upstream);
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount) store(out + i, load(out + i) + load(upstream + i));
  if (tail) tail.write(out, rest);
}

// Gradients of all logits, and what the gradients of the features and the heads are made of: see HeadCoefficients.
template <class T>
void head_coefficient_rows(const HeadCoefficientArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<S>::kCount;
  const int64_t classes = args.classes, padded = std::max(classes, Lanes<S>::kCount);
  std::vector<S> scratch(2 * padded);
  S *z = scratch.data(), *out = z + padded;
  const HeadCoefficients<S> to(args.coefficients, args.rows, classes);
  const S *stats = static_cast<const S*>(args.stats), *bias = static_cast<const S*>(args.bias_mix);
  const S *scales = static_cast<const S*>(args.scales), smoothing = S(args.label_smoothing);
  const V weight = V{} + *static_cast<const S*>(args.strength);
  const Tail<S> tail(classes);
  const auto upstream = [&](int k, int64_t row) {
    return args.upstream[k] == nullptr ? nullptr : static_cast<const T*>(args.upstream[k]) + row * classes;
  };
  for (int64_t first = begin; first < end; first += kCount) {
    const int64_t count = std::min(kCount, end - first);
    const V x_norm = load_rows(stats + first, count), y_norm = load_rows(stats + args.rows + first, count);
    const V c = load_rows(stats + 2 * args.rows + first, count);
    const MixRow<S, V> row_mix(weight, x_norm, y_norm, c, S(kHeadEps));
    alignas(64) S from_x[kCount], from_y[kCount], g_x[kCount] = {}, g_y[kCount] = {};
    store(from_x, row_mix.from_x());
    store(from_y, row_mix.from_y());
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t at = row - first;
      const S *a = static_cast<const S*>(args.a) + row * classes, *v = static_cast<const S*>(args.v) + row * classes;
      mixed_logits(z, a, v, from_x[at], from_y[at], bias, tail);
      const Label label(args.target[row], classes, args.ignore_index);
      logit_gradient<T>(out, z, tail, label, scales[0], smoothing, upstream(0, row));
      S products[2];
      dot_both(out, a, v, classes, products);
      g_x[at] = products[0];
      g_y[at] = products[1];
      std::copy_n(out, classes, to.mix + row * classes);
      const S* own[2] = {static_cast<const S*>(args.u_x) + row * classes, static_cast<const S*>(args.u_y) + row * classes};
      for (int side = 0; side < 2; ++side) {
        logit_gradient<T>(out, own[side], tail, label, scales[1 + side], smoothing, upstream(1 + side, row));
        std::copy_n(out, classes, to.own[side] + row * classes);
      }
    }
    const MixGradient<S, V> mix(row_mix, c, load(g_x), load(g_y));
    store_rows(to.z_from[0] + first, mix.x_from_g, count);
    store_rows(to.z_from[1] + first, mix.y_from_g, count);
    store_rows(to.from_x[0] + first, mix.x_from_x, count);
    store_rows(to.from_y[0] + first, mix.x_from_y, count);
    store_rows(to.from_x[1] + first, mix.y_from_x, count);
    store_rows(to.from_y[1] + first, mix.y_from_y, count);
    for (int64_t row = first; row < first + count; ++row) {
      to.dead[0][row] = stats[row] <= S(kHeadEps);
      to.dead[1][row] = stats[args.rows + row] <= S(kHeadEps);
    }
  }
}

// The gradient of a bias: column sums over the rows of a (B, C) matrix, in their order and in double.
template <class T>
void write_column_sums(const typename Lanes<T>::Scalar* matrix, int64_t rows, int64_t columns, T* out) {
  std::vector<double> sums(columns);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < columns; ++k) sums[k] += matrix[row * columns + k];
  const std::vector<typename Lanes<T>::Scalar> rounded(sums.begin(), sums.end());
  write_row(out, rounded.data(), columns);
}
