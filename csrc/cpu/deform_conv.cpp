// Deformable convolution on a CPU: tensors in, kernels of the best instruction set, tensors out.
#include "deform_conv.h"
#include "buffer.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#define KERNELS ConvKernels
#define KERNEL "deform_conv_kernel.h"
#include "instruction_sets.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define DCDET_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#pragma GCC target("prefer-vector-width=512")
namespace dcdet::amx {
#include "deform_conv_amx.h"
}  // namespace dcdet::amx
#pragma GCC pop_options
#endif

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

// Bytes of samples and partial sums that are held at once.
constexpr int64_t BAND_BYTES = 1 << 21;

template <typename T>
std::vector<Slice> slices_of(const ConvShape& s) {
  std::vector<Slice> slices;
  const auto next = best<T>().next_slice;
  for (Slice slice = next(s, {0, 0}); slice.count; slice = next(s, slice)) slices.push_back(slice);
  return slices;
}

// Call work(slice's number, first pixel, pixels, samples, partial sums) for all slices of a band of
// pixels, band after band; then add the partial sums up to the gradients of offset and mask.
template <typename T, typename F>
void for_each_band(const ConvShape& s, int64_t slices, int64_t bytes, int64_t multiple,
                   const T* offset, T* grad_offset, T* grad_mask, const F& work) {
  const ConvKernels<T>& kernels = best<T>();
  const int64_t pixels = s.pixels(), taps = s.taps();
  const int64_t per_pixel = taps * (s.offset_groups * sizeof(Sample<T>) + slices * 3 * sizeof(T));
  int64_t band = std::max<int64_t>(bytes / per_pixel, 128);
  band = ceil_divide(ceil_divide(pixels, ceil_divide(pixels, band)), multiple) * multiple;
  Buffer<Sample<T>> samples(band * taps * s.offset_groups);
  Buffer<T> partial(slices * band * taps * 3);
  for (int64_t first = 0; first < pixels; first += band) {
    const int64_t count = std::min(band, pixels - first);
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      kernels.find_samples(s, offset, first + begin, end - begin,
                           samples.get() + begin * taps * s.offset_groups);
    });
    torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      work(begin, end, first, count, samples.get(), partial.get());
    });
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel)
        kernels.sum_parts(s, first, count, pixel, partial.get(), grad_offset, grad_mask);
    });
  }
}

template <typename T>
void run_backward(const ConvBackward<T>& call) {
  const ConvShape& s = call.shape;
  const ConvKernels<T>& kernels = best<T>();
  const std::vector<Slice> slices = slices_of<T>(s);
  const int64_t tile = std::min<int64_t>(s.pixels(), 112), parts = s.taps() * 3;
  if (!s.pixels()) return;
  for_each_band<T>(
      s, slices.size(), BAND_BYTES, 1, call.offset, call.grad_offset, call.grad_mask,
      [&](int64_t begin, int64_t end, int64_t first, int64_t count, const Sample<T>* samples,
          T* partial) {
        Buffer<T> scratch(kernels.backward_scratch(s, tile));
        for (int64_t i = begin; i < end; ++i)
          kernels.backward_slice(call, slices[i], first, count, tile, samples,
                                 partial + i * count * parts, scratch.get());
      });
}

// Whether bfloat16 has kernels of its own here.
bool has_bfloat16() {
#ifdef DCDET_AMX
  static const bool ready = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (vector_bytes() < 64 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool amx = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    if (!amx || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
    // Linux gives a process its tile registers when it asks: ARCH_REQ_XCOMP_PERM, tile data.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return ready;
#else
  return false;
#endif
}

#ifdef DCDET_AMX
using amx::BFloat16;

void run_forward(const ConvForward<BFloat16, float>& call) {
  const ConvShape& s = call.shape;
  const int64_t panels = amx::packed_panels(s), pixels = s.pixels();
  if (!pixels) return;
  Buffer<BFloat16> packed(panels * amx::panel_size(s));
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      amx::pack_forward(s, call.weight, panel, packed.get());
  });
  const int64_t tile = tile_size(pixels, 128, amx::SIDE);
  torch::stable::parallel_for(0, ceil_divide(pixels, tile), 1, [&](int64_t begin, int64_t end) {
    const amx::Tiles tiles;
    Buffer<Sample<float>> samples(tile * s.taps() * s.offset_groups);
    Buffer<char> scratch(amx::forward_scratch(s, tile));
    for (int64_t i = begin; i < end; ++i)
      amx::forward_tile(call, packed.get(), i * tile, std::min(tile, pixels - i * tile), tile,
                        samples.get(), scratch.get());
  });
}

