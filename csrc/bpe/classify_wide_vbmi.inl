// The classes of what is not ASCII in 64 bytes, by AVX-512 with VBMI: included inside an anonymous namespace after
// classify_avx512.inl.
//
// A set of code points is a table of bits that all bytes of the window look into at once. Registers hold those of two
// bytes (to U+07FF), the blocks of 64 of three bytes that are letters or symbols throughout (Chinese, Hangul), and
// U+2000 to U+21FF and U+3000 to U+31FF (punctuation, Japanese). What is elsewhere is looked up one by one.

#define FASTGPT_WIDE

constexpr uint32_t kTwoByteEnd = 0x800;
constexpr uint32_t kNearBlock = 512;  // of the two near ranges

constexpr uint32_t near_code_point(uint32_t i) { return (i < kNearBlock ? 0x2000 : 0x3000) + i % kNearBlock; }

template <size_t kBytes>
struct alignas(64) Bits {
  uint8_t bytes[kBytes] = {};
  constexpr void set(size_t i) { bytes[i / 8] |= static_cast<uint8_t>(1 << i % 8); }
};

// The code points whose class is in `set`. ASCII in two bytes is not well-formed, and in no set but that of what is
// unknown.
constexpr Bits<256> two_bytes_in(uint8_t set, bool unknown = false) {
  Bits<256> bits;
  for (uint32_t c = 0; c < kTwoByteEnd; ++c) {
    if (c < 0x80 ? unknown : (class_of(c) & set) != 0) bits.set(c);
  }
  return bits;
}

constexpr Bits<128> near_in(uint8_t set) {
  Bits<128> bits;
  for (uint32_t i = 0; i < 2 * kNearBlock; ++i) {
    if (class_of(near_code_point(i)) & set) bits.set(i);
  }
  return bits;
}

// The blocks of 64 code points that are in `set` throughout; neither those that have shorter forms nor surrogates.
constexpr Bits<128> blocks_in(uint8_t set) {
  Bits<128> bits;
  for (uint32_t block = kTwoByteEnd / 64; block < 1024; ++block) {
    bool all = block < 0xD800 / 64 || block >= 0xE000 / 64;
    for (uint32_t i = 0; all && i < 64; ++i) all = (class_of(block * 64 + i) & set) != 0;
    if (all) bits.set(block);
  }
  return bits;
}

// The classes that Window has no place for. With kCased, marks are parts of words but no letters.
template <bool kCased>
constexpr uint8_t kUnclear = kWhite | kNumber | (kCased ? kMark : 0);

inline __mmask64 test(const Bits<128>& set, __m512i at, __m512i bit) {
  const __m512i byte = _mm512_permutex2var_epi8(_mm512_load_si512(set.bytes), at, _mm512_load_si512(set.bytes + 64));
  return _mm512_test_epi8_mask(byte, bit);
}

inline __mmask64 test(const Bits<256>& set, __m512i at, __m512i bit) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(set.bytes), at, _mm512_load_si512(set.bytes + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_load_si512(set.bytes + 128), at, _mm512_load_si512(set.bytes + 192));
  return _mm512_test_epi8_mask(_mm512_mask_blend_epi8(_mm512_movepi8_mask(at), low, high), bit);
}

// For each byte, the bits 3 to 7 from 0 to 4 of `upper`, the bits 0 to 2 from 3 to 5 of `lower`.
inline __m512i byte_of_set(__m512i upper, __m512i lower) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(0xF8)), _mm512_slli_epi16(upper, 3),
                                   _mm512_and_si512(_mm512_srli_epi16(lower, 3), _mm512_set1_epi8(7)), 0xCA);
}

inline __m512i bit_of_set(__m512i lower) {
  const __m512i powers = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
  return _mm512_shuffle_epi8(powers, _mm512_and_si512(lower, _mm512_set1_epi8(7)));
}

// What is not ASCII in the first `bytes` bytes at p: letters, with kCased also which are capital or have no case, bytes
// within characters, and the first bytes of what is neither letter nor symbol, or not well-formed, or not whole, of
// which some may be missing behind the first.
struct Wide {
  uint64_t letters, upper, common, inner, unknown;
};

