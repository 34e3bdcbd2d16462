// linear_probe_rebalance on the CPU. Forward: each feature matrix is read once, for its projections on both heads and its row
// statistics; probe, KL, rebalanced logits and losses are work on (B, C) matrices. Backward: gradients of the logits, then one
// pass over both feature matrices for all gradients. Sums over rows run in their order, so results repeat on any number of
// threads.
#include <cstring>
#include <memory>

#include "../core/label.h"
#include "../core/strength.h"
#include "../head_step.h"
#include "rows.h"

namespace iprm {

constexpr double kHeadEps = 1e-12;  // the smallest length divided by, as in `normalize`

struct HeadProbeArgs {
  MatrixView x, y;
  const void *weight_x, *weight_y, *weight_mix;  // (C, D) contiguous, in the arithmetic type
  const void *bias_x, *bias_y, *bias_mix;        // (C,) or null
  const void* weight;                            // () lambda
  void *a, *v, *u_x, *u_y, *stats;               // (B, C) x4, (3, B)
  void *logits_x, *logits_y;                     // (B, C), null where u_x and u_y are the logits
  void* kl_rows;                                 // (2, B)
  int64_t rows, columns, classes;
};

struct HeadRebalanceArgs {
  const void *a, *v, *u_x, *u_y, *stats, *bias_mix, *strength;
  VectorView<int64_t> target;
  double label_smoothing;
  int64_t ignore_index;
  void *logits_mix, *loss_rows;  // (B, C), (3, B)
  int64_t rows, classes;
};

struct HeadCoefficientArgs {
  const void *a, *v, *u_x, *u_y, *stats, *bias_mix, *strength;
  VectorView<int64_t> target;
  double label_smoothing;
  int64_t ignore_index;
  const void* scales;       // (3,) of the losses, over the rows that count
  const void* upstream[3];  // (B, C) to the logits of the mixture, x, y, or null
  void* coefficients;
  int64_t rows, classes;
};

struct HeadGradientArgs {
  MatrixView x, y;
  const void *weight_x, *weight_y, *weight_mix;  // (C, D) contiguous, in the arithmetic type
  void* coefficients;
  void *grad_x, *grad_y, *grad_weight_x, *grad_weight_y, *grad_weight_mix;  // null: not wanted
  int64_t rows, columns, classes;
};

// What the gradients are made of, in one piece of memory.
template <class S>
struct HeadCoefficients {
  S *mix, *own[2];                      // (B, C) dZ, dU_x and dU_y
  S* z_from[2];                         // (B,) p / ||x|| and q / ||y||: the mixture from x and y, and their gradients from dZ W
  S *from_x[2], *from_y[2];             // (B,) of the gradient of either side what comes of x, and of y
  bool* dead[2];                        // (B,) to such a row nothing comes but from its own head

  HeadCoefficients(void* memory, int64_t rows, int64_t classes) {
    S* at = static_cast<S*>(memory);
    for (S** matrix : {&mix, &own[0], &own[1]}) *matrix = std::exchange(at, at + rows * classes);
    for (S** column : {&z_from[0], &z_from[1], &from_x[0], &from_x[1], &from_y[0], &from_y[1]})
      *column = std::exchange(at, at + rows);
    dead[0] = reinterpret_cast<bool*>(at);
    dead[1] = dead[0] + rows;
  }

  static int64_t bytes(int64_t rows, int64_t classes) { return rows * ((3 * classes + 6) * int64_t(sizeof(S)) + 2); }
};

}  // namespace iprm

#define IPRM_ROWS "head_family.h"
#include "for_each_isa.h"

namespace iprm {
namespace {

// The mathematics of a row, an angle and three softmaxes, takes as long as this many elements: 300 to 400 ns.
constexpr int64_t kRowCost = 2000;

// A thread is worth its fork for this many multiplications, some 5 us of them.
constexpr int64_t kProductsPerThread = 250'000;

template <class Work>
void parallel(int64_t pieces, int64_t products_each, const Work& work) {
  if (pieces == 0) return;
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products_each));
  torch::stable::parallel_for(0, pieces, grain, work);
}

// `tensor` contiguous and in the arithmetic type; itself where it is that already.
template <class S>
Tensor arithmetic(const Tensor& tensor) {
  constexpr ScalarType kType = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(tensor.scalar_type() == kType ? tensor : torch::stable::to(tensor, kType));
}

