// Gradients of z = sum over the sources of value R + value_bias. Equations: fastsam/ops/_attention/eager.py,
// `backward`.
//
// Three stages, each a set of independent tasks, with sums over tasks in a fixed order, so that the result does not
// depend on the number of threads:
//   1. query tiles: dR = value^T dz, delta, and packed copies of what stage 2 reads; dvalue.
//   2. groups of key tiles: for each key tile all the query tiles. The softmax weights P and their gradient dE exist
//      one kTile x kTile tile at a time. Gives dx and dkeys of the tile, and the group's share of dquery.
//   3. query tiles: dquery summed over the groups; what flows back into the hidden state and the query map.
// P and dE have queries as rows and keys as lanes: then dx, dkeys and dquery are all plain products without a
// transpose.

#include "attention.h"
#include "kernels_internal.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// About this many tasks a stage keep any common number of cores busy. A constant, not the number of threads: it sets
// the order of the sums.
constexpr int64_t kTasks = 64;

// What stage 2 reads of one query tile, packed as left factors.
template <class T>
struct QueryTile {
  QueryTile(T* base, int64_t channels, int64_t depth)
      : query_rows(base),
        query(query_rows + kTile * depth),
        dr_rows(query + padded_rows(depth) * kTile),
        dr(dr_rows + kTile * channels),
        lse(dr + padded_rows(channels) * kTile),
        delta(lse + kTile) {}

  static int64_t size(int64_t channels, int64_t depth) {
    return kTile * (depth + padded_rows(depth) + channels + padded_rows(channels) + 2);
  }

  T* query_rows;  // (kTile x D): rows are queries
  T* query;       // (D x kTile): depth is queries
  T* dr_rows;     // (kTile x C)
  T* dr;          // (C x kTile)
  T *lse, *delta;
};

// Sums of weight gradients over the tiles of one task.
template <class T>
struct QueryPartials {
  T *score, *score_bias, *value;
};

template <class T>
struct SourceLayout {
  SourceLayout() = default;
  SourceLayout(Arena& arena, const AttentionBackward<T>& call, int source, int64_t tiles, int64_t query_groups,
               int64_t key_groups)
      : weights(arena, call.sources[source], call.sizes) {
    const int64_t batch = call.sizes.batch, channels = call.sizes.channels, depth = call.sources[source].query_channels;
    const int64_t channel_lanes = padded_lanes<T>(channels);
    query_lanes = padded_lanes<T>(depth);
    tile_size = QueryTile<T>::size(channels, depth);
    value_columns = arena.take<T>(padded_rows(channels) * call.sizes.value_channels);
    score_columns = arena.take<T>(padded_rows(channels) * depth);
    key_columns = arena.take<T>(padded_rows(channels) * depth);
    query_tiles = arena.take<T>(batch * tiles * tile_size);
    dquery = arena.take<T>(batch * key_groups * tiles * kTile * query_lanes);
    score_size = padded_rows(depth) * channel_lanes;
    value_size = padded_rows(call.sizes.value_channels) * channel_lanes;
    bias_size = depth;
    dscore = arena.take<T>(batch * query_groups * score_size);
    dscore_bias = arena.take<T>(batch * query_groups * bias_size);
    dvalue = arena.take<T>(batch * query_groups * value_size);
    dkey = arena.take<T>(batch * key_groups * score_size);
  }

  PackedSource<T> weights;
  int64_t query_lanes = 0, tile_size = 0, score_size = 0, value_size = 0, bias_size = 0;
  T *value_columns, *score_columns, *key_columns;  // value^T, score^T, key^T as left factors
  T* query_tiles;
  T* dquery;                                // (B, key group, N, D): rows are queries
  T *dscore, *dscore_bias, *dvalue, *dkey;  // one a task
};

template <class T>
struct ThreadScratch {
  ThreadScratch(Arena& arena, const AttentionSizes& sizes, int64_t depth)
      : hidden(arena.take<T>(padded_rows(sizes.channels) * kTile)),
        hidden_rows(arena.take<T>(kTile * padded_lanes<T>(sizes.channels))),
        dz(arena.take<T>(padded_rows(sizes.value_channels) * kTile)),
        dr(arena.take<T>(padded_rows(sizes.channels) * kTile)),
        query(arena.take<T>(padded_rows(depth) * kTile)),
        key_rows(arena.take<T>(kTile * padded_lanes<T>(depth))),
        weights(arena.take<T>(kTile * kTile)),
        dscores(arena.take<T>(kTile * kTile)),
        dx(arena.take<T>(padded_rows(sizes.channels) * kTile)),
        dkeys(arena.take<T>(padded_rows(depth) * kTile)) {}

