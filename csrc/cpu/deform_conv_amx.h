// The deformable convolution in bfloat16, for CPUs with AMX: products of tiles of 16 x 32 numbers,
// summed in float32. deform_conv.cpp includes this file after the AVX512 kernels, whose samples,
// slices and sums over slices it shares.
//
// Of 32 channels, the even and the odd ones are held apart, as halves of 16 words.

using avx512::find_samples, avx512::mask_of, avx512::position_gradients, avx512::round_up;
using avx512::Row16, avx512::turn_rows;
using BFloat16 = uint16_t;  // its bits

constexpr int64_t SIDE = 32;  // pixels, output channels or input channels of a step

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, its thread's tiles are in use.
struct Tiles {
  Tiles() {
    static constexpr TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// c (32, 32) float32 = or += a (32, 32 * steps) b (32 * steps, 32). A step of b is two tiles: pairs
// of its rows side by side, for 16 columns each. Distances between rows and steps are in bytes.
DCDET_INLINE void multiply_tiles(const void* a, int64_t a_row, int64_t a_step, const void* b,
                                 int64_t steps, float* c, int64_t c_row, bool add) {
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  char* sums = reinterpret_cast<char*>(c);
  asm volatile("" ::: "memory");  // GCC does not know that tiles read and write memory
  if (add) {
    _tile_loadd(0, sums, c_row);
    _tile_loadd(1, sums + 64, c_row);
    _tile_loadd(2, sums + 16 * c_row, c_row);
    _tile_loadd(3, sums + 16 * c_row + 64, c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, left, a_row);
    _tile_loadd(5, left + 16 * a_row, a_row);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    left += a_step;
    right += 2048;
  }
  _tile_stored(0, sums, c_row);
  _tile_stored(1, sums + 64, c_row);
  _tile_stored(2, sums + 16 * c_row, c_row);
  _tile_stored(3, sums + 16 * c_row + 64, c_row);
  asm volatile("" ::: "memory");
}

// Sixteen words of two bfloat16: the even numbers and the odd ones.
DCDET_INLINE __m512 even_of(__m512i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
DCDET_INLINE __m512 odd_of(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
}

DCDET_INLINE __m512i rounded(__m512 numbers) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers));
}

DCDET_INLINE __m512i join(__m512 even, __m512 odd) {
  return _mm512_or_si512(rounded(even), _mm512_slli_epi32(rounded(odd), 16));
}

// The first `count` of 32 numbers; 0 beyond.
DCDET_INLINE __m512i load(const BFloat16* numbers, int64_t count) {
  if (count >= SIDE) return _mm512_loadu_si512(numbers);
  return _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, numbers);
}

DCDET_INLINE void store(BFloat16* target, int64_t count, __m512i numbers) {
  if (count >= SIDE)
    _mm512_storeu_si512(target, numbers);
  else
    _mm512_mask_storeu_epi16(target, (__mmask32(1) << count) - 1, numbers);
}

void to_bfloat16(const float* source, int64_t count, BFloat16* target) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = count - i >= 16 ? 0xffff : (1 << (count - i)) - 1;
    const __m512 numbers = _mm512_maskz_loadu_ps(there, source + i);
    _mm256_mask_storeu_epi16(target + i, there, (__m256i)_mm512_cvtneps_pbh(numbers));
  }
}

// Channels of a tap in the columns, in whole steps.
DCDET_INLINE int64_t tap_width(const ConvShape& s) { return round_up(s.channels / s.groups, SIDE); }

// Forward

// Columns gathered at once for a pixel, about.
constexpr int64_t RUN = 512;

int64_t packed_panels(const ConvShape& s) {
  return s.groups * (round_up(s.out_channels / s.groups, SIDE) / SIDE);
}

// Numbers of a panel of 32 output channels.
int64_t panel_size(const ConvShape& s) { return s.taps() * tap_width(s) * SIDE; }

// A panel as steps of two tiles, zeros beyond the channels.
void pack_forward(const ConvShape& s, const BFloat16* weight, int64_t panel, BFloat16* packed) {
  const int64_t outputs = s.out_channels / s.groups, inputs = s.channels / s.groups;
  const int64_t panels = round_up(outputs, SIDE) / SIDE, taps = s.taps();
  const int64_t group = panel / panels, first = panel % panels * SIDE;
  packed += panel * panel_size(s);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t channel = 0; channel < inputs; channel += SIDE)
      for (int64_t half = 0; half < SIDE; half += 16) {
        Row16 rows[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t output = first + half + i;
          rows[i] = Row16{};
          if (output >= outputs) continue;
          const BFloat16* source =
              weight + ((group * outputs + output) * taps + tap) * inputs + channel;
          rows[i] = (Row16)load(source, inputs - channel);
        }
        turn_rows(rows);
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(packed + 32 * i, (__m512i)rows[i]);
        packed += 512;
      }
}

