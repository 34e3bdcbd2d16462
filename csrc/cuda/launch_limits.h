// What a launch must know about the device. CUDA is asked once per device, kernel and size: three questions take some microseconds.
// The includer provides the functions of CUDA and STD_TORCH_CHECK, so that tests can compile this without either.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

namespace iprm::device {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "device attribute");
  return value;
}

// The blocks of `kernel` with `shared` bytes of dynamic shared memory that run at once on the current device; zero if not even one
// does. Kernels are allowed all the shared memory of a block, since a later launch may need more than this one.
inline int64_t resident_blocks(const void* kernel, int threads, int64_t shared, int device) {
  static std::mutex guard;
  static std::map<std::tuple<const void*, int, int64_t>, int64_t> known;
  const std::lock_guard<std::mutex> lock(guard);
  const std::tuple key(kernel, device, shared);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  int resident = 0;
  if (shared <= most) {
    if (shared > 48 * 1024)  // more must be requested
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, size_t(shared)), "occupancy");
  }
  return known[key] = int64_t(resident) * attribute(cudaDevAttrMultiProcessorCount, device);
}

}  // namespace iprm::device
