// Deformable RoI pooling on a CPU.
//
// Maps are channels-last: all channels share their positions, so a bin is a sum of the pixels that
// its samples touch, each a row of channels. A task owns a RoI or, for the input's gradient, a band
// of a map's rows: nothing is added by two threads, and the sums do not depend on their number.
// Where the bins lie was found in Python.
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
      const AlignedAxis<T> axis = aligned_axis(middle_position(start, bin, count, i), length);
      if (!axis.kept) continue;
      add({axis.low, axis.weight[0], axis.last ? T(0) : T(-1), axis.unmoved[0]});
      if (!axis.last) add({axis.low + 1, axis.weight[1], T(1), axis.unmoved[1]});
    }
  }

  // Leave out the pixels before `begin`, and those from `end` on.
  void keep(int64_t begin, int64_t end) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i)
      if (entries[i].cell >= begin && entries[i].cell < end) entries[kept++] = entries[i];
    size = kept;
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

// R RoIs of rows * columns bins; the other numbers are those of _Pooling in
// dcdet/ops/deform_roi_pool.py.
template <typename T>
struct Pooling {
  int64_t images, channels, height, width, rois, bins;
  const int64_t *image, *first, *last;
  const T *start, *bin, *count, *divisor;

  int64_t map() const { return height * width * channels; }

  // Samples that the longest line has.
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t i = 0; i < 2 * rois * bins; ++i) most = std::max(most, last[i] - first[i]);
    return most;
  }

  void find_rows(int64_t roi, int64_t place, Line<T>& y) const {
    const int64_t i = roi * bins + place;
    y.find(start[i], bin[roi], count[roi], first[i], last[i], height);
  }

  void find_columns(int64_t roi, int64_t place, Line<T>& x) const {
    const int64_t i = (rois + roi) * bins + place;
    x.find(start[i], bin[rois + roi], count[rois + roi], first[i], last[i], width);
  }
};

// What a thread works with: the lines of a bin, and room for a RoI's bins, each a row of channels.
template <typename T>
struct Scratch {
  Line<T> y, x;
  std::vector<T> rows;

  explicit Scratch(const Pooling<T>& p)
      : y(p.longest()), x(y.entries.size() / 2), rows(p.bins * p.channels) {}
};

// Vectors are short, whatever the CPU has: memory is what takes the time.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  static constexpr int64_t count = 16 / sizeof(T);
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
DCDET_INLINE Vector<T>& at(T* place, int64_t vector) {
  return reinterpret_cast<Vector<T>*>(place)[vector];
}

template <typename T>
DCDET_INLINE const Vector<T>& at(const T* place, int64_t vector) {
  return reinterpret_cast<const Vector<T>*>(place)[vector];
}

// Channels that are summed at once, in registers, and how far ahead they are fetched, in bytes.
constexpr int64_t VECTORS = 8, BLOCK_BYTES = VECTORS * 16, AHEAD = 2 * BLOCK_BYTES;

// Fetch the block after next of a pixel or, at its end, of its neighbour to the right.
template <int WRITE, typename T>
DCDET_INLINE void prefetch_ahead(const T* place) {
  const char* begin = reinterpret_cast<const char*>(place) + AHEAD;
  for (int64_t line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(begin + line, WRITE);
}

// Call visit(where a pixel's channels begin, entry of y, entry of x) for all pixels of a bin.
template <typename T, typename F>
DCDET_INLINE void by_pixels(const Pooling<T>& p, const Scratch<T>& scratch, const F& visit) {
  for (int64_t a = 0; a < scratch.y.size; ++a) {
    const Entry<T>& y = scratch.y.entries[a];
    for (int64_t b = 0; b < scratch.x.size; ++b) {
      const Entry<T>& x = scratch.x.entries[b];
      visit((y.cell * p.width + x.cell) * p.channels, y, x);
    }
  }
}

// A bin: target[c] of the map's channels c.
template <typename T>
void pool_bin(const Pooling<T>& p, const Scratch<T>& scratch, const T* map, T divisor, T* target) {
  int64_t c = 0;
  for (; c + VECTORS * Lanes<T>::count <= p.channels; c += VECTORS * Lanes<T>::count) {
    Vector<T> sums[VECTORS] = {};
    by_pixels(p, scratch, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      const T weight = y.weight * x.weight;
      prefetch_ahead<0>(map + pixel + c);
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) sums[v] += weight * at(map + pixel + c, v);
    });
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) at(target + c, v) = sums[v] / divisor;
  }
  for (; c < p.channels; ++c) {
    T sum = 0;
    by_pixels(p, scratch, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      sum += y.weight * x.weight * map[pixel + c];
    });
    target[c] = sum / divisor;
  }
}

