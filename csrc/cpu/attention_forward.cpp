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

// Positions of a key tile: the scores of a tile of queries stay in the L1 cache.
constexpr int64_t kKeys = 96;
static_assert(kKeys % kTile == 0, "a tile of queries must not straddle key tiles");

template <class T>
struct ThreadScratch {
  ThreadScratch(Arena& arena, const AttentionSizes& sizes, int64_t query_channels)
      : hidden(arena.take<T>(sizes.channels * kTile)),
        query(arena.take<T>(query_channels * kTile)),
        scores(arena.take<T>(kKeys * kTile)),
        r(arena.take<T>(sizes.channels * kTile)),
        z(arena.take<T>(sizes.value_channels * kTile)),
        maximum(arena.take<T>(kTile)),
        sum(arena.take<T>(kTile)) {}

  T *hidden, *query, *scores, *r, *z, *maximum, *sum;
};

// The maps without their shift as tiles of kKeys positions, beside their keys. The shift lies in the context if that is
// kept.
template <class S>
struct Layout {
  using T = Compute<S>;

  Layout(Arena& arena, const AttentionForward<S>& call, int threads) : tiles(tiles_in(call.sizes.positions, kKeys)) {
    const AttentionSizes& sizes = call.sizes;
    x_size = sizes.channels * kKeys;
    for (int s = 0; s < call.source_count; ++s) {
      keys_size[s] = call.sources[s].key == nullptr ? 0 : kKeys * call.sources[s].query_channels;
      shift[s] = call.shift[s] == nullptr ? arena.take<T>(sizes.batch * sizes.channels) : call.shift[s];
      x[s] = arena.take<T>(sizes.batch * tiles * x_size);
      keys[s] = arena.take<T>(sizes.batch * tiles * keys_size[s]);
    }
    scratch_base = arena.size();
    ThreadScratch<T> first(arena, sizes, widest_query(call));
    scratch_size = arena.size() - scratch_base;
    arena.take<char>(scratch_size * (threads - 1));
  }

  T* x_tile(int source, int64_t batch, int64_t tile) const { return x[source] + (batch * tiles + tile) * x_size; }
  T* key_tile(int source, int64_t batch, int64_t tile) const {
    return keys[source] + (batch * tiles + tile) * keys_size[source];
  }

  int64_t tiles, x_size, keys_size[kMaxSources], scratch_base, scratch_size;
  T *shift[kMaxSources], *x[kMaxSources], *keys[kMaxSources];
};

// The mean of each channel over the positions, 0 where that is not finite: such channels stay as they are.
template <class S, class T>
void choose_shift(const Map<const S>& map, int64_t batch, int64_t channels, int64_t positions, T* shift) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    const S* row = map.data + batch * map.stride_batch + channel * map.stride_channel;
    Vec<T> sum = broadcast(T(0));
    int64_t lane = 0;
    for (; lane + kLanes<T> <= positions; lane += kLanes<T>) sum += load(row + lane);
    if (lane < positions) sum += load_part(row + lane, positions - lane);
    const T mean = sum_lanes<T>(sum) / static_cast<T>(positions);
    shift[channel] = mean - mean == T(0) ? mean : T(0);
  }
}

// Turns the scores of `count` keys into unnormalised weights and brings r and the sum to the new maximum, for
// `Columns` vectors of queries.
template <class T, int Columns>
void softmax_columns(int64_t count, int64_t channels, T* scores, T* r, T* running_maximum, T* running_sum) {
  const T infinity = std::numeric_limits<T>::infinity();
  Vec<T> maximum[Columns], shift[Columns], sum[Columns];
  for (int column = 0; column < Columns; ++column) maximum[column] = load(running_maximum + column * kLanes<T>);
  for (int64_t key = 0; key < count; ++key) {
    for (int column = 0; column < Columns; ++column)
      maximum[column] = larger<T>(load(scores + key * kTile + column * kLanes<T>), maximum[column]);
  }
  for (int column = 0; column < Columns; ++column) {
    // While every score is -inf the shift must stay finite, or later finite scores would meet inf - inf.
    shift[column] = where<T>(broadcast(-infinity), maximum[column], maximum[column], broadcast(T(0)));
    sum[column] = broadcast(T(0));
  }
  for (int64_t key = 0; key < count; ++key) {
    for (int column = 0; column < Columns; ++column) {
      T* score = scores + key * kTile + column * kLanes<T>;
      const Vec<T> weight = softmax_exponential<T>(load(score) - shift[column]);
      sum[column] += weight;
      store(score, weight);
    }
  }
  for (int column = 0; column < Columns; ++column) {
    const int64_t lane = column * kLanes<T>;
    const Vec<T> factor = softmax_exponential<T>(load(running_maximum + lane) - shift[column]);
    store(running_maximum + lane, maximum[column]);
    store(running_sum + lane, load(running_sum + lane) * factor + sum[column]);
    for (int64_t channel = 0; channel < channels; ++channel)
      store(r + channel * kTile + lane, load(r + channel * kTile + lane) * factor);
  }
}

template <class T>
void softmax_step(int64_t count, int64_t lanes, int64_t channels, const ThreadScratch<T>& scratch) {
  constexpr int columns = 2;
  int64_t lane = 0;
  for (; lane + columns * kLanes<T> <= lanes; lane += columns * kLanes<T>)
    softmax_columns<T, columns>(count, channels, scratch.scores + lane, scratch.r + lane, scratch.maximum + lane,
                                scratch.sum + lane);
  if (lane < lanes)
    softmax_columns<T, 1>(count, channels, scratch.scores + lane, scratch.r + lane, scratch.maximum + lane,
                          scratch.sum + lane);
}

