// Position-sensitive RoI pooling on a GPU, plain and deformable.
//
// Maps are read in whatever layout they have. Where the plain bins lie, and where the deformable
// ones' first samples, was found in Python. Backward, the gradient of the input is summed by atomic
// additions, in no fixed order.
#include "device.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

namespace dcdet {
namespace {

// Letters: N images of D * g * g channels, R RoIs, K classes, p x p bins.
struct Pool {
  int64_t images, channels, height, width, group_size, rois, classes, pooled;

  __host__ __device__ int64_t depth() const { return channels / (group_size * group_size); }
  __host__ __device__ int64_t of_class() const { return depth() / classes; }
  __host__ __device__ int64_t bins() const { return rois * classes * pooled * pooled; }

  // The channel that output channel d reads in bin (i, j).
  __device__ int64_t channel(int64_t d, int64_t i, int64_t j) const {
    const int64_t group = i * group_size / pooled * group_size + j * group_size / pooled;
    return d * group_size * group_size + group;
  }

  // Where a bin stands in the output.
  __device__ int64_t output(int64_t roi, int64_t d, int64_t i, int64_t j) const {
    return ((roi * depth() + d) * pooled + i) * pooled + j;
  }
};

// Number `bin` of (RoI, class, row, column).
struct Bin {
  int64_t roi, cls, i, j;

  __device__ Bin(const Pool& pool, int64_t bin) {
    j = bin % pool.pooled;
    i = bin / pool.pooled % pool.pooled;
    cls = bin / (pool.pooled * pool.pooled) % pool.classes;
    roi = bin / (pool.pooled * pool.pooled * pool.classes);
  }
};

// Plain: every output channel is a class of its own. A thread takes a bin.

// edges (4, R, p): first and last row, first and last column of the bins; the last are not in it.
struct Cells {
  int64_t top, bottom, left, right;

  __device__ Cells(const Pool& pool, const int64_t* edges, const Bin& bin) {
    const int64_t next = pool.rois * pool.pooled;
    const int64_t *row = edges + bin.roi * pool.pooled + bin.i;
    const int64_t *column = edges + bin.roi * pool.pooled + bin.j;
    top = row[0];
    bottom = row[next];
    left = column[2 * next];
    right = column[3 * next];
  }

  __device__ int64_t area() const { return (bottom - top) * (right - left); }
};

template <typename S>
__global__ void __launch_bounds__(THREADS)
pool_bins(Pool pool, Map<const S> input, const int64_t* __restrict__ images,
          const int64_t* __restrict__ edges, S* __restrict__ output) {
  using T = Sum<S>;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < pool.bins();
       i += int64_t(gridDim.x) * THREADS) {
    const Bin bin(pool, i);
    const Cells cells(pool, edges, bin);
    const S* plane = input.at(images[bin.roi], pool.channel(bin.cls, bin.i, bin.j), 0, 0);
    T sum = 0;
    for (int64_t y = cells.top; y < cells.bottom; ++y)
      for (int64_t x = cells.left; x < cells.right; ++x)
        sum += T(plane[y * input.strides[2] + x * input.strides[3]]);
    output[i] = S(cells.area() ? sum / T(cells.area()) : T(0));
  }
}

template <typename S>
__global__ void __launch_bounds__(THREADS)
spread_bins(Pool pool, const S* __restrict__ grad, const int64_t* __restrict__ images,
            const int64_t* __restrict__ edges, Map<Sum<S>> grad_input) {
  using T = Sum<S>;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < pool.bins();
       i += int64_t(gridDim.x) * THREADS) {
    const T value = T(grad[i]);
    if (value == T(0)) continue;  // most RoIs, under hard-example mining
    const Bin bin(pool, i);
    const Cells cells(pool, edges, bin);
    if (!cells.area()) continue;
    const T share = value / T(cells.area());
    const int64_t image = images[bin.roi], channel = pool.channel(bin.cls, bin.i, bin.j);
    for (int64_t y = cells.top; y < cells.bottom; ++y)
      for (int64_t x = cells.left; x < cells.right; ++x)
        atomicAdd(grad_input.at(image, channel, y, x), share);
  }
}

