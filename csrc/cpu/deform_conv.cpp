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

// Bytes of columns that are held at once.
constexpr int64_t COLUMN_BYTES = 1 << 23;

// Bytes of samples and partial sums that are held at once: little beside the input.
int64_t band_bytes(const ConvShape& s, int64_t share, int64_t most) {
  const int64_t input = s.batch * s.channels * s.height * s.width * sizeof(float);
  return std::min(std::max<int64_t>(input / share, 1 << 17), most);
}

template <typename T>
std::vector<Slice> slices_of(const ConvShape& s) {
  std::vector<Slice> slices;
  const auto next = best<T>().next_slice;
  for (Slice slice = next(s, {0, 0}); slice.count; slice = next(s, slice)) slices.push_back(slice);
  return slices;
}

// Tiles of a band of pixels.
struct Band {
  int64_t first, count, tile;

  int64_t tiles() const { return ceil_divide(count, tile); }
  int64_t rows(int64_t i) const { return std::min(tile, count - i * tile); }
};

// Each slice by one thread.
template <typename Work>
void by_slices(const Work& work, const BackwardSizes& sizes, const Band& band) {
  torch::stable::parallel_for(0, work.slices.size(), 1, [&](int64_t begin, int64_t end) {
    const typename Work::Thread thread;
    Buffer<char> weights(sizes.weights), grad_weights(sizes.grad_weights);
    Buffer<char> columns(sizes.columns), scratch(sizes.scratch);
    for (int64_t slice = begin; slice < end; ++slice) {
      work.pack(slice, weights.get());
      for (int64_t i = 0; i < band.tiles(); ++i) {
        work.find_columns(true, slice, band, i, weights.get(), scratch.get(), columns.get());
        work.add_grad_weights(slice, band, i, 0, work.taps(), columns.get(), scratch.get(),
                              grad_weights.get());
      }
      work.add_slice(slice, grad_weights.get());
    }
  });
}

// Each slice by several threads: its tiles side by side, then its sums in their order.
template <typename Work>
void by_tiles(const Work& work, const BackwardSizes& sizes, const Band& band) {
  const int64_t slices = work.slices.size(), taps = work.taps(), sums = taps + 2;
  const int64_t most = std::max<int64_t>(1, COLUMN_BYTES / (slices * sizes.columns));
  const int64_t together = std::min(most, band.tiles());
  Buffer<char> weights(slices * sizes.weights), grad_weights(slices * sizes.grad_weights);
  Buffer<char> columns(slices * together * sizes.columns);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice)
      work.pack(slice, weights.get() + slice * sizes.weights);
  });
  for (int64_t first = 0; first < band.tiles(); first += together) {
    const int64_t tiles = std::min(together, band.tiles() - first);
    const auto columns_of = [&](int64_t slice, int64_t i) {
      return columns.get() + (slice * together + i) * sizes.columns;
    };
    torch::stable::parallel_for(0, slices * tiles, 1, [&](int64_t begin, int64_t end) {
      const typename Work::Thread thread;
      Buffer<char> scratch(sizes.scratch);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = task / tiles, i = task % tiles;
        work.find_columns(false, slice, band, first + i, weights.get() + slice * sizes.weights,
                          scratch.get(), columns_of(slice, i));
      }
    });
    torch::stable::parallel_for(0, slices * sums, 1, [&](int64_t begin, int64_t end) {
      const typename Work::Thread thread;
      Buffer<char> scratch(sizes.scratch);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slice = task / sums, tap = task % sums - 2;
        for (int64_t i = 0; i < tiles; ++i)
          if (tap < 0)
            work.scatter_columns(slice, tap + 2, band, first + i, columns_of(slice, i));
          else
            work.add_grad_weights(slice, band, first + i, tap, tap + 1, columns_of(slice, i),
                                  scratch.get(), grad_weights.get() + slice * sizes.grad_weights);
      }
    });
  }
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice)
      work.add_slice(slice, grad_weights.get() + slice * sizes.grad_weights);
  });
}

