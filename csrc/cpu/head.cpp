// linear_probe_rebalance on the CPU. Forward: each feature matrix is read once, for its projections on both heads and its row
// statistics; probe, KL, rebalanced logits and losses are work on (B, C) matrices. Backward: gradients of the logits, then one
// pass over both feature matrices for all gradients. Sums over rows run in their order, so results repeat on any number of
// threads.
#include <cstring>
#include <memory>

#include "../core/slerp.h"
#include "../core/strength.h"
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
  S *mix, *mix_x, *mix_y, *own[2];                   // (B, C): dZ, p/||x|| dZ, q/||y|| dZ, dU_x and dU_y
  S *x_from_x, *x_from_y, *y_from_x, *y_from_y;      // (B,)
  bool* dead[2];                                     // (B,)

  HeadCoefficients(void* memory, int64_t rows, int64_t classes) {
    S* at = static_cast<S*>(memory);
    for (S** matrix : {&mix, &mix_x, &mix_y, &own[0], &own[1]}) *matrix = std::exchange(at, at + rows * classes);
    for (S** column : {&x_from_x, &x_from_y, &y_from_x, &y_from_y}) *column = std::exchange(at, at + rows);
    dead[0] = reinterpret_cast<bool*>(at);
    dead[1] = dead[0] + rows;
  }

  static int64_t bytes(int64_t rows, int64_t classes) { return rows * ((5 * classes + 4) * int64_t(sizeof(S)) + 2); }
};

}  // namespace iprm

#define IPRM_ROWS "head_family.h"
#include "for_each_isa.h"

namespace iprm {
namespace {

// A thread is worth its fork for this many multiplications, some 5 us of them.
constexpr int64_t kProductsPerThread = 250'000;

int64_t grain(int64_t products_each) { return std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products_each)); }

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

void check_projections(std::initializer_list<const Tensor*> projections, const Tensor& stats, ScalarType dtype) {
  const int64_t rows = (*projections.begin())->size(0), classes = (*projections.begin())->size(1);
  for (const Tensor* tensor : projections) check_matrix(*tensor, "projection", rows, classes, dtype);
  check_matrix(stats, "stats", 3, rows, dtype);
}

void head_probe(
    const Tensor& x,
    const Tensor& y,
    const Tensor& weight_x,
    const std::optional<Tensor>& bias_x,
    const Tensor& weight_y,
    const std::optional<Tensor>& bias_y,
    const Tensor& weight_mix,
    const std::optional<Tensor>& bias_mix,
    const Tensor& weight,
    const Tensor& a,
    const Tensor& v,
    const Tensor& u_x,
    const Tensor& u_y,
    const Tensor& stats,
    const Tensor& kl,
    const std::optional<Tensor>& logits_x,
    const std::optional<Tensor>& logits_y) {
  const int64_t rows = x.size(0), columns = x.size(1), classes = weight_mix.size(0);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_matrix(x, "x", rows, columns, dtype);
  check_matrix(y, "y", rows, columns, dtype);
  for (const Tensor* head : {&weight_x, &weight_y, &weight_mix})
    check_matrix(*head, "weight of a head", classes, columns, dtype);
  for (const auto* bias : {&bias_x, &bias_y, &bias_mix})
    if (*bias) check_vector(**bias, "bias of a head", classes, dtype);
  check_scalar(weight, "weight", arithmetic);
  for (const Tensor* out : {&a, &v, &u_x, &u_y}) check_output(*out, "projection", rows, classes, arithmetic);
  check_output(stats, "stats", 3, rows, arithmetic);
  check_output(kl, "kl", 2, arithmetic);
  for (const auto* out : {&logits_x, &logits_y})
    if (*out) check_output(**out, "logits", rows, classes, dtype);
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    ArithmeticInputs<S> input;
    const auto kl_rows = std::make_unique_for_overwrite<S[]>(2 * rows);
    const HeadProbeArgs args{
        MatrixView(x), MatrixView(y), input(weight_x), input(weight_y), input(weight_mix), input(bias_x), input(bias_y),
        input(bias_mix), input(weight), output<void>(a), output<void>(v), output<void>(u_x), output<void>(u_y),
        output<void>(stats), output<void>(logits_x), output<void>(logits_y), kl_rows.get(), rows, columns, classes};
    const auto kernel = IPRM_BEST(head_probe_rows<T>);
    if (rows > 0)
      torch::stable::parallel_for(
          0, rows, grain(4 * classes * columns), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    for (int side = 0; side < 2; ++side) output<S>(kl)[side] = S(ordered_sum(kl_rows.get() + side * rows, rows));
  });
}

