#include "fastsam/attention_launch.cuh"

namespace fastsam::cuda {

template <class S>
void attention_forward(const AttentionForward<S>& call, const Launch& launch) {
  const auto description = [&] { return describe_attention("forward", call); };
  described(description, launch, [&] { attention_forward_on(DevicePlatform(launch), call, launch); });
}

template void attention_forward(const AttentionForward<float>&, const Launch&);
template void attention_forward(const AttentionForward<double>&, const Launch&);
template void attention_forward(const AttentionForward<float16>&, const Launch&);
template void attention_forward(const AttentionForward<bfloat16>&, const Launch&);

}  // namespace fastsam::cuda