// R, without the shift, of the tile of queries in scratch.query, with its running maximum and sum.
template <class S, class T>
void attend(const AttentionForward<S>& call, const Layout<S>& layout, int source, int64_t batch, int64_t lanes,
            const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, depth = call.sources[source].query_channels;
  for (int64_t lane = 0; lane < kTile; ++lane) {
    scratch.maximum[lane] = -std::numeric_limits<T>::infinity();
    scratch.sum[lane] = T(0);
  }
  std::memset(scratch.r, 0, channels * kTile * sizeof(T));
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    const int64_t count = tile_of(tile, call.sizes.positions, kKeys).count;
    const T* x = layout.x_tile(source, batch, tile);
    const T* keys = call.sources[source].key == nullptr ? x : layout.key_tile(source, batch, tile);
    multiply<T, Start::kZero>(count, lanes, depth, columns_of(keys, kKeys), scratch.query, kTile, scratch.scores,
                              kTile);
    softmax_step(count, lanes, channels, scratch);
    multiply<T, Start::kAdd>(channels, lanes, count, rows_of(x, kKeys), scratch.scores, kTile, scratch.r, kTile);
  }
  for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
    const Vec<T> sum = load(scratch.sum + lane);
    for (T* r = scratch.r + lane; r < scratch.r + channels * kTile; r += kTile) store(r, load(r) / sum);
  }
}

template <class S, class T>
void store_context(const AttentionForward<S>& call, int source, int64_t batch, TileRange queries,
                   const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, positions = call.sizes.positions;
  if (call.r[source] == nullptr) return;
  store_tile(channels, queries.count, scratch.r, kTile, call.r[source] + batch * channels * positions + queries.first,
             positions);
  T* lse = call.lse[source] + batch * positions + queries.first;
  for (int64_t lane = 0; lane < queries.count; ++lane) lse[lane] = scratch.maximum[lane] + std::log(scratch.sum[lane]);
}

template <class S, class T>
void query_task(const AttentionForward<S>& call, const Layout<S>& layout, int64_t batch, int64_t index,
                const ThreadScratch<T>& scratch) {
  const AttentionSizes& sizes = call.sizes;
  const TileRange queries = tile_of(index, sizes.positions);
  const int64_t lanes = padded_lanes<T>(queries.count);
  load_map_tile(call.sources[0].x, batch, queries, sizes.channels, scratch.hidden);
  std::memset(scratch.z, 0, sizes.value_channels * kTile * sizeof(T));
  for (int source = 0; source < call.source_count; ++source) {
    query_tile(call.sources[source], sizes.channels, scratch.hidden, scratch.query);
    attend(call, layout, source, batch, lanes, scratch);
    store_context(call, source, batch, queries, scratch);
    shift_rows(sizes.channels, lanes, layout.shift[source] + batch * sizes.channels, T(1), scratch.r, kTile);
    multiply<T, Start::kAdd>(sizes.value_channels, lanes, sizes.channels,
                             rows_of(call.sources[source].value, sizes.channels), scratch.r, kTile, scratch.z, kTile);
  }
  shift_rows(sizes.value_channels, lanes, call.value_bias, T(1), scratch.z, kTile);
  store_tile(sizes.value_channels, queries.count, scratch.z, kTile,
             call.z + batch * sizes.value_channels * sizes.positions + queries.first, sizes.positions);
}

template <class S>
void key_task(const AttentionForward<S>& call, const Layout<S>& layout, int source, int64_t batch, int64_t tile) {
  const int64_t channels = call.sizes.channels;
  Compute<S>* x = layout.x_tile(source, batch, tile);
  load_shifted_tile(call.sources[source].x, batch, tile_of(tile, call.sizes.positions, kKeys), channels,
                    layout.shift[source], x, kKeys);
  key_tile(call.sources[source], channels, x, kKeys, layout.key_tile(source, batch, tile));
}

}  // namespace

template <class S>
void attention_forward(const AttentionForward<S>& call, int threads) {
  threads = useful_threads(threads, pair_work(call));
  Arena measure;
  Layout<S>(measure, call, threads);
  const Workspace workspace(measure.size());
  Arena arena(workspace.data());
  const Layout<S> layout(arena, call, threads);
  const int64_t batch = call.sizes.batch, key_tiles = layout.tiles, key_tasks = batch * key_tiles,
                query_tiles = tiles_in(call.sizes.positions), query_tasks = batch * query_tiles;
#pragma omp parallel num_threads(threads)
  {
    Arena own(workspace.data() + layout.scratch_base + thread_index() * layout.scratch_size);
    const ThreadScratch<Compute<S>> scratch(own, call.sizes, widest_query(call));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch * call.source_count; ++task) {
      choose_shift(call.sources[task / batch].x, task % batch, call.sizes.channels, call.sizes.positions,
                   layout.shift[task / batch] + task % batch * call.sizes.channels);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < key_tasks * call.source_count; ++task) {
      key_task(call, layout, static_cast<int>(task / key_tasks), task % key_tasks / key_tiles, task % key_tiles);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < query_tasks; ++task)
      query_task(call, layout, task / query_tiles, task % query_tiles, scratch);
  }
}

template void attention_forward<float>(const AttentionForward<float>&, int);
template void attention_forward<double>(const AttentionForward<double>&, int);
template void attention_forward<bfloat16>(const AttentionForward<bfloat16>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
