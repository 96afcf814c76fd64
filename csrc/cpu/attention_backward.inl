// The backward over blocks of queries, with P made again from the scores and lse (FlashAttention-2, arXiv 2307.08691,
// algorithm 2).
//
//   P = exp(S - lse),  delta = rowsum(dO O),  dP = dO V^T,  dS = P (dP - delta)
//   dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q
//
// One item is one block of queries of one head against all its keys: it finishes its dQ and adds to the kv head's dK
// and dV, which are fp32 and shared by all items of that kv head. Items add to a block of keys in their own order, each
// waiting for the one before it, so the sums are the same for any number of threads. A thread takes whole kv heads
// while there are any and then helps with the heads that others have begun, a block of keys behind the item before: few
// heads still keep every thread busy.

// A kv head in work: the sums of its items and how far they are.
struct HeadInWork {
  int64_t head = 0;     // batch * kv_heads + kv head
  float* dk = nullptr;  // (keys rounded up, wide)
  float* dv = nullptr;
  std::atomic<int64_t>* added = nullptr;  // a block of keys: items that are in its sums, by number
  std::atomic<int64_t> next{0};           // item
  std::atomic<int64_t> done{0};           // items
};

INLINE void wait_for(const std::atomic<int64_t>& value, int64_t expected) {
  for (int spins = 0; value.load(std::memory_order_acquire) != expected; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

template <class T>
struct BackwardTask {
  using Math = typename MathFor<T>::Type;
  using Element = typename Math::Element;
  static constexpr int kTerms = Math::kTerms;
  static constexpr bool kShort = kTerms == 2;

  const AttentionBackwardArgs& a;
  int64_t wide, depth, row_ld;  // dim in whole vectors, in terms, in terms of a packed row
  int columns;
  Element *q_columns, *do_columns;  // (depth, kBlock): transposed
  Element *q_room, *do_room;        // (kBlock / kTerms, wide): packed pairs, where they cannot be read in place
  Rows<Math> q_pairs, do_pairs;
  Element *k_room, *v_room;  // (kBlock, row_ld): packed, where they cannot be read in place
  Rows<Math> k_rows, v_rows;
  Element* k_pairs_room;  // (kBlock / kTerms, wide); k_room itself where an element is a float
  Rows<Math> k_pairs;
  float *s, *dp;              // (kBlock, kBlock): a key a row
  float* drop;                // (kBlock, kBlock): dropout's factors, a key a row
  Element *p_rows, *ds_rows;  // (kBlock, kBlock / kTerms); s and dp themselves where an element is a float
  Element* ds_pairs;          // (kBlock / kTerms, kBlock); dp itself where an element is a float
  float *dq, *delta;
  float* lse;

  explicit BackwardTask(const AttentionBackwardArgs& args)
      : a(args),
        wide(round_up(a.dim, kLanes)),
        depth((a.dim + kTerms - 1) / kTerms),
        row_ld(round_up(depth, kLanes)),
        columns(static_cast<int>(wide / kLanes)) {
    const int64_t block = Arena::room(kBlock * wide), square = kBlock * kBlock;
    Arena arena(8 * block + 6 * square + 2 * kBlock);
    for (Element** p : {&q_columns, &do_columns, &q_room, &do_room}) *p = arena.take<Element>(kBlock * wide);
    k_room = arena.take<Element>(kBlock * row_ld);
    v_room = arena.take<Element>(kBlock * row_ld);
    s = arena.take<float>(square);
    dp = arena.take<float>(square);
    drop = a.dropout.threshold > 0 ? arena.take<float>(square) : nullptr;
    if constexpr (kTerms == 1) {
      k_pairs_room = k_room;
      p_rows = s;
      ds_rows = ds_pairs = dp;
    } else {
      k_pairs_room = arena.take<Element>(kBlock / kTerms * wide);
      for (Element** p : {&p_rows, &ds_rows, &ds_pairs}) *p = arena.take<Element>(square / kTerms);
    }
    dq = arena.take<float>(kBlock * wide);
    for (float** p : {&delta, &lse}) *p = arena.take<float>(kBlock);
  }

  void load_queries(int64_t b, int64_t h, int64_t i0, int64_t nq) {
    const T* q = at<const T>(a.q, b, h, i0);
    const T* d_out = at<const T>(a.do_, b, h, i0);
    Pack<Math>::columns(q, a.q.stride_t, nq, a.dim, q_columns, kBlock);
    Pack<Math>::columns(d_out, a.do_.stride_t, nq, a.dim, do_columns, kBlock);
    q_pairs = pairs_of<Math>(q, a.q.stride_t, nq, a.dim, q_room, wide);
    do_pairs = pairs_of<Math>(d_out, a.do_.stride_t, nq, a.dim, do_room, wide);
    std::copy_n(a.lse + (b * a.heads + h) * a.queries + i0, nq, lse);
    std::fill(lse + nq, lse + kBlock, 0.0f);
    for (int64_t r = 0; r < nq; ++r) delta[r] = dot(d_out + r * a.do_.stride_t, at<const T>(a.o, b, h, i0 + r));
    std::fill(delta + nq, delta + kBlock, 0.0f);
  }

  float dot(const T* x, const T* y) const {
    Vec products = {};
    int64_t d = 0;
    for (; d + kLanes <= a.dim; d += kLanes) products = fma(load(x + d), load(y + d), products);
    const int rest = static_cast<int>(a.dim - d);
    if (rest > 0) products = fma(load_n(x + d, rest), load_n(y + d, rest), products);
    return sum(products);
  }

  void load_keys(int64_t b, int64_t kv_head, int64_t j0, int64_t nk) {
    const T* k = at<const T>(a.k, b, kv_head, j0);
    k_pairs = pairs_of<Math>(k, a.k.stride_t, nk, a.dim, k_pairs_room, wide);
    k_rows = rows_of<Math>(k, a.k.stride_t, nk, a.dim, k_room, row_ld);
    v_rows = rows_of<Math>(at<const T>(a.v, b, kv_head, j0), a.v.stride_t, nk, a.dim, v_room, row_ld);
  }

  // rows * columns, a key a row, where some query of the vector sees some key of the tile.
  void score(const Window& w, const Rows<Math>& rows, const Element* lanes, float* out, const Ahead<T>& next) {
    for (int j = 0; j < w.keys; j += kTileRows) {
      next.fetch(j, kTileRows);
      float* out_rows = out + j * kBlock;
      multiply_rows_in_chains<Math>(rows.at + j * rows.ld, rows.ld, lanes, kBlock, depth, w.first_vector(j), w.vectors,
                                    out_rows, kBlock, [&](int c, const auto& sums) {
#pragma GCC unroll 8
                                      for (int r = 0; r < kTileRows; ++r)
                                        store(out_rows + r * kBlock + c * kLanes, sums[r]);
                                    });
    }
  }

  // P and dS from s and dp; 0 where masked. With dropout's factors M, what dV takes is M P, and dS = P (M dP - delta).
  template <bool kDrops>
  void weights(const Window& w) {
    const Vec factor = splat(a.scale * kLog2E);
    for (int j = 0; j < round_up(w.keys, kTileRows); j += 2) {
      const bool masked = w.masked(j, 2);
      for (int c = w.first_vector(j / kTileRows * kTileRows); c < w.vectors; ++c) {
        const int lane = c * kLanes;
        const Vec row_lse = load(lse + lane), offset = row_lse * -kLog2E, row_delta = load(delta + lane);
        Vec p[2], ds[2];
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          const int64_t place = (j + r) * kBlock + lane;
          if constexpr (kShort) {
            p[r] = exp2<kShort>(fma(load(s + place), factor, offset));
          } else {  // in fp32 the rounding of lse log2(e) would show
            p[r] = exp2<kShort>((load(s + place) * a.scale - row_lse) * kLog2E);
          }
          if constexpr (kDrops) {
            const Vec kept = load(drop + place);
            ds[r] = p[r] * (load(dp + place) * kept - row_delta);
            p[r] = p[r] * kept;
          } else {
            ds[r] = p[r] * (load(dp + place) - row_delta);
          }
          if (masked) {
            p[r] = w.apply(j + r, c, p[r], 0.0f);
            ds[r] = w.apply(j + r, c, ds[r], 0.0f);
          }
        }
        store_weights(j, lane, p, ds);
      }
    }
  }

  INLINE void store_weights(int j, int lane, const Vec (&p)[2], const Vec (&ds)[2]) {
    if constexpr (kTerms == 1) {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        store(p_rows + (j + r) * kBlock + lane, p[r]);
        store(ds_rows + (j + r) * kBlock + lane, ds[r]);
      }
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const VecHalf p_half = to_halves(p[r]), ds_half = to_halves(ds[r]);
        const int64_t place = ((j + r) * kBlock + lane) / kTerms;
        std::memcpy(p_rows + place, &p_half, sizeof p_half);
        std::memcpy(ds_rows + place, &ds_half, sizeof ds_half);
      }
      const VecUInt pairs = to_pairs(ds[0], ds[1]);
      std::memcpy(ds_pairs + j / kTerms * kBlock + lane, &pairs, sizeof pairs);
    }
  }

  // out (+)= rows * B for every key: dV from P and dO, dK from dS and Q.
  void add_to_keys(const Window& w, const Element* rows, const Rows<Math>& pairs, int64_t nq, bool fresh, float* out,
                   const Ahead<T>& result) {
    for (int j = 0; j < w.keys; j += kTileRows) {
      result.template fetch<3, true>(j, kTileRows);
      const int64_t skip = w.first_vector(j) * kLanes / kTerms;
      const int64_t terms = std::max<int64_t>(0, (nq + kTerms - 1) / kTerms - skip);
      if (terms == 0 && !fresh) continue;
      add_tile<false>(rows + j * (kBlock / kTerms) + skip, kBlock / kTerms, {pairs.at + skip * pairs.ld, pairs.ld},
                      terms, fresh, out + j * wide);
    }
    if (fresh) std::fill(out + round_up(w.keys, kTileRows) * wide, out + kBlock * wide, 0.0f);  // for later queries
  }

  void add_to_queries(const Window& w, int64_t nq, bool fresh, const Ahead<T>& next, const Ahead<T>& result) {
    for (int i = 0; i < nq; i += kTileRows) {
      next.fetch(i, kTileRows);
      result.template fetch<3, true>(i, kTileRows);
      const int seen = w.keys_until(i + kTileRows - 1);
      if (seen == 0 && !fresh) continue;
      add_tile<true>(ds_pairs + i, kBlock, k_pairs, (seen + kTerms - 1) / kTerms, fresh, dq + i * wide);
    }
  }

  // A block's sum is made by itself and then added: fewer roundings in a row than one long sum has.
  template <bool kTransposed>
  INLINE void add_tile(const Element* x, int64_t ldx, const Rows<Math>& y, int64_t terms, bool fresh, float* out) {
    const int64_t ld = wide;
    multiply_rows<Math, kTransposed>(x, ldx, y.at, y.ld, terms, 0, columns, [&](int c, const auto& sums) {
      float* place = out + c * kLanes;
      if (fresh) {
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r, place += ld) store(place, sums[r]);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r, place += ld) store(place, load(place) + sums[r]);
      }
    });
  }

  void run(HeadInWork& work, int64_t item) {
    const int64_t blocks = (a.queries + kBlock - 1) / kBlock, group = a.heads / a.kv_heads;
    const int64_t b = work.head / a.kv_heads, kv_head = work.head % a.kv_heads;
    const int64_t h = kv_head * group + item / blocks;
    const int64_t i0 = item % blocks * kBlock, nq = std::min<int64_t>(kBlock, a.queries - i0);
    load_queries(b, h, i0, nq);
    // The item before this one that adds to a block of keys: the block of queries before, where it sees them, else the
    // last of the head before.
    const int64_t before = i0 > 0 ? keys_end(a, i0) : 0, all_before = item - item % blocks;
    const int64_t last = keys_end(a, i0 + nq);
    if (last == 0) std::fill_n(dq, kBlock * wide, 0.0f);
    const bool finishing = item + 1 == blocks * group;
    for (int64_t j0 = 0; j0 < last; j0 += kBlock) {
      const int64_t nk = std::min<int64_t>(kBlock, last - j0);
      const Window w = window_of(a, i0, nq, j0, nk);
      load_keys(b, kv_head, j0, nk);
      const int64_t j1 = j0 + nk, i1 = i0 + nq;
      const bool more = j1 < last;  // then the next block of keys, else the next block of queries
      score(w, k_rows, q_columns, s,
            more ? ahead<T>(a.k, b, kv_head, j1, last, a.dim) : ahead<T>(a.q, b, h, i1, a.queries, a.dim));
      score(w, v_rows, do_columns, dp,
            more ? ahead<T>(a.v, b, kv_head, j1, last, a.dim) : ahead<T>(a.do_, b, h, i1, a.queries, a.dim));
      if (drop == nullptr) {
        weights<false>(w);
      } else {
        dropout_factors(a, w, b * a.heads + h, i0, j0, drop);
        weights<true>(w);
      }
      add_to_queries(w, nq, j0 == 0, more ? Ahead<T>{} : ahead<T>(a.o, b, h, i1, a.queries, a.dim),
                     more ? Ahead<T>{} : ahead<T>(a.dq, b, h, i0, i1, a.dim));
      std::atomic<int64_t>& added = work.added[j0 / kBlock];
      const int64_t expected = j0 < before ? item : all_before;
      wait_for(added, expected);
      add_to_keys(w, p_rows, do_pairs, nq, expected == 0, work.dv + j0 * wide,
                  finishing ? ahead<T>(a.dv, b, kv_head, j0, j1, a.dim) : Ahead<T>{});
      add_to_keys(w, ds_rows, q_pairs, nq, expected == 0, work.dk + j0 * wide,
                  finishing ? ahead<T>(a.dk, b, kv_head, j0, j1, a.dim) : Ahead<T>{});
      added.store(item + 1, std::memory_order_release);
    }
    for (int64_t r = 0; r < nq; ++r) store_row(at<T>(a.dq, b, h, i0 + r), dq + r * wide, a.scale, a.dim);
  }

  // No query: nothing reached the keys.
  void finish_unused(int64_t head) {
    for (int64_t j = 0; j < a.keys; ++j) {
      std::fill_n(at<T>(a.dk, head / a.kv_heads, head % a.kv_heads, j), a.dim, from_float<T>(0.0f));
      std::fill_n(at<T>(a.dv, head / a.kv_heads, head % a.kv_heads, j), a.dim, from_float<T>(0.0f));
    }
  }

  void finish(const HeadInWork& work) {
    const int64_t b = work.head / a.kv_heads, kv_head = work.head % a.kv_heads;
    for (int64_t j = 0; j < a.keys; ++j) {
      store_row(at<T>(a.dk, b, kv_head, j), work.dk + j * wide, a.scale, a.dim);
      store_row(at<T>(a.dv, b, kv_head, j), work.dv + j * wide, 1.0f, a.dim);
    }
  }
};

