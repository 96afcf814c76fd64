#include "cuda/attention_decode_launch.cuh"

namespace fastgpt::cuda {

void attention_decode(Type type, const attention::DecodeParams& d, Stream stream) {
  with_type(type, [&](auto x) { attention::attention_decode<decltype(x)>(d, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
