// separable_gates with the launches that it has on a device. Fields are the members of the call in their order, as
// fastsam/ops/separable_gates/native.py gives them.
#include "fastsam/separable_gates_launch.cuh"
#include "fields.h"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

// Whether kernels are told that everything is aligned, which the harness has to report where it is not.
bool all_taken_for_aligned = false;

template <class E>
E told(const E& argument) {
  return argument;
}
template <class S>
GateInputs<S> told(const GateInputs<S>& in) {
  GateInputs<S> changed = in;
  if (all_taken_for_aligned) changed.aligned = {true, true, true};
  return changed;
}

class GatePlatform : public simt::Platform {
 public:
  template <class... Parameters, class... Arguments>
  void start(const char* name, const LaunchShape& shape, void (*kernel)(Parameters...),
             const Arguments&... arguments) const {
    simt::Platform::start(name, shape, kernel, told(arguments)...);
  }
};

// Writes down how kernels would be launched, and launches none.
class Ledger {
 public:
  explicit Ledger(int64_t*& next) : next_(next) {}

  template <class T>
  Global<const T> input(const T*, int64_t, const char*) const {
    return nullptr;
  }

  template <class T>
  Global<T> output(T*, int64_t, const char*) const {
    return nullptr;
  }

  template <class... Parameters, class... Arguments>
  void start(const char*, const LaunchShape& shape, void (*)(Parameters...), const Arguments&... arguments) const {
    *next_++ = shape.grid.x;
    *next_++ = shape.shared_bytes;
    (note(arguments), ...);
  }

 private:
  void note(const GateChannels& channels) const { *next_++ = channels.warps; }

  template <class E>
  void note(const E&) const {}

  int64_t*& next_;
};

Launch on_card(int64_t capability, int64_t multiprocessors, int64_t is_tf32) {
  return {0,
          nullptr,
          static_cast<int>(capability),
          static_cast<int>(multiprocessors),
          static_cast<int>(kGateSharedBytes),
          is_tf32 != 0 ? Precision::kTf32 : Precision::kFloat32};
}

template <class Call>
void read_inputs(Fields& fields, Call& call) {
  GateSizes& sizes = call.sizes;
  fields.read(sizes.batch, sizes.channels, sizes.z_channels, sizes.height, sizes.width, sizes.kernel_size);
  fields.read(call.z, call.h, call.m, call.depthwise, call.pointwise, call.bias);
}

template <class S>
const char* forward(const int64_t* address, const Launch& launch) {
  return simt::run([&] {
    Fields fields(address);
    SeparableGatesForward<S> call = {};
    read_inputs(fields, call);
    fields.read(call.h_hat, call.m_new);
    separable_gates_forward_on(GatePlatform(), call, launch);
  });
}

template <class S>
const char* backward(const int64_t* address, void* workspace, int64_t bytes, const Launch& launch) {
  return simt::run([&] {
    Fields fields(address);
    SeparableGatesBackward<S> call = {};
    read_inputs(fields, call);
    fields.read(call.dh_hat, call.dm_new, call.dz, call.dh, call.dm, call.ddepthwise, call.dpointwise, call.dbias);
    check_workspace(bytes, separable_gates_backward_bytes(call, launch));
    separable_gates_backward_on(GatePlatform(), call, workspace, launch);
  });
}

// How many terms of a sum an instruction of the product adds.
template <class Product>
constexpr int kDepthAtOnce = Product::M::kK;
template <class T, int Columns>
constexpr int kDepthAtOnce<FmaProduct<T, Columns>> = 1;

// How a call of these sizes, with a bias, is launched: the bytes of the workspace; those of an operand of the product
// and how many terms it adds at once; of the forward launch and then of the three backward ones the blocks and shared
// bytes, and of the last how many warps of a channel's block have windows.
template <class S>
const char* plan(const int64_t* sizes, int64_t* to, const Launch& launch) {
  return simt::run([&] {
    SeparableGatesForward<S> forward = {};
    Fields fields(sizes);
    read_inputs(fields, forward);
    SeparableGatesBackward<S> backward = {};
    backward.sizes = forward.sizes;
    S bias = {};
    backward.dbias = &bias;
    *to++ = separable_gates_backward_bytes(backward, launch);
    with_gate_product<S>(launch, [&](auto product) {
      *to++ = sizeof(typename decltype(product)::Operand);
      *to++ = kDepthAtOnce<decltype(product)>;
    });
    separable_gates_forward_on(Ledger(to), forward, launch);
    separable_gates_backward_on(Ledger(to), backward, nullptr, launch);
  });
}

}  // namespace
}  // namespace fastsam::cuda

extern "C" const char* take_all_for_aligned(int64_t yes) {
  fastsam::cuda::all_taken_for_aligned = yes != 0;
  return nullptr;
}

#define DEFINE(S, name)                                                                                               \
  extern "C" const char* forward_##name(const int64_t* fields, int64_t capability, int64_t multiprocessors,           \
                                        int64_t is_tf32) {                                                            \
    return fastsam::cuda::forward<S>(fields, fastsam::cuda::on_card(capability, multiprocessors, is_tf32));           \
  }                                                                                                                   \
  extern "C" const char* backward_##name(const int64_t* fields, void* workspace, int64_t bytes, int64_t capability,   \
                                         int64_t multiprocessors, int64_t is_tf32) {                                  \
    return fastsam::cuda::backward<S>(fields, workspace, bytes,                                                       \
                                      fastsam::cuda::on_card(capability, multiprocessors, is_tf32));                  \
  }                                                                                                                   \
  extern "C" const char* plan_##name(const int64_t* fields, int64_t* to, int64_t capability, int64_t multiprocessors, \
                                     int64_t is_tf32) {                                                               \
    return fastsam::cuda::plan<S>(fields, to, fastsam::cuda::on_card(capability, multiprocessors, is_tf32));          \
  }

DEFINE(float, float32)
#ifndef __CUDACC__  // csrc/cuda/separable_gates.cu compiles the others for devices, which takes a while
DEFINE(double, float64)
DEFINE(fastsam::float16, float16)
DEFINE(fastsam::bfloat16, bfloat16)
#endif
