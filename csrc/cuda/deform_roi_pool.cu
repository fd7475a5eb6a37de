// Deformable RoI pooling on a GPU.
//
// Maps are read channels-last: a cell is then one run of memory, and a team of neighbouring threads
// takes a bin, 16 bytes of channels a thread. Where the bins lie was found in Python. Backward, the
// gradient of the input is summed by atomic additions, in no fixed order.
#include "device.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

namespace dcdet {
namespace {

// R RoIs of `bins` bins each; the other numbers are those of _Pooling in
// dcdet/ops/deform_roi_pool.py.
template <typename T>
struct Pooling {
  int64_t channels, height, width, rois, bins;
  const int64_t *image, *first, *last;
  const T *start, *bin, *count, *divisor;
  int team;  // threads a bin

  __host__ __device__ int64_t all_bins() const { return rois * bins; }
};

// One axis of a bin.
template <typename T>
struct Line {
  T start, bin, count;
  int64_t first, last;
  long size;

  // Bin `i` of all RoIs', along y (axis 0) or x (axis 1).
  __device__ Line(const Pooling<T>& p, int64_t i, int axis) {
    const int64_t roi = axis * p.rois + i / p.bins, place = axis * p.all_bins() + i;
    start = p.start[place];
    bin = p.bin[roi];
    count = p.count[roi];
    first = p.first[place];
    last = p.last[place];
    size = axis ? p.width : p.height;
  }

  __device__ AlignedAxis<T> operator[](int64_t sample) const {
    return aligned_axis(middle_position(start, bin, count, sample), size);
  }
};

// Call visit(y, x, the cell low, low) for the samples of a bin that are on the map. Cells are
// counted through the batch.
template <typename T, typename F>
__device__ __forceinline__ void by_samples(const Pooling<T>& p, int64_t i, const F& visit) {
  const Line<T> rows(p, i, 0), columns(p, i, 1);
  const int64_t image = p.image[i / p.bins];
  for (int64_t a = rows.first; a < rows.last; ++a) {
    const AlignedAxis<T> y = rows[a];
    if (!y.kept) continue;
    const int64_t row = (image * p.height + y.low) * p.width;
    for (int64_t b = columns.first; b < columns.last; ++b) {
      const AlignedAxis<T> x = columns[b];
      if (x.kept) visit(y, x, row + x.low);
    }
  }
}

// Whether a sample has a corner: the last row and the last column have none behind them.
template <typename T>
__device__ __forceinline__ bool has(const AlignedAxis<T>& y, const AlignedAxis<T>& x, int corner) {
  return !(corner / 2 && y.last) && !(corner % 2 && x.last);
}

// output (R, C, bins)
template <typename S, int N>
__global__ void __launch_bounds__(THREADS)
pool_samples(Pooling<Sum<S>> p, const S* __restrict__ input, S* __restrict__ output) {
  using T = Sum<S>;
  const int lane = threadIdx.x % p.team, member = threadIdx.x / p.team;
  const Share share = share_of_teams(p.team);
  for (int64_t i = share.begin + member; i < p.all_bins(); i += share.step) {
    const int64_t roi = i / p.bins, place = i % p.bins;
    const T divisor = p.divisor[i];
    for (int64_t c = lane * N; c < p.channels; c += p.team * N) {
      T sums[N];
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] = T(0);
      by_samples(p, i, [&](const AlignedAxis<T>& y, const AlignedAxis<T>& x, int64_t cell) {
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (!has(y, x, corner)) continue;
          const int64_t pixel = cell + corner / 2 * p.width + corner % 2;
          const T weight = y.weight[corner / 2] * x.weight[corner % 2];
          const Pack<S, N> numbers = pack_at<S, N>(input + pixel * p.channels + c);
#pragma unroll
          for (int n = 0; n < N; ++n) sums[n] += weight * T(numbers.number[n]);
        }
      });
#pragma unroll
      for (int n = 0; n < N; ++n)
        output[(roi * p.channels + c + n) * p.bins + place] = S(sums[n] / divisor);
    }
  }
}

// grad (R, bins, C). grad_input (N, H, W, C) is added to; grad_start (2, R, bins) is null where it
// is not wanted, and then input is not read.
template <typename S, int N>
__global__ void __launch_bounds__(THREADS)
spread_samples(Pooling<Sum<S>> p, const S* __restrict__ grad, const S* __restrict__ input,
               Sum<S>* grad_input, Sum<S>* __restrict__ grad_start) {
  using T = Sum<S>;
  const int lane = threadIdx.x % p.team, member = threadIdx.x / p.team;
  const Share share = share_of_teams(p.team);
  for (int64_t begin = share.begin; begin < p.all_bins(); begin += share.step) {
    const int64_t i = begin + member;
    const bool busy = i < p.all_bins();  // the others only join in the sums
    T slope_y = 0, slope_x = 0;
    for (int64_t c = lane * N; busy && c < p.channels; c += p.team * N) {
      const Pack<S, N> grads = pack_at<S, N>(grad + i * p.channels + c);
      T shares[N];
#pragma unroll
      for (int n = 0; n < N; ++n) shares[n] = T(grads.number[n]) / p.divisor[i];
      by_samples(p, i, [&](const AlignedAxis<T>& y, const AlignedAxis<T>& x, int64_t cell) {
        T dots[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          dots[corner] = T(0);
          if (!has(y, x, corner)) continue;
          const int64_t place = (cell + corner / 2 * p.width + corner % 2) * p.channels + c;
          const T weight = y.weight[corner / 2] * x.weight[corner % 2];
          T parts[N];
#pragma unroll
          for (int n = 0; n < N; ++n) parts[n] = weight * shares[n];
          add_to<N>(grad_input + place, parts);
          if (!grad_start) continue;
          const Pack<S, N> numbers = pack_at<S, N>(input + place);
#pragma unroll
          for (int n = 0; n < N; ++n) dots[corner] += T(numbers.number[n]) * shares[n];
        }
        // On the last row or column both are 0.
        if (y.last || x.last) return;
        slope_y += (dots[2] - dots[0]) * x.unmoved[0] + (dots[3] - dots[1]) * x.unmoved[1];
        slope_x += (dots[1] - dots[0]) * y.unmoved[0] + (dots[3] - dots[2]) * y.unmoved[1];
      });
    }
    if (!grad_start) continue;
    slope_y = team_sum(slope_y, p.team);
    slope_x = team_sum(slope_x, p.team);
    if (!busy || lane) continue;
    grad_start[i] = slope_y;
    grad_start[p.all_bins() + i] = slope_x;
  }
}