// Keeps alive what `arithmetic` made, and hands out pointers.
template <class S>
class ArithmeticInputs {
 public:
  const void* operator()(const Tensor& tensor) {
    kept_.push_back(arithmetic<S>(tensor));
    return kept_.back().const_data_ptr();
  }
  const void* operator()(const std::optional<Tensor>& tensor) { return tensor ? (*this)(*tensor) : nullptr; }

 private:
  std::vector<Tensor> kept_;
};

int64_t counted_rows(const VectorView<int64_t>& target, int64_t rows, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) count += target[row] != ignore_index;
  return count;
}

void head_forward(
    const Tensor& x,
    const Tensor& y,
    const Tensor& weight_x,
    const std::optional<Tensor>& bias_x,
    const Tensor& weight_y,
    const std::optional<Tensor>& bias_y,
    const Tensor& weight_mix,
    const std::optional<Tensor>& bias_mix,
    const Tensor& target,
    const Tensor& weight,
    double label_smoothing,
    int64_t ignore_index,
    int64_t parts,
    const Tensor& state,
    const Tensor& logits_mix,
    const Tensor& logits_x,
    const Tensor& logits_y,
    const Tensor& kl,
    const Tensor& strength,
    const Tensor& loss,
    const Tensor& losses) {
  const int64_t rows = x.size(0), columns = x.size(1), classes = weight_mix.size(0);
  const ScalarType arithmetic = arithmetic_type(x.scalar_type());
  check_step(
      x, y, {&weight_x, &weight_y, &weight_mix}, {&bias_x, &bias_y, &bias_mix}, target, state,
      {&logits_mix, &logits_x, &logits_y}, strength);
  check_scalar(weight, "weight", arithmetic);
  check_output(kl, "kl", 2, arithmetic);
  check_scalar(loss, "loss", arithmetic);
  check_output(losses, "losses", 3, arithmetic);
  const VectorView<int64_t> labels(target);
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(
        !Label(labels[row], classes, ignore_index).wrong, "target: label ", labels[row], " of row ", row, " is out of range");
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    constexpr bool kNarrow = !std::is_same_v<T, S>;
    const HeadState<S> of(state, logits_x, logits_y);
    ArithmeticInputs<S> input;
    const void* mix_bias = input(bias_mix);
    const auto row_values = std::make_unique_for_overwrite<S[]>(3 * rows);
    if (parts & kProbe) {
      const HeadProbeArgs args{
          MatrixView(x), MatrixView(y), input(weight_x), input(weight_y), input(weight_mix), input(bias_x), input(bias_y),
          mix_bias, weight.const_data_ptr(), of.a, of.v, of.u_x, of.u_y, of.stats,
          kNarrow ? output<void>(logits_x) : nullptr, kNarrow ? output<void>(logits_y) : nullptr, row_values.get(), rows,
          columns, classes};
      const auto kernel = IPRM_BEST(head_probe_rows<T>);
      parallel(rows, 4 * classes * columns, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
      for (int side = 0; side < 2; ++side) output<S>(kl)[side] = S(ordered_sum(row_values.get() + side * rows, rows));
    }
    if (parts & kRebalance) {
      strength_weights_of(VectorView<S>(kl), 2, output<S>(strength));
      const HeadRebalanceArgs args{
          of.a, of.v, of.u_x, of.u_y, of.stats, mix_bias, strength.const_data_ptr(), labels, label_smoothing,
          ignore_index, output<void>(logits_mix), row_values.get(), rows, classes};
      const auto kernel = IPRM_BEST(head_rebalance_rows<T>);
      parallel_rows(
          rows, kRowCost + kExpCost * classes, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
      const double counted = double(counted_rows(args.target, rows, ignore_index));
      *of.counted = S(counted);
      double total = 0;
      for (int k = 0; k < 3; ++k) {
        const double mean = ordered_sum(row_values.get() + k * rows, rows) / counted;
        output<S>(losses)[k] = S(mean);
        total += mean;
      }
      *output<S>(loss) = S(total);
    }
  });
}

