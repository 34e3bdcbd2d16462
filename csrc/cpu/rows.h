// What the row kernels of all families share: views of matrices, the choice of instruction set and of types, threads.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../host/checks.h"
#include "../core/macros.h"

namespace iprm {

// Storage types that simd.h converts: these structs only hold the bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Isa { kBaseline, kAvx2, kAvx512 };
Isa isa();               // the widest that this machine has
const char* isa_name();  // for build_info

// A (rows, columns) input of any strides.
struct MatrixView {
  const void* data;
  int64_t row_stride, column_stride;

  MatrixView(const void* data, int64_t row_stride, int64_t column_stride)
      : data(data), row_stride(row_stride), column_stride(column_stride) {}
  explicit MatrixView(const Tensor& tensor)
      : MatrixView(tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)) {}
};

// A (rows,) input of any stride, 0 if one value serves all rows.
template <class T>
struct VectorView {
  const T* data;
  int64_t stride;

  explicit VectorView(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())), stride(tensor.stride(0)) {}
  IPRM_INLINE T operator[](int64_t row) const { return data[row * stride]; }
};

template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* output(const std::optional<Tensor>& tensor) {
  return tensor ? output<T>(*tensor) : nullptr;
}

// Rows as contiguous memory: a pointer if columns are adjacent, else a copy of the row, which is valid for the next `slots` rows.
template <class T>
class RowReader {
 public:
  RowReader(const MatrixView& view, int64_t columns, int64_t slots = 1)
      : data_(static_cast<const T*>(view.data)),
        row_stride_(view.row_stride),
        column_stride_(view.column_stride),
        columns_(columns),
        slots_(slots),
        copies_(view.column_stride == 1 ? 0 : columns * slots) {}

  IPRM_INLINE const T* operator()(int64_t row) {
    const T* from = data_ + row * row_stride_;
    if (copies_.empty()) return from;
    T* copy = copies_.data() + row % slots_ * columns_;
    for (int64_t i = 0; i < columns_; ++i) copy[i] = from[i * column_stride_];
    return copy;
  }

 private:
  const T* data_;
  int64_t row_stride_, column_stride_, columns_, slots_;
  std::vector<T> copies_;
};

template <class Work>
void dispatch_type(ScalarType dtype, const Work& work) {
  dispatch_type<BFloat16, Half>(dtype, work);
}

// The fewest elements per thread: a fork and join costs some 5 us, as much as 32,768 elements.
constexpr int64_t kElementsPerThread = 32768;
// A pair of logits costs as much as this many features: four exponentials and a polynomial.
constexpr int64_t kExpCost = 8;

// Outputs from this size on are written past the caches if their rows are aligned: the caches would hold only their last part.
constexpr int64_t kPastCaches = 32 << 20;

inline bool past_caches(const void* out, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kPastCaches && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// Requests pages of 2 MiB for an output that is about to be written for the first time: faults on 4 KiB pages took 39 of the 65 ms
// of a head step's backward pass at (8192, 1024, 31). Only a hint, and only from 8 MiB on, where it covers most of the output.
inline void prefer_huge_pages([[maybe_unused]] void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + bytes) / kPage * kPage;
  if (out != nullptr && bytes >= (8 << 20) && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The sum in double, in blocks of 256: accurate at any length, and bit-identical for any number of threads.
template <class S>
double ordered_sum(const S* values, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += 256) {
    double block = 0;
    for (int64_t i = begin; i < std::min(count, begin + 256); ++i) block += values[i];
    total += block;
  }
  return total;
}

template <class Work>
void parallel_rows(int64_t rows, int64_t columns, const Work& work) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, work);
}

}  // namespace iprm
