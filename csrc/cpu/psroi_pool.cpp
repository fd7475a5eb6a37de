// Position-sensitive RoI pooling on a CPU, plain and deformable.
//
// A task owns a group's planes for all RoIs: they stay in the cache, nothing is added by two threads,
// and the sums do not depend on their number. Where the bins lie was found in Python.
#include "tensors.h"

#include <torch/csrc/stable/library.h>

// Which samples a bin drops depends on rounding, and must be that of the other ways.
#pragma GCC optimize("fp-contract=off")

#include <algorithm>
#include <cmath>
#include <tuple>

namespace dcdet {
namespace {

// Letters: N images of D * g * g channels, R RoIs, K classes, p x p bins.
struct PoolShape {
  int64_t images, channels, height, width, group_size, rois, classes, pooled;

  int64_t depth() const { return channels / (group_size * group_size); }
  int64_t pixels() const { return height * width; }

  // Where output channel d's plane of a group begins in a map.
  int64_t plane(int64_t image, int64_t d, int64_t group) const {
    return (image * channels + d * group_size * group_size + group) * pixels();
  }

  // Where a bin stands in the output.
  int64_t bin(int64_t roi, int64_t d, int64_t i, int64_t j) const {
    return ((roi * depth() + d) * pooled + i) * pooled + j;
  }
};

// Call visit(roi, class, bin row, bin column, group, state) for all bins that read one group, group
// after group; `state` is one copy of `initial` for each thread.
template <typename State, typename F>
void for_each_bin(const PoolShape& s, const State& initial, const F& visit) {
  const int64_t g = s.group_size, tasks = g * g * s.classes;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    State state = initial;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t cls = task / (g * g), row = task / g % g, column = task % g;
      // Bin i reads group i * g / p.
      const int64_t top = (row * s.pooled + g - 1) / g, bottom = ((row + 1) * s.pooled + g - 1) / g;
      const int64_t left = (column * s.pooled + g - 1) / g;
      const int64_t right = ((column + 1) * s.pooled + g - 1) / g;
      for (int64_t roi = 0; roi < s.rois; ++roi)
        for (int64_t i = top; i < bottom; ++i)
          for (int64_t j = left; j < right; ++j) visit(roi, cls, i, j, row * g + column, state);
    }
  });
}

struct None {};

// Maps (N, C, H, W) plane by plane. Those of a model are channels-last; ATen's copy of them takes
// as long as the pooling.
template <typename T>
Tensor planes_of(const Tensor& maps) {
  const int64_t images = maps.size(0), channels = maps.size(1);
  const int64_t pixels = maps.size(2) * maps.size(3);
  const Tensor rows = contiguous(maps, NHWC);
  if (maps.is_contiguous() || rows.data_ptr() != maps.data_ptr()) return contiguous(maps);
  const Tensor planes = empty_like(maps, size_of(maps));
  constexpr int64_t BLOCK = 16;
  const int64_t blocks = (channels + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * BLOCK, last = std::min(first + BLOCK, channels);
      const T* source = data<T>(rows) + task / blocks * pixels * channels;
      T* target = place<T>(planes) + task / blocks * pixels * channels;
      for (int64_t pixel = 0; pixel < pixels; pixel += BLOCK)
        for (int64_t c = first; c < last; ++c)
          for (int64_t p = pixel; p < std::min(pixel + BLOCK, pixels); ++p)
            target[c * pixels + p] = source[p * channels + c];
    }
  });
  return planes;
}

// Plain

// edges (4, R, p): first and last row, first and last column of the bins; the last are not in it.
struct Cells {
  int64_t top, bottom, left, right;

  int64_t area() const { return (bottom - top) * (right - left); }
};

Cells cells_of(const PoolShape& s, const int64_t* edges, int64_t roi, int64_t i, int64_t j) {
  const int64_t next = s.rois * s.pooled;
  const int64_t *row = edges + roi * s.pooled + i, *column = edges + roi * s.pooled + j;
  return {row[0], row[next], column[2 * next], column[3 * next]};
}

template <typename T>
void pool(const PoolShape& s, const T* input, const int64_t* images, const int64_t* edges,
          T* output) {
  for_each_bin(s, None(), [&](int64_t roi, int64_t, int64_t i, int64_t j, int64_t group, None&) {
    const Cells cells = cells_of(s, edges, roi, i, j);
    for (int64_t d = 0; d < s.depth(); ++d) {
      const T* plane = input + s.plane(images[roi], d, group);
      T sum = 0;
      for (int64_t y = cells.top; y < cells.bottom; ++y)
        for (int64_t x = cells.left; x < cells.right; ++x) sum += plane[y * s.width + x];
      output[s.bin(roi, d, i, j)] = cells.area() ? sum / T(cells.area()) : T(0);
    }
  });
}