// All gradients, a band of pixels after another: first the samples, then `work` on the slices, then
// the sums of their parts of the gradients of offset and mask.
template <typename T, typename Work>
void run_bands(Work& work, int64_t bytes, int64_t tile, int64_t multiple, const T* offset,
               T* grad_offset, T* grad_mask) {
  const ConvShape& s = work.call.shape;
  const ConvKernels<T>& kernels = best<T>();
  const int64_t pixels = s.pixels(), taps = s.taps(), slices = work.slices.size();
  if (!pixels) return;
  const int64_t per_pixel = taps * (s.offset_groups * sizeof(Sample<T>) + slices * 3 * sizeof(T));
  int64_t count = std::max<int64_t>(bytes / per_pixel, 128);
  count = ceil_divide(ceil_divide(pixels, ceil_divide(pixels, count)), multiple) * multiple;
  tile = std::min(tile, ceil_divide(count, multiple) * multiple);
  Buffer<Sample<T>> samples(count * taps * s.offset_groups);
  Buffer<T> partial(slices * count * taps * 3);
  work.samples = samples.get();
  work.partial = partial.get();
  const BackwardSizes sizes = work.sizes(tile);
  for (int64_t first = 0; first < pixels; first += count) {
    const Band band = {first, std::min(count, pixels - first), tile};
    torch::stable::parallel_for(0, band.count, 64, [&](int64_t begin, int64_t end) {
      kernels.find_samples(s, offset, first + begin, end - begin,
                           samples.get() + begin * taps * s.offset_groups);
    });
    torch::stable::get_num_threads() > slices ? by_tiles(work, sizes, band)
                                              : by_slices(work, sizes, band);
    torch::stable::parallel_for(0, band.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel)
        kernels.sum_parts(s, first, band.count, pixel, partial.get(), grad_offset, grad_mask);
    });
  }
}

template <typename T>
struct Work {
  struct Thread {
    Thread() {}
  };
  const ConvBackward<T>& call;
  const std::vector<Slice> slices = slices_of<T>(call.shape);
  const ConvKernels<T>& kernels = best<T>();
  const Sample<T>* samples = nullptr;
  T* partial = nullptr;

  int64_t taps() const { return call.shape.taps(); }
  BackwardSizes sizes(int64_t tile) const { return kernels.backward_sizes(call.shape, tile); }
  const Sample<T>* samples_of(const Band& band, int64_t i) const {
    return samples + i * band.tile * taps() * call.shape.offset_groups;
  }
  static T* numbers(char* memory) { return reinterpret_cast<T*>(memory); }

  void pack(int64_t slice, char* weights) const {
    kernels.pack_slice(call, slices[slice], numbers(weights));
  }
  void find_columns(bool scatter, int64_t slice, const Band& band, int64_t i, char* weights,
                    char* scratch, char* columns) const {
    (scatter ? kernels.find_and_scatter_columns : kernels.find_columns)(
        call, slices[slice], band.first + i * band.tile, band.rows(i), band.tile,
        samples_of(band, i), numbers(weights), numbers(scratch), numbers(columns),
        partial + (slice * band.count + i * band.tile) * taps() * 3);
  }
  void scatter_columns(int64_t slice, int64_t half, const Band& band, int64_t i,
                       char* columns) const {
    kernels.scatter_columns(call, slices[slice], half, band.first + i * band.tile, band.rows(i),
                            band.tile, samples_of(band, i), numbers(columns));
  }
  void add_grad_weights(int64_t slice, const Band& band, int64_t i, int64_t begin, int64_t end,
                        char* columns, char* scratch, char* grad_weights) const {
    kernels.add_grad_weights(call, slices[slice], band.first + i * band.tile, band.rows(i),
                             band.tile, begin, end, i > 0, numbers(columns), numbers(scratch),
                             numbers(grad_weights));
  }
  void add_slice(int64_t slice, char* grad_weights) const {
    kernels.add_slice(call, slices[slice], numbers(grad_weights));
  }
};

