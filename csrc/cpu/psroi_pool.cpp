// Position-sensitive RoI pooling on a CPU, plain and deformable.
//
// A task owns some planes of one image for all RoIs: they stay in the cache, nothing is added by
// two threads, and the sums do not depend on their number. Where the bins lie was found in Python.
#include "buffer.h"
#include "psroi_pool.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

// Which samples a bin drops depends on rounding, and must be that of the other ways.
#pragma GCC optimize("fp-contract=off")

#define KERNELS PoolKernels
#define KERNEL "psroi_pool_kernel.h"
#include "instruction_sets.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dcdet {
namespace {

// Letters: N images of D * g * g channels, R RoIs, K classes, p x p bins.
struct PoolShape {
  int64_t images, channels, height, width, group_size, rois, classes, pooled;

  int64_t groups() const { return group_size * group_size; }
  int64_t depth() const { return channels / groups(); }
  int64_t of_class() const { return depth() / classes; }  // output channels
  int64_t pixels() const { return height * width; }
  int64_t places() const { return pooled * pooled; }
};

// Bins side by side, which read one group of one image.
struct Bins {
  int64_t count = 0, roi[LANES], row[LANES], column[LANES];
};

// Blocks one after another.
template <typename T>
class Blocks {
 public:
  // One more, with room for `entries`; `close` gives back what it did not use.
  Block<T>& open(int64_t entries) {
    const int64_t needed = used_ + size(entries);
    if (needed > capacity_) {
      Buffer<char> memory(2 * needed);
      if (used_) std::memcpy(memory.get(), memory_.get(), used_);
      memory_ = std::move(memory);
      capacity_ = 2 * needed;
    }
    return *reinterpret_cast<Block<T>*>(memory_.get() + used_);
  }
  void close(const Block<T>& block) { used_ += size(block.rows + block.columns); }
  void clear() { used_ = 0; }

  template <typename F>
  void for_each(const F& visit) const {
    for (int64_t at = 0; at < used_;) {
      const Block<T>& block = *reinterpret_cast<const Block<T>*>(memory_.get() + at);
      visit(block);
      at += size(block.rows + block.columns);
    }
  }

 private:
  static int64_t size(int64_t entries) {
    return (sizeof(Block<T>) + entries * sizeof(Entry<T>) + 63) / 64 * 64;
  }
  Buffer<char> memory_{0};
  int64_t used_ = 0, capacity_ = 0;
};

// Where plain bins lie: edges (4, R, p), first and last row, first and last column; the last are
// not in the bin.
template <typename T>
struct Cells {
  const PoolShape& s;
  const int64_t* edges;

  int64_t edge(int64_t which, int64_t roi, int64_t bin) const {
    return edges[(which * s.rois + roi) * s.pooled + bin];
  }

  int64_t size(int64_t roi) const {
    int64_t rows = 0, columns = 0;
    for (int64_t bin = 0; bin < s.pooled; ++bin) {
      rows = std::max(rows, edge(1, roi, bin) - edge(0, roi, bin));
      columns = std::max(columns, edge(3, roi, bin) - edge(2, roi, bin));
    }
    return rows * s.width + columns;
  }

  Block<T>& add(const Bins& bins, int64_t, Blocks<T>& blocks) {
    int32_t first[2][LANES] = {}, count[2][LANES] = {}, most[2] = {0, 0};
    for (int64_t l = 0; l < bins.count; ++l)
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t roi = bins.roi[l], bin = axis ? bins.column[l] : bins.row[l];
        first[axis][l] = edge(2 * axis, roi, bin);
        count[axis][l] = edge(2 * axis + 1, roi, bin) - first[axis][l];
        most[axis] = std::max(most[axis], count[axis][l]);
      }
    Block<T>& block = blocks.open(most[0] + most[1]);
    block.rows = most[0];
    block.columns = most[1];
    Entry<T>* entries = entries_of(&block);
    best<T>().list_cells(first[0], count[0], s.width, most[0], entries);
    best<T>().list_cells(first[1], count[1], 1, most[1], entries + most[0]);
    for (int64_t l = 0; l < LANES; ++l)
      block.divisor[l] = std::max(T(1), T(count[0][l]) * T(count[1][l]));
    return block;
  }
};