void head_rebalance(
    const Tensor& a,
    const Tensor& v,
    const Tensor& u_x,
    const Tensor& u_y,
    const std::optional<Tensor>& bias_mix,
    const Tensor& stats,
    const Tensor& kl,
    const Tensor& target,
    double label_smoothing,
    int64_t ignore_index,
    const Tensor& strength,
    const Tensor& logits_mix,
    const Tensor& loss,
    const Tensor& losses) {
  const int64_t rows = a.size(0), classes = a.size(1);
  const ScalarType dtype = logits_mix.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_projections({&a, &v, &u_x, &u_y}, stats, arithmetic);
  if (bias_mix) check_vector(*bias_mix, "bias_mix", classes, dtype);
  check_output(kl, "kl", 2, arithmetic);
  check_vector(target, "target", rows, ScalarType::Long);
  check_output(strength, "strength", 2, arithmetic);
  check_output(logits_mix, "logits_mix", rows, classes, dtype);
  check_scalar(loss, "loss", arithmetic);
  check_output(losses, "losses", 3, arithmetic);
  dispatch_type(logits_mix.scalar_type(), [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    ArithmeticInputs<S> input;
    strength_weights_of(VectorView<S>(kl), 2, output<S>(strength));
    const auto loss_rows = std::make_unique_for_overwrite<S[]>(3 * rows);
    const HeadRebalanceArgs args{
        input(a), input(v), input(u_x), input(u_y), input(stats), input(bias_mix), input(strength),
        VectorView<int64_t>(target), label_smoothing, ignore_index, output<void>(logits_mix), loss_rows.get(), rows, classes};
    const auto kernel = IPRM_BEST(head_rebalance_rows<T>);
    parallel_rows(rows, 2 * kExpCost * classes, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    const double counted = double(counted_rows(args.target, rows, ignore_index));
    double total = 0;
    for (int k = 0; k < 3; ++k) {
      const double mean = ordered_sum(loss_rows.get() + k * rows, rows) / counted;
      output<S>(losses)[k] = S(mean);
      total += mean;
    }
    *output<S>(loss) = S(total);
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
    const Tensor& a,
    const Tensor& v,
    const Tensor& u_x,
    const Tensor& u_y,
    const Tensor& stats,
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
  const int64_t rows = x.size(0), columns = x.size(1), classes = a.size(1);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  for (const auto* grad : {&grad_mix, &grad_logits_x, &grad_logits_y})
    if (*grad) check_matrix(**grad, "gradient of logits", rows, classes, dtype);
  if (grad_loss) check_scalar(*grad_loss, "grad_loss", arithmetic);
  if (grad_losses) check_vector(*grad_losses, "grad_losses", 3, arithmetic);
  check_matrix(x, "x", rows, columns, dtype);
  check_matrix(y, "y", rows, columns, dtype);
  for (const Tensor* head : {&weight_x, &weight_y, &weight_mix})
    check_matrix(*head, "weight of a head", classes, columns, dtype);
  if (bias_mix) check_vector(*bias_mix, "bias_mix", classes, dtype);
  check_vector(target, "target", rows, ScalarType::Long);
  check_projections({&a, &v, &u_x, &u_y}, stats, arithmetic);
  STD_TORCH_CHECK(a.size(0) == rows, "a: expected as many rows as x");
  check_vector(strength, "strength", 2, arithmetic);
  for (const auto* grad : {&grad_x, &grad_y})
    if (*grad) check_output(**grad, "gradient of features", rows, columns, dtype);
  for (const auto* grad : {&grad_weight_x, &grad_weight_y, &grad_weight_mix})
    if (*grad) check_output(**grad, "gradient of a weight", classes, columns, dtype);
  for (const auto* grad : {&grad_bias_x, &grad_bias_y, &grad_bias_mix})
    if (*grad) check_output(**grad, "gradient of a bias", classes, dtype);
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    ArithmeticInputs<S> input;
    const VectorView<int64_t> labels(target);
    S scales[3];
    const S counted = S(counted_rows(labels, rows, ignore_index));
    const S* to_loss = static_cast<const S*>(input(grad_loss));
    const S* to_losses = static_cast<const S*>(input(grad_losses));
    for (int k = 0; k < 3; ++k) scales[k] = ((to_loss ? *to_loss : S(0)) + (to_losses ? to_losses[k] : S(0))) / counted;

    const auto memory = std::make_unique_for_overwrite<char[]>(HeadCoefficients<S>::bytes(rows, classes));
    std::vector<Tensor> kept;
    const auto stored = [&](const std::optional<Tensor>& grad) -> const void* {
      return grad ? kept.emplace_back(torch::stable::contiguous(*grad)).const_data_ptr() : nullptr;
    };
    const HeadCoefficientArgs coefficient_args{
        input(a), input(v), input(u_x), input(u_y), input(stats), input(bias_mix), input(strength), labels, label_smoothing,
        ignore_index, scales, {stored(grad_mix), stored(grad_logits_x), stored(grad_logits_y)}, memory.get(), rows, classes};
    const auto coefficient_kernel = IPRM_BEST(head_coefficient_rows<T>);
    parallel_rows(
        rows, 2 * kExpCost * classes, [&](int64_t begin, int64_t end) { coefficient_kernel(coefficient_args, begin, end); });
    const HeadCoefficients<S> to(memory.get(), rows, classes);
    const auto write_column_sums = IPRM_BEST(write_column_sums<T>);
    if (grad_bias_mix) write_column_sums(to.mix, rows, classes, output<T>(*grad_bias_mix));
    if (grad_bias_x) write_column_sums(to.own[0], rows, classes, output<T>(*grad_bias_x));
    if (grad_bias_y) write_column_sums(to.own[1], rows, classes, output<T>(*grad_bias_y));

    const HeadGradientArgs args{
        MatrixView(x), MatrixView(y), input(weight_x), input(weight_y), input(weight_mix), memory.get(),
        output<void>(grad_x), output<void>(grad_y), output<void>(grad_weight_x), output<void>(grad_weight_y),
        output<void>(grad_weight_mix), rows, columns, classes};
    const auto kernel = IPRM_BEST(head_gradient_panels<T>);
    const int64_t width = IPRM_BEST(panel_width<S>)(), panels = (columns + width - 1) / width;
    torch::stable::parallel_for(
        0, panels, grain(8 * classes * width * rows), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) {
  m.impl("head_probe", TORCH_BOX(&head_probe));
  m.impl("head_rebalance", TORCH_BOX(&head_rebalance));
  m.impl("head_backward", TORCH_BOX(&head_backward));
}

}  // namespace iprm
