// Functions that compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define IPRM_INLINE __host__ __device__ __forceinline__
#else
// always, so that a row kernel compiled for AVX-512 never calls into code compiled for less
#define IPRM_INLINE inline __attribute__((always_inline))
#endif

// before a loop over a register tile: the compilers keep its sums in registers only when it is gone
#if defined(__CUDACC__)
#define IPRM_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define IPRM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define IPRM_UNROLL _Pragma("GCC unroll 8")
#endif
