// Products of few rows with weights, such as a linear layer's in a step of generation: the weights are read once from
// memory, as fast as it gives them, and nothing is packed.

constexpr int64_t kFewRows = 8;

// Four of the weights' rows at a time.
template <class X, class W, class Finish>
void few_rows(const X* x, const W* weight, int64_t rows, int64_t in, int64_t out, int threads, const Finish& finish) {
  constexpr int kTogether = 4;  // at most kPanel
  parallel_for((out + kTogether - 1) / kTogether, std::max<int64_t>(1, kGrain / (kTogether * in + 1)), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t group = begin; group < end; ++group) {
                   const int64_t n0 = group * kTogether;
                   const int count = static_cast<int>(std::min<int64_t>(kTogether, out - n0));
                   for (int64_t r = 0; r < rows; ++r) {
                     Vec acc[kTogether] = {};
                     for (int64_t k = 0; k < in; k += kLanes) {
                       const int n = static_cast<int>(std::min<int64_t>(kLanes, in - k));
                       const Vec v = load_part(x + r * in + k, n);
#pragma GCC unroll 4
                       for (int j = 0; j < kTogether; ++j) {
                         const W* row = weight + (n0 + std::min(j, count - 1)) * in + k;
                         acc[j] = fma(v, load_part(row, n), acc[j]);
                       }
                     }
                     float tile[kPanel] = {};
                     for (int j = 0; j < kTogether; ++j) tile[j] = sum(acc[j]);
                     finish(r, n0, 1, count, tile);
                   }
                 }
               });
}

// sums[c] (+)= x[0] W(0, c) + ... + x[kRows - 1] W(kRows - 1, c), added in pairs, W's rows `out` numbers apart.
template <int kRows, class X, class W>
INLINE void add_rows(const X* x, const W* weight, int64_t out, int64_t begin, int64_t end, bool fresh, float* sums) {
  Vec factor[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) factor[i] = splat(to_float(x[i]));
  const auto step = [&](int64_t c, int n) {
    const auto row = [&](int i) { return load_part(weight + i * out + c, n); };
    Vec sum = fresh ? Vec{} : load(sums + c);
    if constexpr (kRows == 1) {
      sum = fma(factor[0], row(0), sum);
    } else {
      Vec pairs[kRows / 2];
#pragma GCC unroll 4
      for (int i = 0; i < kRows / 2; ++i) pairs[i] = fma(factor[2 * i + 1], row(2 * i + 1), factor[2 * i] * row(2 * i));
#pragma GCC unroll 4
      for (int left = kRows / 4; left > 0; left /= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < left; ++i) pairs[i] += pairs[i + left];
      }
      sum += pairs[0];
    }
    store(sums + c, sum);
  };
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) step(c, kLanes);
  if (c < end) step(c, static_cast<int>(end - c));
}

// The same of weights that lie transposed, (in, out): rows of W are read whole and in order, eight side by side, since
// a panel of columns would touch a page a row (19 GB/s against 31 on two cores of a Zen 4 EPYC). The sum over `in` is
// cut into parts of kChain terms, which are added in order, so that no chain is long and no result depends on the
// threads.
template <class X, class W, class Finish>
void few_rows_transposed(const X* x, const W* weight, int64_t rows, int64_t in, int64_t out, int threads,
                         const Finish& finish) {
  constexpr int kTogether = 8;
  constexpr int64_t kColumns = 1024;  // of a task, where there are too few parts
  const int64_t parts = std::max<int64_t>(1, (in + kChain - 1) / kChain), stride = round_up(out, kPanel);
  const int64_t columns = parts >= 4 * threads ? round_up(out, kLanes) : kColumns;
  const int64_t across = (out + columns - 1) / columns;
  float* sums = static_cast<float*>(thread_memory<3>(parts * rows * stride * int64_t{sizeof(float)}));
  const int64_t work = kChain * std::min(columns, out);
  parallel_for(parts * across, std::max<int64_t>(1, kGrain / (work + 1)), threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / across, c0 = task % across * columns, c1 = std::min(out, c0 + columns);
      const int64_t first = part * kChain, last = std::min(in, first + kChain);
      for (int64_t k = first; k == first || k < last; k += kTogether) {
        for (int64_t r = 0; r < rows; ++r) {  // the first brings W's rows near, the others find them there
          float* sum = sums + (part * rows + r) * stride;
          if (k + kTogether <= last) {
            add_rows<kTogether>(x + r * in + k, weight + k * out, out, c0, c1, k == first, sum);
          } else {
            if (k == first) std::fill(sum + c0, sum + round_up(c1, kLanes), 0.0f);
            for (int64_t i = k; i < last; ++i) add_rows<1>(x + r * in + i, weight + i * out, out, c0, c1, false, sum);
          }
        }
      }
    }
  });
  parallel_for((out + kPanel - 1) / kPanel, std::max<int64_t>(1, kGrain / (kPanel * parts * rows)), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin * kPanel; c < std::min(out, end * kPanel); c += kPanel) {
                   const int width = static_cast<int>(std::min<int64_t>(kPanel, out - c));
                   for (int64_t r = 0; r < rows; ++r) {
                     float tile[kPanel];
                     for (int j = 0; j < width; j += kLanes) {
                       Vec total = load(sums + r * stride + c + j);
                       for (int64_t part = 1; part < parts; ++part)
                         total += load(sums + (part * rows + r) * stride + c + j);
                       store(tile + j, total);
                     }
                     finish(r, c, 1, width, tile);
                   }
                 }
               });
}
