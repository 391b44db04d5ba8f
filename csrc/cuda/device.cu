#include "fastsam/device.h"

#include <cuda_runtime.h>

namespace fastsam::cuda {
namespace {

// The runtime keeps the last error for whoever asks next, so a failed question must not leave one behind.
int value_or_zero(cudaError_t status, int value) {
  if (status == cudaSuccess) return value;
  cudaGetLastError();
  return 0;
}

int attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, name, device);
  return value_or_zero(status, value);
}

__global__ void probe() {}

}  // namespace

int runtime_version() {
  int version = 0;
  const cudaError_t status = cudaRuntimeGetVersion(&version);
  return value_or_zero(status, version);
}

int driver_version() {
  int version = 0;
  const cudaError_t status = cudaDriverGetVersion(&version);
  return value_or_zero(status, version);
}

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  return value_or_zero(status, count);
}

void compute_capability(int device, int* major, int* minor) {
  *major = attribute(device, cudaDevAttrComputeCapabilityMajor);
  *minor = attribute(device, cudaDevAttrComputeCapabilityMinor);
}

int code_capability() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
  return value_or_zero(status, attributes.ptxVersion);
}

int shared_bytes_of_block(int device) { return attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace fastsam::cuda
