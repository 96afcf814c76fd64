#include "bind_attention.h"
#include "cuda/attention_sm80_launch.cuh"

#if defined(EMU_TSAN) || defined(EMU_ASAN)  // one size: g++ takes long with a sanitizer
EMU_BIND(attention_fwd_bf16) { launch_attention_fwd_sm80<__nv_bfloat16, 64>(params(a), nullptr); }
EMU_BIND(attention_bwd_bf16) { launch_attention_bwd_sm80<__nv_bfloat16, 64>(backward_params(a), nullptr); }
#else
EMU_BIND(attention_fwd_bf16) { attention_fwd_sm80<__nv_bfloat16>(params(a), nullptr); }
EMU_BIND(attention_fwd_fp16) { attention_fwd_sm80<__half>(params(a), nullptr); }
EMU_BIND(attention_bwd_bf16) { attention_bwd_sm80<__nv_bfloat16>(backward_params(a), nullptr); }
EMU_BIND(attention_bwd_fp16) { attention_bwd_sm80<__half>(backward_params(a), nullptr); }
#endif

#if !defined(EMU_TSAN) && !defined(EMU_ASAN)
// As fastgpt/ops/cuda_attention.py calls the module.
EMU_BIND(attention) {
  with_half_type(static_cast<fastgpt::cuda::Type>(a.integer(1)),
                 [&](auto x) { attention_fwd_sm80<decltype(x)>(module_params(a, false), nullptr); });
}
EMU_BIND(attention_backward) {
  with_half_type(static_cast<fastgpt::cuda::Type>(a.integer(1)),
                 [&](auto x) { attention_bwd_sm80<decltype(x)>(module_params(a, true), nullptr); });
}
#endif
