// The random words of every dropout: philox4x32_10 (Salmon et al., SC11), four words a counter.
#pragma once

#include <cstdint>

namespace fastgpt::cuda {

struct PhiloxWords {
  uint32_t word[4];
};

__device__ __forceinline__ PhiloxWords philox(uint64_t counter, uint64_t seed) {
  PhiloxWords w = {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(w.word[0]) * 0xD2511F53u, product1 = uint64_t(w.word[2]) * 0xCD9E8D57u;
    w = {{static_cast<uint32_t>(product1 >> 32) ^ w.word[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ w.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return w;
}

}  // namespace fastgpt::cuda
