// The deformable convolution for one instruction set; see instruction_sets.h.
//
// Forward: a tile of output pixels at a time. The samples of a tile are gathered, some taps and
// channels after another, into columns that stay in the cache, and multiplied at once. Backward: a
// slice, one vector pair of input channels, is worked on in tiles of pixels, one after another. No
// two threads add to one number, and the sums do not depend on their number: a task has a slice to
// itself, or, where there are more threads than slices, the columns of many tiles and slices are
// found side by side, and are then summed by tasks of half a slice, or of one tap.

#include "turn.h"

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int64_t count = VECTOR_BYTES / sizeof(T);
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
DCDET_INLINE Vector<T>& at(T* place) {
  return *reinterpret_cast<Vector<T>*>(place);
}

template <typename T>
DCDET_INLINE const Vector<T>& at(const T* place) {
  return *reinterpret_cast<const Vector<T>*>(place);
}

// The sum of a vector's numbers.
template <typename T>
DCDET_INLINE T total(Vector<T> vector) {
  constexpr int64_t quarter = 16 / sizeof(T);
  typedef T Quarter __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  T parts[Lanes<T>::count];
  at(parts) = vector;
  Quarter sum = *reinterpret_cast<Quarter*>(parts);
  for (int64_t i = quarter; i < Lanes<T>::count; i += quarter)
    sum += *reinterpret_cast<Quarter*>(parts + i);
  T result = sum[0];
  for (int64_t i = 1; i < quarter; ++i) result += sum[i];
  return result;
}

constexpr int64_t ROWS = BLOCK_ROWS;

// Numbers that are summed before a block of the product goes back to memory, about.
constexpr int64_t DEPTH = 256;

template <typename T>
constexpr int64_t WIDE = 2 * Lanes<T>::count;  // columns of a block

// c (ROWS, WIDE) = or += a (ROWS, depth) b (depth, WIDE); steps are distances in memory.
template <typename T>
DCDET_INLINE void multiply_block(const T* a, int64_t a_row, int64_t a_step, const T* b,
                                 int64_t b_step, int64_t depth, T* c, int64_t c_row, bool add) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vector<T> sums[ROWS][2];
#pragma GCC unroll 16
  for (int64_t i = 0; i < ROWS; ++i) {
    sums[i][0] = add ? at(c + i * c_row) : Vector<T>{};
    sums[i][1] = add ? at(c + i * c_row + lanes) : Vector<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> left = at(b), right = at(b + lanes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < ROWS; ++i) {
      T factor = a[i * a_row];
      sums[i][0] += factor * left;
      sums[i][1] += factor * right;
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < ROWS; ++i) {
    at(c + i * c_row) = sums[i][0];
    at(c + i * c_row + lanes) = sums[i][1];
  }
}

DCDET_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

DCDET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One axis of some samples, as arrays: loops over them become vectors.
constexpr int64_t SAMPLES = 128;

template <typename T>
struct Axes {
  int32_t low[SAMPLES], inside[SAMPLES], held[SAMPLES];
  T fraction[SAMPLES];

  // Positions are start + begin[i] + shift[i].
  template <typename F>
  DCDET_INLINE void find(const F& rule, int32_t start, const int32_t* begin, const T* shift,
                         int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const Axis<T> axis = rule(T(start + begin[i]) + shift[i]);
      low[i] = axis.low;
      inside[i] = axis.inside;
      held[i] = axis.held;
      fraction[i] = axis.fraction;
    }
  }

  DCDET_INLINE Axis<T> at(int64_t i) const {
    return {low[i], fraction[i], inside[i], held[i]};
  }
};