template <typename T>
void run_backward(const ConvBackward<T>& call) {
  Work<T> work{call};
  run_bands<T>(work, band_bytes(call.shape, 8, 1 << 21), 112, work.kernels.rows, call.offset,
               call.grad_offset, call.grad_mask);
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

struct AmxWork {
  using Thread = amx::Tiles;
  ConvBackward<BFloat16, float> call;
  const std::vector<Slice> slices = slices_of<float>(call.shape);
  const BFloat16* turned = nullptr;
  const Sample<float>* samples = nullptr;
  float* partial = nullptr;

  int64_t taps() const { return call.shape.taps(); }
  BackwardSizes sizes(int64_t tile) const { return amx::backward_sizes(call.shape, tile); }
  const Sample<float>* samples_of(const Band& band, int64_t i) const {
    return samples + i * band.tile * taps() * call.shape.offset_groups;
  }
  static BFloat16* numbers(char* memory) { return reinterpret_cast<BFloat16*>(memory); }
  static float* sums(char* memory) { return reinterpret_cast<float*>(memory); }

  void pack(int64_t slice, char* weights) const {
    amx::pack_slice(call, slices[slice], numbers(weights));
  }
  void find_columns(bool scatter, int64_t slice, const Band& band, int64_t i, char* weights,
                    char* scratch, char* columns) const {
    (scatter ? amx::find_columns<true> : amx::find_columns<false>)(
        call, slices[slice], slice, slices.size(), band.first + i * band.tile, band.rows(i),
        band.tile, samples_of(band, i), numbers(weights), numbers(scratch), sums(columns),
        partial + (slice * band.count + i * band.tile) * taps() * 3);
  }
  void scatter_columns(int64_t slice, int64_t half, const Band& band, int64_t i,
                       char* columns) const {
    amx::scatter_columns(call, slices[slice], slice, slices.size(), half,
                         band.first + i * band.tile, band.rows(i), band.tile, samples_of(band, i),
                         sums(columns));
  }
  void add_grad_weights(int64_t slice, const Band& band, int64_t i, int64_t begin, int64_t end,
                        char* columns, char*, char* grad_weights) const {
    amx::add_grad_weights(call.shape, turned, slices[slice], band.first + i * band.tile,
                          band.rows(i), band.tile, begin, end, i > 0, sums(columns),
                          sums(grad_weights));
  }
  void add_slice(int64_t slice, char* grad_weights) const {
    amx::add_slice(call, slices[slice], sums(grad_weights));
  }
};

// grad_weight holds zeros on entry; the gradient of the input goes to `grad_input`.
void run_backward(const ConvBackward<BFloat16, float>& call, BFloat16* grad_input) {
  AmxWork work{call};
  const ConvShape& s = call.shape;
  const int64_t inputs = s.batch * s.height * s.width, row = work.slices.size() * amx::SIDE;
  Buffer<float> sums(inputs * row);
  std::memset(sums.get(), 0, inputs * row * sizeof(float));
  work.call.grad_input = sums.get();
  const int64_t blocks = ceil_divide(s.pixels(), amx::SIDE);
  const int64_t outputs = ceil_divide(s.out_channels / s.groups, amx::SIDE) * amx::SIDE;
  Buffer<BFloat16> turned(blocks * amx::SIDE * outputs * s.groups);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      amx::turn_grad(s, call.grad, block, turned.get());
  });
  work.turned = turned.get();
  run_bands<float>(work, band_bytes(s, 2, 1 << 23), 256, amx::SIDE, call.offset, call.grad_offset,
                   call.grad_mask);
  torch::stable::parallel_for(0, inputs, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      amx::join_slices(sums.get() + i * row, work.slices, grad_input + i * s.channels);
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
  const Tensor maps = laid_out(input, NHWC), matrix = laid_out(weight, NHWC);
  const Tensor shifts = laid_out(offset);
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
  const Tensor grads = laid_out(grad, NHWC), maps = laid_out(input, NHWC);
  const Tensor matrix = laid_out(weight, NHWC), shifts = laid_out(offset);
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