  T *hidden, *hidden_rows, *dz, *dr, *query, *key_rows, *weights, *dscores, *dx, *dkeys;
};

template <class T>
struct Layout {
  Layout(Arena& arena, const AttentionBackward<T>& call, int threads) : tiles(tiles_in(call.sizes.positions)) {
    const int64_t batch = call.sizes.batch;
    query_groups = smaller(tiles, (kTasks + batch - 1) / batch);
    key_groups = smaller(tiles, (kTasks + batch * call.source_count - 1) / (batch * call.source_count));
    for (int s = 0; s < call.source_count; ++s) {
      sources[s] = SourceLayout<T>(arena, call, s, tiles, query_groups, key_groups);
      const int64_t depth = call.sources[s].query_channels;
      widest_query = depth > widest_query ? depth : widest_query;
    }
    dvalue_bias = arena.take<T>(batch * query_groups * call.sizes.value_channels);
    scratch_base = arena.size();
    ThreadScratch<T> first(arena, call.sizes, widest_query);
    scratch_size = arena.size() - scratch_base;
    arena.take<char>(scratch_size * (threads - 1));
  }

  int64_t tiles, query_groups, key_groups, widest_query = 0, scratch_base, scratch_size;
  SourceLayout<T> sources[kMaxSources];
  T* dvalue_bias;
};

// The tiles of group `group` of `groups`.
inline TileRange tiles_of_group(int64_t tiles, int64_t group, int64_t groups) {
  const int64_t first = tiles * group / groups;
  return {first, tiles * (group + 1) / groups - first};
}

// sum += row sums of a tile whose lanes beyond the map are 0.
template <class T>
void add_row_sums(int64_t rows, const T* tile, T* sum) {
  for (int64_t row = 0; row < rows; ++row) {
    Vec<T> total = broadcast(T(0));
    for (int64_t lane = 0; lane < kTile; lane += kLanes<T>) total += load(tile + row * kTile + lane);
    sum[row] += sum_lanes<T>(total);
  }
}

template <class T>
void pack_query_tile(const AttentionBackward<T>& call, const Layout<T>& layout, int source, int64_t batch,
                     TileRange queries, const QueryTile<T>& out, const ThreadScratch<T>& scratch, T* dvalue) {
  const AttentionSizes& sizes = call.sizes;
  const int64_t channels = sizes.channels, depth = call.sources[source].query_channels;
  const SourceLayout<T>& of = layout.sources[source];
  query_tile(of.weights, call.sources[source].score_bias, channels, scratch.hidden, scratch.query);
  pack_panels(kTile, depth, scratch.query, 1, kTile, out.query_rows);
  pack_panels(depth, kTile, scratch.query, kTile, 1, out.query);

  multiply<T, Start::kZero>(channels, kTile, sizes.value_channels, panels(of.value_columns, sizes.value_channels),
                            scratch.dz, kTile, scratch.dr, kTile);
  pack_panels(kTile, channels, scratch.dr, 1, kTile, out.dr_rows);
  pack_panels(channels, kTile, scratch.dr, kTile, 1, out.dr);

  const Map<const T> r_map{call.r[source], channels * sizes.positions, sizes.positions};
  load_map_tile(r_map, batch, queries, channels, scratch.dx);
  for (int64_t lane = 0; lane < kTile; lane += kLanes<T>) {
    Vec<T> delta = broadcast(T(0));
    for (int64_t channel = 0; channel < channels; ++channel) {
      delta += load(scratch.dr + channel * kTile + lane) * load(scratch.dx + channel * kTile + lane);
    }
    store(out.delta + lane, delta);
  }
  copy_tile(1, queries.count, call.lse[source] + batch * sizes.positions + queries.first, 0, out.lse, kTile);

  const int64_t channel_lanes = padded_lanes<T>(channels);
  transpose_tile(channels, kTile, scratch.dx, kTile, scratch.hidden_rows, channel_lanes);
  multiply<T, Start::kAdd>(sizes.value_channels, channels, kTile, rows_of(scratch.dz, kTile), scratch.hidden_rows,
                           channel_lanes, dvalue, channel_lanes);
}

