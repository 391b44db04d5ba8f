// Which kernels of the attention operators run for a call on a card, and with how much shared memory.
#pragma once

#include <limits>

#include "fastsam/attention_backward.cuh"
#include "fastsam/attention_gates.cuh"

namespace fastsam::cuda {

// Tiles are copied while others are computed with where the card can do so and two blocks find room on a
// multiprocessor; if not even one block has room for two tiles, or two blocks for one each, there is one.
inline int tiles_that_fit(const Launch& launch, int64_t with_one, int64_t with_two) {
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
    blocks = call.sizes.batch * ceil_div(call.sizes.positions, Shape::kRows);
    find_room(call, has_gates, launch);
    if (!fits && Shape::kKeysInParts) {
      stages.keys = kDepthStep;
      find_room(call, has_gates, launch);
    }
    serves = fits && call.sizes.value_channels <= Shape::kValueChannels;
  }

  // Sums of rows, and what the warps of a row have in common.
  static constexpr int64_t kStaticBytes =
      (Shape::kRows + 2 * kAttentionWarps * kWarpRows) * sizeof(typename Way::Accumulator) + 4 * 16;

  bool fits, serves;
  // The weights of all keys stay in shared memory where they find room. If they do not, keys are made for a step of
  // depth at a time.
  ForwardStages stages = {1, std::numeric_limits<int>::max()};
  int64_t blocks, shared_bytes;

 private:
  void find_room(const AttentionForward<S>& call, bool has_gates, const Launch& launch) {
    const int64_t with_one = bytes_with(1, call, has_gates), with_two = bytes_with(2, call, has_gates);
    stages.tiles = tiles_that_fit(launch, with_one + kStaticBytes, with_two + kStaticBytes);
    shared_bytes = stages.tiles == 1 ? with_one : with_two;
    fits = shared_bytes + kStaticBytes <= launch.shared_bytes;
  }

  int64_t bytes_with(int tiles, const AttentionForward<S>& call, bool has_gates) const {
    using Gated = GatedBlock<DeviceType<S>, Way, KeyWarps, Group>;
    const AttentionSizes& sizes = call.sizes;
    const int64_t depth = padded_depth(sizes.channels);
    int64_t bytes = has_gates ? Gated::bytes(sizes.channels, sizes.value_channels) : 0;
    for (int s = 0; s < call.source_count; ++s) {
      const AttentionSource<S>& source = call.sources[s];
      const typename Shape::Layout layout(depth, padded_depth(source.query_channels), source.key != nullptr,
                                          {tiles, stages.keys});
      bytes = Shape::Layout::max_of(bytes, layout.bytes(depth));
    }
    return bytes;
  }
};

// How the backward pass runs with these kernels; `fits`: they find the shared memory they need.
template <class S, class Way, int KeyWarps, int Group>
struct BackwardPlan {
  using Shape = BackwardShape<Way, KeyWarps, Group>;
  static constexpr int kKeyWarps = KeyWarps, kGroup = Group;

  // call: of the backward pass, or of the forward pass that it follows.
  template <class Call>
  BackwardPlan(const Call& call, const Launch& launch) {
    const AttentionSizes& sizes = call.sizes;
    prepare_blocks = sizes.batch * padded_positions(sizes.positions) / Shape::kRows;
    attend_blocks = sizes.batch * ceil_div(sizes.positions, Shape::kRows);
    prepare_bytes = Shape::prepare_bytes(sizes.channels, sizes.value_channels);
    for (int s = 0; s < call.source_count; ++s)
      finish_bytes = Shape::larger(finish_bytes, Shape::finish_bytes(call.sources[s].query_channels));
    stages.tiles = tiles_that_fit(launch, bytes_with({1, false}, call), bytes_with({2, false}, call));
    if (KeyWarps > 1 && bytes_with(stages, call) > launch.shared_bytes) stages = {1, true};
    attend_bytes = bytes_with(stages, call);
    most_bytes = Shape::larger(attend_bytes, Shape::larger(prepare_bytes, finish_bytes + kStaticBytes));
    fits = most_bytes <= launch.shared_bytes;
  }

  static constexpr int64_t kStaticBytes = kAttentionThreads * sizeof(typename Way::Accumulator);

  int64_t prepare_blocks, attend_blocks;  // for each source, and the latter for each role
  int64_t prepare_bytes, attend_bytes, finish_bytes = 0, most_bytes;
  BackwardStages stages = {1, false};
  bool fits;

 private:
  template <class Call>
  static int64_t bytes_with(const BackwardStages& stages, const Call& call) {
    int64_t bytes = 0;
    for (int s = 0; s < call.source_count; ++s) {
      const auto& source = call.sources[s];
      bytes = Shape::larger(
          bytes, Shape::attend_bytes(call.sizes.channels, source.query_channels, source.key != nullptr, stages));
    }
    return bytes;
  }
};

