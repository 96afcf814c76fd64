// The module fastgpt._cpu: the CPU engine's kernels on raw addresses. Bindings only: shapes, dtypes and contiguity are
// the caller's business (fastgpt/ops/cpu.py); addresses are integers, strides and sizes count elements, dtype is 0
// (float32) or 1 (bfloat16).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/transformer_block.h"

namespace py = pybind11;
using namespace fastgpt::cpu;

namespace {

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code) {
  if (code != 0 && code != 1) throw py::value_error("dtype: expected 0 (float32) or 1 (bfloat16)");
  return static_cast<DType>(code);
}

Activation activation_of(int code) {
  if (code < 0 || code > 5) throw py::value_error("kind: expected an activation's number, 0 to 5");
  return static_cast<Activation>(code);
}

// Of a transformer block: the activation, batch, time, width, heads, key heads and the width inside.
BlockShape block_shape(int stream, int params, int inner, bool half, bool transposed,
                       const std::array<int64_t, 7>& sizes, float eps) {
  return {dtype_of(stream),
          dtype_of(params),
          dtype_of(inner),
          half,
          transposed,
          activation_of(static_cast<int>(sizes[0])),
          eps,
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          sizes[6]};
}

using Addresses12 = std::array<Address, 12>;  // weight and bias of norm1, qkv, proj, norm2, fc, out

BlockWeights block_weights(const Addresses12& a) {
  const auto pair = [&](int i) { return LinearWeights{at<const void>(a[2 * i]), at<const void>(a[2 * i + 1])}; };
  return {pair(0), pair(1), pair(2), pair(3), pair(4), pair(5)};
}

BlockGradients block_gradients(const Addresses12& a) {
  const auto pair = [&](int i) { return LinearGradients{at<void>(a[2 * i]), at<void>(a[2 * i + 1])}; };
  return {pair(0), pair(1), pair(2), pair(3), pair(4), pair(5)};
}

using Addresses10 = std::array<Address, 10>;  // in the order of BlockState

BlockState block_state(const Addresses10& a) {
  return {at<float>(a[0]), at<float>(a[1]), at<void>(a[2]),  at<float>(a[3]), at<void>(a[4]),
          at<void>(a[5]),  at<float>(a[6]), at<float>(a[7]), at<void>(a[8]),  at<void>(a[9])};
}

using Strides = std::array<int64_t, 3>;  // of batch, head and time

AttentionTensor tensor(Address address, const Strides& strides) {
  return {at<void>(address), strides[0], strides[1], strides[2]};
}

// How many targets are not ignored; throws IndexError (std::out_of_range) for one outside [0, classes).
int64_t count_targets(Address target, int64_t rows, int64_t classes, int64_t ignore_index) {
  int64_t counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = at<const int64_t>(target)[r];
    if (t == ignore_index) continue;
    if (t < 0 || t >= classes) {
      throw std::out_of_range("target: got " + std::to_string(t) + " at row " + std::to_string(r) + ", expected 0 to " +
                              std::to_string(classes - 1) + " or ignore_index (" + std::to_string(ignore_index) + ")");
    }
    ++counted;
  }
  return counted;
}

