// The CPU engine's function table: one entry an op, one table an instruction set.
//
// Every kernel takes raw pointers to row-major memory, computes in fp32 whatever the storage type, and splits its work
// over at most `threads` OpenMP threads in chunks that do not depend on how many there are, so results are the same for
// any number.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastgpt::cpu {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

enum class Activation : int { kReLU = 0, kSigmoid = 1, kTanh = 2, kGELU = 3, kGELUTanh = 4, kSiLU = 5 };

// y = softmax(scale * x + mask) over rows of `cols`; x is (batch, heads, queries, cols) and contiguous.
struct SoftmaxArgs {
  DType dtype;
  const void* x;
  const float* mask;       // additive, or nullptr; its last dimension is contiguous
  int64_t mask_stride[3];  // of batch, heads and queries, in elements; 0 broadcasts
  void* y;
  int64_t batch, heads, queries, cols;
  float scale;
  bool causal;  // query i sees keys j <= i + cols - queries
};

struct SoftmaxBackwardArgs {
  DType dtype;
  const void* dy;
  const void* y;
  void* dx;
  int64_t rows, cols;
  float scale;
};

// LayerNorm, or RMSNorm where `mean` is nullptr, of x or of x + residual.
struct LayerNormArgs {
  DType dtype;        // of y, residual and sum
  DType x_dtype;      // the same, or bf16 for an fp32 residual
  DType param_dtype;  // of weight and bias
  const void* x;
  const void* residual = nullptr;  // or nullptr
  const void* weight;              // or nullptr
  const void* bias;                // or nullptr
  void* sum = nullptr;             // x + residual, where there is one
  void* y;
  float* mean;  // nullptr: RMSNorm
  float* rstd;
  int64_t rows, cols;
  float eps;
};

struct LayerNormBackwardArgs {
  DType dtype;
  DType param_dtype;
  const void* dy;
  const void* dsum = nullptr;  // the gradient of `sum`, added to dx, or nullptr
  const void* x;               // what was normalised
  const void* weight;          // or nullptr
  const float* mean;           // nullptr: RMSNorm
  const float* rstd;
  void* dx;                 // or nullptr
  void* dx_half = nullptr;  // dx in bf16 once more, or nullptr
  void* dweight;            // or nullptr
  void* dbias;              // or nullptr
  int64_t rows, cols;
};

// y = f(gate) * up, f by `kind`: SiLU or a GELU. Rows are contiguous; gate's and up's may be apart.
struct SwiGLUArgs {
  Activation kind;
  DType dtype;
  const void* gate;
  const void* up;
  void* y;                         // contiguous
  int64_t gate_stride, up_stride;  // from row to row, in elements
  int64_t rows, cols;
};

struct SwiGLUBackwardArgs {
  Activation kind;
  DType dtype;
  const void* dy;  // contiguous
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t gate_stride, up_stride;
  int64_t grad_stride;  // of dgate and dup
  int64_t rows, cols;
};

struct BiasActivationArgs {
  Activation kind;
  DType dtype, bias_dtype;
  const void* x;
  const void* bias;  // (cols)
  void* y;
  int64_t rows, cols;
};

struct BiasActivationBackwardArgs {
  Activation kind;
  DType dtype, bias_dtype;
  const void* dy;
  const void* saved;  // y for relu, sigmoid and tanh, x (without the bias) for the others
  const void* bias;
  void* dx;
  void* dbias;  // or nullptr
  int64_t rows, cols;
};

struct CrossEntropyArgs {
  DType dtype;
  const void* logits;  // (rows, classes)
  const int64_t* target;
  float* losses;  // (rows), 0 where the target is ignored
  double* lse;    // (rows), log-sum-exp, for the backward: in float its rounding would be the gradient's largest error
  int64_t rows, classes, ignore_index;
  float label_smoothing, z_loss;
  void* dlogits;     // the gradient of the losses' sum times grad_scale, or nullptr; may be `logits`
  float grad_scale;  // 1 / count for the mean
};