// The geometry's tensors, as the schemas name them.
struct Geometry {
  Tensor images, start, bin, count, first, last, divisor;

  Geometry(const Tensor& images, const Tensor& start, const Tensor& bin, const Tensor& count,
           const Tensor& first, const Tensor& last, const Tensor& divisor)
      : images(laid_out(images)),
        start(laid_out(start)),
        bin(laid_out(bin)),
        count(laid_out(count)),
        first(laid_out(first)),
        last(laid_out(last)),
        divisor(laid_out(divisor)) {}

  // For teams of threads that take `packed` channels at once.
  template <typename T>
  Pooling<T> on(const Tensor& input, int64_t packed) const {
    for (const Tensor* tensor : {&start, &bin, &count, &divisor})
      if (tensor->scalar_type() != dtype_of<T>())
        throw std::runtime_error("dcdet: a kernel was given positions of an unexpected dtype");
    return {input.size(1),
            input.size(2),
            input.size(3),
            start.size(1),
            start.size(2) * start.size(3),
            data<int64_t>(images),
            data<int64_t>(first),
            data<int64_t>(last),
            data<T>(start),
            data<T>(bin),
            data<T>(count),
            data<T>(divisor),
            team_size(ceil_divide(input.size(1), packed))};
  }
};

template <typename T>
dim3 blocks_of(const Pooling<T>& p) {
  return dim3(blocks_for(ceil_divide(p.all_bins(), THREADS / p.team)));
}

// Whether channels can be read and added PACKED at once.
template <typename S>
bool takes_packs(const Tensor& input, std::initializer_list<const void*> memory) {
  return input.size(1) % PACKED<S> == 0 && std::all_of(memory.begin(), memory.end(), is_aligned);
}

Tensor deform_roi_pool(const Tensor& input, const Tensor& images, const Tensor& start,
                       const Tensor& bin, const Tensor& count, const Tensor& first,
                       const Tensor& last, const Tensor& divisor) {
  const Stream stream(input);
  const Geometry geometry(images, start, bin, count, first, last, divisor);
  const Tensor maps = laid_out(input, NHWC);
  const Tensor output =
      empty_like(input, {start.size(1), input.size(1), start.size(2), start.size(3)});
  by_any_dtype(input.scalar_type(), [&](auto number) {
    using S = decltype(number);
    const bool packs = takes_packs<S>(input, {data<S>(maps)});
    const auto p = geometry.on<Sum<S>>(input, packs ? PACKED<S> : 1);
    if (!p.all_bins()) return;
    stream.launch("pool_samples", packs ? pool_samples<S, PACKED<S>> : pool_samples<S, 1>,
                  blocks_of(p), p, data<S>(maps), place<S>(output));
  });
  return output;
}

// `moved`: whether the gradient of `start` is wanted; else it is empty.
std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad, const Tensor& input,
                                                    const Tensor& images, const Tensor& start,
                                                    const Tensor& bin, const Tensor& count,
                                                    const Tensor& first, const Tensor& last,
                                                    const Tensor& divisor, bool moved) {
  const Stream stream(input);
  const Geometry geometry(images, start, bin, count, first, last, divisor);
  const Tensor grads = laid_out(grad, NHWC), maps = moved ? laid_out(input, NHWC) : input;
  const Tensor grad_input = zeros_like(start, size_of(input), NHWC);
  const Tensor grad_start = empty_like(start, moved ? size_of(start) : std::vector<int64_t>{0});
  by_any_dtype(input.scalar_type(), [&](auto number) {
    using S = decltype(number);
    using T = Sum<S>;
    const bool packs =
        takes_packs<S>(input, {data<S>(grads), data<S>(maps), data<T>(grad_input)});
    const auto p = geometry.on<T>(input, packs ? PACKED<S> : 1);
    if (!p.all_bins()) return;
    stream.launch("spread_samples", packs ? spread_samples<S, PACKED<S>> : spread_samples<S, 1>,
                  blocks_of(p), p, data<S>(grads), data<S>(maps), place<T>(grad_input),
                  moved ? place<T>(grad_start) : nullptr);
  });
  return {converted(grad_input, input.scalar_type()), grad_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, DCDET_DEVICE, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace dcdet
