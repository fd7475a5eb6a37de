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
// `low` runs from -1 to size - 1 where `inside`; outside nothing may be read. A NaN position is
// outside, and its fraction is NaN. `held`: the position is held at the last pixel (the release's
// border), where it has no gradient.
template <typename T>
struct Axis {
  long low;
  T fraction;
  bool inside;
  bool held;
};

// Zeros around the map: samples at or before -1, and at or after size, are 0.
template <typename T>
DCDET_INLINE Axis<T> axis_with_zeros(T position, long size) {
  // Written so that a NaN fails: only then may the position be cast to an integer.
  if (!(position > T(-1) && position < T(size)))
    return {-1, position == position ? T(0) : position, false, false};
  long low = long(position) - (position < T(0));  // the cast rounds towards 0
  return {low, position - T(low), true, false};
}

// The 2017 release: samples before 0, and at or after size, are 0; beyond the last pixel they have
// its value.
template <typename T>
DCDET_INLINE Axis<T> axis_of_release(T position, long size) {
  if (!(position >= T(0) && position < T(size)))
    return {-1, position == position ? T(0) : position, false, false};
  if (position >= T(size - 1)) return {size - 1, T(0), true, true};
  long low = long(position);
  return {low, position - T(low), true, false};
}

// A bilinear sample: the rows (pixels, counted through the batch) of its corners, upper left,
// upper right, lower left, lower right, or -1 for one that is outside and counts as 0.
template <typename T>
struct Sample {
  long long row[4];
  T y, x;  // fractions
  bool held_y, held_x;

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

template <typename T>
DCDET_INLINE Sample<T> sample_at(T y, T x, long height, long width, bool release, long long first) {
  Axis<T> v = release ? axis_of_release(y, height) : axis_with_zeros(y, height);
  Axis<T> h = release ? axis_of_release(x, width) : axis_with_zeros(x, width);
  Sample<T> sample;
  sample.y = v.fraction;
  sample.x = h.fraction;
  sample.held_y = v.held;
  sample.held_x = h.held;
  // low is -1 outside, where neither row, nor column, is there
  const bool top = v.low >= 0, bottom = v.inside && v.low + 1 < height;
  const bool left = h.low >= 0, right = h.inside && h.low + 1 < width;
  first += (long long)v.low * width + h.low;
  sample.row[0] = top && left ? first : -1;
  sample.row[1] = top && right ? first + 1 : -1;
  sample.row[2] = bottom && left ? first + width : -1;
  sample.row[3] = bottom && right ? first + width + 1 : -1;
  return sample;
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

}  // namespace dcdet
