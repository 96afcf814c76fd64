// y[i] = weight[ids[i]], and its gradient: dweight[ids[i]] += dy[i], into rows that are there already or into a whole
// new matrix. Ids are checked by the caller.

template <class Id, class T>
INLINE void embedding_rows(const EmbeddingArgs& a, int64_t begin, int64_t end) {
  const Id* ids = static_cast<const Id*>(a.ids);
  const T* weight = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y);
  for (int64_t i = begin; i < end; ++i) std::memcpy(y + i * a.cols, weight + ids[i] * a.cols, a.cols * sizeof(T));
}

template <class Body>
INLINE void with_id_type(bool wide, const Body& body) {
  if (wide) {
    body(int64_t{});
  } else {
    body(int32_t{});
  }
}

void embedding(const EmbeddingArgs& a, int threads) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.cols));
  with_id_type(a.wide_ids, [&](auto id) {
    with_type(a.dtype, [&](auto tag) {
      parallel_for(a.count, grain, threads,
                   [&](int64_t begin, int64_t end) { embedding_rows<decltype(id), decltype(tag)>(a, begin, end); });
    });
  });
}

// The positions of every id in their order, as lists: `head` of an id is its first position, `next` that of a position
// the one after it, -1 none.
struct PositionLists {
  std::vector<int32_t> head, next, ids;  // ids: those that occur, by their last position, latest first
};

template <class Id>
INLINE void list_positions(const EmbeddingBackwardArgs& a, const Id* ids, PositionLists& lists) {
  lists.head.assign(a.rows, -1);
  lists.next.resize(a.count);
  lists.ids.clear();
  for (int64_t i = a.count - 1; i >= 0; --i) {
    if (ids[i] == a.padding_idx) continue;
    int32_t& head = lists.head[ids[i]];
    if (head < 0) lists.ids.push_back(static_cast<int32_t>(ids[i]));
    lists.next[i] = head;
    head = static_cast<int32_t>(i);
  }
}

// Sums the gradients of one id over `n` columns from `column` on in registers, in the order of their positions.
template <int kVectors, class G, class T>
INLINE void add_positions(const EmbeddingBackwardArgs& a, const PositionLists& lists, int32_t id, int64_t column,
                          int n) {
  const G* dy = static_cast<const G*>(a.dy) + column;
  T* into = static_cast<T*>(a.dweight) + id * a.cols + column;
  const auto lanes = [&](int v) { return std::min(n - v * kLanes, kLanes); };
  Vec sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = a.accumulate ? load_part(into + v * kLanes, lanes(v)) : Vec{};
  for (int32_t i = lists.head[id]; i >= 0; i = lists.next[i]) {
    const G* row = dy + i * a.cols;
    for (int v = 0; v < kVectors; ++v) sums[v] = sums[v] + load_part(row + v * kLanes, lanes(v));
  }
  for (int v = 0; v < kVectors; ++v) store_part(into + v * kLanes, sums[v], lanes(v));
}

// Columns [begin, end) of every row. Threads take columns, not rows: the work is even however often an id occurs.
template <class G, class T>
INLINE void embedding_columns(const EmbeddingBackwardArgs& a, const PositionLists& lists, int64_t begin, int64_t end) {
  constexpr int kVectors = 4;
  const int64_t ids = static_cast<int64_t>(lists.ids.size());
  for (int64_t u = ids - 1; u >= 0; --u) {
    const int32_t id = lists.ids[u];
    if (u >= 4) {  // the rows four ids on are far apart in memory: ask for them now
      const int32_t later = lists.ids[u - 4];
      const char* into = reinterpret_cast<const char*>(static_cast<T*>(a.dweight) + later * a.cols + begin);
      const char* from =
          reinterpret_cast<const char*>(static_cast<const G*>(a.dy) + lists.head[later] * a.cols + begin);
      for (int64_t at = 0; at < (end - begin) * static_cast<int64_t>(sizeof(T)); at += 64)
        __builtin_prefetch(into + at, 1);
      for (int64_t at = 0; at < (end - begin) * static_cast<int64_t>(sizeof(G)); at += 64)
        __builtin_prefetch(from + at);
    }
    int64_t column = begin;
    for (; column + kVectors * kLanes <= end; column += kVectors * kLanes)
      add_positions<kVectors, G, T>(a, lists, id, column, kVectors * kLanes);
    for (; column < end; column += kLanes)
      add_positions<1, G, T>(a, lists, id, column, static_cast<int>(std::min<int64_t>(kLanes, end - column)));
  }
}

void embedding_backward(const EmbeddingBackwardArgs& a, int threads) {
  static thread_local PositionLists kept;  // this thread's: the others only read it
  PositionLists& lists = kept;
  with_id_type(a.wide_ids, [&](auto id) { list_positions(a, static_cast<const decltype(id)*>(a.ids), lists); });
  constexpr int64_t kColumns = 64;  // a thread's part begins on a cache line
  const int64_t parts = (a.cols + kColumns - 1) / kColumns;
  const int64_t touched = std::max<int64_t>(1, a.count * kColumns);
  if (!a.accumulate) {
    with_type(a.dtype, [&](auto tag) {
      parallel_for(a.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.cols)), threads,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       if (lists.head[r] >= 0) continue;
                       auto* into = static_cast<decltype(tag)*>(a.dweight) + r * a.cols;
                       std::fill(into, into + a.cols, from_float<decltype(tag)>(0.0f));
                     }
                   });
    });
  }
  with_type(a.grad_dtype, [&](auto grad_tag) {
    with_type(a.dtype, [&](auto tag) {
      parallel_for(parts, std::max<int64_t>(1, kGrain / touched), threads, [&](int64_t begin, int64_t end) {
        embedding_columns<decltype(grad_tag), decltype(tag)>(a, lists, begin * kColumns,
                                                             std::min(a.cols, end * kColumns));
      });
    });
  });
}
