#include "cuda/embedding_launch.cuh"

namespace fastgpt::cuda {

void embedding(Type type, const EmbeddingArgs& a, Stream stream) {
  with_type(type, [&](auto t) { launch_embedding<decltype(t)>(a, reinterpret_cast<cudaStream_t>(stream)); });
}

void embedding_backward(Type grad_type, Type type, const EmbeddingArgs& a, Stream stream) {
  launch_embedding_backward(grad_type, type, a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace fastgpt::cuda
