// Small windows of planes in shared memory, and k x k correlations on them. A window is an 8 x 8 or 8 x 4 tile with its
// halo; thread tasks are its columns, of which the threads of a warp have 8 neighbours in 4 planes.
#pragma once

#include <type_traits>

#include "fastsam/block_product.cuh"

namespace fastsam::cuda {

constexpr int kTileWidth = 8, kMostPlanes = 16;

// Shared layout of windows of tiles of `tile_height` rows; `halo` columns on either side of the tile. Planes start 8
// words apart modulo the 32 banks (8 pairs of words if T is double).
struct WindowShape {
  int rows, width, plane, halo;

  // Columns of the halo before those that the filter needs.
  __host__ __device__ constexpr int unused(int kernel_size) const { return halo - kernel_size / 2; }
};

// Of elements of type T. In rows of 16 bits tiles start where elements can be copied several at a time.
template <class T>
__host__ __device__ constexpr WindowShape window_shape(int tile_height, int kernel_size) {
  constexpr int kStep = sizeof(T) == 2 ? kCopiedAtOnce : 1, kBanks = sizeof(T) == 2 ? 64 : 32;
  const int halo = (kernel_size / 2 + kStep - 1) / kStep * kStep;
  const int rows = tile_height + kernel_size - 1, width = kTileWidth + 2 * halo, area = rows * width;
  return {rows, width, area + (kBanks + kBanks / 4 - area % kBanks) % kBanks, halo};
}

// How many planes fit, 16, 8, 4, 2 or 1; 0 if not even one does. bytes(planes) is what they take.
template <class Bytes>
int planes_that_fit(int64_t limit, Bytes bytes) {
  int planes = kMostPlanes;
  while (planes > 0 && bytes(planes) > limit) planes /= 2;
  return planes;
}

// One plane of a map, and where in it a window starts; without data the window holds zeros.
template <class S>
struct PlaneWindow {
  Global<const S> data;
  int top, left;
};

// Starts to fill `planes` windows of height x width planes, zero beyond their edges; window(i) tells the PlaneWindow i.
// copy(to, from, there) starts to copy Step neighbours, all of which are in the plane or none.
template <class S, int Step, class T, class Window, class Copy>
__device__ __forceinline__ void copy_windows(int planes, WindowShape shape, int height, int width, Shared<T> to,
                                             Window window, Copy copy) {
  constexpr int kLanes = 16 / Step;  // for a row
  const int lines = static_cast<int>(blockDim.x) / kLanes;
  int plane = 0, row = static_cast<int>(threadIdx.x) / kLanes;
  while (true) {
    while (row >= shape.rows) {
      row -= shape.rows;
      ++plane;
    }
    if (plane >= planes) return;
    const PlaneWindow<S> from = window(plane);
    const int y = from.top + row;
    const bool there = from.data != nullptr && y >= 0 && y < height;
#pragma unroll 1
    for (int column = threadIdx.x % kLanes * Step; column < shape.width; column += kLanes * Step) {
      const int x = from.left + column;
      copy(to + (plane * shape.plane + row * shape.width + column), from.data + (static_cast<int64_t>(y) * width + x),
           there && x >= 0 && x < width);
    }
    row += lines;
  }
}

// The same for windows of T; rows of 16 bits that are `aligned`, and start so, come several elements at a time.
template <class S, class T, class Window>
__device__ __forceinline__ void load_windows(bool aligned, int planes, WindowShape shape, int height, int width,
                                             Shared<T> to, Window window) {
  if constexpr (sizeof(T) == 2) {
    if (aligned) {
      return copy_windows<S, kCopiedAtOnce>(planes, shape, height, width, to, window,
                                            [](Shared<T> element, Global<const S> from, bool there) {
                                              copy_elements<S>(element, from, there ? kCopiedAtOnce : 0);
                                            });
    }
  }
  copy_windows<S, 1>(planes, shape, height, width, to, window, [](Shared<T> element, Global<const S> from, bool there) {
    copy_element<S>(element, from, there);
  });
}

// out[r] += sum over (dy, dx) of filter[dy, dx] window[r + dy, dx]: a column of the correlation with a K x K filter.
template <int K, int Rows, class E, class T>
__device__ __forceinline__ void correlate_column_of(Shared<E> window, int pitch, Shared<E> filter, T (&out)[Rows]) {
#pragma unroll 1  // else the compiler loads a whole window ahead, into registers that the product needs
  for (int dx = 0; dx < K; ++dx) {
    T tap[K];
#pragma unroll
    for (int dy = 0; dy < K; ++dy) tap[dy] = widen(filter[dy * K + dx]);
#pragma unroll
    for (int y = 0; y < Rows + K - 1; ++y) {
      const T value = widen(window[y * pitch + dx]);
#pragma unroll
      for (int dy = 0; dy < K; ++dy) {
        if (y - dy >= 0 && y - dy < Rows) out[y - dy] += tap[dy] * value;
      }
    }
  }
}

// The same for a filter of any size.
template <int Rows, class E, class T>
__device__ __forceinline__ void correlate_column_any(int k, Shared<E> window, int pitch, Shared<E> filter,
                                                     T (&out)[Rows]) {
  for (int dy = 0; dy < k; ++dy) {
    for (int dx = 0; dx < k; ++dx) {
      const T tap = widen(filter[dy * k + dx]);
#pragma unroll
      for (int row = 0; row < Rows; ++row) out[row] += tap * widen(window[(row + dy) * pitch + dx]);
    }
  }
}

// Odd sizes of filters up to this one are usual: there is code for each.
constexpr int kLargestUsualKernel = 7;

// Calls use(size) with the size of a filter as a constant, std::integral_constant, if it is a usual one, else with 0.
template <class Use>
__device__ __forceinline__ void with_kernel_size(int64_t k, Use use) {
  switch (k) {
    case 1:
      return use(std::integral_constant<int, 1>());
    case 3:
      return use(std::integral_constant<int, 3>());
    case 5:
      return use(std::integral_constant<int, 5>());
    case kLargestUsualKernel:
      return use(std::integral_constant<int, kLargestUsualKernel>());
  }
  use(std::integral_constant<int, 0>());
}

// A column of the correlation with a k x k filter; K is k or, where that is unusual, 0.
template <int K, int Rows, class E, class T>
__device__ __forceinline__ void correlate_column(int k, Shared<E> window, int pitch, Shared<E> filter, T (&out)[Rows]) {
#pragma unroll
  for (int row = 0; row < Rows; ++row) out[row] = T(0);
  if constexpr (K == 0) {
    correlate_column_any(k, window, pitch, filter, out);
  } else {
    correlate_column_of<K>(window, pitch, filter, out);
  }
}

}  // namespace fastsam::cuda
