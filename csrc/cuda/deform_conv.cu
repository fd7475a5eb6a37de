// Deformable convolution on a GPU: sampled columns, multiplied by the BLAS.
//
// The input is read channels-last: a sample is then four runs of memory, and a team of neighbouring
// threads takes one sample, 16 bytes of channels a thread. Output pixels come in chunks whose columns
// stay in the L2 cache between the kernel that writes them and the product that reads them.
// Backward: the gradient of the input is summed by atomic additions, in no fixed order.
#include "device.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

namespace dcdet {
namespace {

// Bytes of columns held at once. The L2 cache of an A100 or H100 has 40 or 50 MB.
constexpr int64_t COLUMN_BYTES = 24 << 20;

// Threads that keep any GPU busy; with fewer, the taps of a pixel go to different teams.
constexpr int64_t ENOUGH_THREADS = 1 << 19;

// Letters as in dcdet/ops/deform_conv.py: B, C, O, K taps, G offset groups.
template <typename S>
struct Conv {
  int64_t channels, height, width, out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups, pixels;
  bool release;
  int team;  // threads a sample
  Map<const Sum<S>> offset, mask;  // no data where there is no mask

  __host__ __device__ int64_t taps() const { return kernel_h * kernel_w; }
  __host__ __device__ int64_t inputs() const { return channels / groups; }
  __host__ __device__ int64_t outputs() const { return out_channels / groups; }
  __host__ __device__ int64_t run() const { return channels / offset_groups; }
  __host__ __device__ int64_t depth() const { return taps() * inputs(); }
};

struct Pixel {
  int64_t image, y, x;
};

template <typename S>
__device__ __forceinline__ Pixel pixel_of(const Conv<S>& conv, int64_t pixel) {
  const int64_t row = pixel / conv.out_width;
  return {row / conv.out_height, row % conv.out_height, pixel % conv.out_width};
}

template <typename S>
__device__ __forceinline__ Sample<Sum<S>> find_sample(const Conv<S>& conv, const Pixel& pixel,
                                                      int64_t group, int64_t tap) {
  using T = Sum<S>;
  const int64_t channel = 2 * (group * conv.taps() + tap);
  const T* shift = conv.offset.at(pixel.image, channel, pixel.y, pixel.x);
  const int64_t top = pixel.y * conv.stride_h - conv.pad_h + tap / conv.kernel_w * conv.dilation_h;
  const int64_t left = pixel.x * conv.stride_w - conv.pad_w + tap % conv.kernel_w * conv.dilation_w;
  return sample_at(T(top) + shift[0], T(left) + shift[conv.offset.strides[1]], int(conv.height),
                   int(conv.width), conv.release, pixel.image * conv.height * conv.width);
}

template <typename S>
__device__ __forceinline__ Sum<S> find_mask(const Conv<S>& conv, const Pixel& pixel, int64_t group,
                                            int64_t tap) {
  if (!conv.mask.data) return Sum<S>(1);
  return *conv.mask.at(pixel.image, group * conv.taps() + tap, pixel.y, pixel.x);
}

// N channels of a sample's corners; zeros for those outside, which are not read.
template <typename S, int N>
__device__ __forceinline__ void read_corners(const Conv<S>& conv, const S* __restrict__ input,
                                             const Sample<Sum<S>>& sample, int64_t channel,
                                             Pack<S, N>* corners) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t pixel = sample.pixel(i, conv.width);
    if (pixel >= 0) {
      corners[i] = pack_at<S, N>(input + pixel * conv.channels + channel);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) corners[i].number[n] = S(0.0f);
    }
  }
}

// Where a channel of a chunk's columns (groups, count, K, C / groups) stands.
template <typename S>
__device__ __forceinline__ int64_t column_of(const Conv<S>& conv, int64_t count, int64_t pixel,
                                             int64_t tap, int64_t channel) {
  const int64_t group = conv.groups == 1 ? 0 : channel / conv.inputs();
  return ((group * count + pixel) * conv.taps() + tap) * conv.inputs() + channel -
         group * conv.inputs();
}

