// One query a head, as in decoding with a KV cache: bound by reading K and V once, so nothing is packed. A task is a
// span of one kv head's keys with every query head that reads them; a head's spans are merged in their order.

constexpr int64_t kSpan = 1024;  // keys a task

// The dot products of one query with kLanes keys (those from n on give 0).
template <class T>
INLINE Vec dot_products(const float* q, const T* k, int64_t stride, int n, int64_t dim) {
  Vec sums[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) sums[r] = Vec{};
  int64_t d = 0;
  if (n == kLanes) {
    for (; d + kLanes <= dim; d += kLanes) {
      const Vec terms = load(q + d);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) sums[r] = fma(terms, load(k + r * stride + d), sums[r]);
    }
  }
  for (; d < dim; d += kLanes) {
    const int wide = static_cast<int>(std::min<int64_t>(kLanes, dim - d));
    const Vec terms = load(q + d);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      if (r < n) sums[r] = fma(terms, load_n(k + r * stride + d, wide), sums[r]);
    }
  }
  transpose(sums);
  Vec total = {};
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) total = total + sums[r];
  return total;
}

// o = o * factor + sum_j weights_j v_j over `keys` rows, for kColumns vectors of the head's width from d on.
template <int kColumns, class T>
INLINE void weighted_sum(float* o, float factor, const float* weights, const T* v, int64_t stride, int keys,
                         const Ahead<T>& next) {
  Vec acc[kColumns];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) acc[c] = Vec{};
  for (int j = 0; j < keys; ++j, v += stride) {
    next.template fetch<3>(j, 1);
    const Vec weight = splat(weights[j]);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) acc[c] = fma(weight, load(v + c * kLanes), acc[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) store(o + c * kLanes, fma(load(o + c * kLanes), splat(factor), acc[c]));
}

// The softmax so far of one head over one span of keys: most, sum and the `wide` sums of weighted values.
struct Partial {
  float* state;
  static int64_t room(int64_t wide) { return wide + kLanes; }
  float& most() const { return state[0]; }
  float& sum() const { return state[1]; }
  float* o() const { return state + kLanes; }
};

template <class T>
INLINE void decode_span(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t begin, int64_t end, const float* q,
                        float* partials, int64_t wide) {
  const int64_t group = a.heads / a.kv_heads;
  const float scale = exponent_scale(a.scale);
  for (int64_t g = 0; g < group; ++g) {
    const Partial state{partials + g * Partial::room(wide)};
    state.most() = kMinusInfinity;
    state.sum() = 0.0f;
    std::fill_n(state.o(), wide, 0.0f);
  }
  for (int64_t j0 = begin; j0 < end; j0 += kBlock) {
    const int keys = static_cast<int>(std::min<int64_t>(kBlock, end - j0));
    const T* k = at<const T>(a.k, b, kv_head, j0);
    const T* v = at<const T>(a.v, b, kv_head, j0);
    // Reading keys and values in turns, the chip's own prefetcher begins anew each time. In fp32 memory is what limits.
    Ahead<T> values, next;
    if constexpr (sizeof(T) == 2) {
      values = ahead<T>(a.v, b, kv_head, j0, end, a.dim);
      next = ahead<T>(a.k, b, kv_head, j0 + keys, end, a.dim);
    }
    for (int64_t g = 0; g < group; ++g) {
      const Partial state{partials + g * Partial::room(wide)};
      alignas(64) float weights[kBlock];
      Vec most = splat(kMinusInfinity);
      for (int j = 0; j < keys; j += kLanes) {
        const int n = std::min(kLanes, keys - j);
        values.template fetch<3>(j, n);
        Vec score = dot_products(q + g * wide, k + j * a.k.stride_t, a.k.stride_t, n, a.dim);
        if (n < kLanes) score = lane_numbers() < static_cast<float>(n) ? score : splat(kMinusInfinity);
        store(weights + j, score);
        most = max(score, most);
      }
      const float block_most = max(most);
      const float new_most = block_most > state.most() ? block_most : state.most();
      const float safe = new_most == kMinusInfinity ? 0.0f : new_most;
      const float factor = exp2<false>(splat((state.most() - safe) * scale))[0];
      Vec sums = {};
      for (int j = 0; j < keys; j += kLanes) {
        const Vec weight = exp2<false>((load(weights + j) - safe) * scale);
        store(weights + j, weight);
        sums = sums + weight;
      }
      state.most() = new_most;
      state.sum() = state.sum() * factor + sum(sums);
      int64_t d = 0;
      for (; d + 4 * kLanes <= a.dim; d += 4 * kLanes) {
        weighted_sum<4>(state.o() + d, factor, weights, v + d, a.v.stride_t, keys, next);
        next.count = 0;
      }
      for (; d + kLanes <= a.dim; d += kLanes) {
        weighted_sum<1>(state.o() + d, factor, weights, v + d, a.v.stride_t, keys, next);
        next.count = 0;
      }
      values.count = 0;  // the other heads of the group find them
      if (d < a.dim) {
        const int rest = static_cast<int>(a.dim - d);
        Vec acc = {};
        for (int j = 0; j < keys; ++j) acc = fma(splat(weights[j]), load_n(v + j * a.v.stride_t + d, rest), acc);
        store(state.o() + d, fma(load(state.o() + d), splat(factor), acc));
      }
    }
  }
}

