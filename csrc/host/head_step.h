// The host code of the linear head step that devices share: argument checks and the layout of the saved state.
#pragma once

#include <algorithm>
#include <array>
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
// arithmetic type, M unimodal logits (B, C) in the arithmetic type, `step` elements apart; and the number of rows that count in the
// losses. Every offset is a multiple of 4 elements, so that all are aligned to 16 bytes for any batch; the gaps are zeros.
struct HeadLayout {
  int64_t projected, unimodal, counted, step, size;

  HeadLayout(int64_t rows, int64_t classes, int64_t modalities, int64_t pairs, bool narrow) {
    const int64_t matrix = times(rows, classes);
    step = aligned(matrix);
    projected = aligned(times(rows, times(3, pairs)));
    unimodal = plus(projected, aligned(times(times(2, pairs), matrix)));
    counted = plus(unimodal, narrow ? times(modalities, step) : 0);
    size = plus(counted, 1);
  }

 private:
  static int64_t times(int64_t a, int64_t b) { return product(a, b, "state"); }
  static int64_t plus(int64_t a, int64_t b) { return sum(a, b, "state"); }
  static int64_t aligned(int64_t elements) { return plus(elements, 3) / 4 * 4; }
};

// The same layout as pointers into the tensor.
template <class S>
struct HeadState {
  S *stats, *projected, *counted;
  std::vector<S*> own;  // M of (B, C)

  // unimodal: M of (B, C) returned logits
  HeadState(const Tensor& state, const Tensor* unimodal, int64_t modalities, int64_t pairs)
      : narrow(unimodal->scalar_type() != state.scalar_type()),
        at(unimodal->size(0), unimodal->size(1), modalities, pairs, narrow),
        matrix(unimodal->size(0) * unimodal->size(1)) {
    stats = static_cast<S*>(state.mutable_data_ptr());
    projected = stats + at.projected;
    counted = stats + at.counted;
    for (int64_t m = 0; m < modalities; ++m)
      own.push_back(narrow ? stats + at.unimodal + m * at.step : static_cast<S*>(unimodal[m].mutable_data_ptr()));
    ends = {3 * pairs * unimodal->size(0), at.projected + 2 * pairs * matrix};
  }

  // Zeros between the fields, on the host.
  void clear_gaps() const {
    std::fill(stats + ends[0], projected, S(0));
    std::fill(stats + ends[1], stats + at.unimodal, S(0));
    if (narrow)
      for (S* logits : own) std::fill(logits + matrix, logits + at.step, S(0));
  }

 private:
  bool narrow;
  HeadLayout at;
  int64_t matrix;
  std::array<int64_t, 2> ends;  // of the statistics and the projections, in elements
};

// The sizes and types of a step, whose heads are one per pair and per modality.
struct StepSizes {
  int64_t rows, columns, classes, modalities, pairs, heads;
  ScalarType dtype, arithmetic;

  StepSizes(const std::vector<Tensor>& features, const std::vector<Tensor>& weights, int64_t pairs)
      : modalities(features.size()), pairs(pairs), heads(weights.size()) {
    STD_TORCH_CHECK(modalities > 1, "features: expected two or more, got ", modalities);
    STD_TORCH_CHECK(
        heads == pairs + modalities, "weights: expected one per pair and per modality, ", pairs + modalities, ", got ", heads);
    rows = rows_of(features[0], "features");
    columns = columns_of(features[0], "features");
    classes = rows_of(weights[0], "weights");
    dtype = floating_type(features[0], "features");
    arithmetic = arithmetic_type(dtype);
  }

  int64_t state() const { return HeadLayout(rows, classes, modalities, pairs, dtype != arithmetic).size; }
};

inline void check_length(size_t length, int64_t expected, const char* name) {
  STD_TORCH_CHECK(int64_t(length) == expected, name, ": expected ", expected, ", got ", length);
}

