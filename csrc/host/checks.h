// Checks shared by the host code of all devices: kernels use bare pointers, so all arguments are checked before a launch.
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

// The arithmetic type of rows of `dtype`.
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

// Calls work.template operator()<T>() with the storage type of `dtype`; each device has its own 16-bit types.
template <class BFloat16, class Half, class Work>
void dispatch_type(ScalarType dtype, const Work& work) {
  switch (dtype) {
    case ScalarType::Float:
      return work.template operator()<float>();
    case ScalarType::Double:
      return work.template operator()<double>();
    case ScalarType::BFloat16:
      return work.template operator()<BFloat16>();
    case ScalarType::Half:
      return work.template operator()<Half>();
    default:
      STD_TORCH_CHECK(false, "expected float16, bfloat16, float32 or float64");
  }
}

}  // namespace iprm
