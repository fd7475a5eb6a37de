// Where the deformable operators read their input: one source for CPU and GPU.
//
// It includes nothing, so that every compiler sees the same arithmetic.
#pragma once

#ifdef __CUDACC__
#define DCDET_INLINE __host__ __device__ __forceinline__
#else
#define DCDET_INLINE inline __attribute__((always_inline))
#endif

namespace dcdet {

// One axis of a bilinear sample: it lies `fraction` beyond pixel `low`.
//
// `low` runs from -1 to size - 1 where `inside`; outside it is -1 and nothing may be read. A NaN
// position is outside, and its fraction is NaN. `held`: the position is held at the last pixel (the
// release's border), where it has no gradient.
template <typename T>
struct Axis {
  int low;
  T fraction;
  int inside, held;  // flags
};

// Zeros around the map: samples at or before -1, and at or after size, are 0. (No branches here and
// below: a loop over samples becomes vectors.)
template <typename T>
DCDET_INLINE Axis<T> axis_with_zeros(T position, int size) {
  const bool inside = (position > T(-1)) & (position < T(size));  // a NaN fails
  const T safe = inside ? position : T(0);                        // and must not be cast
  const int cell = int(safe) - (safe < 0 ? 1 : 0);                // the cast rounds towards 0
  const T outside = position == position ? T(0) : position;
  return {inside ? cell : -1, inside ? safe - T(cell) : outside, inside, false};
}

// The 2017 release: samples before 0, and at or after size, are 0; beyond the last pixel they have
// its value.
template <typename T>
DCDET_INLINE Axis<T> axis_of_release(T position, int size) {
  const bool inside = (position >= T(0)) & (position < T(size));
  const bool held = inside & (position >= T(size - 1));
  const T safe = inside ? held ? T(size - 1) : position : T(0);
  const int cell = int(safe);
  const T outside = position == position ? T(0) : position;
  return {inside ? cell : -1, inside ? safe - T(cell) : outside, inside, held};
}

// A bilinear sample of a map's pixels, which are counted through the batch. Its corners are the
// upper left, upper right, lower left and lower right one.
template <typename T>
struct Sample {
  long long first;        // the upper left corner's pixel, if it is there
  T y, x;                 // fractions
  unsigned char corners;  // a bit for each that is inside; the others count as 0
  bool held_y, held_x;

  // The pixel of a corner, or -1 outside.
  DCDET_INLINE long long pixel(int corner, long width) const {
    return corners >> corner & 1 ? first + (corner / 2 ? width : 0) + corner % 2 : -1;
  }

  DCDET_INLINE T weight(int corner) const {
    return (corner < 2 ? T(1) - y : y) * (corner % 2 ? x : T(1) - x);
  }

  // How the sample changes along y, or x, where its corners have these values; but not where held.
  DCDET_INLINE T slope_y(const T* corners) const {
    return (corners[2] - corners[0]) * (T(1) - x) + (corners[3] - corners[1]) * x;
  }
  DCDET_INLINE T slope_x(const T* corners) const {
    return (corners[1] - corners[0]) * (T(1) - y) + (corners[3] - corners[2]) * y;
  }
};

// The sample at two axes of a map whose first pixel is `first`.
template <typename T>
DCDET_INLINE Sample<T> sample_at(const Axis<T>& y, const Axis<T>& x, int height, int width,
                                 long long first) {
  // low is -1 outside, where neither row, nor column, is there
  const int top = y.low >= 0, bottom = y.inside & (y.low + 1 < height);
  const int left = x.low >= 0, right = x.inside & (x.low + 1 < width);
  const int columns = left | right << 1, corners = columns * top | columns * bottom << 2;
  return {first + (long long)y.low * width + x.low, y.fraction, x.fraction,
          (unsigned char)corners, y.held != 0, x.held != 0};
}

template <typename T>
DCDET_INLINE Sample<T> sample_at(T y, T x, int height, int width, bool release, long long first) {
  return sample_at(release ? axis_of_release(y, height) : axis_with_zeros(y, height),
                   release ? axis_of_release(x, width) : axis_with_zeros(x, width), height, width,
                   first);
}

// Where sample `i` of a pooled bin lies along an axis. It is rounded after each step, on a GPU too:
// which samples a bin drops depends on that.
template <typename T>
DCDET_INLINE T pool_position(T first, T step, long i) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return __fadd_rn(first, __fmul_rn(T(i), step));
  else return __dadd_rn(first, __dmul_rn(T(i), step));
#else
  return first + T(i) * step;
#endif
}

// One axis of a pooling sample: it lies `fraction` beyond cell `low`, which is 0 to size - 1; the
// next cell is there where the fraction is not 0. Samples that are not `kept` count for nothing.
template <typename T>
struct PoolAxis {
  long low;
  T fraction;
  bool kept;
};

// Samples outside [-0.5, size - 0.5] are dropped, the others held between the outermost cells.
template <typename T>
DCDET_INLINE PoolAxis<T> pool_axis(T position, long size) {
  // Written so that a NaN fails.
  if (!(position >= T(-0.5) && position <= T(size) - T(0.5))) return {0, T(0), false};
  const T last = T(size) - 1;
  const T inside = position < 0 ? T(0) : position > last ? last : position;
  const long low = long(inside);
  return {low, inside - T(low), true};
}

// Where sample `i` of a bin of aligned RoIs lies along an axis: in the middle of its part. Rounded
// after each step, as above.
template <typename T>
DCDET_INLINE T middle_position(T start, T bin, T count, long i) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4)
    return __fadd_rn(start, __fdiv_rn(__fmul_rn(T(i) + T(0.5), bin), count));
  else
    return __dadd_rn(start, __ddiv_rn(__dmul_rn(T(i) + T(0.5), bin), count));
#else
  return start + (T(i) + T(0.5)) * bin / count;
#endif
}

// One axis of such a sample: cell `low` and, where that is not the last one, low + 1, with their
// weights. Samples outside [-1, size] are 0; the others are held between the outermost cells.
//
// Slopes are mmcv's. They are 0 on the last cell. Else the slope along this axis is the difference
// of both cells, and the slope along the other axis is taken with the weights `unmoved`, which are
// those of where the sample was before it was held.
template <typename T>
struct AlignedAxis {
  long low;
  bool kept, last;
  T weight[2], unmoved[2];
};

template <typename T>
DCDET_INLINE AlignedAxis<T> aligned_axis(T position, long size) {
  // Written so that a NaN fails.
  if (!(position >= T(-1) && position <= T(size))) return {0, false, true, {}, {}};
  const T held = position > T(0) ? position : T(0);
  const long low = long(held);
  if (low >= size - 1) return {size - 1, true, true, {T(1), T(0)}, {T(0), T(0)}};
  const T fraction = held - T(low);
  return {low, true, false, {1 - fraction, fraction}, {T(low + 1) - position, position - T(low)}};
}

}  // namespace dcdet
