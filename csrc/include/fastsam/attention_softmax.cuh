// The online softmax of the attention's forward pass (equations 3 and 6): the weights of a row, tile by tile, while a
// running maximum and a running sum make up for those that are still to come.
#pragma once

#include "fastsam/attention_tiles.cuh"

namespace fastsam::cuda {

// The state of the rows of a warp, of whose columns it sees a part where several warps share the rows.
template <class Way, int KeyWarps>
class OnlineSoftmax {
  using Shape = BlockShape<KeyWarps>;
  using T = typename Way::Accumulator;

 public:
  // Elements of each of the two arrays in shared memory for join().
  static constexpr int kJoined = kAttentionWarps * kWarpRows;

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int row = 0; row < Way::kLaneRows; ++row) {
      maximum_[row] = -INFINITY;
      sum_[row] = T(0);
    }
  }

  // Turns scores into unnormalised weights, and brings r and the sum to the new maximum.
  template <int Tiles, int OutTiles>
  __device__ __forceinline__ void step(T (&score)[Tiles][kTileElements], T (&r)[OutTiles][kTileElements]) {
    T shift[Way::kLaneRows], factor[Way::kLaneRows];
#pragma unroll
    for (int row = 0; row < Way::kLaneRows; ++row) shift[row] = maximum_[row];
    for_each_element(score, [&](T& value, int row) { shift[row] = max(shift[row], value); });
#pragma unroll
    for (int row = 0; row < Way::kLaneRows; ++row) {
      const T largest = largest_of_row<Way>(shift[row]);
      shift[row] = finite_shift(largest);
      factor[row] = Way::exponential(maximum_[row] - shift[row]);
      maximum_[row] = largest;
      sum_[row] *= factor[row];
    }
    for_each_element(score, [&](T& value, int row) {
      value = Way::exponential(value - shift[row]);
      sum_[row] += value;
    });
    for_each_element(r, [&](T& value, int row) { value *= factor[row]; });
  }

  // After the last step: sums over the lanes and, with barriers, over the warps that share the rows; r is brought to
  // their maximum.
  template <int OutTiles>
  __device__ __forceinline__ void join(Shared<T> warp_maximum, Shared<T> warp_sum, T (&r)[OutTiles][kTileElements]) {
#pragma unroll
    for (int row = 0; row < Way::kLaneRows; ++row) sum_[row] = sum_of_row<Way>(sum_[row]);
    if constexpr (KeyWarps > 1) {
      for_each_row<Way>([&](int index, int row) {
        if (Way::column(0) != 0) return;
        warp_maximum[Shape::key_warp() * kWarpRows + row] = maximum_[index];
        warp_sum[Shape::key_warp() * kWarpRows + row] = sum_[index];
      });
      __syncthreads();
      T factor[Way::kLaneRows];
      for_each_row<Way>([&](int index, int row) { factor[index] = join_row(index, row, warp_maximum, warp_sum); });
      for_each_element(r, [&](T& value, int row) { value *= factor[row]; });
    } else {
      __syncthreads();
    }
  }

  // Of a row, by its index.
  __device__ __forceinline__ T sum(int index) const { return sum_[index]; }
  __device__ __forceinline__ T lse(int index) const { return maximum_[index] + logarithm(sum_[index]); }

 private:
  template <int Tiles, class Visit>
  static __device__ __forceinline__ void for_each_element(T (&values)[Tiles][kTileElements], Visit visit) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int e = 0; e < kTileElements; ++e) visit(values[tile][e], Way::row_index(e));
    }
  }

  // While every score is -inf the shift must stay finite, or later finite scores would meet inf - inf.
  static __device__ __forceinline__ T finite_shift(T maximum) { return maximum == -INFINITY ? T(0) : maximum; }

  // Brings a row to the maximum of all warps; the factor for what this one has.
  __device__ __forceinline__ T join_row(int index, int row, Shared<T> warp_maximum, Shared<T> warp_sum) {
    T largest = -INFINITY, sum = T(0);
#pragma unroll
    for (int warp = 0; warp < KeyWarps; ++warp) {
      const T value = warp_maximum[warp * kWarpRows + row];
      largest = max(largest, value);
    }
    const T shift = finite_shift(largest), factor = Way::exponential(maximum_[index] - shift);
#pragma unroll
    for (int warp = 0; warp < KeyWarps; ++warp)
      sum += Way::exponential(warp_maximum[warp * kWarpRows + row] - shift) * warp_sum[warp * kWarpRows + row];
    maximum_[index] = largest;
    sum_[index] = sum;
    return factor;
  }

  T maximum_[Way::kLaneRows], sum_[Way::kLaneRows];
};

}  // namespace fastsam::cuda
