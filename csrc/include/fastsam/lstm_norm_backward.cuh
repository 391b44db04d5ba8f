// The second launch of the gradients of normalised LSTM gates: dx = rstd (dy - mean(dy) - y mean(dy y)) with dy = da w
// and y = (x - mean) rstd, the means over the sample, from the sums of the first launch, which every block adds up for
// itself; dweight and dbias. All sums go in a fixed order.
#pragma once

#include "fastsam/lstm_gates_terms.cuh"

namespace fastsam::cuda {

// Over a part of one sample.
template <class W>
struct TermSums {
  W dy, dy_centred;
};

template <class T>
struct LstmBackwardArguments {
  LstmInputs<T> in;
  LstmSplit split;
  LstmMap<T> dh, dc_new;
  Global<T> dc;                                  // (B, C, N)
  Global<T> dx[kLstmTerms];                      // (B, G C, N); nullptr of the second: there is none
  Global<const Wide<T>> statistics[kLstmTerms];  // (B, 2)
  Global<TermSums<Wide<T>>> of_samples;          // (B, blocks, terms): parts of the sums over each sample
  Global<TermSums<Wide<T>>> of_channels;         // (terms, B, G C, chunks), of da; only with weights of one a channel
};

template <class T>
__device__ __forceinline__ LstmStatistics<Wide<T>> saved_statistics(
    const Global<const Wide<T>> (&statistics)[kLstmTerms], int64_t sample) {
  LstmStatistics<Wide<T>> saved = {};
#pragma unroll
  for (int term = 0; term < kLstmTerms; ++term) {
    if (statistics[term] == nullptr) continue;
    saved.mean[term] = statistics[term][2 * sample];
    saved.rstd[term] = statistics[term][2 * sample + 1];
  }
  return saved;
}

template <class T>
struct LstmNormArguments {
  LstmBackwardArguments<T> first;                    // of the first launch
  LstmSplit split;                                   // of the terms' rows; of one sample if a block takes all
  Global<T> dweight[kLstmTerms], dbias[kLstmTerms];  // as the weights
  Global<Wide<T>> partial;                           // (terms, 2, G C, N): dweight and dbias of the samples so far

  __device__ __forceinline__ bool normalised(int term) const { return first.in.terms[term].weight != nullptr; }
};

// dx = rstd dy - offset - slope (x - mean)
template <class W>
struct Correction {
  W mean, rstd, offset, slope;
};

// Samples whose corrections lie in shared memory at a time. With weights of one a position and more samples than that
// their gradients are kept from tile to tile in a workspace.
constexpr int kSampleTile = 32;

// The corrections of some samples, (samples, terms), a warp for each sample.
template <class T>
__device__ __forceinline__ void lstm_corrections(const LstmNormArguments<T>& call, int64_t first, int samples,
                                                 Shared<Correction<Wide<T>>> corrections) {
  using W = Wide<T>;
  const int lane = threadIdx.x % kWarp, blocks = static_cast<int>(call.first.split.blocks);
  const W count = static_cast<W>(call.split.rows * call.first.in.positions);
  for (int index = threadIdx.x / kWarp; index < samples; index += kLstmWarps) {
    const int64_t sample = first + index;
    const LstmStatistics<W> statistics = saved_statistics<T>(call.first.statistics, sample);
#pragma unroll
    for (int term = 0; term < kLstmTerms; ++term) {
      if (!call.normalised(term)) continue;
      W dy = 0, dy_centred = 0;
      for (int block = lane; block < blocks; block += kWarp) {
        const TermSums<W> part = call.first.of_samples[(sample * blocks + block) * kLstmTerms + term];
        dy += part.dy;
        dy_centred += part.dy_centred;
      }
      dy = sum_of_warp(dy);
      dy_centred = sum_of_warp(dy_centred);
      const W rstd = statistics.rstd[term];
      const Correction<W> correction = {statistics.mean[term], rstd, rstd * (dy / count),
                                        rstd * rstd * rstd * (dy_centred / count)};
      if (lane == 0) corrections[index * kLstmTerms + term] = correction;
    }
  }
}

// dweight and dbias of one row, with weights of one a channel, by a warp.
template <class T>
__device__ __forceinline__ void channel_weight_gradients(const LstmNormArguments<T>& call, int64_t row) {
  using W = Wide<T>;
  const int64_t samples = call.first.split.samples, chunks = call.first.split.chunks, rows = call.split.rows;
#pragma unroll
  for (int term = 0; term < kLstmTerms; ++term) {
    if (!call.normalised(term)) continue;
    W dweight = 0, dbias = 0;
    for (int64_t index = threadIdx.x % kWarp; index < samples * chunks; index += kWarp) {
      const int64_t sample = index / chunks, chunk = index % chunks;
      const TermSums<W> sum = call.first.of_channels[((term * samples + sample) * rows + row) * chunks + chunk];
      const W rstd = call.first.statistics[term][2 * sample + 1];
      dweight += sum.dy_centred * rstd;
      dbias += sum.dy;
    }
    dweight = sum_of_warp(dweight);
    dbias = sum_of_warp(dbias);
    if (threadIdx.x % kWarp > 0) continue;
    call.dweight[term][row] = narrow<T>(dweight);
    call.dbias[term][row] = narrow<T>(dbias);
  }
}

// Which of several tiles of samples this is.
struct TilePlace {
  bool is_first, is_last;
};

// Adds `value` to the sum of the tiles before, and keeps it for those to come or writes it out.
template <class T, int V>
__device__ __forceinline__ void add_tile(Global<T> to, Global<Wide<T>> partial, Lanes<Wide<T>, V> value,
                                         TilePlace tile) {
  using W = Wide<T>;
  if (!tile.is_first) {
    const Lanes<W, V> before = load_lanes<W, V>(partial);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] += before[i];
  }
  if (tile.is_last) {
    store_lanes<T, V>(to, value);
  } else {
    store_lanes<W, V>(partial, value);
  }
}