// The samples of output pixels first, ..., first + count - 1: (pixel, tap, offset group).
template <typename T>
void find_samples(const ConvShape& s, const T* offset, int64_t first, int64_t count,
                  Sample<T>* samples) {
  const int64_t plane = s.out_height * s.out_width, taps = s.taps(), groups = s.offset_groups;
  const int height = s.height, width = s.width;
  const auto zeros_y = [&](T position) { return axis_with_zeros(position, height); };
  const auto zeros_x = [&](T position) { return axis_with_zeros(position, width); };
  const auto release_y = [&](T position) { return axis_of_release(position, height); };
  const auto release_x = [&](T position) { return axis_of_release(position, width); };
  int32_t tops[SAMPLES], lefts[SAMPLES];
  Axes<T> y, x;
  while (count > 0) {  // some pixels of one image
    const int64_t image = first / plane, place = first % plane;
    const int64_t n = least(SAMPLES, least(count, plane - place));
    for (int64_t i = 0; i < n; ++i) {
      tops[i] = (place + i) / s.out_width * s.stride_h - s.pad_h;
      lefts[i] = (place + i) % s.out_width * s.stride_w - s.pad_w;
    }
    const T* shifts = offset + image * 2 * groups * taps * plane + place;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t down = tap / s.kernel_w * s.dilation_h, right = tap % s.kernel_w * s.dilation_w;
      for (int64_t group = 0; group < groups; ++group) {
        const T* shift = shifts + 2 * (group * taps + tap) * plane;
        if (s.release_border) {
          y.find(release_y, down, tops, shift, n);
          x.find(release_x, right, lefts, shift + plane, n);
        } else {
          y.find(zeros_y, down, tops, shift, n);
          x.find(zeros_x, right, lefts, shift + plane, n);
        }
        for (int64_t i = 0; i < n; ++i)
          samples[(i * taps + tap) * groups + group] =
              sample_at(y.at(i), x.at(i), height, width, image * s.height * s.width);
      }
    }
    samples += n * taps * groups;
    first += n;
    count -= n;
  }
}

// The mask of an output pixel: that of (offset group, tap) stands a plane of output pixels later
// than that of the tap before.
template <typename T>
DCDET_INLINE const T* mask_of(const ConvShape& s, const T* mask, int64_t pixel) {
  const int64_t plane = s.out_height * s.out_width;
  if (!mask) return nullptr;
  return mask + pixel / plane * s.offset_groups * s.taps() * plane + pixel % plane;
}

// target[c] = the sample of channels first, ..., first + count - 1, times `mask`.
template <typename T>
DCDET_INLINE void gather(const ConvShape& s, const T* input, const T* zeros,
                         const Sample<T>& sample, T mask, int64_t first, int64_t count,
                         T* target) {
  const T* rows[4];
  T weights[4];
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t pixel = sample.pixel(corner, s.width);
    rows[corner] = pixel < 0 ? zeros : input + pixel * s.channels + first;
    weights[corner] = sample.weight(corner) * mask;
  }
  int64_t c = 0;
  for (; c + Lanes<T>::count <= count; c += Lanes<T>::count)
    at(target + c) = weights[0] * at(rows[0] + c) + weights[1] * at(rows[1] + c) +
                     weights[2] * at(rows[2] + c) + weights[3] * at(rows[3] + c);
  for (; c < count; ++c)
    target[c] = weights[0] * rows[0][c] + weights[1] * rows[1][c] + weights[2] * rows[2][c] +
                weights[3] * rows[3][c];
}

// Forward

// Weights as (group, panel of WIDE output channels, tap and input channel, WIDE), zeros beyond O.
template <typename T>
void pack_forward(const ConvShape& s, const T* weight, int64_t panel, T* packed) {
  const int64_t outputs = s.out_channels / s.groups, depth = s.taps() * s.channels / s.groups;
  const int64_t panels = round_up(outputs, WIDE<T>) / WIDE<T>;
  const int64_t group = panel / panels, first = panel % panels * WIDE<T>;
  packed += panel * depth * WIDE<T>;
  const int64_t count = least(WIDE<T>, outputs - first);
  weight += (group * outputs + first) * depth;
  turn(weight, depth, count, depth, packed, WIDE<T>);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = count; j < WIDE<T>; ++j) packed[k * WIDE<T> + j] = T(0);
}

