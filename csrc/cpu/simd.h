// Vectors of float or double as wide as the instruction set, and the activations on them.
//
// GCC and Clang have vector types; elsewhere a plain array with the same operators takes their place.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "fastsam/params.h"

#if defined(_MSC_VER)
#define FASTSAM_NOINLINE __declspec(noinline)
#else
#define FASTSAM_NOINLINE __attribute__((noinline))
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTSAM_SHUFFLE 1
#endif
#endif

namespace fastsam {
namespace FASTSAM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

#if defined(__GNUC__)

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<bfloat16> {};  // stored, not computed in
template <class T>
using Vec = typename VectorOf<T>::type;

// The same vector at any address; memcpy instead would keep the micro-kernel's accumulators on the stack.
template <class T>
struct UnalignedOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <class T>
inline Vec<T> load(const T* address) {
  return *reinterpret_cast<const typename UnalignedOf<T>::type*>(address);
}

template <class T>
inline void store(T* address, Vec<T> value) {
  *reinterpret_cast<typename UnalignedOf<T>::type*>(address) = value;
}

template <class T>
inline Vec<T> where(Vec<T> left, Vec<T> right, Vec<T> if_less, Vec<T> otherwise) {
  return left < right ? if_less : otherwise;
}

#else

template <class T>
struct Vec {
  T lane[kLanes<T>];
  T operator[](int index) const { return lane[index]; }
};

#define FASTSAM_LANEWISE(op)                                                                                  \
  template <class T>                                                                                          \
  inline Vec<T> operator op(Vec<T> left, Vec<T> right) {                                                      \
    for (int index = 0; index < kLanes<T>; ++index) left.lane[index] = left.lane[index] op right.lane[index]; \
    return left;                                                                                              \
  }
FASTSAM_LANEWISE(+)
FASTSAM_LANEWISE(-)
FASTSAM_LANEWISE(*)
FASTSAM_LANEWISE(/)
#undef FASTSAM_LANEWISE

template <class T>
inline Vec<T> load(const T* address) {
  Vec<T> value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

template <class T>
inline void store(T* address, Vec<T> value) {
  std::memcpy(address, &value, sizeof(value));
}

template <class T>
inline Vec<T>& operator+=(Vec<T>& left, Vec<T> right) {
  return left = left + right;
}
template <class T>
inline Vec<T>& operator*=(Vec<T>& left, Vec<T> right) {
  return left = left * right;
}

template <class T>
inline Vec<T> where(Vec<T> left, Vec<T> right, Vec<T> if_less, Vec<T> otherwise) {
  for (int index = 0; index < kLanes<T>; ++index) {
    if (left.lane[index] < right.lane[index]) otherwise.lane[index] = if_less.lane[index];
  }
  return otherwise;
}

#endif

template <class T>
inline Vec<T> broadcast(T scalar) {
#if defined(__GNUC__)
  return scalar - Vec<T>{};
#else
  Vec<T> value;
  for (int index = 0; index < kLanes<T>; ++index) value.lane[index] = scalar;
  return value;
#endif
}

template <class T>
inline T sum_lanes(Vec<T> value) {
  T sum = value[0];
  for (int index = 1; index < kLanes<T>; ++index) sum += value[index];
  return sum;
}

inline Vec<float> load(const bfloat16* address) {
  bfloat16 narrow[kLanes<float>];
  std::memcpy(narrow, address, sizeof(narrow));
  uint32_t wide[kLanes<float>];
  for (int lane = 0; lane < kLanes<float>; ++lane) wide[lane] = static_cast<uint32_t>(narrow[lane].bits) << 16;
  Vec<float> value;
  std::memcpy(&value, wide, sizeof(value));
  return value;
}

// Rounds to the nearest, ties to even; NaN becomes a quiet NaN.
inline void store(bfloat16* address, Vec<float> value) {
  uint32_t wide[kLanes<float>];
  std::memcpy(wide, &value, sizeof(value));
  bfloat16 narrow[kLanes<float>];
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    const uint32_t bits = wide[lane], rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    narrow[lane].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
  }
  std::memcpy(address, narrow, sizeof(narrow));
}

// The larger of each pair of lanes; `right` where one is NaN.
template <class T>
inline Vec<T> larger(Vec<T> left, Vec<T> right) {
  return where<T>(right, left, left, right);
}

#if FASTSAM_SHUFFLE
// Element i of the result is element (i + first) / 2 of `left` where i is even, of `right` where it is odd.
template <class T, int first, size_t... i>
inline Vec<T> interleave(Vec<T> left, Vec<T> right, std::index_sequence<i...>) {
  return __builtin_shufflevector(left, right, ((i + first) / 2 + i % 2 * sizeof...(i))...);
}
#endif

// out[column][row] = in[row][column] for a square of kLanes rows and columns.
template <class T>
inline void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  constexpr int size = kLanes<T>;
#if FASTSAM_SHUFFLE
  // A perfect shuffle of all elements rotates the bits of their index (row, column) by one.
  constexpr auto lanes = std::make_index_sequence<size>();
  Vec<T> line[size], shuffled[size];
  for (int row = 0; row < size; ++row) line[row] = load(in + row * in_stride);
  for (int bit = 1; bit < size; bit *= 2) {
    for (int row = 0; row < size / 2; ++row) {
      shuffled[2 * row] = interleave<T, 0>(line[row], line[row + size / 2], lanes);
      shuffled[2 * row + 1] = interleave<T, size>(line[row], line[row + size / 2], lanes);
    }
    for (int row = 0; row < size; ++row) line[row] = shuffled[row];
  }
  for (int row = 0; row < size; ++row) store(out + row * out_stride, line[row]);
#else
  for (int row = 0; row < size; ++row) {
    for (int column = 0; column < size; ++column) out[column * out_stride + row] = in[row * in_stride + column];
  }
#endif
}

