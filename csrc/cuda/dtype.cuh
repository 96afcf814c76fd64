// The three element types, and vectors of them of one access: 16 bytes where addresses allow, else one element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastgpt {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// The elements of one 16-byte access.
template <class T>
constexpr int kWide = 16 / sizeof(T);

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* at) {
  return *reinterpret_cast<const Vector<T, N>*>(at);
}
template <int N, class T>
__device__ __forceinline__ void store(T* at, const Vector<T, N>& x) {
  *reinterpret_cast<Vector<T, N>*>(at) = x;
}

}  // namespace fastgpt
