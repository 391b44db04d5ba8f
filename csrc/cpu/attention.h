// What the forward and the backward pass of the attention operators share.
//
// Equations: fastsam/ops/_attention/eager.py. One tile holds up to kTile positions; maps are channel-major, so a tile
// of a map is a C x kTile matrix whose lanes are positions.
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

struct TileRange {
  int64_t first, count;
};

inline TileRange tile_of(int64_t index, int64_t positions) {
  const int64_t first = index * kTile;
  return {first, smaller(kTile, positions - first)};
}

inline int64_t tiles_in(int64_t positions) { return (positions + kTile - 1) / kTile; }

template <class T>
inline const T* map_at(const Map<const T>& map, int64_t batch, int64_t position) {
  return map.data + batch * map.stride_batch + position;
}

template <class T>
inline void load_map_tile(const Map<const T>& map, int64_t batch, TileRange tile, int64_t channels, T* out) {
  copy_tile(channels, tile.count, map_at(map, batch, tile.first), map.stride_channel, out, kTile);
}

template <class T>
inline void add_bias(int64_t rows, const T* bias, T* tile) {
  for (int64_t row = 0; row < rows; ++row) {
    const Vec<T> shift = broadcast(bias[row]);
    for (int64_t lane = 0; lane < kTile; lane += kLanes<T>) {
      store(tile + row * kTile + lane, load(tile + row * kTile + lane) + shift);
    }
  }
}

// The weights of one source as left factors.
template <class T>
struct PackedSource {
  PackedSource() = default;
  PackedSource(Arena& arena, const AttentionSource<T>& source, const AttentionSizes& sizes)
      : query_channels(source.query_channels),
        score(arena.take<T>(padded_rows(source.query_channels) * sizes.channels)),
        key(source.key == nullptr ? nullptr : arena.take<T>(padded_rows(source.query_channels) * sizes.channels)) {}

  void pack(const AttentionSource<T>& source, int64_t channels) {
    pack_panels(query_channels, channels, source.score, channels, 1, score);
    if (key != nullptr) pack_panels(query_channels, channels, source.key, channels, 1, key);
  }

  int64_t query_channels = 0;
  T* score = nullptr;
  T* key = nullptr;
};

// query = score x + score_bias for a tile of the hidden state.
template <class T>
inline void query_tile(const PackedSource<T>& packed, const T* bias, int64_t channels, const T* hidden, T* query) {
  multiply<T, Start::kZero>(packed.query_channels, kTile, channels, panels(packed.score, channels), hidden, kTile,
                            query, kTile);
  add_bias(packed.query_channels, bias, query);
}

// The keys of a tile of x: the key map applied to it, or the tile itself.
template <class T>
inline const T* key_tile(const PackedSource<T>& packed, int64_t channels, const T* x, T* scratch) {
  if (packed.key == nullptr) return x;
  multiply<T, Start::kZero>(packed.query_channels, kTile, channels, panels(packed.key, channels), x, kTile, scratch,
                            kTile);
  return scratch;
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
