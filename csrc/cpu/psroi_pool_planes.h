// RoI pooling where each class has bins of its own; part of psroi_pool.cpp.
//
// A task owns some planes of one image for all RoIs: they stay in the cache. A channel's bins are
// found once they are needed, and sixteen of them are worked on side by side.
#pragma once

namespace dcdet {
namespace {
namespace by_planes {

// Bins side by side, which read one group of one image.
struct Bins {
  int64_t count = 0, roi[LANES], row[LANES], column[LANES];
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

  // The memory of a block.
  Buffer<char> room() const {
    return Buffer<char>(sizeof(Block<T>) + 4 * count * sizeof(Entry<T>));
  }

  void find(const Bins& bins, int64_t cls, Block<T>& block) {
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
  }
};

// The RoIs of each image, those of one size together: bins side by side take as long as the
// largest. (A NaN is as large as can be.)
template <typename T>
std::vector<std::vector<int64_t>> by_size(const PoolShape& s, const Places<T>& where,
                                          const int64_t* images, const T* grad) {
  std::vector<std::vector<int64_t>> rois = rois_of_images(s, images, grad);
  for (std::vector<int64_t>& list : rois)
    std::stable_sort(list.begin(), list.end(),
                     [&](int64_t a, int64_t b) { return where.size(a) < where.size(b); });
  return rois;
}

// visit(block) for the blocks of one group and class; `lined_up` where gradients are wanted.
template <typename T, typename F>
void for_each_block(const PoolShape& s, Places<T>& where, const std::vector<int64_t>& rois,
                    int64_t group, int64_t cls, bool lined_up, Block<T>& block, const F& visit) {
  const int64_t g = s.group_size, p = s.pooled, row = group / g, column = group % g;
  // Bin i reads group i * g / p.
  const int64_t top = (row * p + g - 1) / g, bottom = ((row + 1) * p + g - 1) / g;
  const int64_t left = (column * p + g - 1) / g, right = ((column + 1) * p + g - 1) / g;
  Bins bins;
  const auto close = [&] {
    if (!bins.count) return;
    where.find(bins, cls, block);
    block.bins = bins.count;
    for (int64_t l = 0; l < bins.count; ++l) {
      block.roi[l] = bins.roi[l];
      block.place[l] = bins.row[l] * p + bins.column[l];
    }
    if (lined_up) best<T>().line_up(block);
    visit(block);
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
// visit(channel within the task, output channel, block) for every block of every channel, then
// end(image, first channel, channels).
template <typename T, typename Task>
void for_each_task(const PoolShape& s, const Places<T>& where, const int64_t* images,
                   const T* grad, const Task& task) {
  const auto rois = by_size<T>(s, where, images, grad);
  const int64_t runs = (s.channels + TASK_CHANNELS - 1) / TASK_CHANNELS;
  torch::stable::parallel_for(0, s.images * runs, 1, [&](int64_t begin, int64_t end) {
    Places<T> own = where;
    const Buffer<char> room = where.room();
    Block<T>& block = *reinterpret_cast<Block<T>*>(room.get());
    Task worker = task;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / runs, first = i % runs * TASK_CHANNELS;
      const int64_t count = std::min(TASK_CHANNELS, s.channels - first);
      worker.begin(image, first, count, rois[image].empty());
      for (int64_t c = 0; c < count; ++c) {
        const int64_t d = (first + c) / s.groups(), group = (first + c) % s.groups();
        for_each_block<T>(s, own, rois[image], group, d / s.of_class(), grad != nullptr, block,
                          [&](const Block<T>& found) { worker.visit(c, d, found); });
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

template <typename T>
struct Forward {
  const PoolShape& s;
  Map<T> input;
  T* output;

  void begin(int64_t image, int64_t first, int64_t count, bool idle) {
    if (!idle) input.read(image, first, count);
  }
  void visit(int64_t c, int64_t d, const Block<T>& block) {
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

  void begin(int64_t image, int64_t first, int64_t count, bool idle) {
    if (parts && !idle) input.read(image, first, count);
    grad_input.choose(image, first);
    std::fill_n(grad_input.planes, count * s.pixels(), T(0));
  }
  void visit(int64_t c, int64_t d, const Block<T>& block) {
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
    T* part = parts + d % s.of_class() * 2 * bins;
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

template <typename T>
void forward(const PoolShape& s, const Places<T>& where, T* input, bool by_pixel,
             const int64_t* images, T* output) {
  for_each_task<T>(s, where, images, nullptr, Forward<T>{s, {s, input, by_pixel}, output});
}

// `grad_first` may be absent.
template <typename T>
void backward(const PoolShape& s, const Places<T>& where, const T* grad, T* input, bool by_pixel,
              const int64_t* images, T* grad_input, T* grad_first) {
  const int64_t slots = s.of_class(), bins = 2 * s.rois * s.classes * s.places();
  Buffer<T> parts(grad_first ? slots * bins : 0);
  if (grad_first) std::fill_n(parts.get(), slots * bins, T(0));
  for_each_task<T>(s, where, images, grad,
                   Backward<T>{s, grad, {s, input, by_pixel}, {s, grad_input, by_pixel},
                               grad_first ? parts.get() : nullptr});
  if (grad_first) add_up(parts.get(), slots, bins, grad_first);
}

}  // namespace by_planes
}  // namespace
}  // namespace dcdet
