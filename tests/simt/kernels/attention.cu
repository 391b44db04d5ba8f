// The attention operators with the launches that they have on a device. Fields are the members of the call in their
// order, as fastsam/ops/_attention/native.py gives them.
#include "fastsam/attention_backward_launch.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

class Fields {
 public:
  explicit Fields(const int64_t* fields) : next_(fields) {}

  int64_t number() { return *next_++; }

  template <class T>
  void read(T*& address) {
    address = reinterpret_cast<T*>(number());
  }

  template <class T>
  void read(Map<T>& map) {
    read(map.data);
    map.stride_batch = number();
    map.stride_channel = number();
  }

  template <class Call>
  void inputs(Call& call) {
    call.sizes = {number(), number(), number(), number(), {number(), number(), number()}};
    call.source_count = static_cast<int>(number());
    for (int s = 0; s < call.source_count; ++s) {
      auto& source = call.sources[s];
      read(source.x);
      source.query_channels = number();
      read(source.score);
      read(source.score_bias);
      read(source.value);
      read(source.key);
    }
  }

  template <class Call>
  void contexts(Call& call) {
    for (int s = 0; s < call.source_count; ++s) read(call.r[s]);
    for (int s = 0; s < call.source_count; ++s) read(call.lse[s]);
    for (int s = 0; s < call.source_count; ++s) read(call.shift[s]);
  }

 private:
  const int64_t* next_;
};

// Shared memory that a block may have on cards of a capability, times ten.
int shared_bytes_of(int64_t capability) {
  const bool is_large = capability >= 90 && capability <= 110;
  return 1024 * (capability < 70    ? 48
                 : capability < 75  ? 96
                 : capability < 80  ? 64
                 : capability == 80 ? 163
                 : is_large         ? 227
                                    : 99);
}

Launch on_card(int64_t capability, int64_t multiprocessors, int64_t is_tf32) {
  return {0,
          nullptr,
          static_cast<int>(capability),
          static_cast<int>(multiprocessors),
          shared_bytes_of(capability),
          is_tf32 != 0 ? Precision::kTf32 : Precision::kFloat32};
}

// most_shared_bytes: that a block gets, whatever the launch is planned for.
template <class S>
const char* forward(const int64_t* address, const Launch& launch, int64_t most_shared_bytes) {
  return simt::run([&] {
    Fields fields(address);
    AttentionForward<S> call = {};
    fields.inputs(call);
    fields.read(call.value_bias);
    fields.read(call.z);
    fields.contexts(call);
    attention_forward_on(simt::Platform(most_shared_bytes), call, launch);
  });
}

template <class S>
const char* gates(const int64_t* address, const Launch& launch) {
  return simt::run([&] {
    Fields fields(address);
    AttentionGatesForward<S> call = {};
    fields.inputs(call.attention);
    fields.read(call.attention.value_bias);
    fields.read(call.attention.z);
    fields.contexts(call.attention);
    fields.read(call.m);
    fields.read(call.pointwise);
    fields.read(call.bias);
    fields.read(call.h_hat);
    fields.read(call.m_new);
    attention_gates_forward_on(simt::Platform(launch.shared_bytes), call, launch);
  });
}

template <class S>
const char* backward(const int64_t* address, void* workspace, int64_t bytes, const Launch& launch) {
  return simt::run([&] {
    Fields fields(address);
    AttentionBackward<S> call = {};
    fields.inputs(call);
    fields.read(call.dz);
    fields.contexts(call);
    for (int s = 0; s < call.source_count; ++s) {
      AttentionGradients<S>& out = call.gradients[s];
      fields.read(out.x);
      fields.read(out.score);
      fields.read(out.score_bias);
      fields.read(out.value);
      fields.read(out.key);
    }
    fields.read(call.dvalue_bias);
    const int64_t needed = attention_backward_bytes(call, launch);
    if (bytes < needed) {
      throw std::runtime_error("a workspace of " + std::to_string(bytes) + " bytes, needed are " +
                               std::to_string(needed));
    }
    attention_backward_on(simt::Platform(launch.shared_bytes), call, workspace, launch);
  });
}

