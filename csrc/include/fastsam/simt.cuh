// The vocabulary of the kernels beyond CUDA's own names. On a device it is plain CUDA: Global<T> and Shared<T> are T*.
// On the host the same source runs thread by thread, with every access checked: csrc/simt/README.md.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

// Last parameter of functions that report where they were called, which only the host does.
#define FASTSAM_SITE

namespace fastsam::cuda {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

}  // namespace fastsam::cuda

#else

#include "simt/cuda_names.h"

#define FASTSAM_SITE , simt::Site site = FASTSAM_HERE

namespace fastsam::cuda {

template <class T>
using Global = simt::Pointer<T, simt::Space::kGlobal>;
template <class T>
using Shared = simt::Pointer<T, simt::Space::kShared>;

}  // namespace fastsam::cuda

#endif

namespace fastsam::cuda {

// Bytes that SharedArena::take<T>(count) takes.
template <class T>
__host__ __device__ constexpr int64_t shared_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

// N values that are loaded and stored as one, such as Vec<__half, 8>.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T value[N];
  __device__ T& operator[](int i) { return value[i]; }
  __device__ const T& operator[](int i) const { return value[i]; }
};

// The type in which values stored as T are computed with, and the ways there and back, rounded to nearest even.
template <class T>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <class T>
using Wide = typename WideOf<T>::Type;

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T narrow(Wide<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

#ifdef __CUDACC__

// Static shared memory: `count` elements of T, a constant.
#define FASTSAM_SHARED(T, name, count) __shared__ __align__(16) T name[count]

// Hands out the dynamic shared memory of the block from its start. A copy made before a take reuses the same bytes.
class SharedArena {
 public:
  __device__ __forceinline__ SharedArena() {
    extern __shared__ __align__(128) unsigned char fastsam_dynamic_shared[];
    next_ = fastsam_dynamic_shared;
  }

  // The next `count` elements, 16-byte aligned.
  template <class T>
  __device__ __forceinline__ T* take(int64_t count, const char*) {
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += shared_bytes<T>(count);
    return taken;
  }

 private:
  unsigned char* next_;
};

template <int Bytes>
struct RawBytes;
template <>
struct RawBytes<2> {
  using Type = unsigned short;
};
template <>
struct RawBytes<4> {
  using Type = unsigned;
};
template <>
struct RawBytes<8> {
  using Type = uint2;
};
template <>
struct RawBytes<16> {
  using Type = uint4;
};

// Reads the elements that one V covers, in one instruction. The address must be a multiple of V's size.
template <class V, class T>
__device__ __forceinline__ V load(const T* from) {
  static_assert(alignof(V) == sizeof(V) && sizeof(V) % sizeof(T) == 0, "a vector of whole elements");
  const auto raw = *reinterpret_cast<const typename RawBytes<sizeof(V)>::Type*>(from);
  V value;
  memcpy(&value, &raw, sizeof(V));
  return value;
}

template <class V, class T>
__device__ __forceinline__ void store(T* to, const V& value) {
  static_assert(alignof(V) == sizeof(V) && sizeof(V) % sizeof(T) == 0, "a vector of whole elements");
  typename RawBytes<sizeof(V)>::Type raw;
  memcpy(&raw, &value, sizeof(V));
  *reinterpret_cast<typename RawBytes<sizeof(V)>::Type*>(to) = raw;
}

#else

#define FASTSAM_SHARED(T, name, count) \
  ::fastsam::cuda::Shared<T> name(     \
      ::fastsam::simt::static_shared_object((count) * sizeof(T), #name, sizeof(T), {__FILE__, __LINE__}), 0)

class SharedArena {
 public:
  template <class T>
  Shared<T> take(int64_t count, const char* name FASTSAM_SITE) {
    static_assert(sizeof(T) >= 2, "races are tracked in steps of two bytes");
    const int64_t start = next_;
    next_ += shared_bytes<T>(count);
    return {simt::dynamic_shared_object(start, count * static_cast<int64_t>(sizeof(T)), name, sizeof(T), site), 0};
  }

 private:
  int64_t next_ = 0;
};

template <class V, class T, simt::Space space>
V load(simt::Pointer<T, space> from FASTSAM_SITE) {
  static_assert(alignof(V) == sizeof(V), "a vector of whole elements");
  return simt::read_as<V>(from.template span<V>(), site);
}

template <class V, class T, simt::Space space>
void store(simt::Pointer<T, space> to, const V& value FASTSAM_SITE) {
  static_assert(!std::is_const_v<T> && alignof(V) == sizeof(V), "a vector of whole elements");
  std::memcpy(simt::writing(to.template span<V>(), site), &value, sizeof(V));
}

#endif

}  // namespace fastsam::cuda