template <typename T>
int64_t packed_panels(const ConvShape& s) {
  return s.groups * (round_up(s.out_channels / s.groups, WIDE<T>) / WIDE<T>);
}

// Numbers of T that forward_tile needs.
template <typename T>
int64_t forward_scratch(const ConvShape& s, int64_t tile) {
  const int64_t outputs = round_up(s.out_channels / s.groups, WIDE<T>);
  return s.channels + round_up(tile, ROWS) * (outputs + DEPTH);
}

// Output pixels first, ..., first + count - 1, at most a tile of them.
template <typename T>
void forward_tile(const ConvForward<T>& call, const T* packed, int64_t first, int64_t count,
                  int64_t tile, Sample<T>* samples, T* scratch) {
  const ConvShape& s = call.shape;
  const int64_t taps = s.taps(), inputs = s.channels / s.groups;
  const int64_t outputs = s.out_channels / s.groups, padded = round_up(outputs, WIDE<T>);
  const int64_t group_depth = taps * inputs, offset_inputs = s.channels / s.offset_groups;
  const int64_t plane = s.out_height * s.out_width;
  const int64_t blocks = round_up(count, ROWS) / ROWS;
  T* zeros = scratch;
  T* sums = zeros + s.channels;
  T* columns = sums + round_up(tile, ROWS) * padded;
  for (int64_t c = 0; c < s.channels; ++c) zeros[c] = T(0);
  find_samples(s, call.offset, first, count, samples);

  // Columns of some whole taps, or of some channels of one tap: about DEPTH at once.
  const int64_t channel_run = least(inputs, DEPTH), tap_run = least(taps, DEPTH / channel_run);
  for (int64_t group = 0; group < s.groups; ++group) {
    const T* panels = packed + group * padded * group_depth;
    for (int64_t tap = 0; tap < taps; tap += tap_run)
      for (int64_t channel = 0; channel < inputs; channel += channel_run) {
        const int64_t run_taps = least(tap_run, taps - tap);
        const int64_t run_channels = least(channel_run, inputs - channel);
        const int64_t depth = run_taps * run_channels;
        const int64_t begin = group * inputs + channel, end = begin + run_channels;
        const int64_t first_group = begin / offset_inputs;
        T* target = columns;
        for (int64_t i = 0; i < count; ++i) {
          const T* masks = mask_of(s, call.mask, first + i);
          for (int64_t t = tap; t < tap + run_taps; ++t)
            for (int64_t c = begin, offset_group = first_group; c < end; ++offset_group) {
              const int64_t stop = least(end, (offset_group + 1) * offset_inputs);
              const T mask = masks ? masks[(offset_group * taps + t) * plane] : T(1);
              gather(s, call.input, zeros, samples[(i * taps + t) * s.offset_groups + offset_group],
                     mask, c, stop - c, target);
              target += stop - c;
              c = stop;
            }
        }
        const int64_t k = tap * inputs + channel;
        for (int64_t panel = 0; panel * WIDE<T> < padded; ++panel)
          for (int64_t block = 0; block < blocks; ++block)
            multiply_block(columns + block * ROWS * depth, depth, 1,
                           panels + (panel * group_depth + k) * WIDE<T>, WIDE<T>, depth,
                           sums + block * ROWS * padded + panel * WIDE<T>, padded, k > 0);
      }
    for (int64_t i = 0; i < count; ++i) {
      T* target = call.output + (first + i) * s.out_channels + group * outputs;
      const T* source = sums + i * padded;
      const T* bias = call.bias ? call.bias + group * outputs : zeros;
      if (call.bias)
        for (int64_t o = 0; o < outputs; ++o) target[o] = source[o] + bias[o];
      else
        for (int64_t o = 0; o < outputs; ++o) target[o] = source[o];
    }
  }
}

