// What the host code of the linear head step shares between devices: what is asked of a call, what is checked, what is kept.
#pragma once

#include "checks.h"

namespace iprm {

// The parts of a forward pass, as iprm_kernels/backends.py names them.
constexpr int64_t kProbe = 1, kRebalance = 2;

// What a step keeps for its backward pass, in one tensor: ||x||, ||y||, c (3, B); A, V (B, C); where the logits that were
// returned are narrower, the unimodal logits (B, C) in the arithmetic type; and how many rows count in the losses.
template <class S>
struct HeadState {
  S *stats, *a, *v, *u_x, *u_y, *counted;

  HeadState(const Tensor& state, const Tensor& logits_x, const Tensor& logits_y) {
    const int64_t rows = logits_x.size(0), classes = logits_x.size(1);
    const bool narrow = logits_x.scalar_type() != state.scalar_type();
    stats = static_cast<S*>(state.mutable_data_ptr());
    a = stats + 3 * rows;
    v = a + rows * classes;
    u_x = narrow ? v + rows * classes : static_cast<S*>(logits_x.mutable_data_ptr());
    u_y = narrow ? u_x + rows * classes : static_cast<S*>(logits_y.mutable_data_ptr());
    counted = stats + state.numel() - 1;
  }
};

// The tensors that both passes of the linear head step share: see HeadState for what `state` holds.
inline void check_step(
    const Tensor& x,
    const Tensor& y,
    std::initializer_list<const Tensor*> weights,
    std::initializer_list<const std::optional<Tensor>*> biases,
    const Tensor& target,
    const Tensor& state,
    std::initializer_list<const Tensor*> logits,
    const Tensor& strength,
    bool on_gpu = false) {
  const int64_t rows = x.size(0), columns = x.size(1), classes = (*weights.begin())->size(0);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_matrix(x, "x", rows, columns, dtype, on_gpu);
  check_matrix(y, "y", rows, columns, dtype, on_gpu);
  for (const Tensor* weight : weights) check_matrix(*weight, "weight of a head", classes, columns, dtype, on_gpu);
  for (const auto* bias : biases)
    if (*bias) check_vector(**bias, "bias of a head", classes, dtype, on_gpu);
  check_vector(target, "target", rows, ScalarType::Long, on_gpu);
  check_output(state, "state", rows * (3 + (dtype == arithmetic ? 2 : 4) * classes) + 1, arithmetic, on_gpu);
  for (const Tensor* of : logits) check_output(*of, "logits", rows, classes, dtype, on_gpu);
  check_output(strength, "strength", 2, arithmetic, on_gpu);
}

// What the backward pass has besides: upstream gradients, and the outputs that are wanted.
inline void check_step_backward(
    const Tensor& x,
    int64_t classes,
    const std::optional<Tensor>& grad_loss,
    const std::optional<Tensor>& grad_losses,
    std::initializer_list<const std::optional<Tensor>*> of_logits,
    std::initializer_list<const std::optional<Tensor>*> of_features,
    std::initializer_list<const std::optional<Tensor>*> of_weights,
    std::initializer_list<const std::optional<Tensor>*> of_biases,
    bool on_gpu = false) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  if (grad_loss) check_scalar(*grad_loss, "grad_loss", arithmetic, on_gpu);
  if (grad_losses) check_vector(*grad_losses, "grad_losses", 3, arithmetic, on_gpu);
  for (const auto* grad : of_logits)
    if (*grad) check_matrix(**grad, "gradient of logits", rows, classes, dtype, on_gpu);
  for (const auto* grad : of_features)
    if (*grad) check_output(**grad, "gradient of features", rows, columns, dtype, on_gpu);
  for (const auto* grad : of_weights)
    if (*grad) check_output(**grad, "gradient of a weight", classes, columns, dtype, on_gpu);
  for (const auto* grad : of_biases)
    if (*grad) check_output(**grad, "gradient of a bias", classes, dtype, on_gpu);
}

}  // namespace iprm