// The inputs that both passes share. Heads list the mixtures first.
inline void add_step(
    Arguments& arguments,
    const StepSizes& of,
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    const Tensor& target) {
  for (const Tensor& x : features) arguments.reads(x, "features", {of.rows, of.columns}, of.dtype);
  for (const Tensor& weight : weights) arguments.reads(weight, "weights", {of.classes, of.columns}, of.dtype);
  for (const auto& bias : biases) arguments.reads(bias, "biases", {of.classes}, of.dtype);
  arguments.reads(target, "target", {of.rows}, ScalarType::Long);
}

// All tensors of a forward pass, of which `parts` are computed.
inline StepSizes check_forward(
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    int64_t pairs,
    const Tensor& target,
    const Tensor& probe_weight,
    int64_t parts,
    const Tensor& state,
    const std::vector<Tensor>& logits,
    const Tensor& kl,
    const Tensor& strength,
    const Tensor& loss,
    const Tensor& losses,
    bool on_gpu = false) {
  const StepSizes of(features, weights, pairs);
  STD_TORCH_CHECK(parts >= kProbe && parts <= (kProbe | kRebalance), "parts: expected 1, 2 or 3, got ", parts);
  check_length(biases.size(), of.heads, "biases");
  check_length(logits.size(), of.heads, "logits");
  Arguments arguments(on_gpu);
  add_step(arguments, of, features, weights, biases, target);
  arguments.reads_numbers(probe_weight, "probe_weight", pairs, of.arithmetic);
  arguments.writes(state, "state", {of.state()}, of.arithmetic);
  for (const Tensor& own : logits) arguments.writes(own, "logits", {of.rows, of.classes}, of.dtype);
  arguments.writes(kl, "kl", {2 * pairs}, of.arithmetic);
  arguments.writes(strength, "strength", {2 * pairs}, of.arithmetic);
  arguments.writes(loss, "loss", {}, of.arithmetic);
  arguments.writes(losses, "losses", {of.heads}, of.arithmetic);
  arguments.check_outputs();
  return of;
}

// All tensors of a backward pass. Only the biases of the mixtures are needed, and only the logits of the modalities.
inline StepSizes check_backward(
    const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_losses,
    const std::vector<std::optional<Tensor>>& grad_logits,
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    int64_t pairs,
    const Tensor& target,
    const Tensor& state,
    const std::vector<Tensor>& unimodal,
    const Tensor& strength,
    const std::vector<std::optional<Tensor>>& grad_features,
    const std::vector<std::optional<Tensor>>& grad_weights,
    const std::vector<std::optional<Tensor>>& grad_biases,
    bool on_gpu = false) {
  const StepSizes of(features, weights, pairs);
  const int64_t given = biases.size();
  STD_TORCH_CHECK(given >= pairs && given <= of.heads, "biases: expected ", pairs, " to ", of.heads, ", got ", given);
  check_length(unimodal.size(), of.modalities, "unimodal");
  check_length(grad_logits.size(), of.heads, "grad_logits");
  check_length(grad_features.size(), of.modalities, "grad_features");
  check_length(grad_weights.size(), of.heads, "grad_weights");
  check_length(grad_biases.size(), of.heads, "grad_biases");
  Arguments arguments(on_gpu);
  arguments.reads(grad_loss, "grad_loss", {}, of.arithmetic);
  arguments.reads(grad_losses, "grad_losses", {of.heads}, of.arithmetic);
  for (const auto& grad : grad_logits) arguments.reads(grad, "grad_logits", {of.rows, of.classes}, of.dtype);
  add_step(arguments, of, features, weights, biases, target);
  arguments.reads_contiguous(state, "state", {of.state()}, of.arithmetic);
  for (const Tensor& own : unimodal) arguments.reads_contiguous(own, "unimodal", {of.rows, of.classes}, of.dtype);
  arguments.reads_contiguous(strength, "strength", {2 * pairs}, of.arithmetic);
  for (const auto& grad : grad_features) arguments.writes(grad, "grad_features", {of.rows, of.columns}, of.dtype);
  for (const auto& grad : grad_weights) arguments.writes(grad, "grad_weights", {of.classes, of.columns}, of.dtype);
  for (const auto& grad : grad_biases) arguments.writes(grad, "grad_biases", {of.classes}, of.dtype);
  arguments.check_outputs();
  return of;
}

}  // namespace iprm