// Bytes that forward_tile needs.
int64_t forward_scratch(const ConvShape& s, int64_t tile) {
  const int64_t outputs = round_up(s.out_channels / s.groups, SIDE);
  const int64_t run = std::max(RUN, tap_width(s));
  return 2 * s.channels + 2 * SIDE + round_up(tile, SIDE) * (4 * outputs + 2 * run);
}

// target = the sample of `count` channels, times `mask`.
DCDET_INLINE void gather(const ConvShape& s, const BFloat16* input, const BFloat16* zeros,
                         const Sample<float>& sample, float mask, int64_t first, int64_t count,
                         BFloat16* target) {
  const BFloat16* rows[4];
  __m512 weights[4];
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t pixel = sample.pixel(corner, s.width);
    rows[corner] = pixel < 0 ? zeros : input + pixel * s.channels + first;
    weights[corner] = _mm512_set1_ps(sample.weight(corner) * mask);
  }
  for (int64_t c = 0; c < count; c += SIDE) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int corner = 0; corner < 4; ++corner) {
      const __m512i words = load(rows[corner] + c, count - c);
      even = _mm512_fmadd_ps(weights[corner], even_of(words), even);
      odd = _mm512_fmadd_ps(weights[corner], odd_of(words), odd);
    }
    store(target + c, count - c, join(even, odd));
  }
}

// Output pixels first, ..., first + count - 1, at most a tile of them.
void forward_tile(const ConvForward<BFloat16, float>& call, const BFloat16* packed, int64_t first,
                  int64_t count, int64_t tile, Sample<float>* samples, char* scratch) {
  const ConvShape& s = call.shape;
  const int64_t taps = s.taps(), inputs = s.channels / s.groups, width = tap_width(s);
  const int64_t outputs = s.out_channels / s.groups, padded = round_up(outputs, SIDE);
  const int64_t offset_inputs = s.channels / s.offset_groups;
  const int64_t plane = s.out_height * s.out_width, rows = round_up(count, SIDE);
  float* sums = reinterpret_cast<float*>(scratch);
  BFloat16* columns = reinterpret_cast<BFloat16*>(sums + round_up(tile, SIDE) * padded);
  BFloat16* zeros = columns + round_up(tile, SIDE) * std::max(RUN, width);
  std::memset(zeros, 0, 2 * (s.channels + SIDE));
  find_samples(s, call.offset, first, count, samples);

  const int64_t tap_run = std::max<int64_t>(1, std::min(taps, RUN / width));
  for (int64_t group = 0; group < s.groups; ++group) {
    const BFloat16* panels = packed + group * (padded / SIDE) * panel_size(s);
    const int64_t begin = group * inputs, end = begin + inputs;
    for (int64_t tap = 0; tap < taps; tap += tap_run) {
      const int64_t run = std::min(tap_run, taps - tap), depth = run * width;
      for (int64_t i = 0; i < count; ++i) {
        const float* masks = mask_of(s, call.mask, first + i);
        for (int64_t t = tap; t < tap + run; ++t) {
          BFloat16* column = columns + i * depth + (t - tap) * width;
          for (int64_t c = begin; c < end;) {
            const int64_t offset_group = c / offset_inputs;
            const int64_t stop = std::min(end, (offset_group + 1) * offset_inputs);
            const float mask = masks ? masks[(offset_group * taps + t) * plane] : 1.0f;
            gather(s, call.input, zeros, samples[(i * taps + t) * s.offset_groups + offset_group],
                   mask, c, stop - c, column + c - begin);
            c = stop;
          }
          for (int64_t c = inputs; c < width; ++c) column[c] = 0;
        }
      }
      std::memset(columns + count * depth, 0, 2 * (rows - count) * depth);
      for (int64_t panel = 0; panel < padded / SIDE; ++panel)
        for (int64_t row = 0; row < rows; row += SIDE)
          multiply_tiles(columns + row * depth, 2 * depth, 64,
                         panels + panel * panel_size(s) + tap * width * SIDE, depth / SIDE,
                         sums + row * padded + panel * SIDE, 4 * padded, tap > 0);
    }
    for (int64_t o = 0; o < outputs; o += 16) {
      const __mmask16 there = outputs - o >= 16 ? 0xffff : (1 << (outputs - o)) - 1;
      __m512 bias = _mm512_setzero_ps();
      if (call.bias)
        bias = even_of(_mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(there, call.bias + group * outputs + o)));
      BFloat16* target = call.output + first * s.out_channels + group * outputs + o;
      for (int64_t i = 0; i < count; ++i) {
        const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums + i * padded + o), bias);
        _mm256_mask_storeu_epi16(target + i * s.out_channels, there,
                                 (__m256i)_mm512_cvtneps_pbh(sum));
      }
    }
  }
}

