#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cuda_ops.h"

namespace py = pybind11;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Compute capabilities of the visible devices; none without a driver.
std::vector<std::pair<int, int>> cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // or it would be reported by the next launch
    return {};
  }
  std::vector<std::pair<int, int>> capabilities(count);
  for (int device = 0; device < count; ++device) {
    check(cudaDeviceGetAttribute(&capabilities[device].first, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&capabilities[device].second, cudaDevAttrComputeCapabilityMinor, device));
  }
  return capabilities;
}

// Of the driver (0 without one) and of this module's cudart, as 1000 * major + 10 * minor.
std::pair<int, int> cuda_versions() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver));
  return {driver, CUDART_VERSION};
}

// torch's `cuda_stream`.
cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

template <typename T>
void pair_loss_fwd_cuda(const Column<T>& margin, const OptionalColumn<T>& proxy_margin, const OptionalColumn<T>& demand,
                        const OptionalColumn<T>& weight, const std::string& mode, double label_smoothing,
                        const Column<T>& sums, const Column<T>& sfc, const Column<T>& slope,
                        const Column<T>& proxy_slope, const Column<double>& scratch, uintptr_t stream) {
  const DeviceGuard guard(margin.device);
  const auto in = pair_loss_inputs<T>(margin, proxy_margin, demand, weight, mode, label_smoothing);
  double* chunk_sums = scratch.at({mmrm::pair_loss_scratch_size(in.num_pairs)});
  check(mmrm::launch_pair_loss_fwd(in, pair_loss_outputs(in, sums, sfc, slope, proxy_slope), chunk_sums,
                                   stream_of(stream)));
}

template <typename T>
void pack_image_tokens_fwd_cuda(const Rows<T>& embedding, const Rows<T>& features, const Column<int64_t>& source,
                                const Rows<T>& out, uintptr_t stream) {
  const DeviceGuard guard(embedding.device);
  check(mmrm::launch_pack_image_tokens_fwd(pack_fwd(embedding, features, source, out), stream_of(stream)));
}

template <typename T>
void pack_image_tokens_bwd_cuda(const Rows<T>& grad, const Column<int64_t>& order, const Column<int64_t>& segment_ptr,
                                const Column<int64_t>& segment_source, const Rows<T>& grad_embedding,
                                const Rows<T>& grad_features, uintptr_t stream) {
  const DeviceGuard guard(grad.device);
  const auto args = pack_bwd(grad, order, segment_ptr, segment_source, grad_embedding, grad_features);
  check(mmrm::launch_pack_image_tokens_bwd(args, stream_of(stream)));
}

template <typename T>
void bind_pack_image_tokens(py::module_& m) {
  m.def("pack_image_tokens_fwd_cuda", &pack_image_tokens_fwd_cuda<T>);
  m.def("pack_image_tokens_bwd_cuda", &pack_image_tokens_bwd_cuda<T>);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_architectures") = std::vector<int>{MMRM_CUDA_ARCHITECTURES};
  m.def("cuda_devices", &cuda_devices);
  m.def("cuda_versions", &cuda_versions);
  m.def("pair_loss_scratch_size", &mmrm::pair_loss_scratch_size, py::arg("num_pairs"));
  m.def("pair_loss_fwd_cuda", &pair_loss_fwd_cuda<float>);
  m.def("pair_loss_fwd_cuda", &pair_loss_fwd_cuda<double>);
  bind_pack_image_tokens<float>(m), bind_pack_image_tokens<double>(m);
  bind_pack_image_tokens<mmrm::bf16_t>(m), bind_pack_image_tokens<mmrm::fp16_t>(m);
}
