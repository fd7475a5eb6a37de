#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dcdet {

// Memory for numbers that are written before they are read, on a cache line's border.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (!memory_) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace dcdet
