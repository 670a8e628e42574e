#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "pair_loss.h"
#include "plan_trie.h"

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

mmrm::SfcMode sfc_mode(const std::string& name) {
  if (name == "standard") return mmrm::SfcMode::standard;
  if (name == "paper" || name == "normalized") return mmrm::SfcMode::paper;
  if (name == "reference") return mmrm::SfcMode::reference;
  throw py::value_error("unknown mode " + name);
}

template <typename T>
const T* data_or_null(const std::optional<Array<T>>& array) {
  return array ? array->data() : nullptr;
}

template <typename T>
void pair_loss_fwd_cpu(const Array<T>& rewards, const std::optional<Array<T>>& proxy_rewards,
                       const Array<int64_t>& chosen, const Array<int64_t>& rejected,
                       const std::optional<Array<T>>& margin, const std::optional<Array<T>>& weight,
                       const Array<int64_t>& row_ptr, const Array<int64_t>& row_entry, const std::string& mode,
                       double label_smoothing, double centering, bool warmup, double floor, Array<T> sums, Array<T> sfc,
                       Array<T> grad_rewards, Array<T> grad_proxy, int num_threads) {
  const mmrm::PairLossInputs<T> in{rewards.data(),       data_or_null(proxy_rewards), chosen.data(),
                                   rejected.data(),      data_or_null(margin),        data_or_null(weight),
                                   row_ptr.data(),       row_entry.data(),            rewards.size(),
                                   chosen.size()};
  const mmrm::PairLossOptions options{sfc_mode(mode), label_smoothing, centering, warmup, floor};
  const mmrm::PairLossOutputs<T> out{sums.mutable_data(), sfc.mutable_data(), grad_rewards.mutable_data(),
                                     grad_proxy.mutable_data()};
  py::gil_scoped_release release;
  mmrm::pair_loss_fwd_cpu(in, options, out, num_threads);
}

template <typename T>
void bind_pair_loss(py::module_& m) {
  m.def("pair_loss_fwd_cpu", &pair_loss_fwd_cpu<T>, py::arg("rewards").noconvert(),
        py::arg("proxy_rewards").noconvert(), py::arg("chosen").noconvert(), py::arg("rejected").noconvert(),
        py::arg("margin").noconvert(), py::arg("weight").noconvert(), py::arg("row_ptr").noconvert(),
        py::arg("row_entry").noconvert(), py::arg("mode"), py::arg("label_smoothing"), py::arg("centering"),
        py::arg("warmup"), py::arg("floor"), py::arg("sums").noconvert(), py::arg("sfc").noconvert(),
        py::arg("grad_rewards").noconvert(), py::arg("grad_proxy").noconvert(), py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("plan_trie_cpu", &plan_trie_cpu, py::arg("keys").noconvert(), py::arg("cu_seqlens").noconvert(),
        py::arg("min_shared"));
  bind_pair_loss<float>(m);
  bind_pair_loss<double>(m);
}