// Merges the spans of one head and writes its output; partials of span s lie at first + s * step.
template <class T>
INLINE void decode_finish(const AttentionArgs& a, int64_t b, int64_t h, const float* first, int64_t step, int64_t spans,
                          int64_t wide, float* row) {
  const float scale = exponent_scale(a.scale);
  float most = kMinusInfinity, total = 0.0f;
  std::fill_n(row, wide, 0.0f);
  for (int64_t s = 0; s < spans; ++s) {
    const Partial part{const_cast<float*>(first + s * step)};
    const float new_most = part.most() > most ? part.most() : most;
    const float safe = new_most == kMinusInfinity ? 0.0f : new_most;
    const Vec before = exp2<false>(splat((most - safe) * scale)),
              now = exp2<false>(splat((part.most() - safe) * scale));
    for (int64_t d = 0; d < wide; d += kLanes) store(row + d, load(row + d) * before + load(part.o() + d) * now);
    total = total * before[0] + part.sum() * now[0];
    most = new_most;
  }
  const bool nothing = a.keys == 0;
  store_row(at<T>(a.o, b, h, 0), row, nothing ? 0.0f : 1.0f / total, a.dim);
  a.lse[b * a.heads + h] =
      nothing ? kMinusInfinity : most * std::fabs(a.scale) + static_cast<float>(std::log(static_cast<double>(total)));
}

template <class T>
void attention_decode(const AttentionArgs& a, int threads) {
  const int64_t wide = round_up(a.dim, kLanes), group = a.heads / a.kv_heads;
  const int64_t spans = (a.keys + kSpan - 1) / kSpan;
  const int64_t room = Partial::room(wide);
  const int64_t tasks = a.batch * a.kv_heads * spans;
  // Of the calling thread, for all: partials (batch, kv_heads, spans, group), then one row for merging.
  std::vector<float> memory(a.batch * a.kv_heads * spans * group * room + wide);
  float* partials = memory.data();
  const int team =
      static_cast<int>(std::min<int64_t>(tasks, attention_team(a.batch, a.heads, 8, a.keys, a.dim, threads)));
  std::atomic<int64_t> next{0};
  on_team(team, [&] {
    Arena arena(group * wide);
    float* q = arena.take<float>(group * wide);
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t span = t % spans, kv_head = t / spans % a.kv_heads, b = t / spans / a.kv_heads;
      for (int64_t g = 0; g < group; ++g) {
        Pack<Float32Math>::rows(at<const T>(a.q, b, kv_head * group + g, 0), 0, 1, a.dim, q + g * wide, wide);
        if (!(a.scale > 0.0f)) {
          for (int64_t d = 0; d < wide; ++d) q[g * wide + d] *= a.scale < 0.0f ? -1.0f : a.scale;
        }
      }
      decode_span<T>(a, b, kv_head, span * kSpan, std::min(a.keys, (span + 1) * kSpan), q, partials + t * group * room,
                     wide);
    }
  });
  float* row = partials + a.batch * a.kv_heads * spans * group * room;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t kv_head = h / group, g = h % group;
      const float* first = partials + ((b * a.kv_heads + kv_head) * spans * group + g) * room;
      decode_finish<T>(a, b, h, first, group * room, spans, wide, row);
    }
  }
}
