// launch() of csrc/cuda/launch.cuh for kernels that NVRTC compiles.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  std::tuple<P...> values(static_cast<P>(arguments)...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        fastgpt::nvrtc::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, pointers);
      },
      values);
}
