// The table of one instruction set's kernels.

#include "kernels.h"

#include "kernels_internal.h"

namespace fastsam {
namespace FASTSAM_ISA {

template <class S>
constexpr CpuKernels<S> table() {
  return {attention_forward<S>,        attention_backward<S>, separable_gates_forward<S>,
          separable_gates_backward<S>, lstm_gates_forward<S>, lstm_gates_backward<S>};
}

// A constant is local to its file unless it was declared extern.
extern const CpuKernels<float> kFloat32;
extern const CpuKernels<double> kFloat64;
extern const CpuKernels<bfloat16> kBfloat16;

const CpuKernels<float> kFloat32 = table<float>();
const CpuKernels<double> kFloat64 = table<double>();
const CpuKernels<bfloat16> kBfloat16 = table<bfloat16>();

}  // namespace FASTSAM_ISA
}  // namespace fastsam
