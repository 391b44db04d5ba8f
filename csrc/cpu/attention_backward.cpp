// Gradients of z = sum over the sources of value R + value_bias. Equations: fastsam/ops/_attention/eager.py,
// `backward`.
//
// Three stages, each a set of independent tasks, with sums over tasks in a fixed order, so that the result does not
// depend on the number of threads:
//   1. query tiles: dR = value^T dz, delta, and the queries, kept for stage 2; dvalue.
//   2. groups of key tiles: for each key tile all the query tiles. The softmax weights P and their gradient dE exist
//      one kTile x kTile tile at a time. Gives dx and dkeys of the tile, and the group's share of dquery.
//   3. query tiles: dquery summed over the groups; what flows back into the hidden state and the query map.
// Columns and R are those without the shift of the context (attention.h), but where R enters dvalue and the hidden
// state its own products.
//
// P and dE have queries as rows and keys as lanes: then dx, dkeys and dquery are all plain products without a
// transpose. Stage 2 is where the time goes.

#include "attention.h"
#include "kernels_internal.h"

namespace fastsam {
namespace FASTSAM_ISA {
namespace {

// About this many tasks a stage keep any common number of cores busy. Constants, not the number of threads: they set
// the order of the sums. Every group of keys has its own dquery, hence fewer of them.
constexpr int64_t kQueryTasks = 64, kKeyTasks = 32;

// What stage 2 reads of one query tile.
template <class T>
struct QueryTile {
  QueryTile(T* base, int64_t channels, int64_t depth)
      : query(base), dr(query + depth * kTile), lse(dr + channels * kTile), delta(lse + kTile) {}

  static int64_t size(int64_t channels, int64_t depth) { return kTile * (depth + channels + 2); }

  T* query;        // (D x kTile)
  T* dr;           // (C x kTile)
  T *lse, *delta;  // (kTile)
};

// Sums of weight gradients have one copy a task, (C x D) for the query and key maps, so that D, the smaller, is lanes.
template <class T>
struct SourceLayout {
  SourceLayout() = default;
  SourceLayout(Arena& arena, const AttentionSizes& sizes, int64_t depth, int64_t tiles, int64_t query_groups,
               int64_t key_groups)
      : query_lanes(padded_lanes<T>(depth)),
        tile_size(QueryTile<T>::size(sizes.channels, depth)),
        map_size(sizes.channels * query_lanes),
        value_size(sizes.value_channels * padded_lanes<T>(sizes.channels)),
        query_tiles(arena.take<T>(sizes.batch * tiles * tile_size)),
        dquery(arena.take<T>(sizes.batch * key_groups * tiles * kTile * query_lanes)),
        dscore(arena.take<T>(sizes.batch * query_groups * map_size)),
        dscore_bias(arena.take<T>(sizes.batch * query_groups * query_lanes)),
        dvalue(arena.take<T>(sizes.batch * query_groups * value_size)),
        dkey(arena.take<T>(sizes.batch * key_groups * map_size)) {}

  int64_t query_lanes = 0, tile_size = 0, map_size = 0, value_size = 0;
  T* query_tiles = nullptr;
  T* dquery = nullptr;  // (B, key group, N, D): rows are queries
  T *dscore = nullptr, *dscore_bias = nullptr, *dvalue = nullptr, *dkey = nullptr;
};

template <class T>
struct ThreadScratch {
  ThreadScratch(Arena& arena, const AttentionSizes& sizes, int64_t depth)
      : x(arena.take<T>(sizes.channels * kTile)),
        dx(arena.take<T>(sizes.channels * kTile)),
        dz(arena.take<T>(sizes.value_channels * kTile)),
        r_rows(arena.take<T>(kTile * padded_lanes<T>(sizes.channels))),
        keys(arena.take<T>(depth * kTile)),
        dkeys(arena.take<T>(depth * kTile)),
        rows(arena.take<T>(kTile * padded_lanes<T>(depth))),
        weights(arena.take<T>(kTile * kTile)),
        dscores(arena.take<T>(kTile * kTile)) {}

