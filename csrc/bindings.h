#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "numeric.h"
#include "pair_loss.h"

inline mmrm::PairLossMode pair_loss_mode(const std::string& name) {
  if (name == "standard") return mmrm::PairLossMode::standard;
  if (name == "paper") return mmrm::PairLossMode::paper;
  if (name == "reference") return mmrm::PairLossMode::reference;
  if (name == "balanced") return mmrm::PairLossMode::balanced;
  throw pybind11::value_error("unknown mode " + name);
}

// Where a tensor's memory begins, 0 for none. Not arrays: a storage that numpy shares is one that FSDP cannot free.
using Address = uint64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Calls f with a value of the element type that a tensor's dtype names.
template <typename F>
void with_dtype(const std::string& dtype, F f) {
  if (dtype == "torch.float32") return f(float{});
  if (dtype == "torch.float64") return f(double{});
  if (dtype == "torch.bfloat16") return f(mmrm::bf16_t{});
  if (dtype == "torch.float16") return f(mmrm::fp16_t{});
  throw pybind11::value_error("unsupported dtype " + dtype);
}

// For what only copies: one function for each size of element.
template <int size>
using bits_t = std::conditional_t<size == 2, uint16_t, std::conditional_t<size == 4, uint32_t, uint64_t>>;

// Adds the *_cuda functions; built where CMake finds nvcc.
void bind_cuda(pybind11::module_& m);
