// The module fastgpt._cpu: the CPU engine's kernels on raw addresses. Bindings only: shapes, dtypes and contiguity are
// the caller's business (fastgpt/ops/cpu.py); addresses are integers, strides and sizes count elements, dtype is 0
// (float32) or 1 (bfloat16).
#include "python/cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>
#include <vector>

using namespace fastgpt::cpu;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ SIMD kernels on raw addresses; use fastgpt.ops instead.";

  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");

  m.def("select_isa", select_isa, py::arg("name"),
        "Chooses one of available_isas(), the widest that begins with avx512 for avx512, the widest of all for an "
        "empty name.");

  m.def("available_isas", available_isas, "The instruction sets that this chip has, from the narrowest on.");

  m.def(
      "advise_huge_pages",
      [](Address address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        const Address page = Address{1} << 21;
        const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
        if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
        (void)address, (void)bytes;
#endif
      },
      "Asks the system to back memory with pages of 2 MB; nothing happens where it does not know them.");

  bind_pointwise(m);
  bind_rows(m);
  bind_products(m);
}
