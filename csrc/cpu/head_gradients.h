// The gradients of features and heads, panel by panel of columns: X and Y are read once from memory, and every sum over rows
// has the order of the rows, for any number of threads. Compiled once for every instruction set by for_each_isa.h.

constexpr int64_t kChunkRows = 128;  // rows of a panel processed at a time: 32 KiB of each of X and Y
constexpr int64_t kGroupPanels = 4;  // panels alternated per chunk of rows: 1 KiB of a row, on its own page

template <class S>
int64_t panel_width() {
  return kTileVectors * Lanes<S>::kCount;
}

// `rows` rows of one panel of a matrix, in the arithmetic type and in whole vectors: a pointer into the matrix, or a copy.
template <class S>
struct Panel {
  const S* data;
  int64_t step;
};

template <class T, class S>
Panel<S> panel_of(
    const MatrixView& view, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t width, S* copy) {
  const T* from = static_cast<const T*>(view.data) + row * view.row_stride + column * view.column_stride;
  if constexpr (std::is_same_v<T, S>)
    if (columns == width && view.column_stride == 1) return {from, view.row_stride};
  alignas(64) T line[kTileVectors * Lanes<T>::kCount] = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) line[i] = from[r * view.row_stride + i * view.column_stride];
    for (int64_t i = 0; i < width; i += Lanes<T>::kCount) store(copy + r * width + i, load(line + i));
  }
  return {copy, width};
}

// sums (count, width) += G^T F over `rows` rows of G (stride `classes`) and of the panel F
template <class S>
void add_head_gradient(S* sums, int64_t count, const S* g, Panel<S> features, int64_t rows) {
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kWidth = kTileVectors * Lanes<S>::kCount;
  for (int64_t k = 0; k < count; k += kTileRows) {
    const int valid = int(std::min<int64_t>(kTileRows, count - k));
    const S* columns[kTileRows];
    V tile[kTileRows][kTileVectors];
    for (int r = 0; r < kTileRows; ++r) {
      columns[r] = g + k + std::min(r, valid - 1);
      for (int q = 0; q < kTileVectors; ++q)
        tile[r][q] = load(sums + (k + std::min(r, valid - 1)) * kWidth + q * Lanes<S>::kCount);
    }
    outer_tile<S, V>(tile, columns, count, features.data, features.step, rows);
    for (int r = 0; r < valid; ++r)
      for (int q = 0; q < kTileVectors; ++q) store(sums + (k + r) * kWidth + q * Lanes<S>::kCount, tile[r][q]);
  }
}

// The mixture of features, whose product with dZ is the gradient of its head.
template <class S>
void mix_panel(S* out, Panel<S> x, Panel<S> y, const S* from_x, const S* from_y, int64_t rows) {
  constexpr int64_t kCount = Lanes<S>::kCount, kWidth = kTileVectors * kCount;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < kWidth; i += kCount)
      store(out + r * kWidth + i, load(x.data + r * x.step + i) * from_x[r] + load(y.data + r * y.step + i) * from_y[r]);
}

// Rows from `row` on of all feature gradients: dU W_own, plus for each mixture of the modality, unless the row is dead, g times a
// row factor, where both sides share g = dZ W_mix, and the features of both sides times row factors.
template <class T, class S>
void write_feature_gradients(
    const std::vector<T*>& out,
    int64_t out_step,
    int64_t columns,
    const HeadStep& step,
    const HeadCoefficients<S>& of,
    const std::vector<Panel<S>>& weights,
    const std::vector<Panel<S>>& features,
    std::vector<S>& products,  // scratch for kTileRows rows of each mixture
    int64_t row,
    int64_t rows,
    bool stream) {
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<S>::kCount, kWidth = kTileVectors * kCount;
  const int64_t classes = step.classes, mixtures = step.mixtures();
  stream = stream && columns == kWidth;
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int valid = int(std::min<int64_t>(kTileRows, rows - first));
    const auto product = [&](int64_t head, V(&sums)[kTileRows][kTileVectors]) {
      const S* gradients = of.of_logits + head * step.rows * classes;
      const S* at[kTileRows];
      for (int r = 0; r < kTileRows; ++r) at[r] = gradients + (row + first + std::min(r, valid - 1)) * classes;
      outer_tile<S, V>(sums, at, 1, weights[head].data, weights[head].step, classes);
    };
    const auto store_tile = [&](const V(&sums)[kTileRows][kTileVectors], S* to) {
      for (int r = 0; r < kTileRows; ++r)
        for (int q = 0; q < kTileVectors; ++q) store(to + r * kWidth + q * kCount, sums[r][q]);
    };
    for (int64_t k = 0; k < mixtures; ++k) {
      if (!out[step.pairs[k].x] && !out[step.pairs[k].y]) continue;
      V sums[kTileRows][kTileVectors] = {};
      product(k, sums);
      store_tile(sums, &products[k * kTileRows * kWidth]);
    }
    for (int64_t m = 0; m < step.modalities(); ++m) {
      if (out[m] == nullptr) continue;
      V sums[kTileRows][kTileVectors] = {};
      product(mixtures + m, sums);
      for (int r = 0; r < valid; ++r) {
        const int64_t at = row + first + r;
        V value[kTileVectors];
        for (int q = 0; q < kTileVectors; ++q) value[q] = sums[r][q];
        for (int64_t k = 0; k < mixtures; ++k) {
          const Pair pair = step.pairs[k];
          if (pair.x != m && pair.y != m) continue;
          const int64_t side = 2 * k + (pair.y == m);
          if (of.dead[side * step.rows + at]) continue;
          const S by_g = of.z_from[side * step.rows + at];
          const S by_x = of.from[2 * side * step.rows + at], by_y = of.from[(2 * side + 1) * step.rows + at];
          const S* g = &products[(k * kTileRows + r) * kWidth];
          const S* x = features[pair.x].data + (first + r) * features[pair.x].step;
          const S* y = features[pair.y].data + (first + r) * features[pair.y].step;
          for (int q = 0; q < kTileVectors; ++q)
            value[q] += load(g + q * kCount) * by_g + load(x + q * kCount) * by_x + load(y + q * kCount) * by_y;
        }
        alignas(64) T line[kWidth];
        T* to = out[m] + (first + r) * out_step;
        for (int q = 0; q < kTileVectors; ++q) {
          if (stream) store_past_caches(to + q * kCount, value[q]);
          else store((columns == kWidth ? to : line) + q * kCount, value[q]);
        }
        if (columns < kWidth) std::memcpy(to, line, columns * sizeof(T));
      }
    }
  }
}

