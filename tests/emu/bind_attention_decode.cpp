#include "bind_attention.h"
#include "cuda/attention_decode_launch.cuh"

// As fastgpt/ops/cuda_attention.py calls the module: the type, then as `attention`, then splits, keys_per_split, part
// and part_lse.
EMU_BIND(attention_decode) {
  DecodeParams d = {};
  int next = 1;
  d.attention = module_params(a, false, next);
  d.splits = a.integer(next), d.keys_per_split = a.integer(next + 1);
  d.part = a.pointer<float>(next + 2), d.part_lse = a.pointer<float>(next + 3);
#if defined(EMU_TSAN) || defined(EMU_ASAN)  // one size: g++ takes long with a sanitizer
  launch_attention_decode<__nv_bfloat16, 64, 4>(d, nullptr);
#else
  fastgpt::cuda::with_type(static_cast<fastgpt::cuda::Type>(a.integer(0)),
                           [&](auto x) { attention_decode<decltype(x)>(d, nullptr); });
#endif
}
