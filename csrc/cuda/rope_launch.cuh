// The choice of a rotary embedding's kernel, shared by rope.cu and the emulation's tests.
#pragma once

#include "cuda/dispatch.cuh"
#include "cuda/launch.cuh"
#include "cuda/rope.cuh"

namespace fastgpt::cuda {

template <class T>
void launch_rope(const RopeArgs& a, cudaStream_t stream) {
  constexpr int kN = kWide<T>;
  bool wide = aligned({a.x, a.y}, 0) && aligned({a.cos, a.sin}, 0) && a.pairs % kN == 0 && a.head_dim % kN == 0;
  for (int i = 0; i < 3; ++i) wide = wide && a.x_stride[i] % kN == 0 && a.y_stride[i] % kN == 0;
  wide = wide && reinterpret_cast<std::uintptr_t>(a.cos) % 32 == 0 && reinterpret_cast<std::uintptr_t>(a.sin) % 32 == 0;
  const int64_t work = a.batch * a.length * a.heads * ((a.head_dim - a.pairs) / (wide ? kN : 1));
  if (work == 0) return;
  const dim3 grid(blocks_of(std::min<int64_t>(132 * 16, (work + 255) / 256)));
  if (a.interleaved) {
    launch(wide ? rope_kernel<T, kN, true> : rope_kernel<T, 1, true>, grid, dim3(256), 0, stream, a);
  } else {
    launch(wide ? rope_kernel<T, kN, false> : rope_kernel<T, 1, false>, grid, dim3(256), 0, stream, a);
  }
}

}  // namespace fastgpt::cuda