// columns = the samples of the output pixels first, ..., first + count - 1, times the mask.
template <typename S, int N>
__global__ void __launch_bounds__(THREADS)
gather_columns(Conv<S> conv, int64_t first, int64_t count, const S* __restrict__ input,
               S* __restrict__ columns) {
  using T = Sum<S>;
  const int lane = threadIdx.x % conv.team, member = threadIdx.x / conv.team;
  const Share share = share_of_teams(conv.team);
  for (int64_t group = blockIdx.z; group < conv.offset_groups; group += gridDim.z)
    for (int64_t i = share.begin + member; i < count; i += share.step) {
      const Pixel pixel = pixel_of(conv, first + i);
      for (int64_t tap = blockIdx.y; tap < conv.taps(); tap += gridDim.y) {
        const Sample<T> sample = find_sample(conv, pixel, group, tap);
        const T mask = find_mask(conv, pixel, group, tap);
        T weights[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) weights[corner] = sample.weight(corner) * mask;
        for (int64_t c = lane * N; c < conv.run(); c += conv.team * N) {
          const int64_t channel = group * conv.run() + c;
          Pack<S, N> corners[4], column;
          read_corners(conv, input, sample, channel, corners);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            T sum = weights[0] * T(corners[0].number[n]);
#pragma unroll
            for (int corner = 1; corner < 4; ++corner)
              sum += weights[corner] * T(corners[corner].number[n]);
            column.number[n] = S(sum);
          }
          pack_at<S, N>(columns + column_of(conv, count, i, tap, channel)) = column;
        }
      }
    }
}

// From the gradients of the columns those of input, offset and mask; and the columns anew.
//
// grad_input (B, H, W, C) is added to. grad_offset and grad_mask are contiguous.
template <typename S, int N>
__global__ void __launch_bounds__(THREADS)
scatter_columns(Conv<S> conv, int64_t first, int64_t count, const S* __restrict__ input,
                const S* __restrict__ grad_columns, S* __restrict__ columns, Sum<S>* grad_input,
                Sum<S>* __restrict__ grad_offset, Sum<S>* __restrict__ grad_mask) {
  using T = Sum<S>;
  const int64_t plane = conv.out_height * conv.out_width;
  const int lane = threadIdx.x % conv.team, member = threadIdx.x / conv.team;
  const Share share = share_of_teams(conv.team);
  for (int64_t group = blockIdx.z; group < conv.offset_groups; group += gridDim.z)
    for (int64_t begin = share.begin; begin < count; begin += share.step) {
      const int64_t i = begin + member;
      const bool busy = i < count;  // the others only join in the sums
      const Pixel pixel = pixel_of(conv, first + (busy ? i : 0));
      for (int64_t tap = blockIdx.y; tap < conv.taps(); tap += gridDim.y) {
        const Sample<T> sample = find_sample(conv, pixel, group, tap);
        const T mask = find_mask(conv, pixel, group, tap);
        T slope_y = 0, slope_x = 0, value = 0;
        for (int64_t c = lane * N; busy && c < conv.run(); c += conv.team * N) {
          const int64_t channel = group * conv.run() + c;
          const int64_t place = column_of(conv, count, i, tap, channel);
          const Pack<S, N> grad = pack_at<S, N>(grad_columns + place);
          Pack<S, N> corners[4], column;
          read_corners(conv, input, sample, channel, corners);
          T sums[N], dots[4];
#pragma unroll
          for (int n = 0; n < N; ++n) sums[n] = T(0);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const T weight = sample.weight(corner) * mask;
            const int64_t pixel = sample.pixel(corner, conv.width);
            T parts[N];
            dots[corner] = T(0);
#pragma unroll
            for (int n = 0; n < N; ++n) {
              const T number = T(corners[corner].number[n]);
              sums[n] += weight * number;
              parts[n] = weight * T(grad.number[n]);
              if (pixel >= 0) dots[corner] += number * T(grad.number[n]);
            }
            if (pixel >= 0 && weight != T(0))
              add_to<N>(grad_input + pixel * conv.channels + channel, parts);
          }
#pragma unroll
          for (int n = 0; n < N; ++n) column.number[n] = S(sums[n]);
          pack_at<S, N>(columns + place) = column;
          slope_y += sample.slope_y(dots);
          slope_x += sample.slope_x(dots);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) value += sample.weight(corner) * dots[corner];
        }
        slope_y = team_sum(slope_y, conv.team);
        slope_x = team_sum(slope_x, conv.team);
        if (grad_mask) value = team_sum(value, conv.team);
        if (!busy || lane) continue;
        const int64_t channel = (pixel.image * conv.offset_groups + group) * conv.taps() + tap;
        const int64_t place = pixel.y * conv.out_width + pixel.x;
        grad_offset[2 * channel * plane + place] = sample.held_y ? T(0) : slope_y * mask;
        grad_offset[(2 * channel + 1) * plane + place] = sample.held_x ? T(0) : slope_x * mask;
        if (grad_mask) grad_mask[channel * plane + place] = value;
      }
    }
}

// rows (count, width) += bias (width,)
template <typename S>
__global__ void __launch_bounds__(THREADS)
add_bias(int64_t count, int64_t width, const S* __restrict__ bias, S* __restrict__ rows) {
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < count * width;
       i += int64_t(gridDim.x) * THREADS)
    rows[i] = S(Sum<S>(rows[i]) + Sum<S>(bias[i % width]));
}

