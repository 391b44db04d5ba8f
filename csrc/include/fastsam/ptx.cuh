// All PTX of the kernels. Each wrapper has its host twin beside it, which does what the PTX manual says the instruction
// does; a capability that lacks the instruction traps, and the launcher must not choose such a kernel there.
#pragma once

#include "fastsam/simt.cuh"

#ifndef __CUDACC__
#include "simt/warp_operations.h"
#endif

namespace fastsam::cuda {

// Waits until `threads` threads of the block, a multiple of 32, are at barrier `id`, 1 to 15.
__device__ __forceinline__ void bar_sync(int id, int threads FASTSAM_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  simt::sync_named(id, threads, site);
#endif
}

// 2^x to at most 2 ulp, subnormal numbers taken for 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return simt::flush_subnormal(exp2f(simt::flush_subnormal(x)));
#endif
}

// The bits of the nearest tf32 number, ties away from zero: 10 bits of mantissa are left.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
#if !defined(__CUDACC__)
  return simt::tf32_bits(value);
#elif __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  __trap();
  return 0;
#endif
}

// Asynchronous copies from global to shared memory

// Starts to copy Bytes (4, 8 or 16) bytes. Only source_bytes of them are read, zeros follow. Both addresses must be
// multiples of Bytes. Below capability 8.0 it is an ordinary copy, done at once.
template <int Bytes, class T, class U>
__device__ __forceinline__ void cp_async(Shared<T> to, Global<U> from, int source_bytes = Bytes FASTSAM_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if !defined(__CUDACC__)
  simt::async_copy<Bytes>(to, from, source_bytes, site);
#elif __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#else
  using Chunk = Vec<T, Bytes / sizeof(T)>;
  Chunk chunk;
  if (source_bytes == Bytes) {
    chunk = load<Chunk>(from);
  } else {
    for (int i = 0; i < Bytes / static_cast<int>(sizeof(T)); ++i) {
      chunk[i] = i * static_cast<int>(sizeof(T)) < source_bytes ? from[i] : T();
    }
  }
  store(to, chunk);
#endif
}

// Closes the group of the copies that this thread has started since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if !defined(__CUDACC__)
  simt::commit_async_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until the copies of this thread have landed, but for its GroupsLeft latest groups. Other threads see them after
// a barrier.
template <int GroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#if !defined(__CUDACC__)
  simt::wait_async_copies(GroupsLeft);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// Matrix products of a warp

// Loads Count (1, 2 or 4) 8 x 8 matrices of 16-bit values. Lane 8 i + r gives the address of row r of matrix i, 16-byte
// aligned; what other lanes give is not read, but must be an address too on 7.5. matrix[i] of lane l gets row l / 4,
// columns 2 (l % 4) and the next, of matrix i, or of its transpose.
template <int Count, bool Transposed = false, class T>
__device__ __forceinline__ void ldmatrix(uint32_t (&matrix)[Count], Shared<T> row FASTSAM_SITE) {
  static_assert((Count == 1 || Count == 2 || Count == 4) && sizeof(T) == 2, "1, 2 or 4 matrices of 16-bit values");
#if !defined(__CUDACC__)
  simt::load_matrices(matrix, Count, Transposed, row, site);
#elif __CUDA_ARCH__ >= 750
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
#define FASTSAM_LDMATRIX(suffix)                                                              \
  if constexpr (Count == 1) {                                                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" suffix ".shared.b16 {%0}, [%1];"             \
                 : "=r"(matrix[0])                                                            \
                 : "r"(address)                                                               \
                 : "memory");                                                                 \
  } else if constexpr (Count == 2) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(matrix[0]), "=r"(matrix[1])                                           \
                 : "r"(address)                                                               \
                 : "memory");                                                                 \
  } else {                                                                                    \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])         \
                 : "r"(address)                                                               \
                 : "memory");                                                                 \
  }
  if constexpr (Transposed) {
    FASTSAM_LDMATRIX(".trans")
  } else {
    FASTSAM_LDMATRIX("")
  }
#undef FASTSAM_LDMATRIX
#else
  __trap();
#endif
}

// Tag for float32 operands rounded by round_to_tf32.
struct tf32;

// c += a b for a 16 x K (row, col), b K x 8, c 16 x 8 in float32. The warp shares them out: lane l holds of each matrix
// the elements i at (row_a(l, i), col_a(l, i)), and so on. 16-bit elements lie two in a register, the first one low.
//
//   Mma<tf32, 8>            8.0
//   Mma<__nv_bfloat16, 16>  8.0
//   Mma<__half, 16>         8.0
//   Mma<__half, 8>          7.5
template <class T, int K>
struct Mma;

struct MmaAccumulator {
  static constexpr int kElementsC = 4;
  static __host__ __device__ constexpr int row_c(int lane, int i) { return lane / 4 + i / 2 * 8; }
  static __host__ __device__ constexpr int col_c(int lane, int i) { return lane % 4 * 2 + i % 2; }
};

template <>
struct Mma<tf32, 8> : MmaAccumulator {
  static constexpr int kK = 8, kElementsA = 4, kElementsB = 2, kRegistersA = 4, kRegistersB = 2;
  static __host__ __device__ constexpr int row_a(int lane, int i) { return lane / 4 + i % 2 * 8; }
  static __host__ __device__ constexpr int col_a(int lane, int i) { return lane % 4 + i / 2 * 4; }
  static __host__ __device__ constexpr int row_b(int lane, int i) { return lane % 4 + i * 4; }
  static __host__ __device__ constexpr int col_b(int lane, int) { return lane / 4; }

  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] FASTSAM_SITE) {
#if !defined(__CUDACC__)
    simt::multiply_matrices<Mma>("mma.m16n8k8.tf32", c, a, b, site, simt::tf32_element);
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
  }
};

// Layout of all products of 16-bit values.
template <int K>
struct Mma16Bit : MmaAccumulator {
  static constexpr int kK = K, kElementsA = K / 2, kElementsB = K / 4, kRegistersA = K / 4, kRegistersB = K / 8;
  static __host__ __device__ constexpr int row_a(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
  static __host__ __device__ constexpr int col_a(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }
  static __host__ __device__ constexpr int row_b(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
  static __host__ __device__ constexpr int col_b(int lane, int) { return lane / 4; }
};

template <>
struct Mma<__half, 8> : Mma16Bit<8> {
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[2],
                                                  const uint32_t (&b)[1] FASTSAM_SITE) {
#if !defined(__CUDACC__)
    simt::multiply_matrices<Mma>("mma.m16n8k8.f16", c, a, b, site, simt::half_element);
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#else
    __trap();
#endif
  }
};

template <>
struct Mma<__half, 16> : Mma16Bit<16> {
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] FASTSAM_SITE) {
#if !defined(__CUDACC__)
    simt::multiply_matrices<Mma>("mma.m16n8k16.f16", c, a, b, site, simt::half_element);
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
  }
};

template <>
struct Mma<__nv_bfloat16, 16> : Mma16Bit<16> {
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] FASTSAM_SITE) {
#if !defined(__CUDACC__)
    simt::multiply_matrices<Mma>("mma.m16n8k16.bf16", c, a, b, site, simt::bfloat16_element);
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
  }
};

// Two values as one register of 16-bit elements, the first one low.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const Vec<T, 2> pair = {{narrow<T>(low), narrow<T>(high)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

}  // namespace fastsam::cuda