template <class T>
void attention_backward_typed(const AttentionBackwardArgs& a, int threads) {
  const int64_t key_blocks = (a.keys + kBlock - 1) / kBlock, wide = round_up(a.dim, kLanes);
  const int64_t heads = a.batch * a.kv_heads;
  const int64_t items = a.heads / a.kv_heads * ((a.queries + kBlock - 1) / kBlock);
  if (items == 0) {
    BackwardTask<T> task(a);
    for (int64_t head = 0; head < heads; ++head) task.finish_unused(head);
    return;
  }
  const int team = static_cast<int>(
      std::min<int64_t>(heads * items, attention_team(a.batch, a.heads, a.queries, 5 * a.keys / 2, a.dim, threads)));
  const int64_t rows = key_blocks * kBlock;
  const auto sums = std::make_unique_for_overwrite<float[]>(team * 2 * rows * wide + 16);
  const auto added = std::make_unique<std::atomic<int64_t>[]>(team * key_blocks);
  const auto works = std::make_unique<HeadInWork[]>(team);
  const auto address = reinterpret_cast<uintptr_t>(sums.get());
  float* aligned = sums.get() + (-address % 64) / sizeof(float);
  for (int t = 0; t < team; ++t) {
    works[t].dk = aligned + 2 * t * rows * wide;
    works[t].dv = works[t].dk + rows * wide;
    works[t].added = added.get() + t * key_blocks;
    works[t].next = items;
  }
  std::atomic<int64_t> next_head{0}, begun{0};
  on_team(team, [&] {
    [[maybe_unused]] const Tiles shapes;
    BackwardTask<T> task(a);
    const auto join = [&](HeadInWork& work) {
      for (int64_t item = work.next++; item < items; item = work.next++) {
        task.run(work, item);
        if (++work.done == items) task.finish(work);
      }
    };
    HeadInWork& own = works[team > 1 ? omp_get_thread_num() : 0];
    for (int64_t head = next_head++; head < heads; head = next_head++) {
      own.head = head;
      own.done = 0;
      for (int64_t j = 0; j < key_blocks; ++j) own.added[j] = 0;
      own.next = 0;
      ++begun;
      join(own);
    }
    wait_for(begun, heads);
    for (int t = 0; t < team; ++t) join(works[t]);
  });
}
