// One small kernel for each way to misuse memory: right as it stands, and wrong in one place where `faulty` is 1.
// x and y have 64 elements.
#include "fastsam/ptx.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

__global__ void read_bounds(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i] = x[i + 32 * faulty];
}

__global__ void write_bounds(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  y[i - faulty] = x[i];
}

__global__ void static_shared_bounds(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 64);
  const int i = threadIdx.x;
  tile[i + faulty] = x[i];
  y[i] = tile[i + faulty];
}

// What lies behind `first` is shared memory too, but of another tile.
__global__ void dynamic_shared_bounds(Global<const float> x, Global<float> y, int faulty) {
  SharedArena arena;
  Shared<float> first = arena.take<float>(64, "first");
  Shared<float> second = arena.take<float>(64, "second");
  const int i = threadIdx.x;
  second[i] = x[i];
  __syncthreads();
  first[i] = second[i];
  y[i] = first[i + faulty];
}

__global__ void shared_size(Global<const float> x, Global<float> y, int faulty) {
  SharedArena arena;
  Shared<float> tile = arena.take<float>(128 + faulty, "tile");
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[threadIdx.x];
}

// 64 MiB: whatever a report of it leaves behind in the harness cannot go unnoticed.
__global__ void static_shared_size(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
#ifndef __CUDACC__  // the compiler for devices refuses so much
  if (faulty) {
    FASTSAM_SHARED(float, table, 1 << 24);
    table[i] = x[i];
  }
#endif
  y[i] = x[i];
}

__global__ void null_pointer(Global<const float> x, Global<float> y, int faulty) {
  Global<const float> bias = nullptr;
  y[threadIdx.x] = bias != nullptr || faulty ? bias[threadIdx.x] : x[threadIdx.x];
}

__global__ void unwritten_shared(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 64);
  const int i = threadIdx.x;
  if (i < 64 - faulty) tile[i] = x[i];
  __syncthreads();
  y[i] = tile[63 - i];
}

// What the block before has left in shared memory is nothing to read.
__global__ void static_shared_of_block_before(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 64);
  const int i = threadIdx.x;
  if (blockIdx.x == 0 || !faulty) tile[i] = x[i];
  if (blockIdx.x == 1) y[i] = tile[i];
}

__global__ void dynamic_shared_of_block_before(Global<const float> x, Global<float> y, int faulty) {
  SharedArena arena;
  Shared<float> tile = arena.take<float>(64, "tile");
  const int i = threadIdx.x;
  if (blockIdx.x == 0 || !faulty) tile[i] = x[i];
  if (blockIdx.x == 1) y[i] = tile[i];
}

__global__ void unwritten_output(Global<const float> x, Global<float> y, int faulty) {
  const int i = threadIdx.x;
  if (i != 5 || !faulty) y[i] = 0.0f;
  y[i] += x[i];
}

__global__ void misaligned_load(Global<const float> x, Global<float> y, int faulty) {
  const float4 four = load<float4>(x + 4 * (threadIdx.x % 8) + 2 * faulty);
  y[threadIdx.x] = four.x + four.w;
}

__global__ void misaligned_store(Global<const float> x, Global<float> y, int faulty) {
  if (threadIdx.x < 31) store(y + 2 * threadIdx.x + faulty, make_float2(x[threadIdx.x], 1.0f));
}

__global__ void misaligned_async_copy(Global<const float> x, Global<float> y, int faulty) {
  FASTSAM_SHARED(float, tile, 72);
  const int i = threadIdx.x;
  if (i < 16) cp_async<16>(tile + 4 * i + faulty, x + 4 * i);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[i] = tile[i + faulty];
}

__global__ void vector_bounds(Global<const float> x, Global<float> y, int faulty) {
  if (threadIdx.x < 16) store(y + 4 * threadIdx.x, load<float4>(x + 4 * (threadIdx.x + faulty)));
}

}  // namespace
}  // namespace fastsam::cuda

#define KERNEL(name, blocks)                                                                                 \
  extern "C" const char* name(const float* x, float* y, int64_t faulty) {                                    \
    using namespace fastsam;                                                                                 \
    return simt::run([&] {                                                                                   \
      simt::launch(#name, cuda::name, {blocks, 64, cuda::shared_bytes<float>(128)}, simt::input(x, 64, "x"), \
                   simt::output(y, 64, "y"), faulty);                                                        \
    });                                                                                                      \
  }
KERNEL(read_bounds, 1)
KERNEL(write_bounds, 1)
KERNEL(static_shared_bounds, 1)
KERNEL(dynamic_shared_bounds, 1)
KERNEL(shared_size, 1)
KERNEL(static_shared_size, 1)
KERNEL(null_pointer, 1)
KERNEL(unwritten_shared, 1)
KERNEL(static_shared_of_block_before, 2)
KERNEL(dynamic_shared_of_block_before, 2)
KERNEL(unwritten_output, 1)
KERNEL(misaligned_load, 1)
KERNEL(misaligned_store, 1)
KERNEL(misaligned_async_copy, 1)
KERNEL(vector_bounds, 1)
