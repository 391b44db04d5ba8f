// Vectors of float or double as wide as the instruction set, and the activations on them.
//
// GCC and Clang have vector types; elsewhere a plain array with the same operators takes their place.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(_MSC_VER)
#define FASTSAM_NOINLINE __declspec(noinline)
#else
#define FASTSAM_NOINLINE __attribute__((noinline))
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

// The first `count` lanes from memory; the others are 0.
template <class T>
inline Vec<T> load_part(const T* address, int64_t count) {
  if (count == kLanes<T>) return load(address);
  T lanes[kLanes<T>] = {};
  std::memcpy(lanes, address, count * sizeof(T));
  return load(lanes);
}

// Coefficients of q in e^r = 1 + r + r^2 q(r), |r| <= ln(2)/2 (Chebyshev fit; absolute error 8e-9 and 2e-19), the
// rounding constant whose low mantissa bits receive the exponent, and ln(2) in two parts, the first exact in n ln(2).
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float kCoefficients[] = {0.5f, 0.16666576989698775683f, 0.041666554617204574203f,
                                            0.0083631790527225773704f, 0.0013926183587713494542f};
  static constexpr float kRound = 12582912.0f, kLow = -87.3f, kHigh = 88.37f;
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
  static constexpr double kRound = 6755399441055744.0, kLow = -708.0, kHigh = 709.43;
  static constexpr double kLn2High = 0.6931471803691238, kLn2Low = 1.9082149292705877e-10;
  static constexpr int kMantissaBits = 52;
  static constexpr double kTanhLimit = 20.0;
};

// e^x = scale (1 + fraction): scale = 2^n, fraction = e^r - 1 for x = n ln(2) + r.
template <class T>
struct ExponentialParts {
  Vec<T> scale, fraction;
};

template <class T>
inline ExponentialParts<T> exponential_parts(Vec<T> x) {
  using E = Exponential<T>;
  using I = typename IntegerOf<T>::type;
  const Vec<T> rounded = x * broadcast<T>(T(1.44269504088896340736)) + broadcast<T>(E::kRound);
  const Vec<T> n = rounded - broadcast<T>(E::kRound);
  const Vec<T> r = (x - n * broadcast<T>(E::kLn2High)) - n * broadcast<T>(E::kLn2Low);
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
