// Attention in blocks, never storing the queries x keys matrix (FlashAttention, arXiv 2205.14135 and 2307.08691).
//
//   S = scale * Q K^T,  P = softmax(S) over the keys a query sees,  O = P V,  lse = log sum exp(S)
//
// Causal masks are aligned bottom-right: query i sees keys j <= i + keys - queries.
//
//   queries 2, keys 4:  x x x .      queries 4, keys 2:  . .
//                       x x x x                          . .
//                                                        x .
//                                                        x x
//
// A query that sees no key has output 0, lse -inf and gradient 0. +-inf and NaN do what the formula does with them; a
// masked key is no term of it, but its block may be multiplied by a weight of 0, so a NaN or inf in a masked value may
// come through as NaN.
//
// Blocks of scores lie transposed, a key a row and a query a lane: the maximum and the sum of a query's row are then
// elementwise, the scores need K as it stands (one number at a time, broadcast) and only Q transposed, once a block of
// queries, and P V and the three products of the backward take that same layout. Sums run in the order of the keys (or
// queries) whatever the number of threads.
//
// Backward and forward round scale * s alike, so that lse takes a lone or dominant score away exactly.
//
// Dropout takes weights out of P V, not out of the sums: O = (M P) V with M 0 or 1 / (1 - p), made again in the
// backward.
//
// Storage is fp32 or bf16, sums and softmax are fp32; where the chip multiplies bf16 pairs, P and dS are rounded to
// bf16 for the products.

#include "cpu/matmul.inl"

constexpr int kBlock = 64;  // queries, and keys, a block of scores
constexpr int kVectors = kBlock / kLanes;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693359375f;  // ln 2 in two parts: the first times a small integer is exact
constexpr float kLn2Rest = -2.12194440e-4f;

template <class T>
struct MathFor {
  using Type = Float32Math;
};
#if defined(FASTGPT_BF16_DOT)
template <>
struct MathFor<BFloat16> {
  using Type = BFloat16Math;
};
#endif

// log(x) of a sum of exponentials: 0, inf, NaN or a normal number. Cephes' logf (S. Moshier).
INLINE Vec log_of_sum(Vec x) {
  VecInt bits = bit_cast<VecInt>(x);
  VecInt exponent = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2): the mantissa lies in [0.707, 1.414)
  const Vec m = bit_cast<Vec>(bits - (exponent << 23)) - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  const Vec z = m * m;
  Vec y = p * m * z;
  y = fma(e, splat(kLn2Rest), y);
  y = fma(z, splat(-0.5f), y);
  y = fma(e, splat(kLn2), m + y);
  y = x == 0.0f ? splat(kMinusInfinity) : y;
  return x < std::numeric_limits<float>::infinity() ? y : x;
}

