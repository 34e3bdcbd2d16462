// average_strength on the CPU.
#include "../core/average.h"
#include "rows.h"

namespace iprm {
namespace {

void average_strength(
    const Tensor& strength,
    double alpha,
    bool released,
    const Tensor& weight,
    const Tensor& eval_weight,
    const Tensor& last,
    const Tensor& steps) {
  const int64_t pairs = weight.numel(), both = product(2, pairs, "weight");
  const ScalarType dtype = wide_type(weight, "weight");
  Arguments arguments;
  arguments.reads_numbers(strength, "strength", both, dtype);
  arguments.writes_numbers(weight, "weight", pairs, dtype);
  arguments.writes_numbers(eval_weight, "eval_weight", pairs, dtype);
  arguments.writes_numbers(last, "last", both, dtype);
  arguments.writes_numbers(steps, "steps", pairs, ScalarType::Long);
  arguments.check_outputs();
  const auto run = [&]<class S>() {
    const S* measured = static_cast<const S*>(strength.const_data_ptr());
    for (int64_t pair = 0; pair < pairs; ++pair)
      average_strength_of(
          measured + 2 * pair, S(alpha), released, output<S>(weight)[pair], output<S>(eval_weight)[pair],
          output<S>(last) + 2 * pair, output<int64_t>(steps)[pair]);
  };
  if (dtype == ScalarType::Float) run.template operator()<float>();
  else run.template operator()<double>();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iprm_cpp, CPU, m) { m.impl("average_strength", TORCH_BOX(&average_strength)); }

}  // namespace iprm
