// The entry points of one instruction set, defined in the file of each operator.
#pragma once

#include "fastsam/params.h"

namespace fastsam {
namespace FASTSAM_ISA {

template <class S>
void attention_forward(const AttentionForward<S>& call, int threads);
template <class S>
void attention_backward(const AttentionBackward<S>& call, int threads);
template <class S>
void separable_gates_forward(const SeparableGatesForward<S>& call, int threads);
template <class S>
void separable_gates_backward(const SeparableGatesBackward<S>& call, int threads);
template <class S>
void lstm_gates_forward(const LstmGatesForward<S>& call, int threads);
template <class S>
void lstm_gates_backward(const LstmGatesBackward<S>& call, int threads);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