// The input's gradient: grad_map[c] += that of a bin's grad[c].
template <typename T>
void spread_bin(const Pooling<T>& p, const Scratch<T>& scratch, const T* grad, T divisor,
                T* grad_map) {
  int64_t c = 0;
  for (; c + VECTORS * Lanes<T>::count <= p.channels; c += VECTORS * Lanes<T>::count) {
    Vector<T> shares[VECTORS];
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) shares[v] = at(grad + c, v) / divisor;
    by_pixels(p, scratch, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      const T weight = y.weight * x.weight;
      prefetch_ahead<1>(grad_map + pixel + c);
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) at(grad_map + pixel + c, v) += weight * shares[v];
    });
  }
  for (; c < p.channels; ++c) {
    const T share = grad[c] / divisor;
    by_pixels(p, scratch, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
      grad_map[pixel + c] += y.weight * x.weight * share;
    });
  }
}

template <typename T>
T dot(const T* one, const T* other, int64_t count) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * lanes <= count; c += 4 * lanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(one + c) + AHEAD);
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) sums[v] += at(one + c, v) * at(other + c, v);
  }
  T parts[lanes], sum = 0;
  at(parts, 0) = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int64_t lane = 0; lane < lanes; ++lane) sum += parts[lane];
  for (; c < count; ++c) sum += one[c] * other[c];
  return sum;
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

template <typename T>
void pool(const Pooling<T>& p, const T* input, T* output) {
  torch::stable::parallel_for(0, p.rois, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(p);
    T* rows = scratch.rows.data();
    for (int64_t roi = begin; roi < end; ++roi) {
      for (int64_t place = 0; place < p.bins; ++place) {
        p.find_rows(roi, place, scratch.y);
        p.find_columns(roi, place, scratch.x);
        pool_bin(p, scratch, input + p.image[roi] * p.map(), p.divisor[roi * p.bins + place],
                 rows + place * p.channels);
      }
      transpose(rows, p.bins, p.channels, output + roi * p.channels * p.bins);
    }
  });
}

// A pixel's gradient is summed RoI after RoI, wherever the bands begin.
template <typename T>
void spread(const Pooling<T>& p, const T* grad, T* grad_input) {
  const int64_t images = std::max<int64_t>(p.images, 1);
  const int64_t bands =
      std::min(p.height, (torch::stable::get_num_threads() + images - 1) / images);
  torch::stable::parallel_for(0, p.images * bands, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(p);
    T* rows = scratch.rows.data();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / bands, band = task % bands;
      const int64_t top = band * p.height / bands, bottom = (band + 1) * p.height / bands;
      for (int64_t roi = 0; roi < p.rois; ++roi) {
        if (p.image[roi] != image) continue;
        bool found = false;
        for (int64_t place = 0; place < p.bins; ++place) {
          p.find_rows(roi, place, scratch.y);
          scratch.y.keep(top, bottom);
          if (!scratch.y.size) continue;
          if (!found) transpose(grad + roi * p.channels * p.bins, p.channels, p.bins, rows);
          found = true;
          p.find_columns(roi, place, scratch.x);
          spread_bin(p, scratch, rows + place * p.channels, p.divisor[roi * p.bins + place],
                     grad_input + image * p.map());
        }
      }
    }
  });
}

// grad_start (2, R, bins)
template <typename T>
void slopes(const Pooling<T>& p, const T* grad, const T* input, T* grad_start) {
  torch::stable::parallel_for(0, p.rois, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(p);
    T* rows = scratch.rows.data();
    for (int64_t roi = begin; roi < end; ++roi) {
      const T* map = input + p.image[roi] * p.map();
      transpose(grad + roi * p.channels * p.bins, p.channels, p.bins, rows);
      for (int64_t place = 0; place < p.bins; ++place) {
        p.find_rows(roi, place, scratch.y);
        p.find_columns(roi, place, scratch.x);
        if (!scratch.y.size || !scratch.x.size) continue;
        T along_y = 0, along_x = 0;
        by_pixels(p, scratch, [&](int64_t pixel, const Entry<T>& y, const Entry<T>& x) {
          const T product = dot(map + pixel, rows + place * p.channels, p.channels);
          along_y += y.slope * x.unmoved * product;
          along_x += y.unmoved * x.slope * product;
        });
        const int64_t bin = roi * p.bins + place;
        grad_start[bin] = along_y / p.divisor[bin];
        grad_start[p.rois * p.bins + bin] = along_x / p.divisor[bin];
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
                                                    const Tensor& divisor, bool moved) {
  const Geometry geometry(images, start, bin, count, first, last, divisor);
  const Tensor grads = contiguous(grad);
  const Tensor grad_input = zeros_like(input, size_of(input), NHWC);
  const Tensor grad_start = zeros_like(input, size_of(start));
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    const Pooling<T> p = geometry.on<T>(input);
    spread<T>(p, data<T>(grads), place<T>(grad_input));
    if (!moved) return;
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
