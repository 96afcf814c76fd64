// What csrc/python/cuda.cpp calls: plain C++, addresses on the device, a stream as an integer. Contiguous tensors.
#pragma once

#include <cstdint>

#include "cuda/attention_params.cuh"

namespace fastgpt::cuda {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// CUDA's number of a stream, and a call's stream in every launcher.
using Stream = std::uintptr_t;

struct SoftmaxArgs {
  const void* x;      // backward: the gradient
  const void* y_in;   // backward: the result of the forward
  void* y;            // backward: dx
  const float* mask;  // added, or null; elements of a row lie side by side
  int64_t mask_stride[3];
  int64_t batch, heads, queries, cols;
  float scale;
  bool causal, log;
};
void softmax(Type type, const SoftmaxArgs& a, Stream stream);
void softmax_backward(Type type, const SoftmaxArgs& a, Stream stream);

// The same numbers as fastgpt.ops.bias_activation.KINDS.
enum class Activation : int { kRelu, kSigmoid, kTanh, kGelu, kGeluTanh, kSilu };

struct ActivationArgs {
  const void* x;     // backward: the gradient
  const void* kept;  // backward: the result for relu, sigmoid and tanh, the input for the others
  void* y;
  int64_t n;
  Activation kind;
};
void activation(Type type, const ActivationArgs& a, Stream stream);
void activation_backward(Type type, const ActivationArgs& a, Stream stream);

// y = activation(gate) up; rows of gate and up (and of their gradients) lie `..._stride` elements apart, those of y and
// grad `cols`. Kinds: gelu, gelu_tanh, silu.
struct SwigluArgs {
  const void *gate, *up;
  const void* grad;                            // backward
  void* y;                                     // backward: dgate
  void* dup;                                   // backward
  int64_t gate_stride, up_stride, out_stride;  // out_stride: of dgate and dup in the backward, cols in the forward
  int64_t rows, cols;
  Activation kind;
};
void swiglu(Type type, const SwigluArgs& a, Stream stream);
void swiglu_backward(Type type, const SwigluArgs& a, Stream stream);

struct DropoutArgs {
  const void* x;
  const void* residual;  // or null
  void* y;
  int64_t n;
  const int64_t* seed;  // on the device, so that nothing waits for it
  uint32_t threshold;
  float scale;
};
void dropout(Type x_type, Type type, const DropoutArgs& a, Stream stream);

// O and the log-sum-exp, and the gradients; bfloat16 and float16. sm80: head sizes 32, 64, 96, 128 on any chip from
// sm_80 on; sm90: 64 and 128 on sm_90a alone.
void attention_sm80(Type type, const attention::Params& p, Stream stream);
void attention_backward_sm80(Type type, const attention::Params& p, Stream stream);
void attention_sm90(Type type, const attention::Params& p, Stream stream);
void attention_backward_sm90(Type type, const attention::Params& p, Stream stream);
// A few queries against many keys; the three types, head sizes 32, 64, 96, 128.
void attention_decode(Type type, const attention::DecodeParams& d, Stream stream);

// "nvcc" where the kernels were compiled with the package, "nvrtc" where each is compiled at its first use.
const char* compiler();

// Driver's and runtime's words on why there is no device, or null.
const char* why_no_device();

}  // namespace fastgpt::cuda
