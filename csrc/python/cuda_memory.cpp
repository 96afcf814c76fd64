// The launchers of norms, losses, the optimizer and the other memory-bound kernels, on addresses; part of
// fastgpt._cuda.
#include <pybind11/pybind11.h>

#include "cuda/kernels.cuh"

namespace py = pybind11;
using namespace fastgpt::cuda;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_norm(py::module_& m) {
  m.def(
      "norm",
      [](int x_type, int type, int param_type, Address x, Address residual, Address weight, Address bias,
         Address summed, Address y, Address mean, Address rstd, int64_t rows, int64_t cols, float eps, Address stream) {
        norm(static_cast<Type>(x_type), static_cast<Type>(type), static_cast<Type>(param_type),
             {at(x), at(residual), at(weight), at(bias), at(summed), at(y), at<float>(mean), at<float>(rstd), rows,
              cols, eps},
             stream);
      },
      py::arg("x_type"), py::arg("type"), py::arg("param_type"), py::arg("x"), py::arg("residual"), py::arg("weight"),
      py::arg("bias"), py::arg("summed"), py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("rows"),
      py::arg("cols"), py::arg("eps"), py::arg("stream"));
  m.def(
      "norm_backward",
      [](int type, int param_type, Address grad, Address grad_sum, Address s, Address weight, Address mean,
         Address rstd, Address dx, Address dx_half, Address dweight, Address dbias, Address parts, int64_t part_count,
         int64_t rows, int64_t cols, Address stream) {
        norm_backward(static_cast<Type>(type), static_cast<Type>(param_type),
                      {at(grad), at(grad_sum), at(s), at(weight), at<float>(mean), at<float>(rstd), at(dx), at(dx_half),
                       at(dweight), at(dbias), at<float>(parts), part_count, rows, cols},
                      stream);
      },
      py::arg("type"), py::arg("param_type"), py::arg("grad"), py::arg("grad_sum"), py::arg("s"), py::arg("weight"),
      py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dx_half"), py::arg("dweight"), py::arg("dbias"),
      py::arg("parts"), py::arg("part_count"), py::arg("rows"), py::arg("cols"), py::arg("stream"));
}

void bind_cross_entropy(py::module_& m) {
  m.def(
      "count_targets",
      [](Address target, Address counted, int64_t rows, int64_t ignore_index, Address stream) {
        CrossEntropyArgs a = {};
        a.target = at<int64_t>(target), a.counted = at<double>(counted), a.rows = rows, a.ignore_index = ignore_index;
        count_targets(a, stream);
      },
      py::arg("target"), py::arg("counted"), py::arg("rows"), py::arg("ignore_index"), py::arg("stream"));
  m.def(
      "cross_entropy",
      [](int type, Address logits, Address target, Address losses, Address loss, Address lse, Address count,
         Address dlogits, int64_t rows, int64_t cols, int64_t ignore_index, float smoothing, float z_loss,
         Address stream) {
        cross_entropy(
            static_cast<Type>(type),
            {at(logits), at<int64_t>(target), nullptr, false, at<float>(losses), at<float>(loss), at<double>(lse),
             nullptr, at<double>(count), at(dlogits), rows, cols, ignore_index, smoothing, z_loss},
            stream);
      },
      py::arg("type"), py::arg("logits"), py::arg("target"), py::arg("losses"), py::arg("loss"), py::arg("lse"),
      py::arg("count"), py::arg("dlogits"), py::arg("rows"), py::arg("cols"), py::arg("ignore_index"),
      py::arg("smoothing"), py::arg("z_loss"), py::arg("stream"));
  m.def(
      "cross_entropy_backward",
      [](int type, Address logits, Address target, Address grad, bool grad_rows, Address lse, Address count,
         Address dlogits, int64_t rows, int64_t cols, int64_t ignore_index, float smoothing, float z_loss,
         Address stream) {
        cross_entropy_backward(
            static_cast<Type>(type),
            {at(logits), at<int64_t>(target), at<float>(grad), grad_rows, nullptr, nullptr, at<double>(lse), nullptr,
             at<double>(count), at(dlogits), rows, cols, ignore_index, smoothing, z_loss},
            stream);
      },
      py::arg("type"), py::arg("logits"), py::arg("target"), py::arg("grad"), py::arg("grad_rows"), py::arg("lse"),
      py::arg("count"), py::arg("dlogits"), py::arg("rows"), py::arg("cols"), py::arg("ignore_index"),
      py::arg("smoothing"), py::arg("z_loss"), py::arg("stream"));
  m.def(
      "scale_rows",
      [](int type, Address x, Address factor, bool factor_rows, int64_t rows, int64_t cols, Address stream) {
        CrossEntropyArgs a = {};
        a.dlogits = at(x), a.grad = at<float>(factor), a.grad_rows = factor_rows, a.rows = rows, a.cols = cols;
        scale_rows(static_cast<Type>(type), a, stream);
      },
      py::arg("type"), py::arg("x"), py::arg("factor"), py::arg("factor_rows"), py::arg("rows"), py::arg("cols"),
      py::arg("stream"));
}

