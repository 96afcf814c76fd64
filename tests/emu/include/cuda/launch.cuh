// launch() of csrc/cuda/launch.cuh, on the emulator: what goes wrong in the kernel is thrown.
#pragma once

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... arguments) {
  emu::check_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  auto body = [&] { kernel(arguments...); };
  emu::run(
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
      [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
}
