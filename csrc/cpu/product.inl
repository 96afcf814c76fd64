// One blocked product for matrices of any size: C(r, c) = sum_k A(r, k) B(k, c), summed in fp32.
//
// B is packed once, in panels of kPanel columns, by all threads together; then each thread takes blocks of A's rows,
// packs a block (a type that is not the product's own is converted on the way) and runs it over every panel: a tile of
// kProductRows x kPanel sums stays in registers, the panel comes from L1 and L2, the block's rows from L1. Finished
// tiles go through `finish` while they are in L1: bias, activation, residual and the conversion of the result cost no
// pass of their own. What is computed never depends on the number of threads.

#if defined(FASTGPT_AMX)
constexpr bool kTiled = true;
constexpr int kProductRows = 2 * kTileSide;  // four tiles of sums, two of A and two of B
constexpr int kPanelVectors = 2;
constexpr int64_t kStepsTogether = kTilePairs;
constexpr int64_t kBlockBytes = 1 << 20;  // of A, packed: half an L2
constexpr int64_t kMostBlockRows = 512;   // a multiple of kProductRows
#else
constexpr bool kTiled = false;
// 24 sums, 3 vectors of B and 1 number of A: 28 of 32 registers (12, 2 and 1 of 16 for AVX2). Eight rows rather than
// six with four vectors each: B, which streams from L2, is read a third less often.
constexpr int kProductRows = FASTGPT_LANES == 16 ? 8 : 6;
constexpr int kPanelVectors = FASTGPT_LANES == 16 ? 3 : 2;
constexpr int64_t kStepsTogether = 1;
constexpr int64_t kBlockBytes = 256 << 10;  // of A, packed: a quarter of an L2
constexpr int64_t kMostBlockRows = 96;      // a multiple of kProductRows
#endif
constexpr int kPanel = kPanelVectors * kLanes;  // columns
constexpr int64_t kPanelBytes = 400 << 10;      // of a panel of B: longer sums are split; with a block of A it fits L2
constexpr int64_t kPackedBytes = 4 << 20;       // of B, packed: what fits into L3 beside everything else
constexpr int64_t kTermsAtOnce = 4 * kChain;    // of a sum, before it is added to the tile in memory

// A matrix in memory: element (i, j) at data[i * stride + j].
struct Matrix {
  DType dtype;
  const void* data;
  int64_t stride;

  Matrix from(int64_t row, int64_t column) const {
    const int64_t bytes = (row * stride + column) * (dtype == DType::kBFloat16 ? 2 : 4);
    return {dtype, static_cast<const char*>(data) + bytes, stride};
  }
};

template <class Body>
INLINE void with_matrix(const Matrix& m, int64_t row, int64_t column, const Body& body) {
  with_type(m.dtype, [&](auto tag) { body(static_cast<const decltype(tag)*>(m.from(row, column).data)); });
}

// Rows of A that lie in memory as columns, kProductRows of them together: out(strip, k, r) = x(k, strip and r).
template <class Math, class T>
void pack_strips(const T* x, int64_t stride, int64_t depth, int64_t rows, typename Math::Element* out) {
  using Element = typename Math::Element;
  Element line[kMostBlockRows + kLanes + kProductRows];
  const int64_t steps = (depth + Math::kTerms - 1) / Math::kTerms;
  for (int64_t k = 0; k < steps; ++k) {
    // The rows ahead lie in other pages, where the chip itself does not look.
    for (int64_t t = 0; t < Math::kTerms; ++t) {
      const char* ahead = reinterpret_cast<const char*>(x + std::min((k + 6) * Math::kTerms + t, depth - 1) * stride);
      for (int64_t byte = 0; byte < rows * int64_t{sizeof(T)}; byte += 64) __builtin_prefetch(ahead + byte);
    }
    Pack<Math>::pairs(x + k * Math::kTerms * stride, stride, std::min<int64_t>(Math::kTerms, depth - k * Math::kTerms),
                      rows, line, round_up(rows, kLanes));
    for (int64_t r = 0; r < rows; r += kProductRows) {
      std::memcpy(out + r * steps + k * kProductRows, line + r, kProductRows * sizeof(Element));
    }
  }
}

