// fastgpt._cpu: attention, linear layers and the transformer block.
#include <array>

#include "cpu/transformer_block.h"
#include "python/cpu.h"

namespace fastgpt::cpu {
namespace {

// Seeds and thresholds of attention's weights, of the projection and of the MLP's second layer.
struct Drops {
  std::array<uint64_t, 3> seeds;
  std::array<uint32_t, 3> thresholds;
  std::array<float, 3> scales;
};

BlockDropout block_dropout(const Drops& d) {
  const auto one = [&](int i) { return AttentionDropout{d.seeds[i], d.thresholds[i], d.scales[i]}; };
  return {one(0), one(1), one(2)};
}

// Of a transformer block: the activation, batch, time, width, heads, key heads and the width inside.
BlockShape block_shape(int stream, int params, int inner, bool half, bool transposed,
                       const std::array<int64_t, 7>& sizes, float eps, const Drops& drops) {
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
          sizes[6],
          block_dropout(drops)};
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

}  // namespace

void bind_products(py::module_& m) {
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
         const std::array<uint64_t, 3>& seeds, const std::array<uint32_t, 3>& thresholds,
         const std::array<float, 3>& scales, const Addresses12& weights, Address x, const Addresses10& state, Address y,
         int threads) {
        transformer_block(block_shape(stream, params, inner, half, transposed, sizes, eps, {seeds, thresholds, scales}),
                          block_weights(weights), at<const void>(x), block_state(state), at<void>(y), threads);
      },
      Release());

  m.def(
      "transformer_block_backward",
      [](int stream, int params, int inner, bool half, bool transposed, const std::array<int64_t, 7>& sizes, float eps,
         const std::array<uint64_t, 3>& seeds, const std::array<uint32_t, 3>& thresholds,
         const std::array<float, 3>& scales, const Addresses12& weights, Address x, const Addresses10& state,
         Address dy, Address dx, const Addresses12& gradients, int threads) {
        transformer_block_backward(
            block_shape(stream, params, inner, half, transposed, sizes, eps, {seeds, thresholds, scales}),
            block_weights(weights), at<const void>(x), block_state(state), at<const void>(dy), at<void>(dx),
            block_gradients(gradients), threads);
      },
      Release());
}

}  // namespace fastgpt::cpu
