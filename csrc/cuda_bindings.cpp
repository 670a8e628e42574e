// Tensors come as addresses of device memory, the stream as torch's `cuda_stream`.

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>
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

void pair_loss_fwd_cuda(const std::string& dtype, Address margin, Address proxy_margin, Address demand, Address weight,
                        int64_t num_pairs, const std::string& mode, double label_smoothing, Address sums, Address sfc,
                        Address slope, Address proxy_slope, Address scratch, int device, Address stream) {
  const DeviceGuard guard(device);
  with_dtype(dtype, [&](auto element) {
    using T = mmrm::compute_t<decltype(element)>;
    if (!std::is_same_v<T, decltype(element)>) throw py::value_error("unsupported dtype " + dtype);
    const mmrm::PairLossInputs<T> in{at<T>(margin), at<T>(proxy_margin), at<T>(demand), at<T>(weight), num_pairs,
                                     pair_loss_mode(mode), label_smoothing};
    const mmrm::PairLossOutputs<T> out{at<T>(sums), at<T>(sfc), at<T>(slope), at<T>(proxy_slope)};
    check(mmrm::launch_pair_loss_fwd(in, out, at<double>(scratch), at<CUstream_st>(stream)));
  });
}

void pack_image_tokens_fwd_cuda(const std::string& dtype, Address embedding, Address features, Address source,
                                Address out, int64_t num_tokens, int64_t width, int device, Address stream) {
  const DeviceGuard guard(device);
  with_dtype(dtype, [&](auto element) {
    using Bits = bits_t<sizeof(element)>;
    const mmrm::PackImageTokensFwd<Bits> args{at<Bits>(embedding), at<Bits>(features), at<int64_t>(source),
                                              at<Bits>(out),       num_tokens,         width};
    check(mmrm::launch_pack_image_tokens_fwd(args, at<CUstream_st>(stream)));
  });
}

// num_embeddings is 0 where the table does not train.
void pack_image_tokens_bwd_cuda(const std::string& dtype, Address grad, Address order, Address segment_ptr,
                                Address segment_source, Address grad_embedding, Address grad_features,
                                int64_t num_segments, int64_t num_embeddings, int64_t num_features, int64_t width,
                                int device, Address stream) {
  const DeviceGuard guard(device);
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const mmrm::PackImageTokensBwd<T> args{at<T>(grad),
                                           at<int64_t>(order),
                                           at<int64_t>(segment_ptr),
                                           at<int64_t>(segment_source),
                                           at<T>(grad_embedding),
                                           at<T>(grad_features),
                                           num_segments,
                                           num_embeddings,
                                           num_features,
                                           width};
    check(mmrm::launch_pack_image_tokens_bwd(args, at<CUstream_st>(stream)));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_architectures") = std::vector<int>{MMRM_CUDA_ARCHITECTURES};
  m.def("cuda_devices", &cuda_devices);
  m.def("cuda_versions", &cuda_versions);
  m.def("pair_loss_scratch_size", &mmrm::pair_loss_scratch_size, py::arg("num_pairs"));
  m.def("pair_loss_fwd_cuda", &pair_loss_fwd_cuda, py::arg("dtype"), py::arg("margin"), py::arg("proxy_margin"),
        py::arg("demand"), py::arg("weight"), py::arg("num_pairs"), py::arg("mode"), py::arg("label_smoothing"),
        py::arg("sums"), py::arg("sfc"), py::arg("slope"), py::arg("proxy_slope"), py::arg("scratch"),
        py::arg("device"), py::arg("stream"));
  m.def("pack_image_tokens_fwd_cuda", &pack_image_tokens_fwd_cuda, py::arg("dtype"), py::arg("embedding"),
        py::arg("features"), py::arg("source"), py::arg("out"), py::arg("num_tokens"), py::arg("width"),
        py::arg("device"), py::arg("stream"));
  m.def("pack_image_tokens_bwd_cuda", &pack_image_tokens_bwd_cuda, py::arg("dtype"), py::arg("grad"), py::arg("order"),
        py::arg("segment_ptr"), py::arg("segment_source"), py::arg("grad_embedding"), py::arg("grad_features"),
        py::arg("num_segments"), py::arg("num_embeddings"), py::arg("num_features"), py::arg("width"),
        py::arg("device"), py::arg("stream"));
}
