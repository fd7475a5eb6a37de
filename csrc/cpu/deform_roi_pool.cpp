// Deformable RoI pooling on a CPU.
//
// Maps are channels-last: all channels share their positions, so a bin is a sum of the pixels that
// its samples touch, each a row of channels. A task owns a RoI, or, for the input's gradient, a
// slice of an image's channels for all RoIs: nothing is added by two threads, and the sums do not
// depend on their number. Where the bins lie was found in Python.
#include "../sampling.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

// Which samples are on the map depends on rounding, and must be the same as on torch.
#pragma GCC optimize("fp-contract=off")

#include <algorithm>
#include <tuple>
#include <vector>

namespace dcdet {
namespace {

// A pixel's place along one axis, and its weights there: in the value, in the slope along this
// axis, and in the slope along the other one, which is taken where the sample was not moved.
template <typename T>
struct Entry {
  int64_t cell;
  T weight, slope, unmoved;
};

// What a bin's samples read along one axis. Samples that share pixels share entries.
template <typename T>
struct Line {
  std::vector<Entry<T>> entries;
  int64_t size = 0;

  explicit Line(int64_t samples) : entries(2 * samples) {}

  // Samples first to last - 1 of a bin, on a map's side of `length`.
  void find(T start, T bin, T count, int64_t first, int64_t last, int64_t length) {
    size = 0;
    for (int64_t i = first; i < last; ++i) {
      const T position = start + (T(i) + T(0.5)) * bin / count;
      if (!(position >= T(-1) && position <= T(length))) continue;
      const T moved = position > T(0) ? position : T(0);
      const int64_t low = int64_t(moved);
      if (low >= length - 1) {
        add({length - 1, T(1), T(0), T(0)});
      } else {
        const T fraction = moved - T(low);
        add({low, 1 - fraction, T(-1), T(low + 1) - position});
        add({low + 1, fraction, T(1), position - T(low)});
      }
    }
  }

 private:
  // Samples follow each other: a pixel that was read before is one of the last two.
  void add(const Entry<T>& entry) {
    for (int64_t i = size - 1; i >= 0 && i >= size - 2; --i) {
      Entry<T>& other = entries[i];
      if (other.cell != entry.cell) continue;
      other.weight += entry.weight;
      other.slope += entry.slope;
      other.unmoved += entry.unmoved;
      return;
    }
    entries[size++] = entry;
  }
};

template <typename T>
struct Lines {
  Line<T> y, x;
};

// R RoIs of rows * columns bins; the other numbers are those of _Pooling in
// dcdet/ops/deform_roi_pool.py.
template <typename T>
struct Pooling {
  int64_t images, channels, height, width, rois, bins;
  const int64_t *image, *first, *last;
  const T *start, *bin, *count, *divisor;

  int64_t pixels() const { return height * width; }

  // Samples that the longest line has.
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t i = 0; i < 2 * rois * bins; ++i) most = std::max(most, last[i] - first[i]);
    return most;
  }

  void find(int64_t roi, int64_t place, Lines<T>& lines) const {
    const int64_t y = roi * bins + place, x = rois * bins + y;
    lines.y.find(start[y], bin[roi], count[roi], first[y], last[y], height);
    lines.x.find(start[x], bin[rois + roi], count[rois + roi], first[x], last[x], width);
  }
};

// A block of channels: COUNT vectors of LANES numbers. The vectors are short, whatever the CPU has:
// with AVX512's the forward pass took the same time, the backward pass a fifth less.
template <typename T, int LANES, int COUNT>
struct Block {
  typedef T Vector __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = LANES, count = COUNT;

  static DCDET_INLINE Vector& at(T* channels, int i) {
    return reinterpret_cast<Vector*>(channels)[i];
  }

  static DCDET_INLINE const Vector& at(const T* channels, int i) {
    return reinterpret_cast<const Vector*>(channels)[i];
  }
};

// Call visit(block, its first channel) for all channels, COUNT vectors at a time while they last.
template <typename T, int COUNT, typename F>
DCDET_INLINE void by_blocks(int64_t channels, const F& visit) {
  constexpr int LANES = 16 / sizeof(T);
  int64_t c = 0;
  for (; c + COUNT * LANES <= channels; c += COUNT * LANES) visit(Block<T, LANES, COUNT>(), c);
  for (; c < channels; ++c) visit(Block<T, 1, 1>(), c);
}

// Call visit(where a pixel's channels begin, entry of y, entry of x) for all pixels of a bin.
template <typename T, typename F>
DCDET_INLINE void by_pixels(const Pooling<T>& p, const Lines<T>& lines, const F& visit) {
  for (int64_t a = 0; a < lines.y.size; ++a) {
    const Entry<T>& y = lines.y.entries[a];
    for (int64_t b = 0; b < lines.x.size; ++b) {
      const Entry<T>& x = lines.x.entries[b];
      visit((y.cell * p.width + x.cell) * p.channels, y, x);
    }
  }
}