// Launches of a call whose addresses are not used, but for those of the key maps and of the contexts, which are nullptr
// or not; `has_gates` is 1 with gates, else 0. plan: blocks and shared bytes of each launch; then tiles in shared
// memory at a time, rows of a block, and what is made or there in parts: query channels of the keys that are made at a
// time, 0 where all are; backward 1 where the rows' operands take turns, else 0.
template <class S>
const char* plan_forward(const int64_t* address, int64_t has_gates, int64_t* plan, const Launch& launch) {
  return simt::run([&] {
    Fields fields(address);
    AttentionForward<S> call = {};
    fields.inputs(call);
    fields.contexts(call);
    const auto description = [&] { return describe_attention("forward", call); };
    described(description, launch, [&] {
      with_forward_plan(call, has_gates != 0, launch, [&](auto, const auto& chosen) {
        using Plan = std::decay_t<decltype(chosen)>;
        const bool all_keys = chosen.stages.keys == std::numeric_limits<int>::max();
        for (const int64_t value :
             {chosen.blocks, chosen.shared_bytes + Plan::kStaticBytes, int64_t{chosen.stages.tiles},
              int64_t{Plan::Shape::kRows}, int64_t{all_keys ? 0 : chosen.stages.keys}})
          *plan++ = value;
      });
    });
  });
}

// The same, and then the bytes of the workspace.
template <class S>
const char* plan_backward(const int64_t* address, int64_t* plan, const Launch& launch) {
  return simt::run([&] {
    AttentionBackward<S> call = {};
    Fields(address).inputs(call);
    const auto description = [&] { return describe_attention("backward", call); };
    described(description, launch, [&] {
      with_backward_plan<S>(call, launch, [&](auto, const auto& chosen) {
        using Plan = std::decay_t<decltype(chosen)>;
        const int64_t sources = call.source_count;
        for (const int64_t value :
             {chosen.prepare_blocks * sources, chosen.prepare_bytes, 2 * chosen.attend_blocks * sources,
              chosen.attend_bytes, chosen.attend_blocks, chosen.finish_bytes + Plan::kStaticBytes,
              int64_t{chosen.stages.tiles}, int64_t{Plan::Shape::kRows}, int64_t{chosen.stages.rows_take_turns}})
          *plan++ = value;
      });
      *plan = attention_backward_bytes(call, launch);
    });
  });
}

}  // namespace
}  // namespace fastsam::cuda

#define DEFINE(S, name)                                                                                             \
  extern "C" const char* forward_##name(const int64_t* fields, int64_t capability, int64_t multiprocessors,         \
                                        int64_t is_tf32) {                                                          \
    const auto card = fastsam::cuda::on_card(capability, multiprocessors, is_tf32);                                 \
    return fastsam::cuda::forward<S>(fields, card, card.shared_bytes);                                              \
  }                                                                                                                 \
  extern "C" const char* plan_forward_##name(const int64_t* fields, int64_t has_gates, int64_t* plan,               \
                                             int64_t capability, int64_t multiprocessors, int64_t is_tf32) {        \
    return fastsam::cuda::plan_forward<S>(fields, has_gates, plan,                                                  \
                                          fastsam::cuda::on_card(capability, multiprocessors, is_tf32));            \
  }                                                                                                                 \
  extern "C" const char* plan_backward_##name(const int64_t* fields, int64_t* plan, int64_t capability,             \
                                              int64_t multiprocessors, int64_t is_tf32) {                           \
    return fastsam::cuda::plan_backward<S>(fields, plan,                                                            \
                                           fastsam::cuda::on_card(capability, multiprocessors, is_tf32));           \
  }                                                                                                                 \
  extern "C" const char* gates_##name(const int64_t* fields, int64_t capability, int64_t multiprocessors,           \
                                      int64_t is_tf32) {                                                            \
    return fastsam::cuda::gates<S>(fields, fastsam::cuda::on_card(capability, multiprocessors, is_tf32));           \
  }                                                                                                                 \
  extern "C" const char* backward_##name(const int64_t* fields, void* workspace, int64_t bytes, int64_t capability, \
                                         int64_t multiprocessors, int64_t is_tf32) {                                \
    return fastsam::cuda::backward<S>(fields, workspace, bytes,                                                     \
                                      fastsam::cuda::on_card(capability, multiprocessors, is_tf32));                \
  }

extern "C" const char* forward_within_float32(const int64_t* fields, int64_t most_shared_bytes, int64_t capability,
                                              int64_t multiprocessors, int64_t is_tf32) {
  return fastsam::cuda::forward<float>(fields, fastsam::cuda::on_card(capability, multiprocessors, is_tf32),
                                       most_shared_bytes);
}

DEFINE(float, float32)
#ifndef __CUDACC__  // csrc/cuda/attention_*.cu compile the others for devices, which takes a while
DEFINE(double, float64)
DEFINE(fastsam::float16, float16)
DEFINE(fastsam::bfloat16, bfloat16)
#endif