// The first `count` lanes from memory; the others are 0.
template <class S>
inline Vec<Compute<S>> load_part(const S* address, int64_t count) {
  constexpr int lanes = kLanes<Compute<S>>;
  if (count == lanes) return load(address);
  S part[lanes] = {};
  std::memcpy(part, address, count * sizeof(S));
  return load(part);
}

// The first `count` lanes to memory.
template <class S>
inline void store_part(S* address, int64_t count, Vec<Compute<S>> value) {
  constexpr int lanes = kLanes<Compute<S>>;
  if (count == lanes) return store(address, value);
  S part[lanes];
  store(part, value);
  std::memcpy(address, part, count * sizeof(S));
}

// Copies `count` values, from and to any storage type.
template <class From, class To>
inline void copy_lanes(const From* from, int64_t count, To* to) {
  constexpr int lanes = kLanes<Compute<From>>;
  int64_t lane = 0;
  for (; lane + lanes <= count; lane += lanes) store(to + lane, load(from + lane));
  if (lane < count) store_part(to + lane, count - lane, load_part(from + lane, count - lane));
}

constexpr double kLn2 = 0.69314718055994530942, kLog2E = 1.44269504088896340736;

// Coefficients of q in e^r = 1 + r + r^2 q(r), |r| <= ln(2)/2 (Chebyshev fit; absolute error 8e-9 and 2e-19), the
// rounding constant whose low mantissa bits receive the exponent, and ln(2) in two parts, the first exact in n ln(2).
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kCoefficients[] = {0.5f, 0.16666576989698775683f, 0.041666554617204574203f,
                                            0.0083631790527225773704f, 0.0013926183587713494542f};
  static constexpr float kRound = 12582912.0f, kLow = -87.3f, kHigh = 88.37f, kLow2 = -127.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissaBits = 23;
  static constexpr float kTanhLimit = 10.0f;
};
template <>
struct Exponential<double> {
  static constexpr double kCoefficients[] = {0.5,
                                             0.16666666666666670991,
                                             0.041666666666666669755,
                                             0.0083333333333261351258,
                                             0.0013888888888883748305,
                                             0.00019841269874820625271,
                                             0.000024801587325547741216,
                                             2.755725540020642443e-6,
                                             2.7557273643110295328e-7,
                                             2.5105217004720745164e-8,
                                             2.0914686968086877233e-9};
  static constexpr double kRound = 6755399441055744.0, kLow = -708.0, kHigh = 709.43, kLow2 = -1023.0;
  static constexpr double kLn2High = 0.6931471803691238, kLn2Low = 1.9082149292705877e-10;
  static constexpr int kMantissaBits = 52;
  static constexpr double kTanhLimit = 20.0;
};

