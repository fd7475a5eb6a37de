// Compiles the file KERNEL for every instruction set, each time inside a namespace of its own, with
//   VECTOR_BYTES  the size of a vector register
//   BLOCK_ROWS    rows of a product that are held in registers, times two vectors
// KERNEL must include nothing but what is compiled along with it (turn.h): whatever it instantiates
// belongs to its instruction set alone. It must define `template <typename T> const KERNELS<T>&
// kernels()`; best<T>() chooses among them.
#include <cstdint>
#include <cstdlib>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors are returned by inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace dcdet {

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define VECTOR_BYTES 64
#define BLOCK_ROWS 8
#include KERNEL
#undef VECTOR_BYTES
#undef BLOCK_ROWS
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#define BLOCK_ROWS 4
#include KERNEL
#undef VECTOR_BYTES
#undef BLOCK_ROWS
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace baseline {
#define VECTOR_BYTES 16
#define BLOCK_ROWS 4
#include KERNEL
#undef VECTOR_BYTES
#undef BLOCK_ROWS
}  // namespace baseline

namespace {

// Bytes of the vector registers in use: 64 (AVX512), 32 (AVX2), else 16.
inline int64_t vector_bytes() {
#if defined(__x86_64__)
  static const int64_t bytes = [] {
    const char* limit = std::getenv("DCDET_VECTOR_BYTES");  // to test one kernel on another's CPU
    const int64_t most = limit ? std::atoll(limit) : 64;
    if (most >= 64 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return 64;
    return most >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 32 : 16;
  }();
  return bytes;
#else
  return 16;
#endif
}

template <typename T>
const KERNELS<T>& best() {
#if defined(__x86_64__)
  if (vector_bytes() == 64) return avx512::kernels<T>();
  if (vector_bytes() == 32) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

}  // namespace
}  // namespace dcdet
