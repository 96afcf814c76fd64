// fastgpt._cpu: softmax, norms and losses.
#include <string>

#include "python/cpu.h"

namespace fastgpt::cpu {
namespace {

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

}  // namespace

void bind_rows(py::module_& m) {
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
}

}  // namespace fastgpt::cpu
