// The host code of the linear head step that devices share: argument checks and the layout of the saved state.
#pragma once

#include <vector>

#include "checks.h"

namespace iprm {

// The parts of a forward pass, named as in iprm_kernels/convention.py.
constexpr int64_t kProbe = 1, kRebalance = 2;

// A pair of modalities that are mixed, as indices into the features.
struct Pair {
  int64_t x, y;
};

inline std::vector<Pair> pairs_of(const std::vector<int64_t>& flat, int64_t modalities) {
  STD_TORCH_CHECK(!flat.empty() && flat.size() % 2 == 0, "pairs: expected two indices per pair");
  std::vector<Pair> pairs;
  for (size_t k = 0; k < flat.size(); k += 2) {
    pairs.push_back({flat[k], flat[k + 1]});
    for (int64_t place : {flat[k], flat[k + 1]}) STD_TORCH_CHECK(place >= 0 && place < modalities, "pairs: no modality ", place);
    STD_TORCH_CHECK(flat[k] != flat[k + 1], "pairs: expected two modalities, got ", flat[k], " twice");
  }
  return pairs;
}

// The layout of the tensor that a step saves for its backward pass, as offsets in elements; HeadState in iprm_kernels/convention.py
// has the same layout, and tests/iprm_kernels/test_convention.py compares the two. For P pairs and M modalities: ||x||, ||y||, c
// (P, 3, B) at 0; projections of x and y on the head of their mixture (P, 2, B, C); if the returned logits are narrower than the
// arithmetic type, the unimodal logits (M, B, C) in the arithmetic type; and the number of rows that count in the losses.
struct HeadLayout {
  int64_t projected, unimodal, counted, size;

  HeadLayout(int64_t rows, int64_t classes, int64_t modalities, int64_t pairs, bool narrow) {
    projected = 3 * pairs * rows;
    unimodal = projected + 2 * pairs * rows * classes;
    counted = unimodal + (narrow ? modalities * rows * classes : 0);
    size = counted + 1;
  }
};

// The same layout as pointers into the tensor.
template <class S>
struct HeadState {
  S *stats, *projected, *counted;
  std::vector<S*> own;  // M of (B, C)

  // unimodal: M of (B, C) returned logits
  HeadState(const Tensor& state, const Tensor* unimodal, int64_t modalities, int64_t pairs) {
    const int64_t rows = unimodal->size(0), classes = unimodal->size(1);
    const bool narrow = unimodal->scalar_type() != state.scalar_type();
    const HeadLayout at(rows, classes, modalities, pairs, narrow);
    stats = static_cast<S*>(state.mutable_data_ptr());
    projected = stats + at.projected;
    counted = stats + at.counted;
    for (int64_t m = 0; m < modalities; ++m)
      own.push_back(narrow ? stats + at.unimodal + m * rows * classes : static_cast<S*>(unimodal[m].mutable_data_ptr()));
  }
};

// The tensors that both passes of the linear head step share; HeadState is the layout of `state`. Heads list the mixtures first.
// `logits` are those of all heads in the forward pass, and of the modalities in the backward pass.
inline void check_step(
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    int64_t pairs,
    const Tensor& target,
    const Tensor& state,
    const std::vector<Tensor>& logits,
    const Tensor& strength,
    bool on_gpu = false) {
  const int64_t modalities = features.size(), heads = weights.size();
  STD_TORCH_CHECK(modalities > 1 && heads == pairs + modalities, "expected one head per pair and per modality");
  const int64_t rows = features[0].size(0), columns = features[0].size(1), classes = weights[0].size(0);
  const ScalarType dtype = features[0].scalar_type(), arithmetic = arithmetic_type(dtype);
  for (const Tensor& x : features) check_matrix(x, "features", rows, columns, dtype, on_gpu);
  for (const Tensor& weight : weights) check_matrix(weight, "weight of a head", classes, columns, dtype, on_gpu);
  for (const auto& bias : biases)
    if (bias) check_vector(*bias, "bias of a head", classes, dtype, on_gpu);
  check_vector(target, "target", rows, ScalarType::Long, on_gpu);
  check_output(state, "state", HeadLayout(rows, classes, modalities, pairs, dtype != arithmetic).size, arithmetic, on_gpu);
  for (const Tensor& own : logits) check_output(own, "logits", rows, classes, dtype, on_gpu);
  check_output(strength, "strength", 2 * pairs, arithmetic, on_gpu);
}

// The additional arguments of the forward pass.
inline void check_step_forward(
    const Tensor& state,
    int64_t heads,
    int64_t pairs,
    size_t biases,
    size_t logits,
    const Tensor& probe_weight,
    const Tensor& kl,
    const Tensor& loss,
    const Tensor& losses,
    bool on_gpu = false) {
  const ScalarType arithmetic = state.scalar_type();
  STD_TORCH_CHECK(int64_t(biases) == heads, "expected one bias or None per head");
  STD_TORCH_CHECK(int64_t(logits) == heads, "expected logits of every head");
  STD_TORCH_CHECK(
      probe_weight.is_cpu() != on_gpu && probe_weight.scalar_type() == arithmetic && probe_weight.numel() == pairs && probe_weight.is_contiguous(),
      "probe_weight: expected one weight per pair");
  check_output(kl, "kl", 2 * pairs, arithmetic, on_gpu);
  check_scalar(loss, "loss", arithmetic, on_gpu);
  check_output(losses, "losses", heads, arithmetic, on_gpu);
}

// The additional arguments of the backward pass: upstream gradients, and the outputs that are needed.
inline void check_step_backward(
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    size_t biases,
    size_t unimodal,
    int64_t pairs,
    const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_losses,
    const std::vector<std::optional<Tensor>>& grad_logits,
    const std::vector<std::optional<Tensor>>& grad_features,
    const std::vector<std::optional<Tensor>>& grad_weights,
    const std::vector<std::optional<Tensor>>& grad_biases,
    bool on_gpu = false) {
  const int64_t heads = weights.size();
  STD_TORCH_CHECK(int64_t(biases) >= pairs && int64_t(biases) <= heads, "expected one bias or None per mixture");
  STD_TORCH_CHECK(
      unimodal == features.size() && grad_logits.size() == weights.size(),
      "expected logits of every modality, and one gradient or None for the logits of every head");
  STD_TORCH_CHECK(
      grad_features.size() == features.size() && grad_weights.size() == weights.size() && grad_biases.size() == weights.size(),
      "expected one gradient or None per feature matrix and per head");
  const int64_t rows = features[0].size(0), columns = features[0].size(1), classes = weights[0].size(0);
  const ScalarType dtype = features[0].scalar_type(), arithmetic = arithmetic_type(dtype);
  if (grad_loss) check_scalar(*grad_loss, "grad_loss", arithmetic, on_gpu);
  if (grad_losses) check_vector(*grad_losses, "grad_losses", heads, arithmetic, on_gpu);
  for (const auto& grad : grad_logits)
    if (grad) check_matrix(*grad, "gradient of logits", rows, classes, dtype, on_gpu);
  for (const auto& grad : grad_features)
    if (grad) check_output(*grad, "gradient of features", rows, columns, dtype, on_gpu);
  for (const auto& grad : grad_weights)
    if (grad) check_output(*grad, "gradient of a weight", classes, columns, dtype, on_gpu);
  for (const auto& grad : grad_biases)
    if (grad) check_output(*grad, "gradient of a bias", classes, dtype, on_gpu);
}

}  // namespace iprm
