// The position-sensitive RoI poolings for one instruction set; see instruction_sets.h.
//
// A vector holds one number for each of LANES bins, or of LANES output channels of one bin.

#include "turn.h"

template <typename T>
struct Wide {
  typedef T Vector __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <typename T>
using Vector = typename Wide<T>::Vector;
using Cells32 = Vector<int32_t>;

template <typename T>
DCDET_INLINE Vector<T>& lanes(T* numbers) {
  return *reinterpret_cast<Vector<T>*>(numbers);
}

template <typename T>
DCDET_INLINE const Vector<T>& lanes(const T* numbers) {
  return *reinterpret_cast<const Vector<T>*>(numbers);
}

// The numbers of cells whose weight is not 0; the others are not read, and 0.
template <typename T>
DCDET_INLINE Vector<T> read(const T* plane, const Cells32& cells, const Vector<T>& weight) {
  Vector<T> numbers;
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 w = (__m512)weight;
    const __mmask16 wanted = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    numbers = (Vector<T>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), wanted, (__m512i)cells,
                                                  plane, 4);
  } else {
    for (int64_t l = 0; l < LANES; l += 8) {
      const __m512d w = _mm512_loadu_pd((const double*)&weight + l);
      const __mmask8 wanted = _mm512_cmp_pd_mask(w, _mm512_setzero_pd(), _CMP_NEQ_UQ);
      const __m256i cell = _mm256_loadu_si256((const __m256i*)((const int32_t*)&cells + l));
      _mm512_storeu_pd((double*)&numbers + l, _mm512_mask_i32gather_pd(_mm512_setzero_pd(), wanted,
                                                                       cell, plane, 8));
    }
  }
#else
  for (int64_t l = 0; l < LANES; ++l) numbers[l] = weight[l] != 0 ? plane[cells[l]] : T(0);
#endif
  return numbers;
}

// Find what bins read along an axis; -> how many entries, at most twice the samples.
//
// Samples outside [-0.5, length - 0.5] are dropped, the others held inside. `kept` counts those in
// use: NaN where a position is. `lows` and `fractions` have room for count * LANES numbers.
template <typename T>
int64_t find_entries(const Samples<T>& s, int32_t* lows, T* fractions, Entry<T>* entries, T* kept) {
  const Vector<T> zero = {}, one = zero + 1;
  const Vector<T> first = lanes(s.first), step = lanes(s.step);
  const T last = T(s.length) - 1, end = T(s.length) - T(0.5);
  const int32_t length = int32_t(s.length), stride = int32_t(s.stride);
  Vector<T> total = zero, used = zero;
  Cells32 lowest = Cells32{} + length, highest = Cells32{} - 1;
  for (int64_t i = 0; i < s.count; ++i) {
    const Vector<T> place = first + T(i) * step;
    const auto inside = (place >= T(-0.5)) & (place <= end);
    Vector<T> held = place < 0 ? zero : place;
    held = held > last ? zero + last : held;
    held = inside ? held : zero;  // a NaN must not be cast
    const Cells32 cell = __builtin_convertvector(held, Cells32);
    const Vector<T> beyond = held - __builtin_convertvector(cell, Vector<T>);
    const Cells32 in = __builtin_convertvector(inside, Cells32);
    const Cells32 high = cell - __builtin_convertvector(beyond > 0, Cells32);
    total += place;
    used += inside ? one : zero;
    lanes(fractions + i * LANES) = beyond;
    lanes(lows + i * LANES) = in ? cell : Cells32{} - 2;  // neither it nor the next is a cell
    lowest = in & (cell < lowest) ? cell : lowest;
    highest = in & (high > highest) ? high : highest;
  }
  lanes(kept) = total == total ? used : total;
  int32_t span = 0;
  for (int64_t l = 0; l < LANES; ++l) {
    const int32_t cells = highest[l] - lowest[l] + 1;
    span = cells > span ? cells : span;
  }
  if (span > 2 * s.count) {  // cells far apart: two a sample
    for (int64_t i = 0; i < s.count; ++i) {
      const Cells32 low = lanes(lows + i * LANES);
      const Vector<T> fraction = lanes(fractions + i * LANES);
      const auto inside = __builtin_convertvector(low >= 0, decltype(fraction > 0));
      const auto between = inside & (fraction > 0);
      Entry<T>&lower = entries[2 * i], &upper = entries[2 * i + 1];
      lanes(lower.cell) = (low >= 0) & (low * stride);
      lanes(upper.cell) = (low >= 0) & (low < length - 1) & ((low + 1) * stride);
      lanes(lower.weight) = inside ? one - fraction : zero;
      lanes(upper.weight) = between ? fraction : zero;
      lanes(lower.slope) = between ? -one : zero;
      lanes(upper.slope) = between ? one : zero;
    }
    return 2 * s.count;
  }
  for (int32_t e = 0; e < span; ++e) {  // samples that share a cell share its entry
    const Cells32 cell = lowest + e;
    Vector<T> weight = zero, slope = zero;
    for (int64_t i = 0; i < s.count; ++i) {
      const Cells32 low = lanes(lows + i * LANES);
      const Vector<T> fraction = lanes(fractions + i * LANES);
      const auto is_low = __builtin_convertvector(low == cell, decltype(fraction > 0));
      const auto is_high = __builtin_convertvector(low + 1 == cell, decltype(fraction > 0));
      const Vector<T> change = fraction > 0 ? one : zero;
      weight += is_low ? one - fraction : is_high ? fraction : zero;
      slope += is_low ? -change : is_high ? change : zero;
    }
    lanes(entries[e].cell) = cell * stride;
    lanes(entries[e].weight) = weight;
    lanes(entries[e].slope) = slope;
  }
  return span;
}

