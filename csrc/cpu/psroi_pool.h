// What the position-sensitive RoI poolings' kernels are given.
#pragma once

#include <cstdint>

#include "../sampling.h"

namespace dcdet {

// Bins that are worked on side by side, and columns of a bin that are written side by side.
constexpr int64_t LANES = 16, ACROSS = 8;

// Letters: N images of D * g * g channels, R RoIs, K classes, p x p bins.
struct PoolShape {
  int64_t images, channels, height, width, group_size, rois, classes, pooled;

  int64_t groups() const { return group_size * group_size; }
  int64_t depth() const { return channels / groups(); }
  int64_t of_class() const { return depth() / classes; }  // output channels
  int64_t pixels() const { return height * width; }
  int64_t places() const { return pooled * pooled; }
};

// What LANES bins read of one plane. Along each axis a bin reads `count` cells, each with a weight;
// a cell of weight 0 is not read and may lie anywhere. A row's cell is where the row begins.
//
// After the struct follow `rows`, then `columns` entries; an entry is LANES cells, LANES weights
// and LANES slopes (of the weight, when the bin moves; only where the gradients are wanted).
template <typename T>
struct Block {
  int64_t rows, columns, bins;  // lanes beyond `bins` are not in use
  int64_t roi[LANES], place[LANES];  // which bins they are: place counts those of a RoI
  T divisor[LANES];
  // For the gradients: where columns are neighbours and at most ACROSS, the weights of each lane's.
  bool neighbours;
  T across[LANES][ACROSS];
};

template <typename T>
struct Entry {
  int32_t cell[LANES];
  T weight[LANES];
  T slope[LANES];
};

template <typename T>
DCDET_INLINE Entry<T>* entries_of(Block<T>* block) {
  return reinterpret_cast<Entry<T>*>(block + 1);
}

template <typename T>
DCDET_INLINE const Entry<T>* entries_of(const Block<T>* block) {
  return reinterpret_cast<const Entry<T>*>(block + 1);
}

// One axis of LANES bins: samples at first, first + step, ... on a side of `length` cells, which
// lie `stride` apart.
template <typename T>
struct Samples {
  T first[LANES], step[LANES];
  int64_t count, length, stride;
};

// A cell along an axis that a bin reads. `slope` is that of the weight, when the bin moves.
template <typename T>
struct Reach {
  int32_t cell;
  T weight, slope;
};

// What a bin reads of one row of pixels: some columns of its group. `group` is where the group's
// lanes begin in a pixel, `place` where the bin's begin.
template <typename T>
struct RowBin {
  const Reach<T>* across;
  int64_t place;
  int32_t group, columns;
  T weight, slope;
};

// One instruction set's kernels; see psroi_pool_kernel.h.
template <typename T>
struct PoolKernels {
  int64_t (*find_entries)(const Samples<T>&, int32_t*, T*, Entry<T>*, T*);
  void (*line_up)(Block<T>&);
  void (*pool)(const Block<T>&, const T*, T*);
  void (*spread)(const Block<T>&, const T*, T*);
  void (*slopes)(const Block<T>&, const T*, T*, T*);
  void (*turn)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  void (*into_lanes)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  void (*from_lanes)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  void (*sum_row)(const RowBin<T>*, int64_t, const T*, int64_t, T*);
  void (*spread_row)(const RowBin<T>*, int64_t, const T*, T*, int64_t);
  void (*slope_row)(const RowBin<T>*, int64_t, const T*, int64_t, T*, T*);
  void (*divide)(T*, const T*, int64_t, bool);
  T (*dot)(const T*, const T*);
};

}  // namespace dcdet
