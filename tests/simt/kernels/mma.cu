// Matrix products of a warp. The fragments are loaded and stored by the formulas of the PTX manual, "Matrix fragments
// for mma.m16n8k8" and "for mma.m16n8k16", written out here: what Mma itself says of its layout is not used.
#include "fastsam/ptx.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

// Rows and columns of the elements i of a fragment, for the lane with these two numbers.
struct PtxManual {
  int groupID, threadID_in_group;

  __device__ int row_a_tf32(int i) const { return i == 0 || i == 2 ? groupID : groupID + 8; }
  __device__ int col_a_tf32(int i) const { return i <= 1 ? threadID_in_group : threadID_in_group + 4; }
  __device__ int row_b_tf32(int i) const { return i == 0 ? threadID_in_group : threadID_in_group + 4; }

  __device__ int row_a_k8(int i) const { return i <= 1 ? groupID : groupID + 8; }
  __device__ int row_a_k16(int i) const { return i < 2 || (4 <= i && i < 6) ? groupID : groupID + 8; }
  __device__ int col_a(int i) const {
    return i < 4 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
  }
  __device__ int row_b(int i) const {
    return i < 2 ? threadID_in_group * 2 + (i & 1) : threadID_in_group * 2 + (i & 1) + 8;
  }

  __device__ int col_b() const { return groupID; }
  __device__ int row_c(int i) const { return i <= 1 ? groupID : groupID + 8; }
  __device__ int col_c(int i) const { return threadID_in_group * 2 + (i & 1); }
};

__device__ PtxManual of_this_lane() {
  const int lane = threadIdx.x % 32;
  return {lane >> 2, lane % 4};
}

