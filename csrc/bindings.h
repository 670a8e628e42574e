#pragma once

// From tensors to the structures that an op's C++ and CUDA C++ take.

#include <optional>
#include <string>
#include <type_traits>

#include "pack_image_tokens.h"
#include "pair_loss.h"
#include "tensor.h"

inline mmrm::PairLossMode pair_loss_mode(const std::string& name) {
  if (name == "standard") return mmrm::PairLossMode::standard;
  if (name == "paper") return mmrm::PairLossMode::paper;
  if (name == "reference") return mmrm::PairLossMode::reference;
  if (name == "balanced") return mmrm::PairLossMode::balanced;
  throw std::invalid_argument("unknown mode " + name);
}

template <typename T>
using Column = Tensor<T, 1>;
template <typename T>
using Rows = Tensor<T, 2>;
template <typename T>
using OptionalColumn = std::optional<Column<T>>;

template <typename T>
mmrm::PairLossInputs<T> pair_loss_inputs(const Column<T>& margin, const OptionalColumn<T>& proxy_margin,
                                         const OptionalColumn<T>& demand, const OptionalColumn<T>& weight,
                                         const std::string& mode, double label_smoothing) {
  const auto optional = [&](const OptionalColumn<T>& x) { return x ? x->at(margin.shape) : nullptr; };
  if ((mode == "standard") == proxy_margin.has_value()) throw std::invalid_argument("mode " + mode + " and its proxy");
  return {margin.at(margin.shape), optional(proxy_margin), optional(demand),      optional(weight),
          margin.shape[0],         pair_loss_mode(mode),   label_smoothing};
}

// proxy_slope is empty in mode standard.
template <typename T>
mmrm::PairLossOutputs<T> pair_loss_outputs(const mmrm::PairLossInputs<T>& in, const Column<T>& sums,
                                           const Column<T>& sfc, const Column<T>& slope, const Column<T>& proxy_slope) {
  const int64_t P = in.num_pairs;
  return {sums.at({mmrm::kNumPairLossSums}), sfc.at({P}), slope.at({P}), proxy_slope.at({in.proxy_margin ? P : 0})};
}

// Elements of one size are copied by one function.
template <typename T>
using bits_t = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <typename T>
mmrm::PackImageTokensFwd<bits_t<T>> pack_fwd(const Rows<T>& embedding, const Rows<T>& features,
                                             const Column<int64_t>& source, const Rows<T>& out) {
  const int64_t num_tokens = source.shape[0], width = embedding.shape[1];
  const auto bits = [&](const Rows<T>& x, int64_t size) { return reinterpret_cast<bits_t<T>*>(x.at({size, width})); };
  return {bits(embedding, embedding.shape[0]), bits(features, features.shape[0]), source.at({num_tokens}),
          bits(out, num_tokens),               num_tokens,                        width};
}

// The gradient of a table that does not train has no rows.
template <typename T>
mmrm::PackImageTokensBwd<T> pack_bwd(const Rows<T>& grad, const Column<int64_t>& order,
                                     const Column<int64_t>& segment_ptr, const Column<int64_t>& segment_source,
                                     const Rows<T>& grad_embedding, const Rows<T>& grad_features) {
  const int64_t V = grad_embedding.shape[0], F = grad_features.shape[0], U = segment_source.shape[0];
  const int64_t width = grad.shape[1];
  return {grad.at(grad.shape),           order.at({grad.shape[0]}),   segment_ptr.at({U + 1}), segment_source.at({U}),
          grad_embedding.at({V, width}), grad_features.at({F, width}), U, V, F, width};
}

// Adds the *_cuda functions; built where CMake finds nvcc.
void bind_cuda(pybind11::module_& m);
