// The activations of gates.
#pragma once

#include "fastsam/simt.cuh"

namespace fastsam::cuda {

// The fast division is exact to 2 ulp, and a divisor for which it gives 0 stands for a number below 2^-126.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

}  // namespace fastsam::cuda
