// Includes IPRM_ROWS, a file of row kernels, once per supported instruction set, each in its own namespace, so that a
// wheel runs on any machine and still uses its widest instructions. No include guard: each kernel family includes this file once.

#define IPRM_STRINGIZE_(x) #x
#define IPRM_STRINGIZE(x) IPRM_STRINGIZE_(x)

#define IPRM_REGISTER_BYTES 16
namespace iprm::baseline {
#include "simd.h"
#include IPRM_ROWS
}  // namespace iprm::baseline
#undef IPRM_REGISTER_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define IPRM_REGISTER_BYTES 32
namespace iprm::avx2 {
#include "simd.h"
#include IPRM_ROWS
}  // namespace iprm::avx2
#undef IPRM_REGISTER_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define IPRM_REGISTER_BYTES 64
namespace iprm::avx512 {
#include "simd.h"
#include IPRM_ROWS
}  // namespace iprm::avx512
#undef IPRM_REGISTER_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define IPRM_BEST(kernel) \
  (iprm::isa() == iprm::Isa::kAvx512 ? iprm::avx512::kernel : iprm::isa() == iprm::Isa::kAvx2 ? iprm::avx2::kernel : iprm::baseline::kernel)

#else

#define IPRM_BEST(kernel) (iprm::baseline::kernel)

#endif
