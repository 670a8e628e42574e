#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "numeric.h"

// A torch.Tensor as an argument, of one element type and number of dimensions: of a function bound for several types,
// pybind11 calls the one that takes what it is given. Not an array: a storage that numpy shares is one that FSDP cannot
// free.
template <typename T, size_t rank>
struct Tensor {
  T* data;
  std::array<int64_t, rank> shape, strides;
  int device;  // of CUDA, -1 on the CPU

  // The memory of a contiguous tensor of this shape.
  T* at(const std::array<int64_t, rank>& expected) const {
    if (shape != expected) throw std::invalid_argument("a tensor has not the shape that the others ask for");
    int64_t step = 1;
    bool is_contiguous = true;
    for (size_t i = rank; i-- > 0; step *= shape[i]) is_contiguous &= shape[i] <= 1 || strides[i] == step;
    if (!is_contiguous && step > 0) throw std::invalid_argument("a tensor is not contiguous");
    return data;
  }
};

namespace pybind11::detail {

template <typename T> constexpr auto kTorchName = const_name("");
template <> inline constexpr auto kTorchName<float> = const_name("float32");
template <> inline constexpr auto kTorchName<double> = const_name("float64");
template <> inline constexpr auto kTorchName<mmrm::bf16_t> = const_name("bfloat16");
template <> inline constexpr auto kTorchName<mmrm::fp16_t> = const_name("float16");
template <> inline constexpr auto kTorchName<int32_t> = const_name("int32");
template <> inline constexpr auto kTorchName<int64_t> = const_name("int64");

template <typename T, size_t rank>
struct type_caster<Tensor<T, rank>> {
  using Type = Tensor<T, rank>;
  PYBIND11_TYPE_CASTER(Type, const_name("torch.") + kTorchName<T> + const_name("[") + const_name<rank>() + const_name("d]"));

  bool load(handle source, bool) {
    static const object& dtype = *new object(module_::import("torch").attr(kTorchName<T>.text));
    if (!hasattr(source, "data_ptr") || !object(source.attr("dtype")).is(dtype)) return false;
    const tuple shape = source.attr("shape"), strides = source.attr("stride")();
    if (shape.size() != rank) return false;
    for (size_t i = 0; i < rank; ++i) {
      value.shape[i] = shape[i].cast<int64_t>();
      value.strides[i] = strides[i].cast<int64_t>();
    }
    value.data = reinterpret_cast<T*>(source.attr("data_ptr")().cast<uintptr_t>());
    value.device = source.attr("get_device")().cast<int>();
    return true;
  }
};

}  // namespace pybind11::detail
