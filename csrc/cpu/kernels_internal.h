// The entry points of one instruction set, defined in the file of each operator.
#pragma once

#include "fastsam/params.h"

namespace fastsam {
namespace FASTSAM_ISA {

template <class T>
void attention_forward(const AttentionForward<T>& call, int threads);
template <class T>
void attention_backward(const AttentionBackward<T>& call, int threads);
template <class T>
void separable_gates_forward(const SeparableGatesForward<T>& call, int threads);
template <class T>
void separable_gates_backward(const SeparableGatesBackward<T>& call, int threads);
template <class T>
void lstm_gates_forward(const LstmGatesForward<T>& call, int threads);
template <class T>
void lstm_gates_backward(const LstmGatesBackward<T>& call, int threads);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
