#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings.h"
#include "pack_image_tokens.h"
#include "pair_loss.h"
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

void pair_loss_fwd_cpu(const std::string& dtype, Address margin, Address proxy_margin, Address demand, Address weight,
                       int64_t num_pairs, const std::string& mode, double label_smoothing, Address sums, Address sfc,
                       Address slope, Address proxy_slope, int num_threads) {
  with_dtype(dtype, [&](auto element) {
    using T = mmrm::compute_t<decltype(element)>;
    if (!std::is_same_v<T, decltype(element)>) throw py::value_error("unsupported dtype " + dtype);
    mmrm::pair_loss_fwd_cpu<T>({at<T>(margin), at<T>(proxy_margin), at<T>(demand), at<T>(weight), num_pairs,
                                pair_loss_mode(mode), label_smoothing},
                               {at<T>(sums), at<T>(sfc), at<T>(slope), at<T>(proxy_slope)}, num_threads);
  });
}

void pack_image_tokens_fwd_cpu(const std::string& dtype, Address embedding, Address features, Address source,
                               Address out, int64_t num_embeddings, int64_t num_features, int64_t num_tokens,
                               int64_t width, int num_threads) {
  with_dtype(dtype, [&](auto element) {
    using Bits = bits_t<sizeof(element)>;
    mmrm::pack_image_tokens_fwd_cpu<Bits>(
        {at<Bits>(embedding), at<Bits>(features), at<int64_t>(source), at<Bits>(out), num_tokens, width},
        num_embeddings, num_features, num_threads);
  });
}

// num_embeddings is 0 where the table does not train.
void pack_image_tokens_bwd_cpu(const std::string& dtype, Address grad, Address order, Address segment_ptr,
                               Address segment_source, Address grad_embedding, Address grad_features,
                               int64_t num_segments, int64_t num_embeddings, int64_t num_features, int64_t num_tokens,
                               int64_t width, int num_threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    mmrm::pack_image_tokens_bwd_cpu<T>(
        {at<T>(grad), at<int64_t>(order), at<int64_t>(segment_ptr), at<int64_t>(segment_source), at<T>(grad_embedding),
         at<T>(grad_features), num_segments, num_embeddings, num_features, width},
        num_tokens, num_threads);
  });
}

using Strides = std::pair<int64_t, int64_t>;  // of tokens and heads

template <typename T>
mmrm::HeadRows<T> rows_at(Address data, Strides strides) {
  return {at<T>(data), strides.first, strides.second};
}

template <typename T>
mmrm::TrieAttention<T> trie_attention(const std::vector<Address>& plan, const std::vector<int64_t>& sizes, double scale,
                                      bool causal, const std::vector<Address>& qkv,
                                      const std::vector<Strides>& strides) {
  return {{at<int32_t>(plan[0]), at<int64_t>(plan[1]), at<int32_t>(plan[2]), sizes[0], sizes[6]},
          rows_at<const T>(qkv[0], strides[0]), rows_at<const T>(qkv[1], strides[1]),
          rows_at<const T>(qkv[2], strides[2]), sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], float(scale), causal};
}

// Of the types that trie_attention takes.
template <typename F>
void with_attention_dtype(const std::string& dtype, F f) {
  if (dtype == "torch.float32") return f(float{});
  if (dtype == "torch.bfloat16") return f(mmrm::bf16_t{});
  throw py::value_error("unsupported dtype " + dtype);
}

// plan: cu_seqlens_q, kv_index, cu_seqlens_k; sizes: N, T, H, G, E, S, K; out and its lse are contiguous.
void trie_attention_fwd_cpu(const std::string& dtype, const std::vector<Address>& plan,
                            const std::vector<int64_t>& sizes, double scale, bool causal,
                            const std::vector<Address>& qkv, const std::vector<Strides>& strides, Address out,
                            Address lse, int num_threads) {
  with_attention_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Strides dense{sizes[2] * sizes[4], sizes[4]};
    mmrm::trie_attention_fwd_cpu<T>(trie_attention<T>(plan, sizes, scale, causal, qkv, strides), rows_at<T>(out, dense),
                                    at<float>(lse), num_threads);
  });
}

// grad and out come after q, k and v in `inputs`; dq, dk and dv are contiguous.
void trie_attention_bwd_cpu(const std::string& dtype, const std::vector<Address>& plan,
                            const std::vector<int64_t>& sizes, double scale, bool causal,
                            const std::vector<Address>& inputs, const std::vector<Strides>& strides, Address lse,
                            Address dq, Address dk, Address dv, int num_threads) {
  with_attention_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const Strides dense{sizes[2] * sizes[4], sizes[4]};
    mmrm::trie_attention_bwd_cpu<T>(
        trie_attention<T>(plan, sizes, scale, causal, inputs, strides),
        {rows_at<const T>(inputs[3], strides[3]), rows_at<const T>(inputs[4], strides[4]), at<float>(lse),
         rows_at<T>(dq, dense), at<float>(dk), at<float>(dv)},
        num_threads);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
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
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("pack_image_tokens_fwd_cpu", &pack_image_tokens_fwd_cpu, without_gil);
  m.def("pack_image_tokens_bwd_cpu", &pack_image_tokens_bwd_cpu, without_gil);
  m.def("pair_loss_fwd_cpu", &pair_loss_fwd_cpu, without_gil);
  m.def("has_trie_attention_cpu", &mmrm::has_trie_attention_cpu);
  m.def("trie_attention_fwd_cpu", &trie_attention_fwd_cpu, without_gil);
  m.def("trie_attention_bwd_cpu", &trie_attention_bwd_cpu, without_gil);
}