// sums += numbers
template <typename S>
__global__ void __launch_bounds__(THREADS)
add_numbers(int64_t count, const S* __restrict__ numbers, Sum<S>* __restrict__ sums) {
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * THREADS)
    sums[i] += Sum<S>(numbers[i]);
}

// A matrix for each group, somewhere in another tensor's memory: (groups, rows, columns).
Tensor matrices(const Tensor& of, void* memory, std::array<int64_t, 3> size,
                std::array<int64_t, 3> strides) {
  return torch::stable::from_blob(memory, {size.data(), 3}, {strides.data(), 3}, of.device(),
                                  of.scalar_type());
}

// product = one @ other, group by group.
void multiply(const Tensor& one, const Tensor& other, const Tensor& product) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(one),
                                    torch::stable::detail::from(other),
                                    torch::stable::detail::from(product)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owned by whoever takes it
}

// Output pixels of a chunk, such that the columns of `buffers` chunks fit COLUMN_BYTES.
template <typename S>
int64_t chunk_of(const Conv<S>& conv, int64_t buffers) {
  const char* asked = std::getenv("DCDET_COLUMN_BYTES");  // for tests and measurements
  const int64_t budget = asked ? std::atoll(asked) : COLUMN_BYTES;
  const int64_t bytes = buffers * conv.taps() * conv.channels * int64_t(sizeof(S));
  const int64_t most = std::max<int64_t>(1, budget / bytes);
  return ceil_divide(conv.pixels, ceil_divide(conv.pixels, most));
}

template <typename S>
dim3 blocks_of(const Conv<S>& conv, int64_t count) {
  const int64_t threads = count * conv.team * conv.offset_groups;
  const int64_t splits = std::min(conv.taps(), ceil_divide(ENOUGH_THREADS, threads));
  return dim3(blocks_for(ceil_divide(count, THREADS / conv.team)), blocks_for(splits),
              blocks_for(conv.offset_groups));
}

// Whether channels can be read and written PACKED at once.
template <typename S>
bool takes_packs(const Conv<S>& conv, std::initializer_list<const void*> memory) {
  return conv.run() % PACKED<S> == 0 && conv.inputs() % PACKED<S> == 0 &&
         std::all_of(memory.begin(), memory.end(), is_aligned);
}

template <typename S>
Conv<S> conv_of(const Tensor& input, const Tensor& offset, const Tensor& weight,
                const std::optional<Tensor>& mask, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                bool original) {
  Conv<S> conv;
  conv.channels = input.size(1);
  conv.height = input.size(2);
  conv.width = input.size(3);
  conv.out_channels = weight.size(0);
  conv.out_height = offset.size(2);
  conv.out_width = offset.size(3);
  conv.kernel_h = weight.size(2);
  conv.kernel_w = weight.size(3);
  conv.stride_h = stride[0];
  conv.stride_w = stride[1];
  conv.pad_h = padding[0];
  conv.pad_w = padding[1];
  conv.dilation_h = dilation[0];
  conv.dilation_w = dilation[1];
  conv.groups = conv.channels / weight.size(1);
  conv.offset_groups = offset.size(1) / (2 * conv.taps());
  conv.pixels = input.size(0) * conv.out_height * conv.out_width;
  conv.release = original;
  conv.team = 1;
  conv.offset = Map<const Sum<S>>(offset);
  if (mask) conv.mask = Map<const Sum<S>>(*mask);
  return conv;
}

template <typename S>
void forward(const Stream& stream, Conv<S> conv, const Tensor& maps, const Tensor& matrix,
             const std::vector<Tensor>& bias, const Tensor& output) {
  const int64_t depth = conv.depth(), outputs = conv.outputs(), chunk = chunk_of(conv, 1);
  const Tensor columns = empty_like(maps, {conv.groups, chunk, depth});
  const bool packs = takes_packs(conv, {data<S>(maps), data<S>(columns)});
  conv.team = team_size(conv.run() / (packs ? PACKED<S> : 1));
  const Tensor weights =
      matrices(matrix, matrix.data_ptr(), {conv.groups, depth, outputs}, {outputs * depth, 1, depth});
  for (int64_t first = 0; first < conv.pixels; first += chunk) {
    const int64_t count = std::min(chunk, conv.pixels - first);
    stream.launch("gather_columns", packs ? gather_columns<S, PACKED<S>> : gather_columns<S, 1>,
                  blocks_of(conv, count), conv, first, count, data<S>(maps), place<S>(columns));
    multiply(matrices(columns, columns.data_ptr(), {conv.groups, count, depth},
                      {count * depth, depth, 1}),
             weights,
             matrices(output, place<S>(output) + first * conv.out_channels,
                      {conv.groups, count, outputs}, {outputs, conv.out_channels, 1}));
  }
  if (!bias.empty())
    stream.launch("add_bias", add_bias<S>,
                  dim3(blocks_for(ceil_divide(conv.pixels * conv.out_channels, THREADS))),
                  conv.pixels, conv.out_channels, data<S>(bias), place<S>(output));
}

