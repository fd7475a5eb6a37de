// Deformable convolution on a CPU: tensors in, kernels of the best instruction set, tensors out.
#include "deform_conv.h"
#include "buffer.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#define KERNELS ConvKernels
#define KERNEL "deform_conv_kernel.h"
#include "instruction_sets.h"

namespace dcdet {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of about `wanted` pixels, as many as keep all threads busy, in whole blocks of rows.
int64_t tile_size(int64_t pixels, int64_t wanted, int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = ceil_divide(ceil_divide(pixels, wanted), threads) * threads;
  return ceil_divide(ceil_divide(pixels, tiles), rows) * rows;
}

template <typename T>
void run_forward(const ConvForward<T>& call) {
  const ConvShape& s = call.shape;
  const ConvKernels<T>& kernels = best<T>();
  const int64_t panels = kernels.packed_panels(s), pixels = s.pixels();
  if (!pixels) return;
  const int64_t group_depth = s.taps() * s.channels / s.groups;
  // A panel holds group_depth times two vectors of the widest kind.
  Buffer<T> packed(panels * group_depth * (128 / sizeof(T)));
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      kernels.pack_forward(s, call.weight, panel, packed.get());
  });
  const int64_t tile = tile_size(pixels, 112, kernels.rows);
  torch::stable::parallel_for(0, ceil_divide(pixels, tile), 1, [&](int64_t begin, int64_t end) {
    Buffer<Sample<T>> samples(tile * s.taps() * s.offset_groups);
    Buffer<T> scratch(kernels.forward_scratch(s, tile));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * tile, count = std::min(tile, pixels - first);
      kernels.forward_tile(call, packed.get(), first, count, tile, samples.get(), scratch.get());
    }
  });
}

constexpr int64_t BAND_BYTES = 1 << 21;  // of samples and partial sums held at once

template <typename T>
void run_backward(const ConvBackward<T>& call) {
  const ConvShape& s = call.shape;
  const ConvKernels<T>& kernels = best<T>();
  std::vector<Slice> slices;
  for (Slice slice = kernels.next_slice(s, {0, 0}); slice.count; slice = kernels.next_slice(s, slice))
    slices.push_back(slice);
  const int64_t pixels = s.pixels(), count_slices = slices.size();
  if (!pixels) return;
  const int64_t per_pixel =
      s.taps() * (s.offset_groups * sizeof(Sample<T>) + count_slices * 3 * sizeof(T));
  int64_t band = std::max<int64_t>(BAND_BYTES / per_pixel, 112);
  band = std::min(pixels, ceil_divide(pixels, ceil_divide(pixels, band)));
  const int64_t tile = std::min<int64_t>(band, 112);
  Buffer<Sample<T>> samples(band * s.taps() * s.offset_groups);
  Buffer<T> partial(count_slices * band * s.taps() * 3);
  for (int64_t first = 0; first < pixels; first += band) {
    const int64_t count = std::min(band, pixels - first);
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      kernels.find_samples(s, call.offset, first + begin, end - begin,
                           samples.get() + begin * s.taps() * s.offset_groups);
    });
    torch::stable::parallel_for(0, count_slices, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> scratch(kernels.backward_scratch(s, tile));
      for (int64_t i = begin; i < end; ++i)
        kernels.backward_slice(call, slices[i], first, count, tile, samples.get(),
                               partial.get() + i * count * s.taps() * 3, scratch.get());
    });
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel)
        kernels.sum_parts(call, first, count, pixel, partial.get());
    });
  }
}

ConvShape shape_of(const Tensor& input, const Tensor& offset, const Tensor& weight,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, bool original) {
  ConvShape s;
  s.batch = input.size(0);
  s.channels = input.size(1);
  s.height = input.size(2);
  s.width = input.size(3);
  s.out_channels = weight.size(0);
  s.kernel_h = weight.size(2);
  s.kernel_w = weight.size(3);
  s.out_height = offset.size(2);
  s.out_width = offset.size(3);
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.pad_h = padding[0];
  s.pad_w = padding[1];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  s.groups = s.channels / weight.size(1);
  s.offset_groups = offset.size(1) / (2 * s.taps());
  s.release_border = original;
  return s;
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, bool original) {
  const ConvShape s = shape_of(input, offset, weight, stride, padding, dilation, original);
  const Tensor maps = contiguous(input, NHWC), matrix = contiguous(weight, NHWC);
  const Tensor shifts = contiguous(offset);
  const std::vector<Tensor> factors = present(mask), constants = present(bias);
  const Tensor output =
      empty_like(input, {s.batch, s.out_channels, s.out_height, s.out_width}, NHWC);
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    run_forward<T>({s, data<T>(maps), data<T>(shifts), data<T>(factors), data<T>(matrix),
                    data<T>(constants), place<T>(output)});
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::optional<Tensor>& mask, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, bool original) {
  const ConvShape s = shape_of(input, offset, weight, stride, padding, dilation, original);
  const Tensor grads = contiguous(grad, NHWC), maps = contiguous(input, NHWC);
  const Tensor matrix = contiguous(weight, NHWC), shifts = contiguous(offset);
  const std::vector<Tensor> factors = present(mask);
  const Tensor grad_input = zeros_like(input, size_of(input), NHWC);
  const Tensor grad_weight = zeros_like(input, size_of(weight), NHWC);
  const Tensor grad_offset = empty_like(input, size_of(offset));
  const Tensor grad_mask = empty_like(input, mask ? size_of(*mask) : std::vector<int64_t>{0});
  by_dtype(input, [&](auto number) {
    using T = decltype(number);
    run_backward<T>({s, data<T>(grads), data<T>(maps), data<T>(shifts), data<T>(factors),
                     data<T>(matrix), place<T>(grad_input), place<T>(grad_offset),
                     mask ? place<T>(grad_mask) : nullptr, place<T>(grad_weight)});
  });
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&vector_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace dcdet