// Where deformable bins lie: first (2, R, K, p, p) is where their first samples are, y first; step
// (2, R) is the distance to the next.
template <typename T>
struct Places {
  const PoolShape& s;
  const T *first, *step;
  int64_t count;  // of samples along a side of a bin
  std::vector<int32_t> lows = std::vector<int32_t>(count * LANES);
  std::vector<T> fractions = std::vector<T>(count * LANES);

  int64_t bins() const { return s.rois * s.classes * s.places(); }

  int64_t size(int64_t roi) const {
    const auto cells = [&](T step) {
      return step * T(count) < T(1000) ? int64_t(step * T(count)) : 1000;
    };
    return cells(step[roi]) * 1000 + cells(step[s.rois + roi]);
  }

  Block<T>& add(const Bins& bins, int64_t cls, Blocks<T>& blocks) {
    Block<T>& block = blocks.open(4 * count);
    T kept[2][LANES];
    int64_t found[2];
    for (int axis = 0; axis < 2; ++axis) {
      Samples<T> samples = {{}, {}, count, axis ? s.width : s.height, axis ? 1 : s.width};
      for (int64_t l = 0; l < LANES; ++l) {
        const int64_t lane = std::min(l, bins.count - 1), roi = bins.roi[lane];
        const int64_t place = bins.row[lane] * s.pooled + bins.column[lane];
        const int64_t bin = (roi * s.classes + cls) * s.places() + place;
        samples.first[l] = first[axis * this->bins() + bin];
        samples.step[l] = step[axis * s.rois + roi];
      }
      found[axis] = best<T>().find_entries(samples, lows.data(), fractions.data(),
                                           entries_of(&block) + (axis ? found[0] : 0), kept[axis]);
    }
    block.rows = found[0];
    block.columns = found[1];
    for (int64_t l = 0; l < LANES; ++l) {  // samples in use, at least 1; NaN where a position is
      const T both = kept[0][l] * kept[1][l];
      block.divisor[l] = both < 1 ? T(1) : both;
    }
    return block;
  }
};

// The RoIs of each image, those of one size together: bins side by side take as long as the
// largest. (A NaN is as large as can be.)
template <typename T, typename Where>
std::vector<std::vector<int64_t>> rois_of_images(const PoolShape& s, const Where& where,
                                                 const int64_t* images, const T* grad) {
  std::vector<std::vector<int64_t>> rois(s.images);
  const int64_t each = s.depth() * s.places();
  for (int64_t roi = 0; roi < s.rois; ++roi) {
    // Hard-example mining leaves most RoIs without a gradient.
    const T* own = grad ? grad + roi * each : nullptr;
    if (!own || std::any_of(own, own + each, [](T number) { return number != 0; }))
      rois[images[roi]].push_back(roi);
  }
  for (std::vector<int64_t>& list : rois)
    std::stable_sort(list.begin(), list.end(),
                     [&](int64_t a, int64_t b) { return where.size(a) < where.size(b); });
  return rois;
}

// Add the blocks of one group and class; `lined_up` where gradients are wanted.
template <typename T, typename Where>
void add_blocks(const PoolShape& s, Where& where, const std::vector<int64_t>& rois, int64_t group,
                int64_t cls, bool lined_up, Blocks<T>& blocks) {
  const int64_t g = s.group_size, p = s.pooled, row = group / g, column = group % g;
  // Bin i reads group i * g / p.
  const int64_t top = (row * p + g - 1) / g, bottom = ((row + 1) * p + g - 1) / g;
  const int64_t left = (column * p + g - 1) / g, right = ((column + 1) * p + g - 1) / g;
  Bins bins;
  const auto close = [&] {
    if (!bins.count) return;
    Block<T>& block = where.add(bins, cls, blocks);
    block.bins = bins.count;
    for (int64_t l = 0; l < bins.count; ++l) {
      block.roi[l] = bins.roi[l];
      block.place[l] = bins.row[l] * p + bins.column[l];
    }
    if (lined_up) best<T>().line_up(block);
    blocks.close(block);
    bins.count = 0;
  };
  for (const int64_t roi : rois)
    for (int64_t i = top; i < bottom; ++i)
      for (int64_t j = left; j < right; ++j) {
        bins.roi[bins.count] = roi;
        bins.row[bins.count] = i;
        bins.column[bins.count] = j;
        if (++bins.count == LANES) close();
      }
  close();
}

