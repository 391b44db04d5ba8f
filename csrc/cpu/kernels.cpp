// The table of one instruction set's kernels.

#include "kernels.h"

#include "kernels_internal.h"

namespace fastsam {
namespace FASTSAM_ISA {

template <class T>
constexpr CpuKernels<T> table() {
  return {attention_forward<T>,        attention_backward<T>, separable_gates_forward<T>,
          separable_gates_backward<T>, lstm_gates_forward<T>, lstm_gates_backward<T>};
}

// A constant is local to its file unless it was declared extern.
extern const CpuKernels<float> kFloat32;
extern const CpuKernels<double> kFloat64;

const CpuKernels<float> kFloat32 = table<float>();
const CpuKernels<double> kFloat64 = table<double>();

}  // namespace FASTSAM_ISA
}  // namespace fastsam
