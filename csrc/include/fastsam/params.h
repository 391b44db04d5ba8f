// Parameters of the operators: plain structs of addresses, sizes and strides, shared by every back end.
#pragma once

#include <cstdint>

namespace fastsam {

// A (B, C, N) map whose N = H * W positions are contiguous. Strides count elements.
template <class T>
struct Map {
  T* data;
  int64_t stride_batch;
  int64_t stride_channel;
};

struct AttentionSizes {
  int64_t batch;
  int64_t channels;
  int64_t value_channels;
  int64_t positions;
};

// One map that is attended to. Without a key map (key == nullptr) the map itself is the key and query_channels equals
// channels. Matrices are contiguous and row-major.
template <class T>
struct AttentionSource {
  Map<const T> x;
  int64_t query_channels;
  const T* score;       // (D, C)
  const T* score_bias;  // (D)
  const T* value;       // (Cz, C)
  const T* key;         // (D, C) or nullptr
};

constexpr int kMaxSources = 2;

// Queries come from sources[0].x. r[s] (B, C, N) and lse[s] (B, N) may be nullptr: then they are not kept.
template <class T>
struct AttentionForward {
  AttentionSizes sizes;
  int source_count;
  AttentionSource<T> sources[kMaxSources];
  const T* value_bias;  // (Cz)
  T* z;                 // (B, Cz, N)
  T* r[kMaxSources];
  T* lse[kMaxSources];
};

template <class T>
struct AttentionGradients {
  T* x;           // (B, C, N)
  T* score;       // (D, C)
  T* score_bias;  // (D)
  T* value;       // (Cz, C)
  T* key;         // (D, C) or nullptr
};

template <class T>
struct AttentionBackward {
  AttentionSizes sizes;
  int source_count;
  AttentionSource<T> sources[kMaxSources];
  Map<const T> dz;            // (B, Cz, N)
  const T* r[kMaxSources];    // (B, C, N)
  const T* lse[kMaxSources];  // (B, N)
  AttentionGradients<T> gradients[kMaxSources];
  T* dvalue_bias;  // (Cz)
};

struct GateSizes {
  int64_t batch;
  int64_t channels;
  int64_t z_channels;  // 0 where there is no z
  int64_t height;
  int64_t width;
  int64_t kernel_size;  // 0 where there is no depthwise filter
};

template <class T>
struct SeparableGatesForward {
  GateSizes sizes;
  Map<const T> z;
  Map<const T> h;
  Map<const T> m;
  const T* depthwise;  // (Cz + C, k, k) or nullptr
  const T* pointwise;  // (3C, Cz + C)
  const T* bias;       // (3C) or nullptr
  T* h_hat;            // (B, C, N)
  T* m_new;            // (B, C, N)
};

template <class T>
struct SeparableGatesBackward {
  GateSizes sizes;
  Map<const T> z;
  Map<const T> h;
  Map<const T> m;
  const T* depthwise;
  const T* pointwise;
  const T* bias;
  Map<const T> dh_hat;
  Map<const T> dm_new;
  T* dz;          // (B, Cz, N)
  T* dh;          // (B, C, N)
  T* dm;          // (B, C, N)
  T* ddepthwise;  // as depthwise
  T* dpointwise;
  T* dbias;  // (3C) or nullptr
};

// Gate order i, f, g, o along the channels of gates, (B, 4C, N).
template <class T>
struct LstmGatesForward {
  int64_t batch;
  int64_t channels;
  int64_t positions;
  Map<const T> gates;
  Map<const T> c;
  T forget_bias;
  T* h;      // (B, C, N)
  T* c_new;  // (B, C, N)
};

template <class T>
struct LstmGatesBackward {
  int64_t batch;
  int64_t channels;
  int64_t positions;
  Map<const T> gates;
  Map<const T> c;
  T forget_bias;
  Map<const T> dh;
  Map<const T> dc_new;
  T* dgates;  // (B, 4C, N)
  T* dc;      // (B, C, N)
};

}  // namespace fastsam
