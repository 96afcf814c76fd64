#include "bind.h"
#include "cuda/norm_launch.cuh"

using namespace fastgpt::cuda;

// The arguments of fastgpt._cuda.norm, less the stream.
EMU_BIND(norm) {
  const NormArgs args = {a.pointer<void>(3), a.pointer<void>(4), a.pointer<void>(5),  a.pointer<void>(6),
                         a.pointer<void>(7), a.pointer<void>(8), a.pointer<float>(9), a.pointer<float>(10),
                         a.integer(11),      a.integer(12),      a.number(13)};
  launch_norm(Type(a.integer(0)), Type(a.integer(1)), Type(a.integer(2)), args, nullptr);
}

// The arguments of fastgpt._cuda.norm_backward, less the stream.
EMU_BIND(norm_backward) {
  const NormBackwardArgs args = {a.pointer<void>(2),  a.pointer<void>(3),  a.pointer<void>(4),   a.pointer<void>(5),
                                 a.pointer<float>(6), a.pointer<float>(7), a.pointer<void>(8),   a.pointer<void>(9),
                                 a.pointer<void>(10), a.pointer<void>(11), a.pointer<float>(12), a.integer(13),
                                 a.integer(14),       a.integer(15)};
  launch_norm_backward(Type(a.integer(0)), Type(a.integer(1)), args, nullptr);
}
