// fastgpt._cpu: activations, dropout, embedding, rope and the optimizer.
#include <string>
#include <vector>

#include "python/cpu.h"

namespace fastgpt::cpu {
namespace {

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

void bind_pointwise(py::module_& m) {
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

}  // namespace fastgpt::cpu
