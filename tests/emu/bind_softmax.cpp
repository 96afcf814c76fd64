#include "bind.h"
#include "cuda/softmax_launch.cuh"

// type, x, y_in, y, mask, three strides of the mask, batch, heads, queries, cols, scale, causal, log, backward
EMU_BIND(softmax) {
  using namespace fastgpt::cuda;
  const SoftmaxArgs args = {a.pointer<void>(1),
                            a.pointer<void>(2),
                            a.pointer<void>(3),
                            a.pointer<float>(4),
                            {a.integer(5), a.integer(6), a.integer(7)},
                            a.integer(8),
                            a.integer(9),
                            a.integer(10),
                            a.integer(11),
                            a.number(12),
                            a.integer(13) != 0,
                            a.integer(14) != 0};
  with_type(static_cast<Type>(a.integer(0)),
            [&](auto tag) { launch_softmax<decltype(tag)>(args, a.integer(15) != 0, nullptr); });
}
