// The attention functions of the module fastgpt._cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace fastgpt::cuda {

void bind_attention(pybind11::module_& m);

}  // namespace fastgpt::cuda
