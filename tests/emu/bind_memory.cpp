#include "bind.h"
#include "cuda/adamw_launch.cuh"
#include "cuda/bias_activation_launch.cuh"
#include "cuda/embedding_launch.cuh"
#include "cuda/rope_launch.cuh"

using namespace fastgpt::cuda;

// The arguments of the launchers of fastgpt._cuda, less the stream.
EMU_BIND(bias_activation) {
  const BiasActivationArgs args = {
      a.pointer<void>(3), nullptr,      a.pointer<void>(4), a.pointer<void>(5),      nullptr, nullptr,
      a.integer(6),       a.integer(7), a.integer(8),       Activation(a.integer(0))};
  launch_bias_activation<false>(Type(a.integer(1)), Type(a.integer(2)), args, nullptr);
}

EMU_BIND(bias_activation_backward) {
  const BiasActivationArgs args = {a.pointer<void>(3), a.pointer<void>(4),      a.pointer<void>(5), a.pointer<void>(6),
                                   a.pointer<void>(7), a.pointer<float>(8),     a.integer(9),       a.integer(10),
                                   a.integer(11),      Activation(a.integer(0))};
  launch_bias_activation<true>(Type(a.integer(1)), Type(a.integer(2)), args, nullptr);
}

EMU_BIND(grad_norm) {
  const GradNormArgs args = {{a.pointer<int64_t>(1), a.pointer<int64_t>(2), a.integer(3), a.integer(4)},
                             a.pointer<int64_t>(5),
                             a.pointer<double>(6),
                             a.pointer<double>(7)};
  with_type(Type(a.integer(0)), [&](auto t) { launch_grad_norm<decltype(t)>(args, nullptr); });
}

EMU_BIND(adamw) {
  const AdamwArgs args = {{a.pointer<int64_t>(1), a.pointer<int64_t>(2), a.integer(3), a.integer(4)},
                          a.pointer<int64_t>(5),
                          a.pointer<int64_t>(6),
                          a.pointer<int64_t>(7),
                          a.pointer<int64_t>(8),
                          a.pointer<int64_t>(9),
                          a.pointer<float>(10),
                          a.number(11),
                          a.number(12),
                          a.number(13),
                          a.number(14),
                          a.number(15),
                          a.number(16),
                          a.integer(17) != 0};
  launch_adamw(Type(a.integer(0)), args, nullptr);
}

EMU_BIND(embedding) {
  const EmbeddingArgs args = {a.pointer<int64_t>(1), nullptr,      a.pointer<void>(2),
                              a.pointer<void>(3),    a.integer(4), a.integer(5),
                              a.integer(6),          -1,           false};
  with_type(Type(a.integer(0)), [&](auto t) { launch_embedding<decltype(t)>(args, nullptr); });
}

EMU_BIND(embedding_backward) {
  const EmbeddingArgs args = {a.pointer<int64_t>(2), a.pointer<int64_t>(3), a.pointer<void>(4),
                              a.pointer<void>(5),    a.integer(6),          a.integer(7),
                              a.integer(8),          a.integer(9),          a.integer(10) != 0};
  launch_embedding_backward(Type(a.integer(0)), Type(a.integer(1)), args, nullptr);
}

EMU_BIND(rope) {
  const RopeArgs args = {a.pointer<void>(1),
                         a.pointer<void>(2),
                         a.pointer<float>(3),
                         a.pointer<float>(4),
                         {a.integer(5), a.integer(6), a.integer(7)},
                         {a.integer(8), a.integer(9), a.integer(10)},
                         a.integer(11),
                         a.integer(12),
                         a.integer(13),
                         a.integer(14),
                         a.integer(15),
                         a.integer(16) != 0,
                         a.integer(17) != 0};
  with_type(Type(a.integer(0)), [&](auto t) { launch_rope<decltype(t)>(args, nullptr); });
}
