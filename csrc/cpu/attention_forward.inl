// The forward over blocks of queries: a task is some blocks of one head's queries (a panel each), which share each
// block of keys and values.

constexpr int kPanels = 4;  // at most

template <class T>
struct ForwardTask {
  using Math = typename MathFor<T>::Type;
  using Element = typename Math::Element;
  static constexpr int kTerms = Math::kTerms;
  static constexpr bool kShort = kTerms == 2;

  struct Panel {
    Element* q;   // (dim / kTerms, kBlock): transposed
    float* o;     // (kBlock, wide): sums so far
    float* most;  // (kBlock): the largest score so far
    float* sum;   // (kBlock): of 2^(scale (score - most))
  };

  const AttentionArgs& a;
  int64_t wide, depth, k_ld;  // dim in whole vectors, in terms, in terms of a packed key
  Element* k_room;            // (kBlock, k_ld): packed keys, where they cannot be read in place
  Rows<Math> k;
  Element* v_room;  // (kBlock / kTerms, wide): packed values, likewise
  Rows<Math> v;
  float* s;           // (kBlock, kBlock): scores, a key a row
  Element* p;         // (kBlock / kTerms, kBlock): weights, transposed; s itself where an element is a float
  const float scale;  // >= 0, times log2(e): the sign goes into q
  float* drop;        // (kBlock, kBlock): dropout's factors, a key a row
  Ahead<T> next_k, next_v;
  T* q_signed;  // (kBlock, dim): q with the scale's sign, where that is not +
  Panel panels[kPanels];

  explicit ForwardTask(const AttentionArgs& args)
      : a(args),
        wide(round_up(a.dim, kLanes)),
        depth((a.dim + kTerms - 1) / kTerms),
        k_ld(round_up(depth, kLanes)),
        scale(exponent_scale(a.scale)) {
    const int64_t block = Arena::room(kBlock * wide), lanes = Arena::room(kBlock);
    Arena arena((3 + 2 * kPanels) * block + 3 * kBlock * kBlock + 2 * kPanels * lanes + kPanels * kBlock);
    k_room = arena.take<Element>(kBlock * k_ld);
    v_room = arena.take<Element>(kBlock / kTerms * wide);
    s = arena.take<float>(kBlock * kBlock);
    p = kTerms == 1 ? reinterpret_cast<Element*>(s) : arena.take<Element>(kBlock / kTerms * kBlock);
    drop = a.dropout.threshold > 0 ? arena.take<float>(kBlock * kBlock) : nullptr;
    q_signed = reinterpret_cast<T*>(arena.take<float>(kBlock * wide));
    for (Panel& panel : panels) {
      panel.q = arena.take<Element>(depth * kBlock);
      panel.o = arena.take<float>(kBlock * wide);
      panel.most = arena.take<float>(kBlock);
      panel.sum = arena.take<float>(kBlock);
    }
  }

  void load_queries(const Panel& panel, const T* q, int64_t nq) {
    if (a.scale > 0.0f) {
      Pack<Math>::columns(q, a.q.stride_t, nq, a.dim, panel.q, kBlock);
      return;
    }
    const float sign = a.scale < 0.0f ? -1.0f : a.scale;  // 0 and NaN do their work on q
    for (int64_t r = 0; r < nq; ++r) {
      for (int64_t d = 0; d < a.dim; ++d)
        q_signed[r * a.dim + d] = from_float<T>(to_float(q[r * a.q.stride_t + d]) * sign);
    }
    Pack<Math>::columns(q_signed, a.dim, nq, a.dim, panel.q, kBlock);
  }

