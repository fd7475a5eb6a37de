// RoI pooling where all channels share their bins; part of psroi_pool.cpp.
//
// A task owns up to LANES output channels of one image, for all RoIs. It takes the map row by row:
// a row of pixels is laid out with those channels side by side, and each bin that reads it adds
// what it reads.
#pragma once

namespace dcdet {
namespace {
namespace by_rows {

// What the bins read along one axis: list i is cells[begin[i]] to cells[end[i]].
template <typename T>
struct Lists {
  std::vector<int64_t> begin, end;
  Buffer<Reach<T>> cells{0};

  int64_t size(int64_t list) const { return end[list] - begin[list]; }
};

// Where all bins lie: the lists of their rows and columns, and their divisors. Where `own`, list
// roi * p * p + place belongs to one bin; else lists roi * p + i are those of bin rows and columns.
template <typename T>
struct Bins {
  Lists<T> axes[2];
  std::vector<T> divisors;
  bool own;

  int64_t list(const PoolShape& s, int axis, int64_t roi, int64_t place) const {
    if (own) return roi * s.places() + place;
    return roi * s.pooled + (axis ? place % s.pooled : place / s.pooled);
  }
};

// Of plain bins: edges (4, R, p) are the first and last row, the first and last column; the last
// are not in the bin.
template <typename T>
Bins<T> plain_bins(const PoolShape& s, const int64_t* edges) {
  Bins<T> bins;
  bins.own = false;
  const int64_t number = s.rois * s.pooled;
  for (int axis = 0; axis < 2; ++axis) {
    Lists<T>& lists = bins.axes[axis];
    const int64_t* first = edges + 2 * axis * number;
    lists.begin.resize(number);
    lists.end.resize(number);
    int64_t total = 0;
    for (int64_t list = 0; list < number; ++list) {
      lists.begin[list] = total;
      lists.end[list] = total += first[number + list] - first[list];
    }
    lists.cells = Buffer<Reach<T>>(total);
    for (int64_t list = 0; list < number; ++list)
      for (int64_t i = 0; i < lists.size(list); ++i)
        lists.cells.get()[lists.begin[list] + i] = {int32_t(first[list] + i), T(1), T(0)};
  }
  for (int64_t roi = 0; roi < s.rois; ++roi)
    for (int64_t place = 0; place < s.places(); ++place) {
      const int64_t rows = bins.axes[0].size(bins.list(s, 0, roi, place));
      const int64_t columns = bins.axes[1].size(bins.list(s, 1, roi, place));
      bins.divisors.push_back(std::max(T(1), T(rows) * T(columns)));
    }
  return bins;
}

// Of deformable bins: first (2, R, p, p) is where their first samples are, y first; step (2, R) is
// the distance to the next.
template <typename T>
Bins<T> deformed_bins(const PoolShape& s, const T* first, const T* step, int64_t count) {
  Bins<T> bins;
  bins.own = true;
  const int64_t number = s.rois * s.places(), most = 2 * count;
  for (Lists<T>& lists : bins.axes) {
    lists.begin.resize(number);
    lists.end.resize(number);
    lists.cells = Buffer<Reach<T>>(number * most);
  }
  bins.divisors.resize(number);
  torch::stable::parallel_for(0, (number + LANES - 1) / LANES, 64, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> lows(count * LANES);
    std::vector<T> fractions(count * LANES);
    std::vector<Entry<T>> entries(most);
    for (int64_t at = begin * LANES; at < std::min(end * LANES, number); at += LANES) {
      const int64_t here = std::min(LANES, number - at);
      T kept[2][LANES];
      for (int axis = 0; axis < 2; ++axis) {
        Samples<T> samples = {{}, {}, count, axis ? s.width : s.height, 1};
        for (int64_t l = 0; l < LANES; ++l) {
          const int64_t bin = std::min(at + l, number - 1);
          samples.first[l] = first[axis * number + bin];
          samples.step[l] = step[axis * s.rois + bin / s.places()];
        }
        const int64_t found = best<T>().find_entries(samples, lows.data(), fractions.data(),
                                                     entries.data(), kept[axis]);
        Lists<T>& lists = bins.axes[axis];
        for (int64_t l = 0; l < here; ++l) {
          Reach<T>* next = lists.cells.get() + (lists.begin[at + l] = (at + l) * most);
          for (int64_t e = 0; e < found; ++e) {
            *next = {entries[e].cell[l], entries[e].weight[l], entries[e].slope[l]};
            next += next->weight != 0 || next->slope != 0;
          }
          lists.end[at + l] = next - lists.cells.get();
        }
      }
      for (int64_t l = 0; l < here; ++l) {  // samples in use, at least 1; NaN where a position is
        const T both = kept[0][l] * kept[1][l];
        bins.divisors[at + l] = both < 1 ? T(1) : both;
      }
    }
  });
  return bins;
}

// One image's bins by the rows they read: bins[begin[y]] to bins[begin[y + 1]] read row y.
template <typename T>
struct Rows {
  std::vector<int64_t> begin;
  Buffer<RowBin<T>> bins{0};
};

template <typename T>
Rows<T> rows_of(const PoolShape& s, const Bins<T>& bins, const std::vector<int64_t>& rois) {
  std::vector<int32_t> groups(s.places());  // where each bin's group begins
  const int64_t p = s.pooled, g = s.group_size;
  for (int64_t place = 0; place < s.places(); ++place)
    groups[place] = (place / p * g / p * g + place % p * g / p) * LANES;
  const Reach<T>*rows_read = bins.axes[0].cells.get(), *columns = bins.axes[1].cells.get();
  Rows<T> rows;
  std::vector<int64_t> next(s.height + 1);
  for (const int64_t roi : rois)
    for (int64_t place = 0; place < s.places(); ++place) {
      const int64_t list = bins.list(s, 0, roi, place);
      for (int64_t e = bins.axes[0].begin[list]; e < bins.axes[0].end[list]; ++e)
        ++next[rows_read[e].cell + 1];
    }
  std::partial_sum(next.begin(), next.end(), next.begin());
  rows.begin = next;
  rows.bins = Buffer<RowBin<T>>(next.back());
  for (size_t i = 0; i < rois.size(); ++i)
    for (int64_t place = 0; place < s.places(); ++place) {
      const int64_t down = bins.list(s, 0, rois[i], place);
      const int64_t across = bins.list(s, 1, rois[i], place);
      RowBin<T> bin = {columns + bins.axes[1].begin[across],
                       int64_t(i * s.places() + place) * LANES, groups[place],
                       int32_t(bins.axes[1].size(across)), T(0), T(0)};
      for (int64_t e = bins.axes[0].begin[down]; e < bins.axes[0].end[down]; ++e) {
        bin.weight = rows_read[e].weight;
        bin.slope = rows_read[e].slope;
        rows.bins.get()[next[rows_read[e].cell]++] = bin;
      }
    }
  return rows;
}

// Some output channels of an image.
struct Channels {
  int64_t image, first, count;
};

// A map, or its gradient, of which a task sees a row of pixels with its channels side by side.
template <typename T>
struct Map {
  const PoolShape& s;
  T* numbers;
  bool by_pixel;  // channels-last

