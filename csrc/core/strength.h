// The strength weights of modalities from their batch KL.
#pragma once

#include <cstdint>

#include "macros.h"

namespace iprm {

// w_m = r_m / sum r with r_m = min KL / KL_m, one where both are equal: modalities with zero KL share the weight equally, an
// infinite KL gets 0 (uniform weights if all are infinite), a NaN makes all weights NaN. Kl: any type with kl[m].
template <class Kl, class S>
IPRM_INLINE void strength_weights_of(const Kl& kl, int64_t count, S* strength) {
  S smallest = kl[0];
  for (int64_t m = 1; m < count; ++m) smallest = kl[m] < smallest || kl[m] != kl[m] ? kl[m] : smallest;
  S total = 0;
  for (int64_t m = 0; m < count; ++m) {
    strength[m] = kl[m] == smallest ? S(1) : smallest / kl[m];
    total += strength[m];
  }
  for (int64_t m = 0; m < count; ++m) strength[m] /= total;
}

}  // namespace iprm
