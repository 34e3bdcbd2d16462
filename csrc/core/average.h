// The moving average of measured strengths.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace iprm {

// b + alpha (a - b) from the nearer end, so that alpha = 0 and 1 give the ends exactly, as torch.lerp does.
template <class S>
IPRM_INLINE S lerp_of(S b, S a, S alpha) {
  const S apart = a - b;
  return alpha < S(0.5) ? std::fma(alpha, apart, b) : std::fma(alpha - S(1), apart, a);
}

// One pair: its measured strength (2), then its state. Values that are not finite are skipped.
template <class S>
IPRM_INLINE void average_strength_of(
    const S* strength, S alpha, bool released, S& weight, S& eval_weight, S* last, int64_t& steps) {
  if (released) eval_weight = weight;
  if (std::isfinite(strength[0])) {
    weight = steps == 0 && !released ? strength[0] : lerp_of(strength[0], weight, alpha);
    ++steps;
  }
  if (!released) eval_weight = weight;
  for (int side = 0; side < 2; ++side)
    if (std::isfinite(strength[side])) last[side] = strength[side];
}

}  // namespace iprm
