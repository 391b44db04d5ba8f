#include "fastsam/lstm_gates.cuh"

#include "fastsam/lstm_gates_backward.cuh"

namespace fastsam::cuda {
namespace {

const char* operator_of(Update update) {
  return update == Update::kLstm ? "lstm_gates " : update == Update::kMemory ? "memory_gates " : "norm_gate ";
}

// The operator and its shapes, for error messages.
template <class Call>
auto describe(const char* direction, const Call& call) {
  return [direction, &call] {
    return std::string(operator_of(call.update)) + direction + " (batch " + std::to_string(call.batch) + ", channels " +
           std::to_string(call.channels) + ", positions " + std::to_string(call.positions) + ")";
  };
}

}  // namespace

template <class S>
int64_t lstm_gates_forward_workspace(const LstmGatesForward<S>& call, const Launch& launch) {
  return described(describe("forward", call), launch, [&] { return lstm_forward_workspace(call, launch); });
}

template <class S>
void lstm_gates_forward(const LstmGatesForward<S>& call, void* workspace, const Launch& launch) {
  described(describe("forward", call), launch, [&] { lstm_forward(call, workspace, launch, DevicePlatform(launch)); });
}

template <class S>
int64_t lstm_gates_backward_workspace(const LstmGatesBackward<S>& call, const Launch& launch) {
  return described(describe("backward", call), launch, [&] { return lstm_backward_workspace(call, launch); });
}

template <class S>
void lstm_gates_backward(const LstmGatesBackward<S>& call, void* workspace, const Launch& launch) {
  described(describe("backward", call), launch,
            [&] { lstm_backward(call, workspace, launch, DevicePlatform(launch)); });
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