// grad_input and grad_offset and so on are of the dtype of sums; a single chunk's grad_weight is S.
template <typename S>
Tensor backward(const Stream& stream, Conv<S> conv, const Tensor& grads, const Tensor& maps,
                const Tensor& matrix, const std::vector<int64_t>& weight_size,
                const Tensor& grad_input, const Tensor& grad_offset, const Tensor& grad_mask) {
  using T = Sum<S>;
  const int64_t depth = conv.depth(), outputs = conv.outputs(), chunk = chunk_of(conv, 2);
  const Tensor columns = empty_like(maps, {conv.groups, chunk, depth});
  const Tensor grad_columns = empty_like(maps, {conv.groups, chunk, depth});
  const bool packs = takes_packs(conv, {data<S>(maps), data<S>(columns), data<S>(grad_columns),
                                        data<T>(grad_input)});
  conv.team = team_size(conv.run() / (packs ? PACKED<S> : 1));
  const Tensor weights =
      matrices(matrix, matrix.data_ptr(), {conv.groups, outputs, depth}, {outputs * depth, depth, 1});
  const Tensor part = empty_like(maps, weight_size, NHWC);
  const Tensor part_matrix =
      matrices(part, part.data_ptr(), {conv.groups, outputs, depth}, {outputs * depth, depth, 1});
  std::optional<Tensor> sums;
  if (chunk < conv.pixels) sums = zeros_like(grad_input, weight_size, NHWC);
  for (int64_t first = 0; first < conv.pixels; first += chunk) {
    const int64_t count = std::min(chunk, conv.pixels - first);
    S* grad = const_cast<S*>(data<S>(grads)) + first * conv.out_channels;
    const std::array<int64_t, 3> size = {conv.groups, count, depth};
    const std::array<int64_t, 3> strides = {count * depth, depth, 1};
    multiply(matrices(grads, grad, {conv.groups, count, outputs}, {outputs, conv.out_channels, 1}),
             weights, matrices(grad_columns, grad_columns.data_ptr(), size, strides));
    stream.launch("scatter_columns", packs ? scatter_columns<S, PACKED<S>> : scatter_columns<S, 1>,
                  blocks_of(conv, count), conv, first, count, data<S>(maps), data<S>(grad_columns),
                  place<S>(columns), place<T>(grad_input), place<T>(grad_offset),
                  conv.mask.data ? place<T>(grad_mask) : nullptr);
    multiply(matrices(grads, grad, {conv.groups, outputs, count}, {outputs, 1, conv.out_channels}),
             matrices(columns, columns.data_ptr(), size, strides), part_matrix);
    if (sums) {
      const int64_t numbers = conv.out_channels * depth;
      stream.launch("add_numbers", add_numbers<S>, dim3(blocks_for(ceil_divide(numbers, THREADS))),
                    numbers, data<S>(part), place<T>(*sums));
    }
  }
  return sums ? *sums : part;
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, bool original) {
  const Stream stream(input);
  const Tensor maps = laid_out(input, NHWC), matrix = laid_out(weight, NHWC);
  const std::vector<Tensor> constants = present(bias);
  const Tensor output = empty_like(
      input, {input.size(0), weight.size(0), offset.size(2), offset.size(3)}, NHWC);
  by_any_dtype(input.scalar_type(), [&](auto number) {
    const auto conv = conv_of<decltype(number)>(input, offset, weight, mask, stride, padding,
                                                dilation, original);
    if (conv.pixels) forward(stream, conv, maps, matrix, constants, output);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& mask, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, bool original) {
  const Stream stream(input);
  const Tensor grads = laid_out(grad, NHWC), maps = laid_out(input, NHWC);
  const Tensor matrix = laid_out(weight, NHWC);
  const Tensor grad_offset = empty_like(offset, size_of(offset));
  const Tensor grad_mask = empty_like(offset, mask ? size_of(*mask) : std::vector<int64_t>{0});
  const Tensor grad_input = zeros_like(offset, size_of(input), NHWC);
  Tensor grad_weight = zeros_like(input, size_of(weight), NHWC);
  by_any_dtype(input.scalar_type(), [&](auto number) {
    const auto conv = conv_of<decltype(number)>(input, offset, weight, mask, stride, padding,
                                                dilation, original);
    if (conv.pixels)
      grad_weight = backward(stream, conv, grads, maps, matrix, size_of(weight), grad_input,
                             grad_offset, grad_mask);
  });
  return {converted(grad_input, input.scalar_type()), grad_offset,
          converted(grad_weight, input.scalar_type()), grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, DCDET_DEVICE, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace dcdet
