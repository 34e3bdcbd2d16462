// linear_probe_rebalance on the CPU. Forward: each feature matrix is read once, for its projections and its row
// statistics; probe, KL, rebalanced logits and losses are computed on (B, C) matrices. Backward: gradients of the logits, then one
// pass over the feature matrices for all gradients. Sums over rows have a fixed order, so results are bit-identical for any number
// of threads.
#include <cstring>
#include <memory>

#include "../core/label.h"
#include "../core/strength.h"
#include "../host/head_step.h"
#include "rows.h"

namespace iprm {

// A step of P pairs among M modalities. Heads, logits and losses list the mixtures first. The saved state of all pairs
// is one tensor with the layout of HeadState.
struct HeadStep {
  std::vector<MatrixView> features;
  std::vector<Pair> pairs;
  std::vector<const void*> weights, biases;  // (C, D) contiguous, (C,) or null, in the arithmetic type
  std::vector<void*> own;                    // M of (B, C): unimodal logits in the arithmetic type
  void *stats, *projected;
  const void* strength;
  VectorView<int64_t> target;
  double label_smoothing;
  int64_t ignore_index, rows, columns, classes;

  int64_t modalities() const { return features.size(); }
  int64_t mixtures() const { return pairs.size(); }
  int64_t heads() const { return weights.size(); }
};

struct HeadProbeArgs {
  const HeadStep& step;
  const void* probe_weight;   // (P,) lambda
  std::vector<void*> logits;  // M of (B, C); empty if `own` holds the logits
  void* kl_rows;              // (2P, B)
};

struct HeadRebalanceArgs {
  const HeadStep& step;
  std::vector<void*> logits;  // P of (B, C)
  void* loss_rows;            // (P + M, B)
};

struct HeadCoefficientArgs {
  const HeadStep& step;
  const void* scales;                  // (P + M,) upstream gradients of the losses, divided by the number of counted rows
  std::vector<const void*> upstream;  // P + M of (B, C) upstream gradients of the logits, or null
  void* coefficients;
};

struct HeadGradientArgs {
  const HeadStep& step;
  void* coefficients;
  std::vector<void*> grad_features, grad_weights;  // null if not needed
};

// The coefficients of the gradients, in one allocation.
template <class S>
struct HeadCoefficients {
  S* of_logits;  // (P + M, B, C) dZ and dU
  S* z_from;     // (P, 2, B) p / ||x|| and q / ||y||: factors of x and y in the mixture, and of dZ W in their gradients
  S* from;       // (P, 2, 2, B) for the gradient of each side, the factors of x and of y
  bool* dead;    // (P, 2, B) rows that receive a gradient only from their own head

  HeadCoefficients(void* memory, const HeadStep& step) {
    of_logits = static_cast<S*>(memory);
    z_from = of_logits + step.heads() * step.rows * step.classes;
    from = z_from + 2 * step.mixtures() * step.rows;
    dead = reinterpret_cast<bool*>(from + 4 * step.mixtures() * step.rows);
  }

  static int64_t bytes(const HeadStep& step) {
    return step.rows * ((step.heads() * step.classes + 6 * step.mixtures()) * int64_t(sizeof(S)) + 2 * step.mixtures());
  }
};

}  // namespace iprm

#define IPRM_ROWS "head_family.h"
#include "for_each_isa.h"