  // Scores (unscaled) of one block into s, masked ones as -inf, and the new maxima; alpha is what the sums so far are
  // worth under them.
  void scores(const Panel& panel, const Window& w, float* alpha, Vec* safe) {
    Vec most[kVectors];
    for (int c = 0; c < w.vectors; ++c) most[c] = splat(kMinusInfinity);
    for (int j = 0; j < w.keys; j += kTileRows) {
      const bool masked = w.masked(j, kTileRows);
      next_k.fetch(j, kTileRows);
      next_v.fetch(j, kTileRows);
      float* rows = s + j * kBlock;
      multiply_rows_in_chains<Math>(k.at + j * k.ld, k.ld, panel.q, kBlock, depth, w.first_vector(j), w.vectors, rows,
                                    kBlock, [&](int c, const auto& sums) {
                                      Vec top = most[c];
#pragma GCC unroll 8
                                      for (int r = 0; r < kTileRows; ++r) {
                                        const Vec score = masked ? w.apply(j + r, c, sums[r], kMinusInfinity) : sums[r];
                                        store(rows + r * kBlock + c * kLanes, score);
                                        top = max(score, top);
                                      }
                                      most[c] = top;
                                    });
    }
    for (int c = 0; c < w.vectors; ++c) {
      const Vec before = load(panel.most + c * kLanes);
      const Vec now = max(most[c], before);
      safe[c] = now == kMinusInfinity ? Vec{} : now;  // all -inf so far: -inf - -inf would be NaN
      store(panel.most + c * kLanes, now);
      store(alpha + c * kLanes, exp2<false>((before - safe[c]) * scale));
    }
  }

  // p = 2^(scale (s - most)) and its sums. The difference first: it is exact where the weight is large, and never
  // positive, however large the scores.
  template <bool kDrops>
  void weights(const Panel& panel, const Window& w, const float* alpha, const Vec* safe) {
    for (int c = 0; c < w.vectors; ++c) {
      const int lane = c * kLanes;
      const int end = w.keys_until(lane + kLanes - 1);
      Vec even_sum = {}, odd_sum = {};
      for (int j = 0; j < end; j += 2) {  // a row of padding after an odd last key is -inf
        const Vec even = exp2<kShort>((load(s + j * kBlock + lane) - safe[c]) * scale);
        const Vec odd = exp2<kShort>((load(s + (j + 1) * kBlock + lane) - safe[c]) * scale);
        even_sum = even_sum + even;
        odd_sum = odd_sum + odd;
        if constexpr (kDrops) {
          store_weights(j, lane, even * load(drop + j * kBlock + lane), odd * load(drop + (j + 1) * kBlock + lane));
        } else {
          store_weights(j, lane, even, odd);
        }
      }
      store(panel.sum + lane, fma(load(panel.sum + lane), load(alpha + lane), even_sum + odd_sum));
    }
  }

  INLINE void store_weights(int j, int lane, Vec even, Vec odd) {
    if constexpr (kTerms == 1) {
      store(p + j * kBlock + lane, even);
      store(p + (j + 1) * kBlock + lane, odd);
    } else {
      const VecUInt pairs = to_pairs(even, odd);
      std::memcpy(p + j / 2 * kBlock + lane, &pairs, sizeof pairs);
    }
  }

  void block(const Panel& panel, const Window& w, int64_t head, int64_t i0, int64_t nq, int64_t j0) {
    const bool first = j0 == 0;
    alignas(64) float alpha[kBlock];
    Vec safe[kVectors];
    scores(panel, w, alpha, safe);
    if (drop == nullptr) {
      weights<false>(panel, w, alpha, safe);
    } else {
      dropout_factors(a, w, head, i0, j0, drop);
      weights<true>(panel, w, alpha, safe);
    }
    const int columns = static_cast<int>(wide / kLanes);
    for (int i = 0; i < nq; i += kTileRows) {
      const int seen = w.keys_until(i + kTileRows - 1);
      if (seen == 0) continue;  // in the first block: a query that sees nothing, see finish
      float* o = panel.o + i * wide;
      multiply_rows<Math, true>(p + i, kBlock, v.at, v.ld, (seen + kTerms - 1) / kTerms, 0, columns,
                                [&](int c, const auto& sums) {
                                  float* place = o + c * kLanes;
#pragma GCC unroll 8
                                  for (int r = 0; r < kTileRows; ++r, place += wide)
                                    store(place, first ? sums[r] : fma(load(place), splat(alpha[i + r]), sums[r]));
                                });
    }
  }

