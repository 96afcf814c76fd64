// The vector scanners: included inside an anonymous namespace by the file of each instruction set, after that file has
// defined `Classes classify(const uint8_t* p)`, which looks at 64 bytes, and `classify_part`, which looks at fewer, and
// may have defined `write_places`, with the macro FASTGPT_WRITE_PLACES, and `add_wide` for what is not ASCII, with
// FASTGPT_WIDE.
//
// A window of up to 64 bytes begins at a known boundary or within letters, so nothing before it matters. Its bytes
// become bit masks, one a class, and the starts of all pre-tokens in it follow from shifts, ands and carries. Starts
// that bytes behind the window could change are dropped, the last start left begins the next window. A window ends
// before the first character whose class is not known; where that leaves no start to go on with, the next window
// begins with a late letter of the run that fills it, or else one pre-token is found by the scalar code. The text's
// last window is its last one where no white space ends it: what the text's end means for a pattern is about white
// space.

constexpr size_t kWindow = 64;

inline uint64_t low_bits(size_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

#ifndef FASTGPT_WRITE_PLACES
// Writes base + i for every bit i of mask, ascending, and returns how many; out has room for 64. Eight at a time
// without a look at how many there are, as a branch on that is seldom foreseen.
inline size_t write_places(uint64_t mask, uint32_t base, uint32_t* out) {
  const size_t count = static_cast<size_t>(__builtin_popcountll(mask));
  for (size_t at = 0; at < count; at += 8) {
    for (size_t i = at; i < at + 8; ++i, mask &= mask - 1) {
      out[i] = base + static_cast<uint32_t>(_tzcnt_u64(mask));  // 64 where no bit is left
    }
  }
  return count;
}
#endif

#ifndef FASTGPT_WIDE
constexpr bool kWide = false;
#else
constexpr bool kWide = true;
#endif

// What is common to the patterns.
struct Window {
  Classes c;
  uint64_t symbols;       // no letter, digit or white space
  uint64_t symbol_start;  // of a run of symbols
  uint64_t free_symbol;   // such a start that no space goes with
  uint64_t letter_start, digit_start;

  explicit Window(const Classes& classes, uint64_t inside) : c(classes) {
    c.letters &= inside;
    c.digits &= inside;
    c.space &= inside;
    c.white &= inside;
    c.newline &= inside;
    symbols = ~(c.letters | c.digits | c.white) & inside;
    symbol_start = symbols & ~(symbols << 1);
    free_symbol = symbol_start & ~(c.space << 1);
    letter_start = c.letters & ~(c.letters << 1);
    digit_start = c.digits & ~(c.digits << 1);
  }
  // What follows the characters that begin at these places.
  uint64_t after(uint64_t places) const { return kWide ? ((places << 1) + c.inner) & ~c.inner : places << 1; }
};

// Starts in white space where lines matter: a run's begin, what follows its last line end, its last character. Line
// ends right after symbols belong to these.
inline uint64_t white_starts_with_lines(const Window& w) {
  const uint64_t after_symbol = w.c.newline & (w.symbols << 1);
  const uint64_t absorbed =
      w.c.newline & ~(w.c.newline + after_symbol);  // the carry runs through each run of line ends
  const uint64_t white = w.c.white & ~absorbed;
  const uint64_t blank = w.c.white & ~w.c.newline;
  uint64_t after_line = (w.c.newline & ~absorbed) << 1 & blank;
  const uint64_t segment_end = (blank + after_line) & ~blank;
  if (segment_end & w.c.newline) {  // another line end follows in the same run
    for (uint64_t left = after_line; left; left &= left - 1) {
      const uint64_t from = left & (~left + 1);
      const uint64_t end = segment_end & ~(from - 1);
      if (end & (~end + 1) & w.c.newline) after_line &= ~from;
    }
  }
  return (white & ~(white << 1)) | (white & ~(white >> 1) & ~w.c.newline) | after_line;
}

inline uint64_t digit_starts_by_three(const Window& w) {
  const uint64_t d = w.c.digits;
  const uint64_t four = d & d << 1 & d << 2 & d << 3;
  uint64_t starts = w.digit_start;
  for (uint64_t next = starts << 3 & four; next; next = next << 3 & four) starts |= next;
  return starts;
}

// Puts contractions into `starts`: the apostrophes in `candidates` begin one (or, with kSuffix, end a word with one)
// where the text says so.
template <bool kFold, bool kSuffix>
inline uint64_t with_contractions(uint64_t starts, uint64_t candidates, const uint8_t* p, const uint8_t* end) {
  uint64_t forced = 0;
  for (; candidates; candidates &= candidates - 1) {
    const int at = __builtin_ctzll(candidates);
    if (kSuffix && (forced >> at & 1)) continue;  // a pre-token begins here, so it is no suffix
    const size_t n = contraction_length<kFold>(p + at, end);
    if (!n) continue;
    starts &= ~(low_bits(n) << at);
    if (!kSuffix) starts |= uint64_t{1} << at;
    if (at + n < kWindow) forced |= uint64_t{1} << (at + n);
    starts |= forced;
  }
  return starts;
}

struct Gpt2Starts {
  using Token = Gpt2Token;
  static constexpr bool kCased = false;
  static uint64_t find(const Window& w, const uint8_t* p, const uint8_t* end) {
    const uint64_t alone = ~(w.c.space << 1);
    const uint64_t white = w.c.white;
    const uint64_t starts =
        ((w.letter_start | w.digit_start) & alone) | w.free_symbol | (white & ~(white << 1)) | (white & ~(white >> 1));
    return with_contractions<false, false>(starts, w.free_symbol & w.c.apostrophe & (w.c.letters >> 1), p, end);
  }
};

template <int kDigits, bool kEndFirst>
struct Cl100kStarts {
  using Token = Cl100kToken<kDigits, kEndFirst>;
  static constexpr bool kCased = false;
  static uint64_t find(const Window& w, const uint8_t* p, const uint8_t* end) {
    const uint64_t blank = w.c.white & ~w.c.newline;
    const uint64_t prefix = w.after(blank | w.free_symbol);  // a letter here has its pre-token's begin before it
    const uint64_t digits = kDigits == 1 ? w.c.digits : digit_starts_by_three(w);
    const uint64_t starts = (w.letter_start & ~prefix) | digits | w.free_symbol | white_starts_with_lines(w);
    return with_contractions<true, false>(starts, w.free_symbol & w.c.apostrophe & (w.c.letters >> 1), p, end);
  }
};

struct O200kStarts {
  using Token = O200kToken;
  static constexpr bool kCased = true;
  static uint64_t find(const Window& w, const uint8_t* p, const uint8_t* end) {
    const uint64_t blank = w.c.white & ~w.c.newline;
    const uint64_t prefix = w.after(blank | w.free_symbol);
    const uint64_t upper = w.c.upper & w.c.letters;
    const uint64_t after_lower = (w.c.letters & ~upper) << 1;
    const uint64_t starts = (w.letter_start & ~prefix) | (upper & after_lower) | digit_starts_by_three(w) |
                            w.free_symbol | white_starts_with_lines(w);
    return with_contractions<true, true>(starts, w.c.apostrophe & (w.c.letters << 1), p, end);
  }
  // Symbols take line ends and slashes in any order with them; the masks only know line ends. And a capital right after
  // a letter without case goes with it or not as a small letter follows.
  static uint64_t unclear(const Window& w) {
    return (w.c.slash & (w.c.newline << 1)) | (w.c.upper & w.c.letters & (w.c.common << 1));
  }
  // After a small letter only small ones and those without case belong to a word, so where there is one, a window must
  // begin with it.
  static uint64_t within(const Window& w) {
    const uint64_t small = w.c.letters & ~(w.c.upper | w.c.common);
    return small ? small : w.c.letters;
  }
};

template <class Starts>
inline uint64_t unclear_at(const Window& w) {
  if constexpr (requires { Starts::unclear(w); }) {
    return Starts::unclear(w);
  } else {
    return 0;
  }
}

// The letters of a run which a window can begin with and be cut as it would be from the run's begin on.
template <class Starts>
inline uint64_t within_letters(const Window& w) {
  if constexpr (requires { Starts::within(w); }) {
    return Starts::within(w);
  } else {
    return w.c.letters;
  }
}

template <class Starts>
size_t scan(const uint8_t* text, size_t size, size_t pos, uint32_t* ends, size_t capacity) {
  const uint8_t* const end = text + size;
  size_t n = 0;
  while (pos < size && n + kWindow <= capacity) {
    const uint8_t* const p = text + pos;
    if (kWide || *p < 0x80) {
      const size_t bytes = std::min(size - pos, kWindow);
      Classes classes = bytes == kWindow ? classify(p) : classify_part(p, bytes);
      uint64_t inside = low_bits(bytes);
      if (classes.high) {
        uint64_t unknown = classes.high;
        if constexpr (kWide) unknown = add_wide<Starts::kCased>(classes, p, end, bytes);
        if (unknown) inside &= low_bits(static_cast<size_t>(__builtin_ctzll(unknown)));
      }
      if (const uint64_t unclear = unclear_at<Starts>(Window(classes, inside))) {
        inside &= low_bits(static_cast<size_t>(__builtin_ctzll(unclear)));
      }
      const Window window(classes, inside);
      uint64_t starts = Starts::find(window, p, end) & inside & ~uint64_t{1};
      if (__builtin_expect(size - pos <= kWindow, 0) && inside == low_bits(bytes) && !(window.c.white >> (bytes - 1))) {
        n += write_places(starts, static_cast<uint32_t>(pos), ends + n);
        ends[n++] = static_cast<uint32_t>(size);
        return n;
      }
      // The next window must not wait for all of this one's starts: where a space stands between letters, which is a
      // start in every pattern, it begins there.
      const uint64_t between = window.c.space & (window.c.letters << 1) & (window.c.letters >> 1);
      if (__builtin_expect(between != 0, 1)) {
        const size_t next = static_cast<size_t>(63 - __builtin_clzll(between));
        n += write_places(starts & low_bits(next + 1), static_cast<uint32_t>(pos), ends + n);
        pos += next;
        continue;
      }
      // White space at the window's end may go on: of such a run only the begin is certain.
      const uint64_t solid = inside & ~window.c.white;
      starts &= solid ? low_bits(static_cast<size_t>(64 - __builtin_clzll(solid)) + 1) : 0;
      if (starts) {
        n += write_places(starts, static_cast<uint32_t>(pos), ends + n);
        pos += static_cast<size_t>(63 - __builtin_clzll(starts));
        continue;
      }
      const uint64_t later = inside & ~classes.inner & ~uint64_t{1};  // where a character but the first begins
      if (inside >> (kWindow - 4) && !(later & ~window.c.letters)) {  // a window of letters, but for part of the last
        if (const uint64_t within = later & within_letters<Starts>(window)) {
          pos += static_cast<size_t>(63 - __builtin_clzll(within));
          continue;
        }
      }
    }
    pos = static_cast<size_t>(Starts::Token::next(p, end) - text);
    ends[n++] = static_cast<uint32_t>(pos);
  }
  return n;
}

constexpr ScannerTable kTable = {
    kIsaName,
    {scan<Gpt2Starts>, scan<Cl100kStarts<3, true>>, scan<O200kStarts>, scan<Cl100kStarts<3, false>>,
     scan<Cl100kStarts<1, false>>},
};
