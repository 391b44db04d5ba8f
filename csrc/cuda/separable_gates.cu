#include "fastsam/separable_gates_launch.cuh"

namespace fastsam::cuda {

template <class S>
void separable_gates_forward(const SeparableGatesForward<S>& call, const Launch& launch) {
  separable_gates_forward_on(DevicePlatform(launch), call, launch);
}

template <class S>
int64_t separable_gates_backward_workspace(const SeparableGatesBackward<S>& call, const Launch& launch) {
  return separable_gates_backward_bytes(call, launch);
}

template <class S>
void separable_gates_backward(const SeparableGatesBackward<S>& call, void* workspace, const Launch& launch) {
  separable_gates_backward_on(DevicePlatform(launch), call, workspace, launch);
}

#define FASTSAM_INSTANTIATE(S)                                                                             \
  template void separable_gates_forward<S>(const SeparableGatesForward<S>&, const Launch&);                \
  template int64_t separable_gates_backward_workspace<S>(const SeparableGatesBackward<S>&, const Launch&); \
  template void separable_gates_backward<S>(const SeparableGatesBackward<S>&, void*, const Launch&);

FASTSAM_INSTANTIATE(float)
FASTSAM_INSTANTIATE(double)
FASTSAM_INSTANTIATE(float16)
FASTSAM_INSTANTIATE(bfloat16)

}  // namespace fastsam::cuda