  T *x, *dx;        // (C x kTile)
  T *dz, *r_rows;   // (Cz x kTile), (kTile x C)
  T *keys, *dkeys;  // (D x kTile)
  T* rows;          // (kTile x D)
  T *weights, *dscores;
};

template <class S>
struct Layout {
  using T = Compute<S>;

  Layout(Arena& arena, const AttentionBackward<S>& call, int threads) : tiles(tiles_in(call.sizes.positions)) {
    const AttentionSizes& sizes = call.sizes;
    query_groups = smaller(tiles, (kQueryTasks + sizes.batch - 1) / sizes.batch);
    key_groups = smaller(tiles, (kKeyTasks + sizes.batch * call.source_count - 1) / (sizes.batch * call.source_count));
    for (int s = 0; s < call.source_count; ++s)
      sources[s] = SourceLayout<T>(arena, sizes, call.sources[s].query_channels, tiles, query_groups, key_groups);
    dvalue_bias = arena.take<T>(sizes.batch * query_groups * sizes.value_channels);
    // Stage 3 adds to the hidden state's gradient of stage 2: in place, unless that would round it twice.
    if constexpr (std::is_same_v<S, T>) {
      dh = call.gradients[0].x;
    } else {
      dh = arena.take<T>(sizes.batch * sizes.channels * sizes.positions);
    }
    scratch_base = arena.size();
    ThreadScratch<T> first(arena, sizes, widest_query(call));
    scratch_size = arena.size() - scratch_base;
    arena.take<char>(scratch_size * (threads - 1));
  }

  QueryTile<T> query_tile(const AttentionBackward<S>& call, int source, int64_t batch, int64_t index) const {
    const SourceLayout<T>& of = sources[source];
    return {of.query_tiles + (batch * tiles + index) * of.tile_size, call.sizes.channels,
            call.sources[source].query_channels};
  }