struct CrossEntropyBackwardArgs {
  DType dtype;
  const void* logits;
  const int64_t* target;
  const double* lse;
  const float* grad;    // of each row's loss
  int64_t grad_stride;  // 0: one gradient for all rows
  float grad_scale;     // multiplies every row's gradient: 1 / count for the mean
  void* dlogits;        // may be `logits`
  int64_t rows, classes, ignore_index;
  float label_smoothing, z_loss;
};

struct LogSoftmaxArgs {
  DType dtype;
  const void* x;
  void* y;
  int64_t rows, cols;
};

struct LogSoftmaxBackwardArgs {
  DType dtype;
  const void* dy;
  const void* y;
  void* dx;
  int64_t rows, cols;
};

// y = x * mask / (1 - p) + residual; element i is dropped where its word of Philox (philox.inl) is below `threshold`.
struct DropoutArgs {
  DType x_dtype;
  DType dtype;  // of residual and y
  const void* x;
  const void* residual;  // or nullptr
  void* y;
  int64_t n;
  uint64_t seed;
  uint32_t threshold;  // p 2^32
  float scale;         // 1 / (1 - p)
};

// y = weight[ids]; ids are int64 where `wide_ids`, else int32, all in [0, rows).
struct EmbeddingArgs {
  DType dtype;
  bool wide_ids;
  const void* ids;     // (count)
  const void* weight;  // (rows, cols)
  void* y;             // (count, cols)
  int64_t count, cols;
};

struct EmbeddingBackwardArgs {
  DType grad_dtype, dtype;  // of dy, of dweight
  bool wide_ids;
  bool accumulate;  // add to the rows that occur; else every row is written
  const void* ids;
  const void* dy;
  void* dweight;
  int64_t count, rows, cols;  // count and rows below 2^31
  int64_t padding_idx;        // gets no gradient; -1: none
};

// (B, H, T, D) tensors with any strides (in elements) but a contiguous D.
struct AttentionTensor {
  void* data;
  int64_t stride_b, stride_h, stride_t;
};

// Of the weights: element ((b H + h) Tq + i) Tk + j is dropped where its word of Philox (philox.inl) is below
// `threshold`.
struct AttentionDropout {
  uint64_t seed;
  uint32_t threshold;  // p 2^32; 0: no dropout
  float scale;         // 1 / (1 - p)
};

struct AttentionArgs {
  DType dtype;
  AttentionTensor q, k, v, o;
  float* lse;  // (B, H, Tq) contiguous: log-sum-exp of the scaled scores, -inf where nothing is seen
  int64_t batch, heads, kv_heads, queries, keys, dim;
  float scale;
  bool causal;  // query i sees keys j <= i + keys - queries
  AttentionDropout dropout = {};
};

struct AttentionBackwardArgs {
  DType dtype;
  AttentionTensor q, k, v, o, do_, dq, dk, dv;
  const float* lse;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  float scale;
  bool causal;
  AttentionDropout dropout = {};
};

// y = x turned by each position's angles; see rope.inl.
struct RopeArgs {
  DType dtype;
  AttentionTensor x, y;
  const float* cos;  // (time, rotary / 2) contiguous
  const float* sin;
  int64_t batch, heads, time, dim, rotary;
  bool interleaved, inverse;
};

// Matrices are contiguous; `half` allows products of bf16 pairs, summed in fp32.
// `transposed`: the weight and its gradient are (in, out) in memory, as GPT-2's checkpoints have them.
struct LinearArgs {
  bool half, transposed;
  DType x_dtype, w_dtype, y_dtype, residual_dtype;
  const void* x;       // (rows, in)
  const void* weight;  // (out, in)
  const void* bias;    // (out) of w_dtype, or nullptr
  bool has_activation = false;
  Activation activation = Activation::kReLU;
  void* slope = nullptr;           // (rows, out) of y_dtype: the activation's derivative, or nullptr
  const void* residual = nullptr;  // (rows, out), or nullptr
  void* y;                         // (rows, out) = activation(x W^T + bias) + residual
  int64_t rows, in, out;
};