// e^x = scale (1 + fraction): scale = 2^n, fraction = e^r - 1 for x = n ln(2) + r.
template <class T>
struct ExponentialParts {
  Vec<T> scale, fraction;
};

// From r, and n + kRound. n = -127 (-1023 in double) gives scale 0.
template <class T>
inline ExponentialParts<T> exponential_parts(Vec<T> rounded, Vec<T> r) {
  using E = Exponential<T>;
  using I = typename IntegerOf<T>::type;
  constexpr int count = sizeof(E::kCoefficients) / sizeof(T);
  Vec<T> q = broadcast<T>(E::kCoefficients[count - 1]);
  for (int index = count - 2; index >= 0; --index) q = q * r + broadcast<T>(E::kCoefficients[index]);
  ExponentialParts<T> parts;
  parts.fraction = r + r * r * q;
  I bits[kLanes<T>];
  std::memcpy(bits, &rounded, sizeof(bits));
  constexpr I one = I(sizeof(T) == 4 ? 127 : 1023);
  using U = typename std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  for (int lane = 0; lane < kLanes<T>; ++lane)
    bits[lane] = static_cast<I>((static_cast<U>(bits[lane]) + U(one)) << E::kMantissaBits);
  std::memcpy(&parts.scale, bits, sizeof(bits));
  return parts;
}

template <class T>
inline ExponentialParts<T> exponential_parts(Vec<T> x) {
  using E = Exponential<T>;
  const Vec<T> rounded = x * broadcast<T>(T(kLog2E)) + broadcast<T>(E::kRound);
  const Vec<T> n = rounded - broadcast<T>(E::kRound);
  return exponential_parts<T>(rounded, (x - n * broadcast<T>(E::kLn2High)) - n * broadcast<T>(E::kLn2Low));
}

// e^x for x below 88 as a softmax needs it: exact for 0, relative error |x| 2^-24 (2^-53 in double), at two thirds of
// the cost of `exponential`. Below the smallest normal number it gives 0; NaN stays NaN.
template <class T>
inline Vec<T> softmax_exponential(Vec<T> x) {
  using E = Exponential<T>;
  x = larger<T>(broadcast<T>(E::kLow2), x * broadcast<T>(T(kLog2E)));
  const Vec<T> rounded = x + broadcast<T>(E::kRound);
  const auto parts = exponential_parts<T>(rounded, (x - (rounded - broadcast<T>(E::kRound))) * broadcast<T>(T(kLn2)));
  return parts.scale + parts.scale * parts.fraction;
}

// Within about 1 ulp; below the smallest normal number it gives 0, from kHigh on, where 2^n overflows, infinity. NaN
// stays NaN.
template <class T>
inline Vec<T> exponential(Vec<T> x) {
  const ExponentialParts<T> parts = exponential_parts<T>(x);
  const Vec<T> low = broadcast<T>(Exponential<T>::kLow), high = broadcast<T>(Exponential<T>::kHigh);
  Vec<T> result = parts.scale + parts.scale * parts.fraction;
  result = where<T>(x, low, broadcast<T>(T(0)), result);
  return where<T>(high, x, broadcast<T>(std::numeric_limits<T>::infinity()), result);
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> one = broadcast<T>(T(1));
  return one / (one + exponential<T>(broadcast<T>(T(0)) - x));
}

// expm1(2x) / (expm1(2x) + 2): exact to a few ulp near 0, where 2 sigmoid(2x) - 1 would cancel.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> limit = broadcast<T>(Exponential<T>::kTanhLimit),
               minus_limit = broadcast<T>(-Exponential<T>::kTanhLimit);
  x = where<T>(limit, x, limit, x);
  x = where<T>(x, minus_limit, minus_limit, x);
  const ExponentialParts<T> parts = exponential_parts<T>(x + x);
  const Vec<T> expm1 = parts.scale * parts.fraction + (parts.scale - broadcast<T>(T(1)));
  return expm1 / (expm1 + broadcast<T>(T(2)));
}

}  // namespace FASTSAM_ISA
}  // namespace fastsam