void head_backward(
    const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_losses,
    const std::optional<Tensor>& grad_mix,
    const std::optional<Tensor>& grad_logits_x,
    const std::optional<Tensor>& grad_logits_y,
    const Tensor& x,
    const Tensor& y,
    const Tensor& weight_x,
    const Tensor& weight_y,
    const Tensor& weight_mix,
    const std::optional<Tensor>& bias_mix,
    const Tensor& target,
    const Tensor& state,
    const Tensor& logits_x,
    const Tensor& logits_y,
    const Tensor& strength,
    double label_smoothing,
    int64_t ignore_index,
    const std::optional<Tensor>& grad_x,
    const std::optional<Tensor>& grad_y,
    const std::optional<Tensor>& grad_weight_x,
    const std::optional<Tensor>& grad_bias_x,
    const std::optional<Tensor>& grad_weight_y,
    const std::optional<Tensor>& grad_bias_y,
    const std::optional<Tensor>& grad_weight_mix,
    const std::optional<Tensor>& grad_bias_mix) {
  const int64_t rows = x.size(0), columns = x.size(1), classes = weight_mix.size(0);
  check_step_backward(
      x, classes, grad_loss, grad_losses, {&grad_mix, &grad_logits_x, &grad_logits_y}, {&grad_x, &grad_y},
      {&grad_weight_x, &grad_weight_y, &grad_weight_mix}, {&grad_bias_x, &grad_bias_y, &grad_bias_mix});
  check_step(
      x, y, {&weight_x, &weight_y, &weight_mix}, {&bias_mix}, target, state, {&logits_x, &logits_y}, strength);
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    ArithmeticInputs<S> input;
    const HeadState<S> of(state, logits_x, logits_y);
    const VectorView<int64_t> labels(target);
    S scales[3];
    const S* to_loss = static_cast<const S*>(input(grad_loss));
    const S* to_losses = static_cast<const S*>(input(grad_losses));
    for (int k = 0; k < 3; ++k) scales[k] = ((to_loss ? *to_loss : S(0)) + (to_losses ? to_losses[k] : S(0))) / *of.counted;

    const auto memory = std::make_unique_for_overwrite<char[]>(HeadCoefficients<S>::bytes(rows, classes));
    std::vector<Tensor> kept;
    const auto stored = [&](const std::optional<Tensor>& grad) -> const void* {
      return grad ? kept.emplace_back(torch::stable::contiguous(*grad)).const_data_ptr() : nullptr;
    };
    const HeadCoefficientArgs coefficient_args{
        of.a, of.v, of.u_x, of.u_y, of.stats, input(bias_mix), strength.const_data_ptr(), labels, label_smoothing, ignore_index,
        scales, {stored(grad_mix), stored(grad_logits_x), stored(grad_logits_y)}, memory.get(), rows, classes};
    const auto coefficient_kernel = IPRM_BEST(head_coefficient_rows<T>);
    parallel_rows(
        rows, kRowCost + kExpCost * classes,
        [&](int64_t begin, int64_t end) { coefficient_kernel(coefficient_args, begin, end); });
    const HeadCoefficients<S> to(memory.get(), rows, classes);
    const auto write_column_sums = IPRM_BEST(write_column_sums<T>);
    if (grad_bias_mix) write_column_sums(to.mix, rows, classes, output<T>(*grad_bias_mix));
    if (grad_bias_x) write_column_sums(to.own[0], rows, classes, output<T>(*grad_bias_x));
    if (grad_bias_y) write_column_sums(to.own[1], rows, classes, output<T>(*grad_bias_y));

    const HeadGradientArgs args{
        MatrixView(x), MatrixView(y), input(weight_x), input(weight_y), input(weight_mix), memory.get(),
        output<void>(grad_x), output<void>(grad_y), output<void>(grad_weight_x), output<void>(grad_weight_y),
        output<void>(grad_weight_mix), rows, columns, classes};
    for (void* out : {args.grad_x, args.grad_y}) prefer_huge_pages(out, rows * columns * sizeof(T));
    const auto kernel = IPRM_BEST(head_gradient_panels<T>);
    const int64_t width = IPRM_BEST(panel_width<S>)(), panels = (columns + width - 1) / width;
    parallel(panels, 6 * classes * width * rows, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_backward", TORCH_BOX(&head_backward));
}

}  // namespace iprm
