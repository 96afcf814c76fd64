// The factors of attention's dropout, 0 or 1 / (1 - p), a block at a time in the layout of the scores.

// element, elements + 1 to + 3: the words of four keys in a row for each lane, a lane a query. counter[w] holds word w
// of each lane's first counter, after[w] of the next one, `shift` the first element's place in its counter.
INLINE VecUInt word_of_key(const VecUInt (&counter)[4], const VecUInt (&after)[4], VecUInt shift, int key) {
  VecUInt word = counter[key];
  for (unsigned s = 1; s < 4; ++s) {
    const unsigned place = s + key;
    word = shift == s ? (place < 4 ? counter[place % 4] : after[place % 4]) : word;
  }
  return word;
}

// The low halves of two vectors of 64-bit lanes, in order.
INLINE VecUInt low_halves(VecU64 first, VecU64 second) {
  const VecUInt a = bit_cast<VecUInt>(first), b = bit_cast<VecUInt>(second);
#if FASTGPT_LANES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif FASTGPT_LANES == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

INLINE void words_of_counters(const VecU64 (&counters)[2], uint64_t seed, VecUInt (&words)[4]) {
  const PhiloxWords<2> w = philox(counters, seed);
  for (int k = 0; k < 4; ++k) words[k] = low_halves(w.word[k][0], w.word[k][1]);
}

// factors (kBlock, kBlock): a key a row, a query a lane, for the keys and queries that the window holds; `head` is
// b H + h. Keys come four at a time: one counter a query where Tk is a multiple of 4, two else.
template <class Args>
void dropout_factors(const Args& a, const Window& w, int64_t head, int64_t i0, int64_t j0, float* factors) {
  VecU64 lanes;
  for (int l = 0; l < kCounters; ++l) lanes[l] = l;
  const bool aligned = a.keys % 4 == 0;
  for (int j = 0; j < w.keys; j += 4) {
    for (int c = w.first_vector(j); c < w.vectors; ++c) {
      const uint64_t row = static_cast<uint64_t>(head * a.queries + i0 + c * kLanes);
      VecU64 elements[2];
      for (int n = 0; n < 2; ++n) {
        elements[n] = (lanes + (row + n * kCounters)) * static_cast<uint64_t>(a.keys) + static_cast<uint64_t>(j0 + j);
      }
      const VecU64 counters[2] = {elements[0] >> 2, elements[1] >> 2};
      VecUInt words[4], after[4];
      words_of_counters(counters, a.dropout.seed, words);
      if (!aligned) {
        const VecU64 next[2] = {counters[0] + 1, counters[1] + 1};
        words_of_counters(next, a.dropout.seed, after);
        const VecUInt shift = low_halves(elements[0], elements[1]) & 3u;
        VecUInt shifted[4];
        for (int k = 0; k < 4; ++k) shifted[k] = word_of_key(words, after, shift, k);
        for (int k = 0; k < 4; ++k) words[k] = shifted[k];
      }
      for (int k = 0; k < 4; ++k) {
        const Vec factor = words[k] >= a.dropout.threshold ? splat(a.dropout.scale) : Vec{};
        store(factors + (j + k) * kBlock + c * kLanes, factor);
      }
    }
  }
}