// Backward

// The slice after `last`; one of no channels at the end.
template <typename T>
Slice next_slice(const ConvShape& s, Slice last) {
  const int64_t first = last.first + last.count, inputs = s.channels / s.groups;
  const int64_t offset_inputs = s.channels / s.offset_groups;
  int64_t end = least(first + WIDE<T>, s.channels);
  end = least(end, (first / inputs + 1) * inputs);
  end = least(end, (first / offset_inputs + 1) * offset_inputs);
  return {first, end - first};
}

// The gradients of dy, dx and mask, from those of the four corners' weights.
template <typename T>
DCDET_INLINE void position_gradients(const Sample<T>& sample, T mask, const T* dots, T* parts) {
  parts[0] = sample.held_y ? T(0) : sample.slope_y(dots) * mask;
  parts[1] = sample.held_x ? T(0) : sample.slope_x(dots) * mask;
  parts[2] = T(0);
  for (int corner = 0; corner < 4; ++corner) parts[2] += sample.weight(corner) * dots[corner];
}

// Where a slice stands.
struct Place {
  int64_t outputs, padded, group, channel, offset_group;

  Place(const ConvShape& s, Slice slice)
      : outputs(s.out_channels / s.groups),
        padded(round_up(outputs, ROWS)),
        group(slice.first / (s.channels / s.groups)),
        channel(slice.first % (s.channels / s.groups)),
        offset_group(slice.first / (s.channels / s.offset_groups)) {}
};

// A slice's weights and their gradient are (K, padded outputs, WIDE), a tile's columns and their
// gradients (2, K, tile, WIDE).
template <typename T>
BackwardSizes backward_sizes(const ConvShape& s, int64_t tile) {
  const int64_t outputs = round_up(s.out_channels / s.groups, ROWS), number = sizeof(T);
  const int64_t weights = s.taps() * outputs * WIDE<T> * number;
  return {weights, weights, 2 * s.taps() * tile * WIDE<T> * number,
          (WIDE<T> + tile * outputs) * number};
}

template <typename T>
void pack_slice(const ConvBackward<T>& call, Slice slice, T* weights) {
  const ConvShape& s = call.shape;
  const Place place(s, slice);
  const int64_t taps = s.taps(), inputs = s.channels / s.groups;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t o = 0; o < place.outputs; ++o) {
      const T* source =
          call.weight + ((place.group * place.outputs + o) * taps + tap) * inputs + place.channel;
      T* target = weights + (tap * place.padded + o) * WIDE<T>;
      for (int64_t c = 0; c < WIDE<T>; ++c) target[c] = c < slice.count ? source[c] : T(0);
    }
}

// A tile's rows of the gradient, `step` apart: copied where they are not whole blocks.
template <typename T>
const T* grad_of_tile(const ConvBackward<T>& call, const Place& place, int64_t first, int64_t rows,
                      T* copied, int64_t& step) {
  const T* grad = call.grad + first * call.shape.out_channels + place.group * place.outputs;
  step = call.shape.out_channels;
  if (rows % ROWS == 0 && place.outputs % ROWS == 0) return grad;
  for (int64_t i = 0; i < round_up(rows, ROWS); ++i)
    for (int64_t o = 0; o < place.padded; ++o)
      copied[i * place.padded + o] = i < rows && o < place.outputs ? grad[i * step + o] : T(0);
  step = place.padded;
  return copied;
}

