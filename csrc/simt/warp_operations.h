// The host twins of PTX instructions that need more than a line: csrc/include/fastsam/ptx.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/cuda_names.h"

namespace fastsam::simt {

inline float flush_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

inline uint32_t tf32_bits(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fffffff;  // NaN
  return (bits + 0x1000) & ~0x1fffu;
}

// cp.async reads its source when it starts, as far as races go, and shows what it read when it lands.
template <int Bytes, class T, class U>
void async_copy(Pointer<T, Space::kShared> to, Pointer<U, Space::kGlobal> from, int source_bytes, Site site) {
  static_assert(Bytes % sizeof(T) == 0 && sizeof(T) == sizeof(U), "cp.async copies whole elements of one size");
  struct alignas(Bytes) Chunk {
    char bytes[Bytes];
  };
  if (source_bytes < 0 || source_bytes > Bytes || source_bytes % sizeof(U) != 0) {
    fail(site, "cp.async of " + std::to_string(Bytes) + " bytes, " + std::to_string(source_bytes) +
                   " from the source: must be whole elements, at most all");
  }
  const void* source = nullptr;
  if (source_bytes > 0) {
    Span span = from.template span<Chunk>();
    span.bytes = source_bytes;
    source = reading(span, site);
  }
  begin_async_copy(to.template span<Chunk>(), source, source_bytes, site);
}

struct MatrixRow {
  uint16_t values[8];
  int count;
  bool transposed;
  uint32_t* matrix;  // of the lane that gave the row
};

inline void share_matrices(Lanes& lanes) {
  const auto lane_row = [&](int lane) -> MatrixRow& { return *static_cast<MatrixRow*>(lanes.payload[lane]); };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MatrixRow& mine = lane_row(lane);
    for (int i = 0; i < mine.count; ++i) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto element = [&](int r, int c) -> uint32_t {
        return mine.transposed ? lane_row(8 * i + c).values[r] : lane_row(8 * i + r).values[c];
      };
      mine.matrix[i] = element(row, column) | element(row, column + 1) << 16;
    }
  }
}

template <class T>
void load_matrices(uint32_t* matrix, int count, bool transposed, Pointer<T, Space::kShared> row, Site site) {
  struct alignas(16) Row {
    uint16_t values[8];
  };
  MatrixRow payload{{}, count, transposed, matrix};
  check_address(row.template span<Row>(), "ldmatrix", site);  // 7.5 wants one of every lane
  if (lane_index() < 8 * count) {
    const Row values = read_as<Row>(row.template span<Row>(), site);
    std::memcpy(payload.values, values.values, sizeof values);
  }
  gather("ldmatrix", kWholeWarp, &payload, share_matrices, site, true);
}

// Element i of a fragment, from its registers.
inline float half_element(const uint32_t* registers, int i) {
  return float_from_half_bits(static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16));
}
inline float bfloat16_element(const uint32_t* registers, int i) {
  return float_from_bits(registers[i / 2] >> i % 2 * 16 << 16);
}
// Tensor cores ignore the lower 13 bits of a tf32 operand.
inline float tf32_element(const uint32_t* registers, int i) { return float_from_bits(registers[i] & ~0x1fffu); }

using ElementOf = float (*)(const uint32_t* registers, int i);

struct Fragments {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  ElementOf element;
};

// c += a b from the fragments of all lanes. Sums in float32 in the order of k; a tensor core's order and its rounding
// within one instruction are not documented.
template <class Mma>
void multiply_gathered(Lanes& lanes) {
  float a[16][Mma::kK], b[Mma::kK][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(lanes.payload[lane]);
    for (int i = 0; i < Mma::kElementsA; ++i) a[Mma::row_a(lane, i)][Mma::col_a(lane, i)] = mine.element(mine.a, i);
    for (int i = 0; i < Mma::kElementsB; ++i) b[Mma::row_b(lane, i)][Mma::col_b(lane, i)] = mine.element(mine.b, i);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(lanes.payload[lane]);
    for (int i = 0; i < Mma::kElementsC; ++i) {
      const int row = Mma::row_c(lane, i), col = Mma::col_c(lane, i);
      for (int k = 0; k < Mma::kK; ++k) mine.c[i] += a[row][k] * b[k][col];
    }
  }
}

template <class Mma>
void multiply_matrices(const char* name, float* c, const uint32_t* a, const uint32_t* b, Site site, ElementOf element) {
  Fragments payload{c, a, b, element};
  gather(name, kWholeWarp, &payload, multiply_gathered<Mma>, site, true);
}

}  // namespace fastsam::simt
