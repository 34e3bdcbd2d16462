// The rows of the linear head step, from features to logits, losses and their gradients. Compiled once for every instruction
// set by for_each_isa.h. Features are read in tiles of kTileRows rows; all steps after the projections use rows of C
// numbers.

// Rows of a matrix of any strides, in the arithmetic type: a pointer if no conversion is needed, else a copy in one of `slots`
// buffers, used in turn.
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

// The exponentials of a row, stored in `exps`.
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

// `from` converted to the storage type
template <class T, class S>
void write_row(T* to, const S* from, int64_t columns) {
  const Tail<S> tail(columns);
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount) store(to + i, load(from + i));
  if (tail) Tail<T>(columns).write(to, tail.values(from));
}

// The sides of a pair by the rows of one matrix: its projections, its stats.
template <class S>
struct PairRows {
  const S *x_norm, *y_norm, *c, *a, *v;

  PairRows(const HeadStep& step, int64_t pair) {
    x_norm = static_cast<const S*>(step.stats) + 3 * pair * step.rows;
    y_norm = x_norm + step.rows;
    c = y_norm + step.rows;
    a = static_cast<const S*>(step.projected) + 2 * pair * step.rows * step.classes;
    v = a + step.rows * step.classes;
  }
};

// Projections of each modality on its own head and those of its mixtures, norms and c; then the probes with the weights lambda,
// and the KL of both modalities' predictions from each probe.
template <class T>
void head_probe_rows(const HeadProbeArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<S>::kCount;
  const HeadStep& step = args.step;
  const int64_t classes = step.classes, columns = step.columns, padded = std::max(classes, Lanes<S>::kCount);
  const int64_t modalities = step.modalities(), mixtures = step.mixtures(), matrix = step.rows * classes;
  std::vector<std::vector<const S*>> w(modalities);  // per modality: the rows of its mixtures' heads, then of its own head
  std::vector<std::vector<S*>> to(modalities);       // outputs of these projections, (B, C) per head
  const auto add = [&](int64_t side, int64_t head, S* projections) {
    for (int64_t k = 0; k < classes; ++k) w[side].push_back(static_cast<const S*>(step.weights[head]) + k * columns);
    to[side].push_back(projections);
  };
  for (int64_t k = 0; k < mixtures; ++k) {
    add(step.pairs[k].x, k, static_cast<S*>(step.projected) + 2 * k * matrix);
    add(step.pairs[k].y, k, static_cast<S*>(step.projected) + (2 * k + 1) * matrix);
  }
  for (int64_t m = 0; m < modalities; ++m) add(m, mixtures + m, static_cast<S*>(step.own[m]));
  std::vector<ArithmeticRows<T>> features;
  for (const MatrixView& view : step.features) features.emplace_back(view, columns, kTileRows);
  std::vector<S> tile(kTileRows * (mixtures + 1) * classes), scratch(3 * padded);
  S *z = scratch.data(), *exps = z + padded, *z_exps = exps + padded;
  S *stats = static_cast<S*>(step.stats), *kl = static_cast<S*>(args.kl_rows);
  const S *probe_weight = static_cast<const S*>(args.probe_weight), eps = S(kEps);
  const Tail<S> tail(classes);
  static_assert(kTileRows <= kCount);
  std::vector<std::array<const S*, kTileRows>> rows(modalities);
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int count = int(std::min<int64_t>(kTileRows, end - first));
    for (int64_t m = 0; m < modalities; ++m) {
      for (int r = 0; r < kTileRows; ++r) rows[m][r] = r < count ? features[m](first + r) : rows[m][count - 1];
      const int64_t width = w[m].size();
      project_tile<S>(rows[m].data(), count, w[m].data(), width, columns, tile.data(), width);
      for (int r = 0; r < count; ++r) {
        const int64_t row = (first + r) * classes;
        const S* from = tile.data() + r * width;
        for (size_t k = 0; k + 1 < to[m].size(); ++k) std::copy_n(from + k * classes, classes, to[m][k] + row);
        S* own = to[m].back() + row;
        biased(own, from + width - classes, static_cast<const S*>(step.biases[mixtures + m]), tail);
        if (!args.logits.empty()) write_row(static_cast<T*>(args.logits[m]) + row, own, classes);
      }
    }
    for (int64_t k = 0; k < mixtures; ++k) {
      const Pair pair = step.pairs[k];
      const PairRows<S> of(step, k);
      alignas(64) S products[3][kCount] = {}, from_x[kCount], from_y[kCount];
      for (int r = 0; r < count; ++r) {
        S row[3];
        gram(rows[pair.x][r], rows[pair.y][r], columns, row);
        for (int i = 0; i < 3; ++i) products[i][r] = row[i];
      }
      S* pair_stats = stats + 3 * k * step.rows;
      write_stats(
          pair_stats, step.rows, first, products[0], products[1], products[2], count, eps, rows[pair.x].data(),
          rows[pair.y].data(), columns);
      mix_coefficients(from_x, from_y, V{} + probe_weight[k], pair_stats, step.rows, first, count, eps);
      const S* bias = static_cast<const S*>(step.biases[k]);
      for (int r = 0; r < count; ++r) {
        const int64_t row = first + r;
        mixed_logits(z, of.a + row * classes, of.v + row * classes, from_x[r], from_y[r], bias, tail);
        const Softmax<S> of_z = softmax_of(z, tail, z_exps);
        for (int side = 0; side < 2; ++side) {
          const S* u = static_cast<const S*>(step.own[side ? pair.y : pair.x]) + row * classes;
          const Softmax<S> of_u = softmax_of(u, tail, exps);
          kl[(2 * k + side) * step.rows + row] = kl_sum(u, z, tail, exps, z_exps, of_u, of_z, std::log(of_u.sum / of_z.sum));
        }
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

// The mixtures with the measured weights, and the cross entropies of all heads.
template <class T>
void head_rebalance_rows(const HeadRebalanceArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<S>::Vec;
  const HeadStep& step = args.step;
  const int64_t classes = step.classes, padded = std::max(classes, Lanes<S>::kCount), mixtures = step.mixtures();
  std::vector<S> scratch(2 * padded);
  S *z = scratch.data(), *exps = z + padded, *losses = static_cast<S*>(args.loss_rows);
  const S *strength = static_cast<const S*>(step.strength), smoothing = S(step.label_smoothing);
  const Tail<S> tail(classes);
  constexpr int64_t kCount = Lanes<S>::kCount;
  for (int64_t first = begin; first < end; first += kCount) {
    const int64_t count = std::min(kCount, end - first);
    for (int64_t k = 0; k < mixtures; ++k) {
      const PairRows<S> of(step, k);
      const S* bias = static_cast<const S*>(step.biases[k]);
      alignas(64) S from_x[kCount], from_y[kCount];
      mix_coefficients(from_x, from_y, V{} + strength[2 * k], of.x_norm, step.rows, first, count, S(kEps));
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t offset = row * classes;
        mixed_logits(z, of.a + offset, of.v + offset, from_x[row - first], from_y[row - first], bias, tail);
        write_row(static_cast<T*>(args.logits[k]) + offset, z, classes);
        const Label label(step.target[row], classes, step.ignore_index);
        losses[k * step.rows + row] = cross_entropy(z, tail, label, smoothing, exps);
      }
    }
    for (int64_t m = 0; m < step.modalities(); ++m)
      for (int64_t row = first; row < first + count; ++row) {
        const Label label(step.target[row], classes, step.ignore_index);
        const S* own = static_cast<const S*>(step.own[m]) + row * classes;
        losses[(mixtures + m) * step.rows + row] = cross_entropy(own, tail, label, smoothing, exps);
      }
  }
}

// scale (P - (1 - smoothing) onehot - smoothing / C) + the upstream gradient of the logits
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
  // the tail overlaps columns that the loop changes in place, so it is computed before the loop and stored after it
  typename Lanes<S>::Vec rest = {};
  if (tail) rest = tail.values(out) + Tail<T>(classes).values(upstream);
  for (int64_t i = 0; i < tail.whole; i += Lanes<S>::kCount) store(out + i, load(out + i) + load(upstream + i));
  if (tail) tail.write(out, rest);
}

// Gradients of all logits, and the coefficients of the feature and head gradients: see HeadCoefficients.
template <class T>
void head_coefficient_rows(const HeadCoefficientArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<S>::kCount;
  const HeadStep& step = args.step;
  const int64_t classes = step.classes, padded = std::max(classes, Lanes<S>::kCount), rows = step.rows;
  const int64_t mixtures = step.mixtures(), matrix = rows * classes;
  std::vector<S> scratch(2 * padded);
  S *z = scratch.data(), *out = z + padded;
  const HeadCoefficients<S> to(args.coefficients, step);
  const S *scales = static_cast<const S*>(args.scales), smoothing = S(step.label_smoothing);
  const Tail<S> tail(classes);
  const auto gradient = [&](int64_t head, int64_t row, const S* logits) {  // also stored in `out`
    const int64_t offset = row * classes;
    const T* upstream = static_cast<const T*>(args.upstream[head]);
    if (upstream) upstream += offset;
    const Label label(step.target[row], classes, step.ignore_index);
    logit_gradient<T>(out, logits, tail, label, scales[head], smoothing, upstream);
    std::copy_n(out, classes, to.of_logits + head * matrix + offset);
  };
  for (int64_t first = begin; first < end; first += kCount) {
    const int64_t count = std::min(kCount, end - first);
    for (int64_t k = 0; k < mixtures; ++k) {
      const PairRows<S> of(step, k);
      const S* bias = static_cast<const S*>(step.biases[k]);
      const V x_norm = load_rows(of.x_norm + first, count), y_norm = load_rows(of.y_norm + first, count);
      const V saved = load_rows(of.c + first, count);
      const MixRow<S, V> row_mix(V{} + static_cast<const S*>(step.strength)[2 * k], x_norm, y_norm, saved, S(kEps));
      alignas(64) S from_x[kCount], from_y[kCount], g_x[kCount] = {}, g_y[kCount] = {};
      store(from_x, row_mix.from_x());
      store(from_y, row_mix.from_y());
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t at = row - first;
        const S *a = of.a + row * classes, *v = of.v + row * classes;
        mixed_logits(z, a, v, from_x[at], from_y[at], bias, tail);
        gradient(k, row, z);
        S products[2];
        dot_both(out, a, v, classes, products);
        g_x[at] = products[0];
        g_y[at] = products[1];
      }
      const MixGradient<S, V> mix(row_mix, load(g_x), load(g_y));
      S *z_from = to.z_from + 2 * k * rows + first, *from = to.from + 4 * k * rows + first;
      store_rows(z_from, mix.x_from_g, count);
      store_rows(z_from + rows, mix.y_from_g, count);
      store_rows(from, mix.x_from_x, count);
      store_rows(from + rows, mix.x_from_y, count);
      store_rows(from + 2 * rows, mix.y_from_x, count);
      store_rows(from + 3 * rows, mix.y_from_y, count);
      for (int64_t row = first; row < first + count; ++row) {
        to.dead[2 * k * rows + row] = of.x_norm[row] <= S(kEps);
        to.dead[(2 * k + 1) * rows + row] = of.y_norm[row] <= S(kEps);
      }
    }
    for (int64_t m = 0; m < step.modalities(); ++m)
      for (int64_t row = first; row < first + count; ++row)
        gradient(mixtures + m, row, static_cast<const S*>(step.own[m]) + row * classes);
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
