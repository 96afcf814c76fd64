// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), a vector of counters at once.
//
// Element i of a stream takes word i % 4 of philox(counter = i / 4, key = seed): the counter's 64 bits are the words 0
// and 1, the words 2 and 3 are 0; the key's low word is the seed's. An element is dropped where its word is below
// p 2^32. Nothing depends on how the elements are split or on the vectors' length, so a mask can be made again at any
// place.

typedef uint64_t VecU64 __attribute__((vector_size(4 * FASTGPT_LANES)));
constexpr int kCounters = kLanes / 2;  // counters a vector: a 64-bit lane each
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;

// The whole products of the low halves of the lanes; the high halves are ignored.
INLINE VecU64 multiply_low(VecU64 a, uint64_t b) {
#if FASTGPT_LANES == 16
  return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif FASTGPT_LANES == 8
  return (VecU64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// word[w][n]: word w of the counters in vector n. Only the low halves of the lanes are meant; what the high halves hold
// is never used, which saves the masks.
template <int N>
struct PhiloxWords {
  VecU64 word[4][N];
};

// The rounds from `first` on. N vectors of counters side by side: one is a chain of products and waits for each (2 are
// 1.2 times as fast, 4 are 1.4 times).
template <int N>
INLINE void philox_rounds(int first, uint64_t seed, PhiloxWords<N>& w) {
  const uint32_t passed = static_cast<uint32_t>(first);
  uint32_t key0 = static_cast<uint32_t>(seed) + passed * kPhiloxKey0;
  uint32_t key1 = static_cast<uint32_t>(seed >> 32) + passed * kPhiloxKey1;
#pragma GCC unroll 10
  for (int round = first; round < 10; ++round) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const VecU64 product0 = multiply_low(w.word[0][n], kPhiloxFactor0);
      const VecU64 product1 = multiply_low(w.word[2][n], kPhiloxFactor1);
      w.word[0][n] = (product1 >> 32) ^ w.word[1][n] ^ key0;
      w.word[2][n] = (product0 >> 32) ^ w.word[3][n] ^ key1;
      w.word[1][n] = product1;
      w.word[3][n] = product0;
    }
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
}

template <int N>
INLINE PhiloxWords<N> philox(const VecU64 (&counter)[N], uint64_t seed) {
  PhiloxWords<N> w = {};
  for (int n = 0; n < N; ++n) {
    w.word[0][n] = counter[n];
    w.word[1][n] = counter[n] >> 32;
  }
  philox_rounds(0, seed, w);
  return w;
}

// The same for counters that share their high word: the first round's second product is 0 and the second round's first
// is one number, so both rounds are one product a vector each.
template <int N>
INLINE PhiloxWords<N> philox(const VecU64 (&counter)[N], uint32_t high_word, uint64_t seed) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t shared = uint64_t{high_word ^ key0} * kPhiloxFactor0;
  const uint32_t shared_high = static_cast<uint32_t>(shared >> 32) ^ (key1 + kPhiloxKey1);
  PhiloxWords<N> w;
  for (int n = 0; n < N; ++n) {
    const VecU64 product0 = multiply_low(counter[n], kPhiloxFactor0);
    const VecU64 product1 = multiply_low((product0 >> 32) ^ key1, kPhiloxFactor1);
    w.word[0][n] = (product1 >> 32) ^ (key0 + kPhiloxKey0);
    w.word[1][n] = product1;
    w.word[2][n] = product0 ^ shared_high;
    w.word[3][n] = VecU64{} + shared;
  }
  philox_rounds(2, seed, w);
  return w;
}

// The words of the 2 N kLanes elements from 4 * counter on, in order; counter is a multiple of N kCounters.
template <int N>
INLINE void philox_elements(uint64_t counter, uint64_t seed, VecUInt (&elements)[2 * N]) {
  // Lane 2 k holds counter k and lane 2 k + 1 counter kCounters / 2 + k: taking the even and the odd lanes of pairs of
  // words, which is what the 128-bit halves can do, then leaves the elements in order.
#if FASTGPT_LANES == 16
  const VecU64 lanes = {0, 4, 1, 5, 2, 6, 3, 7};
#elif FASTGPT_LANES == 8
  const VecU64 lanes = {0, 2, 1, 3};
#else
  const VecU64 lanes = {0, 1};
#endif
  VecU64 counters[N];
  for (int n = 0; n < N; ++n) counters[n] = lanes + (counter + n * kCounters);
  const PhiloxWords<N> w = philox(counters, static_cast<uint32_t>(counter >> 32), seed);
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const VecU64 low01 = (w.word[0][n] & 0xffffffffu) | (w.word[1][n] << 32);
    const VecU64 low23 = (w.word[2][n] & 0xffffffffu) | (w.word[3][n] << 32);
#if FASTGPT_LANES == 16
    const VecU64 even = __builtin_shufflevector(low01, low23, 0, 8, 2, 10, 4, 12, 6, 14);
    const VecU64 odd = __builtin_shufflevector(low01, low23, 1, 9, 3, 11, 5, 13, 7, 15);
#elif FASTGPT_LANES == 8
    const VecU64 even = __builtin_shufflevector(low01, low23, 0, 4, 2, 6);
    const VecU64 odd = __builtin_shufflevector(low01, low23, 1, 5, 3, 7);
#else
    const VecU64 even = __builtin_shufflevector(low01, low23, 0, 2);
    const VecU64 odd = __builtin_shufflevector(low01, low23, 1, 3);
#endif
    elements[2 * n] = bit_cast<VecUInt>(even);
    elements[2 * n + 1] = bit_cast<VecUInt>(odd);
  }
}
