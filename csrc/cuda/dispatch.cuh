// From run-time types to templates, and the checks that launchers share.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"

namespace fastgpt::cuda {

template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kFloat32:
      return f(float{});
    case Type::kBFloat16:
      return f(bf16{});
    case Type::kFloat16:
      return f(f16{});
  }
  throw std::invalid_argument("type: expected 0 (float32), 1 (bfloat16) or 2 (float16)");
}

// Calls f(T{}, P{}) for parameters of the rows' type or of float32.
template <class F>
void with_param_type(Type type, Type param_type, const F& f) {
  with_type(type, [&](auto t) {
    if (param_type == type) return f(t, t);
    if (param_type == Type::kFloat32) return f(t, float{});
    throw std::invalid_argument("parameters have the rows' type or float32");
  });
}

// Whether rows of `bytes` bytes from all these addresses on can be read 16 bytes at a time.
inline bool aligned(std::initializer_list<const void*> pointers, int64_t bytes) {
  return bytes % 16 == 0 && std::all_of(pointers.begin(), pointers.end(),
                                        [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

inline unsigned blocks_of(int64_t n) {
  if (n < 1 || n > 2147483647) throw std::invalid_argument("a launch takes 1 to 2^31 - 1 blocks");
  return static_cast<unsigned>(n);
}

}  // namespace fastgpt::cuda
