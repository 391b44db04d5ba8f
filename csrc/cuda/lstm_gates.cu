#include "fastsam/lstm_gates.cuh"

#include "fastsam/lstm_gates_backward.cuh"

namespace fastsam::cuda {
namespace {

// The operator and its shapes, for error messages.
template <class Call>
auto describe(const char* name, const Call& call) {
  return [name, &call] {
    return std::string(name) + ": batch " + std::to_string(call.batch) + ", " + std::to_string(call.channels) +
           " channels, " + std::to_string(call.positions) + " positions";
  };
}

}  // namespace

template <class S>
int64_t lstm_gates_forward_workspace(const LstmGatesForward<S>& call, const Launch& launch) {
  return lstm_forward_workspace(call, launch);
}

template <class S>
void lstm_gates_forward(const LstmGatesForward<S>& call, void* workspace, const Launch& launch) {
  const auto description = describe("lstm_gates", call);
  lstm_forward(call, workspace, launch, DevicePlatform(launch, description));
}

template <class S>
int64_t lstm_gates_backward_workspace(const LstmGatesBackward<S>& call, const Launch& launch) {
  return lstm_backward_workspace(call, launch);
}

template <class S>
void lstm_gates_backward(const LstmGatesBackward<S>& call, void* workspace, const Launch& launch) {
  const auto description = describe("lstm_gates backward", call);
  lstm_backward(call, workspace, launch, DevicePlatform(launch, description));
}

#define FASTSAM_INSTANTIATE(S)                                                                \
  template int64_t lstm_gates_forward_workspace(const LstmGatesForward<S>&, const Launch&);   \
  template void lstm_gates_forward(const LstmGatesForward<S>&, void*, const Launch&);         \
  template int64_t lstm_gates_backward_workspace(const LstmGatesBackward<S>&, const Launch&); \
  template void lstm_gates_backward(const LstmGatesBackward<S>&, void*, const Launch&);

FASTSAM_INSTANTIATE(float)
FASTSAM_INSTANTIATE(double)
FASTSAM_INSTANTIATE(float16)
FASTSAM_INSTANTIATE(bfloat16)

}  // namespace fastsam::cuda
