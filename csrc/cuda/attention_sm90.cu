#include "cuda/attention_sm90_launch.cuh"

namespace fastgpt::cuda {

void attention_sm90(Type type, const attention::Params& p, Stream stream) {
  attention::check_sm90(p);
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    throw std::runtime_error(std::string("attention: ") + cudaGetErrorString(cudaGetLastError()));
  }
  attention::with_half_type(type, [&](auto x) {
    attention::attention_fwd_sm90<decltype(x)>(p, multiprocessors, reinterpret_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastgpt::cuda
