// A copy of rows, a block each, whose offsets are right in 64 bits, and wrong where they are computed in 32.
#include "fastsam/simt.cuh"
#include "simt/launch.h"

namespace fastsam::cuda {
namespace {

// bits: 64; 32 for an offset that becomes negative beyond 2^31; 33 for one that begins anew at 2^32.
__global__ void copy_rows(Global<const float> x, Global<float> y, int length, int bits) {
  const unsigned row = blockIdx.x, wrapped = row * length;
  const int64_t offset = bits == 64   ? row * static_cast<int64_t>(length)
                         : bits == 32 ? static_cast<int64_t>(static_cast<int>(wrapped))
                                      : wrapped;
  for (int i = threadIdx.x; i < length; i += blockDim.x) y[offset + i] = x[offset + i];
}

}  // namespace
}  // namespace fastsam::cuda

using namespace fastsam;

extern "C" const char* copy_rows(const float* x, float* y, int64_t rows, int64_t length, int64_t bits) {
  return simt::run([&] {
    simt::launch("copy_rows", cuda::copy_rows, {static_cast<unsigned>(rows), 64}, simt::input(x, rows * length, "x"),
                 simt::output(y, rows * length, "y"), length, bits);
  });
}
