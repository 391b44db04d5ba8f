// The CUDA operators as host functions, for callers that know nothing of CUDA. S is float, double, float16 or bfloat16.
//
// They only start kernels on the stream they are given: no synchronisation, no memory of their own, no change of the
// current device, which must be that of the stream. They throw std::runtime_error when CUDA refuses a launch. Where
// there is a function <operator>_workspace, the caller hands over that many bytes of device memory, 16-byte aligned,
// with any content; it may be freed or used again by later work on the same stream.
#pragma once

#include <cstdint>

#include "fastsam/params.h"

namespace fastsam::cuda {

// What products of float32 matrices are computed in; other types have one way each.
enum class Precision { kFloat32, kTf32 };

// Where a kernel runs.
struct Launch {
  int device;
  void* stream;         // a cudaStream_t
  int capability;       // of the code that runs, times ten, such as 86
  int multiprocessors;  // of the device
  int shared_bytes;     // that a block may have on the device, with opt-in
  Precision precision;
};

// Weights of the gates come in the type of the maps, and their gradients go out in it: kernels widen what they load.
template <class S>
using SeparableGatesForward = fastsam::SeparableGatesForward<S, S>;
template <class S>
using SeparableGatesBackward = fastsam::SeparableGatesBackward<S, S>;
template <class S>
using LstmTerm = fastsam::LstmTerm<S, S>;
template <class S>
using LstmTermGradients = fastsam::LstmTermGradients<S, S>;
template <class S>
using LstmGatesForward = fastsam::LstmGatesForward<S, S>;
template <class S>
using LstmGatesBackward = fastsam::LstmGatesBackward<S, S>;

// Up to 256 value channels. What does not fit into a block's shared memory throws, with contexts also what the backward
// pass does not find room for; 128 channels fit everywhere, in double 64 on 6.1 and 80 on 7.5.
template <class S>
void attention_forward(const AttentionForward<S>& call, const Launch& launch);

// The same and 1x1 gates in one launch.
template <class S>
void attention_gates_forward(const AttentionGatesForward<S>& call, const Launch& launch);

// Depends on sizes, S and the launch alone.
template <class S>
int64_t attention_backward_workspace(const AttentionBackward<S>& call, const Launch& launch);
template <class S>
void attention_backward(const AttentionBackward<S>& call, void* workspace, const Launch& launch);

template <class S>
int64_t lstm_gates_forward_workspace(const LstmGatesForward<S>& call, const Launch& launch);
template <class S>
void lstm_gates_forward(const LstmGatesForward<S>& call, void* workspace, const Launch& launch);

template <class S>
int64_t lstm_gates_backward_workspace(const LstmGatesBackward<S>& call, const Launch& launch);
template <class S>
void lstm_gates_backward(const LstmGatesBackward<S>& call, void* workspace, const Launch& launch);

// Kernel sizes up to 25 are served for every S, a few more for all but double; larger ones throw.
template <class S>
void separable_gates_forward(const SeparableGatesForward<S>& call, const Launch& launch);

// Depends on sizes, S and the launch alone: call.sizes is all that need be set.
template <class S>
int64_t separable_gates_backward_workspace(const SeparableGatesBackward<S>& call, const Launch& launch);
template <class S>
void separable_gates_backward(const SeparableGatesBackward<S>& call, void* workspace, const Launch& launch);

}  // namespace fastsam::cuda
