// Two launchers of csrc/cuda in their form without nvcc, for tests/test_cuda_nvrtc.py to call from ctypes.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/kernels.cuh"
#include "nvrtc/driver.h"

namespace {

using Callback = const char* (*)(const char* expression, int major, int minor, const char** code, size_t* size);
std::string error;

template <class F>
const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

extern "C" {
void test_set_compiler(Callback compile) {
  fastgpt::nvrtc::set_compiler([compile](const std::string& expression, int major, int minor) {
    const char* code = nullptr;
    size_t size = 0;
    const char* name = compile(expression.c_str(), major, minor, &code, &size);
    if (name == nullptr) throw std::runtime_error("refused");
    return std::pair(std::string(name), std::string(code, size));
  });
}

const char* test_dropout(int type, unsigned long long y, long long n, unsigned long long stream) {
  return guarded([&] {
    fastgpt::cuda::DropoutArgs a = {};
    a.x = reinterpret_cast<void*>(4096), a.y = reinterpret_cast<void*>(y), a.n = n;
    fastgpt::cuda::dropout(static_cast<fastgpt::cuda::Type>(type), static_cast<fastgpt::cuda::Type>(type), a, stream);
  });
}

const char* test_attention(int queries) {
  return guarded([&] {
    fastgpt::attention::Params p = {};
    p.query = p.key = p.value = p.out = reinterpret_cast<void*>(4096);
    p.batch = p.kv_heads = 1, p.heads = 2, p.queries = p.keys = queries, p.dim = 64, p.scale = 1.0f, p.causal = true;
    p.query_stride = p.key_stride = p.value_stride = p.out_stride = {64, 64, 64};
    fastgpt::cuda::attention_sm90(fastgpt::cuda::Type::kBFloat16, p, 0);
  });
}

const char* test_why_no_device() { return fastgpt::cuda::why_no_device(); }
}