// grad_weight holds zeros on entry; the gradient of the input goes to `grad_input`.
void run_backward(ConvBackward<BFloat16, float> call, BFloat16* grad_input) {
  const ConvShape& s = call.shape;
  const std::vector<Slice> slices = slices_of<float>(s);
  const int64_t pixels = s.pixels(), parts = s.taps() * 3;
  const int64_t inputs = s.batch * s.height * s.width, row = slices.size() * amx::SIDE;
  Buffer<float> sums(inputs * row);
  std::memset(sums.get(), 0, inputs * row * sizeof(float));
  call.grad_input = sums.get();
  const int64_t blocks = ceil_divide(pixels, amx::SIDE);
  const int64_t outputs = ceil_divide(s.out_channels / s.groups, amx::SIDE) * amx::SIDE;
  Buffer<BFloat16> turned(blocks * amx::SIDE * outputs * s.groups);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      amx::turn_grad(s, call.grad, block, turned.get());
  });
  constexpr int64_t tile = 256;
  if (pixels)
    for_each_band<float>(
        s, slices.size(), 4 * BAND_BYTES, amx::SIDE, call.offset, call.grad_offset, call.grad_mask,
        [&](int64_t begin, int64_t end, int64_t first, int64_t count, const Sample<float>* samples,
            float* partial) {
          const amx::Tiles tiles;
          Buffer<char> scratch(amx::backward_scratch(s, tile));
          for (int64_t i = begin; i < end; ++i)
            amx::backward_slice(call, turned.get(), slices[i], i, slices.size(), first, count, tile,
                                samples, partial + i * count * parts, scratch.get());
        });
  torch::stable::parallel_for(0, inputs, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      amx::join_slices(sums.get() + i * row, slices, grad_input + i * s.channels);
  });
}
#endif

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
#ifdef DCDET_AMX
  if (input.scalar_type() == ScalarType::BFloat16 && has_bfloat16()) {
    run_forward({s, data<BFloat16>(maps), data<float>(shifts), data<float>(factors),
                 data<BFloat16>(matrix), data<BFloat16>(constants), place<BFloat16>(output)});
    return output;
  }
#endif
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
  const Tensor grad_offset = empty_like(offset, size_of(offset));
  const Tensor grad_mask = empty_like(offset, mask ? size_of(*mask) : std::vector<int64_t>{0});
#ifdef DCDET_AMX
  if (input.scalar_type() == ScalarType::BFloat16 && has_bfloat16()) {
    const Tensor grad_input = empty_like(input, size_of(input), NHWC);
    const Tensor grad_weight = empty_like(input, size_of(weight), NHWC);
    const int64_t numbers = s.out_channels * s.taps() * (s.channels / s.groups);
    Buffer<float> sums(numbers);
    std::memset(sums.get(), 0, numbers * sizeof(float));
    run_backward({s, data<BFloat16>(grads), data<BFloat16>(maps), data<float>(shifts),
                  data<float>(factors), data<BFloat16>(matrix), nullptr, place<float>(grad_offset),
                  mask ? place<float>(grad_mask) : nullptr, sums.get()},
                 place<BFloat16>(grad_input));
    amx::to_bfloat16(sums.get(), numbers, place<BFloat16>(grad_weight));
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }
#endif
  const Tensor grad_input = zeros_like(input, size_of(input), NHWC);
  const Tensor grad_weight = zeros_like(input, size_of(weight), NHWC);
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
  m.impl("has_bfloat16", TORCH_BOX(&has_bfloat16));
}

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace dcdet