constexpr int64_t TASK_CHANNELS = 32;  // two cache lines of each pixel of a channels-last map

// For each task its begin(image, first channel, channels, whether there is nothing to do), then
// visit(channel within the task, output channel, number of the task, block) for every block of
// every channel, then end(image, first channel, channels).
template <typename T, typename Where, typename Task>
void for_each_block(const PoolShape& s, const Where& where, const int64_t* images, const T* grad,
                    const Task& task) {
  const auto rois = rois_of_images<T>(s, where, images, grad);
  // Classes with bins of their own have blocks that are used once; others are made for all
  // channels.
  std::vector<Blocks<T>> shared(s.classes == 1 ? s.images * s.groups() : 0);
  torch::stable::parallel_for(0, shared.size(), 1, [&](int64_t begin, int64_t end) {
    Where own = where;
    for (int64_t i = begin; i < end; ++i)
      add_blocks(s, own, rois[i / s.groups()], i % s.groups(), 0, grad != nullptr,
                 shared[i]);
  });
  const int64_t runs = (s.channels + TASK_CHANNELS - 1) / TASK_CHANNELS;
  torch::stable::parallel_for(0, s.images * runs, 1, [&](int64_t begin, int64_t end) {
    Where own = where;
    Blocks<T> blocks;
    Task worker = task;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / runs, first = i % runs * TASK_CHANNELS;
      const int64_t count = std::min(TASK_CHANNELS, s.channels - first);
      worker.begin(image, first, count, rois[image].empty());
      for (int64_t c = 0; c < count; ++c) {
        const int64_t d = (first + c) / s.groups(), group = (first + c) % s.groups();
        const int64_t cls = d / s.of_class();
        const auto visit = [&](const Block<T>& block) { worker.visit(c, d, i % runs, block); };
        if (s.classes == 1) {
          shared[image * s.groups() + group].for_each(visit);
        } else {
          blocks.clear();
          add_blocks(s, own, rois[image], group, cls, grad != nullptr, blocks);
          blocks.for_each(visit);
        }
      }
      worker.end(image, first, count);
    }
  });
}

// A map, or its gradient, that tasks see as planes.
template <typename T>
struct Map {
  const PoolShape& s;
  T* numbers;
  bool by_pixel;  // channels-last
  Buffer<T> copy{by_pixel ? TASK_CHANNELS * s.pixels() : 0};
  T* planes = nullptr;

  Map(const PoolShape& shape, T* numbers_, bool by_pixel_)
      : s(shape), numbers(numbers_), by_pixel(by_pixel_) {}
  Map(const Map& other) : Map(other.s, other.numbers, other.by_pixel) {}

  T* rows(int64_t image, int64_t first) const {
    return numbers + image * s.pixels() * s.channels + first;
  }
  void choose(int64_t image, int64_t first) {
    planes = by_pixel ? copy.get() : numbers + (image * s.channels + first) * s.pixels();
  }
  void read(int64_t image, int64_t first, int64_t count) {
    choose(image, first);
    if (by_pixel)
      best<T>().turn(rows(image, first), s.channels, s.pixels(), count, planes, s.pixels());
  }
  void write(int64_t image, int64_t first, int64_t count) {
    if (by_pixel)
      best<T>().turn(planes, s.pixels(), count, s.pixels(), rows(image, first), s.channels);
  }
};

