// Tiles of AMX (AMX_BF16: Sapphire Rapids and later): matrices of up to 16 rows of 64 bytes that the chip multiplies as
// wholes, 16 x 16 sums of 32 terms in the time of 16 bf16 vector products. The packed forms of BFloat16Math are what
// they load: A a row a row, B a pair of terms a row.

constexpr int kTileSide = 16;   // rows of a tile, and its sums a row
constexpr int kTilePairs = 16;  // of terms, that one product takes

// What has been written, at `written` too, is in memory: the compiler does not know that loading a tile, or the tiles'
// shapes, reads it.
INLINE void settle(const void* written = nullptr) { __asm__ volatile("" ::"r"(written) : "memory"); }

// The shapes of the tiles of a thread, all eight the same, until it ends.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = kTileSide;
    }
    settle(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
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
