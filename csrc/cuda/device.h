// What the kernels need of a GPU: launches, dtypes, wide reads and writes, sums over threads.
//
// With DCDET_EMULATOR tests/emulator stands in for the GPU, and the same source runs on a CPU.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../cpu/tensors.h"
#include "../sampling.h"

#ifdef DCDET_EMULATOR
#include "emulator.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#define DCDET_DEVICE CUDA
#endif

namespace dcdet {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int WARP = 32;

#ifndef DCDET_EMULATOR
constexpr int THREADS = 256;  // of a block
constexpr int64_t MOST_BLOCKS = 65535;  // along an axis; the kernels' loops do the rest

// A tensor's device, made the current one as long as this lives, and its current stream.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  // Start a kernel of THREADS threads a block; throws where it does not start.
  template <typename... P, typename... A>
  void launch(const char* name, void (*kernel)(P...), dim3 blocks, A... arguments) const {
    kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream_)>>>(P(arguments)...);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("dcdet: kernel ") + name + ": " +
                               cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned blocks_for(int64_t count) { return unsigned(std::min(count, MOST_BLOCKS)); }

// What numbers of dtype T are summed in; positions have it too.
template <typename T>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumType<T>::type;

template <typename T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
  return ScalarType::BFloat16;
}

inline Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return allocated([&] { return torch::stable::to(tensor, dtype); });
}

// Call `function` with a number of the dtype.
template <typename F>
void by_any_dtype(ScalarType dtype, const F& function) {
  switch (dtype) {
    case ScalarType::Double: return function(double());
    case ScalarType::Float: return function(float());
    case ScalarType::Half: return function(Half());
    case ScalarType::BFloat16: return function(BFloat16());
    default: throw std::runtime_error("dcdet: a kernel was given another dtype than a float's");
  }
}

// A map in any layout, as (first axis, channel, y, x).
template <typename T>
struct Map {
  T* data = nullptr;
  int64_t strides[4];

  Map() = default;
  // Throws where the dtype is not T: it would be read as T.
  explicit Map(const Tensor& tensor) {
    using S = std::remove_const_t<T>;
    if (tensor.scalar_type() != dtype_of<S>())
      throw std::runtime_error("dcdet: a kernel was given a tensor of an unexpected dtype");
    if constexpr (std::is_const_v<T>)
      data = dcdet::data<S>(tensor);
    else
      data = place<S>(tensor);
    for (int axis = 0; axis < 4; ++axis) strides[axis] = tensor.stride(axis);
  }

  __host__ __device__ T* at(int64_t n, int64_t channel, int64_t y, int64_t x) const {
    return data + n * strides[0] + channel * strides[1] + y * strides[2] + x * strides[3];
  }
};

// N numbers that are read and written at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T number[N];
};

constexpr int64_t PACK_BYTES = 16;

template <typename T>
constexpr int PACKED = PACK_BYTES / sizeof(T);

inline bool is_aligned(const void* memory) {
  return reinterpret_cast<uintptr_t>(memory) % PACK_BYTES == 0;
}

template <typename T, int N>
__device__ __forceinline__ const Pack<T, N>& pack_at(const T* memory) {
  return *reinterpret_cast<const Pack<T, N>*>(memory);
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N>& pack_at(T* memory) {
  return *reinterpret_cast<Pack<T, N>*>(memory);
}

#ifndef DCDET_EMULATOR
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool ADDS_FOUR = true;  // at once, on a 16 byte border
#else
constexpr bool ADDS_FOUR = false;
#endif

__device__ __forceinline__ void add_four(float* target, const float* numbers) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "f"(numbers[0]), "f"(numbers[1]), "f"(numbers[2]), "f"(numbers[3])
               : "memory");
}
#endif

// target[0 .. N - 1] += numbers; other threads may do the same at the same time.
template <int N, typename T>
__device__ __forceinline__ void add_to(T* target, const T* numbers) {
  if constexpr (ADDS_FOUR && std::is_same_v<T, float> && N % 4 == 0) {
    for (int i = 0; i < N; i += 4) add_four(target + i, numbers + i);
  } else {
    for (int i = 0; i < N; ++i) atomicAdd(target + i, numbers[i]);
  }
}

// Neighbouring threads of a warp that work on one thing: a power of 2, enough for `work` pieces.
inline int team_size(int64_t work) {
  int threads = 1;
  while (threads < WARP && threads < work) threads *= 2;
  return threads;
}

// The sum over a team, for each of its threads. The whole warp must call.
template <typename T>
__device__ __forceinline__ T team_sum(T number, int threads) {
  for (int step = threads / 2; step; step /= 2)
    number += __shfl_xor_sync(0xffffffffu, number, step);
  return number;
}

// This block's first thing, and how many things all blocks along the axis take at once.
struct Share {
  int64_t begin, step;
};

__device__ __forceinline__ Share share_of_teams(int team) {
  const int64_t teams = THREADS / team;
  return {int64_t(blockIdx.x) * teams, int64_t(gridDim.x) * teams};
}

}  // namespace dcdet
