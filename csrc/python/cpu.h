// What the parts of the module fastgpt._cpu share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/kernels.h"

namespace fastgpt::cpu {

namespace py = pybind11;

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int code) {
  if (code != 0 && code != 1) throw py::value_error("dtype: expected 0 (float32) or 1 (bfloat16)");
  return static_cast<DType>(code);
}

inline Activation activation_of(int code) {
  if (code < 0 || code > 5) throw py::value_error("kind: expected an activation's number, 0 to 5");
  return static_cast<Activation>(code);
}

using Strides = std::array<int64_t, 3>;  // of batch, head and time

inline AttentionTensor tensor(Address address, const Strides& strides) {
  return {at<void>(address), strides[0], strides[1], strides[2]};
}

void bind_pointwise(py::module_& m);  // activations, dropout, embedding, rope, the optimizer
void bind_products(py::module_& m);   // attention, linear, transformer_block
void bind_rows(py::module_& m);       // softmax, norms, losses

}  // namespace fastgpt::cpu