  int64_t tiles, query_groups, key_groups, scratch_base, scratch_size;
  SourceLayout<T> sources[kMaxSources];
  T *dvalue_bias, *dh;
};

// The tiles of group `group` of `groups`.
inline TileRange tiles_of_group(int64_t tiles, int64_t group, int64_t groups) {
  const int64_t first = tiles * group / groups;
  return {first, tiles * (group + 1) / groups - first};
}

// One query tile of one source for stage 2, from dz in the scratch; adds to dvalue.
template <class S, class T>
void prepare_queries(const AttentionBackward<S>& call, const Layout<S>& layout, int source, int64_t batch,
                     int64_t index, const ThreadScratch<T>& scratch, T* dvalue) {
  const AttentionSizes& sizes = call.sizes;
  const AttentionSource<S>& of = call.sources[source];
  const int64_t channels = sizes.channels, channel_lanes = padded_lanes<T>(channels);
  const TileRange queries = tile_of(index, sizes.positions);
  const QueryTile<T> out = layout.query_tile(call, source, batch, index);
  query_tile(of, channels, scratch.x, out.query);
  multiply<T, Start::kZero>(channels, kTile, sizes.value_channels, columns_of(of.value, channels), scratch.dz, kTile,
                            out.dr, kTile);
  const Map<const T> r{call.r[source], channels * sizes.positions, sizes.positions};
  load_map_tile(r, batch, queries, channels, scratch.dx);
  copy_tile(1, queries.count, call.lse[source] + batch * sizes.positions + queries.first, 0, out.lse, kTile);
  for (int64_t lane = 0; lane < kTile; lane += kLanes<T>) {
    Vec<T> delta = broadcast(T(0));
    for (int64_t at = lane; at < channels * kTile; at += kTile) delta += load(out.dr + at) * load(scratch.dx + at);
    store(out.delta + lane, delta);
  }
  shift_rows(channels, queries.count, call.shift[source] + batch * channels, T(1), scratch.dx, kTile);
  transpose_tile(channels, queries.count, scratch.dx, kTile, scratch.r_rows, channel_lanes);
  multiply<T, Start::kAdd>(sizes.value_channels, channels, queries.count, rows_of<T>(scratch.dz, kTile), scratch.r_rows,
                           channel_lanes, dvalue, channel_lanes);
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

template <class S, class T>
void query_stage(const AttentionBackward<S>& call, const Layout<S>& layout, int64_t batch, int64_t group,
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
    load_map_tile(call.sources[0].x, batch, queries, sizes.channels, scratch.x);
    load_map_tile(call.dz, batch, queries, sizes.value_channels, scratch.dz);
    add_row_sums(sizes.value_channels, scratch.dz, dvalue_bias);
    for (int s = 0; s < call.source_count; ++s) {
      const SourceLayout<T>& of = layout.sources[s];
      prepare_queries(call, layout, s, batch, index, scratch, of.dvalue + task * of.value_size);
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
      const Vec<T> p = softmax_exponential<T>(load(weight) - lse);
      store(weight, p);
      store(dscore, p * (load(dscore) - delta));
    }
  }
}

// dx, dkeys and the share of dquery of one key tile, whose x, keys and transposed keys are in place.
template <class S, class T>
void attend_backward(const AttentionBackward<S>& call, const Layout<S>& layout, int source, int64_t batch,
                     int64_t keys_count, const T* keys, T* dquery, const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, depth = call.sources[source].query_channels;
  const int64_t query_lanes = layout.sources[source].query_lanes;
  std::memset(scratch.dx, 0, channels * kTile * sizeof(T));
  std::memset(scratch.dkeys, 0, depth * kTile * sizeof(T));
  for (int64_t index = 0; index < layout.tiles; ++index) {
    const int64_t queries = tile_of(index, call.sizes.positions).count;
    const QueryTile<T> tile = layout.query_tile(call, source, batch, index);
    multiply<T, Start::kZero>(queries, keys_count, depth, columns_of<T>(tile.query, kTile), keys, kTile,
                              scratch.weights, kTile);
    multiply<T, Start::kZero>(queries, keys_count, channels, columns_of<T>(tile.dr, kTile), scratch.x, kTile,
                              scratch.dscores, kTile);
    softmax_gradient(queries, keys_count, tile, scratch.weights, scratch.dscores);
    multiply<T, Start::kAdd>(channels, keys_count, queries, rows_of<T>(tile.dr, kTile), scratch.weights, kTile,
                             scratch.dx, kTile);
    multiply<T, Start::kAdd>(depth, keys_count, queries, rows_of<T>(tile.query, kTile), scratch.dscores, kTile,
                             scratch.dkeys, kTile);
    multiply<T, Start::kAdd>(queries, depth, keys_count, rows_of<T>(scratch.dscores, kTile), scratch.rows, query_lanes,
                             dquery + index * kTile * query_lanes, query_lanes);
  }
}

// What flows back through the keys of one tile into dx, and the tile's share of the key map's gradient.
template <class S, class T>
void finish_keys(const AttentionBackward<S>& call, int source, int64_t count, int64_t query_lanes,
                 const ThreadScratch<T>& scratch, T* dkey) {
  const int64_t channels = call.sizes.channels, depth = call.sources[source].query_channels;
  if (call.sources[source].key == nullptr) {
    for (int64_t at = 0; at < channels * kTile; at += kLanes<T>)
      store(scratch.dx + at, load(scratch.dx + at) + load(scratch.dkeys + at));
    return;
  }
  multiply<T, Start::kAdd>(channels, count, depth, columns_of(call.sources[source].key, channels), scratch.dkeys, kTile,
                           scratch.dx, kTile);
  transpose_tile(depth, count, scratch.dkeys, kTile, scratch.rows, query_lanes);
  multiply<T, Start::kAdd>(channels, depth, count, rows_of<T>(scratch.x, kTile), scratch.rows, query_lanes, dkey,
                           query_lanes);
}

template <class S, class T>
void key_stage(const AttentionBackward<S>& call, const Layout<S>& layout, int source, int64_t batch, int64_t group,
               const ThreadScratch<T>& scratch) {
  const int64_t channels = call.sizes.channels, positions = call.sizes.positions;
  const SourceLayout<T>& of = layout.sources[source];
  const int64_t task = batch * layout.key_groups + group, dquery_size = layout.tiles * kTile * of.query_lanes;
  T *dquery = of.dquery + task * dquery_size, *dkey = of.dkey + task * of.map_size;
  std::memset(dquery, 0, dquery_size * sizeof(T));
  std::memset(dkey, 0, of.map_size * sizeof(T));
  const TileRange tiles = tiles_of_group(layout.tiles, group, layout.key_groups);
  for (int64_t index = tiles.first; index < tiles.first + tiles.count; ++index) {
    const TileRange range = tile_of(index, positions);
    load_shifted_tile(call.sources[source].x, batch, range, channels, call.shift[source], scratch.x);
    const T* keys = key_tile(call.sources[source], channels, scratch.x, kTile, scratch.keys);
    transpose_tile(call.sources[source].query_channels, range.count, keys, kTile, scratch.rows, of.query_lanes);
    attend_backward(call, layout, source, batch, range.count, keys, dquery, scratch);
    finish_keys(call, source, range.count, of.query_lanes, scratch, dkey);
    const int64_t offset = batch * channels * positions + range.first;
    if (source == 0) {
      store_tile(channels, range.count, scratch.dx, kTile, layout.dh + offset, positions);
    } else {
      store_tile(channels, range.count, scratch.dx, kTile, call.gradients[source].x + offset, positions);
    }
  }
}

// Sums dquery of a tile over the key groups into scratch.rows, (kTile x D), with 0 beyond the map.
template <class S, class T>
void sum_dquery(const Layout<S>& layout, const SourceLayout<T>& of, int64_t batch, int64_t index, int64_t queries,
                const ThreadScratch<T>& scratch) {
  const int64_t size = kTile * of.query_lanes;
  const T* share = of.dquery + (batch * layout.key_groups * layout.tiles + index) * size;
  std::memcpy(scratch.rows, share, size * sizeof(T));
  for (int64_t group = 1; group < layout.key_groups; ++group) {
    share += layout.tiles * size;
    for (int64_t at = 0; at < size; at += kLanes<T>)
      store(scratch.rows + at, load(scratch.rows + at) + load(share + at));
  }
  std::memset(scratch.rows + queries * of.query_lanes, 0, (kTile - queries) * of.query_lanes * sizeof(T));
}

template <class S, class T>
void query_gradient_stage(const AttentionBackward<S>& call, const Layout<S>& layout, int64_t batch, int64_t group,
                          const ThreadScratch<T>& scratch) {
  const AttentionSizes& sizes = call.sizes;
  const int64_t channels = sizes.channels, task = batch * layout.query_groups + group;
  for (int s = 0; s < call.source_count; ++s) {
    const SourceLayout<T>& of = layout.sources[s];
    std::memset(of.dscore + task * of.map_size, 0, of.map_size * sizeof(T));
    std::memset(of.dscore_bias + task * of.query_lanes, 0, of.query_lanes * sizeof(T));
  }
  const TileRange tiles = tiles_of_group(layout.tiles, group, layout.query_groups);
  for (int64_t index = tiles.first; index < tiles.first + tiles.count; ++index) {
    const TileRange queries = tile_of(index, sizes.positions);
    const int64_t offset = batch * channels * sizes.positions + queries.first;
    load_map_tile(call.sources[0].x, batch, queries, channels, scratch.x);
    copy_tile(channels, queries.count, layout.dh + offset, sizes.positions, scratch.dx, kTile);
    for (int s = 0; s < call.source_count; ++s) {
      const SourceLayout<T>& of = layout.sources[s];
      const int64_t depth = call.sources[s].query_channels;
      sum_dquery(layout, of, batch, index, queries.count, scratch);
      multiply<T, Start::kAdd>(channels, depth, queries.count, rows_of<T>(scratch.x, kTile), scratch.rows,
                               of.query_lanes, of.dscore + task * of.map_size, of.query_lanes);
      transpose_tile(kTile, depth, scratch.rows, of.query_lanes, scratch.dkeys, kTile);
      add_row_sums(depth, scratch.dkeys, of.dscore_bias + task * of.query_lanes);
      multiply<T, Start::kAdd>(channels, kTile, depth, columns_of(call.sources[s].score, channels), scratch.dkeys,
                               kTile, scratch.dx, kTile);
    }
    store_tile(channels, queries.count, scratch.dx, kTile, call.gradients[0].x + offset, sizes.positions);
  }
}

// Sums the weight gradients over the tasks; the threads of the parallel region share the work.
template <class S>
void reduce_source(const AttentionBackward<S>& call, const Layout<S>& layout, int source) {
  const auto& of = layout.sources[source];
  const int64_t query_tasks = call.sizes.batch * layout.query_groups, key_tasks = call.sizes.batch * layout.key_groups;
  reduce(query_tasks, of.map_size, of.dscore);
  reduce(query_tasks, of.query_lanes, of.dscore_bias);
  reduce(query_tasks, of.value_size, of.dvalue);
  if (call.gradients[source].key != nullptr) reduce(key_tasks, of.map_size, of.dkey);
}

template <class S>
void store_weight_gradients(const AttentionBackward<S>& call, const Layout<S>& layout, int source) {
  const auto& of = layout.sources[source];
  const AttentionGradients<S>& out = call.gradients[source];
  const int64_t depth = call.sources[source].query_channels, channels = call.sizes.channels;
  transpose_tile(channels, depth, of.dscore, of.query_lanes, out.score, channels);
  copy_lanes(of.dscore_bias, depth, out.score_bias);
  store_tile(call.sizes.value_channels, channels, of.dvalue, padded_lanes<Compute<S>>(channels), out.value, channels);
  if (out.key != nullptr) transpose_tile(channels, depth, of.dkey, of.query_lanes, out.key, channels);
}

}  // namespace

template <class S>
void attention_backward(const AttentionBackward<S>& call, int threads) {
  threads = useful_threads(threads, pair_work(call));
  Arena measure;
  Layout<S>(measure, call, threads);
  const Workspace workspace(measure.size());
  Arena arena(workspace.data());
  const Layout<S> layout(arena, call, threads);
  const int64_t batch = call.sizes.batch, query_tasks = batch * layout.query_groups,
                key_tasks = batch * layout.key_groups;
#pragma omp parallel num_threads(threads)
  {
    Arena own(workspace.data() + layout.scratch_base + thread_index() * layout.scratch_size);
    const ThreadScratch<Compute<S>> scratch(own, call.sizes, widest_query(call));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < query_tasks; ++task)
      query_stage(call, layout, task / layout.query_groups, task % layout.query_groups, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < key_tasks * call.source_count; ++task) {
      key_stage(call, layout, static_cast<int>(task / key_tasks), task % key_tasks / layout.key_groups,
                task % layout.key_groups, scratch);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < query_tasks; ++task)
      query_gradient_stage(call, layout, task / layout.query_groups, task % layout.query_groups, scratch);
    for (int source = 0; source < call.source_count; ++source) reduce_source(call, layout, source);
    reduce(query_tasks, call.sizes.value_channels, layout.dvalue_bias);
  }
  for (int source = 0; source < call.source_count; ++source) store_weight_gradients(call, layout, source);
  copy_lanes(layout.dvalue_bias, call.sizes.value_channels, call.dvalue_bias);
}

template void attention_backward<float>(const AttentionBackward<float>&, int);
template void attention_backward<double>(const AttentionBackward<double>&, int);
template void attention_backward<bfloat16>(const AttentionBackward<bfloat16>&, int);

}  // namespace FASTSAM_ISA
}  // namespace fastsam