// sums[l] = what bin l reads of the plane, divided.
template <typename T>
void pool(const Block<T>& block, const T* plane, T* sums) {
  const Entry<T>*rows = entries_of(&block), *columns = rows + block.rows;
  Vector<T> total = {};
  for (int64_t a = 0; a < block.rows; ++a)
    for (int64_t b = 0; b < block.columns; ++b) {
      const Vector<T> weight = lanes(rows[a].weight) * lanes(columns[b].weight);
      const Cells32 cells = lanes(rows[a].cell) + lanes(columns[b].cell);
      total += weight * read(plane, cells, weight);
    }
  lanes(sums) = total / lanes(block.divisor);
}

// Find the block's `neighbours` and `across`.
template <typename T>
void line_up(Block<T>& block) {
  const Entry<T>* columns = entries_of(&block) + block.rows;
  block.neighbours = VECTOR_BYTES == 64 && block.columns > 0 && block.columns <= ACROSS;
  for (int64_t e = 1; e < block.columns && block.neighbours; ++e)
    for (int64_t l = 0; l < LANES; ++l)
      block.neighbours &= columns[e].weight[l] == 0 ||
                          columns[e].cell[l] == columns[0].cell[l] + int32_t(e);
  if (!block.neighbours) return;
  for (int64_t l = 0; l < LANES; ++l)
    for (int64_t e = 0; e < ACROSS; ++e)
      block.across[l][e] = e < block.columns ? columns[e].weight[l] : T(0);
}

// target[0 .. 7] += factor * weights, where these are not 0.
#if VECTOR_BYTES == 64
DCDET_INLINE void add_across(float factor, const float* weights, float* target) {
  const __m256 w = _mm256_loadu_ps(weights);
  const __mmask8 there = _mm256_cmp_ps_mask(w, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  const __m256 sum = _mm256_add_ps(_mm256_maskz_loadu_ps(there, target),
                                   _mm256_mul_ps(_mm256_set1_ps(factor), w));
  _mm256_mask_storeu_ps(target, there, sum);
}

DCDET_INLINE void add_across(double factor, const double* weights, double* target) {
  const __m512d w = _mm512_loadu_pd(weights);
  const __mmask8 there = _mm512_cmp_pd_mask(w, _mm512_setzero_pd(), _CMP_NEQ_UQ);
  const __m512d sum = _mm512_add_pd(_mm512_maskz_loadu_pd(there, target),
                                    _mm512_mul_pd(_mm512_set1_pd(factor), w));
  _mm512_mask_storeu_pd(target, there, sum);
}
#else
template <typename T>
DCDET_INLINE void add_across(T factor, const T* weights, T* target) {
  for (int64_t e = 0; e < ACROSS; ++e)
    if (weights[e] != 0) target[e] += factor * weights[e];
}
#endif

// The plane's gradient, from the bins' shares of theirs.
template <typename T>
void spread(const Block<T>& block, const T* shares, T* plane) {
  const Entry<T>*rows = entries_of(&block), *columns = rows + block.rows;
  for (int64_t l = 0; l < block.bins; ++l) {
    if (shares[l] == 0) continue;
    for (int64_t a = 0; a < block.rows; ++a) {
      if (rows[a].weight[l] == 0) continue;
      const T along = shares[l] * rows[a].weight[l];
      T* row = plane + rows[a].cell[l];
      if (block.neighbours)
        add_across(along, block.across[l], row + columns[0].cell[l]);
      else
        for (int64_t b = 0; b < block.columns; ++b)
          if (columns[b].weight[l] != 0) row[columns[b].cell[l]] += along * columns[b].weight[l];
    }
  }
}

// How much a bin's sum grows when it moves down and right.
template <typename T>
void slopes(const Block<T>& block, const T* plane, T* down, T* right) {
  const Entry<T>*rows = entries_of(&block), *columns = rows + block.rows;
  Vector<T> along_y = {}, along_x = {};
  for (int64_t a = 0; a < block.rows; ++a) {
    const Vector<T> row_weight = lanes(rows[a].weight);
    Vector<T> weighted = {}, sloped = {};
    for (int64_t b = 0; b < block.columns; ++b) {
      const Cells32 cells = lanes(rows[a].cell) + lanes(columns[b].cell);
      const Vector<T> weight = lanes(columns[b].weight);
      const Vector<T> number = read(plane, cells, row_weight * weight);
      weighted += weight * number;
      sloped += lanes(columns[b].slope) * number;
    }
    along_y += lanes(rows[a].slope) * weighted;
    along_x += row_weight * sloped;
  }
  lanes(down) = along_y;
  lanes(right) = along_x;
}

// target (columns, LANES) = source (rows, columns), turned; lanes from `rows` on are 0.
template <typename T>
void into_lanes(const T* source, int64_t source_step, int64_t rows, int64_t columns, T* target,
                int64_t target_step) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    for (int64_t at = 0; at < columns; at += 16) {
      const int64_t count = columns - at < 16 ? columns - at : 16;
      if (count == 1) {  // 49 columns are three squares and one more
        Vector<T> column = {};
        for (int64_t l = 0; l < rows; ++l) column[l] = source[l * source_step + at];
        lanes(target + at * target_step) = column;
        break;
      }
      const __mmask16 there = __mmask16((1u << count) - 1);
      Row16 square[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        square[i] = i < rows ? (Row16)_mm512_maskz_loadu_ps(there, source + i * source_step + at)
                             : Row16{};
      turn_rows(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        if (i < count) lanes(target + (at + i) * target_step) = square[i];
    }
    return;
  }
#endif
  for (int64_t column = 0; column < columns; ++column) {
    T* numbers = target + column * target_step;
    for (int64_t l = 0; l < LANES; ++l)
      numbers[l] = l < rows ? source[l * source_step + column] : T(0);
  }
}

// target (count, rows) = the first `count` lanes of source (rows, LANES), turned.
template <typename T>
void from_lanes(const T* source, int64_t source_step, int64_t rows, int64_t count, T* target,
                int64_t target_step) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    for (int64_t at = 0; at < rows; at += 16) {
      const int64_t wide = rows - at < 16 ? rows - at : 16;
      const __mmask16 there = __mmask16((1u << wide) - 1);
      Row16 square[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        square[i] = i < wide ? (Row16)lanes(source + (at + i) * source_step) : Row16{};
      turn_rows(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        if (i < count)
          _mm512_mask_storeu_ps(target + i * target_step + at, there, (__m512)square[i]);
    }
    return;
  }
#endif
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t l = 0; l < count; ++l)
      target[l * target_step + row] = source[row * source_step + l];
}

