// The forward pass of lstm_gates, memory_gates and norm_gate: the updates of lstm_updates.cuh, whose gates are sums of
// terms that may be normalised. One launch; with norms two, because the gates of a sample need the statistics of all of
// it: the first one takes the moments of parts of each sample, the second one joins them in every block.
#pragma once

#include "fastsam/lstm_gates_terms.cuh"

namespace fastsam::cuda {

// Some numbers' mean and the sum of their squared distances from it.
template <class W>
struct Moments {
  W count, mean, squares;
};

// Those of both together (Chan, Golub, LeVeque 1983).
template <class W>
__device__ __forceinline__ Moments<W> join(const Moments<W>& a, const Moments<W>& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const W count = a.count + b.count;
  const W distance = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + distance * share, a.squares + b.squares + distance * distance * share * a.count};
}

template <class W, int V>
__device__ __forceinline__ Moments<W> moments_of(const Lanes<W, V>& x) {
  W sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += x[i];
  const W mean = sum * (W(1) / V);
#pragma unroll
  for (int i = 0; i < V; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {W(V), mean, squares};
}

// In lane 0: those of the whole warp.
template <class W>
__device__ __forceinline__ Moments<W> warp_moments(Moments<W> moments) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Moments<W> other = {__shfl_down_sync(0xffffffffu, moments.count, step),
                              __shfl_down_sync(0xffffffffu, moments.mean, step),
                              __shfl_down_sync(0xffffffffu, moments.squares, step)};
    moments = join(moments, other);
  }
  return moments;
}

// Blocks for whose registers a multiprocessor is to have room. Without a number the compiler wants five, and spills.
constexpr int kLstmMomentsBlocks = 4;

// The first launch of a normalised call: parts (samples, terms, parts), block x of row y of the grid being part
// x % count of sample x / count and term y. `split` is that of the terms' rows.
template <class T, int V>
__global__ void __launch_bounds__(kLstmThreads, kLstmMomentsBlocks)
    lstm_moments_kernel(LstmInputs<T> in, LstmSplit split, int count, Global<Moments<Wide<T>>> parts) {
  using W = Wide<T>;
  FASTSAM_SHARED(Moments<W>, of_warps, kLstmWarps);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, term = blockIdx.y;
  const int64_t sample = blockIdx.x / count, part = blockIdx.x % count;
  const LstmDeviceTerm<T> from = term == 0 ? in.terms[0] : in.terms[1];
  if (from.weight == nullptr) return;
  Moments<W> moments = {0, 0, 0};
  for (int64_t unit = part * kLstmWarps + warp; unit < split.rows * split.chunks; unit += count * kLstmWarps) {
    const Global<const T> x = from.x.row(sample, unit / split.chunks);
    const int64_t begin = unit % split.chunks * split.chunk, end = min(begin + split.chunk, split.positions);
    for (int64_t at = begin + lane * V; at < end; at += kWarp * V) {
      moments = join(moments, moments_of(load_lanes<T, V>(x + at)));
    }
  }
  moments = warp_moments(moments);
  if (lane == 0) of_warps[warp] = moments;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int other = 1; other < kLstmWarps; ++other) moments = join<W>(moments, of_warps[other]);
  parts[(sample * kLstmTerms + term) * count + part] = moments;
}

template <class T>
struct LstmForwardArguments {
  LstmInputs<T> in;
  LstmSplit split;
  Global<T> h, c_new;                      // (B, C, N); c_new may be nullptr with Update::kProduct
  Global<Wide<T>> statistics[kLstmTerms];  // (B, 2): mean and 1 / sqrt(variance + eps) of a term with weights
  Wide<T> eps;
  Global<Moments<Wide<T>>> moments;  // (B, terms, moment_parts)
  int moment_parts;
};

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// The statistics of a sample, for all threads of the block. A warp for each term; the sample's first block keeps them
// for the backward pass.
template <class T>
__device__ __forceinline__ LstmStatistics<Wide<T>> lstm_statistics(const LstmForwardArguments<T>& call,
                                                                   int64_t sample) {
  using W = Wide<T>;
  FASTSAM_SHARED(W, shared, 2 * kLstmTerms);
  const int term = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (term < kLstmTerms && call.in.terms[term].weight != nullptr) {
    const Global<const Moments<W>> parts = call.moments + (sample * kLstmTerms + term) * call.moment_parts;
    Moments<W> moments = {0, 0, 0};
    for (int part = lane; part < call.moment_parts; part += kWarp) moments = join<W>(moments, parts[part]);
    moments = warp_moments(moments);
    if (lane == 0) {
      const W rstd = 1 / square_root(moments.squares / moments.count + call.eps);
      shared[2 * term] = moments.mean;
      shared[2 * term + 1] = rstd;
      if (blockIdx.x % call.split.blocks == 0) {
        call.statistics[term][2 * sample] = moments.mean;
        call.statistics[term][2 * sample + 1] = rstd;
      }
    }
  }
  __syncthreads();
  LstmStatistics<W> statistics = {};
#pragma unroll
  for (int index = 0; index < kLstmTerms; ++index) {
    if (call.in.terms[index].weight == nullptr) continue;
    statistics.mean[index] = shared[2 * index];
    statistics.rstd[index] = shared[2 * index + 1];
  }
  return statistics;
}

// Blocks for whose registers a multiprocessor is to have room.
template <class T, NormWeights kWeights>
constexpr int kLstmForwardBlocks = sizeof(Wide<T>) == 4 && kWeights == NormWeights::kNone ? 3 : 2;

