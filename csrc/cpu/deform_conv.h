// What the deformable convolution's kernels are given. All maps are channels-last.
#pragma once

#include <cstdint>

#include "../sampling.h"

namespace dcdet {

struct ConvShape {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;
  bool release_border;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return batch * out_height * out_width; }
};

// input (B, H, W, C), weight (O, kh, kw, C / groups), output (B, H', W', O); offset and mask are
// contiguous (B, 2 * G * K, H', W') and (B, G * K, H', W'); bias (O,) and mask may be null.
// Numbers are S, positions and masks T.
template <typename S, typename T = S>
struct ConvForward {
  ConvShape shape;
  const S* input;
  const T *offset, *mask;
  const S *weight, *bias;
  S* output;
};

// Gradients have the layouts of their tensors. grad_input and grad_weight hold zeros on entry.
template <typename S, typename T = S>
struct ConvBackward {
  ConvShape shape;
  const S *grad, *input;
  const T *offset, *mask;
  const S* weight;
  T *grad_input, *grad_offset, *grad_mask, *grad_weight;
};

// Input channels that share their conv group and offset group, as many as two vectors hold.
struct Slice {
  int64_t first, count;
};

// Bytes that the backward pass needs: of a slice's weights and of its part of their gradient, of a
// tile's columns and their gradients, of what else a tile needs.
struct BackwardSizes {
  int64_t weights, grad_weights, columns, scratch;
};

// One instruction set's kernels; see deform_conv_kernel.h.
template <typename T>
struct ConvKernels {
  using Columns = void (*)(const ConvBackward<T>&, Slice, int64_t, int64_t, int64_t,
                           const Sample<T>*, const T*, T*, T*, T*);
  int64_t rows;
  int64_t (*packed_panels)(const ConvShape&);
  void (*pack_forward)(const ConvShape&, const T*, int64_t, T*);
  int64_t (*forward_scratch)(const ConvShape&, int64_t);
  void (*forward_tile)(const ConvForward<T>&, const T*, int64_t, int64_t, int64_t, Sample<T>*, T*);
  Slice (*next_slice)(const ConvShape&, Slice);
  void (*find_samples)(const ConvShape&, const T*, int64_t, int64_t, Sample<T>*);
  BackwardSizes (*backward_sizes)(const ConvShape&, int64_t);
  void (*pack_slice)(const ConvBackward<T>&, Slice, T*);
  Columns find_and_scatter_columns, find_columns;
  void (*scatter_columns)(const ConvBackward<T>&, Slice, int64_t, int64_t, int64_t, int64_t,
                          const Sample<T>*, const T*);
  void (*add_grad_weights)(const ConvBackward<T>&, Slice, int64_t, int64_t, int64_t, int64_t,
                           int64_t, bool, const T*, T*, T*);
  void (*add_slice)(const ConvBackward<T>&, Slice, const T*);
  void (*sum_parts)(const ConvShape&, int64_t, int64_t, int64_t, const T*, T*, T*);
};

}  // namespace dcdet