// Deformable. A team of threads takes a class's bin, which has one place for all its channels.

// first (2, R, K, p, p) is where bins' first samples are, y first; step (2, R).
template <typename T>
struct Samples {
  const T *first, *step;
  int64_t count;  // along a side of a bin
};

// One axis of a bin.
template <typename T>
struct Line {
  T first, step;
  int64_t count;
  long size;

  __device__ PoolAxis<T> operator[](int64_t i) const {
    return pool_axis(pool_position(first, step, i), size);
  }

  // Samples in use; NaN where a position is.
  __device__ T kept() const {
    T sum = 0, used = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += pool_position(first, step, i);
      used += (*this)[i].kept ? T(1) : T(0);
    }
    return sum == sum ? used : sum;
  }
};

template <typename T>
struct Lines {
  Line<T> y, x;

  __device__ Lines(const Pool& pool, const Samples<T>& samples, int64_t bin, int64_t roi)
      : y{samples.first[bin], samples.step[roi], samples.count, long(pool.height)},
        x{samples.first[pool.bins() + bin], samples.step[pool.rois + roi], samples.count,
          long(pool.width)} {}

  // Samples in use, at least 1; NaN where a position is.
  __device__ T divisor() const {
    const T kept = y.kept() * x.kept();
    return kept < 1 ? T(1) : kept;
  }
};

template <typename S>
__global__ void __launch_bounds__(THREADS)
pool_samples(Pool pool, Samples<Sum<S>> samples, int team, Map<const S> input,
             const int64_t* __restrict__ images, S* __restrict__ output) {
  using T = Sum<S>;
  const int lane = threadIdx.x % team, member = threadIdx.x / team;
  const Share share = share_of_teams(team);
  for (int64_t i = share.begin + member; i < pool.bins(); i += share.step) {
    const Bin bin(pool, i);
    const Lines<T> lines(pool, samples, i, bin.roi);
    const T divisor = lines.divisor();
    for (int64_t c = lane; c < pool.of_class(); c += team) {
      const int64_t d = bin.cls * pool.of_class() + c;
      const S* plane = input.at(images[bin.roi], pool.channel(d, bin.i, bin.j), 0, 0);
      T sum = 0;
      for (int64_t a = 0; a < samples.count; ++a) {
        const PoolAxis<T> y = lines.y[a];
        if (!y.kept) continue;
        for (int64_t b = 0; b < samples.count; ++b) {
          const PoolAxis<T> x = lines.x[b];
          if (!x.kept) continue;
          const S* cell = plane + y.low * input.strides[2] + x.low * input.strides[3];
          // Cells of weight 0 are not read: they may not be there.
          T along = (1 - x.fraction) * T(cell[0]);
          if (x.fraction > 0) along += x.fraction * T(cell[input.strides[3]]);
          sum += (1 - y.fraction) * along;
          if (y.fraction > 0) {
            cell += input.strides[2];
            along = (1 - x.fraction) * T(cell[0]);
            if (x.fraction > 0) along += x.fraction * T(cell[input.strides[3]]);
            sum += y.fraction * along;
          }
        }
      }
      output[pool.output(bin.roi, d, bin.i, bin.j)] = S(sum / divisor);
    }
  }
}