template <class T>
void query_stage(const AttentionBackward<T>& call, const Layout<T>& layout, int64_t batch, int64_t group,
                 const ThreadScratch<T>& scratch) {
  const AttentionSizes& sizes = call.sizes;
  const int64_t task = batch * layout.query_groups + group;
  T* dvalue_bias = layout.dvalue_bias + task * sizes.value_channels;
  std::memset(dvalue_bias, 0, sizes.value_channels * sizeof(T));
  for (int s = 0; s < call.source_count; ++s) {
    const SourceLayout<T>& of = layout.sources[s];
    std::memset(of.dvalue + task * of.value_size, 0, of.value_size * sizeof(T));
  }
  const TileRange tiles = tiles_of_group(layout.tiles, group, layout.query_groups);
  for (int64_t index = tiles.first; index < tiles.first + tiles.count; ++index) {
    const TileRange queries = tile_of(index, sizes.positions);
    load_map_tile(call.sources[0].x, batch, queries, sizes.channels, scratch.hidden);
    load_map_tile(call.dz, batch, queries, sizes.value_channels, scratch.dz);
    add_row_sums(sizes.value_channels, scratch.dz, dvalue_bias);
    for (int s = 0; s < call.source_count; ++s) {
      const SourceLayout<T>& of = layout.sources[s];
      const QueryTile<T> out(of.query_tiles + (batch * layout.tiles + index) * of.tile_size, sizes.channels,
                             call.sources[s].query_channels);
      pack_query_tile(call, layout, s, batch, queries, out, scratch, of.dvalue + task * of.value_size);
    }
  }
}

// P = exp(E - lse) and dE = P (dP - delta), with E in `weights` and dP in `dscores`.
template <class T>
void softmax_gradient(int64_t queries, int64_t lanes, const QueryTile<T>& tile, T* weights, T* dscores) {
  for (int64_t query = 0; query < queries; ++query) {
    const Vec<T> lse = broadcast(tile.lse[query]), delta = broadcast(tile.delta[query]);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
      T* weight = weights + query * kTile + lane;
      T* dscore = dscores + query * kTile + lane;
      const Vec<T> p = exponential<T>(load(weight) - lse);
      store(weight, p);
      store(dscore, p * (load(dscore) - delta));
    }
  }
}

// What flows back through the keys of one tile, and its share of the key map's gradient.
template <class T>
void finish_keys(const AttentionBackward<T>& call, const Layout<T>& layout, int source, int64_t count,
                 const ThreadScratch<T>& scratch, T* dkey) {
  const int64_t channels = call.sizes.channels, depth = call.sources[source].query_channels;
  const SourceLayout<T>& of = layout.sources[source];
  if (call.sources[source].key == nullptr) {
    for (int64_t at = 0; at < channels * kTile; at += kLanes<T>)
      store(scratch.dx + at, load(scratch.dx + at) + load(scratch.dkeys + at));
    return;
  }
  multiply<T, Start::kAdd>(channels, kTile, depth, panels(of.key_columns, depth), scratch.dkeys, kTile, scratch.dx,
                           kTile);
  const int64_t channel_lanes = padded_lanes<T>(channels);
  transpose_tile(channels, kTile, scratch.hidden, kTile, scratch.hidden_rows, channel_lanes);
  multiply<T, Start::kAdd>(depth, channels, count, rows_of(scratch.dkeys, kTile), scratch.hidden_rows, channel_lanes,
                           dkey, channel_lanes);
}