// A bin: target[c] of the map's channels c.
template <typename T>
void pool_bin(const Pooling<T>& p, const Lines<T>& lines, const T* map, T divisor, T* target) {
  by_blocks<T, 8>(p.channels, [&](auto block, int64_t c) {
    using B = decltype(block);
    typename B::Vector sums[B::count] = {};
    by_pixels(p, lines, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      const T weight = y.weight * x.weight;
#pragma GCC unroll 8
      for (int v = 0; v < B::count; ++v) sums[v] += weight * B::at(map + pixel + c, v);
    });
#pragma GCC unroll 8
    for (int v = 0; v < B::count; ++v) B::at(target + c, v) = sums[v] / divisor;
  });
}

// The input's gradient of some channels: grad_map[c] += that of a bin's grad[c].
template <typename T>
void spread_bin(const Pooling<T>& p, const Lines<T>& lines, int64_t channels, const T* grad,
                T divisor, T* grad_map) {
  by_blocks<T, 8>(channels, [&](auto block, int64_t c) {
    using B = decltype(block);
    typename B::Vector shares[B::count];
#pragma GCC unroll 8
    for (int v = 0; v < B::count; ++v) shares[v] = B::at(grad + c, v) / divisor;
    by_pixels(p, lines, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      const T weight = y.weight * x.weight;
#pragma GCC unroll 8
      for (int v = 0; v < B::count; ++v) B::at(grad_map + pixel + c, v) += weight * shares[v];
    });
  });
}

template <typename T>
struct Slope {
  T y, x;
};

// The gradient of a bin's start.
template <typename T>
Slope<T> slope_of_bin(const Pooling<T>& p, const Lines<T>& lines, const T* map, const T* grad,
                      T divisor) {
  Slope<T> slope = {0, 0};
  by_blocks<T, 4>(p.channels, [&](auto block, int64_t c) {
    using B = decltype(block);
    typename B::Vector along_y[B::count] = {}, along_x[B::count] = {};
    by_pixels(p, lines, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      const T weight_y = y.slope * x.unmoved, weight_x = y.unmoved * x.slope;
#pragma GCC unroll 8
      for (int v = 0; v < B::count; ++v) {
        along_y[v] += weight_y * B::at(map + pixel + c, v);
        along_x[v] += weight_x * B::at(map + pixel + c, v);
      }
    });
    typename B::Vector sums[2] = {};
#pragma GCC unroll 8
    for (int v = 0; v < B::count; ++v) {
      const typename B::Vector share = B::at(grad + c, v) / divisor;
      sums[0] += share * along_y[v];
      sums[1] += share * along_x[v];
    }
    T numbers[2 * B::lanes];
    B::at(numbers, 0) = sums[0];
    B::at(numbers, 1) = sums[1];
    for (int lane = 0; lane < B::lanes; ++lane) {
      slope.y += numbers[lane];
      slope.x += numbers[B::lanes + lane];
    }
  });
  return slope;
}

// target (columns, rows) = source (rows, columns), both contiguous
template <typename T>
void transpose(const T* source, int64_t rows, int64_t columns, T* target) {
  constexpr int64_t BLOCK = 16;
  for (int64_t first = 0; first < columns; first += BLOCK)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = first; column < std::min(first + BLOCK, columns); ++column)
        target[column * rows + row] = source[row * columns + column];
}

// Call visit(RoI, lines, room for a RoI's bins of `channels`) for all RoIs, in parallel.
template <typename T, typename F>
void by_rois(const Pooling<T>& p, const F& visit) {
  const int64_t samples = p.longest();
  torch::stable::parallel_for(0, p.rois, 1, [&](int64_t begin, int64_t end) {
    Lines<T> lines = {Line<T>(samples), Line<T>(samples)};
    std::vector<T> bins(p.bins * p.channels);
    for (int64_t roi = begin; roi < end; ++roi) visit(roi, lines, bins.data());
  });
}

template <typename T>
void pool(const Pooling<T>& p, const T* input, T* output) {
  by_rois(p, [&](int64_t roi, Lines<T>& lines, T* bins) {
    const T* map = input + p.image[roi] * p.pixels() * p.channels;
    for (int64_t place = 0; place < p.bins; ++place) {
      p.find(roi, place, lines);
      pool_bin(p, lines, map, p.divisor[roi * p.bins + place], bins + place * p.channels);
    }
    transpose(bins, p.bins, p.channels, output + roi * p.channels * p.bins);
  });
}

