#include "fastsam/attention_launch.cuh"

namespace fastsam::cuda {

template <class S>
void attention_gates_forward(const AttentionGatesForward<S>& call, const Launch& launch) {
  const auto description = [&] { return describe_attention("and gates forward", call.attention); };
  described(description, launch, [&] { attention_gates_forward_on(DevicePlatform(launch), call, launch); });
}

template void attention_gates_forward(const AttentionGatesForward<float>&, const Launch&);
template void attention_gates_forward(const AttentionGatesForward<double>&, const Launch&);
template void attention_gates_forward(const AttentionGatesForward<float16>&, const Launch&);
template void attention_gates_forward(const AttentionGatesForward<bfloat16>&, const Launch&);

}  // namespace fastsam::cuda
