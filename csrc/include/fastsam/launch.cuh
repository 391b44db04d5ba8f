// Starting kernels: the shape of a launch, and the launch itself with its error message.
#pragma once

#include <cstdint>

#include "fastsam/cuda_kernels.h"
#include "fastsam/simt.cuh"

#ifndef __CUDACC_RTC__  // which compiles kernels only
#include <stdexcept>
#include <string>
#endif

namespace fastsam::cuda {

// The type that stands in kernels for a storage type of params.h.
template <class S>
struct DeviceTypeOf {
  using Type = S;
};
template <>
struct DeviceTypeOf<float16> {
  using Type = __half;
};
template <>
struct DeviceTypeOf<bfloat16> {
  using Type = __nv_bfloat16;
};
template <class S>
using DeviceType = typename DeviceTypeOf<S>::Type;

template <class S>
DeviceType<S>* on_device(S* address) {
  return reinterpret_cast<DeviceType<S>*>(address);
}
template <class S>
const DeviceType<S>* on_device(const S* address) {
  return reinterpret_cast<const DeviceType<S>*>(address);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Into how many parts to cut each of `tasks` tasks of `size` items: as few as give `blocks` blocks in all, but parts of
// at least `least` items.
constexpr int64_t parts_to_fill(int64_t blocks, int64_t tasks, int64_t size, int64_t least) {
  const int64_t wanted = ceil_div(blocks, tasks > 0 ? tasks : 1), most = size > least ? size / least : 1;
  return wanted < most ? wanted : most;
}

// Calls use() with the first of these ways to multiply that serves maps of S on the device; the last one serves all.
template <class S, class Use, class Way, class... Others>
auto with_first_served(const Launch& launch, Use use, Way way, Others... others) {
  if constexpr (sizeof...(Others) > 0) {
    if (!Way::template serves<DeviceType<S>>(launch.capability)) return with_first_served<S>(launch, use, others...);
  }
  return use(way);
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  int64_t shared_bytes = 0;  // dynamic
};

#ifndef __CUDACC_RTC__

// Why something cannot be launched, as the end of a sentence that described() begins.
class LaunchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A number of blocks along x.
inline unsigned grid_size(int64_t blocks) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (blocks > kMostBlocks) {
    throw LaunchError("needs " + std::to_string(blocks) + " blocks, a launch has at most " +
                      std::to_string(kMostBlocks));
  }
  return static_cast<unsigned>(blocks);
}

// launches(), with errors that name the operator, its shapes and the device. `describe()` gives the first two.
template <class Describe, class Launches>
auto described(const Describe& describe, const Launch& launch, const Launches& launches) {
  try {
    return launches();
  } catch (const LaunchError& error) {
    throw std::runtime_error(describe() + " on CUDA device " + std::to_string(launch.device) + " " + error.what());
  }
}

#endif

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)

// Dynamic shared memory that a block has without opt-in: 48 KiB less its static one, of which no kernel has more
// than 4.
constexpr int64_t kSharedBytesWithoutAsking = 44 * 1024;

// Lets a kernel have all the shared memory of a block. Always the same, so threads that launch at once do not take it
// from each other, nor a launch from a graph that was captured before it.
template <class Kernel>
cudaError_t allow_shared_bytes(const Launch& launch, Kernel kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              launch.shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
}

// Starts `kernel`, unless the grid is empty.
template <class... Parameters, class... Arguments>
void launch_kernel(const Launch& launch, const LaunchShape& shape, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > kSharedBytesWithoutAsking) status = allow_shared_bytes(launch, kernel);
  if (status == cudaSuccess) {
    kernel<<<shape.grid, shape.block, shape.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
        static_cast<Parameters>(arguments)...);
    status = cudaPeekAtLastError();
  }
  if (status == cudaSuccess) return;
  cudaGetLastError();  // takes the error away, which the next call would report as its own
  throw LaunchError(std::string("failed: ") + cudaGetErrorString(status));
}

// Where the host's part of an operator runs its kernels. The tests have another, which executes them on the host and
// therefore wants to know how many elements there are at an address, and their name.
class DevicePlatform {
 public:
  explicit DevicePlatform(const Launch& launch) : launch_(launch) {}

  template <class T>
  const T* input(const T* address, int64_t, const char*) const {
    return address;
  }

  template <class T>
  T* output(T* address, int64_t, const char*) const {
    return address;
  }

  template <class... Parameters, class... Arguments>
  void start(const char*, const LaunchShape& shape, void (*kernel)(Parameters...),
             const Arguments&... arguments) const {
    launch_kernel(launch_, shape, kernel, arguments...);
  }

 private:
  const Launch& launch_;
};

#endif

}  // namespace fastsam::cuda
