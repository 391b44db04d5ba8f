// V numbers that a thread computes with at once, those of neighbouring positions, and the functions that the gates
// apply to them.
#pragma once

#include "fastsam/activations.cuh"

namespace fastsam::cuda {

// V consecutive values in the type of the arithmetic.
template <class W, int V>
struct Lanes {
  W value[V];
  __device__ __forceinline__ W& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const W& operator[](int i) const { return value[i]; }

  friend __device__ __forceinline__ Lanes operator+(Lanes a, const Lanes& b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a[i] += b[i];
    return a;
  }
  friend __device__ __forceinline__ Lanes operator-(Lanes a, const Lanes& b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a[i] -= b[i];
    return a;
  }
  friend __device__ __forceinline__ Lanes operator*(Lanes a, const Lanes& b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a[i] *= b[i];
    return a;
  }
  friend __device__ __forceinline__ Lanes operator+(Lanes a, W b) {
#pragma unroll
    for (int i = 0; i < V; ++i) a[i] += b;
    return a;
  }
  friend __device__ __forceinline__ Lanes operator-(W a, Lanes b) {
#pragma unroll
    for (int i = 0; i < V; ++i) b[i] = a - b[i];
    return b;
  }
  friend __device__ __forceinline__ Lanes operator*(W a, Lanes b) {
#pragma unroll
    for (int i = 0; i < V; ++i) b[i] *= a;
    return b;
  }
};

// Elements of one access: as many as V needs, up to 16 bytes.
template <class T, int V>
constexpr int kPiece = V * sizeof(T) <= 16 ? V : 16 / static_cast<int>(sizeof(T));

template <class T, int V>
__device__ __forceinline__ Lanes<Wide<T>, V> load_lanes(Global<const T> from) {
  Lanes<Wide<T>, V> lanes;
#pragma unroll
  for (int first = 0; first < V; first += kPiece<T, V>) {
    const auto piece = load<Vec<T, kPiece<T, V>>>(from + first);
#pragma unroll
    for (int i = 0; i < kPiece<T, V>; ++i) lanes[first + i] = widen(piece[i]);
  }
  return lanes;
}

template <class T, int V>
__device__ __forceinline__ void store_lanes(Global<T> to, const Lanes<Wide<T>, V>& lanes) {
#pragma unroll
  for (int first = 0; first < V; first += kPiece<T, V>) {
    Vec<T, kPiece<T, V>> piece;
#pragma unroll
    for (int i = 0; i < kPiece<T, V>; ++i) piece[i] = narrow<T>(lanes[first + i]);
    store(to + first, piece);
  }
}

// The numbers that store_lanes leaves in memory.
template <class T, int V>
__device__ __forceinline__ Lanes<Wide<T>, V> as_stored(Lanes<Wide<T>, V> lanes) {
#pragma unroll
  for (int i = 0; i < V; ++i) lanes[i] = widen(narrow<T>(lanes[i]));
  return lanes;
}

template <class W, int V>
__device__ __forceinline__ Lanes<W, V> sigmoid(Lanes<W, V> x) {
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = sigmoid(x[i]);
  return x;
}

template <class W, int V>
__device__ __forceinline__ Lanes<W, V> hyperbolic_tangent(Lanes<W, V> x) {
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = hyperbolic_tangent(x[i]);
  return x;
}

}  // namespace fastsam::cuda
