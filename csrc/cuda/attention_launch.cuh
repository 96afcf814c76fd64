// What the launchers of the attention kernels check, and how they launch. Host code.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/attention_params.cuh"
#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::attention {

// The two types that the tensor cores take here.
template <class F>
void with_half_type(cuda::Type type, const F& f) {
  if (type == cuda::Type::kBFloat16) return f(bf16{});
  if (type == cuda::Type::kFloat16) return f(f16{});
  throw std::invalid_argument("type: expected 1 (bfloat16) or 2 (float16), got " +
                              std::to_string(static_cast<int>(type)));
}

// Raises std::invalid_argument where the kernels cannot read a tensor 16 bytes at a time.
inline void check_rows(const char* name, const void* pointer, const Strides& s) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 || s.batch % 8 || s.head % 8 || s.row % 8) {
    throw std::invalid_argument(std::string(name) + ": rows must be 16-byte aligned; got strides " +
                                std::to_string(s.batch) + ", " + std::to_string(s.head) + ", " + std::to_string(s.row));
  }
}

inline void check_shape(const Params& p) {
  if (p.batch < 1 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || p.queries < 1 || p.keys < 1) {
    throw std::invalid_argument("attention: expected sizes of 1 and more and heads a multiple of kv_heads; got batch " +
                                std::to_string(p.batch) + ", heads " + std::to_string(p.heads) + ", kv_heads " +
                                std::to_string(p.kv_heads) + ", queries " + std::to_string(p.queries) + ", keys " +
                                std::to_string(p.keys));
  }
  if (p.batch > 65535 || p.heads > 65535) throw std::invalid_argument("attention: batch and heads are at most 65535");
  if (!(p.scale > 0.0f)) throw std::invalid_argument("scale: must be positive, got " + std::to_string(p.scale));
}

inline void check_backward(const Params& p) {
  check_shape(p);
  check_rows("query", p.query, p.query_stride);
  check_rows("key", p.key, p.key_stride);
  check_rows("value", p.value, p.value_stride);
  check_rows("out", p.out, p.out_stride);
  check_rows("grad", p.grad, p.grad_stride);
  check_rows("grad_query", p.grad_query, p.grad_query_stride);
  check_rows("grad_key", p.grad_key, p.grad_key_stride);
  check_rows("grad_value", p.grad_value, p.grad_value_stride);
}

// A launch that may take more than 48 KB of shared memory, which a kernel has to be allowed first.
template <class... P, class... A>
void launch_large(void (*kernel)(P...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream, A... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    throw std::runtime_error("attention: " + std::to_string(shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  }
  launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace fastgpt::attention
