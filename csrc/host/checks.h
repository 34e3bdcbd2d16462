// Checks shared by the host code of all devices. Kernels use bare pointers, and a registered operator can be called with anything:
// every argument is checked before a launch, its device, type, shape and strides, and that its storage holds every element.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace iprm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arithmetic type of rows of `dtype`.
inline ScalarType arithmetic_type(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// The largest size of a dimension. Tensors without elements can have any size, whose products with small numbers would overflow.
constexpr int64_t kLargestSize = int64_t(1) << 40;

// a * b and a + b, or an error if they overflow
inline int64_t product(int64_t a, int64_t b, const char* what) {
  int64_t result = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &result), what, ": too large, ", a, " times ", b);
  return result;
}

inline int64_t sum(int64_t a, int64_t b, const char* what) {
  int64_t result = 0;
  STD_TORCH_CHECK(!__builtin_add_overflow(a, b, &result), what, ": too large, ", a, " plus ", b);
  return result;
}

// The size of an element, of the types that kernels read and write.
inline int64_t bytes_of(ScalarType dtype) {
  if (dtype == ScalarType::Double || dtype == ScalarType::Long) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

// The type of a floating tensor that decides the types of the others.
inline ScalarType floating_type(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  const bool narrow = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      narrow || dtype == ScalarType::Float || dtype == ScalarType::Double,
      name, ": expected float16, bfloat16, float32 or float64, got type ", toString(dtype));
  return dtype;
}

// Likewise of a tensor that is stored in an arithmetic type.
inline ScalarType wide_type(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  const bool wide = dtype == ScalarType::Float || dtype == ScalarType::Double;
  STD_TORCH_CHECK(wide, name, ": expected float32 or float64, got type ", toString(dtype));
  return dtype;
}

// One size of a tensor that decides the shapes of the others.
inline int64_t size_of(const Tensor& tensor, const char* name, int64_t dimensions, int64_t dimension) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, ": expected ", dimensions, " dimensions, got ", tensor.dim());
  return tensor.size(dimension);
}
inline int64_t rows_of(const Tensor& matrix, const char* name) { return size_of(matrix, name, 2, 0); }
inline int64_t columns_of(const Tensor& matrix, const char* name) { return size_of(matrix, name, 2, 1); }
inline int64_t count_of(const Tensor& vector, const char* name) { return size_of(vector, name, 1, 0); }

// The arguments of one call. Each is checked as it is added; `check_outputs` follows the last one.
class Arguments {
 public:
  using Shape = std::initializer_list<int64_t>;

  explicit Arguments(bool on_gpu = false) : on_gpu_(on_gpu) {}

  // An input of any strides.
  void reads(const Tensor& tensor, const char* name, Shape shape, ScalarType dtype) {
    check_shape(tensor, name, shape);
    add(tensor, name, dtype, read_);
  }
  void reads(const std::optional<Tensor>& tensor, const char* name, Shape shape, ScalarType dtype) {
    if (tensor) reads(*tensor, name, shape, dtype);
  }

  // An input whose elements are adjacent.
  void reads_contiguous(const Tensor& tensor, const char* name, Shape shape, ScalarType dtype) {
    reads(tensor, name, shape, dtype);
    check_contiguous(tensor, name);
  }

  // An output, whose elements are adjacent.
  void writes(const Tensor& tensor, const char* name, Shape shape, ScalarType dtype) {
    check_shape(tensor, name, shape);
    check_contiguous(tensor, name);
    add(tensor, name, dtype, written_);
  }
  void writes(const std::optional<Tensor>& tensor, const char* name, Shape shape, ScalarType dtype) {
    if (tensor) writes(*tensor, name, shape, dtype);
  }

  // The same for `count` adjacent elements in any shape.
  void reads_numbers(const Tensor& tensor, const char* name, int64_t count, ScalarType dtype) {
    check_count(tensor, name, count);
    add(tensor, name, dtype, read_);
  }
  void writes_numbers(const Tensor& tensor, const char* name, int64_t count, ScalarType dtype) {
    check_count(tensor, name, count);
    add(tensor, name, dtype, written_);
  }

  // No output shares memory with another argument.
  void check_outputs() const {
    for (size_t k = 0; k < written_.size(); ++k) {
      for (const Span& other : read_) check_apart(written_[k], other);
      for (size_t other = 0; other < k; ++other) check_apart(written_[k], written_[other]);
    }
  }

 private:
  // The memory from the first to the last element of an argument.
  struct Span {
    const char* name;
    uintptr_t begin, end;
  };

  static std::string text(Shape shape) {
    std::ostringstream text;
    text << "(";
    for (const int64_t* size = shape.begin(); size != shape.end(); ++size) text << (size == shape.begin() ? "" : ", ") << *size;
    text << (shape.size() == 1 ? ",)" : ")");
    return text.str();
  }

  static void check_shape(const Tensor& tensor, const char* name, Shape shape) {
    bool same = tensor.dim() == int64_t(shape.size());
    for (size_t k = 0; same && k < shape.size(); ++k) same = tensor.size(k) == shape.begin()[k];
    STD_TORCH_CHECK(same, name, ": expected shape ", text(shape));
    for (int64_t size : shape) STD_TORCH_CHECK(size <= kLargestSize, name, ": expected sizes of at most 2^40, got ", size);
  }

  static void check_contiguous(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  }

  static void check_count(const Tensor& tensor, const char* name, int64_t count) {
    STD_TORCH_CHECK(tensor.numel() == count, name, ": expected ", count, " elements, got ", tensor.numel());
    check_contiguous(tensor, name);
  }

  static void check_apart(const Span& output, const Span& other) {
    const bool apart = output.end <= other.begin || other.end <= output.begin;
    STD_TORCH_CHECK(apart, output.name, ": expected an output of its own memory, shares that of ", other.name);
  }

  void add(const Tensor& tensor, const char* name, ScalarType dtype, std::vector<Span>& spans) {
    STD_TORCH_CHECK(on_gpu_ ? tensor.is_cuda() : tensor.is_cpu(), name, ": expected a tensor on ", on_gpu_ ? "a GPU" : "the CPU");
    if (on_gpu_ && !device_) device_ = tensor.get_device_index();
    STD_TORCH_CHECK(!device_ || tensor.get_device_index() == *device_, name, ": expected a tensor on GPU ", *device_);
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected type ", toString(dtype), ", got ", toString(tensor.scalar_type()));
    if (tensor.numel() == 0) return;
    int64_t last = 0;  // element, from the first
    for (int64_t k = 0; k < tensor.dim(); ++k) {
      STD_TORCH_CHECK(tensor.stride(k) >= 0, name, ": expected strides of at least 0");
      last = sum(last, product(tensor.size(k) - 1, tensor.stride(k), name), name);
    }
    const int64_t bytes = product(sum(last, 1, name), bytes_of(dtype), name);
    const int64_t needed = sum(product(tensor.storage_offset(), bytes_of(dtype), name), bytes, name);
    int64_t held = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
    STD_TORCH_CHECK(held >= needed, name, ": expected a storage of at least ", needed, " bytes, got ", held);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    STD_TORCH_CHECK(begin != 0, name, ": expected a tensor with memory");
    STD_TORCH_CHECK(
        begin % bytes_of(dtype) == 0, name, ": expected memory aligned to ", bytes_of(dtype), " bytes, as that of a clone is");
    spans.push_back({name, begin, begin + bytes});
  }

  bool on_gpu_;
  std::optional<int> device_;  // of the first argument
  std::vector<Span> read_, written_;
};

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