template <class T>
void head_gradient_panels(const HeadGradientArgs& args, int64_t begin, int64_t end) {
  using S = typename Lanes<T>::Scalar;
  constexpr int64_t kWidth = kTileVectors * Lanes<S>::kCount;
  const HeadStep& step = args.step;
  const int64_t classes = step.classes, columns = step.columns, matrix = step.rows * classes;
  const int64_t modalities = step.modalities(), mixtures = step.mixtures(), heads = step.heads();
  const HeadCoefficients<S> to(args.coefficients, step);
  bool any = false, stream = true;
  for (void* out : args.grad_features) {
    any = any || out;
    stream = stream && (!out || past_caches(out, step.rows, columns * sizeof(T)));
  }
  const int64_t head_size = classes * kWidth;
  std::vector<S> sums(kGroupPanels * heads * head_size), copies((modalities + 1) * kChunkRows * kWidth);
  std::vector<S> head_copies(heads * head_size), products(mixtures * kTileRows * kWidth);
  std::vector<Panel<S>> features(modalities), w(heads);
  std::vector<T*> out(modalities);
  for (int64_t group = begin; group < end; group += kGroupPanels) {
    const int64_t group_end = std::min(end, group + kGroupPanels);
    std::fill(sums.begin(), sums.end(), S(0));
    for (int64_t row = 0; row < step.rows; row += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, step.rows - row);
      for (int64_t panel = group; panel < group_end; ++panel) {
        const int64_t column = panel * kWidth, valid = std::min(kWidth, columns - column);
        for (int64_t m = 0; m < modalities; ++m)
          features[m] =
              panel_of<T, S>(step.features[m], row, rows, column, valid, kWidth, &copies[(m + 1) * kChunkRows * kWidth]);
        S* panel_sums = sums.data() + (panel - group) * heads * head_size;
        for (int64_t k = 0; k < heads; ++k) {
          if (args.grad_weights[k] == nullptr) continue;
          Panel<S> of = k < mixtures ? Panel<S>{copies.data(), kWidth} : features[k - mixtures];
          if (k < mixtures) {
            const S* z_from = to.z_from + 2 * k * step.rows + row;
            mix_panel<S>(copies.data(), features[step.pairs[k].x], features[step.pairs[k].y], z_from, z_from + step.rows, rows);
          }
          add_head_gradient<S>(panel_sums + k * head_size, classes, to.of_logits + k * matrix + row * classes, of, rows);
        }
        if (!any) continue;
        for (int64_t k = 0; k < heads; ++k)
          w[k] = panel_of<S, S>(
              {step.weights[k], columns, 1}, 0, classes, column, valid, kWidth, head_copies.data() + k * head_size);
        for (int64_t m = 0; m < modalities; ++m) {
          T* whole = static_cast<T*>(args.grad_features[m]);
          out[m] = whole ? whole + row * columns + column : nullptr;
        }
        write_feature_gradients<T, S>(out, columns, valid, step, to, w, features, products, row, rows, stream);
      }
    }
    for (int64_t panel = group; panel < group_end; ++panel)
      for (int64_t k = 0; k < heads; ++k)
        for (int64_t n = 0; args.grad_weights[k] && n < classes; ++n)
          write_row(
              static_cast<T*>(args.grad_weights[k]) + n * columns + panel * kWidth,
              &sums[((panel - group) * heads + k) * head_size + n * kWidth], std::min(kWidth, columns - panel * kWidth));
  }
  if (stream) settle_stores();
}
