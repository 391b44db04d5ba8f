// One small kernel for each way to get the order of threads wrong: right as it stands, and wrong in one place where
// `faulty` is 1. x and y have 128 elements, a block has 128 threads.
#include "fastsam/ptx.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void read_after_write(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];
  if (!faulty) __syncthreads();
  y[i] = tile[kThreads - 1 - i];
}

__global__ void write_after_read(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[i] = x[i] + round;
    __syncthreads();
    sum += tile[kThreads - 1 - i];
    if (!faulty) __syncthreads();
  }
  y[i] = sum;
}

__global__ void write_after_write(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[faulty ? i / 2 : i] = x[i];
  __syncthreads();
  y[i] = tile[i];
}

__global__ void global_race(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i] = 0.0f;
  __syncthreads();
  y[i] = x[i];
  if (!faulty) __syncthreads();
  if (i > 0 && y[i - 1] > 1e9f) __trap();
}

__global__ void blocks_race(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  if (i < 64) y[64 * blockIdx.x + i] = x[i];
  if (faulty && i == 0 && blockIdx.x == 1) y[3] = 0.0f;
}

// Lanes of a warp that exchange values through shared memory need a barrier as well.
__global__ void warp_race(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];
  if (!faulty) __syncwarp();
  y[i] = tile[i ^ 1];
}

// A barrier of the warp does not order what other warps do.
__global__ void across_warps_race(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];
  __syncwarp();
  y[i] = tile[faulty ? i ^ 32 : i ^ 16];
}

// A shuffle brings the lanes together but does not order their accesses to memory.
__global__ void shuffle_race(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];
  const float other = __shfl_xor_sync(0xffffffff, x[i] + 0.0f, 1);
  if (!faulty) __syncwarp();
  y[i] = tile[i ^ 1] + other;
}

// Threads 0 to 63 and 64 to 127 go their own ways, each with a barrier of its own.
__global__ void named_barrier_race(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  tile[i] = x[i];
  bar_sync(1 + i / 64, 64);
  y[i] = tile[faulty ? i ^ 64 : i ^ 32];
}

// Many threads read an element before thread 0 writes it: its own read and those of lanes it has met do not hide the
// one of a third warp.
__global__ void write_after_many_reads(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 1);
  const int i = threadIdx.x;
  if (i == 0) tile[0] = x[0];
  __syncthreads();
  y[i] = i < 32 || (faulty && i == 64) ? tile[0] : 0.0f;
  if (i < 64) bar_sync(1, 64);
  if (i == 0) tile[0] = 1.0f;
}

// What a warp learnt at its own barrier does not outlive the block's.
__global__ void barriers_of_warp_and_block(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  __syncwarp();
  tile[i] = x[i];
  if (!faulty) __syncthreads();
  y[i] = tile[kThreads - 1 - i];
}

// What thread 0 writes reaches thread 40 over lane 33, by a barrier of two warps and one of lanes 32 to 47.
__global__ void order_by_two_barriers(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 1);
  const int i = threadIdx.x;
  if (i == 0) tile[0] = x[0];
  if (i < 64 && !faulty) bar_sync(1, 64);
  if (i / 16 == 2) __syncwarp(0x0000ffff);
  y[i] = i == 40 ? tile[0] : 0.0f;
}

__global__ void returned_before_barrier(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i] = x[i];
  if (faulty && i == 77) return;
  __syncthreads();
}

__global__ void two_barriers(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i] = x[i];
  if (faulty && i >= 64) {
    __syncthreads();  // the other half
  } else {
    __syncthreads();
  }
}

__global__ void barriers_of_two_kinds(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i] = x[i];
  if (faulty && i >= 96) {
    bar_sync(1, 64);
  } else {
    __syncthreads();
  }
}

__global__ void two_matrix_loads(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(uint16_t, tile, 4 * kThreads);
  const int i = threadIdx.x, lane = i % 32;
  y[i] = x[i];
  for (int k = 0; k < 4; ++k) tile[4 * i + k] = 0;
  __syncthreads();
  uint32_t matrix[1];
  if (faulty && lane < 16) {
    ldmatrix<1>(matrix, tile + 8 * lane);  // of the lower lanes
  } else {
    ldmatrix<1>(matrix, tile + 8 * lane);
  }
  y[i] += static_cast<float>(matrix[0]);
}

__global__ void two_matrix_products(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  const uint32_t zeros[4] = {}, more_zeros[2] = {};
  float sum[4] = {};
  if (faulty && i % 32 < 16) {
    Mma<tf32, 8>::multiply(sum, zeros, more_zeros);  // of the lower lanes
  } else {
    Mma<tf32, 8>::multiply(sum, zeros, more_zeros);
  }
  y[i] = x[i] + sum[0];
}

__global__ void matrix_load_without_address(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(uint16_t, tile, 4 * kThreads);
  const int i = threadIdx.x, lane = i % 32;
  for (int k = 0; k < 4; ++k) tile[4 * i + k] = 0;
  __syncthreads();
  uint32_t matrix[1];
  ldmatrix<1>(matrix, tile + (faulty ? 8 * i : 8 * lane));
  y[i] = x[i] + static_cast<float>(matrix[0]);
}

