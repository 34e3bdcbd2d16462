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

// What the gradient of one side's features is made of in a panel: its own coefficients and heads, and both sides' features.
template <class S>
struct FeatureGradient {
  const S *mix, *own;    // (B, C) gradients of the logits, the former by p / ||x||
  const bool* dead;      // (B,)
  const S *by_own, *by_other;  // (B,)
  Panel<S> weight_mix, weight_own;  // (C, width)
};

// Rows `row` and on of the gradient: [mix | own] [W_mix ; W_own] + by_own * features + by_other * the other side's
template <class T, class S>
void write_feature_gradient(
    T* out,
    int64_t out_step,
    int64_t columns,
    const FeatureGradient<S>& of,
    Panel<S> features,
    Panel<S> others,
    int64_t row,
    int64_t rows,
    int64_t classes,
    const S* zeros) {
  using V = typename Lanes<S>::Vec;
  constexpr int64_t kCount = Lanes<S>::kCount, kWidth = kTileVectors * kCount;
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int valid = int(std::min<int64_t>(kTileRows, rows - first));
    const S *mix[kTileRows], *own[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = row + first + std::min(r, valid - 1);
      mix[r] = of.dead[at] ? zeros : of.mix + at * classes;
      own[r] = of.own + at * classes;
    }
    V sums[kTileRows][kTileVectors] = {};
    outer_tile<S, V>(sums, mix, 1, of.weight_mix.data, of.weight_mix.step, classes);
    outer_tile<S, V>(sums, own, 1, of.weight_own.data, of.weight_own.step, classes);
    for (int r = 0; r < valid; ++r) {
      const int64_t at = row + first + r;
      alignas(64) T line[kWidth];
      T* to = out + (first + r) * out_step;
      for (int q = 0; q < kTileVectors; ++q) {
        const V feature = load(features.data + (first + r) * features.step + q * kCount);
        const V other = load(others.data + (first + r) * others.step + q * kCount);
        const V value = sums[r][q] + feature * of.by_own[at] + other * of.by_other[at];
        store((columns == kWidth ? to : line) + q * kCount, value);
      }
      if (columns < kWidth) std::memcpy(to, line, columns * sizeof(T));
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
  std::vector<S> sums(kGroupPanels * 3 * classes * kWidth), copies(2 * kChunkRows * kWidth), head_copies(3 * classes * kWidth);
  const std::vector<S> zeros(classes);
  for (int64_t group = begin; group < end; group += kGroupPanels) {
    const int64_t group_end = std::min(end, group + kGroupPanels);
    std::fill(sums.begin(), sums.end(), S(0));
    for (int64_t row = 0; row < args.rows; row += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, args.rows - row);
      for (int64_t panel = group; panel < group_end; ++panel) {
        const int64_t column = panel * kWidth, valid = std::min(kWidth, columns - column);
        const Panel<S> x = panel_of<T, S>(args.x, row, rows, column, valid, kWidth, copies.data());
        const Panel<S> y = panel_of<T, S>(args.y, row, rows, column, valid, kWidth, copies.data() + kChunkRows * kWidth);
        S* of_mix = &sums[(panel - group) * 3 * classes * kWidth];
        S *of_x = of_mix + classes * kWidth, *of_y = of_x + classes * kWidth;
        if (args.grad_weight_mix) {
          add_head_gradient(of_mix, classes, to.mix_x + row * classes, x, rows);
          add_head_gradient(of_mix, classes, to.mix_y + row * classes, y, rows);
        }
        if (args.grad_weight_x) add_head_gradient(of_x, classes, to.own[0] + row * classes, x, rows);
        if (args.grad_weight_y) add_head_gradient(of_y, classes, to.own[1] + row * classes, y, rows);
        if (!args.grad_x && !args.grad_y) continue;
        Panel<S> w[3];
        for (int k = 0; k < 3; ++k)
          w[k] = panel_of<S, S>(heads[k], 0, classes, column, valid, kWidth, &head_copies[k * classes * kWidth]);
        if (args.grad_x)
          write_feature_gradient<T, S>(
              static_cast<T*>(args.grad_x) + row * columns + column, columns, valid,
              {to.mix_x, to.own[0], to.dead[0], to.x_from_x, to.x_from_y, w[0], w[1]}, x, y, row, rows, classes, zeros.data());
        if (args.grad_y)
          write_feature_gradient<T, S>(
              static_cast<T*>(args.grad_y) + row * columns + column, columns, valid,
              {to.mix_y, to.own[1], to.dead[1], to.y_from_y, to.y_from_x, w[0], w[2]}, y, x, row, rows, classes, zeros.data());
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
}