// grad_first is like first, or null where it is not wanted; grad_input is added to.
template <typename S>
__global__ void __launch_bounds__(THREADS)
spread_samples(Pool pool, Samples<Sum<S>> samples, int team, const S* __restrict__ grad,
               Map<const S> input, const int64_t* __restrict__ images, Map<Sum<S>> grad_input,
               Sum<S>* __restrict__ grad_first) {
  using T = Sum<S>;
  const int lane = threadIdx.x % team, member = threadIdx.x / team;
  const Share share = share_of_teams(team);
  for (int64_t begin = share.begin; begin < pool.bins(); begin += share.step) {
    const int64_t i = begin + member;
    const bool busy = i < pool.bins();  // the others only join in the sums
    const Bin bin(pool, busy ? i : 0);
    const Lines<T> lines(pool, samples, busy ? i : 0, bin.roi);
    const T divisor = lines.divisor();
    T slope_y = 0, slope_x = 0;
    for (int64_t c = lane; busy && c < pool.of_class(); c += team) {
      const int64_t d = bin.cls * pool.of_class() + c;
      const T value = T(grad[pool.output(bin.roi, d, bin.i, bin.j)]);
      if (value == T(0)) continue;  // most RoIs, under hard-example mining
      const T part = value / divisor;
      const int64_t channel = pool.channel(d, bin.i, bin.j);
      const S* plane = input.at(images[bin.roi], channel, 0, 0);
      T* grad_plane = grad_input.at(images[bin.roi], channel, 0, 0);
      for (int64_t a = 0; a < samples.count; ++a) {
        const PoolAxis<T> y = lines.y[a];
        if (!y.kept) continue;
        for (int64_t b = 0; b < samples.count; ++b) {
          const PoolAxis<T> x = lines.x[b];
          if (!x.kept) continue;
          const T weights_y[2] = {1 - y.fraction, y.fraction};
          const T weights_x[2] = {1 - x.fraction, x.fraction};
          for (int below = 0; below < (y.fraction > 0 ? 2 : 1); ++below)
            for (int right = 0; right < (x.fraction > 0 ? 2 : 1); ++right) {
              const int64_t row = y.low + below, column = x.low + right;
              const T number = T(plane[row * input.strides[2] + column * input.strides[3]]);
              if (y.fraction > 0) slope_y += (below ? part : -part) * weights_x[right] * number;
              if (x.fraction > 0) slope_x += (right ? part : -part) * weights_y[below] * number;
              atomicAdd(grad_plane + row * grad_input.strides[2] + column * grad_input.strides[3],
                        part * weights_y[below] * weights_x[right]);
            }
        }
      }
    }
    if (!grad_first) continue;
    slope_y = team_sum(slope_y, team);
    slope_x = team_sum(slope_x, team);
    if (!busy || lane) continue;
    grad_first[i] = slope_y;
    grad_first[pool.bins() + i] = slope_x;
  }
}

dim3 threads_for(int64_t count) { return dim3(blocks_for(ceil_divide(count, THREADS))); }

Tensor psroi_pool(const Tensor& input, const Tensor& images, const Tensor& edges,
                  int64_t group_size) {
  const Stream stream(input);
  Pool pool = {input.size(0), input.size(1),  input.size(2), input.size(3),
               group_size,    images.size(0), 1,             edges.size(2)};
  pool.classes = pool.depth();
  const Tensor index = laid_out(images), bounds = laid_out(edges);
  const Tensor output = empty_like(input, {pool.rois, pool.depth(), pool.pooled, pool.pooled});
  if (!pool.bins()) return output;
  by_any_dtype(input.scalar_type(), [&](auto number) {
    using S = decltype(number);
    stream.launch("pool_bins", pool_bins<S>, threads_for(pool.bins()), pool, Map<const S>(input),
                  data<int64_t>(index), data<int64_t>(bounds), place<S>(output));
  });
  return output;
}

// A map of zeros to sum numbers of a tensor's dtype in.
Tensor zeros_for(const Tensor& like, const std::vector<int64_t>& size, bool channels_last) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  Tensor zeros = empty_of(wide ? ScalarType::Double : ScalarType::Float, like, size,
                          channels_last ? NHWC : NCHW);
  torch::stable::zero_(zeros);
  return zeros;
}