void bind_bias_activation(py::module_& m) {
  m.def(
      "bias_activation",
      [](int kind, int type, int bias_type, Address x, Address bias, Address y, int64_t part_count, int64_t rows,
         int64_t cols, Address stream) {
        bias_activation(
            static_cast<Type>(type), static_cast<Type>(bias_type),
            {at(x), nullptr, at(bias), at(y), nullptr, nullptr, part_count, rows, cols, static_cast<Activation>(kind)},
            stream);
      },
      py::arg("kind"), py::arg("type"), py::arg("bias_type"), py::arg("x"), py::arg("bias"), py::arg("y"),
      py::arg("part_count"), py::arg("rows"), py::arg("cols"), py::arg("stream"));
  m.def(
      "bias_activation_backward",
      [](int kind, int type, int bias_type, Address grad, Address kept, Address bias, Address dx, Address dbias,
         Address parts, int64_t part_count, int64_t rows, int64_t cols, Address stream) {
        bias_activation_backward(static_cast<Type>(type), static_cast<Type>(bias_type),
                                 {at(grad), at(kept), at(bias), at(dx), at(dbias), at<float>(parts), part_count, rows,
                                  cols, static_cast<Activation>(kind)},
                                 stream);
      },
      py::arg("kind"), py::arg("type"), py::arg("bias_type"), py::arg("grad"), py::arg("kept"), py::arg("bias"),
      py::arg("dx"), py::arg("dbias"), py::arg("parts"), py::arg("part_count"), py::arg("rows"), py::arg("cols"),
      py::arg("stream"));
}

void bind_optimizer(py::module_& m) {
  m.def(
      "grad_norm",
      [](int type, Address first_chunk, Address sizes, int64_t count, int64_t chunks, Address grads, Address parts,
         Address norm, Address stream) {
        grad_norm(static_cast<Type>(type),
                  {{at<int64_t>(first_chunk), at<int64_t>(sizes), count, chunks},
                   at<int64_t>(grads),
                   at<double>(parts),
                   at<double>(norm)},
                  stream);
      },
      py::arg("type"), py::arg("first_chunk"), py::arg("sizes"), py::arg("count"), py::arg("chunks"), py::arg("grads"),
      py::arg("parts"), py::arg("norm"), py::arg("stream"));
  m.def(
      "adamw",
      [](int shadow_type, Address first_chunk, Address sizes, int64_t count, int64_t chunks, Address params,
         Address grads, Address exp_avgs, Address exp_avg_sqs, Address shadows, Address decays, float beta1,
         float beta2, float eps, float grad_scale, float step_size, float root_correction, bool zero_grads,
         Address stream) {
        adamw(static_cast<Type>(shadow_type),
              {{at<int64_t>(first_chunk), at<int64_t>(sizes), count, chunks},
               at<int64_t>(params),
               at<int64_t>(grads),
               at<int64_t>(exp_avgs),
               at<int64_t>(exp_avg_sqs),
               at<int64_t>(shadows),
               at<float>(decays),
               beta1,
               beta2,
               eps,
               grad_scale,
               step_size,
               root_correction,
               zero_grads},
              stream);
      },
      py::arg("shadow_type"), py::arg("first_chunk"), py::arg("sizes"), py::arg("count"), py::arg("chunks"),
      py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("shadows"),
      py::arg("decays"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("grad_scale"),
      py::arg("step_size"), py::arg("root_correction"), py::arg("zero_grads"), py::arg("stream"));
}

void bind_embedding(py::module_& m) {
  m.def(
      "embedding",
      [](int type, Address ids, Address weight, Address y, int64_t count, int64_t rows, int64_t cols, Address stream) {
        embedding(static_cast<Type>(type), {at<int64_t>(ids), nullptr, at(weight), at(y), count, rows, cols, -1, false},
                  stream);
      },
      py::arg("type"), py::arg("ids"), py::arg("weight"), py::arg("y"), py::arg("count"), py::arg("rows"),
      py::arg("cols"), py::arg("stream"));
  m.def(
      "embedding_backward",
      [](int grad_type, int type, Address ids, Address positions, Address grad, Address into, int64_t count,
         int64_t rows, int64_t cols, int64_t padding, bool keep, Address stream) {
        embedding_backward(
            static_cast<Type>(grad_type), static_cast<Type>(type),
            {at<int64_t>(ids), at<int64_t>(positions), at(grad), at(into), count, rows, cols, padding, keep}, stream);
      },
      py::arg("grad_type"), py::arg("type"), py::arg("ids"), py::arg("positions"), py::arg("grad"), py::arg("into"),
      py::arg("count"), py::arg("rows"), py::arg("cols"), py::arg("padding"), py::arg("keep"), py::arg("stream"));
  m.def(
      "rope",
      [](int type, Address x, Address y, Address cos, Address sin, int64_t x_batch, int64_t x_head, int64_t x_position,
         int64_t y_batch, int64_t y_head, int64_t y_position, int64_t batch, int64_t heads, int64_t length,
         int64_t head_dim, int64_t pairs, bool interleaved, bool inverse, Address stream) {
        rope(static_cast<Type>(type),
             {at(x),
              at(y),
              at<float>(cos),
              at<float>(sin),
              {x_batch, x_head, x_position},
              {y_batch, y_head, y_position},
              batch,
              heads,
              length,
              head_dim,
              pairs,
              interleaved,
              inverse},
             stream);
      },
      py::arg("type"), py::arg("x"), py::arg("y"), py::arg("cos"), py::arg("sin"), py::arg("x_batch"),
      py::arg("x_head"), py::arg("x_position"), py::arg("y_batch"), py::arg("y_head"), py::arg("y_position"),
      py::arg("batch"), py::arg("heads"), py::arg("length"), py::arg("head_dim"), py::arg("pairs"),
      py::arg("interleaved"), py::arg("inverse"), py::arg("stream"));
}

}  // namespace

void bind_memory_bound(py::module_& m) {
  bind_norm(m);
  bind_cross_entropy(m);
  bind_bias_activation(m);
  bind_optimizer(m);
  bind_embedding(m);
}