// The columns of one slice and tile of pixels first, ..., first + rows - 1, and their gradients.
//
// partial (rows, K, 3) receives the slice's part of the gradients of dy, dx and mask. The gradient
// of the input is added to, or left to scatter_columns.
template <typename T, bool SCATTER>
void find_columns(const ConvBackward<T>& call, Slice slice, int64_t first, int64_t rows,
                  int64_t tile, const Sample<T>* samples, const T* weights, T* scratch, T* columns,
                  T* partial) {
  const ConvShape& s = call.shape;
  constexpr int64_t lanes = Lanes<T>::count, wide = WIDE<T>;
  const Place place(s, slice);
  const int64_t taps = s.taps(), plane = s.out_height * s.out_width;
  T *grad_columns = columns + taps * tile * wide, *zeros = scratch;
  for (int64_t c = 0; c < wide; ++c) zeros[c] = T(0);
  int64_t grad_row;
  const T* grad = grad_of_tile(call, place, first, rows, scratch + wide, grad_row);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t o = 0; o < place.outputs; o += DEPTH)
      for (int64_t i = 0; i < rows; i += ROWS)
        multiply_block(grad + i * grad_row + o, grad_row, 1,
                       weights + (tap * place.padded + o) * wide, wide,
                       least(DEPTH, place.outputs - o), grad_columns + (tap * tile + i) * wide,
                       wide, o > 0);

  for (int64_t i = 0; i < rows; ++i) {
    const T* masks = mask_of(s, call.mask, first + i);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Sample<T>& sample = samples[(i * taps + tap) * s.offset_groups + place.offset_group];
      const T mask = masks ? masks[(place.offset_group * taps + tap) * plane] : T(1);
      const T* grad_column = grad_columns + (tap * tile + i) * wide;
      T* column = columns + (tap * tile + i) * wide;
      const Vector<T> grad_left = at(grad_column), grad_right = at(grad_column + lanes);
      Vector<T> left_sum{}, right_sum{};
      T dots[4], padding[wide];
      for (int corner = 0; corner < 4; ++corner) {
        const T weight = sample.weight(corner) * mask;
        const int64_t number = sample.pixel(corner, s.width) * s.channels + slice.first;
        const bool outside = number < 0;
        const T* source = outside ? zeros : call.input + number;
        if (!outside && slice.count < wide) {
          for (int64_t c = 0; c < wide; ++c) padding[c] = c < slice.count ? source[c] : T(0);
          source = padding;
        }
        const Vector<T> left = at(source), right = at(source + lanes);
        left_sum += weight * left;
        right_sum += weight * right;
        dots[corner] = outside ? T(0) : total<T>(grad_left * left + grad_right * right);
        if (outside || !SCATTER) continue;
        T* target = call.grad_input + number;
        if (slice.count == wide) {
          at(target) += weight * grad_left;
          at(target + lanes) += weight * grad_right;
        } else {
          for (int64_t c = 0; c < slice.count; ++c) target[c] += weight * grad_column[c];
        }
      }
      at(column) = left_sum;
      at(column + lanes) = right_sum;
      position_gradients(sample, mask, dots, partial + (i * taps + tap) * 3);
    }
  }
}

// What find_columns left undone, for the first or second vector of the slice's channels.
template <typename T>
void scatter_columns(const ConvBackward<T>& call, Slice slice, int64_t half, int64_t first,
                     int64_t rows, int64_t tile, const Sample<T>* samples, const T* columns) {
  const ConvShape& s = call.shape;
  constexpr int64_t lanes = Lanes<T>::count, wide = WIDE<T>;
  const Place place(s, slice);
  const int64_t taps = s.taps(), plane = s.out_height * s.out_width;
  const int64_t count = least(lanes, slice.count - half * lanes);
  const T* grad_columns = columns + taps * tile * wide + half * lanes;
  for (int64_t i = 0; i < rows; ++i) {
    const T* masks = mask_of(s, call.mask, first + i);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Sample<T>& sample = samples[(i * taps + tap) * s.offset_groups + place.offset_group];
      const T mask = masks ? masks[(place.offset_group * taps + tap) * plane] : T(1);
      const T* grad_column = grad_columns + (tap * tile + i) * wide;
      for (int corner = 0; corner < 4; ++corner) {
        const T weight = sample.weight(corner) * mask;
        const int64_t pixel = sample.pixel(corner, s.width);
        if (pixel < 0) continue;
        T* target = call.grad_input + pixel * s.channels + slice.first + half * lanes;
        if (slice.count == wide)
          at(target) += weight * at(grad_column);
        else
          for (int64_t c = 0; c < count; ++c) target[c] += weight * grad_column[c];
      }
    }
  }
}