  // Rows that lie in memory as they are wanted need no copy.
  bool as_wanted(const Channels& c) const {
    return by_pixel && s.groups() == 1 && c.count == LANES;
  }
  int64_t step(const Channels& c) const { return as_wanted(c) ? s.channels : s.groups() * LANES; }
  T* pixel(const Channels& c, int64_t y, int64_t x) const {
    return numbers + ((c.image * s.height + y) * s.width + x) * s.channels + c.first * s.groups();
  }
  T* plane(const Channels& c, int64_t group) const {
    return numbers + (c.image * s.channels + c.first * s.groups() + group) * s.pixels();
  }
  T* row(const Channels& c, int64_t y, T* copy) const {
    return as_wanted(c) ? pixel(c, y, 0) : copy;
  }
  const T* read(const Channels& c, int64_t y, T* copy) const {
    if (as_wanted(c)) return pixel(c, y, 0);
    if (by_pixel)
      for (int64_t x = 0; x < s.width; ++x) {
        // A pixel's channels lie too far from the next one's for the processor to guess.
        for (int64_t ahead = 0; ahead < c.count * s.groups(); ahead += 64 / sizeof(T))
          __builtin_prefetch(pixel(c, y, x + 1) + ahead, 0, 2);
        best<T>().into_lanes(pixel(c, y, x), s.groups(), c.count, s.groups(),
                             copy + x * s.groups() * LANES, LANES);
      }
    else
      for (int64_t group = 0; group < s.groups(); ++group)
        best<T>().into_lanes(plane(c, group) + y * s.width, s.groups() * s.pixels(), c.count,
                             s.width, copy + group * LANES, s.groups() * LANES);
    return copy;
  }
  void write(const Channels& c, int64_t y, const T* copy) const {
    if (as_wanted(c)) return;
    if (by_pixel)
      for (int64_t x = 0; x < s.width; ++x)
        best<T>().from_lanes(copy + x * s.groups() * LANES, LANES, s.groups(), c.count,
                             pixel(c, y, x), s.groups());
    else
      for (int64_t group = 0; group < s.groups(); ++group)
        best<T>().from_lanes(copy + group * LANES, s.groups() * LANES, s.width, c.count,
                             plane(c, group) + y * s.width, s.groups() * s.pixels());
  }
};

// How many parts the output channels are cut into. Positions' gradients are summed over the parts,
// so their number may not depend on that of the threads.
inline int64_t parts_of(const PoolShape& s, bool fixed) {
  const int64_t wanted = (s.depth() + LANES - 1) / LANES;
  if (fixed) return std::max(wanted, std::min<int64_t>(s.depth(), 2));
  const int64_t threads = torch::stable::get_num_threads();
  return std::min(s.depth(), (wanted + threads - 1) / threads * threads);
}

// task(channels, number of the part, RoIs and rows of the image) for every part of every image.
template <typename T, typename F>
void for_each_part(const PoolShape& s, const Bins<T>& bins, const int64_t* images, const T* grad,
                   int64_t parts, const F& task) {
  const auto rois = rois_of_images<T>(s, images, grad);
  std::vector<Rows<T>> rows(s.images);
  torch::stable::parallel_for(0, s.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image)
      rows[image] = rows_of(s, bins, rois[image]);
  });
  torch::stable::parallel_for(0, s.images * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts, part = i % parts;
      const int64_t first = part * s.depth() / parts, last = (part + 1) * s.depth() / parts;
      task(Channels{image, first, last - first}, part, rois[image], rows[image]);
    }
  });
}