// Backward

// The gradient of 32 pixels, turned: (group, output channel, pixel), zeros beyond the last of both.
void turn_grad(const ConvShape& s, const BFloat16* grad, int64_t block, BFloat16* turned) {
  const int64_t outputs = s.out_channels / s.groups, padded = round_up(outputs, SIDE);
  const int64_t first = block * SIDE, count = std::min(SIDE, s.pixels() - first);
  turned += block * SIDE * padded * s.groups;
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t o = 0; o < padded; o += 16) {
      const int64_t left = std::max<int64_t>(0, outputs - o);
      const __mmask16 there = left >= 16 ? 0xffff : (1 << left) - 1;
      const BFloat16* source = grad + first * s.out_channels + group * outputs + o;
      const auto row = [&](int64_t pixel) {
        const __mmask16 mask = pixel < count ? there : 0;
        const BFloat16* numbers = mask ? source + pixel * s.out_channels : grad;
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, numbers));
      };
      Row16 rows[16];
      for (int64_t i = 0; i < 16; ++i)
        rows[i] = (Row16)_mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
      turn_rows(rows);
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_si512(turned, (__m512i)rows[i]);
        turned += SIDE;
      }
    }
}

// The sums of four vectors.
DCDET_INLINE __m128 totals(const __m512* v) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

// Where a slice stands.
struct Place {
  int64_t outputs, padded, group, channel, offset_group;

  Place(const ConvShape& s, Slice slice)
      : outputs(s.out_channels / s.groups),
        padded(round_up(outputs, SIDE)),
        group(slice.first / (s.channels / s.groups)),
        channel(slice.first % (s.channels / s.groups)),
        offset_group(slice.first / (s.channels / s.offset_groups)) {}
};

// A slice's weights and their gradient (float32) are (K, padded outputs, 32); a tile's columns are
// (K, tile, 32), after their gradients (float32).
BackwardSizes backward_sizes(const ConvShape& s, int64_t tile) {
  const int64_t outputs = round_up(s.out_channels / s.groups, SIDE);
  const int64_t weights = s.taps() * outputs * SIDE, columns = s.taps() * tile * SIDE;
  return {2 * weights, 4 * weights, 6 * columns, 2 * (SIDE + tile * outputs)};
}

// Per tap, steps of 32 output channels: tiles of the even and of the odd input channels.
void pack_slice(const ConvBackward<BFloat16, float>& call, Slice slice, BFloat16* weights) {
  const ConvShape& s = call.shape;
  const Place place(s, slice);
  const int64_t taps = s.taps(), inputs = s.channels / s.groups;
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t o = 0; o < place.padded; o += 2) {
      const auto row = [&](int64_t output) {
        const int64_t number =
            ((place.group * place.outputs + output) * taps + tap) * inputs + place.channel;
        return output < place.outputs ? load(call.weight + number, slice.count)
                                      : _mm512_setzero_si512();
      };
      const __m512i upper = row(o), lower = row(o + 1);
      BFloat16* target =
          weights + (tap * place.padded + o / SIDE * SIDE) * SIDE + o % SIDE / 2 * 32;
      _mm512_storeu_si512(target, _mm512_or_si512(_mm512_and_si512(upper, low_half),
                                                  _mm512_slli_epi32(lower, 16)));
      _mm512_storeu_si512(target + 512, _mm512_or_si512(_mm512_srli_epi32(upper, 16),
                                                        _mm512_andnot_si512(low_half, lower)));
    }
}

