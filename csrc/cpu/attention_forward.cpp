// z = sum over the sources of value R + value_bias, with R the softmax-weighted average of the source's columns.
//
// A task is one tile of queries: it passes over the tiles of keys with an online softmax (running maximum and sum), so
// nothing of size N x N exists. Queries are lanes, so every row operation of the softmax is one vector operation.

#include <cmath>

#include "attention.h"
#include "kernels_internal.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// A key tile packed as left factors, read by every query tile.
template <class T>
struct PackedKeys {
  T* keys;  // (kTile x D): rows are keys
  T* x;     // (C x kTile): depth is keys
};

template <class T>
struct ThreadScratch {
  ThreadScratch(Arena& arena, const AttentionSizes& sizes, int64_t query_channels)
      : hidden(arena.take<T>(sizes.channels * kTile)),
        query(arena.take<T>(padded_rows(query_channels) * kTile)),
        scores(arena.take<T>(kTile * kTile)),
        r(arena.take<T>(padded_rows(sizes.channels) * kTile)),
        z(arena.take<T>(padded_rows(sizes.value_channels) * kTile)),
        maximum(arena.take<T>(kTile)),
        sum(arena.take<T>(kTile)) {}

  T *hidden, *query, *scores, *r, *z, *maximum, *sum;
};

template <class T>
struct Layout {
  Layout(Arena& arena, const AttentionForward<T>& call, int threads) : key_tiles(tiles_in(call.sizes.positions)) {
    const AttentionSizes& sizes = call.sizes;
    int64_t widest = 0;
    for (int s = 0; s < call.source_count; ++s) {
      const int64_t query_channels = call.sources[s].query_channels;
      widest = query_channels > widest ? query_channels : widest;
      weights[s] = PackedSource<T>(arena, call.sources[s], sizes);
      value[s] = arena.take<T>(padded_rows(sizes.value_channels) * sizes.channels);
      keys_size[s] = kTile * query_channels;
      x_size = padded_rows(sizes.channels) * kTile;
      keys[s] = arena.take<T>(sizes.batch * key_tiles * keys_size[s]);
      x[s] = arena.take<T>(sizes.batch * key_tiles * x_size);
    }
    scratch_base = arena.size();
    ThreadScratch<T> first(arena, sizes, widest);
    scratch_size = arena.size() - scratch_base;
    arena.take<char>(scratch_size * (threads - 1));
    widest_query = widest;
  }

  PackedKeys<T> packed(int source, int64_t batch, int64_t tile) const {
    const int64_t index = batch * key_tiles + tile;
    return {keys[source] + index * keys_size[source], x[source] + index * x_size};
  }

  int64_t key_tiles, x_size = 0, scratch_base, scratch_size, widest_query;
  int64_t keys_size[kMaxSources];
  PackedSource<T> weights[kMaxSources];
  T *value[kMaxSources], *keys[kMaxSources], *x[kMaxSources];
};

template <class T>
void pack_keys(const AttentionForward<T>& call, const Layout<T>& layout, int source, int64_t batch, int64_t index,
               const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, depth = call.sources[source].query_channels;
  load_map_tile(call.sources[source].x, batch, tile_of(index, call.sizes.positions), channels, scratch.hidden);
  const T* keys = key_tile(layout.weights[source], channels, scratch.hidden, scratch.query);
  const PackedKeys<T> packed = layout.packed(source, batch, index);
  pack_panels(kTile, depth, keys, 1, kTile, packed.keys);
  pack_panels(channels, kTile, scratch.hidden, kTile, 1, packed.x);
}

// Turns the scores of `count` keys into unnormalised weights and brings r and the sum to the new maximum.
template <class T>
void softmax_step(int64_t count, int64_t lanes, int64_t channels, const ThreadScratch<T>& scratch) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
    const Vec<T> before = load(scratch.maximum + lane);
    Vec<T> maximum = before;
    for (int64_t key = 0; key < count; ++key) {
      const Vec<T> score = load(scratch.scores + key * kTile + lane);
      maximum = where<T>(maximum, score, score, maximum);
    }
    // While every score is -inf the shift must stay finite, or later finite scores would meet inf - inf.
    const Vec<T> shift = where<T>(broadcast(-infinity), maximum, maximum, broadcast(T(0)));
    const Vec<T> factor = exponential<T>(before - shift);
    Vec<T> sum = broadcast(T(0));
    for (int64_t key = 0; key < count; ++key) {
      T* score = scratch.scores + key * kTile + lane;
      const Vec<T> weight = exponential<T>(load(score) - shift);
      sum += weight;
      store(score, weight);
    }
    store(scratch.maximum + lane, maximum);
    store(scratch.sum + lane, load(scratch.sum + lane) * factor + sum);
    for (int64_t channel = 0; channel < channels; ++channel) {
      T* r = scratch.r + channel * kTile + lane;
      store(r, load(r) * factor);
    }
  }
}

