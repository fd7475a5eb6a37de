// A GPU for the kernels of csrc/cuda, on a CPU: slow, in one thread, but exact and under sanitisers.
//
// The threads of a block are fibres that take turns: one runs until it waits for others
// (__syncthreads, __shfl_xor_sync) or ends. Blocks follow each other. What this cannot show: races,
// and whatever depends on speed. Includes are left to device.h.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define DCDET_DEVICE CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Those of the fibre that runs.
inline dim3 threadIdx(0), blockIdx(0), blockDim(1), gridDim(1);

namespace dcdet {
namespace emulator {

constexpr unsigned WARP_THREADS = 32;
constexpr size_t STACK_BYTES = 128 << 10;

// Threads that wait for each other, and the words that they exchange.
struct Group {
  unsigned threads = 0, waiting = 0;
  uint64_t meetings = 0;
  uint64_t words[2][WARP_THREADS];  // of even and odd meetings: none is overwritten unread
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

// One block at a time.
class Block {
 public:
  // Runs `kernel` for all threads; throws what one of them throws.
  void run(unsigned threads, const std::function<void()>& kernel) {
    while (fibres_.size() < threads) {
      fibres_.emplace_back(std::make_unique<Fibre>());
      fibres_.back()->stack = std::make_unique<char[]>(STACK_BYTES);
    }
    kernel_ = &kernel;
    threads_ = alive_ = threads;
    error_ = nullptr;
    idle_ = 0;
    everyone_ = Group();
    everyone_.threads = threads;
    warps_.assign((threads + WARP_THREADS - 1) / WARP_THREADS, Group());
    for (unsigned i = 0; i < threads; ++i) {
      ++warps_[i / WARP_THREADS].threads;
      Fibre& fibre = *fibres_[i];
      fibre.done = false;
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = STACK_BYTES;
      fibre.context.uc_link = nullptr;
      makecontext(&fibre.context, &Block::enter, 0);
    }
    current_ = 0;
    threadIdx = dim3(0, 0, 0);
    swapcontext(&home_, &fibres_[0]->context);
    if (error_) std::rethrow_exception(error_);
  }

  // Waits until all threads of the group are here.
  void meet(Group& group) {
    const uint64_t meeting = group.meetings;
    if (++group.waiting == group.threads) {
      group.waiting = 0;
      ++group.meetings;
      idle_ = 0;
    }
    while (group.meetings == meeting) {
      if (++idle_ > 2 * threads_)  // all have had their turn, and none moved
        throw std::runtime_error("emulator: threads wait for others that never come");
      next();
    }
  }

  Group& everyone() { return everyone_; }
  Group& warp() { return warps_[current_ / WARP_THREADS]; }
  unsigned lane() const { return current_ % WARP_THREADS; }

 private:
  static void enter();

  // Switches to another fibre that is not done.
  void next() {
    const unsigned self = current_;
    do current_ = (current_ + 1) % threads_;
    while (fibres_[current_]->done);
    if (current_ == self) return;
    threadIdx.x = current_;
    swapcontext(&fibres_[self]->context, &fibres_[current_]->context);
  }

  // A fibre ends, the last one or a failed one with its block.
  void finish() {
    fibres_[current_]->done = true;
    idle_ = 0;
    if (--alive_ == 0 || error_) setcontext(&home_);
    next();
  }

  std::vector<std::unique_ptr<Fibre>> fibres_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t home_;
  Group everyone_;
  std::vector<Group> warps_;
  unsigned threads_ = 0, alive_ = 0, current_ = 0, idle_ = 0;
  std::exception_ptr error_;
};

inline Block block;

inline void Block::enter() {
  try {
    (*block.kernel_)();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  block.finish();
}

}  // namespace emulator

constexpr int THREADS = 64;         // of a block: two warps
constexpr int64_t MOST_BLOCKS = 3;  // few, so that kernels must loop
constexpr bool ADDS_FOUR = true;

inline void add_four(float* target, const float* numbers) {
  if (reinterpret_cast<uintptr_t>(target) % 16)
    throw std::runtime_error("emulator: four floats are not on a border of 16 bytes");
  for (int i = 0; i < 4; ++i) target[i] += numbers[i];
}

// As in device.h, for tensors of the CPU.
class Stream {
 public:
  explicit Stream(const Tensor&) {}

  template <typename... P, typename... A>
  void launch(const char* name, void (*kernel)(P...), dim3 blocks, A... arguments) const {
    constexpr unsigned MOST = 65535;
    if (!blocks.x || !blocks.y || !blocks.z || blocks.y > MOST || blocks.z > MOST)
      throw std::runtime_error(std::string("dcdet: kernel ") + name + ": invalid configuration");
    const std::function<void()> body = [&] { kernel(P(arguments)...); };
    blockDim = dim3(THREADS);
    gridDim = blocks;
    for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x)
          emulator::block.run(THREADS, body);
  }
};

}  // namespace dcdet

inline void __syncthreads() { dcdet::emulator::block.meet(dcdet::emulator::block.everyone()); }

// All threads of the warp must be named and must come; kernels here never call it with fewer.
template <typename T>
T __shfl_xor_sync(unsigned mask, T number, int lanes) {
  using namespace dcdet::emulator;
  if (mask != 0xffffffffu) throw std::runtime_error("emulator: only whole warps can exchange");
  Group& warp = block.warp();
  uint64_t* words = warp.words[warp.meetings % 2];
  std::memcpy(&words[block.lane()], &number, sizeof(T));
  block.meet(warp);
  std::memcpy(&number, &words[block.lane() ^ lanes], sizeof(T));
  return number;
}

template <typename T>
void atomicAdd(T* place, T number) {
  *place += number;
}
