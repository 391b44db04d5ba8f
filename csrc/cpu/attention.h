// What the forward and the backward pass of the attention operators share.
//
// Equations: fastsam/ops/_attention/eager.py. Maps are channel-major, so a tile of a map is a C x positions matrix
// whose lanes are positions. Both passes compute a score by the same operations in the same order: where one key has a
// whole row of the softmax, P is 1 and dE is 0 exactly, as in eager.
#pragma once

#include "fastsam/params.h"
#include "tile.h"

namespace fastsam {
namespace FASTSAM_ISA {

// Multiply-adds of the forward pass but for the small projections.
template <class Call>
inline int64_t pair_work(const Call& call) {
  const AttentionSizes& sizes = call.sizes;
  int64_t work = 0;
  for (int s = 0; s < call.source_count; ++s) {
    work += sizes.batch * sizes.positions * sizes.positions * (sizes.channels + call.sources[s].query_channels);
  }
  return work;
}

template <class Call>
inline int64_t widest_query(const Call& call) {
  int64_t widest = 0;
  for (int s = 0; s < call.source_count; ++s)
    widest = call.sources[s].query_channels > widest ? call.sources[s].query_channels : widest;
  return widest;
}

struct TileRange {
  int64_t first, count;
};

inline TileRange tile_of(int64_t index, int64_t positions, int64_t size = kTile) {
  const int64_t first = index * size;
  return {first, smaller(size, positions - first)};
}

inline int64_t tiles_in(int64_t positions, int64_t size = kTile) { return (positions + size - 1) / size; }

// Loads `tile.count` positions of a map into a tile of `lanes` lanes, zero-padded.
template <class S>
inline void load_map_tile(const Map<const S>& map, int64_t batch, TileRange tile, int64_t channels, Compute<S>* out,
                          int64_t lanes = kTile) {
  copy_tile(channels, tile.count, map.data + batch * map.stride_batch + tile.first, map.stride_channel, out, lanes);
}

// Adds each row's number to the first `lanes` lanes of a tile.
template <class T>
inline void shift_rows(int64_t rows, int64_t lanes, const T* shifts, T sign, T* tile, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const Vec<T> shift = broadcast(sign * shifts[row]);
    for (int64_t lane = 0; lane < lanes; lane += kLanes<T>)
      store(tile + row * stride + lane, load(tile + row * stride + lane) + shift);
  }
}

// `load_map_tile`, with the shift of the batch's sample taken from every column.
//
// Attention does not change when the same vector is taken from all columns of a source but for R, which loses it too.
// So both passes work with columns from which the forward pass has chosen a shift to take, about their mean, that the
// context carries: maps with a mean, such as images, would otherwise lose digits where terms of its size cancel, in
// delta - dP and in sums of dE times the keys.
template <class S, class T>
inline void load_shifted_tile(const Map<const S>& map, int64_t batch, TileRange tile, int64_t channels, const T* shift,
                              T* out, int64_t lanes = kTile) {
  load_map_tile(map, batch, tile, channels, out, lanes);
  shift_rows(channels, tile.count, shift + batch * channels, T(-1), out, lanes);
}

// query = score x + score_bias for a tile of the hidden state.
template <class S, class T>
inline void query_tile(const AttentionSource<S>& source, int64_t channels, const T* hidden, T* query) {
  for (int64_t row = 0; row < source.query_channels; ++row) {
    for (T* lane = query + row * kTile; lane < query + (row + 1) * kTile; lane += kLanes<T>)
      store(lane, broadcast(source.score_bias[row]));
  }
  multiply<T, Start::kAdd>(source.query_channels, kTile, channels, rows_of(source.score, channels), hidden, kTile,
                           query, kTile);
}

// The keys of a tile of x with `lanes` lanes: the key map applied to it, or the tile itself.
template <class S, class T>
inline const T* key_tile(const AttentionSource<S>& source, int64_t channels, const T* x, int64_t lanes, T* scratch) {
  if (source.key == nullptr) return x;
  multiply<T, Start::kZero>(source.query_channels, lanes, channels, rows_of(source.key, channels), x, lanes, scratch,
                            lanes);
  return scratch;
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
