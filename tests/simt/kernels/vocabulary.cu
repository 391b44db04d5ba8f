// One kernel for each part of the vocabulary, with results that the test knows.
#include "fastsam/ptx.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

// y[i] is thread i's own index and its block's, one decimal digit each.
__global__ void indices(Global<int> y) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int of_thread = 100 * threadIdx.z + 10 * threadIdx.y + threadIdx.x;
  y[block * threads + thread] = 1000 * (100 * blockIdx.z + 10 * blockIdx.y + blockIdx.x) + of_thread;
}

__global__ void shuffles(Global<const int> x, Global<int> y) {
  const int lane = threadIdx.x, value = x[lane];
  y[lane] = __shfl_sync(0xffffffff, value, (lane + 5) % 32);
  y[32 + lane] = __shfl_xor_sync(0xffffffff, value, 3);
  y[64 + lane] = __shfl_down_sync(0xffffffff, value, 7);
  y[96 + lane] = __shfl_up_sync(0xffffffff, value, 7);
  y[128 + lane] = static_cast<int>(__shfl_xor_sync(0xffffffff, static_cast<double>(value), 16));
  y[160 + lane] = lane < 8 ? __shfl_sync(0x000000ff, value, 6) : 0;
}

__global__ void votes(Global<const int> x, Global<int> y) {
  const int lane = threadIdx.x, value = x[lane];
  y[lane] = static_cast<int>(__ballot_sync(0xffffffff, value % 3 == 0));
  y[32 + lane] = __any_sync(0xffffffff, value == 17);
  y[64 + lane] = __any_sync(0xffffffff, value == 99);
  y[96 + lane] = __all_sync(0xffffffff, value < 32);
  y[128 + lane] = __all_sync(0xffffffff, value != 4);
  y[160 + lane] = lane < 4 ? __all_sync(0x0000000f, value != 4) : 0;
}

// Reverses x by vectors of N through both kinds of shared memory.
template <class T, int N>
__global__ void vectors(Global<const T> x, Global<T> y) {
  using V = Vec<T, N>;
  SharedArena arena;
  Shared<T> dynamic_tile = arena.take<T>(32 * N, "dynamic_tile");
  FASTSAM_SHARED(T, static_tile, 32 * N);
  const int i = threadIdx.x;
  store(dynamic_tile + N * i, load<V>(x + N * i));
  __syncthreads();
  V v = load<V>(dynamic_tile + N * (31 - i));
  const T last = v[N - 1];
  v[N - 1] = v[0];
  v[0] = last;
  store(static_tile + N * i, v);
  store(y + N * i, load<V>(static_tile + N * i));
}

// y = x, with zeros from element `count` on; the source has no more than `count` elements.
template <class T, int Bytes>
__global__ void async_copy(Global<const T> x, Global<T> y, int count) {
  constexpr int kElements = Bytes / sizeof(T);
  FASTSAM_SHARED(T, tile, 32 * kElements);
  const int first = threadIdx.x * kElements;
  const int present = max(0, min(kElements, count - first));
  cp_async<Bytes>(tile + first, x + first, present * static_cast<int>(sizeof(T)));
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kElements; i += 32) y[i] = tile[i];
}

// Two tiles one after the other in the same bytes.
__global__ void reused_memory(Global<const float> x, Global<float> y) {
  SharedArena arena;
  SharedArena again = arena;
  Shared<float> floats = arena.take<float>(32, "floats");
  Shared<__half> halves = again.take<__half>(64, "halves");
  const int i = threadIdx.x;
  floats[i] = x[i];
  __syncthreads();
  const float other = floats[31 - i];
  __syncthreads();
  halves[i] = narrow<__half>(other);
  halves[32 + i] = narrow<__half>(2 * other);
  __syncthreads();
  y[i] = widen(halves[i]) + widen(halves[63 - i]);
}

template <class T>
__global__ void widen_all(Global<const T> x, Global<float> y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = widen(x[i]);
}

template <class T>
__global__ void narrow_all(Global<const float> x, Global<T> y, int64_t n) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = narrow<T>(x[i]);
}

__global__ void to_tf32(Global<const float> x, Global<float> y, int64_t n) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = __uint_as_float(round_to_tf32(x[i]));
}

__global__ void mathematics(Global<const float> x, Global<float> y) {
  const int i = threadIdx.x;
  y[i] = exp2_approx(x[i]);
  y[32 + i] = fmaf(x[i], x[i], 1.0f);
  y[64 + i] = max(x[i], 2.0f) + min(x[i], 3.0f);
}

// x[i] wherever an expression may have it.
template <class T>
__global__ void expressions(Global<const T> x, Global<T> y) {
  const int i = threadIdx.x;
  const T ahead = i < 31 ? x[i + 1] : T();
  y[i] = x[i];
  y[i] += x[i] * ahead - 2 * x[i];
  y[i] *= 2;
  y[i] -= i % 2 == 0 ? -x[i] : x[31 - i];
  if (x[i] > 10 && x[i] <= x[i ^ 1]) y[i] = fma(__ldg(x + i), __ldg(x), 0.5);
}

// Sums all of x over two kernels: the second one reads what the blocks of the first one wrote.
__global__ void partial_sums(Global<const float> x, Global<float> partial) {
  float sum = x[blockIdx.x * 32 + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
__global__ void total(Global<const float> partial, Global<float> y, int count) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += partial[i];
  y[0] = sum;
}

}  // namespace
}  // namespace fastsam::cuda

