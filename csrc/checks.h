// A kernel reads and writes through bare pointers: whatever it is given is checked before it runs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace iprm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What rows of `dtype` are computed in.
inline ScalarType arithmetic_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, ScalarType dtype, bool on_gpu = false) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
      name, ": expected shape (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(tensor.is_cpu() != on_gpu, name, ": expected a tensor on ", on_gpu ? "a GPU" : "the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected type ", int(dtype), ", got ", int(tensor.scalar_type()));
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t count, ScalarType dtype, bool on_gpu = false) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == count, name, ": expected shape (", count, ")");
  STD_TORCH_CHECK(tensor.is_cpu() != on_gpu, name, ": expected a tensor on ", on_gpu ? "a GPU" : "the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected type ", int(dtype), ", got ", int(tensor.scalar_type()));
}

inline void check_scalar(const Tensor& tensor, const char* name, ScalarType dtype, bool on_gpu = false) {
  STD_TORCH_CHECK(
      tensor.dim() == 0 && tensor.is_cpu() != on_gpu && tensor.scalar_type() == dtype, name, ": expected shape () and type ", int(dtype));
}

inline void check_output(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, ScalarType dtype, bool on_gpu = false) {
  check_matrix(tensor, name, rows, columns, dtype, on_gpu);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous matrix");
}

inline void check_output(const Tensor& tensor, const char* name, int64_t count, ScalarType dtype, bool on_gpu = false) {
  check_vector(tensor, name, count, dtype, on_gpu);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous vector");
}

// The tensors that both passes of the linear head step share: see HeadState of either device for what `state` holds.
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

}  // namespace iprm
