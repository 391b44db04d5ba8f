// How a test starts a kernel. Compiled for the host the kernel runs through the checks; compiled by nvcc it runs on a
// device, with addresses of device memory.
//
//   extern "C" const char* scale(const float* x, float* y, int64_t n, double factor) {
//     return simt::run([&] {
//       simt::launch("scale", scale<float>, {blocks, threads},
//                    simt::input(x, n, "x"), simt::output(y, n, "y"), n, factor);
//     });
//   }
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "fastsam/simt.cuh"

namespace fastsam::simt {

#ifdef __CUDACC__
inline const char* end_run(const char* error) {
  static std::string report;
  if (error == nullptr) return nullptr;
  report = error;
  return report.c_str();
}
#endif

struct LaunchShape {
  dim3 grid;
  dim3 block;
  int64_t shared_bytes = 0;  // dynamic
};

// Calls `launches` and returns nullptr, or what went wrong, in text that lasts until the next call.
template <class Launches>
const char* run(const Launches& launches) {
  try {
    launches();
  } catch (const std::exception& error) {
    return end_run(error.what());
  }
  return end_run(nullptr);
}

#ifdef __CUDACC__

template <class T>
const T* input(const T* address, int64_t, const char*) {
  return address;
}

template <class T>
T* output(T* address, int64_t, const char*) {
  return address;
}

template <class T>
T* in_out(T* address, int64_t, const char*) {
  return address;
}

inline void check(const char* kernel, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
  const int shared_bytes = static_cast<int>(shape.shared_bytes);
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<shape.grid, shape.block, shared_bytes>>>(static_cast<Parameters>(arguments)...);
  check(name, cudaGetLastError());
  check(name, cudaDeviceSynchronize());
}

#else

template <class T>
Pointer<T, Space::kGlobal> global(T* address, int64_t count, const char* name, Content content) {
  if (address == nullptr) return nullptr;
  if (count < 0) throw Fault(std::string(name) + ": " + std::to_string(count) + " elements");
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  return {global_object(address, bytes, name, sizeof(T), content), 0};
}

// `count` elements that kernels read; nullptr stays nullptr, here and below. No two objects may overlap.
template <class T>
Pointer<const T, Space::kGlobal> input(const T* address, int64_t count, const char* name) {
  return global(address, count, name, Content::kDefined);
}

// Elements that must be written before they are read.
template <class T>
Pointer<T, Space::kGlobal> output(T* address, int64_t count, const char* name) {
  return global(address, count, name, Content::kUndefined);
}

template <class T>
Pointer<T, Space::kGlobal> in_out(T* address, int64_t count, const char* name) {
  return global(address, count, name, Content::kDefined);
}

// Runs a kernel; `name` is for reports. Several launches in one run() see what the ones before have written.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
  run_grid(name, shape.grid, shape.block, shape.shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

#endif

// Where the host's part of an operator runs its kernels in tests; fastsam/launch.cuh has the one for devices.
class Platform {
 public:
  Platform() = default;

  // On a card whose blocks may have so much shared memory, static and dynamic together.
  explicit Platform(int64_t most_shared_bytes) : most_shared_bytes_(most_shared_bytes) {}

  template <class T>
  auto input(const T* address, int64_t count, const char* name) const {
    return simt::input(address, count, name);
  }

  template <class T>
  auto output(T* address, int64_t count, const char* name) const {
    return simt::output(address, count, name);
  }

  template <class Shape = LaunchShape, class... Parameters, class... Arguments>
  void start(const char* name, const Shape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    if (shape.grid.x == 0) return;
#ifdef __CUDACC__
    launch(name, kernel, {shape.grid, shape.block, shape.shared_bytes}, arguments...);
#else
    const int64_t room = most_shared_bytes_ - shape.shared_bytes;
    if (room < 0) {
      throw Fault(std::string(name) + ": a launch with " + std::to_string(shape.shared_bytes) +
                  " bytes of dynamic shared memory, a block on this card has " + std::to_string(most_shared_bytes_));
    }
    run_grid(name, shape.grid, shape.block, shape.shared_bytes, [&] {
      kernel(static_cast<Parameters>(arguments)...);
      // Next to what the kernel has of the 48 KiB for static objects, those that the card has no room for.
      constexpr int64_t kMostStatic = 48 << 10;
      if (room < kMostStatic) static_shared_object(kMostStatic - room, "beyond this card", 2, FASTSAM_HERE);
    });
#endif
  }

 private:
  int64_t most_shared_bytes_ = std::numeric_limits<int64_t>::max();
};

}  // namespace fastsam::simt
