// Small kernels that ask of the emulator, and of a GPU, what the kernels of csrc/cuda rely on.
#include "device.h"

namespace dcdet {
namespace {

// Every THREADS numbers in reverse.
__global__ void reverse_blocks(const float* numbers, float* reversed) {
  __shared__ float kept[THREADS];
  const int64_t first = int64_t(blockIdx.x) * THREADS;
  kept[threadIdx.x] = numbers[first + threadIdx.x];
  __syncthreads();
  reversed[first + threadIdx.x] = kept[THREADS - 1 - threadIdx.x];
}

// Every number becomes the sum of its team's.
__global__ void sum_teams(int team, const float* numbers, float* sums) {
  sums[threadIdx.x] = team_sum(numbers[threadIdx.x], team);
}

__global__ void leave_early(const float* numbers) {
  if (threadIdx.x == 0 && numbers[0] == numbers[0]) return;
  __syncthreads();
}

Tensor reverse(const Tensor& numbers) {
  const Tensor reversed = empty_like(numbers, size_of(numbers));
  Stream(numbers).launch("reverse_blocks", reverse_blocks, dim3(numbers.numel() / THREADS),
                         data<float>(numbers), place<float>(reversed));
  return reversed;
}

Tensor totals(const Tensor& numbers, int64_t team) {
  const Tensor sums = empty_like(numbers, size_of(numbers));
  Stream(numbers).launch("sum_teams", sum_teams, dim3(1), int(team), data<float>(numbers),
                         place<float>(sums));
  return sums;
}

void launch_badly(const Tensor& numbers) {
  Stream(numbers).launch("leave_early", leave_early, dim3(1, 65536), data<float>(numbers));
}

void hang(const Tensor& numbers) {
  Stream(numbers).launch("leave_early", leave_early, dim3(1), data<float>(numbers));
}

}  // namespace

STABLE_TORCH_LIBRARY(DCDET_PROBE, m) {
  m.def("reverse(Tensor numbers) -> Tensor");
  m.def("totals(Tensor numbers, int team) -> Tensor");
  m.def("launch_badly(Tensor numbers) -> ()");
  m.def("hang(Tensor numbers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DCDET_PROBE, DCDET_DEVICE, m) {
  m.impl("reverse", TORCH_BOX(&reverse));
  m.impl("totals", TORCH_BOX(&totals));
  m.impl("launch_badly", TORCH_BOX(&launch_badly));
  m.impl("hang", TORCH_BOX(&hang));
}

}  // namespace dcdet
