// Tiles of AMX (AMX_BF16: Sapphire Rapids and later): matrices of up to 16 rows of 64 bytes that the chip multiplies as
// wholes, 16 x 16 sums of 32 terms in the time of 16 bf16 vector products. The packed forms of BFloat16Math are what
// they load: A a row a row, B a pair of terms a row.

constexpr int kTileSide = 16;   // rows of a tile, and its sums a row
constexpr int kTilePairs = 16;  // of terms, that one product takes

// What has been written, at `written` too, is in memory: the compiler does not know that loading a tile, or the tiles'
// shapes, reads it.
INLINE void settle(const void* written = nullptr) { __asm__ volatile("" ::"r"(written) : "memory"); }

// The shapes of the tiles of a thread, all eight the same, until it ends; then those that were set before, if any:
// other libraries remember what they have set on a thread.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    settle(&before_);
    Shapes shapes;
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = kTileSide;
    }
    set(shapes);
  }
  ~Tiles() {
    if (before_.palette != 0) {
      set(before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static void set(const Shapes& shapes) {
    settle(&shapes);
    _tile_loadconfig(&shapes);
  }
  Shapes before_;
};

// Up to 32 x 32 sums, kRows x kColumns tiles: sums(r, c) (+)= sum_k A(r, k) B(k, c), new ones where `fresh`. A's rows
// lie lda pairs apart, B's kColumns vectors; `pairs` is a multiple of kTilePairs, and what lies beyond the terms is 0
// on both sides. The sums' rows are ld floats apart.
template <int kRows, int kColumns>
INLINE void multiply_tiles(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t pairs, bool fresh, float* sums,
                           int64_t ld) {
  const int64_t a_bytes = lda * int64_t{sizeof(uint32_t)}, b_bytes = kColumns * kLanes * int64_t{sizeof(uint32_t)};
  const int64_t ld_bytes = ld * int64_t{sizeof(float)};
  settle();
  if (fresh) {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1) _tile_zero(2);
    if (kRows > 1 && kColumns > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, ld_bytes);
    if (kColumns > 1) _tile_loadd(1, sums + kLanes, ld_bytes);
    if (kRows > 1) _tile_loadd(2, sums + kTileSide * ld, ld_bytes);
    if (kRows > 1 && kColumns > 1) _tile_loadd(3, sums + kTileSide * ld + kLanes, ld_bytes);
  }
  for (int64_t k = 0; k < pairs; k += kTilePairs, b += kTilePairs * kColumns * kLanes) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns > 1) {
      _tile_loadd(7, b + kLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows > 1) {
      _tile_loadd(5, a + kTileSide * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, ld_bytes);
  if (kColumns > 1) _tile_stored(1, sums + kLanes, ld_bytes);
  if (kRows > 1) _tile_stored(2, sums + kTileSide * ld, ld_bytes);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, sums + kTileSide * ld + kLanes, ld_bytes);
}

INLINE void transpose(Vec (&x)[kLanes]);  // matmul.inl

// multiply_rows (matmul.inl) by tiles: four of C beside one of A. Terms that do not fill a tile are copied, with zeros
// behind them, as is A where it lies transposed.
template <bool kTransposed, class Last>
void multiply_rows_in_tiles(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t depth, int c0,
                            int c1, const Last& last) {
  constexpr int kTogether = 4;
  alignas(64) uint32_t a_room[kTileSide * kTilePairs], b_room[kTilePairs * kTogether * kLanes];
  alignas(64) float sums[kTogether][kTileSide * kLanes];
  for (; c0 < c1; c0 += kTogether) {
    const int columns = std::min(kTogether, c1 - c0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTilePairs) {
      const int64_t pairs = std::min<int64_t>(kTilePairs, depth - k);
      const uint32_t* from = a + k;
      int64_t a_bytes = lda * int64_t{sizeof(uint32_t)};
      if (kTransposed || pairs < kTilePairs) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const float* const row = reinterpret_cast<const float*>(kTransposed ? a + (k + i) * lda : from + i * lda);
          if (kTransposed) {
            square[i] = i < pairs ? load(row) : Vec{};
          } else {
            square[i] = load_n(row, static_cast<int>(pairs));
          }
        }
        if (kTransposed) transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(a_room) + i * kTilePairs, square[i]);
        from = a_room;
        a_bytes = kTilePairs * int64_t{sizeof(uint32_t)};
      }
      const uint32_t* of_b = b + k * ldb + c0 * kLanes;
      int64_t b_bytes = ldb * int64_t{sizeof(uint32_t)};
      if (pairs < kTilePairs) {
        const int64_t row = columns * kLanes;
        for (int64_t i = 0; i < pairs; ++i) std::memcpy(b_room + i * row, of_b + i * ldb, row * sizeof(uint32_t));
        std::fill(b_room + pairs * row, b_room + kTilePairs * row, 0);
        of_b = b_room;
        b_bytes = row * int64_t{sizeof(uint32_t)};
      }
      settle();
      _tile_loadd(4, from, a_bytes);
      _tile_loadd(5, of_b, b_bytes);
      _tile_dpbf16ps(0, 4, 5);
      if (columns > 1) {
        _tile_loadd(6, of_b + kLanes, b_bytes);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (columns > 2) {
        _tile_loadd(7, of_b + 2 * kLanes, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (columns > 3) {
        _tile_loadd(5, of_b + 3 * kLanes, b_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, sums[0], kLanes * int64_t{sizeof(float)});
    _tile_stored(1, sums[1], kLanes * int64_t{sizeof(float)});
    _tile_stored(2, sums[2], kLanes * int64_t{sizeof(float)});
    _tile_stored(3, sums[3], kLanes * int64_t{sizeof(float)});
    for (int c = 0; c < columns; ++c) {
      Vec rows[kTileSide];
#pragma GCC unroll 16
      for (int r = 0; r < kTileSide; ++r) rows[r] = load(sums[c] + r * kLanes);
      last(c0 + c, rows);
    }
  }
}
