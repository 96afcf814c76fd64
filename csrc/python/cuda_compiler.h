// How the kernels of fastgpt._cuda are compiled.
#pragma once

#include <pybind11/pybind11.h>

namespace fastgpt::cuda {

void bind_compiler(pybind11::module_& m);

}  // namespace fastgpt::cuda