// of_pass: what the bytes are needed for, where that is not what was called.
inline void check_shared_memory(bool fits, int64_t bytes, const Launch& launch, const char* of_pass = "") {
  if (fits) return;
  throw LaunchError("needs " + std::to_string(ceil_div(bytes, 1024)) + " KiB of shared memory a block" + of_pass +
                    ", this card has " + std::to_string(launch.shared_bytes / 1024) +
                    " KiB: use fewer channels, or fastsam.backend(\"eager\")");
}

inline void check_value_channels(const AttentionSizes& sizes) {
  if (sizes.value_channels <= kMostValueChannels) return;
  throw LaunchError("serves at most " + std::to_string(kMostValueChannels) + " value channels: use fewer, or " +
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

// Whether so many blocks keep three of four multiprocessors busy.
inline bool fills_card(int64_t blocks, const Launch& launch) {
  return 4 * blocks >= 3 * static_cast<int64_t>(launch.multiprocessors);
}

// Calls use(plan) with the kernel for this call: 64 queries a block where that fills the card, else 16, which take two
// to three times the instructions a query (csrc/README.md); 64 channels at a time, 128 where there are more, and in
// double, which has twice the registers a number, 32.
template <class S, class Way, class Use>
void with_forward_shape(const AttentionForward<S>& call, bool has_gates, const Launch& launch, Use use) {
  const bool narrow = call.sizes.channels <= 64 && call.sizes.value_channels <= 64;
  const auto fills = [&](const auto& plan) { return plan.serves && fills_card(plan.blocks, launch); };
  if constexpr (sizeof(S) == 8) {
    return use(ForwardPlan<S, Way, 4, 32>(call, has_gates, launch));
  } else {
    if (narrow) {
      const ForwardPlan<S, Way, 1, 64> plan(call, has_gates, launch);
      if (fills(plan)) return use(plan);
      const ForwardPlan<S, Way, 4, 64> small(call, has_gates, launch);
      if (small.serves) return use(small);
    } else if (call.sizes.channels <= 128) {
      const ForwardPlan<S, Way, 1, 128> plan(call, has_gates, launch);
      if (fills(plan)) return use(plan);
    }
    return use(ForwardPlan<S, Way, 4, 128>(call, has_gates, launch));
  }
}

// The same for the backward pass, whose second launch has a block for each role and source: 64 rows a block where they
// fit and fill the card, else 16 if those fit.
template <class S, class Way, class Call, class Use>
auto with_backward_shape(const Call& call, const Launch& launch, Use use) {
  if constexpr (sizeof(S) == 8) {
    return use(BackwardPlan<S, Way, 4, 64>(call, launch));
  } else {
    const BackwardPlan<S, Way, 4, 128> small(call, launch);
    const auto is_better = [&](const auto& large) {
      return large.fits && (fills_card(2 * call.source_count * large.attend_blocks, launch) || !small.fits);
    };
    if (call.sizes.channels <= 64) {
      const BackwardPlan<S, Way, 1, 64> large(call, launch);
      if (is_better(large)) return use(large);
    } else {
      const BackwardPlan<S, Way, 1, 128> large(call, launch);
      if (is_better(large)) return use(large);
    }
    return use(small);
  }
}

// Calls use(way, plan). Contexts are kept for a backward pass, which the card must be able to run too.
template <class S, class Use>
void with_forward_plan(const AttentionForward<S>& call, bool has_gates, const Launch& launch, Use use) {
  with_way<S>(launch, [&](auto way) {
    using Way = decltype(way);
    check_value_channels(call.sizes);
    with_forward_shape<S, Way>(call, has_gates, launch, [&](const auto& plan) {
      check_shared_memory(plan.serves, plan.shared_bytes + plan.kStaticBytes, launch);
      if (call.r[0] != nullptr) {
        with_backward_shape<S, Way>(call, launch, [&](const auto& backward) {
          check_shared_memory(backward.fits, backward.most_bytes, launch, " in the backward pass");
        });
      }
      use(way, plan);
    });
  });
}

// Calls use(way, plan) with the kernels for this call.
template <class S, class Use>
auto with_backward_plan(const AttentionBackward<S>& call, const Launch& launch, Use use) {
  return with_way<S>(launch, [&](auto way) {
    check_value_channels(call.sizes);
    return with_backward_shape<S, decltype(way)>(call, launch, [&](const auto& plan) {
      check_shared_memory(plan.fits, plan.most_bytes, launch);
      return use(way, plan);
    });
  });
}

}  // namespace fastsam::cuda
