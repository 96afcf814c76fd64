// The one place where a kernel is launched; tests/emu has another launch() of this signature.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// Raises where the driver refuses the launch. What a kernel does wrong later shows at the next call that waits for it.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  const char* name = nullptr;
  if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) != cudaSuccess || name == nullptr)
    name = "a kernel";
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}
