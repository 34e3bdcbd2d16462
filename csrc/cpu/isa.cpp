// Selects the instruction set: the widest that this machine has, or the one that IPRM_KERNELS_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "rows.h"

namespace iprm {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};  // in the order of Isa

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa chosen() {
  const Isa best = widest();
  const char* asked = std::getenv("IPRM_KERNELS_ISA");
  if (asked == nullptr || *asked == 0) return best;
  for (int set = 0; set <= int(best); ++set)
    if (std::string_view(asked) == kNames[set]) return Isa(set);
  throw std::runtime_error(
      std::string("IPRM_KERNELS_ISA: expected baseline, avx2 or avx512, at most ") + kNames[int(best)] + " on this machine, got " +
      asked);
}

}  // namespace

Isa isa() {
  static const Isa set = chosen();
  return set;
}

const char* isa_name() { return kNames[int(isa())]; }

}  // namespace iprm