Tensor psroi_pool_backward(const Tensor& grad, const Tensor& images, const Tensor& edges,
                           std::vector<int64_t> size, int64_t group_size, bool channels_last) {
  const Stream stream(grad);
  Pool pool = {size[0], size[1], size[2], size[3], group_size, images.size(0), 1, edges.size(2)};
  pool.classes = pool.depth();
  const Tensor grads = laid_out(grad), index = laid_out(images), bounds = laid_out(edges);
  const Tensor grad_input = zeros_for(grad, size, channels_last);
  by_any_dtype(grad.scalar_type(), [&](auto number) {
    using S = decltype(number);
    if (!pool.bins()) return;
    stream.launch("spread_bins", spread_bins<S>, threads_for(pool.bins()), pool, data<S>(grads),
                  data<int64_t>(index), data<int64_t>(bounds), Map<Sum<S>>(grad_input));
  });
  return converted(grad_input, grad.scalar_type());
}

// What both ways of the deformable pooling begin with.
struct Deformable {
  Pool pool;
  Tensor images, first, step;
  int64_t count;
  int team;

  Deformable(const Tensor& input, const Tensor& index, const Tensor& places, const Tensor& steps,
             int64_t group_size, int64_t samples)
      : pool{input.size(0), input.size(1), input.size(2),  input.size(3),
             group_size,    index.size(0), places.size(2), places.size(3)},
        images(laid_out(index)),
        first(laid_out(places)),
        step(laid_out(steps)),
        count(samples),
        team(team_size(pool.of_class())) {}

  dim3 blocks() const { return dim3(blocks_for(ceil_divide(pool.bins(), THREADS / team))); }

  template <typename T>
  Samples<T> samples() const {
    if (first.scalar_type() != dtype_of<T>() || step.scalar_type() != dtype_of<T>())
      throw std::runtime_error("dcdet: a kernel was given positions of an unexpected dtype");
    return {data<T>(first), data<T>(step), count};
  }
};

Tensor deform_psroi_pool(const Tensor& input, const Tensor& images, const Tensor& first,
                         const Tensor& step, int64_t group_size, int64_t samples) {
  const Stream stream(input);
  const Deformable call(input, images, first, step, group_size, samples);
  const Pool& pool = call.pool;
  const Tensor output = empty_like(input, {pool.rois, pool.depth(), pool.pooled, pool.pooled});
  if (!pool.bins()) return output;
  by_any_dtype(input.scalar_type(), [&](auto number) {
    using S = decltype(number);
    stream.launch("pool_samples", pool_samples<S>, call.blocks(), pool, call.samples<Sum<S>>(),
                  call.team, Map<const S>(input), data<int64_t>(call.images), place<S>(output));
  });
  return output;
}

// `moved`: whether the gradient of `first` is wanted; else it is empty.
std::tuple<Tensor, Tensor> deform_psroi_pool_backward(const Tensor& grad, const Tensor& input,
                                                      const Tensor& images, const Tensor& first,
                                                      const Tensor& step, int64_t group_size,
                                                      int64_t samples, bool moved) {
  const Stream stream(input);
  const Deformable call(input, images, first, step, group_size, samples);
  const Tensor grads = laid_out(grad);
  const Tensor grad_input = zeros_for(input, size_of(input), is_channels_last(input));
  const Tensor grad_first =
      empty_like(call.first, moved ? size_of(first) : std::vector<int64_t>{0});
  by_any_dtype(input.scalar_type(), [&](auto number) {
    using S = decltype(number);
    if (!call.pool.bins()) return;
    stream.launch("spread_samples", spread_samples<S>, call.blocks(), call.pool,
                  call.samples<Sum<S>>(), call.team, data<S>(grads), Map<const S>(input),
                  data<int64_t>(call.images), Map<Sum<S>>(grad_input),
                  moved ? place<Sum<S>>(grad_first) : nullptr);
  });
  return {converted(grad_input, input.scalar_type()), grad_first};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, DCDET_DEVICE, m) {
  m.impl("psroi_pool", TORCH_BOX(&psroi_pool));
  m.impl("psroi_pool_backward", TORCH_BOX(&psroi_pool_backward));
  m.impl("deform_psroi_pool", TORCH_BOX(&deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&deform_psroi_pool_backward));
}

}  // namespace dcdet
