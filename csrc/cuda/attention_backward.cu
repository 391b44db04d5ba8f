#include "fastsam/attention_backward_launch.cuh"

namespace fastsam::cuda {
namespace {

// launches(), with errors that name the operator and its shapes.
template <class S, class Launches>
auto with_description(const AttentionBackward<S>& call, const Launch& launch, const Launches& launches) {
  return described([&] { return describe_attention("backward", call); }, launch, launches);
}

}  // namespace

template <class S>
int64_t attention_backward_workspace(const AttentionBackward<S>& call, const Launch& launch) {
  return with_description(call, launch, [&] { return attention_backward_bytes(call, launch); });
}

template <class S>
void attention_backward(const AttentionBackward<S>& call, void* workspace, const Launch& launch) {
  with_description(call, launch, [&] { attention_backward_on(DevicePlatform(launch), call, workspace, launch); });
}

#define FASTSAM_INSTANTIATE(S)                                                               \
  template int64_t attention_backward_workspace(const AttentionBackward<S>&, const Launch&); \
  template void attention_backward(const AttentionBackward<S>&, void*, const Launch&);

FASTSAM_INSTANTIATE(float)
FASTSAM_INSTANTIATE(double)
FASTSAM_INSTANTIATE(float16)
FASTSAM_INSTANTIATE(bfloat16)

}  // namespace fastsam::cuda
