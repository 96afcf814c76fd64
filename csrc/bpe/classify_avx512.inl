// The classes of 64 bytes by AVX-512 (F, BW): included inside an anonymous namespace by the files that use it.

struct Classes {
  uint64_t letters, upper, digits, space, white, newline, apostrophe, slash, high;
  uint64_t common = 0;  // letters without case
  uint64_t inner = 0;   // bytes of characters but the first
};

inline Classes classes_of(__m512i v) {
  auto in_range = [&](__m512i bytes, char first, char count) {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(bytes, _mm512_set1_epi8(first)), _mm512_set1_epi8(count));
  };
  auto equal = [&](char byte) { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(byte)); };
  Classes c;
  c.letters = in_range(_mm512_or_si512(v, _mm512_set1_epi8(0x20)), 'a', 26);
  c.upper = in_range(v, 'A', 26);
  c.digits = in_range(v, '0', 10);
  c.space = equal(' ');
  c.white = in_range(v, '\t', 5) | c.space;
  c.newline = equal('\n') | equal('\r');
  c.apostrophe = equal('\'');
  c.slash = equal('/');
  c.high = _mm512_movepi8_mask(v);
  return c;
}

inline Classes classify(const uint8_t* p) { return classes_of(_mm512_loadu_si512(p)); }

// Of fewer bytes; nothing behind them is read.
inline Classes classify_part(const uint8_t* p, size_t bytes) {
  return classes_of(_mm512_maskz_loadu_epi8(_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(bytes)), p));
}
