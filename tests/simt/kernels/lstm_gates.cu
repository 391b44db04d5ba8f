// The updates of the LSTM gates with the launches that they have on a device. Fields are the members of the call in
// their order, without the numbers.
#include "fastsam/lstm_gates.cuh"
#include "fastsam/lstm_gates_backward.cuh"
#include "fields.h"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

template <class Call>
void read_inputs(Fields& fields, Call& call) {
  fields.read(call.batch, call.channels, call.positions, call.weights_have_positions, call.update, call.form);
  for (auto& term : call.terms) fields.read(term.x, term.weight, term.bias);
  fields.read(call.c);
}

Launch on_card(int64_t multiprocessors) {
  return {0, nullptr, 86, static_cast<int>(multiprocessors), 99 * 1024, Precision::kFloat32};
}

template <class S>
const char* forward(const int64_t* address, double constant, double eps, void* workspace, int64_t bytes,
                    int64_t multiprocessors) {
  return simt::run([&] {
    Fields fields(address);
    LstmGatesForward<S> call = {};
    read_inputs(fields, call);
    call.constant = static_cast<Compute<S>>(constant);
    call.eps = static_cast<Compute<S>>(eps);
    fields.read(call.h, call.c_new, call.statistics[0], call.statistics[1]);
    check_workspace(bytes, lstm_forward_workspace(call, on_card(multiprocessors)));
    lstm_forward(call, workspace, on_card(multiprocessors), simt::Platform());
  });
}

template <class S>
const char* backward(const int64_t* address, double constant, void* workspace, int64_t bytes, int64_t multiprocessors) {
  return simt::run([&] {
    Fields fields(address);
    LstmGatesBackward<S> call = {};
    read_inputs(fields, call);
    call.constant = static_cast<Compute<S>>(constant);
    fields.read(call.dh, call.dc_new, call.statistics[0], call.statistics[1]);
    for (auto& gradients : call.gradients) fields.read(gradients.x, gradients.weight, gradients.bias);
    fields.read(call.dc);
    check_workspace(bytes, lstm_backward_workspace(call, on_card(multiprocessors)));
    lstm_backward(call, workspace, on_card(multiprocessors), simt::Platform());
  });
}

}  // namespace
}  // namespace fastsam::cuda

#define DEFINE(S, name)                                                                                      \
  extern "C" const char* forward_##name(const int64_t* fields, double constant, double eps, void* space,     \
                                        int64_t bytes, int64_t multiprocessors) {                            \
    return fastsam::cuda::forward<S>(fields, constant, eps, space, bytes, multiprocessors);                  \
  }                                                                                                          \
  extern "C" const char* backward_##name(const int64_t* fields, double constant, void* space, int64_t bytes, \
                                         int64_t multiprocessors) {                                          \
    return fastsam::cuda::backward<S>(fields, constant, space, bytes, multiprocessors);                      \
  }

DEFINE(float, float32)
#ifndef __CUDACC__  // csrc/cuda/lstm_gates.cu compiles the others for devices, which takes a while
DEFINE(double, float64)
DEFINE(fastsam::float16, float16)
DEFINE(fastsam::bfloat16, bfloat16)
#endif
