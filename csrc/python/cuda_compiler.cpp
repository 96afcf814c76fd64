// The module's functions about its compiler; FASTGPT_NVRTC is defined where the package is built without nvcc.
#include "python/cuda_compiler.h"

#include "cuda/kernels.cuh"
#ifdef FASTGPT_NVRTC
#include "nvrtc/driver.h"
#endif

namespace py = pybind11;

namespace fastgpt::cuda {

void bind_compiler(py::module_& m) {
  m.def("compiler", &compiler, "nvcc: compiled with the package; nvrtc: each kernel at its first use.");
  m.def(
      "set_compiler",
      [](const py::function& compile) {
#ifdef FASTGPT_NVRTC
        // Never freed: a launch may come when the interpreter is already going.
        auto* kept = new py::function(compile);
        nvrtc::set_compiler([kept](const std::string& expression, int major, int minor) {
          const py::gil_scoped_acquire gil;
          const py::tuple result = (*kept)(expression, major, minor);
          return std::pair(result[0].cast<std::string>(), result[1].cast<std::string>());
        });
#else
        (void)compile;
        throw std::logic_error("the kernels were compiled by nvcc");
#endif
      },
      py::arg("compile"), "Set (name in C++, compute capability) -> (name in machine code, machine code).");
}

}  // namespace fastgpt::cuda
