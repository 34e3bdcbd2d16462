// linear_probe_rebalance on NVIDIA GPUs: the operators' host side. What runs there is in head_kernels.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../head_step.h"
#include "head_kernels.cuh"

namespace iprm::device {
namespace {

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class Work>
void dispatch_type(ScalarType dtype, const Work& work) {
  iprm::dispatch_type<__nv_bfloat16, __half>(dtype, work);
}

// Keeps contiguous copies alive until the launch, and hands out pointers; of a tensor that is contiguous, its own.
class Contiguous {
 public:
  template <class T>
  const T* operator()(const Tensor& tensor) {
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

template <class T, class S = typename Arithmetic<T>::Type>
void take_state(Head<T>& head, const HeadState<S>& of) {
  head.stats = of.stats;
  head.projected[0] = of.a;
  head.projected[1] = of.v;
  head.own[0] = of.u_x;
  head.own[1] = of.u_y;
  head.counted = of.counted;
}

// Dynamic shared memory above 48 KiB is a kernel's only when it has asked for it.
template <class Kernel>
void allow_shared(Kernel kernel, int64_t bytes, int device, int64_t classes, int64_t needed_later = 0) {
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  // a step that its backward pass could not follow is refused at once
  STD_TORCH_CHECK(std::max(bytes, needed_later) <= most, "the cuda backend holds no rows of ", classes, " classes: use_backend(\"triton\") does");
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
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
  const ScalarType arithmetic = arithmetic_type(x.scalar_type());
  check_step(
      x, y, {&weight_x, &weight_y, &weight_mix}, {&bias_x, &bias_y, &bias_mix}, target, state,
      {&logits_mix, &logits_x, &logits_y}, strength, true);
  check_scalar(weight, "weight", arithmetic, true);
  check_output(kl, "kl", 2, arithmetic, true);
  check_scalar(loss, "loss", arithmetic, true);
  check_output(losses, "losses", 3, arithmetic, true);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  dispatch_type(x.scalar_type(), [&]<class T>() {
    using S = typename Arithmetic<T>::Type;
    Contiguous input;
    Forward<T> args{};
    args.head = {
        matrix<T>(x), matrix<T>(y),
        {input.operator()<T>(weight_mix), input.operator()<T>(weight_x), input.operator()<T>(weight_y)},
        {input.operator()<T>(bias_mix), input.operator()<T>(bias_x), input.operator()<T>(bias_y)},
        static_cast<const int64_t*>(target.const_data_ptr()), target.stride(0), nullptr, {}, {}, nullptr,
        x.size(0), x.size(1), weight_mix.size(0), label_smoothing, ignore_index};
    take_state(args.head, HeadState<S>(state, logits_x, logits_y));
    args.weight = static_cast<const S*>(weight.const_data_ptr());
    args.logits_mix = out<T>(logits_mix);
    if constexpr (!std::is_same_v<T, S>) {
      args.logits[0] = out<T>(logits_x);
      args.logits[1] = out<T>(logits_y);
    }
    args.kl = out<S>(kl);
    args.strength = out<S>(strength);
    args.loss = out<S>(loss);
    args.losses = out<S>(losses);
    args.probe = parts & kProbe;
    args.rebalance = parts & kRebalance;

    const auto kernel = head_forward_kernel<T>;
    const int64_t shared = forward_shared<T>(args.head.classes);
    allow_shared(kernel, shared, device, args.head.classes, features_shared<T>(args.head.classes));
    int multiprocessors = 0, resident = 0;  // all blocks of a cooperative launch run at once
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, shared), "occupancy");
    const int64_t blocks = std::clamp<int64_t>(tiles_of(args.head.rows), 1, int64_t(multiprocessors) * resident);
    const Tensor sums = torch::stable::new_empty(state, {blocks * (kParts + kLossParts)}, ScalarType::Double);
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
  const ScalarType dtype = x.scalar_type(), arithmetic = arithmetic_type(dtype);
  check_step_backward(
      x, classes, grad_loss, grad_losses, {&grad_mix, &grad_logits_x, &grad_logits_y}, {&grad_x, &grad_y},
      {&grad_weight_x, &grad_weight_y, &grad_weight_mix}, {&grad_bias_x, &grad_bias_y, &grad_bias_mix}, true);
  check_step(
      x, y, {&weight_x, &weight_y, &weight_mix}, {&bias_mix}, target, state, {&logits_x, &logits_y}, strength, true);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  dispatch_type(dtype, [&]<class T>() {
    using S = typename Arithmetic<T>::Type;
    Contiguous input;
    Backward<T> args{};
    args.head = {
        matrix<T>(x), matrix<T>(y),
        {input.operator()<T>(weight_mix), input.operator()<T>(weight_x), input.operator()<T>(weight_y)},
        {input.operator()<T>(bias_mix), nullptr, nullptr},
        static_cast<const int64_t*>(target.const_data_ptr()), target.stride(0), nullptr, {}, {}, nullptr,
        rows, columns, classes, label_smoothing, ignore_index};
    take_state(args.head, HeadState<S>(state, logits_x, logits_y));
    args.grad_loss = input.operator()<S>(grad_loss);
    args.grad_losses = input.operator()<S>(grad_losses);
    args.strength = static_cast<const S*>(strength.const_data_ptr());
    const std::optional<Tensor>* upstream[3] = {&grad_mix, &grad_logits_x, &grad_logits_y};
    const std::optional<Tensor>* weights[3] = {&grad_weight_mix, &grad_weight_x, &grad_weight_y};
    const std::optional<Tensor>* biases[3] = {&grad_bias_mix, &grad_bias_x, &grad_bias_y};
    const Tensor scratch = torch::stable::new_empty(state, {3 * rows * classes + 2 * rows}, arithmetic);
    for (int i = 0; i < 3; ++i) {
      args.upstream[i] = input.operator()<T>(*upstream[i]);
      args.gradients[i] = out<S>(scratch) + i * rows * classes;
      args.grad_weight[i] = out<T>(*weights[i]);
      args.grad_bias[i] = out<T>(*biases[i]);
    }
    for (int side = 0; side < 2; ++side) args.z_from[side] = out<S>(scratch) + 3 * rows * classes + side * rows;
    args.grad_x = out<T>(grad_x);
    args.grad_y = out<T>(grad_y);

    if (rows > 0) {
      const auto kernel = head_backward_features_kernel<T>;
      const int64_t shared = features_shared<T>(classes);
      allow_shared(kernel, shared, device, classes);
      kernel<<<unsigned(tiles_of(rows)), kThreads, shared, stream_of(x)>>>(args);
      check(cudaGetLastError(), "head_backward");
    }
    const auto wanted = [](const std::optional<Tensor>* grad) { return grad->has_value(); };
    if (std::none_of(weights, weights + 3, wanted) && std::none_of(biases, biases + 3, wanted)) return;
    head_backward_heads_kernel<T>
        <<<unsigned(head_blocks(columns, classes)), kThreads, heads_shared<T>(), stream_of(x)>>>(args);
    check(cudaGetLastError(), "head_backward");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CUDA, m) {
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_backward", TORCH_BOX(&head_backward));
}

}  // namespace iprm::device
