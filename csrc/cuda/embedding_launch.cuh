// The choice of an embedding's kernel, shared by embedding.cu and the emulation's tests.
#pragma once

#include "cuda/dispatch.cuh"
#include "cuda/embedding.cuh"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

template <class T>
void launch_embedding(const EmbeddingArgs& a, cudaStream_t stream) {
  if (a.count == 0 || a.cols == 0) return;
  const bool wide = aligned({a.x, a.y}, a.cols * int64_t(sizeof(T)));
  const int64_t work = a.count * (wide ? a.cols / kWide<T> : a.cols);
  launch(wide ? embedding_kernel<T, kWide<T>> : embedding_kernel<T, 1>,
         dim3(blocks_of(std::min<int64_t>(132 * 16, (work + 255) / 256))), dim3(256), 0, stream, a);
}

template <class G, class T>
void launch_embedding_backward(const EmbeddingArgs& a, cudaStream_t stream) {
  if (a.count == 0 || a.cols == 0) return;
  constexpr int kN = 4;  // 8 bytes of a half type, 16 of fp32
  const bool wide = a.cols % kN == 0 && aligned({a.x, a.y}, 0);
  const int64_t accesses = wide ? a.cols / kN : a.cols;
  const int64_t threads = std::clamp<int64_t>((accesses + 31) / 32 * 32, 32, 256);
  const dim3 grid(blocks_of(a.count), blocks_of(std::min<int64_t>(65535, (accesses + threads - 1) / threads)));
  launch(wide ? embedding_backward_kernel<G, T, kN> : embedding_backward_kernel<G, T, 1>, grid,
         dim3(static_cast<unsigned>(threads)), 0, stream, a);
}

inline void launch_embedding_backward(Type grad_type, Type type, const EmbeddingArgs& a, cudaStream_t stream) {
  with_type(grad_type, [&](auto g) {
    using G = decltype(g);
    if (type == grad_type) return launch_embedding_backward<G, G>(a, stream);
    if (type == Type::kFloat32) return launch_embedding_backward<G, float>(a, stream);
    throw std::invalid_argument("embedding: the matrix has the gradient's type or float32");
  });
}

}  // namespace fastgpt::cuda