template <class T>
void key_tile_task(const AttentionBackward<T>& call, const Layout<T>& layout, int source, int64_t batch,
                   TileRange keys_range, T* dquery, T* dkey, const ThreadScratch<T>& scratch) {
  const AttentionSizes& sizes = call.sizes;
  const int64_t channels = sizes.channels, depth = call.sources[source].query_channels;
  const int64_t lanes = padded_lanes<T>(keys_range.count);
  const SourceLayout<T>& of = layout.sources[source];
  load_map_tile(call.sources[source].x, batch, keys_range, channels, scratch.hidden);
  const T* keys = key_tile(of.weights, channels, scratch.hidden, scratch.query);
  transpose_tile(depth, kTile, keys, kTile, scratch.key_rows, of.query_lanes);
  std::memset(scratch.dx, 0, padded_rows(channels) * kTile * sizeof(T));
  std::memset(scratch.dkeys, 0, padded_rows(depth) * kTile * sizeof(T));
  for (int64_t index = 0; index < layout.tiles; ++index) {
    const int64_t queries = tile_of(index, sizes.positions).count;
    const QueryTile<T> tile(of.query_tiles + (batch * layout.tiles + index) * of.tile_size, channels, depth);
    multiply<T, Start::kZero>(queries, lanes, depth, panels(tile.query_rows, depth), keys, kTile, scratch.weights,
                              kTile);
    multiply<T, Start::kZero>(queries, lanes, channels, panels(tile.dr_rows, channels), scratch.hidden, kTile,
                              scratch.dscores, kTile);
    softmax_gradient(queries, lanes, tile, scratch.weights, scratch.dscores);
    multiply<T, Start::kAdd>(channels, lanes, queries, panels(tile.dr, kTile), scratch.weights, kTile, scratch.dx,
                             kTile);
    multiply<T, Start::kAdd>(depth, lanes, queries, panels(tile.query, kTile), scratch.dscores, kTile, scratch.dkeys,
                             kTile);
    multiply<T, Start::kAdd>(queries, depth, keys_range.count, rows_of(scratch.dscores, kTile), scratch.key_rows,
                             of.query_lanes, dquery + index * kTile * of.query_lanes, of.query_lanes);
  }
  finish_keys(call, layout, source, keys_range.count, scratch, dkey);
  T* dx = call.gradients[source].x + batch * channels * sizes.positions + keys_range.first;
  for (int64_t channel = 0; channel < channels; ++channel) {
    std::memcpy(dx + channel * sizes.positions, scratch.dx + channel * kTile, keys_range.count * sizeof(T));
  }
}

template <class T>
void key_stage(const AttentionBackward<T>& call, const Layout<T>& layout, int source, int64_t batch, int64_t group,
               const ThreadScratch<T>& scratch) {
  const SourceLayout<T>& of = layout.sources[source];
  const int64_t task = batch * layout.key_groups + group, dquery_size = layout.tiles * kTile * of.query_lanes;
  T* dquery = of.dquery + task * dquery_size;
  T* dkey = of.dkey + task * of.score_size;
  std::memset(dquery, 0, dquery_size * sizeof(T));
  std::memset(dkey, 0, of.score_size * sizeof(T));
  const TileRange tiles = tiles_of_group(layout.tiles, group, layout.key_groups);
  for (int64_t index = tiles.first; index < tiles.first + tiles.count; ++index) {
    key_tile_task(call, layout, source, batch, tile_of(index, call.sizes.positions), dquery, dkey, scratch);
  }
}

// Sums dquery of a tile over the key groups into scratch.query, (D x kTile), with 0 beyond the map.
template <class T>
void sum_dquery(const Layout<T>& layout, const SourceLayout<T>& of, int64_t depth, int64_t batch, int64_t index,
                TileRange queries, const ThreadScratch<T>& scratch) {
  const int64_t size = kTile * of.query_lanes;
  const T* share = of.dquery + (batch * layout.key_groups * layout.tiles + index) * size;
  std::memcpy(scratch.key_rows, share, size * sizeof(T));
  for (int64_t group = 1; group < layout.key_groups; ++group) {
    share += layout.tiles * size;
    for (int64_t at = 0; at < size; at += kLanes<T>)
      store(scratch.key_rows + at, load(scratch.key_rows + at) + load(share + at));
  }
  for (int64_t at = queries.count * of.query_lanes; at < size; ++at) scratch.key_rows[at] = T(0);
  transpose_tile(kTile, depth, scratch.key_rows, of.query_lanes, scratch.query, kTile);
}