template <typename T>
void pool_backward(const PoolShape& s, const T* grad, const int64_t* images, const int64_t* edges,
                   T* grad_input) {
  for_each_bin(s, None(), [&](int64_t roi, int64_t, int64_t i, int64_t j, int64_t group, None&) {
    const Cells cells = cells_of(s, edges, roi, i, j);
    for (int64_t d = 0; d < s.depth(); ++d) {
      const T value = grad[s.bin(roi, d, i, j)];
      if (value == T(0) || !cells.area()) continue;
      const T share = value / T(cells.area());
      T* plane = grad_input + s.plane(images[roi], d, group);
      for (int64_t y = cells.top; y < cells.bottom; ++y)
        for (int64_t x = cells.left; x < cells.right; ++x) plane[y * s.width + x] += share;
    }
  });
}

// Deformable

// What a bin's samples read along one axis: cells, their weights, and the weights' slopes. Samples
// that share cells share entries.
template <typename T>
struct Line {
  std::vector<int64_t> cell;
  std::vector<T> weight, slope;
  int64_t samples, size = 0;
  T kept = 0;  // samples that are not dropped; NaN where a position is

  explicit Line(int64_t count)
      : cell(2 * count), weight(2 * count), slope(2 * count), samples(count) {}

  // Samples at first, first + step, ... on a map's side of `length`.
  void find(T first, T step, int64_t length) {
    const T last = T(length) - 1, end = T(length) - T(0.5);
    T *weights = weight.data(), *slopes = slope.data();
    int64_t *cells = cell.data(), entries = 0;
    // The entry of the cell below the last sample, and of the one above: sums that are still open.
    int64_t low_cell = -2, used = 0;
    T low_weight = 0, high_weight = 0, low_slope = 0, high_slope = 0;
    bool has_high = false;
    const auto close = [&](int64_t where, T share, T change) {
      cells[entries] = where;
      weights[entries] = share;
      slopes[entries++] = change;
    };
    T total = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const T place = first + T(i) * step;
      total += place;
      if (!(place >= T(-0.5) && place <= end)) continue;
      ++used;
      const T inside = place < 0 ? T(0) : place > last ? last : place;
      const int64_t low = int64_t(inside);
      const T fraction = inside - T(low);
      if (low != low_cell) {
        if (low_cell >= 0) close(low_cell, low_weight, low_slope);
        const bool follows = has_high && low == low_cell + 1;
        if (has_high && !follows) close(low_cell + 1, high_weight, high_slope);
        low_weight = follows ? high_weight : T(0);
        low_slope = follows ? high_slope : T(0);
        high_weight = high_slope = 0;
        has_high = false;
        low_cell = low;
      }
      low_weight += 1 - fraction;
      if (fraction > 0) {
        has_high = true;
        high_weight += fraction;
        low_slope -= 1;
        high_slope += 1;
      }
    }
    if (low_cell >= 0) close(low_cell, low_weight, low_slope);
    if (has_high) close(low_cell + 1, high_weight, high_slope);
    size = entries;
    kept = total == total ? T(used) : total;
  }
};

template <typename T>
struct Lines {
  Line<T> y, x;
};

// first (2, R, K, p, p) is where bins' first samples are, y first; step (2, R).
template <typename T>
struct Samples {
  const PoolShape& s;
  const T *first, *step;
  int64_t count;  // of samples along a side of a bin

  int64_t bin(int64_t roi, int64_t cls, int64_t i, int64_t j) const {
    return ((roi * s.classes + cls) * s.pooled + i) * s.pooled + j;
  }

  int64_t bins() const { return s.rois * s.classes * s.pooled * s.pooled; }

  void find(int64_t roi, int64_t cls, int64_t i, int64_t j, Line<T>& y, Line<T>& x) const {
    y.find(first[bin(roi, cls, i, j)], step[roi], s.height);
    x.find(first[bins() + bin(roi, cls, i, j)], step[s.rois + roi], s.width);
  }

  // Samples in use, at least 1; NaN where a position is.
  static T divisor(const Line<T>& y, const Line<T>& x) {
    const T kept = y.kept * x.kept;
    return kept < 1 ? T(1) : kept;
  }
};

template <typename T>
void deform_pool(const Samples<T>& where, const T* input, const int64_t* images, T* output) {
  const PoolShape& s = where.s;
  const int64_t each = s.depth() / s.classes;
  const auto visit = [&](int64_t roi, int64_t cls, int64_t i, int64_t j, int64_t group,
                         Lines<T>& lines) {
    Line<T>&y = lines.y, &x = lines.x;
    where.find(roi, cls, i, j, y, x);
    const T divisor = where.divisor(y, x);
    for (int64_t d = cls * each; d < (cls + 1) * each; ++d) {
      const T* plane = input + s.plane(images[roi], d, group);
      T sum = 0;
      for (int64_t a = 0; a < y.size; ++a) {
        const T* row = plane + y.cell[a] * s.width;
        T along = 0;
        for (int64_t b = 0; b < x.size; ++b) along += x.weight[b] * row[x.cell[b]];
        sum += y.weight[a] * along;
      }
      output[s.bin(roi, d, i, j)] = sum / divisor;
    }
  };
  for_each_bin(s, Lines<T>{Line<T>(where.count), Line<T>(where.count)}, visit);
}