namespace iprm {
namespace {

// The row mathematics, an angle and three softmaxes, takes as long as this many elements: 300 to 400 ns.
constexpr int64_t kRowCost = 2000;

// Multiplications, some 5 us of them, above which a thread is worth its fork.
constexpr int64_t kProductsPerThread = 250'000;

template <class Work>
void parallel(int64_t pieces, int64_t products_each, const Work& work) {
  if (pieces == 0) return;
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / std::max<int64_t>(1, products_each));
  torch::stable::parallel_for(0, pieces, grain, work);
}

// `tensor` contiguous and in the arithmetic type; the same tensor if it already is.
template <class S>
Tensor arithmetic(const Tensor& tensor) {
  constexpr ScalarType kType = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(tensor.scalar_type() == kType ? tensor : torch::stable::to(tensor, kType));
}

// Keeps the tensors of `arithmetic` alive, and returns pointers to them.
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

// The arguments of the row kernels; `input` keeps converted tensors alive.
template <class S>
HeadStep step_of(
    ArithmeticInputs<S>& input,
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    std::vector<Pair> pairs,
    const Tensor& target,
    const HeadState<S>& of,
    const Tensor& strength,
    double label_smoothing,
    int64_t ignore_index) {
  HeadStep step{
      {}, std::move(pairs), {}, {}, {of.own.begin(), of.own.end()}, of.stats, of.projected, strength.const_data_ptr(), VectorView<int64_t>(target),
      label_smoothing, ignore_index, features[0].size(0), features[0].size(1), weights[0].size(0)};
  for (const Tensor& x : features) step.features.emplace_back(x);
  for (const Tensor& weight : weights) step.weights.push_back(input(weight));
  for (const auto& bias : biases) step.biases.push_back(input(bias));
  return step;
}

void head_forward(
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    const std::vector<int64_t>& flat_pairs,
    const Tensor& target,
    const Tensor& probe_weight,
    double label_smoothing,
    int64_t ignore_index,
    int64_t parts,
    const Tensor& state,
    const std::vector<Tensor>& logits,
    const Tensor& kl,
    const Tensor& strength,
    const Tensor& loss,
    const Tensor& losses) {
  const std::vector<Pair> pairs = pairs_of(flat_pairs, features.size());
  const int64_t mixtures = pairs.size(), heads = weights.size();
  const StepSizes sizes = check_forward(
      features, weights, biases, mixtures, target, probe_weight, parts, state, logits, kl, strength, loss, losses);
  const int64_t rows = sizes.rows, columns = sizes.columns, classes = sizes.classes;
  const VectorView<int64_t> labels(target);
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(
        !Label(labels[row], classes, ignore_index).wrong, "target: label ", labels[row], " of row ", row, " is out of range");
  dispatch_type(sizes.dtype, [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    constexpr bool kNarrow = !std::is_same_v<T, S>;
    const HeadState<S> of(state, &logits[mixtures], features.size(), mixtures);
    ArithmeticInputs<S> input;
    const HeadStep step =
        step_of(input, features, weights, biases, pairs, target, of, strength, label_smoothing, ignore_index);
    std::vector<void*> written;
    for (const Tensor& own : logits) written.push_back(own.mutable_data_ptr());
    const auto row_values = std::make_unique_for_overwrite<S[]>(std::max(heads, 2 * mixtures) * rows);
    if (parts & kProbe) {
      HeadProbeArgs args{step, probe_weight.const_data_ptr(), {}, row_values.get()};
      if (kNarrow) args.logits.assign(written.begin() + mixtures, written.end());
      of.clear_gaps();
      const auto kernel = IPRM_BEST(head_probe_rows<T>);
      const int64_t products = (step.modalities() + 2 * mixtures) * classes * columns;
      parallel(rows, products, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
      for (int64_t k = 0; k < 2 * mixtures; ++k) output<S>(kl)[k] = S(ordered_sum(row_values.get() + k * rows, rows));
    }
    if (parts & kRebalance) {
      for (int64_t k = 0; k < mixtures; ++k)
        strength_weights_of(output<S>(kl) + 2 * k, 2, output<S>(strength) + 2 * k);
      const HeadRebalanceArgs args{step, {written.begin(), written.begin() + mixtures}, row_values.get()};
      const auto kernel = IPRM_BEST(head_rebalance_rows<T>);
      parallel_rows(
          rows, mixtures * (kRowCost + kExpCost * classes), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
      const double counted = double(counted_rows(labels, rows, ignore_index));
      *of.counted = S(counted);
      double total = 0;
      for (int64_t k = 0; k < heads; ++k) {
        const double mean = ordered_sum(row_values.get() + k * rows, rows) / counted;
        output<S>(losses)[k] = S(mean);
        total += k < mixtures ? mean / double(mixtures) : mean;
      }
      *output<S>(loss) = S(total);
    }
  });
}

void head_backward(
    const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_losses,
    const std::vector<std::optional<Tensor>>& grad_logits,
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    const std::vector<int64_t>& flat_pairs,
    const Tensor& target,
    const Tensor& state,
    const std::vector<Tensor>& unimodal,
    const Tensor& strength,
    double label_smoothing,
    int64_t ignore_index,
    const std::vector<std::optional<Tensor>>& grad_features,
    const std::vector<std::optional<Tensor>>& grad_weights,
    const std::vector<std::optional<Tensor>>& grad_biases) {
  const std::vector<Pair> pairs = pairs_of(flat_pairs, features.size());
  const int64_t mixtures = pairs.size(), heads = weights.size();
  const StepSizes sizes = check_backward(
      grad_loss, grad_losses, grad_logits, features, weights, biases, mixtures, target, state, unimodal, strength, grad_features,
      grad_weights, grad_biases);
  const int64_t rows = sizes.rows, columns = sizes.columns, classes = sizes.classes;
  dispatch_type(sizes.dtype, [&]<class T>() {
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    ArithmeticInputs<S> input;
    const HeadState<S> of(state, unimodal.data(), unimodal.size(), mixtures);
    const HeadStep step =
        step_of(input, features, weights, biases, pairs, target, of, strength, label_smoothing, ignore_index);
    std::vector<S> scales(heads);
    const S* to_loss = static_cast<const S*>(input(grad_loss));
    const S* to_losses = static_cast<const S*>(input(grad_losses));
    for (int64_t k = 0; k < heads; ++k) {
      const S share = to_loss ? (k < mixtures ? *to_loss / S(mixtures) : *to_loss) : S(0);
      scales[k] = (share + (to_losses ? to_losses[k] : S(0))) / *of.counted;
    }

    const auto memory = std::make_unique_for_overwrite<char[]>(HeadCoefficients<S>::bytes(step));
    HeadCoefficientArgs coefficient_args{step, scales.data(), {}, memory.get()};
    std::vector<Tensor> upstream;  // keeps copies alive
    for (const auto& grad : grad_logits) {
      if (grad) upstream.push_back(torch::stable::contiguous(*grad));
      coefficient_args.upstream.push_back(grad ? upstream.back().const_data_ptr() : nullptr);
    }
    const auto coefficient_kernel = IPRM_BEST(head_coefficient_rows<T>);
    parallel_rows(
        rows, mixtures * (kRowCost + kExpCost * classes),
        [&](int64_t begin, int64_t end) { coefficient_kernel(coefficient_args, begin, end); });
    const HeadCoefficients<S> to(memory.get(), step);
    const auto write_column_sums = IPRM_BEST(write_column_sums<T>);
    for (int64_t k = 0; k < heads; ++k)
      if (grad_biases[k]) write_column_sums(to.of_logits + k * rows * classes, rows, classes, output<T>(*grad_biases[k]));

    HeadGradientArgs args{step, memory.get(), {}, {}};
    for (const auto& grad : grad_features) args.grad_features.push_back(output<void>(grad));
    for (const auto& grad : grad_weights) args.grad_weights.push_back(output<void>(grad));
    for (void* out : args.grad_features)
      if (out) prefer_huge_pages(out, rows * columns * sizeof(T));
    const auto kernel = IPRM_BEST(head_gradient_panels<T>);
    const int64_t width = IPRM_BEST(panel_width<S>)(), panels = (columns + width - 1) / width;
    parallel(panels, 2 * heads * classes * width * rows, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_backward", TORCH_BOX(&head_backward));
}

}  // namespace iprm