// Rows of A as they lie; where they are far apart, each is asked for while the one before it is packed.
template <class Math, class T>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, typename Math::Element* out, int64_t ld) {
  constexpr int64_t kPiece = 512;  // numbers
  constexpr int64_t kPage = 4096 / int64_t{sizeof(T)};
  if (stride < kPage) {
    Pack<Math>::rows(x, stride, rows, depth, out, ld);
    return;
  }
  for (int64_t r = 0; r < rows; ++r, x += stride, out += ld) {
    for (int64_t d = 0; d < depth; d += kPiece) {
      const int64_t n = std::min(kPiece, depth - d);
      if (r + 1 < rows) {
        for (int64_t i = 0; i < n; i += 64 / int64_t{sizeof(T)}) __builtin_prefetch(x + stride + d + i);
      }
      Pack<Math>::rows(x + d, stride, 1, n, out + d / Math::kTerms, ld);
    }
  }
}

// Rows [r0, r0 + height) of A where they lie, if that is how they would be packed, else null.
template <class Math>
INLINE const typename Math::Element* rows_in_place(const Matrix& a, int64_t r0, int64_t height, int64_t lda) {
  using Element = typename Math::Element;
  const bool same_type = (a.dtype == DType::kBFloat16) == (Math::kTerms == 2);
  if (!same_type || height % kProductRows || a.stride != lda * Math::kTerms) return nullptr;
  const void* rows = a.from(r0, 0).data;
  return reinterpret_cast<uintptr_t>(rows) % sizeof(Element) ? nullptr : static_cast<const Element*>(rows);
}

#if defined(FASTGPT_AMX)
// Adds `depth` steps of the sums to a tile of `height` rows that count, or more; makes it where `fresh`.
template <class Math, bool kTransposed, int kColumns>
void product_tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t depth, int64_t height, bool fresh,
                  float* tile) {
  static_assert(!kTransposed);
  height > kTileSide ? multiply_tiles<2, kColumns>(a, lda, b, depth, fresh, tile, kPanel)
                     : multiply_tiles<1, kColumns>(a, lda, b, depth, fresh, tile, kPanel);
}
#else
template <class Math, bool kTransposed, int kColumns>
void product_tile(const typename Math::Element* a, int64_t lda, const typename Math::Element* b, int64_t depth, int64_t,
                  bool, float* tile) {
  constexpr int64_t kSteps = kTermsAtOnce / Math::kTerms;
  for (int64_t k = 0; k == 0 || k < depth; k += kSteps) {  // once for an empty sum, which is 0
    multiply_tile<Math, kTransposed, kColumns, kProductRows>(kTransposed ? a + k * lda : a + k, lda,
                                                             b + k * kColumns * kLanes, kColumns * kLanes,
                                                             std::min(kSteps, depth - k), [&](int c, const auto& rows) {
                                                               float* place = tile + c * kLanes;
#pragma GCC unroll 8
                                                               for (int r = 0; r < kProductRows; ++r, place += kPanel)
                                                                 store(place, k > 0 ? load(place) + rows[r] : rows[r]);
                                                             });
  }
}
#endif