template <typename T>
void deform_pool_backward(const Samples<T>& where, const T* grad, const T* input,
                          const int64_t* images, T* grad_input, T* grad_first) {
  const PoolShape& s = where.s;
  const int64_t each = s.depth() / s.classes;
  const auto visit = [&](int64_t roi, int64_t cls, int64_t i, int64_t j, int64_t group,
                         Lines<T>& lines) {
    Line<T>&y = lines.y, &x = lines.x;
    T slope_y = 0, slope_x = 0;
    bool found = false;
    for (int64_t d = cls * each; d < (cls + 1) * each; ++d) {
      const T value = grad[s.bin(roi, d, i, j)];
      if (value == T(0)) continue;  // most RoIs, under hard-example mining
      if (!found) where.find(roi, cls, i, j, y, x);
      found = true;
      const T share = value / where.divisor(y, x);
      const int64_t start = s.plane(images[roi], d, group);
      T along_y = 0, along_x = 0;
      for (int64_t a = 0; a < y.size; ++a) {
        const int64_t row = start + y.cell[a] * s.width;
        T weighted = 0, sloped = 0;
        for (int64_t b = 0; b < x.size; ++b) {
          const T number = input[row + x.cell[b]];
          weighted += x.weight[b] * number;
          sloped += x.slope[b] * number;
          grad_input[row + x.cell[b]] += share * y.weight[a] * x.weight[b];
        }
        along_y += y.slope[a] * weighted;
        along_x += y.weight[a] * sloped;
      }
      slope_y += share * along_y;
      slope_x += share * along_x;
    }
    grad_first[where.bin(roi, cls, i, j)] = slope_y;
    grad_first[where.bins() + where.bin(roi, cls, i, j)] = slope_x;
  };
  for_each_bin(s, Lines<T>{Line<T>(where.count), Line<T>(where.count)}, visit);
}

Tensor psroi_pool(const Tensor& input, const Tensor& images, const Tensor& edges,
                  int64_t group_size) {
  const PoolShape s = {input.size(0), input.size(1), input.size(2), input.size(3),
                       group_size,    images.size(0), 1,            edges.size(2)};
  const Tensor index = contiguous(images), bounds = contiguous(edges);
  const Tensor output = empty_like(input, {s.rois, s.depth(), s.pooled, s.pooled});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    const Tensor maps = planes_of<T>(input);
    pool<T>(s, data<T>(maps), data<int64_t>(index), data<int64_t>(bounds), place<T>(output));
  });
  return output;
}

Tensor psroi_pool_backward(const Tensor& grad, const Tensor& images, const Tensor& edges,
                           std::vector<int64_t> size, int64_t group_size) {
  const PoolShape s = {size[0],    size[1],        size[2], size[3],
                       group_size, images.size(0), 1,       edges.size(2)};
  const Tensor grads = contiguous(grad), index = contiguous(images), bounds = contiguous(edges);
  const Tensor grad_input = zeros_like(grad, size);
  by_dtype(grad, [&](auto number) {
    using T = decltype(number);
    pool_backward<T>(s, data<T>(grads), data<int64_t>(index), data<int64_t>(bounds),
                     place<T>(grad_input));
  });
  return grad_input;
}

Tensor deform_psroi_pool(const Tensor& input, const Tensor& images, const Tensor& first,
                         const Tensor& step, int64_t group_size, int64_t samples) {
  const PoolShape s = {input.size(0), input.size(1),  input.size(2),  input.size(3),
                       group_size,    images.size(0), first.size(2), first.size(3)};
  const Tensor index = contiguous(images);
  const Tensor places = contiguous(first), steps = contiguous(step);
  const Tensor output = empty_like(input, {s.rois, s.depth(), s.pooled, s.pooled});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    const Tensor maps = planes_of<T>(input);
    deform_pool<T>({s, data<T>(places), data<T>(steps), samples}, data<T>(maps),
                   data<int64_t>(index), place<T>(output));
  });
  return output;
}

std::tuple<Tensor, Tensor> deform_psroi_pool_backward(const Tensor& grad, const Tensor& input,
                                                      const Tensor& images, const Tensor& first,
                                                      const Tensor& step, int64_t group_size,
                                                      int64_t samples) {
  const PoolShape s = {input.size(0), input.size(1),  input.size(2),  input.size(3),
                       group_size,    images.size(0), first.size(2), first.size(3)};
  const Tensor grads = contiguous(grad), index = contiguous(images);
  const Tensor places = contiguous(first), steps = contiguous(step);
  const Tensor grad_input = zeros_like(input, size_of(input));
  const Tensor grad_first = empty_like(input, size_of(first));
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    const Tensor maps = planes_of<T>(input);
    deform_pool_backward<T>({s, data<T>(places), data<T>(steps), samples}, data<T>(grads),
                            data<T>(maps), data<int64_t>(index), place<T>(grad_input),
                            place<T>(grad_first));
  });
  return {grad_input, grad_first};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, CPU, m) {
  m.impl("psroi_pool", TORCH_BOX(&psroi_pool));
  m.impl("psroi_pool_backward", TORCH_BOX(&psroi_pool_backward));
  m.impl("deform_psroi_pool", TORCH_BOX(&deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&deform_psroi_pool_backward));
}

}  // namespace dcdet
