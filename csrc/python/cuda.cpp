// The module fastgpt._cuda: launchers of csrc/cuda on addresses; shapes and dtypes are checked by fastgpt/ops/cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/kernels.cuh"
#include "python/cuda_attention.h"
#include "python/cuda_compiler.h"

namespace py = pybind11;
using namespace fastgpt::cuda;

void bind_memory_bound(py::module_& m);  // cuda_memory.cpp

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_softmax(int type, Address x, Address y_in, Address y, Address mask, const std::array<int64_t, 3>& mask_stride,
                  int64_t batch, int64_t heads, int64_t queries, int64_t cols, float scale, bool causal, bool log,
                  bool backward, Address stream) {
  const SoftmaxArgs a = {at<void>(x),
                         at<void>(y_in),
                         at<void>(y),
                         at<float>(mask),
                         {mask_stride[0], mask_stride[1], mask_stride[2]},
                         batch,
                         heads,
                         queries,
                         cols,
                         scale,
                         causal,
                         log};
  (backward ? softmax_backward : softmax)(static_cast<Type>(type), a, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  bind_memory_bound(m);
  m.doc() = "CUDA kernels on device addresses. For fastgpt.ops, which checks shapes and dtypes first.";
  m.def(
      "why_no_device",
      []() -> py::object {
        const char* reason = why_no_device();
        return reason == nullptr ? py::object(py::none()) : py::object(py::str(reason));
      },
      "Why no device can be used, or None where one can.");
  bind_attention(m);
  bind_compiler(m);
  m.def("softmax", &bind_softmax, py::arg("type"), py::arg("x"), py::arg("y_in"), py::arg("y"), py::arg("mask"),
        py::arg("mask_stride"), py::arg("batch"), py::arg("heads"), py::arg("queries"), py::arg("cols"),
        py::arg("scale"), py::arg("causal"), py::arg("log"), py::arg("backward"), py::arg("stream"));
  m.def(
      "activation",
      [](int kind, int type, Address x, Address y, int64_t n, Address stream) {
        activation(static_cast<Type>(type), {at<void>(x), nullptr, at<void>(y), n, static_cast<Activation>(kind)},
                   stream);
      },
      py::arg("kind"), py::arg("type"), py::arg("x"), py::arg("y"), py::arg("n"), py::arg("stream"));
  m.def(
      "activation_backward",
      [](int kind, int type, Address grad, Address kept, Address dx, int64_t n, Address stream) {
        activation_backward(static_cast<Type>(type),
                            {at<void>(grad), at<void>(kept), at<void>(dx), n, static_cast<Activation>(kind)}, stream);
      },
      py::arg("kind"), py::arg("type"), py::arg("grad"), py::arg("kept"), py::arg("dx"), py::arg("n"),
      py::arg("stream"));
  m.def(
      "dropout",
      [](int x_type, int type, Address x, Address residual, Address y, int64_t n, Address seed, uint32_t threshold,
         float scale, Address stream) {
        dropout(static_cast<Type>(x_type), static_cast<Type>(type),
                {at<void>(x), at<void>(residual), at<void>(y), n, at<int64_t>(seed), threshold, scale}, stream);
      },
      py::arg("x_type"), py::arg("type"), py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("n"),
      py::arg("seed"), py::arg("threshold"), py::arg("scale"), py::arg("stream"));
  m.def(
      "swiglu",
      [](int kind, int type, Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address y, int64_t rows,
         int64_t cols, Address stream) {
        swiglu(static_cast<Type>(type),
               {at<void>(gate), at<void>(up), nullptr, at<void>(y), nullptr, gate_stride, up_stride, cols, rows, cols,
                static_cast<Activation>(kind)},
               stream);
      },
      py::arg("kind"), py::arg("type"), py::arg("gate"), py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"),
      py::arg("y"), py::arg("rows"), py::arg("cols"), py::arg("stream"));
  m.def(
      "swiglu_backward",
      [](int kind, int type, Address grad, Address gate, int64_t gate_stride, Address up, int64_t up_stride,
         Address dgate, Address dup, int64_t out_stride, int64_t rows, int64_t cols, Address stream) {
        swiglu_backward(static_cast<Type>(type),
                        {at<void>(gate), at<void>(up), at<void>(grad), at<void>(dgate), at<void>(dup), gate_stride,
                         up_stride, out_stride, rows, cols, static_cast<Activation>(kind)},
                        stream);
      },
      py::arg("kind"), py::arg("type"), py::arg("grad"), py::arg("gate"), py::arg("gate_stride"), py::arg("up"),
      py::arg("up_stride"), py::arg("dgate"), py::arg("dup"), py::arg("out_stride"), py::arg("rows"), py::arg("cols"),
      py::arg("stream"));
}
