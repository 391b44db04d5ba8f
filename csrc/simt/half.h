// CUDA's 16-bit floating-point types on the host, rounded to nearest even. Conversions are explicit, so that a kernel
// says where it rounds.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastsam::simt {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Shifts right and rounds the bits that fall out to nearest, ties to even. 0 < shift < 32.
inline uint32_t shift_to_nearest_even(uint32_t bits, int shift) {
  const uint32_t kept = bits >> shift, lost = bits & ((1u << shift) - 1), half = 1u << (shift - 1);
  return kept + (lost > half || (lost == half && (kept & 1)));
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;                                 // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x33000000) return static_cast<uint16_t>(sign);            // under half of the least subnormal
  const int exponent = static_cast<int>(magnitude >> 23);
  if (exponent < 113) {  // subnormal: units of 2^-24
    const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
    return static_cast<uint16_t>(sign | shift_to_nearest_even(mantissa, 126 - exponent));
  }
  return static_cast<uint16_t>(sign | (shift_to_nearest_even(magnitude, 13) - (112u << 10)));
}

inline float float_from_half_bits(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>(shift_to_nearest_even(bits, 16));
}

}  // namespace fastsam::simt

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) : bits(fastsam::simt::half_bits(value)) {}
  explicit operator float() const { return fastsam::simt::float_from_half_bits(bits); }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) : bits(fastsam::simt::bfloat16_bits(value)) {}
  explicit operator float() const { return fastsam::simt::float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