using namespace fastsam;
using namespace fastsam::cuda;

extern "C" const char* run_indices(int* y) {
  return simt::run(
      [&] { simt::launch("indices", indices, {dim3(2, 3, 2), dim3(4, 3, 5)}, simt::output(y, 720, "y")); });
}

extern "C" const char* run_shuffles(const int* x, int* y) {
  return simt::run(
      [&] { simt::launch("shuffles", shuffles, {1, 32}, simt::input(x, 32, "x"), simt::output(y, 192, "y")); });
}

extern "C" const char* run_votes(const int* x, int* y) {
  return simt::run([&] { simt::launch("votes", votes, {1, 32}, simt::input(x, 32, "x"), simt::output(y, 192, "y")); });
}

template <class T, int N>
const char* run_vectors(const T* x, T* y) {
  return simt::run([&] {
    simt::launch("vectors", vectors<T, N>, {1, 32, shared_bytes<T>(32 * N)}, simt::input(x, 32 * N, "x"),
                 simt::output(y, 32 * N, "y"));
  });
}
extern "C" const char* run_vectors_float2(const float* x, float* y) { return run_vectors<float, 2>(x, y); }
extern "C" const char* run_vectors_float4(const float* x, float* y) { return run_vectors<float, 4>(x, y); }
extern "C" const char* run_vectors_half8(const __half* x, __half* y) { return run_vectors<__half, 8>(x, y); }
extern "C" const char* run_vectors_double2(const double* x, double* y) { return run_vectors<double, 2>(x, y); }

template <class T, int Bytes>
const char* run_async_copy(const T* x, T* y, int64_t count) {
  constexpr int kElements = 32 * Bytes / sizeof(T);
  return simt::run([&] {
    simt::launch("async_copy", async_copy<T, Bytes>, {1, 32}, simt::input(x, count, "x"),
                 simt::output(y, kElements, "y"), count);
  });
}
extern "C" const char* run_async_copy_float4(const float* x, float* y, int64_t n) {
  return run_async_copy<float, 16>(x, y, n);
}
extern "C" const char* run_async_copy_half4(const __half* x, __half* y, int64_t n) {
  return run_async_copy<__half, 8>(x, y, n);
}
extern "C" const char* run_async_copy_half2(const __half* x, __half* y, int64_t n) {
  return run_async_copy<__half, 4>(x, y, n);
}

extern "C" const char* run_reused_memory(const float* x, float* y) {
  return simt::run([&] {
    simt::launch("reused_memory", reused_memory, {1, 32, 128}, simt::input(x, 32, "x"), simt::output(y, 32, "y"));
  });
}

template <class T>
const char* run_widen(const T* x, float* y) {
  return simt::run([&] {
    simt::launch("widen_all", widen_all<T>, {64, 1024}, simt::input(x, 65536, "x"), simt::output(y, 65536, "y"));
  });
}
extern "C" const char* run_widen_half(const __half* x, float* y) { return run_widen(x, y); }
extern "C" const char* run_widen_bfloat16(const __nv_bfloat16* x, float* y) { return run_widen(x, y); }

template <class T, class Kernel>
const char* run_rounding(const char* name, Kernel* kernel, const float* x, T* y, int64_t n) {
  return simt::run([&] {
    const unsigned blocks = static_cast<unsigned>((n + 255) / 256);
    simt::launch(name, kernel, {blocks, 256}, simt::input(x, n, "x"), simt::output(y, n, "y"), n);
  });
}
extern "C" const char* run_narrow_half(const float* x, __half* y, int64_t n) {
  return run_rounding("narrow_all", narrow_all<__half>, x, y, n);
}
extern "C" const char* run_narrow_bfloat16(const float* x, __nv_bfloat16* y, int64_t n) {
  return run_rounding("narrow_all", narrow_all<__nv_bfloat16>, x, y, n);
}
extern "C" const char* run_to_tf32(const float* x, float* y, int64_t n) {
  return run_rounding("to_tf32", to_tf32, x, y, n);
}

extern "C" const char* run_expressions(const double* x, double* y) {
  return simt::run([&] {
    simt::launch("expressions", expressions<double>, {1, 32}, simt::input(x, 32, "x"), simt::output(y, 32, "y"));
  });
}

extern "C" const char* run_mathematics(const float* x, float* y) {
  return simt::run(
      [&] { simt::launch("mathematics", mathematics, {1, 32}, simt::input(x, 32, "x"), simt::output(y, 96, "y")); });
}

extern "C" const char* run_sum(const float* x, float* partial, float* y, int64_t blocks) {
  return simt::run([&] {
    const auto sums = simt::output(partial, blocks, "partial");
    simt::launch("partial_sums", partial_sums, {static_cast<unsigned>(blocks), 32}, simt::input(x, 32 * blocks, "x"),
                 sums);
    simt::launch("total", total, {1, 1}, sums, simt::output(y, 1, "y"), blocks);
  });
}

extern "C" const char* run_shape(int64_t blocks, int64_t threads, int64_t shared) {
  return simt::run([&] {
    const Global<int> nothing = nullptr;
    simt::launch("indices", indices, {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared}, nothing);
  });
}