// grad_weights (K, padded outputs, WIDE) of taps begin, ..., end - 1 = or += those of a tile.
template <typename T>
void add_grad_weights(const ConvBackward<T>& call, Slice slice, int64_t first, int64_t rows,
                      int64_t tile, int64_t begin, int64_t end, bool add, const T* columns,
                      T* scratch, T* grad_weights) {
  constexpr int64_t wide = WIDE<T>;
  const Place place(call.shape, slice);
  int64_t grad_row;
  const T* grad = grad_of_tile(call, place, first, rows, scratch + wide, grad_row);
  for (int64_t tap = begin; tap < end; ++tap)
    for (int64_t o = 0; o < place.outputs; o += ROWS)
      multiply_block(grad + o, 1, grad_row, columns + tap * tile * wide, wide, rows,
                     grad_weights + (tap * place.padded + o) * wide, wide, add);
}

// Add a slice's part to the gradient of the weights.
template <typename T>
void add_slice(const ConvBackward<T>& call, Slice slice, const T* grad_weights) {
  const ConvShape& s = call.shape;
  const Place place(s, slice);
  const int64_t taps = s.taps(), inputs = s.channels / s.groups;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t o = 0; o < place.outputs; ++o) {
      T* target = call.grad_weight + ((place.group * place.outputs + o) * taps + tap) * inputs +
                  place.channel;
      const T* source = grad_weights + (tap * place.padded + o) * WIDE<T>;
      for (int64_t c = 0; c < slice.count; ++c) target[c] += source[c];
    }
}

// The gradients of offset and mask from the slices' parts (slice, pixel of the band, K, 3).
template <typename T>
void sum_parts(const ConvShape& s, int64_t first, int64_t count, int64_t pixel, const T* partial,
               T* grad_offset, T* grad_mask) {
  const int64_t taps = s.taps(), plane = s.out_height * s.out_width;
  const int64_t image = (first + pixel) / plane, place = (first + pixel) % plane;
  const int64_t offset_inputs = s.channels / s.offset_groups;
  for (int64_t tap = 0; tap < taps; ++tap) {
    Slice slice = next_slice<T>(s, {0, 0});
    const T* parts = partial + (pixel * taps + tap) * 3;
    for (int64_t group = 0; group < s.offset_groups; ++group) {
      T sums[3] = {0, 0, 0};
      for (; slice.count && slice.first / offset_inputs == group; slice = next_slice<T>(s, slice)) {
        for (int i = 0; i < 3; ++i) sums[i] += parts[i];
        parts += count * taps * 3;
      }
      const int64_t channel = (image * s.offset_groups + group) * taps + tap;
      grad_offset[2 * channel * plane + place] = sums[0];
      grad_offset[(2 * channel + 1) * plane + place] = sums[1];
      if (grad_mask) grad_mask[channel * plane + place] = sums[2];
    }
  }
}

template <typename T>
const ConvKernels<T>& kernels() {
  static const ConvKernels<T> kernels = {ROWS,
                                         packed_panels<T>,
                                         pack_forward<T>,
                                         forward_scratch<T>,
                                         forward_tile<T>,
                                         next_slice<T>,
                                         find_samples<T>,
                                         backward_sizes<T>,
                                         pack_slice<T>,
                                         find_columns<T, true>,
                                         find_columns<T, false>,
                                         scatter_columns<T>,
                                         add_grad_weights<T>,
                                         add_slice<T>,
                                         sum_parts<T>};
  return kernels;
}
