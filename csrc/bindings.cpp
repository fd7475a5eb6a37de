// Every operator's schema.
//
// The public operators, their checks, fake kernels and gradients are Python (dcdet/ops): they call
// these with arguments that have passed.
#include <torch/csrc/stable/library.h>

#include "version.h"

namespace {
int64_t version() { return VERSION; }
}  // namespace

STABLE_TORCH_LIBRARY(dcdet_C, m) {
  m.def("version() -> int");
  m.def("vector_bytes() -> int");
  m.def("has_bfloat16() -> bool");
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
      "int[] stride, int[] padding, int[] dilation, bool original) -> Tensor");
  m.def(
      "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, "
      "Tensor? mask, int[] stride, int[] padding, int[] dilation, bool original) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("psroi_pool(Tensor input, Tensor images, Tensor edges, int group_size) -> Tensor");
  m.def(
      "psroi_pool_backward(Tensor grad, Tensor images, Tensor edges, int[] size, int group_size, "
      "bool channels_last) -> Tensor");
  m.def(
      "deform_psroi_pool(Tensor input, Tensor images, Tensor first, Tensor step, int group_size, "
      "int samples) -> Tensor");
  m.def(
      "deform_psroi_pool_backward(Tensor grad, Tensor input, Tensor images, Tensor first, "
      "Tensor step, int group_size, int samples, bool moved) -> (Tensor, Tensor)");
  m.def(
      "deform_roi_pool(Tensor input, Tensor images, Tensor start, Tensor bin, Tensor count, "
      "Tensor first, Tensor last, Tensor divisor) -> Tensor");
  m.def(
      "deform_roi_pool_backward(Tensor grad, Tensor input, Tensor images, Tensor start, "
      "Tensor bin, Tensor count, Tensor first, Tensor last, Tensor divisor, bool moved) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dcdet_C, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&version));
}