// A is (rows, depth), or (depth, rows) in memory where kTransposedA; B is (depth, columns), or (columns, depth) in
// memory where kTransposedB. finish(r, c, height, width, tile) takes rows r.. and columns c.. of the result from
// tile[i * kPanel + j]; prefetch(r, c, height, width) is called before they are computed.
template <class Math, bool kTransposedA, bool kTransposedB, class Prefetch, class Finish>
void product_part(const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, int64_t depth, int threads,
                  const Prefetch& prefetch, const Finish& finish) {
  using Element = typename Math::Element;
  if (rows <= 0 || columns <= 0) return;
  constexpr bool kStrips = kTransposedA && !kTiled;
  const int64_t steps_of_terms = (depth + Math::kTerms - 1) / Math::kTerms;
  const int64_t steps = round_up(steps_of_terms, kStepsTogether);  // those beyond the terms are of zeros
  const int64_t panel_size = steps * kPanel;
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  const int64_t panels_at_once = std::clamp<int64_t>(kPackedBytes / (panel_size * sizeof(Element) + 1), 1, panels);

  // Blocks of whole strips of kProductRows rows, as many for each thread and as even as they can be, the larger first.
  const int64_t strips = (rows + kProductRows - 1) / kProductRows;
  const int64_t most_strips = std::max<int64_t>(
      std::min(kMostBlockRows, kBlockBytes / (steps * int64_t{sizeof(Element)} + 1)) / kProductRows, 1);
  const int64_t rounds = (strips + most_strips * threads - 1) / (most_strips * threads);
  const int64_t blocks = std::min(strips, rounds * threads);
  const int64_t larger = strips % blocks;
  const auto block_row = [&](int64_t i) { return (strips / blocks * i + std::min(i, larger)) * kProductRows; };
  const int64_t lda = kStrips ? kProductRows : round_up(steps, kLanes);
  const int64_t strip_size = kStrips ? kProductRows * steps : kProductRows * lda;  // of kProductRows rows

  Element* packed = static_cast<Element*>(thread_memory<0>(panels_at_once * panel_size * sizeof(Element)));
  const int64_t work = rows * columns * depth;
  const int team = work < 64 * 64 * 64 ? 1 : threads;

  for (int64_t first = 0; first < panels; first += panels_at_once) {
    const int64_t count = std::min(panels_at_once, panels - first);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(team) if (team > 1)
    {
      if (kTransposedB) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count; ++p) {
          const int64_t c = (first + p) * kPanel, width = std::min<int64_t>(kPanel, columns - c);
          const int64_t ld = round_up(width, kLanes);
          Element* const panel = packed + p * panel_size;
          with_matrix(b, c, 0, [&](auto* x) { Pack<Math>::columns(x, b.stride, width, depth, panel, ld); });
          std::fill(panel + steps_of_terms * ld, panel + steps * ld, Element{});
        }
      } else {  // along the rows of B in memory, over all panels
#pragma omp for schedule(static)
        for (int64_t k = 0; k < steps; ++k) {
          const int64_t terms = std::min<int64_t>(Math::kTerms, depth - k * Math::kTerms);
          with_matrix(b, k * Math::kTerms, first * kPanel, [&](auto* x) {
            for (int64_t p = 0; p < count; ++p) {
              const int64_t width = std::min<int64_t>(kPanel, columns - (first + p) * kPanel);
              const int64_t ld = round_up(width, kLanes);
              Element* const row = packed + p * panel_size + k * ld;
              terms > 0 ? Pack<Math>::pairs(x + p * kPanel, b.stride, terms, width, row, ld)
                        : std::fill(row, row + ld, Element{});
            }
          });
        }
      }
      Element* rows_of_a =
          static_cast<Element*>(thread_memory<1>((strips / blocks + 1) * strip_size * sizeof(Element)));
      // Tiles of the chip's want the part of a panel that they take in L1 (32 KB with A's), so all tiles of the block
      // take one part before the next.
      const int64_t steps_at_once = kTiled ? kTermsAtOnce / Math::kTerms : std::max<int64_t>(steps, 1);
      const int64_t tile_rows = kTiled ? (strips / blocks + 1) * kProductRows : kProductRows;
      float* const sums = static_cast<float*>(thread_memory<2>(tile_rows * kPanel * int64_t{sizeof(float)}));
      [[maybe_unused]] const Tiles shapes;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
        const int64_t r0 = block_row(i), height = std::min(block_row(i + 1), rows) - r0;
        const Element* block = rows_of_a;
        if constexpr (kTransposedA) {
          with_matrix(a, 0, r0, [&](auto* x) {
            if constexpr (kStrips) {
              pack_strips<Math>(x, a.stride, depth, height, rows_of_a);
            } else {
              Pack<Math>::rows_of_columns(x, a.stride, height, depth, rows_of_a, lda);
            }
          });
        } else if (const Element* in_place = rows_in_place<Math>(a, r0, height, lda)) {
          block = in_place;
        } else {
          with_matrix(a, r0, 0, [&](auto* x) { pack_rows<Math>(x, a.stride, height, depth, rows_of_a, lda); });
        }
        for (int64_t p = 0; p < count; ++p) {
          const int64_t c = (first + p) * kPanel;
          const int width = static_cast<int>(std::min<int64_t>(kPanel, columns - c));
          const int64_t ld = round_up(width, kLanes);
          for (int64_t k = 0; k == 0 || k < steps; k += steps_at_once) {
            for (int64_t r = 0; r < height; r += kProductRows) {
              // Rows beyond the height hold an earlier block's numbers: computed, never stored.
              const int here = static_cast<int>(std::min<int64_t>(kProductRows, height - r));
              if (k == 0) prefetch(r0 + r, c, here, width);
              const Element* from = block + r / kProductRows * strip_size + k;
              float* const tile = kTiled ? sums + r * kPanel : sums;
              const auto tiles = [&](auto wide) {
                product_tile<Math, kStrips, decltype(wide)::value>(from, lda, packed + p * panel_size + k * ld,
                                                                   std::min(steps_at_once, steps - k), here, k == 0,
                                                                   tile);
              };
              switch (ld / kLanes) {
                case 1:
                  tiles(std::integral_constant<int, 1>{});
                  break;
#if FASTGPT_LANES == 16 && !defined(FASTGPT_AMX)
                case 3:
                  tiles(std::integral_constant<int, 3>{});
                  break;
#endif
                default:
                  tiles(std::integral_constant<int, 2>{});
                  break;
              }
              if (k + steps_at_once >= steps) finish(r0 + r, c, here, width, tile);
            }
          }
        }
      }
    }
  }
}

