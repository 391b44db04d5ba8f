// The CPU kernels of one instruction set, as a table that bindings.cpp picks from at run time.
//
// Every file in this folder except this header is compiled once per instruction set, inside a namespace of its name
// (FASTSAM_ISA). These files instantiate no templates of the standard library: the linker keeps one copy of such an
// instance, which may hold instructions that an older processor lacks.
#pragma once

#include "fastsam/params.h"

namespace fastsam {

template <class T>
struct CpuKernels {
  void (*attention_forward)(const AttentionForward<T>&, int threads);
  void (*attention_backward)(const AttentionBackward<T>&, int threads);
  void (*separable_gates_forward)(const SeparableGatesForward<T>&, int threads);
  void (*separable_gates_backward)(const SeparableGatesBackward<T>&, int threads);
  void (*lstm_gates_forward)(const LstmGatesForward<T>&, int threads);
  void (*lstm_gates_backward)(const LstmGatesBackward<T>&, int threads);
};

#define FASTSAM_DECLARE_KERNELS(isa)        \
  namespace isa {                           \
  extern const CpuKernels<float> kFloat32;  \
  extern const CpuKernels<double> kFloat64; \
  }

FASTSAM_DECLARE_KERNELS(generic)
#ifdef FASTSAM_ISAS_X86
FASTSAM_DECLARE_KERNELS(avx2)
FASTSAM_DECLARE_KERNELS(avx512)
#endif

}  // namespace fastsam
