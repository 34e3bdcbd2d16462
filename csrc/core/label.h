// Labels of rows.
#pragma once

#include <cstdint>

#include "macros.h"

namespace iprm {

// The label of a row: the class `index`; or the row does not count; or the label is out of range, which makes loss and gradient
// NaN.
struct Label {
  int64_t index;
  bool counted, wrong;

  IPRM_INLINE Label(int64_t target, int64_t classes, int64_t ignore_index)
      : index(target), counted(target != ignore_index), wrong(counted && (target < 0 || target >= classes)) {}
};

}  // namespace iprm
