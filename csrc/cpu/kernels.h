// The CPU kernels of one instruction set, as a table that bindings.cpp picks from at run time.
//
// Every file in this folder except this header is compiled once per instruction set, inside a namespace of its name
// (FASTSAM_ISA). These files instantiate no templates of the standard library: the linker keeps one copy of such an
// instance, which may hold instructions that an older processor lacks.
#pragma once

#include "fastsam/params.h"

namespace fastsam {

template <class S>
struct CpuKernels {
  void (*attention_forward)(const AttentionForward<S>&, int threads);
  void (*attention_backward)(const AttentionBackward<S>&, int threads);
  void (*separable_gates_forward)(const SeparableGatesForward<S>&, int threads);
  void (*separable_gates_backward)(const SeparableGatesBackward<S>&, int threads);
  void (*lstm_gates_forward)(const LstmGatesForward<S>&, int threads);
  void (*lstm_gates_backward)(const LstmGatesBackward<S>&, int threads);
};

#define FASTSAM_DECLARE_KERNELS(isa)           \
  namespace isa {                              \
  extern const CpuKernels<float> kFloat32;     \
  extern const CpuKernels<double> kFloat64;    \
  extern const CpuKernels<bfloat16> kBfloat16; \
  }

FASTSAM_DECLARE_KERNELS(generic)
#ifdef FASTSAM_ISAS_X86
FASTSAM_DECLARE_KERNELS(avx2)
FASTSAM_DECLARE_KERNELS(avx512)
#endif

}  // namespace fastsam
