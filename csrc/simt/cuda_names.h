// CUDA's own names on the host: what a kernel may use without knowing that it does not run on a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

#include "simt/half.h"
#include "simt/pointers.h"
#include "simt/runtime.h"
#include "simt/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// Barriers

inline void __syncthreads(fastsam::simt::Site site = FASTSAM_HERE) { fastsam::simt::sync_block(site); }

inline void __syncwarp(uint32_t mask = fastsam::simt::kWholeWarp, fastsam::simt::Site site = FASTSAM_HERE) {
  fastsam::simt::sync_warp(mask, site);
}

[[noreturn]] inline void __trap(fastsam::simt::Site site = FASTSAM_HERE) { fastsam::simt::fail(site, "__trap"); }

// Shuffles and votes, of the whole warp: CUDA's argument `width` is not served.

namespace fastsam::simt {

template <class T>
struct Shuffled {
  T value;
  T result;
  int source;  // lane
};

template <class T>
void exchange(Lanes& lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes.payload[lane] == nullptr) continue;
    auto& mine = *static_cast<Shuffled<T>*>(lanes.payload[lane]);
    const auto* source = static_cast<const Shuffled<T>*>(lanes.payload[mine.source]);
    if (source == nullptr) {
      fail(lanes.site[lane], "shuffle reads lane " + std::to_string(mine.source) + ", which does not take part",
           lanes.first_thread + lane);
    }
    mine.result = source->value;
  }
}

inline int lane_index() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize;
}

// The value of lane `source`, or of the calling lane where there is no such lane.
template <class T>
T shuffle(const char* operation, uint32_t mask, T value, int source, Site site) {
  Shuffled<T> payload{value, value, source >= 0 && source < kWarpSize ? source : lane_index()};
  gather(operation, mask, &payload, exchange<T>, site);
  return payload.result;
}

// The bits of the lanes for which `predicate` holds.
inline uint32_t vote(const char* operation, uint32_t mask, bool predicate, Site site) {
  uint32_t payload = predicate;
  const auto combine = [](Lanes& lanes) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes.payload[lane] != nullptr) ballot |= *static_cast<uint32_t*>(lanes.payload[lane]) << lane;
    }
    for (void* lane : lanes.payload) {
      if (lane != nullptr) *static_cast<uint32_t*>(lane) = ballot;
    }
  };
  gather(operation, mask, &payload, combine, site);
  return payload;
}

}  // namespace fastsam::simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::shuffle("__shfl_sync", mask, value, source & 31, site);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::shuffle("__shfl_xor_sync", mask, value, fastsam::simt::lane_index() ^ lane_mask, site);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::shuffle("__shfl_down_sync", mask, value, fastsam::simt::lane_index() + delta, site);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::shuffle("__shfl_up_sync", mask, value, fastsam::simt::lane_index() - delta, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::vote("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(uint32_t mask, int predicate, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::vote("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(uint32_t mask, int predicate, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::vote("__all_sync", mask, predicate != 0, site) == mask;
}

// Memory

template <class T>
T __ldg(fastsam::simt::Pointer<const T, fastsam::simt::Space::kGlobal> from, fastsam::simt::Site site = FASTSAM_HERE) {
  return fastsam::simt::read_as<T>(from.template span<T>(), site);
}

// Mathematics. The fast division is as accurate here as the ordinary one: tests must leave it its error.

inline float __fdividef(float x, float y) { return x / y; }

#define FASTSAM_MIN_MAX(T)                         \
  inline T min(T x, T y) { return y < x ? y : x; } \
  inline T max(T x, T y) { return x < y ? y : x; }
FASTSAM_MIN_MAX(int)
FASTSAM_MIN_MAX(unsigned)
FASTSAM_MIN_MAX(long)
FASTSAM_MIN_MAX(unsigned long)
FASTSAM_MIN_MAX(long long)
FASTSAM_MIN_MAX(unsigned long long)
#undef FASTSAM_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

inline uint32_t __float_as_uint(float value) { return fastsam::simt::float_bits(value); }
inline float __uint_as_float(uint32_t bits) { return fastsam::simt::float_from_bits(bits); }
