// Labels of rows.
#pragma once

#include <cstdint>

#include "macros.h"

namespace iprm {

// What a label asks of a row: to be `index`; or it does not count; or it is out of range, which makes loss and gradient NaN.
struct Label {
  int64_t index;
  bool counted, wrong;

  IPRM_INLINE Label(int64_t target, int64_t classes, int64_t ignore_index)
      : index(target), counted(target != ignore_index), wrong(counted && (target < 0 || target >= classes)) {}
};

}  // namespace iprm