// grad_start (2, R, bins)
template <typename T>
void slopes(const Pooling<T>& p, const T* grad, const T* input, T* grad_start) {
  by_rois(p, [&](int64_t roi, Lines<T>& lines, T* grads) {
    const T* map = input + p.image[roi] * p.pixels() * p.channels;
    transpose(grad + roi * p.channels * p.bins, p.channels, p.bins, grads);
    for (int64_t place = 0; place < p.bins; ++place) {
      const int64_t bin = roi * p.bins + place;
      p.find(roi, place, lines);
      if (!lines.y.size || !lines.x.size) continue;
      const Slope<T> slope =
          slope_of_bin(p, lines, map, grads + place * p.channels, p.divisor[bin]);
      grad_start[bin] = slope.y;
      grad_start[p.rois * p.bins + bin] = slope.x;
    }
  });
}

constexpr int64_t SLICE_BYTES = 256;  // of a pixel: few tasks, or many that find the same lines

template <typename T>
void spread(const Pooling<T>& p, const T* grad, T* grad_input) {
  const int64_t width = SLICE_BYTES / sizeof(T), slices = (p.channels + width - 1) / width;
  const int64_t samples = p.longest();
  torch::stable::parallel_for(0, p.images * slices, 1, [&](int64_t begin, int64_t end) {
    Lines<T> lines = {Line<T>(samples), Line<T>(samples)};
    std::vector<T> grads(p.bins * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / slices, first = task % slices * width;
      const int64_t channels = std::min(width, p.channels - first);
      T* grad_map = grad_input + image * p.pixels() * p.channels + first;
      for (int64_t roi = 0; roi < p.rois; ++roi) {
        if (p.image[roi] != image) continue;
        transpose(grad + (roi * p.channels + first) * p.bins, channels, p.bins, grads.data());
        for (int64_t place = 0; place < p.bins; ++place) {
          p.find(roi, place, lines);
          spread_bin(p, lines, channels, grads.data() + place * channels,
                     p.divisor[roi * p.bins + place], grad_map);
        }
      }
    }
  });
}

// Tensors of the geometry, as the schemas name them.
struct Geometry {
  Tensor images, start, bin, count, first, last, divisor;

  Geometry(const Tensor& images, const Tensor& start, const Tensor& bin, const Tensor& count,
           const Tensor& first, const Tensor& last, const Tensor& divisor)
      : images(contiguous(images)),
        start(contiguous(start)),
        bin(contiguous(bin)),
        count(contiguous(count)),
        first(contiguous(first)),
        last(contiguous(last)),
        divisor(contiguous(divisor)) {}

  template <typename T>
  Pooling<T> on(const Tensor& input) const {
    Pooling<T> p;
    p.images = input.size(0);
    p.channels = input.size(1);
    p.height = input.size(2);
    p.width = input.size(3);
    p.rois = start.size(1);
    p.bins = start.size(2) * start.size(3);
    p.image = data<int64_t>(images);
    p.first = data<int64_t>(first);
    p.last = data<int64_t>(last);
    p.start = data<T>(start);
    p.bin = data<T>(bin);
    p.count = data<T>(count);
    p.divisor = data<T>(divisor);
    return p;
  }
};

Tensor deform_roi_pool(const Tensor& input, const Tensor& images, const Tensor& start,
                       const Tensor& bin, const Tensor& count, const Tensor& first,
                       const Tensor& last, const Tensor& divisor) {
  const Geometry geometry(images, start, bin, count, first, last, divisor);
  const Tensor maps = contiguous(input, NHWC);
  const Tensor output =
      empty_like(input, {start.size(1), input.size(1), start.size(2), start.size(3)});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    pool<T>(geometry.on<T>(input), data<T>(maps), place<T>(output));
  });
  return output;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad, const Tensor& input,
                                                    const Tensor& images, const Tensor& start,
                                                    const Tensor& bin, const Tensor& count,
                                                    const Tensor& first, const Tensor& last,
                                                    const Tensor& divisor, bool of_start) {
  const Geometry geometry(images, start, bin, count, first, last, divisor);
  const Tensor grads = contiguous(grad);
  const Tensor grad_input = zeros_like(input, size_of(input), NHWC);
  const Tensor grad_start = zeros_like(input, size_of(start));
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    const Pooling<T> p = geometry.on<T>(input);
    spread<T>(p, data<T>(grads), place<T>(grad_input));
    if (!of_start) return;
    const Tensor maps = contiguous(input, NHWC);
    slopes<T>(p, data<T>(grads), data<T>(maps), place<T>(grad_start));
  });
  return {grad_input, grad_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace dcdet
