// A warp: 32 threads of a block that go together.
#pragma once

#include "fastsam/simt.cuh"

namespace fastsam::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// The sum over the lanes, in all of them.
template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

}  // namespace fastsam::cuda