// The columns of one slice and tile of pixels first, ..., first + rows - 1, and their gradients.
//
// partial (rows, K, 3) receives the slice's part of the gradients of dy, dx and mask. The gradient
// of the input, `grad_input` (input pixel, slice, 32), even channels first, is added to, or left to
// scatter_columns.
template <bool SCATTER>
void find_columns(const ConvBackward<BFloat16, float>& call, Slice slice, int64_t index,
                  int64_t slices, int64_t first, int64_t rows, int64_t tile,
                  const Sample<float>* samples, const BFloat16* weights, BFloat16* scratch,
                  float* grad_columns, float* partial) {
  const ConvShape& s = call.shape;
  const Place place(s, slice);
  const int64_t taps = s.taps(), plane = s.out_height * s.out_width;
  const int64_t whole = round_up(rows, SIDE);
  BFloat16* columns = reinterpret_cast<BFloat16*>(grad_columns + taps * tile * SIDE);
  BFloat16 *zeros = scratch, *copied = scratch + SIDE;
  std::memset(zeros, 0, 2 * SIDE);
  const BFloat16* grad = call.grad + first * s.out_channels + place.group * place.outputs;
  int64_t grad_row = s.out_channels;
  if (rows < whole || place.outputs < place.padded) {  // tiles are read whole
    for (int64_t i = 0; i < whole; ++i)
      for (int64_t o = 0; o < place.padded; o += SIDE)
        _mm512_storeu_si512(copied + i * place.padded + o,
                            i < rows ? load(grad + i * grad_row + o, place.outputs - o)
                                     : _mm512_setzero_si512());
    grad = copied;
    grad_row = place.padded;
  }
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t i = 0; i < rows; i += SIDE)
      multiply_tiles(grad + i * grad_row, 2 * grad_row, 64, weights + tap * place.padded * SIDE,
                     place.padded / SIDE, grad_columns + (tap * tile + i) * SIDE, 4 * SIDE, false);

  for (int64_t i = 0; i < whole; ++i) {
    const float* masks = i < rows ? mask_of(s, call.mask, first + i) : nullptr;
    for (int64_t tap = 0; tap < taps; ++tap) {
      // Two pixels side by side: the second one's numbers are the words' upper halves.
      BFloat16* pair = columns + (tap * tile + i / SIDE * SIDE) * SIDE + i % SIDE / 2 * 32;
      const auto keep = [&](__m512 numbers, BFloat16* words) {
        __m512i own = rounded(numbers);
        if (i % 2) own = _mm512_or_si512(_mm512_loadu_si512(words), _mm512_slli_epi32(own, 16));
        _mm512_storeu_si512(words, own);
      };
      if (i >= rows) {
        keep(_mm512_setzero_ps(), pair);
        keep(_mm512_setzero_ps(), pair + 512);
        continue;
      }
      const int64_t number = (i * taps + tap) * s.offset_groups + place.offset_group;
      const Sample<float>& sample = samples[number];
      const float mask = masks ? masks[(place.offset_group * taps + tap) * plane] : 1.0f;
      const float* grad_column = grad_columns + (tap * tile + i) * SIDE;
      const __m512 grad_even = _mm512_loadu_ps(grad_column);
      const __m512 grad_odd = _mm512_loadu_ps(grad_column + 16);
      __m512 even = _mm512_setzero_ps(), odd = even, products[4];
      for (int corner = 0; corner < 4; ++corner) {
        const __m512 weight = _mm512_set1_ps(sample.weight(corner) * mask);
        const int64_t pixel = sample.pixel(corner, s.width);
        const BFloat16* source = pixel < 0 ? zeros : call.input + pixel * s.channels + slice.first;
        const __m512i words = load(source, slice.count);
        const __m512 numbers_even = even_of(words), numbers_odd = odd_of(words);
        even = _mm512_fmadd_ps(weight, numbers_even, even);
        odd = _mm512_fmadd_ps(weight, numbers_odd, odd);
        products[corner] = _mm512_setzero_ps();
        if (pixel < 0) continue;
        products[corner] =
            _mm512_fmadd_ps(grad_odd, numbers_odd, _mm512_mul_ps(grad_even, numbers_even));
        if (!SCATTER) continue;
        float* target = call.grad_input + (pixel * slices + index) * SIDE;
        _mm512_storeu_ps(target, _mm512_fmadd_ps(weight, grad_even, _mm512_loadu_ps(target)));
        _mm512_storeu_ps(target + 16,
                         _mm512_fmadd_ps(weight, grad_odd, _mm512_loadu_ps(target + 16)));
      }
      keep(even, pair);
      keep(odd, pair + 512);
      float dots[4];
      _mm_storeu_ps(dots, totals(products));
      position_gradients(sample, mask, dots, partial + (i * taps + tap) * 3);
    }
  }
}