// Of a map that is only read.
template <typename T>
T* numbers(const Tensor& maps) {
  return const_cast<T*>(data<T>(maps));
}

template <typename T>
struct Forward {
  const PoolShape& s;
  Map<T> input;
  T* output;

  void begin(int64_t image, int64_t first, int64_t count, bool idle) {
    if (!idle) input.read(image, first, count);
  }
  void visit(int64_t c, int64_t d, int64_t, const Block<T>& block) {
    T sums[LANES];
    best<T>().pool(block, input.planes + c * s.pixels(), sums);
    for (int64_t l = 0; l < block.bins; ++l)
      output[(block.roi[l] * s.depth() + d) * s.places() + block.place[l]] = sums[l];
  }
  void end(int64_t, int64_t, int64_t) {}
};

// `parts` (slots, 2, R, K, p, p) collect how the bins' gradients change when they move; no
// channel's numbers are added to another task's.
template <typename T>
struct Backward {
  const PoolShape& s;
  const T* grad;
  Map<T> input, grad_input;
  T* parts;
  bool slot_of_task;

  void begin(int64_t image, int64_t first, int64_t count, bool idle) {
    if (parts && !idle) input.read(image, first, count);
    grad_input.choose(image, first);
    std::fill_n(grad_input.planes, count * s.pixels(), T(0));
  }
  void visit(int64_t c, int64_t d, int64_t task, const Block<T>& block) {
    T shares[LANES] = {};
    bool any = false;
    for (int64_t l = 0; l < block.bins; ++l) {
      const T own = grad[(block.roi[l] * s.depth() + d) * s.places() + block.place[l]];
      if (own == 0) continue;
      shares[l] = own / block.divisor[l];
      any = true;
    }
    if (!any) return;
    best<T>().spread(block, shares, grad_input.planes + c * s.pixels());
    if (!parts) return;
    T down[LANES], right[LANES];
    best<T>().slopes(block, input.planes + c * s.pixels(), down, right);
    const int64_t bins = s.rois * s.classes * s.places();
    T* part = parts + (slot_of_task ? task : d % s.of_class()) * 2 * bins;
    for (int64_t l = 0; l < block.bins; ++l) {
      if (shares[l] == 0) continue;
      const int64_t bin =
          (block.roi[l] * s.classes + d / s.of_class()) * s.places() + block.place[l];
      part[bin] += shares[l] * down[l];
      part[bins + bin] += shares[l] * right[l];
    }
  }
  void end(int64_t image, int64_t first, int64_t count) { grad_input.write(image, first, count); }
};

template <typename T, typename Where>
void backward(const PoolShape& s, const Where& where, const T* grad, T* input, bool by_pixel,
              const int64_t* images, T* grad_input, T* grad_first) {
  const int64_t tasks = (s.channels + TASK_CHANNELS - 1) / TASK_CHANNELS;
  const int64_t bins = 2 * s.rois * s.classes * s.places();
  const bool slot_of_task = s.classes == 1 && tasks < s.of_class();
  const int64_t slots = slot_of_task ? tasks : s.of_class();
  Buffer<T> parts(grad_first ? slots * bins : 0);
  if (grad_first) std::fill_n(parts.get(), slots * bins, T(0));
  for_each_block<T>(s, where, images, grad,
                    Backward<T>{s, grad, {s, input, by_pixel}, {s, grad_input, by_pixel},
                                grad_first ? parts.get() : nullptr, slot_of_task});
  if (!grad_first) return;
  torch::stable::parallel_for(0, bins, 1 << 14, [&](int64_t begin, int64_t end) {
    std::fill_n(grad_first + begin, end - begin, T(0));
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t i = begin; i < end; ++i) grad_first[i] += parts.get()[slot * bins + i];
  });
}

