// Position-sensitive RoI pooling on a CPU, plain and deformable.
//
// A task owns some channels of one image for all RoIs: nothing is added by two threads, and the
// sums do not depend on their number. Where the bins lie was found in Python.
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
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dcdet {
namespace {

// The RoIs of each image; for a backward pass those that have a gradient: hard-example mining
// leaves most without.
template <typename T>
std::vector<std::vector<int64_t>> rois_of_images(const PoolShape& s, const int64_t* images,
                                                 const T* grad) {
  std::vector<std::vector<int64_t>> rois(s.images);
  const int64_t each = s.depth() * s.places();
  for (int64_t roi = 0; roi < s.rois; ++roi) {
    const T* own = grad ? grad + roi * each : nullptr;
    if (!own || std::any_of(own, own + each, [](T number) { return number != 0; }))
      rois[images[roi]].push_back(roi);
  }
  return rois;
}

// sums (count) = parts (slots, count), added in their order.
template <typename T>
void add_up(const T* parts, int64_t slots, int64_t count, T* sums) {
  torch::stable::parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    std::fill_n(sums + begin, end - begin, T(0));
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t i = begin; i < end; ++i) sums[i] += parts[slot * count + i];
  });
}

}  // namespace
}  // namespace dcdet

#include "psroi_pool_planes.h"
#include "psroi_pool_rows.h"

namespace dcdet {
namespace {

// Of a map that is only read.
template <typename T>
T* numbers(const Tensor& maps) {
  return const_cast<T*>(data<T>(maps));
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
    by_rows::forward<T>(s, by_rows::plain_bins<T>(s, data<int64_t>(bounds)), numbers<T>(maps),
                        by_pixel, data<int64_t>(index), place<T>(output));
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
    by_rows::backward<T>(s, by_rows::plain_bins<T>(s, data<int64_t>(bounds)), data<T>(grads),
                         nullptr, channels_last, data<int64_t>(index), place<T>(grad_input),
                         nullptr);
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
    const T *starts = data<T>(places), *distances = data<T>(steps);
    const int64_t* own = data<int64_t>(index);
    if (s.classes == 1)
      by_rows::forward<T>(s, by_rows::deformed_bins(s, starts, distances, samples),
                          numbers<T>(maps), by_pixel, own, place<T>(output));
    else
      by_planes::forward<T>(s, {s, starts, distances, samples}, numbers<T>(maps), by_pixel, own,
                            place<T>(output));
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
    const T *starts = data<T>(places), *distances = data<T>(steps), *pooled = data<T>(grads);
    const int64_t* own = data<int64_t>(index);
    T *map = place<T>(grad_input), *positions = moved ? place<T>(grad_first) : nullptr;
    if (s.classes == 1)
      by_rows::backward<T>(s, by_rows::deformed_bins(s, starts, distances, samples), pooled,
                           numbers<T>(maps), by_pixel, own, map, positions);
    else
      by_planes::backward<T>(s, {s, starts, distances, samples}, pooled, numbers<T>(maps),
                             by_pixel, own, map, positions);
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