template <Update kUpdate, class T, int V, NormWeights kWeights>
__global__ void __launch_bounds__(kLstmThreads, kLstmForwardBlocks<T, kWeights>)
    lstm_gates_forward_kernel(LstmForwardArguments<T> call) {
  using W = Wide<T>;
  const LstmPlace place = lstm_place(call.split);
  LstmStatistics<W> statistics = {};
  if constexpr (kWeights != NormWeights::kNone) statistics = lstm_statistics(call, place.sample);
  if (!place.valid) return;
  const LstmGates<kUpdate, T, V, kWeights> gates(call.in, place.sample, place.row, statistics);
  const Global<const T> c = call.in.c.row(place.sample, place.row);
  const int64_t out = (place.sample * call.split.rows + place.row) * call.split.positions;
  const bool keeps_c_new = kUpdate != Update::kProduct || call.c_new != nullptr;
#pragma unroll 1  // more would cost the registers of other warps
  for (int64_t at = place.begin + threadIdx.x % kWarp * V; at < place.end; at += kWarp * V) {
    const GateUpdate<kUpdate, W, V> update = gates.update(load_lanes<T, V>(c + at), at);
    if (keeps_c_new) store_lanes<T, V>(call.c_new + (out + at), update.c_new);
    store_lanes<T, V>(call.h + (out + at), update.h());
  }
}

#ifndef __CUDACC_RTC__

// The host's part, the same for every platform: DevicePlatform, or the one of the tests.

// A sample's moments come in at most this many parts, a block each.
constexpr int64_t kMaxMomentParts = 128;

inline int lstm_moment_parts(const LstmSplit& split, int multiprocessors) {
  const int64_t warps = split.rows * split.chunks;
  const int64_t parts = parts_to_fill(4 * multiprocessors, split.samples * kLstmTerms, warps, kLstmWarps);
  return static_cast<int>(parts < kMaxMomentParts ? parts : kMaxMomentParts);
}

// Elements of a vector: 16 bytes.
template <class S>
constexpr int kLstmForwardWidth = 16 / static_cast<int>(sizeof(S));

template <class S>
struct LstmForwardPlan {
  using Part = Moments<Wide<DeviceType<S>>>;

  LstmForwardPlan(const LstmGatesForward<S>& call, const Launch& launch)
      : layout(call, kLstmForwardWidth<S>), weights(norm_weights(call)) {
    layout.add(call.h);
    layout.add(call.c_new);
    const int multiprocessors = launch.multiprocessors;
    split = lstm_split(call.batch, layout.channels(), layout.positions(), layout.width(), multiprocessors);
    moments = lstm_split(call.batch, layout.rows(), layout.positions(), layout.width(), multiprocessors);
    if (weights != NormWeights::kNone) parts = lstm_moment_parts(moments, multiprocessors);
  }

  int64_t all_parts() const { return split.samples * kLstmTerms * parts; }

  LstmLayout<S> layout;
  NormWeights weights;
  LstmSplit split, moments;
  int parts = 0;
};

template <class S>
int64_t lstm_forward_workspace(const LstmGatesForward<S>& call, const Launch& launch) {
  const LstmForwardPlan<S> plan(call, launch);
  return plan.all_parts() * static_cast<int64_t>(sizeof(typename LstmForwardPlan<S>::Part));
}

template <class S, class Platform>
LstmForwardArguments<DeviceType<S>> lstm_forward_arguments(const LstmGatesForward<S>& call, void* workspace,
                                                           const LstmForwardPlan<S>& plan, const Platform& platform) {
  using Part = typename LstmForwardPlan<S>::Part;
  const int64_t count = call.batch * call.channels * call.positions;
  LstmForwardArguments<DeviceType<S>> arguments = {
      plan.layout.inputs(platform, call),
      plan.split,
      platform.output(on_device(call.h), count, "h"),
      platform.output(on_device(call.c_new), count, "c_new"),
      {},
      call.eps,
      platform.output(static_cast<Part*>(workspace), plan.all_parts(), "moments"),
      plan.parts};
  for (int term = 0; term < kLstmTerms; ++term) {
    arguments.statistics[term] = platform.output(call.statistics[term], 2 * call.batch, "statistics");
  }
  return arguments;
}

template <class S, int V, class Platform>
void lstm_forward_by_vectors(const LstmGatesForward<S>& call, void* workspace, const LstmForwardPlan<S>& plan,
                             const Platform& platform) {
  using T = DeviceType<S>;
  const auto arguments = lstm_forward_arguments(call, workspace, plan, platform);
  if (plan.parts > 0) {
    const LaunchShape shape = {dim3(grid_size(call.batch * plan.parts), kLstmTerms), dim3(kLstmThreads)};
    platform.start("lstm_moments", shape, lstm_moments_kernel<T, V>, arguments.in, plan.moments, plan.parts,
                   arguments.moments);
  }
  with_update(call.update, [&](auto update) {
    with_norm_weights(plan.weights, [&](auto weights) {
      constexpr Update kUpdate = decltype(update)::value;
      constexpr NormWeights kWeights = decltype(weights)::value;
      platform.start("lstm_gates_forward", lstm_shape(plan.split), lstm_gates_forward_kernel<kUpdate, T, V, kWeights>,
                     arguments);
    });
  });
}

template <class S, class Platform>
void lstm_forward(const LstmGatesForward<S>& call, void* workspace, const Launch& launch, const Platform& platform) {
  const LstmForwardPlan<S> plan(call, launch);
  if (plan.layout.width() == 1) {
    lstm_forward_by_vectors<S, 1>(call, workspace, plan, platform);
  } else {
    lstm_forward_by_vectors<S, kLstmForwardWidth<S>>(call, workspace, plan, platform);
  }
}

#endif

}  // namespace fastsam::cuda