PoolShape shape_of(const std::vector<int64_t>& size, int64_t group_size, int64_t rois,
                   int64_t classes, int64_t pooled) {
  // Cells of a plane are counted in 32 bits.
  if (size[2] * size[3] >= int64_t(1) << 30)
    throw std::runtime_error("RoI pooling: a map of " + std::to_string(size[2]) + " x " +
                             std::to_string(size[3]) + " pixels; fewer than 2^30 are supported");
  return {size[0], size[1], size[2], size[3], group_size, rois, classes, pooled};
}

Tensor psroi_pool(const Tensor& input, const Tensor& images, const Tensor& edges,
                  int64_t group_size) {
  const PoolShape s = shape_of(size_of(input), group_size, images.size(0), 1, edges.size(2));
  const bool by_pixel = is_channels_last(input);
  const Tensor maps = laid_out(input, by_pixel ? NHWC : NCHW), index = laid_out(images);
  const Tensor bounds = laid_out(edges);
  const Tensor output = empty_like(input, {s.rois, s.depth(), s.pooled, s.pooled});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    for_each_block<T>(s, Cells<T>{s, data<int64_t>(bounds)}, data<int64_t>(index), nullptr,
                      Forward<T>{s, {s, numbers<T>(maps), by_pixel}, place<T>(output)});
  });
  return output;
}

Tensor psroi_pool_backward(const Tensor& grad, const Tensor& images, const Tensor& edges,
                           std::vector<int64_t> size, int64_t group_size, bool channels_last) {
  const PoolShape s = shape_of(size, group_size, images.size(0), 1, edges.size(2));
  const Tensor grads = laid_out(grad), index = laid_out(images), bounds = laid_out(edges);
  const Tensor grad_input = empty_like(grad, size, channels_last ? NHWC : NCHW);
  by_dtype(grad, [&](auto number) {
    using T = decltype(number);
    backward<T>(s, Cells<T>{s, data<int64_t>(bounds)}, data<T>(grads), nullptr, channels_last,
                data<int64_t>(index), place<T>(grad_input), nullptr);
  });
  return grad_input;
}

Tensor deform_psroi_pool(const Tensor& input, const Tensor& images, const Tensor& first,
                         const Tensor& step, int64_t group_size, int64_t samples) {
  const PoolShape s =
      shape_of(size_of(input), group_size, images.size(0), first.size(2), first.size(3));
  const bool by_pixel = is_channels_last(input);
  const Tensor maps = laid_out(input, by_pixel ? NHWC : NCHW), index = laid_out(images);
  const Tensor places = laid_out(first), steps = laid_out(step);
  const Tensor output = empty_like(input, {s.rois, s.depth(), s.pooled, s.pooled});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    for_each_block<T>(s, Places<T>{s, data<T>(places), data<T>(steps), samples},
                      data<int64_t>(index), nullptr,
                      Forward<T>{s, {s, numbers<T>(maps), by_pixel}, place<T>(output)});
  });
  return output;
}

// `moved`: whether the gradient of `first` is wanted; else it is empty.
std::tuple<Tensor, Tensor> deform_psroi_pool_backward(const Tensor& grad, const Tensor& input,
                                                      const Tensor& images, const Tensor& first,
                                                      const Tensor& step, int64_t group_size,
                                                      int64_t samples, bool moved) {
  const PoolShape s =
      shape_of(size_of(input), group_size, images.size(0), first.size(2), first.size(3));
  const bool by_pixel = is_channels_last(input);
  const Tensor maps = laid_out(input, by_pixel ? NHWC : NCHW), index = laid_out(images);
  const Tensor grads = laid_out(grad), places = laid_out(first), steps = laid_out(step);
  const Tensor grad_input = empty_like(input, size_of(input), by_pixel ? NHWC : NCHW);
  const Tensor grad_first = empty_like(input, moved ? size_of(first) : std::vector<int64_t>{0});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    backward<T>(s, Places<T>{s, data<T>(places), data<T>(steps), samples}, data<T>(grads),
                numbers<T>(maps), by_pixel, data<int64_t>(index),
                place<T>(grad_input), moved ? place<T>(grad_first) : nullptr);
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
