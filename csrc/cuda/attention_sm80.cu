#include "cuda/attention_sm80_launch.cuh"

namespace fastgpt::cuda {

void attention_sm80(Type type, const attention::Params& p, Stream stream) {
  attention::with_half_type(
      type, [&](auto x) { attention::attention_fwd_sm80<decltype(x)>(p, reinterpret_cast<cudaStream_t>(stream)); });
}

}  // namespace fastgpt::cuda
