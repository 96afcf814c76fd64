#include "bind.h"
#include "cuda/cross_entropy_launch.cuh"

using namespace fastgpt::cuda;

// The arguments of the launchers of fastgpt._cuda, less the stream.
EMU_BIND(count_targets) {
  CrossEntropyArgs args = {};
  args.target = a.pointer<int64_t>(0), args.counted = a.pointer<double>(1);
  args.rows = a.integer(2), args.ignore_index = a.integer(3);
  launch_count_targets(args, nullptr);
}

EMU_BIND(cross_entropy) {
  const CrossEntropyArgs args = {a.pointer<void>(1),
                                 a.pointer<int64_t>(2),
                                 nullptr,
                                 false,
                                 a.pointer<float>(3),
                                 a.pointer<float>(4),
                                 a.pointer<double>(5),
                                 nullptr,
                                 a.pointer<double>(6),
                                 a.pointer<void>(7),
                                 a.integer(8),
                                 a.integer(9),
                                 a.integer(10),
                                 a.number(11),
                                 a.number(12)};
  with_type(Type(a.integer(0)), [&](auto t) { launch_cross_entropy<decltype(t)>(args, nullptr); });
}

EMU_BIND(cross_entropy_backward) {
  const CrossEntropyArgs args = {a.pointer<void>(1),
                                 a.pointer<int64_t>(2),
                                 a.pointer<float>(3),
                                 a.integer(4) != 0,
                                 nullptr,
                                 nullptr,
                                 a.pointer<double>(5),
                                 nullptr,
                                 a.pointer<double>(6),
                                 a.pointer<void>(7),
                                 a.integer(8),
                                 a.integer(9),
                                 a.integer(10),
                                 a.number(11),
                                 a.number(12)};
  with_type(Type(a.integer(0)), [&](auto t) { launch_cross_entropy_backward<decltype(t)>(args, nullptr); });
}

EMU_BIND(scale_rows) {
  CrossEntropyArgs args = {};
  args.dlogits = a.pointer<void>(1), args.grad = a.pointer<float>(2), args.grad_rows = a.integer(3) != 0;
  args.rows = a.integer(4), args.cols = a.integer(5);
  with_type(Type(a.integer(0)), [&](auto t) { launch_scale_rows<decltype(t)>(args, nullptr); });
}
