// Functions that compile for the host and, under nvcc, for the device.
#pragma once

#if defined(__CUDACC__)
#define IPRM_INLINE __host__ __device__ __forceinline__
#else
// always inline, so that a row kernel compiled for AVX-512 never calls code compiled for a narrower instruction set
#define IPRM_INLINE inline __attribute__((always_inline))
#endif

// for loops over a register tile: the compilers keep the sums in registers only if the loop is fully unrolled
#if defined(__CUDACC__)
#define IPRM_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define IPRM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define IPRM_UNROLL _Pragma("GCC unroll 8")
#endif