template <bool kCased>
[[gnu::noinline]] Wide classify_wide(const uint8_t* p, const uint8_t* end, size_t bytes) {
  const uint64_t inside = _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(bytes));
  const __m512i v = _mm512_maskz_loadu_epi8(inside, p);
  const __m512i second = _mm512_maskz_loadu_epi8(inside >> 1, p + 1);
  const __m512i third = _mm512_maskz_loadu_epi8(inside >> 2, p + 2);
  auto in_range = [&](int first, int count) -> uint64_t {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8(static_cast<char>(first))),
                                  _mm512_set1_epi8(static_cast<char>(count)));
  };
  const uint64_t two = in_range(0xC2, 30), three = in_range(0xE0, 16), four = in_range(0xF0, 5);
  const uint64_t more = in_range(0x80, 64);
  uint64_t unknown = _mm512_movepi8_mask(v) & ~(more | two | three | four);
  unknown |= (two & ~(more >> 1)) | (three & ~(more >> 1 & more >> 2));
  unknown |= more & ~((two | three | four) << 1 | (three | four) << 2 | four << 3);

  const __m512i at = byte_of_set(v, second), bit = bit_of_set(second);
  uint64_t letters = 0, upper = 0, common = 0;
  if (two) {
    static constexpr Bits<256> kLetter2 = two_bytes_in(kLetters), kUnclear2 = two_bytes_in(kUnclear<kCased>, true);
    letters = two & test(kLetter2, at, bit);
    unknown |= two & test(kUnclear2, at, bit);
    if constexpr (kCased) {
      static constexpr Bits<256> kUpper2 = two_bytes_in(kUpper), kCommon2 = two_bytes_in(kLetter);
      upper = two & test(kUpper2, at, bit);
      common = two & test(kCommon2, at, bit);
      upper |= upper << 1;
      common |= common << 1;
    }
    letters |= letters << 1;
  }
  uint64_t single = four;
  if (three) {
    static constexpr Bits<128> kLetterBlocks = blocks_in(kLetter), kSymbolBlocks = blocks_in(kOther);
    static constexpr Bits<128> kNearLetter = near_in(kLetters), kNearUnclear = near_in(kUnclear<kCased>);
    auto thrice = [](uint64_t mask) { return mask | mask << 1 | mask << 2; };
    const uint64_t in_block = three & test(kLetterBlocks, at, bit);
    const uint64_t near = three & in_range(0xE2, 2) & _mm512_testn_epi8_mask(second, _mm512_set1_epi8(0x38));
    const __m512i range = _mm512_and_si512(_mm512_slli_epi16(v, 6), _mm512_set1_epi8(0x40));
    const __m512i near_at = _mm512_or_si512(byte_of_set(second, third), range), near_bit = bit_of_set(third);
    letters |= thrice(in_block | (near & test(kNearLetter, near_at, near_bit)));
    unknown |= near & test(kNearUnclear, near_at, near_bit);
    if constexpr (kCased) {
      static constexpr Bits<128> kNearUpper = near_in(kUpper), kNearCommon = near_in(kLetter);
      upper |= thrice(near & test(kNearUpper, near_at, near_bit));
      common |= thrice(in_block | (near & test(kNearCommon, near_at, near_bit)));
    }
    single |= three & ~(in_block | near | test(kSymbolBlocks, at, bit));
  }
  for (single &= ~unknown & (unknown - 1); single; single &= single - 1) {
    const size_t i = static_cast<size_t>(__builtin_ctzll(single));
    const Char one = wide_char_at(p + i, end);
    if (one.length == 1 || i + one.length > bytes || one.cls & kUnclear<kCased>) {
      unknown |= uint64_t{1} << i;
      break;
    }
    const uint64_t its = ((uint64_t{1} << one.length) - 1) << i;
    if (one.cls & kLetters) letters |= its;
    if (one.cls & kUpper) upper |= its;
    if (one.cls & kLetter) common |= its;
  }
  return {letters, upper, common, more, unknown};
}

template <bool kCased>
inline uint64_t add_wide(Classes& c, const uint8_t* p, const uint8_t* end, size_t bytes) {
  const Wide wide = classify_wide<kCased>(p, end, bytes);
  c.letters |= wide.letters;
  c.upper |= wide.upper;
  c.common = wide.common;
  c.inner = wide.inner;
  return wide.unknown;
}