// sums += what bins read of a row, whose pixels lie `step` apart.
template <typename T>
void sum_row(const RowBin<T>* bins, int64_t count, const T* row, int64_t step, T* sums) {
  for (int64_t i = 0; i < count; ++i) {
    const RowBin<T>& bin = bins[i];
    Vector<T> sum = {};
    for (int64_t e = 0; e < bin.columns; ++e)
      sum += bin.across[e].weight * lanes(row + bin.across[e].cell * step + bin.group);
    lanes(sums + bin.place) += bin.weight * sum;
  }
}

// The row's gradient, from the bins' shares of theirs.
template <typename T>
void spread_row(const RowBin<T>* bins, int64_t count, const T* shares, T* row, int64_t step) {
  for (int64_t i = 0; i < count; ++i) {
    const RowBin<T>& bin = bins[i];
    const Vector<T> share = bin.weight * lanes(shares + bin.place);
    for (int64_t e = 0; e < bin.columns; ++e)
      lanes(row + bin.across[e].cell * step + bin.group) += bin.across[e].weight * share;
  }
}

// How much the bins' sums grow when they move down and right, as far as the row counts.
template <typename T>
void slope_row(const RowBin<T>* bins, int64_t count, const T* row, int64_t step, T* down,
               T* right) {
  for (int64_t i = 0; i < count; ++i) {
    const RowBin<T>& bin = bins[i];
    Vector<T> weighted = {}, sloped = {};
    for (int64_t e = 0; e < bin.columns; ++e) {
      const Vector<T> numbers = lanes(row + bin.across[e].cell * step + bin.group);
      weighted += bin.across[e].weight * numbers;
      sloped += bin.across[e].slope * numbers;
    }
    lanes(down + bin.place) += bin.slope * weighted;
    lanes(right + bin.place) += bin.weight * sloped;
  }
}

// The lanes of bins over each bin's divisor; with `zeros_stay` 0 stays 0, whatever the divisor is.
template <typename T>
void divide(T* numbers, const T* divisors, int64_t bins, bool zeros_stay) {
  const Vector<T> zero = {};
  for (int64_t bin = 0; bin < bins; ++bin) {
    Vector<T>& own = lanes(numbers + bin * LANES);
    const Vector<T> divided = own / divisors[bin];
    own = zeros_stay ? (own == zero ? zero : divided) : divided;
  }
}

// The sum of the products of two bins' lanes, one after another.
template <typename T>
T dot(const T* a, const T* b) {
  T sum = 0;
  for (int64_t l = 0; l < LANES; ++l)
    if (b[l] != 0) sum += a[l] * b[l];
  return sum;
}

template <typename T>
const PoolKernels<T>& kernels() {
  static const PoolKernels<T> kernels = {
      find_entries<T>, line_up<T>, pool<T>,       spread<T>,    slopes<T>, turn<T>, into_lanes<T>,
      from_lanes<T>,   sum_row<T>, spread_row<T>, slope_row<T>, divide<T>, dot<T>};
  return kernels;
}
