// Tensors of the stable ABI, as the kernels want them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

namespace dcdet {

constexpr auto NHWC = torch::headeronly::MemoryFormat::ChannelsLast;
constexpr auto NCHW = torch::headeronly::MemoryFormat::Contiguous;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::Tensor;

// A call of torch that allocates. When that fails, the stable ABI says no more than that it failed.
template <typename F>
Tensor allocated(const F& call) {
  try {
    return call();
  } catch (const std::exception&) {
    throw std::runtime_error("dcdet's kernels: torch could not allocate memory");
  }
}

inline Tensor empty_of(ScalarType dtype, const Tensor& like, const std::vector<int64_t>& size,
                       MemoryFormat format = NCHW) {
  return allocated([&] {
    return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
  });
}

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& size,
                         MemoryFormat format = NCHW) {
  return empty_of(like.scalar_type(), like, size, format);
}

// The tensor in a layout; a copy, where it has another.
inline Tensor laid_out(const Tensor& tensor, MemoryFormat format = NCHW) {
  return allocated([&] { return contiguous(tensor, format); });
}

inline Tensor zeros_like(const Tensor& like, const std::vector<int64_t>& size,
                         MemoryFormat format = NCHW) {
  Tensor tensor = empty_like(like, size, format);
  torch::stable::zero_(tensor);
  return tensor;
}

// Whether a map lies in memory pixel by pixel, and not plane by plane.
inline bool is_channels_last(const Tensor& map) {
  int64_t step = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (map.size(dim) != 1 && map.stride(dim) != step) return false;
    step *= map.size(dim);
  }
  return !map.is_contiguous();
}

inline std::vector<int64_t> size_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// An optional argument, contiguous; no tensors where it is absent.
inline std::vector<Tensor> present(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {laid_out(*tensor)};
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data(const std::vector<Tensor>& tensor) {
  return tensor.empty() ? nullptr : data<T>(tensor[0]);
}

template <typename T>
T* place(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Call `function` with a zero of the tensor's dtype, float or double; others are refused.
template <typename F>
void by_dtype(const Tensor& tensor, const F& function) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    throw std::runtime_error("dcdet's kernels: a dtype that they do not compute in on this CPU");
  type == ScalarType::Double ? function(double()) : function(float());
}

}  // namespace dcdet