  void finish(const Panel& panel, int64_t b, int64_t h, int64_t i0, int64_t nq) {
    alignas(64) float inverse[kBlock], lse[kBlock];
    for (int lane = 0; lane < nq; lane += kLanes) {
      const Vec sum = load(panel.sum + lane);
      store(inverse + lane, 1.0f / sum);
      const Vec most = load(panel.most + lane);
      store(lse + lane, most * std::fabs(a.scale) + log_of_sum(sum));
    }
    for (int64_t r = 0; r < nq; ++r) {
      const bool nothing = keys_end(a, i0 + r + 1) == 0;
      if (nothing) std::fill_n(panel.o + r * wide, wide, 0.0f);
      store_row(at<T>(a.o, b, h, i0 + r), panel.o + r * wide, nothing ? 0.0f : inverse[r], a.dim);
      a.lse[(b * a.heads + h) * a.queries + i0 + r] = nothing ? kMinusInfinity : lse[r];
    }
  }

  void run(int64_t b, int64_t h, int64_t begin, int64_t end) {
    const int64_t kv_head = h / (a.heads / a.kv_heads);
    for (int64_t i0 = begin, n = 0; i0 < end; i0 += kBlock, ++n) {
      Panel& panel = panels[n];
      load_queries(panel, at<const T>(a.q, b, h, i0), std::min<int64_t>(kBlock, end - i0));
      std::fill_n(panel.most, kBlock, kMinusInfinity);
      std::fill_n(panel.sum, kBlock, 0.0f);
    }
    const int64_t last = keys_end(a, end);
    for (int64_t j0 = 0; j0 < last; j0 += kBlock) {
      const int64_t nk = std::min<int64_t>(kBlock, last - j0);
      k = rows_of<Math>(at<const T>(a.k, b, kv_head, j0), a.k.stride_t, nk, a.dim, k_room, k_ld);
      v = pairs_of<Math>(at<const T>(a.v, b, kv_head, j0), a.v.stride_t, nk, a.dim, v_room, wide);
      next_k = ahead<T>(a.k, b, kv_head, j0 + nk, last, a.dim);
      next_v = ahead<T>(a.v, b, kv_head, j0 + nk, last, a.dim);
      for (int64_t i0 = begin, n = 0; i0 < end; i0 += kBlock, ++n) {
        const int64_t nq = std::min<int64_t>(kBlock, end - i0);
        if (j0 >= keys_end(a, i0 + nq)) continue;
        block(panels[n], window_of(a, i0, nq, j0, nk), b * a.heads + h, i0, nq, j0);
        next_k.count = next_v.count = 0;
      }
    }
    for (int64_t i0 = begin, n = 0; i0 < end; i0 += kBlock, ++n)
      finish(panels[n], b, h, i0, std::min<int64_t>(kBlock, end - i0));
  }
};

template <class T>
void attention_forward(const AttentionArgs& a, int threads) {
  const int64_t rows = a.batch * a.heads;
  const int wanted = attention_team(a.batch, a.heads, a.queries, a.keys, a.dim, threads);
  // Many panels share the packing of values; few leave enough tasks for every thread.
  const int64_t tall = (rows * a.queries >= 8 * wanted * kPanels * kBlock ? kPanels : 2) * kBlock;
  const int64_t groups = (a.queries + tall - 1) / tall;
  const int64_t tasks = rows * groups;
  const int team = std::min<int64_t>(tasks, wanted);
  std::atomic<int64_t> next{0};
  on_team(team, [&] {
    [[maybe_unused]] const Tiles shapes;
    ForwardTask<T> task(a);
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t head = t / groups, group = groups - 1 - t % groups;  // causal: the longest first
      task.run(head / a.heads, head % a.heads, group * tall, std::min(a.queries, (group + 1) * tall));
    }
  });
}
