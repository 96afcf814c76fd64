// Stands for csrc/cuda/launch.cuh where the tests only compile.
#pragma once

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
}