struct LinearBackwardInputArgs {
  bool half, transposed;
  DType dy_dtype, w_dtype, dx_dtype, slope_dtype;
  const void* dy;               // (rows, out)
  const void* weight;           // (out, in)
  const void* slope = nullptr;  // (rows, in): the derivative of the activation that made x, or nullptr
  void* dx;                     // (rows, in) = (dy W) slope
  int64_t rows, in, out;
};

struct LinearBackwardWeightArgs {
  bool half, transposed, accumulate;  // accumulate: add to what is there
  DType dy_dtype, x_dtype, dw_dtype, db_dtype;
  const void* dy;  // (rows, out)
  const void* x;   // (rows, in)
  void* dweight;   // (out, in), or nullptr
  void* dbias;     // (out), or nullptr
  int64_t rows, in, out;
};

struct AdamWTensor {
  float* param;
  float* grad;  // written with zero_grads only
  float* exp_avg;
  float* exp_avg_sq;
  void* shadow;  // the new parameter in bf16, or nullptr
  int64_t size;
  double weight_decay;
};

struct AdamWArgs {
  const AdamWTensor* tensors;
  int64_t count;
  double lr;
  double beta1, beta2;
  float eps;
  float grad_scale;  // multiplies every gradient
  int64_t step;      // 1 for the first
  bool zero_grads;
};

struct Kernels {
  const char* isa;
  int lanes;  // floats a vector
  void (*activation)(Activation, DType, const void* x, void* y, int64_t n, int threads);
  // `saved` is y for relu, sigmoid and tanh, x for the others.
  void (*activation_backward)(Activation, DType, const void* dy, const void* saved, void* dx, int64_t n, int threads);
  void (*swiglu)(const SwiGLUArgs&, int threads);
  void (*swiglu_backward)(const SwiGLUBackwardArgs&, int threads);
  void (*bias_activation)(const BiasActivationArgs&, int threads);
  void (*bias_activation_backward)(const BiasActivationBackwardArgs&, int threads);
  void (*softmax)(const SoftmaxArgs&, int threads);
  void (*softmax_backward)(const SoftmaxBackwardArgs&, int threads);
  void (*layer_norm)(const LayerNormArgs&, int threads);
  void (*layer_norm_backward)(const LayerNormBackwardArgs&, int threads);
  void (*cross_entropy)(const CrossEntropyArgs&, int threads);
  void (*cross_entropy_backward)(const CrossEntropyBackwardArgs&, int threads);
  void (*log_softmax)(const LogSoftmaxArgs&, int threads);
  void (*log_softmax_backward)(const LogSoftmaxBackwardArgs&, int threads);
  void (*dropout)(const DropoutArgs&, int threads);
  void (*embedding)(const EmbeddingArgs&, int threads);
  void (*embedding_backward)(const EmbeddingBackwardArgs&, int threads);
  void (*attention)(const AttentionArgs&, int threads);
  void (*attention_backward)(const AttentionBackwardArgs&, int threads);
  void (*rope)(const RopeArgs&, int threads);
  void (*linear)(const LinearArgs&, int threads);
  void (*linear_backward_input)(const LinearBackwardInputArgs&, int threads);
  void (*linear_backward_weight)(const LinearBackwardWeightArgs&, int threads);
  double (*grad_norm)(const float* const* grads, const int64_t* sizes, int64_t count, int threads);
  void (*adamw)(const AdamWArgs&, int threads);
};

// The table of an instruction set, or nullptr where this build or this chip has none.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();
const Kernels* avx512amx_kernels();

// The table in use: the widest the chip has, or what FASTGPT_CPU_ISA names; throws std::invalid_argument for an unknown
// or unavailable name.
const Kernels& kernels();

// The names of the tables that this chip has, from the narrowest on.
std::vector<std::string> available_isas();

// Chooses another table by name: one of available_isas(), "avx512" for the widest of these, "" for the widest of all.
// Throws like kernels().
void select_isa(const std::string& name);

}  // namespace fastgpt::cpu
