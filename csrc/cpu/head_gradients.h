// The gradients of features and heads, panel by panel of columns: X and Y are read once from memory, and every sum over rows
// runs in the order of the rows, whatever the number of threads. Compiled once for every instruction set by for_each_isa.h.

constexpr int64_t kChunkRows = 128;  // rows a panel is visited for at a time: 32 KiB of each of X and Y
constexpr int64_t kGroupPanels = 4;  // panels between which the chunks of rows alternate: 1 KiB of a row, a page its own

template <class S>
int64_t panel_width() {
  return kTileVectors * Lanes<S>::kCount;
}

// `rows` rows of one panel of a matrix, in the arithmetic type and whole vectors: a place in the matrix itself, or a copy.
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

// Rows `row` and on of the gradients of both sides' features: g by a factor of the row, where g = dZ W_mix is the same for both,
// and both features by factors of theirs, unless the row is dead; and dU W_own.
template <class T, class S>
void write_feature_gradients(
    T* const* out,
    int64_t out_step,
    int64_t columns,
    const HeadCoefficients<S>& of,
    const Panel<S>* weights,  // of the mixture, of x, of y
    const Panel<S>* features,
    int64_t row,
    int64_t rows,
    int64_t classes,
    bool stream) {
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<S>::kCount, kWidth = kTileVectors * kCount;
  stream = stream && columns == kWidth;
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int valid = int(std::min<int64_t>(kTileRows, rows - first));
    const auto product = [&](const S* gradients, const Panel<S>& weight, V(&sums)[kTileRows][kTileVectors]) {
      const S* at[kTileRows];
      for (int r = 0; r < kTileRows; ++r) at[r] = gradients + (row + first + std::min(r, valid - 1)) * classes;
      outer_tile<S, V>(sums, at, 1, weight.data, weight.step, classes);
    };
    alignas(64) S g[kTileRows][kWidth];
    {
      V sums[kTileRows][kTileVectors] = {};
      product(of.mix, weights[0], sums);
      for (int r = 0; r < kTileRows; ++r)
        for (int q = 0; q < kTileVectors; ++q) store(&g[r][q * kCount], sums[r][q]);
    }
    for (int side = 0; side < 2; ++side) {
      if (out[side] == nullptr) continue;
      V sums[kTileRows][kTileVectors] = {};
      product(of.own[side], weights[1 + side], sums);
      for (int r = 0; r < valid; ++r) {
        const int64_t at = row + first + r;
        const bool dead = of.dead[side][at];
        alignas(64) T line[kWidth];
        T* to = out[side] + (first + r) * out_step;
        for (int q = 0; q < kTileVectors; ++q) {
          const V x = load(features[0].data + (first + r) * features[0].step + q * kCount);
          const V y = load(features[1].data + (first + r) * features[1].step + q * kCount);
          V value = sums[r][q];
          if (!dead)
            value += load(&g[r][q * kCount]) * of.z_from[side][at] + x * of.from_x[side][at] + y * of.from_y[side][at];
          if (stream) store_past_caches(to + q * kCount, value);
          else store((columns == kWidth ? to : line) + q * kCount, value);
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
  const int64_t classes = args.classes, columns = args.columns;
  const HeadCoefficients<S> to(args.coefficients, args.rows, classes);
  const MatrixView heads[3] = {
      {args.weight_mix, columns, 1}, {args.weight_x, columns, 1}, {args.weight_y, columns, 1}};
  const bool stream = (!args.grad_x || past_caches(args.grad_x, args.rows, columns * sizeof(T))) &&
      (!args.grad_y || past_caches(args.grad_y, args.rows, columns * sizeof(T)));
  std::vector<S> sums(kGroupPanels * 3 * classes * kWidth), copies(3 * kChunkRows * kWidth), head_copies(3 * classes * kWidth);
  for (int64_t group = begin; group < end; group += kGroupPanels) {
    const int64_t group_end = std::min(end, group + kGroupPanels);
    std::fill(sums.begin(), sums.end(), S(0));
    for (int64_t row = 0; row < args.rows; row += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, args.rows - row);
      for (int64_t panel = group; panel < group_end; ++panel) {
        const int64_t column = panel * kWidth, valid = std::min(kWidth, columns - column);
        S* copy = copies.data();
        const auto features_of = [&](const MatrixView& view) {
          return panel_of<T, S>(view, row, rows, column, valid, kWidth, std::exchange(copy, copy + kChunkRows * kWidth));
        };
        const Panel<S> features[2] = {features_of(args.x), features_of(args.y)};
        S* of_mix = &sums[(panel - group) * 3 * classes * kWidth];
        S *of_x = of_mix + classes * kWidth, *of_y = of_x + classes * kWidth;
        if (args.grad_weight_mix) {
          mix_panel<S>(copy, features[0], features[1], to.z_from[0] + row, to.z_from[1] + row, rows);
          add_head_gradient<S>(of_mix, classes, to.mix + row * classes, {copy, kWidth}, rows);
        }
        if (args.grad_weight_x) add_head_gradient(of_x, classes, to.own[0] + row * classes, features[0], rows);
        if (args.grad_weight_y) add_head_gradient(of_y, classes, to.own[1] + row * classes, features[1], rows);
        if (!args.grad_x && !args.grad_y) continue;
        Panel<S> w[3];
        for (int k = 0; k < 3; ++k)
          w[k] = panel_of<S, S>(heads[k], 0, classes, column, valid, kWidth, &head_copies[k * classes * kWidth]);
        T* out[2] = {static_cast<T*>(args.grad_x), static_cast<T*>(args.grad_y)};
        for (T*& to_side : out)
          if (to_side) to_side += row * columns + column;
        write_feature_gradients<T, S>(out, columns, valid, to, w, features, row, rows, classes, stream);
      }
    }
    T* outputs[3] = {
        static_cast<T*>(args.grad_weight_mix), static_cast<T*>(args.grad_weight_x), static_cast<T*>(args.grad_weight_y)};
    for (int64_t panel = group; panel < group_end; ++panel)
      for (int k = 0; k < 3; ++k)
        for (int64_t n = 0; outputs[k] && n < classes; ++n)
          write_row(
              outputs[k] + n * columns + panel * kWidth, &sums[(((panel - group) * 3 + k) * classes + n) * kWidth],
              std::min(kWidth, columns - panel * kWidth));
  }
  if (stream) settle_stores();
}
