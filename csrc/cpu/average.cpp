// average_strength on the CPU.
#include "../core/average.h"
#include "rows.h"

namespace iprm {
namespace {

void check_state(const Tensor& tensor, const char* name, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == count && tensor.scalar_type() == dtype,
      name, ": expected ", count, " contiguous numbers of type ", int(dtype), " on the CPU");
}

void average_strength(
    const Tensor& strength,
    double alpha,
    bool released,
    const Tensor& weight,
    const Tensor& eval_weight,
    const Tensor& last,
    const Tensor& steps) {
  const int64_t pairs = weight.numel();
  const ScalarType dtype = weight.scalar_type();
  check_state(strength, "strength", 2 * pairs, dtype);
  check_state(weight, "weight", pairs, dtype);
  check_state(eval_weight, "eval_weight", pairs, dtype);
  check_state(last, "last", 2 * pairs, dtype);
  check_state(steps, "steps", pairs, ScalarType::Long);
  const auto run = [&]<class S>() {
    const S* measured = static_cast<const S*>(strength.const_data_ptr());
    for (int64_t pair = 0; pair < pairs; ++pair)
      average_strength_of(
          measured + 2 * pair, S(alpha), released, output<S>(weight)[pair], output<S>(eval_weight)[pair],
          output<S>(last) + 2 * pair, output<int64_t>(steps)[pair]);
  };
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "weight: expected float32 or float64");
  if (dtype == ScalarType::Float) run.template operator()<float>();
  else run.template operator()<double>();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) { m.impl("average_strength", TORCH_BOX(&average_strength)); }

}  // namespace iprm
