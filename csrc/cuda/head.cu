// linear_probe_rebalance on NVIDIA GPUs: the host side. The kernels are in head_kernels.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../host/head_step.h"
#include "head_kernels.cuh"
#include "launch_limits.h"

namespace iprm::device {
namespace {

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class Work>
void dispatch_type(ScalarType dtype, const Work& work) {
  iprm::dispatch_type<__nv_bfloat16, __half>(dtype, work);
}

// Returns pointers to contiguous tensors, and keeps contiguous copies of all others until the launch.
class Contiguous {
 public:
  template <class T>
  const T* operator()(const Tensor& tensor) {
    if (tensor.is_contiguous()) return static_cast<const T*>(tensor.const_data_ptr());  // without a dispatch, about 1 us
    kept_.push_back(torch::stable::contiguous(tensor));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }
  template <class T>
  const T* operator()(const std::optional<Tensor>& tensor) {
    return tensor ? operator()<T>(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> kept_;
};

template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* out(const std::optional<Tensor>& tensor) {
  return tensor ? out<T>(*tensor) : nullptr;
}

// The arguments that both passes of a step of one pair share; the biases of the modalities matter only in the forward pass.
template <class T, class S = typename Arithmetic<T>::Type>
Head<T> head_of(
    Contiguous& input,
    const std::vector<Tensor>& features,
    const std::vector<Tensor>& weights,
    const std::vector<std::optional<Tensor>>& biases,
    const Tensor& target,
    const Tensor& state,
    const Tensor* unimodal,
    double label_smoothing,
    int64_t ignore_index) {
  const int64_t rows = features[0].size(0), columns = features[0].size(1), classes = weights[0].size(0);
  const HeadState<S> of(state, unimodal, 2, 1);
  Head<T> head{
      matrix<T>(features[0]), matrix<T>(features[1]), {}, {}, static_cast<const int64_t*>(target.const_data_ptr()),
      target.stride(0), of.stats, {of.projected, of.projected + rows * classes}, {of.own[0], of.own[1]}, of.counted,
      rows, columns, classes, label_smoothing, ignore_index};
  for (size_t k = 0; k < weights.size(); ++k) head.weight[k] = input.operator()<T>(weights[k]);
  for (size_t k = 0; k < biases.size(); ++k) head.bias[k] = input.operator()<T>(biases[k]);
  return head;
}

// Uninitialised memory, which tests fill with NaN: see IPRM_KERNELS_POISON in tests/conftest.py.
Tensor scratch_like(const Tensor& tensor, int64_t elements, ScalarType dtype) {
  static const bool poisoned = std::getenv("IPRM_KERNELS_POISON") != nullptr;
  Tensor made = torch::stable::new_empty(tensor, {elements}, dtype);
  if (poisoned) torch::stable::fill_(made, std::numeric_limits<double>::quiet_NaN());
  return made;
}

// How many blocks of a kernel run at once; refuses more classes than shared memory holds.
template <class Kernel>
int64_t blocks_at_once(Kernel kernel, int64_t shared, int device, int64_t classes) {
  const int64_t blocks = resident_blocks(reinterpret_cast<const void*>(kernel), kThreads, shared, device);
  STD_TORCH_CHECK(blocks > 0, "the cuda backend does not support ", classes, " classes: use_backend(\"triton\") does");
  return blocks;
}

// The blocks of a launch, of which a GPU takes 2^31 - 1.
unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "the cuda backend does not support a grid of ", blocks, " blocks");
  return unsigned(blocks);
}

// These kernels support one pair of two modalities; iprm_kernels/extension.py refuses other steps with a better message.
void check_one_pair(const std::vector<Tensor>& features, const std::vector<int64_t>& flat_pairs) {
  STD_TORCH_CHECK(
      features.size() == 2 && flat_pairs == std::vector<int64_t>({0, 1}), "pairs: expected one pair of two modalities");
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
  check_one_pair(features, flat_pairs);
  check_forward(features, weights, biases, 1, target, probe_weight, parts, state, logits, kl, strength, loss, losses, true);
  const Tensor& x = features[0];
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = typename Arithmetic<T>::Type;
    Contiguous input;
    Forward<T> args{};
    args.head = head_of<T>(input, features, weights, biases, target, state, &logits[1], label_smoothing, ignore_index);
    args.weight = static_cast<const S*>(probe_weight.const_data_ptr());
    args.logits_mix = out<T>(logits[0]);
    if constexpr (!std::is_same_v<T, S>)
      for (int side = 0; side < 2; ++side) args.logits[side] = out<T>(logits[1 + side]);
    args.kl = out<S>(kl);
    args.strength = out<S>(strength);
    args.loss = out<S>(loss);
    args.losses = out<S>(losses);
    args.probe = parts & kProbe;
    args.rebalance = parts & kRebalance;

    const auto kernel = head_forward_kernel<T>;
    const int64_t shared = forward_shared<T>(args.head.classes);
    const int64_t classes = args.head.classes;
    blocks_at_once(head_backward_features_kernel<T>, features_shared<T>(classes), device, classes);  // or no backward pass follows
    const int64_t most = blocks_at_once(kernel, shared, device, classes);  // all blocks of a cooperative launch run at once
    const int64_t blocks = std::clamp<int64_t>(tiles_of(args.head.rows), 1, most);
    const Tensor sums = scratch_like(state, blocks * (kParts + kLossParts), ScalarType::Double);
    args.kl_parts = out<double>(sums);
    args.loss_parts = args.kl_parts + blocks * kParts;
    void* parameters[] = {&args};
    check(
        cudaLaunchCooperativeKernel(
            reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(kThreads), parameters, shared, stream_of(x)),
        "head_forward");
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
  check_one_pair(features, flat_pairs);
  const StepSizes sizes = check_backward(
      grad_loss, grad_losses, grad_logits, features, weights, biases, 1, target, state, unimodal, strength, grad_features,
      grad_weights, grad_biases, true);
  const Tensor& x = features[0];
  const int64_t rows = sizes.rows, columns = sizes.columns, classes = sizes.classes;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = typename Arithmetic<T>::Type;
    Contiguous input;
    Backward<T> args{};
    args.head = head_of<T>(input, features, weights, biases, target, state, unimodal.data(), label_smoothing, ignore_index);
    args.grad_loss = input.operator()<S>(grad_loss);
    args.grad_losses = input.operator()<S>(grad_losses);
    args.strength = static_cast<const S*>(strength.const_data_ptr());
    const Tensor scratch = scratch_like(state, backward_scratch<T>(rows, classes), state.scalar_type());
    T* const differences = reinterpret_cast<T*>(out<S>(scratch) + 2 * rows);
    for (int i = 0; i < 3; ++i) {
      args.upstream[i] = input.operator()<T>(grad_logits[i]);
      args.differences[i] = differences + i * rows * classes;
      args.grad_weight[i] = out<T>(grad_weights[i]);
      args.grad_bias[i] = out<T>(grad_biases[i]);
    }
    for (int side = 0; side < 2; ++side) args.z_from[side] = out<S>(scratch) + side * rows;
    args.grad_x = out<T>(grad_features[0]);
    args.grad_y = out<T>(grad_features[1]);

    if (rows > 0) {
      const auto kernel = head_backward_features_kernel<T>;
      const int64_t shared = features_shared<T>(classes);
      blocks_at_once(kernel, shared, device, classes);
      kernel<<<grid_of(tiles_of(rows)), kThreads, shared, stream_of(x)>>>(args);
      check(cudaGetLastError(), "head_backward");
    }
    if (classes == 0) return;
    const auto wanted = [](const std::optional<Tensor>& grad) { return grad.has_value(); };
    if (std::none_of(grad_weights.begin(), grad_weights.end(), wanted) &&
        std::none_of(grad_biases.begin(), grad_biases.end(), wanted))
      return;
    head_backward_heads_kernel<T>
        <<<grid_of(head_blocks(columns, classes)), kThreads, heads_shared<T>(), stream_of(x)>>>(args);
    check(cudaGetLastError(), "head_backward");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CUDA, m) {
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_backward", TORCH_BOX(&head_backward));
}

}  // namespace iprm::device