template <class T>
void query_gradient_stage(const AttentionBackward<T>& call, const Layout<T>& layout, int64_t batch, int64_t group,
                          const ThreadScratch<T>& scratch) {
  const AttentionSizes& sizes = call.sizes;
  const int64_t channels = sizes.channels, channel_lanes = padded_lanes<T>(channels),
                task = batch * layout.query_groups + group;
  for (int s = 0; s < call.source_count; ++s) {
    const SourceLayout<T>& of = layout.sources[s];
    std::memset(of.dscore + task * of.score_size, 0, of.score_size * sizeof(T));
    std::memset(of.dscore_bias + task * of.bias_size, 0, of.bias_size * sizeof(T));
  }
  const TileRange tiles = tiles_of_group(layout.tiles, group, layout.query_groups);
  for (int64_t index = tiles.first; index < tiles.first + tiles.count; ++index) {
    const TileRange queries = tile_of(index, sizes.positions);
    load_map_tile(call.sources[0].x, batch, queries, channels, scratch.hidden);
    transpose_tile(channels, kTile, scratch.hidden, kTile, scratch.hidden_rows, channel_lanes);
    T* dh = call.gradients[0].x + batch * channels * sizes.positions + queries.first;
    copy_tile(channels, queries.count, dh, sizes.positions, scratch.dx, kTile);
    for (int s = 0; s < call.source_count; ++s) {
      const SourceLayout<T>& of = layout.sources[s];
      const int64_t depth = call.sources[s].query_channels;
      sum_dquery(layout, of, depth, batch, index, queries, scratch);
      multiply<T, Start::kAdd>(channels, kTile, depth, panels(of.score_columns, depth), scratch.query, kTile,
                               scratch.dx, kTile);
      multiply<T, Start::kAdd>(depth, channels, kTile, rows_of(scratch.query, kTile), scratch.hidden_rows,
                               channel_lanes, of.dscore + task * of.score_size, channel_lanes);
      add_row_sums(depth, scratch.query, of.dscore_bias + task * of.bias_size);
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      std::memcpy(dh + channel * sizes.positions, scratch.dx + channel * kTile, queries.count * sizeof(T));
    }
  }
}

template <class T>
void reduce_source(const AttentionBackward<T>& call, const Layout<T>& layout, int source) {
  const AttentionSizes& sizes = call.sizes;
  const SourceLayout<T>& of = layout.sources[source];
  const AttentionGradients<T>& out = call.gradients[source];
  const int64_t depth = call.sources[source].query_channels, channels = sizes.channels,
                lanes = padded_lanes<T>(channels);
  const int64_t query_tasks = sizes.batch * layout.query_groups, key_tasks = sizes.batch * layout.key_groups;
  reduce(query_tasks, depth, channels, of.dscore, of.score_size, lanes, out.score);
  reduce(query_tasks, 1, depth, of.dscore_bias, of.bias_size, depth, out.score_bias);
  reduce(query_tasks, sizes.value_channels, channels, of.dvalue, of.value_size, lanes, out.value);
  if (out.key != nullptr) reduce(key_tasks, depth, channels, of.dkey, of.score_size, lanes, out.key);
}

template <class T>
void pack_weights(const AttentionBackward<T>& call, const Layout<T>& layout) {
  const int64_t channels = call.sizes.channels;
  for (int s = 0; s < call.source_count; ++s) {
    const AttentionSource<T>& source = call.sources[s];
    SourceLayout<T> of = layout.sources[s];
    of.weights.pack(source, channels);
    pack_panels(channels, call.sizes.value_channels, source.value, 1, channels, of.value_columns);
    pack_panels(channels, source.query_channels, source.score, 1, channels, of.score_columns);
    if (source.key != nullptr) pack_panels(channels, source.query_channels, source.key, 1, channels, of.key_columns);
  }
}

}  // namespace

template <class T>
void attention_backward(const AttentionBackward<T>& call, int threads) {
  threads = useful_threads(threads, pair_work(call));
  Arena measure;
  Layout<T>(measure, call, threads);
  const Block block(measure.size());
  Arena arena(block.data());
  const Layout<T> layout(arena, call, threads);
  pack_weights(call, layout);
  const int64_t batch = call.sizes.batch, query_tasks = batch * layout.query_groups,
                key_tasks = batch * layout.key_groups;
#pragma omp parallel num_threads(threads)
  {
    Arena own(block.data() + layout.scratch_base + thread_index() * layout.scratch_size);
    const ThreadScratch<T> scratch(own, call.sizes, layout.widest_query);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < query_tasks; ++task) {
      query_stage(call, layout, task / layout.query_groups, task % layout.query_groups, scratch);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < key_tasks * call.source_count; ++task) {
      key_stage(call, layout, static_cast<int>(task / key_tasks), task % key_tasks / layout.key_groups,
                task % layout.key_groups, scratch);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < query_tasks; ++task) {
      query_gradient_stage(call, layout, task / layout.query_groups, task % layout.query_groups, scratch);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task <= call.source_count; ++task) {
      if (task < call.source_count) {
        reduce_source(call, layout, static_cast<int>(task));
      } else {
        reduce(query_tasks, 1, call.sizes.value_channels, layout.dvalue_bias, call.sizes.value_channels,
               call.sizes.value_channels, call.dvalue_bias);
      }
    }
  }
}

template void attention_backward<float>(const AttentionBackward<float>&, int);
template void attention_backward<double>(const AttentionBackward<double>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