__global__ void named_barrier_size(Global<const float> x, Global<float> y, int faulty) {
  y[threadIdx.x] = x[threadIdx.x];
  bar_sync(1, 128 - faulty);
}

__global__ void named_barrier_number(Global<const float> x, Global<float> y, int faulty) {
  y[threadIdx.x] = x[threadIdx.x];
  bar_sync(15 + faulty, 128);
}

__global__ void shuffle_without_returned_lane(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  if (i % 32 == 31 && faulty) return;
  y[i] = __shfl_down_sync(0xffffffff, x[i] + 0.0f, 1);
}

__global__ void shuffle_before_lane_returns(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  if (i % 32 == 31) {
    y[i] = x[i];
    if (faulty) return;
  }
  __any_sync(0xffffffff, 1);
}

__global__ void shuffle_of_other_lanes(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  const uint32_t low_half = 0x0000ffff;
  y[i] = i % 32 < 16 ? __shfl_xor_sync(low_half, x[i] + 0.0f, faulty ? 16 : 8) : x[i];
}

__global__ void shuffle_without_itself(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  if (i % 32 < 17) y[i] = __shfl_xor_sync(0x0001ffff >> faulty, x[i] + 0.0f, 0);
}

__global__ void different_warp_operations(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i] = x[i];
  if (faulty && i % 2 == 0) {
    __ballot_sync(0xffffffff, 1);
  } else {
    __all_sync(0xffffffff, 1);
  }
}

__global__ void async_read_before_wait(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  cp_async<4>(tile + i, x + i);
  cp_async_commit();
  if (!faulty) cp_async_wait<0>();
  y[i] = tile[i];
}

__global__ void async_wait_for_one_group_less(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 2 * kThreads);
  const int i = threadIdx.x;
  cp_async<4>(tile + i, x + i);
  cp_async_commit();
  cp_async<4>(tile + kThreads + i, x + i);
  cp_async_commit();
  cp_async_wait<1>();
  y[i] = tile[faulty ? kThreads + i : i];
  cp_async_wait<0>();
}

__global__ void async_write_before_wait(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  cp_async<4>(tile + i, x + i);
  cp_async_commit();
  if (!faulty) cp_async_wait<0>();
  tile[i] = 0.0f;
  cp_async_wait<0>();
  y[i] = tile[i];
}

// A wait is about the thread's own copies: others see them after a barrier.
__global__ void async_without_barrier(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  tile[i] = 0.0f;
  __syncthreads();
  cp_async<4>(tile + i, x + i);
  cp_async_commit();
  cp_async_wait<0>();
  if (!faulty) __syncthreads();
  y[i] = tile[i ^ 64];
}

// Two buffers: the next copy into one must not start while others still read it.
__global__ void async_refill(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  float sum = 0.0f;
  cp_async<4>(tile + i, x + i);
  cp_async_commit();
  for (int round = 0; round < 3; ++round) {
    cp_async_wait<0>();
    __syncthreads();
    sum += tile[i ^ 64];
    if (!faulty) __syncthreads();
    cp_async<4>(tile + i, x + i);  // refill
    cp_async_commit();
  }
  y[i] = sum;
}

}  // namespace
}  // namespace fastsam::cuda

#define KERNEL(name, blocks)                                                                                         \
  extern "C" const char* name(const float* x, float* y, int64_t faulty) {                                            \
    using namespace fastsam;                                                                                         \
    return simt::run([&] {                                                                                           \
      simt::launch(#name, cuda::name, {blocks, cuda::kThreads}, simt::input(x, 128, "x"), simt::output(y, 128, "y"), \
                   faulty);                                                                                          \
    });                                                                                                              \
  }
KERNEL(read_after_write, 1)
KERNEL(write_after_read, 1)
KERNEL(write_after_write, 1)
KERNEL(global_race, 1)
KERNEL(blocks_race, 2)
KERNEL(warp_race, 1)
KERNEL(across_warps_race, 1)
KERNEL(shuffle_race, 1)
KERNEL(named_barrier_race, 1)
KERNEL(write_after_many_reads, 1)
KERNEL(barriers_of_warp_and_block, 1)
KERNEL(order_by_two_barriers, 1)
KERNEL(returned_before_barrier, 1)
KERNEL(two_barriers, 1)
KERNEL(barriers_of_two_kinds, 1)
KERNEL(two_matrix_loads, 1)
KERNEL(two_matrix_products, 1)
KERNEL(matrix_load_without_address, 1)
KERNEL(named_barrier_size, 1)
KERNEL(named_barrier_number, 1)
KERNEL(shuffle_without_returned_lane, 1)
KERNEL(shuffle_before_lane_returns, 1)
KERNEL(shuffle_of_other_lanes, 1)
KERNEL(shuffle_without_itself, 1)
KERNEL(different_warp_operations, 1)
KERNEL(async_read_before_wait, 1)
KERNEL(async_wait_for_one_group_less, 1)
KERNEL(async_write_before_wait, 1)
KERNEL(async_without_barrier, 1)
KERNEL(async_refill, 1)
