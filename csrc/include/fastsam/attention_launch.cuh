// The host's part of the attention operators: which kernel runs where, and its launches.
#pragma once

#include "fastsam/attention_gates.cuh"

namespace fastsam::cuda {

// Tiles are copied while others are computed with where the card can do so and two blocks find room on a
// multiprocessor; if not even one block has room for two tiles, or two blocks for one each, there is one.
inline int stages_that_fit(const Launch& launch, int64_t with_one, int64_t with_two) {
  if (launch.capability < 80) return 1;
  const int64_t most = launch.shared_bytes, kReserved = 1024;
  if (2 * (with_two + kReserved) <= most + kReserved) return 2;
  if (2 * (with_one + kReserved) <= most + kReserved) return 1;
  return with_two <= most ? 2 : 1;
}

// How the forward pass runs with these kernels, with gates or without; `serves`: they can do it.
template <class S, class Way, int KeyWarps, int Group>
struct ForwardPlan {
  using Shape = ForwardShape<DeviceType<S>, Way, KeyWarps, Group>;
  static constexpr int kKeyWarps = KeyWarps, kGroup = Group;

  ForwardPlan(const AttentionForward<S>& call, bool has_gates, const Launch& launch) {
    const AttentionSizes& sizes = call.sizes;
    blocks = sizes.batch * ceil_div(sizes.positions, Shape::kRows);
    using Gated = GatedBlock<DeviceType<S>, Way, KeyWarps, Group>;
    const int64_t of_gates = has_gates ? Gated::bytes(sizes.channels, sizes.value_channels) : 0;
    int64_t bytes[2] = {of_gates, of_gates};
    for (int s = 0; s < call.source_count; ++s) {
      const AttentionSource<S>& source = call.sources[s];
      const int64_t depth = padded_depth(sizes.channels), query_depth = padded_depth(source.query_channels);
      for (int stages = 1; stages <= 2; ++stages) {
        const typename Shape::Layout layout(depth, query_depth, source.key != nullptr, stages);
        bytes[stages - 1] = Shape::Layout::max_of(bytes[stages - 1], layout.bytes(depth));
      }
    }
    stages = stages_that_fit(launch, bytes[0] + kStaticBytes, bytes[1] + kStaticBytes);
    shared_bytes = bytes[stages - 1];
    fits = shared_bytes + kStaticBytes <= launch.shared_bytes;
    serves = fits && sizes.value_channels <= Shape::kMostValueChannels;
  }

  // Sums of rows, and what the warps of a row have in common.
  static constexpr int64_t kStaticBytes =
      (Shape::kRows + 2 * kAttentionWarps * kWarpRows) * sizeof(typename Way::Accumulator) + 4 * 16;

  bool fits, serves;
  int stages;
  int64_t blocks, shared_bytes;
};

inline void check_shared_memory(bool fits, int64_t bytes, const Launch& launch) {
  if (fits) return;
  throw LaunchError("needs " + std::to_string(ceil_div(bytes, 1024)) + " KiB of shared memory a block, this card has " +
                    std::to_string(launch.shared_bytes / 1024) +
                    " KiB: use fewer channels, or fastsam.backend(\"eager\")");
}

inline void check_value_channels(const AttentionSizes& sizes) {
  constexpr int64_t kMost = 256;
  if (sizes.value_channels <= kMost) return;
  throw LaunchError("serves at most " + std::to_string(kMost) + " value channels: use fewer, or " +
                    "fastsam.backend(\"eager\")");
}

// Calls use() with the fastest way to multiply that the device has for S and the wanted precision.
template <class S, class Use>
auto with_way(const Launch& launch, Use use) {
  using Device = DeviceType<S>;
  if constexpr (std::is_same_v<S, double>) {
    return use(WarpFma<double>());
  } else if constexpr (std::is_same_v<S, float>) {
    if (launch.precision != Precision::kTf32) return use(WarpFma<float>());
    return with_first_served<S>(launch, use, WarpTf32(), WarpFma<float>());
  } else if constexpr (std::is_same_v<S, float16>) {
    return with_first_served<S>(launch, use, WarpHalf<Device, 16>(), WarpHalf<Device, 8>(), WarpFma<float>());
  } else {
    return with_first_served<S>(launch, use, WarpHalf<Device, 16>(), WarpFma<float>());
  }
}

// Calls use(plan) with the kernel for this call: 64 queries a block where that keeps three of four multiprocessors
// busy, else 16, which take two to three times the instructions a query (csrc/README.md); 64 channels at a time, 128
// where there are more, and in double, which has twice the registers a number, 32.
template <class S, class Way, class Use>
void with_forward_shape(const AttentionForward<S>& call, bool has_gates, const Launch& launch, Use use) {
  const bool narrow = call.sizes.channels <= 64 && call.sizes.value_channels <= 64;
  const auto fills = [&](const auto& plan) {
    return plan.serves && 4 * plan.blocks >= 3 * static_cast<int64_t>(launch.multiprocessors);
  };
  if constexpr (sizeof(S) == 8) {
    return use(ForwardPlan<S, Way, 4, 32>(call, has_gates, launch));
  } else if (narrow) {
    const ForwardPlan<S, Way, 1, 64> plan(call, has_gates, launch);
    if (fills(plan)) return use(plan);
    return use(ForwardPlan<S, Way, 4, 64>(call, has_gates, launch));
  } else {
    const ForwardPlan<S, Way, 1, 128> plan(call, has_gates, launch);
    if (call.sizes.channels <= 128 && fills(plan)) return use(plan);
    return use(ForwardPlan<S, Way, 4, 128>(call, has_gates, launch));
  }
}

// Calls use(way, plan).
template <class S, class Use>
void with_forward_plan(const AttentionForward<S>& call, bool has_gates, const Launch& launch, Use use) {
  with_way<S>(launch, [&](auto way) {
    with_forward_shape<S, decltype(way)>(call, has_gates, launch, [&](const auto& plan) {
      check_value_channels(call.sizes);
      check_shared_memory(plan.serves, plan.shared_bytes + plan.kStaticBytes, launch);
      use(way, plan);
    });
  });
}

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

inline std::string describe_attention(const char* direction, const AttentionSizes& sizes, int source_count) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  return std::string(source_count == 1 ? "self_attention " : "double_attention ") + direction + " (batch " +
         number(sizes.batch) + ", channels " + number(sizes.channels) + ", value channels " +
         number(sizes.value_channels) + ", positions " + number(sizes.positions) +
         (sizes.windows.across == 0 ? ")" : " in windows " + number(sizes.windows.width) + " wide)");
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