INLINE Vec lane_numbers() {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// The factor of a difference of scores in the exponent of 2. The scale's sign, or a scale of 0, works on q instead, so
// that the largest score is the largest whatever the scale.
INLINE float exponent_scale(float scale) { return scale == 0.0f ? kLog2E : std::fabs(scale) * kLog2E; }

// What a block of queries sees of a block of keys: key row j is seen by the query lanes i >= j + first.
struct Window {
  int keys;     // rows that are keys; those beyond are seen by nobody
  int vectors;  // vectors of lanes that hold queries
  int first;    // clamped to [-kBlock, kBlock]

  // The first vector with a query that sees key row j (or a later vector of it).
  INLINE int first_vector(int j) const { return std::clamp((j + first) / kLanes, 0, vectors); }

  // Whether some lane of the key rows [j, j + rows) must be masked.
  INLINE bool masked(int j, int rows) const { return j + rows - 1 + first > 0 || j + rows > keys; }

  // The keys that a query up to lane i sees.
  INLINE int keys_until(int i) const { return std::clamp(i - first + 1, 0, keys); }

  // v where lane i of vector c sees key row j, else `masked_value`.
  INLINE Vec apply(int j, int c, Vec v, float masked_value) const {
    const int limit = j < keys ? j + first - c * kLanes : kLanes;
    return lane_numbers() < static_cast<float>(limit) ? splat(masked_value) : v;
  }
};

template <class Args>
INLINE Window window_of(const Args& a, int64_t i0, int64_t nq, int64_t j0, int64_t nk) {
  const int64_t first = a.causal ? j0 - (a.keys - a.queries) - i0 : -kBlock;
  return {.keys = static_cast<int>(nk),
          .vectors = static_cast<int>((nq + kLanes - 1) / kLanes),
          .first = static_cast<int>(std::clamp<int64_t>(first, -kBlock, kBlock))};
}

// The end of the keys that queries before `i_end` see.
template <class Args>
INLINE int64_t keys_end(const Args& a, int64_t i_end) {
  return a.causal ? std::clamp<int64_t>(i_end + a.keys - a.queries, 0, a.keys) : a.keys;
}

// 4-byte elements of a thread's own scratch, a cache line aligned, that keep their memory between calls.
class Arena {
 public:
  explicit Arena(int64_t elements) : at_(scratch(elements)) {}

  template <class Element>
  Element* take(int64_t elements) {
    static_assert(sizeof(Element) == sizeof(float));
    float* p = at_;
    at_ += room(elements);
    return reinterpret_cast<Element*>(p);
  }

  static constexpr int64_t room(int64_t elements) { return (elements + kLine - 1) / kLine * kLine; }

 private:
  static constexpr int64_t kLine = 16;
  float* at_;
};

template <class T>
INLINE T* at(const AttentionTensor& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(t.data) + b * t.stride_b + h * t.stride_h + i * t.stride_t;
}

// Rows of a head's that are needed soon, asked for a few at a time while something else is computed: they lie too far
// apart (the width of all heads, or of a fused qkv) for the chip's own prefetcher.
template <class T>
struct Ahead {
  const T* rows = nullptr;
  int64_t stride = 0, count = 0, dim = 0;

  // Into the caches from the second on, or with kNear = 3 also into the first, as it is what is to be written.
  template <int kNear = 2, bool kToWrite = false>
  INLINE void fetch(int64_t from, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t r = from; r < std::min(count, from + n); ++r) {
      for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(rows + r * stride + d, kToWrite, kNear);
    }
  }
};

template <class T>
INLINE Ahead<T> ahead(const AttentionTensor& t, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim) {
  if (begin >= end) return {};
  return {at<const T>(t, b, h, begin), t.stride_t, std::min<int64_t>(kBlock, end - begin), dim};
}

// One row of `dim` numbers, times `factor`, to memory.
template <class T>
INLINE void store_row(T* out, const float* row, float factor, int64_t dim) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d) * factor);
  if (d < dim) store_n(out + d, load(row + d) * factor, static_cast<int>(dim - d));  // scratch rows are padded
}

// Work in multiplications below which a second thread costs more than it brings.
constexpr int64_t kAttentionGrain = 1 << 20;

INLINE int attention_team(int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t dim, int threads) {
  const double work = 2.0 * static_cast<double>(batch * heads * queries) * static_cast<double>(keys * dim);
  return static_cast<int>(std::clamp(work / kAttentionGrain, 1.0, static_cast<double>(std::max(1, threads))));
}

// Calls body() on `team` threads at once.
template <class Body>
INLINE void on_team(int team, const Body& body) {
  if (team <= 1) {
    body();
    return;
  }
#pragma omp parallel num_threads(team)
  body();
}

// clang-format off: the backward and the forward use what stands before them
#include "cpu/attention_dropout.inl"
#include "cpu/attention_backward.inl"
#include "cpu/attention_decode.inl"
#include "cpu/attention_forward.inl"
// clang-format on

void attention(const AttentionArgs& a, int threads) {
  if (a.batch * a.heads * a.queries == 0) return;
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.queries == 1 && a.keys > kBlock && a.dropout.threshold == 0) {
      attention_decode<T>(a, threads);
    } else {
      attention_forward<T>(a, threads);
    }
  });
}

void attention_backward(const AttentionBackwardArgs& a, int threads) {
  if (a.batch * a.heads == 0) return;
  with_type(a.dtype, [&](auto tag) { attention_backward_typed<decltype(tag)>(a, threads); });
}
