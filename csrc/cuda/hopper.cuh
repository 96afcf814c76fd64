// How a Hopper kernel is put together from ptx.cuh: tiles that bulk copies bring, the descriptors by which the tensor
// cores find them, a ring of stages between a producer and its consumers, and the way back out.
//
// The machine in one page; sections are those of the PTX ISA, version 9.0, and ptx.cuh has the instructions:
//   - Tensor copies (9.7.9.27.1.2): one thread names a tensor map, which the host made (tensor_map.cuh), and
//   coordinates;
//     the copy engine brings the box, zeros outside of the tensor, and writes it with the map's swizzle.
//   - mbarriers (9.7.13.15) tell when a box is there: a phase ends when its arrivals came and its bytes landed. A ring
//   has
//     two a stage, `full` for the consumers and `empty` for the producer (Place below keeps count of their parities).
//   - wgmma (9.7.16): four warps multiply 64 rows by up to 256 columns, 16 deep an instruction. B comes from shared
//   memory
//     by a descriptor, A too or from registers, sums stay in registers. It is asynchronous: fence, issue, commit, wait;
//     what is between issue and wait must not touch sums, operands, or the tiles (9.7.16.7).
//   - setmaxnreg (9.7.19.5): a producer warpgroup needs few registers and gives them to the consumers.
//   - Named barriers (9.7.13.1): warpgroups that take turns, or exchange a tile.
//   - The async proxy (8.6): copy engine and wgmma see shared memory by a path of their own. What threads wrote there
//   is
//     theirs to see after fence.proxy.async (9.7.13.4) and a barrier; what copies wrote threads see after the mbarrier.
//   - The way out: registers to a tile by stmatrix (9.7.15.5.16), the fence, then a tensor store or a bulk reduction
//     (9.7.9.25, 9.7.9.27) by one thread, in groups that it waits for before the tile is used again.
//
// A tile of rows of D halves lies in shared memory as D / 64 panels of 128-byte rows, each panel 1024-byte aligned. The
// 128-byte swizzle (5.5.7) moves 16-byte chunks within groups of eight rows: address bits 4 to 6 ^= bits 7 to 9. The
// copy engine writes that way and the tensor cores read that way; only store_left, where threads write, computes it.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace fastgpt::hopper {

constexpr int kPanelColumns = 64, kPanelRowBytes = 128, kGroupBytes = 1024;  // a group: eight rows

// 9.7.16.5.1.2.2 the matrix descriptor of wgmma: address, leading and stride byte offsets in 16 bytes, 1 in the last
// two bits for the 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}

// 9.7.16.5.1.2, K-major: 16 columns from `column` on of rows `row` (a multiple of 8) and following, K running along the
// rows: groups of eight rows follow each other; the leading offset has no meaning with this swizzle.
__device__ __forceinline__ uint64_t k_major(uint32_t tile, int tile_rows, int row, int column) {
  const uint32_t panel = tile + column / kPanelColumns * tile_rows * kPanelRowBytes;
  return descriptor(panel + row * kPanelRowBytes + column % kPanelColumns * 2, 16, kGroupBytes);
}

// 9.7.16.5.1.2, MN-major: 16 rows from `row` on, columns from `column` on, K running down the rows: eight of K a group,
// 64 columns a panel.
__device__ __forceinline__ uint64_t mn_major(uint32_t tile, int tile_rows, int row, int column = 0) {
  const uint32_t panel = tile + column / kPanelColumns * tile_rows * kPanelRowBytes + column % kPanelColumns * 2;
  return descriptor(panel + row * kPanelRowBytes, tile_rows * kPanelRowBytes, kGroupBytes);
}

// 9.7.16.5.2 d = A B^T: 64 rows of A from `row` on, all kColumns rows of B, over kDim columns. Asynchronous: fence
// before, commit and wait after.
template <class T, int kDim, int kColumns>
__device__ __forceinline__ void multiply_transposed(float (&d)[kColumns / 2], uint32_t a, int a_rows, int row,
                                                    uint32_t b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    ptx::wgmma_ss<T, kColumns>(d, k_major(a, a_rows, row, 16 * k), k_major(b, kColumns, 0, 16 * k), k > 0);
  }
}

// 9.7.16.5.2 d += W B, W (64, kInner) in registers as pack_left leaves it, B a tile of kInner rows of kDim halves.
// Asynchronous.
template <class T, int kDim, int kInner>
__device__ __forceinline__ void accumulate(float (&d)[kDim / 2], const uint32_t (&w)[kInner / 16][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k) {
    ptx::wgmma_rs<T, kDim>(d, w[k], mn_major(b, kInner, 16 * k), 1);
  }
}

// 9.7.16.5.2 d = A^T B: A a tile of kInner rows of 64 halves, B kColumns columns from `column` on of a tile of kInner
// rows. Asynchronous.
template <class T, int kInner, int kColumns>
__device__ __forceinline__ void multiply_left_transposed(float (&d)[kColumns / 2], uint32_t a, uint32_t b, int column) {
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k) {
    ptx::wgmma_tt<T, kColumns>(d, mn_major(a, kInner, 16 * k), mn_major(b, kInner, 16 * k, column), k > 0);
  }
}

// 9.7.15.5.16 16 rows from `row` on, of a warp's product of kBlocks 16 columns each as pack_left leaves them, into a
// tile of rows of 64 halves, with the swizzle. The copy engine and wgmma see it after fence_proxy_async and a barrier.
template <int kBlocks>
__device__ __forceinline__ void store_left(uint32_t tile, int row, const uint32_t (&w)[kBlocks][4], int first = 0) {
  const int lane = threadIdx.x % 32, mine = row + lane % 16;
#pragma unroll
  for (int k = 0; k < kBlocks; ++k) {
    const int chunk = (2 * (first + k) + lane / 16) ^ mine % 8;
    ptx::stmatrix_x4(tile + mine * kPanelRowBytes + chunk * 16, w[k]);
  }
}

// 9.7.16.5.1.1 sums as the left operand of the next product: the layouts agree, so only the type changes.
template <class T, int kCount>
__device__ __forceinline__ void pack_left(uint32_t (&w)[kCount / 8][4], const float (&d)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) w[k][r] = ptx::pack<T>(d[8 * k + 2 * r], d[8 * k + 2 * r + 1]);
  }
}

// 9.7.13.15 where one side of a ring of kStages stages is. The consumer waits for `full` with parity(), the producer
// for `empty` with the other parity, which a fresh barrier passes.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace fastgpt::hopper