// Throws IndexError for an embedding's id outside [0, rows).
void check_ids(bool wide, Address ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = wide ? at<const int64_t>(ids)[i] : at<const int32_t>(ids)[i];
    if (id < 0 || id >= rows) {
      throw std::out_of_range("input_ids: got " + std::to_string(id) + ", expected 0 to " + std::to_string(rows - 1));
    }
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ SIMD kernels on raw addresses; use fastgpt.ops instead.";

  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def(
      "select_isa", [](const std::string& name) { select_isa(name.c_str()); }, py::arg("name"),
      "Chooses portable, avx2, avx512, or the widest there is for an empty name.");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    if (portable_kernels() != nullptr) names.emplace_back("portable");
    if (avx2_kernels() != nullptr) names.emplace_back("avx2");
    if (avx512bf16_kernels() != nullptr) names.emplace_back("avx512f");
    if (avx512_kernels() != nullptr) names.emplace_back("avx512");
    return names;
  });

  m.def(
      "advise_huge_pages",
      [](Address address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        const Address page = Address{1} << 21;
        const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
        if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
        (void)address, (void)bytes;
#endif
      },
      "Asks the system to back memory with pages of 2 MB; nothing happens where it does not know them.");

  m.def(
      "activation",
      [](int kind, int dtype, Address x, Address y, int64_t n, int threads) {
        kernels().activation(activation_of(kind), dtype_of(dtype), at<const void>(x), at<void>(y), n, threads);
      },
      Release());

  m.def(
      "activation_backward",
      [](int kind, int dtype, Address dy, Address saved, Address dx, int64_t n, int threads) {
        kernels().activation_backward(activation_of(kind), dtype_of(dtype), at<const void>(dy), at<const void>(saved),
                                      at<void>(dx), n, threads);
      },
      Release());

  m.def(
      "swiglu",
      [](int kind, int dtype, Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address y, int64_t rows,
         int64_t cols, int threads) {
        SwiGLUArgs args{activation_of(kind),
                        dtype_of(dtype),
                        at<const void>(gate),
                        at<const void>(up),
                        at<void>(y),
                        gate_stride,
                        up_stride,
                        rows,
                        cols};
        kernels().swiglu(args, threads);
      },
      Release());

  m.def(
      "swiglu_backward",
      [](int kind, int dtype, Address dy, Address gate, int64_t gate_stride, Address up, int64_t up_stride,
         Address dgate, Address dup, int64_t grad_stride, int64_t rows, int64_t cols, int threads) {
        SwiGLUBackwardArgs args{activation_of(kind),
                                dtype_of(dtype),
                                at<const void>(dy),
                                at<const void>(gate),
                                at<const void>(up),
                                at<void>(dgate),
                                at<void>(dup),
                                gate_stride,
                                up_stride,
                                grad_stride,
                                rows,
                                cols};
        kernels().swiglu_backward(args, threads);
      },
      Release());

  m.def(
      "bias_activation",
      [](int kind, int dtype, int bias_dtype, Address x, Address bias, Address y, int64_t rows, int64_t cols,
         int threads) {
        BiasActivationArgs args{activation_of(kind),
                                dtype_of(dtype),
                                dtype_of(bias_dtype),
                                at<const void>(x),
                                at<const void>(bias),
                                at<void>(y),
                                rows,
                                cols};
        kernels().bias_activation(args, threads);
      },
      Release());

  m.def(
      "bias_activation_backward",
      [](int kind, int dtype, int bias_dtype, Address dy, Address saved, Address bias, Address dx, Address dbias,
         int64_t rows, int64_t cols, int threads) {
        BiasActivationBackwardArgs args{activation_of(kind),
                                        dtype_of(dtype),
                                        dtype_of(bias_dtype),
                                        at<const void>(dy),
                                        at<const void>(saved),
                                        at<const void>(bias),
                                        at<void>(dx),
                                        at<void>(dbias),
                                        rows,
                                        cols};
        kernels().bias_activation_backward(args, threads);
      },
      Release());

  m.def(
      "softmax",
      [](int dtype, Address x, Address mask, const Strides& mask_stride, Address y, int64_t batch, int64_t heads,
         int64_t queries, int64_t cols, float scale, bool causal, int threads) {
        SoftmaxArgs args{dtype_of(dtype),
                         at<const void>(x),
                         at<const float>(mask),
                         {mask_stride[0], mask_stride[1], mask_stride[2]},
                         at<void>(y),
                         batch,
                         heads,
                         queries,
                         cols,
                         scale,
                         causal};
        kernels().softmax(args, threads);
      },
      Release());

  m.def(
      "softmax_backward",
      [](int dtype, Address dy, Address y, Address dx, int64_t rows, int64_t cols, float scale, int threads) {
        SoftmaxBackwardArgs args{
            dtype_of(dtype), at<const void>(dy), at<const void>(y), at<void>(dx), rows, cols, scale};
        kernels().softmax_backward(args, threads);
      },
      Release());

  m.def(
      "layer_norm",
      [](int dtype, int x_dtype, int param_dtype, Address x, Address residual, Address weight, Address bias,
         Address sum, Address y, Address mean, Address rstd, int64_t rows, int64_t cols, float eps, int threads) {
        LayerNormArgs args{dtype_of(dtype),
                           dtype_of(x_dtype),
                           dtype_of(param_dtype),
                           at<const void>(x),
                           at<const void>(residual),
                           at<const void>(weight),
                           at<const void>(bias),
                           at<void>(sum),
                           at<void>(y),
                           at<float>(mean),
                           at<float>(rstd),
                           rows,
                           cols,
                           eps};
        kernels().layer_norm(args, threads);
      },
      Release(), "LayerNorm; RMSNorm where mean is 0.");

  m.def(
      "layer_norm_backward",
      [](int dtype, int param_dtype, Address dy, Address dsum, Address x, Address weight, Address mean, Address rstd,
         Address dx, Address dx_half, Address dweight, Address dbias, int64_t rows, int64_t cols, int threads) {
        LayerNormBackwardArgs args{dtype_of(dtype),
                                   dtype_of(param_dtype),
                                   at<const void>(dy),
                                   at<const void>(dsum),
                                   at<const void>(x),
                                   at<const void>(weight),
                                   at<const float>(mean),
                                   at<const float>(rstd),
                                   at<void>(dx),
                                   at<void>(dx_half),
                                   at<void>(dweight),
                                   at<void>(dbias),
                                   rows,
                                   cols};
        kernels().layer_norm_backward(args, threads);
      },
      Release());

  m.def("count_targets", &count_targets, Release(), "How many targets count; IndexError for one out of range.");

  m.def(
      "cross_entropy",
      [](int dtype, Address logits, Address target, int reduction, Address loss, Address lse, Address dlogits,
         float grad_scale, int64_t rows, int64_t classes, int64_t ignore_index, float label_smoothing, float z_loss,
         int threads) {
        const int64_t counted = count_targets(target, rows, classes, ignore_index);
        const bool is_mean = reduction == 1;
        CrossEntropyArgs args{dtype_of(dtype),
                              at<const void>(logits),
                              at<const int64_t>(target),
                              at<float>(loss),
                              at<double>(lse),
                              rows,
                              classes,
                              ignore_index,
                              label_smoothing,
                              z_loss,
                              at<void>(dlogits),
                              !is_mean      ? grad_scale
                              : counted > 0 ? grad_scale / static_cast<float>(counted)
                                            : 0.0f};
        if (reduction == 0) {
          kernels().cross_entropy(args, threads);
          return;
        }
        std::vector<float> losses(rows);
        args.losses = losses.data();
        kernels().cross_entropy(args, threads);
        double total = 0.0;
        for (float row : losses) total += row;
        *at<float>(loss) = static_cast<float>(is_mean ? total / static_cast<double>(counted) : total);
      },
      Release(),
      "reduction: 0 none, 1 mean, 2 sum; the gradient goes to dlogits unless it is 0, times grad_scale; it may replace "
      "the logits.");

  m.def(
      "cross_entropy_backward",
      [](int dtype, Address logits, Address target, Address lse, Address grad, int reduction, Address dlogits,
         int64_t rows, int64_t classes, int64_t ignore_index, float label_smoothing, float z_loss, int threads) {
        const int64_t counted = reduction == 1 ? count_targets(target, rows, classes, ignore_index) : 1;
        CrossEntropyBackwardArgs args{dtype_of(dtype),
                                      at<const void>(logits),
                                      at<const int64_t>(target),
                                      at<const double>(lse),
                                      at<const float>(grad),
                                      reduction == 0 ? 1 : 0,
                                      counted > 0 ? 1.0f / static_cast<float>(counted) : 0.0f,
                                      at<void>(dlogits),
                                      rows,
                                      classes,
                                      ignore_index,
                                      label_smoothing,
                                      z_loss};
        kernels().cross_entropy_backward(args, threads);
      },
      Release());

  m.def(
      "log_softmax",
      [](int dtype, Address x, Address y, int64_t rows, int64_t cols, int threads) {
        kernels().log_softmax({dtype_of(dtype), at<const void>(x), at<void>(y), rows, cols}, threads);
      },
      Release());

  m.def(
      "log_softmax_backward",
      [](int dtype, Address dy, Address y, Address dx, int64_t rows, int64_t cols, int threads) {
        LogSoftmaxBackwardArgs args{dtype_of(dtype), at<const void>(dy), at<const void>(y), at<void>(dx), rows, cols};
        kernels().log_softmax_backward(args, threads);
      },
      Release());

  m.def(
      "dropout",
      [](int x_dtype, int dtype, Address x, Address residual, Address y, int64_t n, uint64_t seed, uint32_t threshold,
         float scale, int threads) {
        DropoutArgs args{dtype_of(x_dtype),
                         dtype_of(dtype),
                         at<const void>(x),
                         at<const void>(residual),
                         at<void>(y),
                         n,
                         seed,
                         threshold,
                         scale};
        kernels().dropout(args, threads);
      },
      Release());

  m.def(
      "embedding",
      [](int dtype, bool wide_ids, Address ids, Address weight, Address y, int64_t count, int64_t rows, int64_t cols,
         int threads) {
        check_ids(wide_ids, ids, count, rows);
        EmbeddingArgs args{dtype_of(dtype), wide_ids, at<const void>(ids), at<const void>(weight), at<void>(y),
                           count,           cols};
        kernels().embedding(args, threads);
      },
      Release(), "IndexError for an id out of range.");

  m.def(
      "embedding_backward",
      [](int grad_dtype, int dtype, bool wide_ids, bool accumulate, Address ids, Address dy, Address dweight,
         int64_t count, int64_t rows, int64_t cols, int64_t padding_idx, int threads) {
        check_ids(wide_ids, ids, count, rows);
        EmbeddingBackwardArgs args{dtype_of(grad_dtype), dtype_of(dtype),   wide_ids, accumulate, at<const void>(ids),
                                   at<const void>(dy),   at<void>(dweight), count,    rows,       cols,
                                   padding_idx};
        kernels().embedding_backward(args, threads);
      },
      Release(), "IndexError for an id out of range.");

  m.def(
      "attention",
      [](int dtype, Address q, const Strides& qs, Address k, const Strides& ks, Address v, const Strides& vs, Address o,
         const Strides& os, Address lse, int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
         int64_t dim, float scale, bool causal, uint64_t seed, uint32_t threshold, float drop_scale, int threads) {
        AttentionArgs args{dtype_of(dtype), tensor(q, qs), tensor(k, ks),
                           tensor(v, vs),   tensor(o, os), at<float>(lse),
                           batch,           heads,         kv_heads,
                           queries,         keys,          dim,
                           scale,           causal,        {seed, threshold, drop_scale}};
        kernels().attention(args, threads);
      },
      Release());

  m.def(
      "attention_backward",
      [](int dtype, Address q, const Strides& qs, Address k, const Strides& ks, Address v, const Strides& vs, Address o,
         const Strides& os, Address do_, const Strides& dos, Address dq, const Strides& dqs, Address dk,
         const Strides& dks, Address dv, const Strides& dvs, Address lse, int64_t batch, int64_t heads,
         int64_t kv_heads, int64_t queries, int64_t keys, int64_t dim, float scale, bool causal, uint64_t seed,
         uint32_t threshold, float drop_scale, int threads) {
        AttentionBackwardArgs args{dtype_of(dtype),
                                   tensor(q, qs),
                                   tensor(k, ks),
                                   tensor(v, vs),
                                   tensor(o, os),
                                   tensor(do_, dos),
                                   tensor(dq, dqs),
                                   tensor(dk, dks),
                                   tensor(dv, dvs),
                                   at<const float>(lse),
                                   batch,
                                   heads,
                                   kv_heads,
                                   queries,
                                   keys,
                                   dim,
                                   scale,
                                   causal,
                                   {seed, threshold, drop_scale}};
        kernels().attention_backward(args, threads);
      },
      Release());

  m.def(
      "rope",
      [](int dtype, Address x, const Strides& xs, Address y, const Strides& ys, Address cos, Address sin, int64_t batch,
         int64_t heads, int64_t time, int64_t dim, int64_t rotary, bool interleaved, bool inverse, int threads) {
        RopeArgs args{dtype_of(dtype),
                      tensor(x, xs),
                      tensor(y, ys),
                      at<const float>(cos),
                      at<const float>(sin),
                      batch,
                      heads,
                      time,
                      dim,
                      rotary,
                      interleaved,
                      inverse};
        kernels().rope(args, threads);
      },
      Release());

  m.def(
      "linear",
      [](bool half, bool transposed, int x_dtype, int w_dtype, int y_dtype, int residual_dtype, Address x,
         Address weight, Address bias, int kind, Address slope, Address residual, Address y, int64_t rows, int64_t in,
         int64_t out, int threads) {
        LinearArgs args{half,
                        transposed,
                        dtype_of(x_dtype),
                        dtype_of(w_dtype),
                        dtype_of(y_dtype),
                        dtype_of(residual_dtype),
                        at<const void>(x),
                        at<const void>(weight),
                        at<const void>(bias),
                        kind >= 0,
                        activation_of(std::max(kind, 0)),
                        at<void>(slope),
                        at<const void>(residual),
                        at<void>(y),
                        rows,
                        in,
                        out};
        kernels().linear(args, threads);
      },
      Release());

  m.def(
      "linear_backward_input",
      [](bool half, bool transposed, int dy_dtype, int w_dtype, int dx_dtype, int slope_dtype, Address dy,
         Address weight, Address slope, Address dx, int64_t rows, int64_t in, int64_t out, int threads) {
        LinearBackwardInputArgs args{half,
                                     transposed,
                                     dtype_of(dy_dtype),
                                     dtype_of(w_dtype),
                                     dtype_of(dx_dtype),
                                     dtype_of(slope_dtype),
                                     at<const void>(dy),
                                     at<const void>(weight),
                                     at<const void>(slope),
                                     at<void>(dx),
                                     rows,
                                     in,
                                     out};
        kernels().linear_backward_input(args, threads);
      },
      Release());

  m.def(
      "linear_backward_weight",
      [](bool half, bool transposed, bool accumulate, int dy_dtype, int x_dtype, int dw_dtype, int db_dtype, Address dy,
         Address x, Address dweight, Address dbias, int64_t rows, int64_t in, int64_t out, int threads) {
        LinearBackwardWeightArgs args{half,
                                      transposed,
                                      accumulate,
                                      dtype_of(dy_dtype),
                                      dtype_of(x_dtype),
                                      dtype_of(dw_dtype),
                                      dtype_of(db_dtype),
                                      at<const void>(dy),
                                      at<const void>(x),
                                      at<void>(dweight),
                                      at<void>(dbias),
                                      rows,
                                      in,
                                      out};
        kernels().linear_backward_weight(args, threads);
      },
      Release());

  m.def(
      "transformer_block",
      [](int stream, int params, int inner, bool half, bool transposed, const std::array<int64_t, 7>& sizes, float eps,
         const Addresses12& weights, Address x, const Addresses10& state, Address y, int threads) {
        transformer_block(block_shape(stream, params, inner, half, transposed, sizes, eps), block_weights(weights),
                          at<const void>(x), block_state(state), at<void>(y), threads);
      },
      Release());

  m.def(
      "transformer_block_backward",
      [](int stream, int params, int inner, bool half, bool transposed, const std::array<int64_t, 7>& sizes, float eps,
         const Addresses12& weights, Address x, const Addresses10& state, Address dy, Address dx,
         const Addresses12& gradients, int threads) {
        transformer_block_backward(block_shape(stream, params, inner, half, transposed, sizes, eps),
                                   block_weights(weights), at<const void>(x), block_state(state), at<const void>(dy),
                                   at<void>(dx), block_gradients(gradients), threads);
      },
      Release());

  m.def("grad_norm", [](const std::vector<Address>& grads, const std::vector<int64_t>& sizes, int threads) {
    if (grads.size() != sizes.size()) throw py::value_error("grads and sizes differ in length");
    std::vector<const float*> pointers;
    for (Address grad : grads) pointers.push_back(at<const float>(grad));
    py::gil_scoped_release release;
    return kernels().grad_norm(pointers.data(), sizes.data(), static_cast<int64_t>(sizes.size()), threads);
  });

  m.def("adamw", [](const std::vector<Address>& params, const std::vector<Address>& grads,
                    const std::vector<Address>& exp_avgs, const std::vector<Address>& exp_avg_sqs,
                    const std::vector<Address>& shadows, const std::vector<int64_t>& sizes,
                    const std::vector<double>& weight_decays, double lr, double beta1, double beta2, float eps,
                    float grad_scale, int64_t step, bool zero_grads, int threads) {
    const size_t count = params.size();
    if (grads.size() != count || exp_avgs.size() != count || exp_avg_sqs.size() != count || sizes.size() != count ||
        weight_decays.size() != count || (!shadows.empty() && shadows.size() != count)) {
      throw py::value_error("the lists differ in length");
    }
    std::vector<AdamWTensor> tensors;
    for (size_t i = 0; i < count; ++i) {
      tensors.push_back({at<float>(params[i]), at<float>(grads[i]), at<float>(exp_avgs[i]), at<float>(exp_avg_sqs[i]),
                         at<void>(shadows.empty() ? 0 : shadows[i]), sizes[i], weight_decays[i]});
    }
    py::gil_scoped_release release;
    AdamWArgs args{tensors.data(), static_cast<int64_t>(count), lr, beta1, beta2, eps, grad_scale, step, zero_grads};
    kernels().adamw(args, threads);
  });
}
