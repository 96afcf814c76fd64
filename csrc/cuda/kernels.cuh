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

// Rows of a norm; a mean makes it LayerNorm, none RMSNorm.
struct NormArgs {
  const void *x, *residual;   // residual: or null
  const void *weight, *bias;  // or null
  void *summed, *y;           // summed: with a residual
  float *mean, *rstd;         // a row each
  int64_t rows, cols;
  float eps;
};
void norm(Type x_type, Type type, Type param_type, const NormArgs& a, Stream stream);

struct NormBackwardArgs {
  const void *grad, *grad_sum;  // grad_sum: or null
  const void *s, *weight;       // what was normalised; weight: or null
  const float *mean, *rstd;
  void *dx, *dx_half;     // dx_half: the same in bf16, or null
  void *dweight, *dbias;  // or null, with parts; dbias only for LayerNorm
  float* parts;           // scratch (part_count, 2 or 1, cols), or null
  int64_t part_count;     // at least 1: over how many blocks the rows are spread
  int64_t rows, cols;
};
void norm_backward(Type type, Type param_type, const NormBackwardArgs& a, Stream stream);

// Loss and gradient of rows of logits. Forward: losses and lse are written, dlogits where it is not null (it may be the
// logits' own memory); loss, where it is not null, gets their sum, over the count where that is not null. The gradient
// is that of this loss. Backward: lse and grad are read. scale_rows: dlogits times grad. count_targets writes
// `counted`.
struct CrossEntropyArgs {
  const void* logits;
  const int64_t* target;
  const float* grad;
  bool grad_rows;  // grad has one number a row, else one
  float *losses, *loss;
  double *lse, *counted;
  const double* count;  // how many rows the mean is over; null for a sum
  void* dlogits;
  int64_t rows, cols, ignore_index;
  float smoothing, z_loss;
};
void count_targets(const CrossEntropyArgs& a, Stream stream);
void cross_entropy(Type type, const CrossEntropyArgs& a, Stream stream);
void cross_entropy_backward(Type type, const CrossEntropyArgs& a, Stream stream);
void scale_rows(Type type, const CrossEntropyArgs& a, Stream stream);

// y = activation(x + bias) over rows; the backward's names are those of ActivationArgs.
struct BiasActivationArgs {
  const void* x;     // backward: the gradient
  const void* kept;  // backward: the result for relu, sigmoid and tanh, the input for the others
  const void* bias;
  void* y;
  void* dbias;         // backward: or null, with parts
  float* parts;        // backward: scratch (part_count, cols), or null
  int64_t part_count;  // over how many blocks the rows are spread, 1 to 65,535
  int64_t rows, cols;
  Activation kind;
};
void bias_activation(Type type, Type bias_type, const BiasActivationArgs& a, Stream stream);
void bias_activation_backward(Type type, Type bias_type, const BiasActivationArgs& a, Stream stream);

// Tensors cut into chunks of kChunk elements, of which a block takes one: chunk c belongs to the tensor t with
// first_chunk[t] <= c < first_chunk[t + 1]. All arrays are on the device; addresses are numbers.
constexpr int kChunk = 4096;
struct TensorList {
  const int64_t* first_chunk;  // count + 1
  const int64_t* sizes;        // count, elements
  int64_t count, chunks;
};

struct AdamwArgs {
  TensorList list;
  const int64_t *params, *grads, *exp_avgs, *exp_avg_sqs;           // addresses of fp32 tensors
  const int64_t* shadows;                                           // of half-type tensors, or null
  const float* decays;                                              // 1 - lr weight_decay, a tensor each
  float beta1, beta2, eps, grad_scale, step_size, root_correction;  // lr / (1 - beta1^t), sqrt(1 - beta2^t)
  bool zero_grads;
};
void adamw(Type shadow_type, const AdamwArgs& a, Stream stream);

struct GradNormArgs {
  TensorList list;
  const int64_t* grads;
  double *parts, *norm;  // parts: scratch, a chunk each
};
void grad_norm(Type type, const GradNormArgs& a, Stream stream);

// Forward: y (count, cols) = rows of x (rows, cols). Backward: ids sorted, each with its position; x is the gradient
// (count, cols), y the matrix (rows, cols), whose rows that occur are written, or added to where `keep`.
struct EmbeddingArgs {
  const int64_t *ids, *positions;
  const void* x;
  void* y;
  int64_t count, rows, cols;
  int64_t padding;  // a row without a gradient, or -1
  bool keep;
};
void embedding(Type type, const EmbeddingArgs& a, Stream stream);
void embedding_backward(Type grad_type, Type type, const EmbeddingArgs& a, Stream stream);

// Strides in elements of batch, head and position; a head's elements lie side by side; cos and sin (length, pairs).
struct RopeArgs {
  const void* x;
  void* y;
  const float *cos, *sin;
  int64_t x_stride[3], y_stride[3];
  int64_t batch, heads, length, head_dim, pairs;
  bool interleaved, inverse;
};
void rope(Type type, const RopeArgs& a, Stream stream);

// "nvcc" where the kernels were compiled with the package, "nvrtc" where each is compiled at its first use.
const char* compiler();

// Driver's and runtime's words on why there is no device, or null.
const char* why_no_device();

}  // namespace fastgpt::cuda