// Where partial sums of a long product lie between its parts: (rows, columns) floats, part of the result from the start
// where `started`.
struct Sums {
  float* data = nullptr;
  bool started = false;
};

// The whole product: a sum too long for the caches is split into parts, each added to the ones before.
template <class Math, bool kTransposedA, bool kTransposedB, class Finish>
void product(const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, int64_t depth, int64_t most_depth,
             int threads, Sums sums, const Finish& finish) {
  const int64_t panel_row = kPanel * int64_t{sizeof(typename Math::Element)} / Math::kTerms;
  const int64_t parts = std::max<int64_t>(
      1, (depth + std::min(most_depth, kPanelBytes / panel_row) - 1) / std::min(most_depth, kPanelBytes / panel_row));
  if (parts == 1 && !sums.started) {
    product_part<Math, kTransposedA, kTransposedB>(
        a, b, rows, columns, depth, threads, [](int64_t, int64_t, int, int) {}, finish);
    return;
  }
  if (sums.data == nullptr) sums.data = static_cast<float*>(thread_memory<3>(rows * columns * int64_t{sizeof(float)}));
  const int64_t part = round_up((depth + parts - 1) / parts, kTermsAtOnce);
  for (int64_t k = 0; k == 0 || k < depth; k += part) {
    const bool add = k > 0 || sums.started, last = k + part >= depth;
    const auto prefetch = [&](int64_t r0, int64_t c0, int height, int width) {
      if (!add) return;
      for (int i = 0; i < height; ++i) {
        for (int j = 0; j < width; j += kLanes) __builtin_prefetch(sums.data + (r0 + i) * columns + c0 + j, 1);
      }
    };
    const auto keep = [&](int64_t r0, int64_t c0, int height, int width, float* tile) {
      for (int i = 0; i < height; ++i) {
        float* place = sums.data + (r0 + i) * columns + c0;
        for (int j = 0; j < width; j += kLanes) {
          const int n = std::min(kLanes, width - j);
          Vec v = load(tile + i * kPanel + j);
          if (add) v += load_part(place + j, n);
          last ? store(tile + i * kPanel + j, v) : store_part(place + j, v, n);
        }
      }
      if (last) finish(r0, c0, height, width, tile);
    };
    const int64_t depth_here = std::max<int64_t>(0, std::min(part, depth - k));
    product_part<Math, kTransposedA, kTransposedB>(kTransposedA ? a.from(k, 0) : a.from(0, k),
                                                   kTransposedB ? b.from(0, k) : b.from(k, 0), rows, columns,
                                                   depth_here, threads, prefetch, keep);
  }
}