template <typename T>
void forward(const PoolShape& s, const Bins<T>& bins, T* input, bool by_pixel,
             const int64_t* images, T* output) {
  const Map<T> map{s, input, by_pixel};
  const auto task = [&](const Channels& c, int64_t, const std::vector<int64_t>& rois,
                        const Rows<T>& rows) {
    const int64_t lanes = s.places() * LANES;
    Buffer<T> copy(s.width * s.groups() * LANES), sums(rois.size() * lanes);
    std::fill_n(sums.get(), rois.size() * lanes, T(0));
    for (int64_t y = 0; y < s.height; ++y) {
      const int64_t begin = rows.begin[y], count = rows.begin[y + 1] - begin;
      if (count)
        best<T>().sum_row(rows.bins.get() + begin, count, map.read(c, y, copy.get()),
                          map.step(c), sums.get());
    }
    for (size_t i = 0; i < rois.size(); ++i) {
      T* own = sums.get() + i * lanes;
      best<T>().divide(own, bins.divisors.data() + rois[i] * s.places(), s.places(), false);
      best<T>().from_lanes(own, LANES, s.places(), c.count,
                           output + (rois[i] * s.depth() + c.first) * s.places(), s.places());
    }
  };
  for_each_part<T>(s, bins, images, nullptr, parts_of(s, false), task);
}

// `grad_first` (2, R, p, p) may be absent; else `input` is there.
template <typename T>
void backward(const PoolShape& s, const Bins<T>& bins, const T* grad, T* input, bool by_pixel,
              const int64_t* images, T* grad_input, T* grad_first) {
  const int64_t parts = parts_of(s, grad_first), positions = 2 * s.rois * s.places();
  Buffer<T> moved(grad_first ? parts * positions : 0);
  if (grad_first) std::fill_n(moved.get(), parts * positions, T(0));
  const Map<T> map{s, input, by_pixel}, grad_map{s, grad_input, by_pixel};
  const auto task = [&](const Channels& c, int64_t part, const std::vector<int64_t>& rois,
                        const Rows<T>& rows) {
    const int64_t lanes = s.places() * LANES, all = rois.size() * lanes;
    Buffer<T> copy(s.width * s.groups() * LANES), shares(all);
    for (size_t i = 0; i < rois.size(); ++i) {
      T* own = shares.get() + i * lanes;
      best<T>().into_lanes(grad + (rois[i] * s.depth() + c.first) * s.places(), s.places(),
                           c.count, s.places(), own, LANES);
      best<T>().divide(own, bins.divisors.data() + rois[i] * s.places(), s.places(), true);
    }
    Buffer<T> down(grad_first ? all : 0), right(grad_first ? all : 0);
    if (grad_first) {
      std::fill_n(down.get(), all, T(0));
      std::fill_n(right.get(), all, T(0));
    }
    for (int64_t y = 0; y < s.height; ++y) {
      const int64_t begin = rows.begin[y], count = rows.begin[y + 1] - begin;
      const RowBin<T>* readers = rows.bins.get() + begin;
      if (grad_first && count)
        best<T>().slope_row(readers, count, map.read(c, y, copy.get()), map.step(c), down.get(),
                            right.get());
      T* row = grad_map.row(c, y, copy.get());
      for (int64_t x = 0; x < s.width; ++x)
        std::fill_n(row + x * grad_map.step(c), s.groups() * LANES, T(0));
      best<T>().spread_row(readers, count, shares.get(), row, grad_map.step(c));
      grad_map.write(c, y, row);
    }
    if (!grad_first) return;
    for (size_t i = 0; i < rois.size(); ++i)
      for (int64_t place = 0; place < s.places(); ++place) {
        const int64_t at = i * lanes + place * LANES;
        T* own = moved.get() + part * positions + rois[i] * s.places() + place;
        own[0] = best<T>().dot(down.get() + at, shares.get() + at);
        own[positions / 2] = best<T>().dot(right.get() + at, shares.get() + at);
      }
  };
  for_each_part<T>(s, bins, images, grad, parts, task);
  if (grad_first) add_up(moved.get(), parts, positions, grad_first);
}

}  // namespace by_rows
}  // namespace
}  // namespace dcdet