template <class T>
void attend(const AttentionForward<T>& call, const Layout<T>& layout, int source, int64_t batch, int64_t lanes,
            const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, depth = call.sources[source].query_channels;
  query_tile(layout.weights[source], call.sources[source].score_bias, channels, scratch.hidden, scratch.query);
  for (int64_t lane = 0; lane < kTile; ++lane) {
    scratch.maximum[lane] = -std::numeric_limits<T>::infinity();
    scratch.sum[lane] = T(0);
  }
  std::memset(scratch.r, 0, padded_rows(channels) * kTile * sizeof(T));
  for (int64_t tile = 0; tile < layout.key_tiles; ++tile) {
    const int64_t count = tile_of(tile, call.sizes.positions).count;
    const PackedKeys<T> packed = layout.packed(source, batch, tile);
    multiply<T, Start::kZero>(count, lanes, depth, panels(packed.keys, depth), scratch.query, kTile, scratch.scores,
                              kTile);
    softmax_step(count, lanes, channels, scratch);
    multiply<T, Start::kAdd>(channels, lanes, count, panels(packed.x, kTile), scratch.scores, kTile, scratch.r, kTile);
  }
  for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
    const Vec<T> sum = load(scratch.sum + lane);
    for (int64_t channel = 0; channel < channels; ++channel) {
      T* r = scratch.r + channel * kTile + lane;
      store(r, load(r) / sum);
    }
  }
}

template <class T>
void store_context(const AttentionForward<T>& call, int source, int64_t batch, TileRange queries,
                   const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, positions = call.sizes.positions;
  if (call.r[source] == nullptr) return;
  T* r = call.r[source] + batch * channels * positions + queries.first;
  for (int64_t channel = 0; channel < channels; ++channel) {
    std::memcpy(r + channel * positions, scratch.r + channel * kTile, queries.count * sizeof(T));
  }
  T* lse = call.lse[source] + batch * positions + queries.first;
  for (int64_t lane = 0; lane < queries.count; ++lane) lse[lane] = scratch.maximum[lane] + std::log(scratch.sum[lane]);
}

template <class T>
void query_task(const AttentionForward<T>& call, const Layout<T>& layout, int64_t batch, int64_t index,
                const ThreadScratch<T>& scratch) {
  const AttentionSizes& sizes = call.sizes;
  const TileRange queries = tile_of(index, sizes.positions);
  load_map_tile(call.sources[0].x, batch, queries, sizes.channels, scratch.hidden);
  std::memset(scratch.z, 0, padded_rows(sizes.value_channels) * kTile * sizeof(T));
  for (int source = 0; source < call.source_count; ++source) {
    attend(call, layout, source, batch, padded_lanes<T>(queries.count), scratch);
    store_context(call, source, batch, queries, scratch);
    multiply<T, Start::kAdd>(sizes.value_channels, kTile, sizes.channels, panels(layout.value[source], sizes.channels),
                             scratch.r, kTile, scratch.z, kTile);
  }
  add_bias(sizes.value_channels, call.value_bias, scratch.z);
  T* z = call.z + batch * sizes.value_channels * sizes.positions + queries.first;
  for (int64_t channel = 0; channel < sizes.value_channels; ++channel) {
    std::memcpy(z + channel * sizes.positions, scratch.z + channel * kTile, queries.count * sizeof(T));
  }
}

}  // namespace

template <class T>
void attention_forward(const AttentionForward<T>& call, int threads) {
  threads = useful_threads(threads, pair_work(call));
  Arena measure;
  Layout<T>(measure, call, threads);
  const Block block(measure.size());
  Arena arena(block.data());
  Layout<T> layout(arena, call, threads);
  const AttentionSizes& sizes = call.sizes;
  for (int s = 0; s < call.source_count; ++s) {
    layout.weights[s].pack(call.sources[s], sizes.channels);
    pack_panels(sizes.value_channels, sizes.channels, call.sources[s].value, sizes.channels, 1, layout.value[s]);
  }
  const int64_t tiles = layout.key_tiles, query_tasks = sizes.batch * tiles,
                key_tasks = query_tasks * call.source_count;
#pragma omp parallel num_threads(threads)
  {
    Arena own(block.data() + layout.scratch_base + thread_index() * layout.scratch_size);
    const ThreadScratch<T> scratch(own, sizes, layout.widest_query);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < key_tasks; ++task) {
      pack_keys(call, layout, static_cast<int>(task / query_tasks), task % query_tasks / tiles, task % tiles, scratch);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < query_tasks; ++task) query_task(call, layout, task / tiles, task % tiles, scratch);
  }
}

template void attention_forward<float>(const AttentionForward<float>&, int);
template void attention_forward<double>(const AttentionForward<double>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
