// Turning matrices, for one instruction set; see instruction_sets.h.

typedef float Row16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Index16 __attribute__((vector_size(64)));

#if VECTOR_BYTES == 64
// One round of turning a square: pairs of rows, `half` apart, swap what lies off their diagonal.
template <int half>
DCDET_INLINE void swap_halves(Row16* rows) {
  constexpr auto own = [](int l) { return l & half ? 16 + l - half : l; };
  constexpr auto other = [](int l) { return l & half ? 16 + l : l + half; };
#define ALL(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), \
               f(13), f(14), f(15)
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & half) continue;
    const Row16 upper = rows[i], lower = rows[i + half];
    rows[i] = __builtin_shuffle(upper, lower, Index16{ALL(own)});
    rows[i + half] = __builtin_shuffle(upper, lower, Index16{ALL(other)});
  }
#undef ALL
}

// Turn a square of 16 x 16 numbers, or of anything else of four bytes.
DCDET_INLINE void turn_rows(Row16* rows) {
  swap_halves<8>(rows);
  swap_halves<4>(rows);
  swap_halves<2>(rows);
  swap_halves<1>(rows);
}
#endif

// Move a square of 16 x 16 numbers, turned; steps are the distances between its rows.
template <typename T>
DCDET_INLINE void turn_square(const T* source, int64_t source_step, T* target,
                              int64_t target_step) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    Row16 rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      rows[i] = *reinterpret_cast<const Row16*>(source + i * source_step);
    turn_rows(rows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) *reinterpret_cast<Row16*>(target + i * target_step) = rows[i];
    return;
  }
#endif
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t l = 0; l < 16; ++l) target[i * target_step + l] = source[l * source_step + i];
}

// target (columns, rows) = source (rows, columns), turned; steps as in `turn_square`.
template <typename T>
void turn(const T* source, int64_t source_step, int64_t rows, int64_t columns, T* target,
          int64_t target_step) {
  const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  for (int64_t row = 0; row < whole_rows; row += 16)
    for (int64_t column = 0; column < whole_columns; column += 16)
      turn_square(source + row * source_step + column, source_step,
                  target + column * target_step + row, target_step);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      target[column * target_step + row] = source[row * source_step + column];
}
