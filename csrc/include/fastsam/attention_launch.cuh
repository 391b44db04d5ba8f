// The host's part of the attention operators: their arguments as kernels see them, and the forward launches.
#pragma once

#include "fastsam/attention_plan.cuh"

namespace fastsam::cuda {

inline WindowGrid window_grid(const AttentionSizes& sizes) {
  const Windows& of = sizes.windows;
  if (of.across == 0) return {1, 1, 1, sizes.positions, 0};
  return {of.across, of.down, sizes.positions / of.width, of.width, of.across * of.width};
}

// Positions of a whole map, and the strides of a contiguous one.
inline int64_t map_positions(const AttentionSizes& sizes) {
  const WindowGrid grid = window_grid(sizes);
  return sizes.positions * grid.across * grid.down;
}

template <class E>
ColumnMap<E> contiguous_map(Global<E> data, int64_t channels, const AttentionSizes& sizes) {
  return {data, channels * map_positions(sizes), map_positions(sizes)};
}

// How a platform sees the maps of a call.
template <class S, class Platform>
ColumnMap<const DeviceType<S>> column_map(const Platform& platform, const Map<const S>& map, int64_t channels,
                                          const AttentionSizes& sizes, const char* name) {
  const WindowGrid grid = window_grid(sizes);
  const int64_t samples = sizes.batch / (grid.across * grid.down), all = map_positions(sizes);
  const int64_t count = (samples - 1) * map.stride_batch + (channels - 1) * map.stride_channel + all;
  return {platform.input(on_device(map.data), count, name), map.stride_batch, map.stride_channel};
}

template <class S>
bool has_vectors(const Map<const S>& map, const AttentionSizes& sizes) {
  constexpr int64_t kVector = 16 / sizeof(S);
  return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.stride_batch % kVector == 0 &&
         map.stride_channel % kVector == 0 && window_grid(sizes).width % kVector == 0;
}

inline const char* numbered(int s, const char* first, const char* second) { return s == 0 ? first : second; }

template <class S, class Platform>
SourceView<DeviceType<S>> source_view(const Platform& platform, const AttentionSource<S>& source,
                                      const AttentionSizes& sizes, int s) {
  const int64_t d = source.query_channels, channels = sizes.channels;
  return {column_map<S>(platform, source.x, channels, sizes, numbered(s, "h", "m")),
          static_cast<int>(d),
          platform.input(source.score, d * channels, "score"),
          platform.input(source.score_bias, d, "score_bias"),
          platform.input(source.value, sizes.value_channels * channels, "value"),
          platform.input(source.key, d * channels, "key")};
}

// The operator and its shapes, for error messages. What a block has in shared memory depends on all of them.
template <class Call>
std::string describe_attention(const char* direction, const Call& call) {
  const AttentionSizes& sizes = call.sizes;
  const auto number = [](int64_t value) { return std::to_string(value); };
  std::string text = std::string(call.source_count == 1 ? "self_attention " : "double_attention ") + direction +
                     " (batch " + number(sizes.batch) + ", channels " + number(sizes.channels) + ", value channels " +
                     number(sizes.value_channels) + ", query channels ";
  for (int s = 0; s < call.source_count; ++s) {
    text += (s == 0 ? "" : " and ") + number(call.sources[s].query_channels) +
            (call.sources[s].key != nullptr ? " with projected keys" : " with folded keys");
  }
  text += ", positions " + number(sizes.positions);
  return text + (sizes.windows.across == 0 ? ")" : " in windows " + number(sizes.windows.width) + " wide)");
}

template <class S, class Platform>
AttentionForwardArguments<DeviceType<S>> forward_arguments(const Platform& platform, const AttentionForward<S>& call) {
  const AttentionSizes& sizes = call.sizes;
  AttentionForwardArguments<DeviceType<S>> in = {};
  in.sizes = sizes;
  in.grid = window_grid(sizes);
  in.source_count = call.source_count;
  in.vectors = true;
  for (int s = 0; s < call.source_count; ++s) {
    in.vectors = in.vectors && has_vectors(call.sources[s].x, sizes);
    in.sources[s] = source_view(platform, call.sources[s], sizes, s);
    in.contexts[s] = {platform.output(call.r[s], sizes.batch * sizes.channels * sizes.positions, "r"),
                      platform.output(call.lse[s], sizes.batch * sizes.positions, "lse"),
                      platform.output(call.shift[s], sizes.batch * sizes.channels, "shift")};
  }
  in.value_bias = platform.input(call.value_bias, sizes.value_channels, "value_bias");
  in.z = contiguous_map(platform.output(on_device(call.z), sizes.batch * sizes.value_channels * sizes.positions, "z"),
                        sizes.value_channels, sizes);
  return in;
}

template <class Plan>
LaunchShape forward_launch(const Plan& plan) {
  return {dim3(grid_size(plan.blocks)), dim3(kAttentionThreads), plan.shared_bytes};
}

template <class S, class Platform>
void attention_forward_on(const Platform& platform, const AttentionForward<S>& call, const Launch& launch) {
  const auto in = forward_arguments(platform, call);
  with_forward_plan(call, false, launch, [&](auto way, const auto& plan) {
    using Plan = std::decay_t<decltype(plan)>;
    platform.start("attention_forward", forward_launch(plan),
                   attention_forward_kernel<DeviceType<S>, decltype(way), Plan::kKeyWarps, Plan::kGroup>, in,
                   plan.stages);
  });
}

template <class S, class Platform>
void attention_gates_forward_on(const Platform& platform, const AttentionGatesForward<S>& call, const Launch& launch) {
  const AttentionForward<S>& attention = call.attention;
  const AttentionSizes& sizes = attention.sizes;
  const int64_t rows = kGates * sizes.channels, map_size = sizes.batch * sizes.channels * sizes.positions;
  AttentionGatesArguments<DeviceType<S>> in = {};
  in.attention = forward_arguments(platform, attention);
  // Where the memory is attended to it is the same object.
  const bool is_source = attention.source_count > 1 && attention.sources[1].x.data == call.m.data;
  in.m = is_source ? in.attention.sources[1].x : column_map<S>(platform, call.m, sizes.channels, sizes, "memory");
  in.pointwise = platform.input(call.pointwise, rows * (sizes.value_channels + sizes.channels), "pointwise");
  in.bias = platform.input(call.bias, rows, "bias");
  in.h_hat = contiguous_map(platform.output(on_device(call.h_hat), map_size, "h_hat"), sizes.channels, sizes);
  in.m_new = contiguous_map(platform.output(on_device(call.m_new), map_size, "m_new"), sizes.channels, sizes);
  with_forward_plan(attention, true, launch, [&](auto way, const auto& plan) {
    using Plan = std::decay_t<decltype(plan)>;
    platform.start("attention_gates_forward", forward_launch(plan),
                   attention_gates_forward_kernel<DeviceType<S>, decltype(way), Plan::kKeyWarps, Plan::kGroup>, in,
                   plan.stages);
  });
}

}  // namespace fastsam::cuda
