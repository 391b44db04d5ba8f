// The LSTM gates with the launches that they have on a device. Fields are the members of the call in their order, as
// fastsam/ops/lstm_gates/native.py gives them.
#include "fastsam/lstm_gates.cuh"
#include "fastsam/lstm_gates_backward.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

class Fields {
 public:
  explicit Fields(const int64_t* fields) : next_(fields) {}

  int64_t number() { return *next_++; }

  template <class T>
  T* address() {
    return reinterpret_cast<T*>(number());
  }

  template <class T>
  Map<const T> map() {
    T* const data = address<T>();
    const int64_t stride_batch = number();
    return {data, stride_batch, number()};
  }

  template <class S, class Call>
  void inputs(Call& call) {
    call.batch = number();
    call.channels = number();
    call.positions = number();
    call.weights_have_positions = number();
    for (LstmTerm<S>& term : call.terms) {
      term.x = map<S>();
      term.weight = address<Compute<S>>();
      term.bias = address<Compute<S>>();
    }
    call.c = map<S>();
  }

 private:
  const int64_t* next_;
};

Launch on_card(int64_t multiprocessors) {
  return {0, nullptr, 86, static_cast<int>(multiprocessors), 99 * 1024, Precision::kFloat32};
}

void check_workspace(int64_t given, int64_t needed) {
  if (given < needed) {
    throw std::runtime_error("a workspace of " + std::to_string(given) + " bytes, needed are " +
                             std::to_string(needed));
  }
}

template <class S>
const char* forward(const int64_t* address, double forget_bias, double eps, void* workspace, int64_t bytes,
                    int64_t multiprocessors) {
  return simt::run([&] {
    Fields fields(address);
    LstmGatesForward<S> call = {};
    fields.inputs<S>(call);
    call.forget_bias = static_cast<Compute<S>>(forget_bias);
    call.eps = static_cast<Compute<S>>(eps);
    call.h = fields.address<S>();
    call.c_new = fields.address<S>();
    for (auto& statistics : call.statistics) statistics = fields.address<Compute<S>>();
    check_workspace(bytes, lstm_forward_workspace(call, on_card(multiprocessors)));
    lstm_forward(call, workspace, on_card(multiprocessors), simt::Platform());
  });
}

template <class S>
const char* backward(const int64_t* address, double forget_bias, void* workspace, int64_t bytes,
                     int64_t multiprocessors) {
  return simt::run([&] {
    Fields fields(address);
    LstmGatesBackward<S> call = {};
    fields.inputs<S>(call);
    call.forget_bias = static_cast<Compute<S>>(forget_bias);
    call.dh = fields.map<S>();
    call.dc_new = fields.map<S>();
    for (auto& statistics : call.statistics) statistics = fields.address<const Compute<S>>();
    for (LstmTermGradients<S>& gradients : call.gradients) {
      gradients = {fields.address<S>(), fields.address<Compute<S>>(), fields.address<Compute<S>>()};
    }
    call.dc = fields.address<S>();
    check_workspace(bytes, lstm_backward_workspace(call, on_card(multiprocessors)));
    lstm_backward(call, workspace, on_card(multiprocessors), simt::Platform());
  });
}

}  // namespace
}  // namespace fastsam::cuda

#define DEFINE(S, name)                                                                                         \
  extern "C" const char* forward_##name(const int64_t* fields, double forget_bias, double eps, void* space,     \
                                        int64_t bytes, int64_t multiprocessors) {                               \
    return fastsam::cuda::forward<S>(fields, forget_bias, eps, space, bytes, multiprocessors);                  \
  }                                                                                                             \
  extern "C" const char* backward_##name(const int64_t* fields, double forget_bias, void* space, int64_t bytes, \
                                         int64_t multiprocessors) {                                             \
    return fastsam::cuda::backward<S>(fields, forget_bias, space, bytes, multiprocessors);                      \
  }

DEFINE(float, float32)
#ifndef __CUDACC__  // csrc/cuda/lstm_gates.cu compiles the others for devices, which takes a while
DEFINE(double, float64)
DEFINE(fastsam::float16, float16)
DEFINE(fastsam::bfloat16, bfloat16)
#endif
