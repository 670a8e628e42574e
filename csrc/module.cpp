#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "plan_trie.h"
#include "resize_bicubic.h"
#include "trie_attention.h"

namespace py = pybind11;

namespace {

// Bound with noconvert(): an array of another dtype or layout is refused, never copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// The array takes over the vector's memory.
template <typename T>
py::array_t<T> to_array(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  const std::vector<T>& kept = *owned.release();
  return py::array_t<T>(kept.size(), kept.data(), owner);
}

py::tuple plan_trie_cpu(const Array<int64_t>& keys, const Array<int64_t>& cu_seqlens, int64_t min_shared) {
  mmrm::TriePlan plan;
  {
    py::gil_scoped_release release;
    plan = mmrm::plan_trie(keys.data(), cu_seqlens.data(), cu_seqlens.size() - 1, min_shared);
  }
  return py::make_tuple(to_array(std::move(plan.token_index)), to_array(std::move(plan.position_ids)),
                        to_array(std::move(plan.cu_seqlens_q)), to_array(std::move(plan.kv_index)),
                        to_array(std::move(plan.cu_seqlens_k)), to_array(std::move(plan.last_index)));
}

void resize_bicubic_cpu(const Array<uint8_t>& image, Array<uint8_t>& tiles, int64_t columns, int64_t rows,
                        bool vertical_first) {
  const bool are_right = image.ndim() == 3 && image.shape(2) == 3 && image.size() > 0 && tiles.ndim() == 4 &&
                         tiles.shape(1) == tiles.shape(2) && tiles.shape(3) == 3 && tiles.size() > 0 && columns > 0 &&
                         rows > 0 && columns <= tiles.shape(0) && tiles.shape(0) == columns * rows;
  if (!are_right) throw py::value_error("resize_bicubic_cpu takes [H, W, 3] and [columns * rows, S, S, 3]");
  const mmrm::ResizeBicubicArgs args{image.data(), tiles.mutable_data(), image.shape(0),  image.shape(1),
                                     columns,      rows,                 tiles.shape(1), vertical_first};
  py::gil_scoped_release release;
  mmrm::resize_bicubic_cpu(args);
}

template <typename T>
void pair_loss_fwd_cpu(const Column<T>& margin, const OptionalColumn<T>& proxy_margin, const OptionalColumn<T>& demand,
                       const OptionalColumn<T>& weight, const std::string& mode, double label_smoothing,
                       const Column<T>& sums, const Column<T>& sfc, const Column<T>& slope, const Column<T>& proxy_slope,
                       int num_threads) {
  const auto in = pair_loss_inputs<T>(margin, proxy_margin, demand, weight, mode, label_smoothing);
  mmrm::pair_loss_fwd_cpu(in, pair_loss_outputs(in, sums, sfc, slope, proxy_slope), num_threads);
}

template <typename T>
void pack_image_tokens_fwd_cpu(const Rows<T>& embedding, const Rows<T>& features, const Column<int64_t>& source,
                               const Rows<T>& out, int num_threads) {
  mmrm::pack_image_tokens_fwd_cpu(pack_fwd(embedding, features, source, out), embedding.shape[0], features.shape[0],
                                  num_threads);
}

template <typename T>
void pack_image_tokens_bwd_cpu(const Rows<T>& grad, const Column<int64_t>& order, const Column<int64_t>& segment_ptr,
                               const Column<int64_t>& segment_source, const Rows<T>& grad_embedding,
                               const Rows<T>& grad_features, int num_threads) {
  mmrm::pack_image_tokens_bwd_cpu(
      pack_bwd(grad, order, segment_ptr, segment_source, grad_embedding, grad_features), grad.shape[0], num_threads);
}

template <typename T>
using Heads = Tensor<T, 3>;

template <typename T>
mmrm::HeadRows<T> head_rows(const Heads<T>& x, const Heads<T>& like) {
  if (x.shape != like.shape) throw std::invalid_argument("heads of different shapes");
  if (x.shape[2] > 1 && x.strides[2] != 1) throw std::invalid_argument("a head's values are not contiguous");
  return {x.data, x.strides[0], x.strides[1]};
}

template <typename T>
mmrm::HeadRows<const T> const_rows(const Heads<T>& x, const Heads<T>& like) {
  const auto rows = head_rows(x, like);
  return {rows.data, rows.token_stride, rows.head_stride};
}

template <typename T>
mmrm::TrieAttention<T> trie_attention(const Heads<T>& q, const Heads<T>& k, const Heads<T>& v,
                                      const Column<int32_t>& cu_seqlens_q, const Column<int64_t>& kv_index,
                                      const Column<int32_t>& cu_seqlens_k, double scale, bool causal,
                                      std::optional<int64_t> window) {
  const int64_t num_edges = cu_seqlens_q.shape[0], num_keys = kv_index.shape[0];
  if (q.shape[2] != k.shape[2]) throw std::invalid_argument("queries and keys of different sizes");
  return {{cu_seqlens_q.at({num_edges}), kv_index.at({num_keys}), cu_seqlens_k.at({num_edges}), num_edges - 1, num_keys},
          const_rows(q, q), const_rows(k, k), const_rows(v, k),
          q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[0], float(scale), causal,
          window.value_or(INT64_MAX)};
}

template <typename T>
void trie_attention_fwd_cpu(const Heads<T>& q, const Heads<T>& k, const Heads<T>& v,
                            const Column<int32_t>& cu_seqlens_q, const Column<int64_t>& kv_index,
                            const Column<int32_t>& cu_seqlens_k, double scale, bool causal,
                            std::optional<int64_t> window, const Heads<T>& out, const Rows<float>& lse,
                            int num_threads) {
  mmrm::trie_attention_fwd_cpu(trie_attention(q, k, v, cu_seqlens_q, kv_index, cu_seqlens_k, scale, causal, window),
                               head_rows(out, q), lse.at({q.shape[1], q.shape[0]}), num_threads);
}

template <typename T>
void trie_attention_bwd_cpu(const Heads<T>& grad, const Heads<T>& q, const Heads<T>& k, const Heads<T>& v,
                            const Heads<T>& out, const Rows<float>& lse, const Column<int32_t>& cu_seqlens_q,
                            const Column<int64_t>& kv_index, const Column<int32_t>& cu_seqlens_k, double scale,
                            bool causal, std::optional<int64_t> window, const Heads<T>& dq, const Heads<float>& dk,
                            const Heads<float>& dv, int num_threads) {
  const mmrm::TrieAttentionGrads<T> grads{const_rows(grad, q), const_rows(out, q), lse.at({q.shape[1], q.shape[0]}),
                                          head_rows(dq, q),    dk.at(k.shape),     dv.at(k.shape)};
  mmrm::trie_attention_bwd_cpu(trie_attention(q, k, v, cu_seqlens_q, kv_index, cu_seqlens_k, scale, causal, window),
                               grads, num_threads);
}

const py::call_guard<py::gil_scoped_release> without_gil;

template <typename T>
void bind_pair_loss(py::module_& m) {
  m.def("pair_loss_fwd_cpu", &pair_loss_fwd_cpu<T>, without_gil);
}

template <typename T>
void bind_pack_image_tokens(py::module_& m) {
  m.def("pack_image_tokens_fwd_cpu", &pack_image_tokens_fwd_cpu<T>, without_gil);
  m.def("pack_image_tokens_bwd_cpu", &pack_image_tokens_bwd_cpu<T>, without_gil);
}

template <typename T>
void bind_trie_attention(py::module_& m) {
  m.def("trie_attention_fwd_cpu", &trie_attention_fwd_cpu<T>, without_gil);
  m.def("trie_attention_bwd_cpu", &trie_attention_bwd_cpu<T>, without_gil);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("sources") = MMRM_SOURCES;
  m.def("plan_trie_cpu", &plan_trie_cpu, py::arg("keys").noconvert(), py::arg("cu_seqlens").noconvert(),
        py::arg("min_shared"));
  m.def("resize_bicubic_cpu", &resize_bicubic_cpu, py::arg("image").noconvert(), py::arg("tiles").noconvert(),
        py::arg("columns"), py::arg("rows"), py::arg("vertical_first"));
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;
#endif
#ifdef MMRM_CUDA_ARCHITECTURES
  bind_cuda(m);
#endif
  m.def("has_trie_attention_cpu", &mmrm::has_trie_attention_cpu);
  bind_pair_loss<float>(m), bind_pair_loss<double>(m);
  bind_pack_image_tokens<float>(m), bind_pack_image_tokens<double>(m);
  bind_pack_image_tokens<mmrm::bf16_t>(m), bind_pack_image_tokens<mmrm::fp16_t>(m);
  bind_trie_attention<float>(m), bind_trie_attention<mmrm::bf16_t>(m);
}