// c = c + a b for a (16, K), b (K, 8), c (16, 8), all row by row.
__global__ void product_tf32(Global<const float> a, Global<const float> b, Global<float> c, int round) {
  const PtxManual at = of_this_lane();
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_c[4];
  for (int i = 0; i < 4; ++i) {
    const float value = a[at.row_a_tf32(i) * 8 + at.col_a_tf32(i)];
    fragment_a[i] = round ? round_to_tf32(value) : __float_as_uint(value);
  }
  for (int i = 0; i < 2; ++i) fragment_b[i] = round_to_tf32(b[at.row_b_tf32(i) * 8 + at.col_b()]);
  for (int i = 0; i < 4; ++i) fragment_c[i] = c[at.row_c(i) * 8 + at.col_c(i)];
  Mma<tf32, 8>::multiply(fragment_c, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[at.row_c(i) * 8 + at.col_c(i)] = fragment_c[i];
}

template <class T, int K>
__global__ void product_16_bit(Global<const float> a, Global<const float> b, Global<float> c) {
  const PtxManual at = of_this_lane();
  uint32_t fragment_a[K / 4], fragment_b[K / 8];
  float fragment_c[4];
  for (int i = 0; i < K / 2; i += 2) {
    const int row = K == 8 ? at.row_a_k8(i) : at.row_a_k16(i);
    fragment_a[i / 2] = pack<T>(a[row * K + at.col_a(i)], a[row * K + at.col_a(i + 1)]);
  }
  for (int i = 0; i < K / 4; i += 2) {
    fragment_b[i / 2] = pack<T>(b[at.row_b(i) * 8 + at.col_b()], b[at.row_b(i + 1) * 8 + at.col_b()]);
  }
  for (int i = 0; i < 4; ++i) fragment_c[i] = c[at.row_c(i) * 8 + at.col_c(i)];
  Mma<T, K>::multiply(fragment_c, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[at.row_c(i) * 8 + at.col_c(i)] = fragment_c[i];
}

// The same product with operands from shared memory: a by rows, b, which lies by rows too, transposed on the way.
template <class T>
__global__ void product_of_loaded_matrices(Global<const float> a, Global<const float> b, Global<float> c) {
  FASTSAM_SHARED(T, tile_a, 16 * 16);
  FASTSAM_SHARED(T, tile_b, 16 * 8);
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += 32) tile_a[i] = narrow<T>(a[i]);
  for (int i = lane; i < 16 * 8; i += 32) tile_b[i] = narrow<T>(b[i]);
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_c[4];
  ldmatrix<4>(fragment_a, tile_a + (lane % 16 * 16 + lane / 16 * 8));
  ldmatrix<2, true>(fragment_b, tile_b + lane % 16 * 8);
  const PtxManual at = of_this_lane();
  for (int i = 0; i < 4; ++i) fragment_c[i] = c[at.row_c(i) * 8 + at.col_c(i)];
  Mma<T, 16>::multiply(fragment_c, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[at.row_c(i) * 8 + at.col_c(i)] = fragment_c[i];
}

template <int Count, bool Transposed>
__global__ void load_matrices(Global<const __half> x, Global<uint32_t> y) {
  FASTSAM_SHARED(__half, tile, Count * 64);
  const int lane = threadIdx.x;
  for (int i = lane; i < Count * 64; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t matrix[Count];
  ldmatrix<Count, Transposed>(matrix, tile + lane % (8 * Count) * 8);
  for (int i = 0; i < Count; ++i) y[i * 32 + lane] = matrix[i];
}

}  // namespace
}  // namespace fastsam::cuda

using namespace fastsam;
using namespace fastsam::cuda;

extern "C" const char* run_tf32_8(const float* a, const float* b, float* c, int64_t round) {
  return simt::run([&] {
    simt::launch("product_tf32", product_tf32, {1, 32}, simt::input(a, 128, "a"), simt::input(b, 64, "b"),
                 simt::in_out(c, 128, "c"), round);
  });
}

template <class Kernel>
const char* run_product(Kernel* kernel, int k, const float* a, const float* b, float* c) {
  return simt::run([&] {
    simt::launch("product", kernel, {1, 32}, simt::input(a, 16 * k, "a"), simt::input(b, 8 * k, "b"),
                 simt::in_out(c, 128, "c"));
  });
}
extern "C" const char* run_half_8(const float* a, const float* b, float* c) {
  return run_product(product_16_bit<__half, 8>, 8, a, b, c);
}
extern "C" const char* run_half_16(const float* a, const float* b, float* c) {
  return run_product(product_16_bit<__half, 16>, 16, a, b, c);
}
extern "C" const char* run_bfloat16_16(const float* a, const float* b, float* c) {
  return run_product(product_16_bit<__nv_bfloat16, 16>, 16, a, b, c);
}
extern "C" const char* run_loaded_half(const float* a, const float* b, float* c) {
  return run_product(product_of_loaded_matrices<__half>, 16, a, b, c);
}
extern "C" const char* run_loaded_bfloat16(const float* a, const float* b, float* c) {
  return run_product(product_of_loaded_matrices<__nv_bfloat16>, 16, a, b, c);
}

template <int Count, bool Transposed>
const char* run_load_matrices(const __half* x, uint32_t* y) {
  return simt::run([&] {
    simt::launch("load_matrices", load_matrices<Count, Transposed>, {1, 32}, simt::input(x, Count * 64, "x"),
                 simt::output(y, Count * 32, "y"));
  });
}
extern "C" const char* run_load_1(const __half* x, uint32_t* y) { return run_load_matrices<1, false>(x, y); }
extern "C" const char* run_load_2(const __half* x, uint32_t* y) { return run_load_matrices<2, false>(x, y); }
extern "C" const char* run_load_4(const __half* x, uint32_t* y) { return run_load_matrices<4, false>(x, y); }
extern "C" const char* run_load_1_transposed(const __half* x, uint32_t* y) { return run_load_matrices<1, true>(x, y); }
extern "C" const char* run_load_2_transposed(const __half* x, uint32_t* y) { return run_load_matrices<2, true>(x, y); }
extern "C" const char* run_load_4_transposed(const __half* x, uint32_t* y) { return run_load_matrices<4, true>(x, y); }

// The layout as Mma tells it to kernels: for a, b and c, each lane and each element, its row and column.
template <class M>
const char* tell_layout(int32_t* a, int32_t* b, int32_t* c) {
  const auto tell = [](int32_t*& to, int row, int col) {
    *to++ = row;
    *to++ = col;
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < M::kElementsA; ++i) tell(a, M::row_a(lane, i), M::col_a(lane, i));
    for (int i = 0; i < M::kElementsB; ++i) tell(b, M::row_b(lane, i), M::col_b(lane, i));
    for (int i = 0; i < M::kElementsC; ++i) tell(c, M::row_c(lane, i), M::col_c(lane, i));
  }
  return nullptr;
}
extern "C" const char* layout_tf32_8(int32_t* a, int32_t* b, int32_t* c) { return tell_layout<Mma<tf32, 8>>(a, b, c); }
extern "C" const char* layout_half_8(int32_t* a, int32_t* b, int32_t* c) {
  return tell_layout<Mma<__half, 8>>(a, b, c);
}
extern "C" const char* layout_half_16(int32_t* a, int32_t* b, int32_t* c) {
  return tell_layout<Mma<__half, 16>>(a, b, c);
}
extern "C" const char* layout_bfloat16_16(int32_t* a, int32_t* b, int32_t* c) {
  return tell_layout<Mma<__nv_bfloat16, 16>>(a, b, c);
}
