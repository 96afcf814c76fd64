// y = x mask / (1 - p), plus a residual; the backward is the same function of the gradient.
//
// Element i is dropped where word i % 4 of philox4x32_10(counter = i / 4, key = seed) is below p 2^32 (Salmon et al.,
// SC11): the mask of every other engine for the same seed. A thread makes the four words of one counter and handles its
// four elements, so the accesses are 8 bytes for half types and 16 for fp32.
#pragma once

#include "cuda/dtype.cuh"
#include "cuda/kernels.cuh"
#include "cuda/philox.cuh"

namespace fastgpt::cuda {

constexpr int kDropoutThreads = 256;

// X: of x, T: of the residual and the result. kAligned: every pointer allows accesses of four elements.
template <class X, class T, bool kAligned>
__global__ void __launch_bounds__(kDropoutThreads) dropout_kernel(DropoutArgs a) {
  const X* x = static_cast<const X*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const uint64_t seed = static_cast<uint64_t>(*a.seed);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; 4 * c < a.n; c += step) {
    const PhiloxWords w = philox(c, seed);
    const int64_t first = 4 * c;
    const auto factor = [&](int e) { return w.word[e] >= a.threshold ? a.scale : 0.0f; };
    if (kAligned && first + 4 <= a.n) {
      const Vector<X, 4> v = load<4>(x + first);
      Vector<T, 4> r, out;
      if (residual != nullptr) r = load<4>(residual + first);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float kept = to_float(v.v[e]) * factor(e);
        out.v[e] = from_float<T>(residual != nullptr ? kept + to_float(r.v[e]) : kept);
      }
      store<4>(y + first, out);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (first + e >= a.n) continue;
      const float kept = to_float(x[first + e]) * factor(e);
      y[first + e] = from_float<T>(residual != nullptr ? kept + to_float(residual[first + e]) : kept);
    }
  }
}

}  // namespace fastgpt::cuda