// What find_columns left undone, for the even or the odd channels of the slice.
void scatter_columns(const ConvBackward<BFloat16, float>& call, Slice slice, int64_t index,
                     int64_t slices, int64_t half, int64_t first, int64_t rows, int64_t tile,
                     const Sample<float>* samples, const float* grad_columns) {
  const ConvShape& s = call.shape;
  const Place place(s, slice);
  const int64_t taps = s.taps(), plane = s.out_height * s.out_width;
  for (int64_t i = 0; i < rows; ++i) {
    const float* masks = mask_of(s, call.mask, first + i);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t number = (i * taps + tap) * s.offset_groups + place.offset_group;
      const Sample<float>& sample = samples[number];
      const float mask = masks ? masks[(place.offset_group * taps + tap) * plane] : 1.0f;
      const __m512 grad = _mm512_loadu_ps(grad_columns + (tap * tile + i) * SIDE + half * 16);
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t pixel = sample.pixel(corner, s.width);
        if (pixel < 0) continue;
        const __m512 weight = _mm512_set1_ps(sample.weight(corner) * mask);
        float* target = call.grad_input + (pixel * slices + index) * SIDE + half * 16;
        _mm512_storeu_ps(target, _mm512_fmadd_ps(weight, grad, _mm512_loadu_ps(target)));
      }
    }
  }
}

// grad_weights of taps begin, ..., end - 1 = or += those of a tile; `first` is a multiple of 32,
// and `turned` as turn_grad left it.
void add_grad_weights(const ConvShape& s, const BFloat16* turned, Slice slice, int64_t first,
                      int64_t rows, int64_t tile, int64_t begin, int64_t end, bool add,
                      const float* grad_columns, float* grad_weights) {
  const Place place(s, slice);
  const BFloat16* columns =
      reinterpret_cast<const BFloat16*>(grad_columns + s.taps() * tile * SIDE);
  const BFloat16* left = turned + (first / SIDE * s.groups + place.group) * place.padded * SIDE;
  for (int64_t tap = begin; tap < end; ++tap)
    for (int64_t o = 0; o < place.padded; o += SIDE)
      multiply_tiles(left + o * SIDE, 2 * SIDE, 2 * s.groups * place.padded * SIDE,
                     columns + tap * tile * SIDE, round_up(rows, SIDE) / SIDE,
                     grad_weights + (tap * place.padded + o) * SIDE, 4 * SIDE, add);
}

// Add a slice's part to the gradient of the weights.
void add_slice(const ConvBackward<BFloat16, float>& call, Slice slice, const float* grad_weights) {
  const ConvShape& s = call.shape;
  const Place place(s, slice);
  const int64_t taps = s.taps(), inputs = s.channels / s.groups;
  const __m512i lower = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
  const __mmask16 first_half = slice.count >= 16 ? 0xffff : (1 << slice.count) - 1;
  const __mmask16 second_half =
      slice.count >= 32 ? 0xffff : slice.count > 16 ? (1 << (slice.count - 16)) - 1 : 0;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t o = 0; o < place.outputs; ++o) {
      float* target = call.grad_weight +
                      ((place.group * place.outputs + o) * taps + tap) * inputs + place.channel;
      const float* source = grad_weights + (tap * place.padded + o) * SIDE;
      const __m512 even = _mm512_loadu_ps(source), odd = _mm512_loadu_ps(source + 16);
      const auto add = [&](__m512i order, __mmask16 there, float* numbers) {
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(there, numbers),
                                         _mm512_permutex2var_ps(even, order, odd));
        _mm512_mask_storeu_ps(numbers, there, sum);
      };
      add(lower, first_half, target);
      if (second_half) add(upper, second_half, target + 16);
    }
}

// One input pixel's gradient, from slices as backward_slice left them.
void join_slices(const float* source, const std::vector<Slice>& slices, BFloat16* target) {
  for (const Slice& slice : slices) {
    store(target + slice.first, slice.count,
          join(_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16)));
    source += SIDE;
  }
}