// The gradients at V positions of a row, for the samples whose corrections are there; with weights of one a position
// those of the weights too.
template <class T, int V, NormWeights kWeights>
__device__ __forceinline__ void norm_gradients(const LstmNormArguments<T>& call, int64_t first, int samples,
                                               int64_t row, int64_t at, Shared<Correction<Wide<T>>> corrections) {
  using W = Wide<T>;
  constexpr bool kPosition = kWeights == NormWeights::kPosition;
  const LstmInputs<T>& in = call.first.in;
  const int64_t weight_at = kPosition ? row * in.positions + at : row;
  Lanes<W, V> weight[kLstmTerms] = {}, dweight[kLstmTerms] = {}, dbias = {};
#pragma unroll
  for (int term = 0; term < kLstmTerms; ++term) {
    if (!call.normalised(term)) continue;
    if constexpr (kPosition) {
      weight[term] = load_lanes<T, V>(in.terms[term].weight + weight_at);
    } else {
      const W of_row = widen(in.terms[term].weight[weight_at]);
#pragma unroll
      for (int i = 0; i < V; ++i) weight[term][i] = of_row;
    }
  }
  for (int index = 0; index < samples; ++index) {
    const int64_t sample = first + index, out = (sample * call.split.rows + row) * in.positions + at;
    const Lanes<W, V> da = load_lanes<T, V>(call.first.dx[0] + out);
#pragma unroll
    for (int i = 0; i < V; ++i) dbias[i] += da[i];
#pragma unroll
    for (int term = 0; term < kLstmTerms; ++term) {
      if (!call.normalised(term)) continue;
      const Correction<W> correction = corrections[index * kLstmTerms + term];
      Lanes<W, V> dx = load_lanes<T, V>(in.terms[term].x.row(sample, row) + at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const W centred = dx[i] - correction.mean, scaled = correction.rstd * da[i];
        dweight[term][i] += scaled * centred;
        dx[i] = scaled * weight[term][i] - correction.offset - correction.slope * centred;
      }
      store_lanes<T, V>(call.first.dx[term] + out, dx);
    }
  }
  if constexpr (kPosition) {
    const TilePlace tile = {first == 0, first + samples == call.first.split.samples};
    const int64_t count = call.split.rows * in.positions;
#pragma unroll
    for (int term = 0; term < kLstmTerms; ++term) {
      if (!call.normalised(term)) continue;
      const Global<W> partial = call.partial + (2 * term * count + weight_at);
      add_tile<T, V>(call.dweight[term] + weight_at, partial, dweight[term], tile);
      add_tile<T, V>(call.dbias[term] + weight_at, partial + count, dbias, tile);
    }
  }
}

// Blocks for whose registers a multiprocessor is to have room. Without a number the compiler wants four, and spills.
constexpr int kLstmNormBlocks = 3;

// The second launch of a normalised call.
template <class T, int V, NormWeights kWeights>
__global__ void __launch_bounds__(kLstmThreads, kLstmNormBlocks) lstm_norm_backward_kernel(LstmNormArguments<T> call) {
  constexpr bool kPosition = kWeights == NormWeights::kPosition;
  FASTSAM_SHARED(Correction<Wide<T>>, corrections, kSampleTile * kLstmTerms);
  const LstmPlace place = lstm_place(call.split);
  const int64_t all = call.first.split.samples, begin = kPosition ? 0 : place.sample;
  const int64_t end = kPosition ? all : min(begin + 1, all);
  int64_t first = begin;
  do {
    const int samples = static_cast<int>(min(end - first, static_cast<int64_t>(kSampleTile)));
    lstm_corrections(call, first, samples, corrections);
    __syncthreads();
#pragma unroll 1  // more would cost the registers of other warps
    for (int64_t at = place.begin + threadIdx.x % kWarp * V; at < place.end; at += kWarp * V) {
      norm_gradients<T, V, kWeights>(call, first, samples, place.row, at, corrections);
    }
    first += kSampleTile;
    if (first < end) __syncthreads();
  } while (first < end);
  if (!kPosition && begin == 0 && place.valid && place.chunk == 0) channel_weight_gradients(call, place.row);
}

}  // namespace fastsam::cuda
