// The Python module: the schemas of the kernels, which each device's sources implement, and the build information.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "build_settings.h"
#include "core/macros.h"
#include "host/head_step.h"

namespace iprm {
const char* isa_name();

namespace exported {
#include "core/divergence.h"
#include "core/slerp.h"
}  // namespace exported
}  // namespace iprm

// The calling convention of iprm_kernels/convention.py with its named tuples unpacked: inputs, then outputs that the caller has
// allocated.
STABLE_TORCH_LIBRARY(iprm_cpp, m) {
  m.def("normalize(Tensor x, float eps, Tensor(a!) out, Tensor(b!) norm) -> ()");
  m.def("normalize_backward(Tensor grad, Tensor x, Tensor norm, float eps, Tensor(a!) grad_x) -> ()");
  m.def("geodesic_mixup(Tensor x, Tensor y, Tensor weight, float eps, Tensor(a!) z, Tensor(b!) stats) -> ()");
  m.def(
      "geodesic_mixup_backward(Tensor grad, Tensor x, Tensor y, Tensor weight, Tensor stats, float eps, "
      "Tensor(a!)? grad_x, Tensor(b!)? grad_y, Tensor(c!)? grad_w) -> ()");
  m.def("geodesic_remix(Tensor x, Tensor y, Tensor weight, Tensor stats, float eps, Tensor(a!) z) -> ()");
  m.def("batch_kl(Tensor p_logits, Tensor q_logits, int reduction, Tensor(a!) value, Tensor(b!) stats) -> ()");
  m.def(
      "batch_kl_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor stats, int reduction, "
      "Tensor(a!)? grad_p, Tensor(b!)? grad_q) -> ()");
  m.def("batch_kl_pair(Tensor p_logits, Tensor other_logits, Tensor q_logits, Tensor(a!) kl) -> ()");
  m.def("strength_weights(Tensor kl, Tensor(a!) strength) -> ()");
  m.def("strength_weights_backward(Tensor grad, Tensor kl, Tensor(a!) grad_kl) -> ()");
  m.def(
      "average_strength(Tensor strength, float alpha, bool released, Tensor(a!) weight, Tensor(b!) eval_weight, "
      "Tensor(c!) last, Tensor(d!) steps) -> ()");
  m.def(
      "head_forward(Tensor[] features, Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, Tensor probe_weight, "
      "float label_smoothing, int ignore_index, int parts, Tensor(a!) state, Tensor(b!)[] logits, Tensor(c!) kl, "
      "Tensor(d!) strength, Tensor(e!) loss, Tensor(f!) losses) -> ()");
  m.def(
      "head_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor?[] grad_logits, Tensor[] features, Tensor[] weights, "
      "Tensor?[] biases, int[] pairs, Tensor target, Tensor state, Tensor[] unimodal, Tensor strength, "
      "float label_smoothing, int ignore_index, Tensor(a!)?[] grad_features, Tensor(b!)?[] grad_weights, "
      "Tensor(c!)?[] grad_biases) -> ()");
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ kernels of iprm_kernels, registered as torch operators of namespace iprm_cpp.";
  module.def(
      "constants",
      [] {
        using namespace iprm::exported;
        pybind11::dict found;
        found["EPS"] = kEps;
        found["ANTIPODE_MARGIN"] = pybind11::make_tuple(SlerpLimits<float>::kAntipodeMargin, SlerpLimits<double>::kAntipodeMargin);
        found["NEAR_ANTIPODE"] = kNearAntipode<double>;
        found["SERIES_BELOW"] = kSeriesBelow<double>;
        found["SERIES_TERMS"] = pybind11::make_tuple(SlerpLimits<float>::kSeriesTerms, SlerpLimits<double>::kSeriesTerms);
        found["EXCESS_SERIES_BELOW"] = kExcessSeriesBelow;
        found["EXCESS_SERIES_TERMS"] = pybind11::make_tuple(kExcessSeriesTerms<float>, kExcessSeriesTerms<double>);
        found["PROBE"] = iprm::kProbe;
        found["REBALANCE"] = iprm::kRebalance;
        return found;
      },
      "The constants shared with iprm_kernels/convention.py; type-dependent ones are (float32, float64).");
  module.def(
      "head_layout",
      [](int64_t rows, int64_t classes, int64_t modalities, int64_t pairs, bool narrow) {
        const iprm::HeadLayout at(rows, classes, modalities, pairs, narrow);
        return pybind11::make_tuple(at.projected, at.unimodal, at.counted, at.step);
      },
      "HeadState.offsets of iprm_kernels/convention.py.");
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["extension"] = IPRM_EXTENSION;
        info["compiler"] = __VERSION__;
        info["flags"] = IPRM_FLAGS;
        info["cuda"] = IPRM_CUDA_VERSION;
        info["cuda_architectures"] = IPRM_CUDA_ARCHITECTURES;
        info["torch"] = TORCH_VERSION;
        info["torch_abi_floor"] = IPRM_TORCH_FLOOR;
        info["instruction_set"] = iprm::isa_name();
        return info;
      },
      "Compiler, flags, CUDA version and architectures, and the torch version of the build; the instruction set in use.");
}
