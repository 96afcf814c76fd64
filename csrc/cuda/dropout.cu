#include "cuda/dropout_launch.cuh"

namespace fastgpt::cuda {

void dropout(Type x_type, Type type, const DropoutArgs& a, Stream stream) {
  launch_dropout(x_type, type, a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace fastgpt::cuda
