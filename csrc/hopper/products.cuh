// Operands in shared memory, and the two products that kernels are made of. Columns of one chunk lie side by side
// (kRowBytes a row, swizzled), chunk after chunk. "generated.cuh" has the instructions for these sizes.
#pragma once
#include "hopper/generated.cuh"
#include "hopper/ptx.cuh"

constexpr int kHeadDim = HEAD_DIM, kConsumers = CONSUMERS;
constexpr int kColumns = kHeadDim % 64 == 0 ? 64 : 32, kChunks = kHeadDim / kColumns, kRowBytes = 2 * kColumns;
constexpr int kRows = 64;  // rows of one warpgroup
constexpr u32 kQueryChunk = kConsumers * kRows * kRowBytes, kKeyChunk = kKeys * kRowBytes;
static_assert(kHeadDim % 32 == 0 && kHeadDim <= 256, "head dims are multiples of 32 up to 256; pad others");
static_assert(kKeys % 16 == 0, "the second multiplication takes 16 keys at a time");

// Shared-memory operand: 128-byte or 64-byte swizzle; distances in bytes.
template <int kSwizzle = kRowBytes>
__device__ __forceinline__ u64 operand(u32 address, u32 leading, u32 stride) {
  return (u64)(address >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (kSwizzle == 128 ? 1ull : 2ull) << 62;
}

// An operand whose part that begins `bytes` further on has the same distances. An addition to the descriptor takes half of
// the instructions that making it anew does, but uniform registers, of which 16 steps would need too many.
struct Parts {
  u32 address, leading, stride;
  __device__ __forceinline__ u64 at(u32 bytes) const {
    if (kHeadDim > 128) return operand(address + bytes, leading, stride);
    const u64 first = operand(address, leading, stride);
    return first >> 32 << 32 | (u32)first + (bytes >> 4);
  }
  // Where columns [16 i, 16 i + 16) start, in chunks that are that far apart.
  __device__ __forceinline__ u64 columns(int i, u32 chunk) const { return at(i / (kColumns / 16) * chunk + i % (kColumns / 16) * 32); }
};

// Scores of 64 rows of q, which are in shared memory, or in registers (load_matrices).
__device__ __forceinline__ void scores(float (&s)[kKeys / 2], u32 q, u32 k) {
  const Parts queries{q, 16, 8 * kRowBytes}, keys{k, 16, 8 * kRowBytes};
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; i++) mma_qk(s, queries.columns(i, kQueryChunk), keys.columns(i, kKeyChunk), i != 0);
}

__device__ __forceinline__ void scores(float (&s)[kKeys / 2], const u32 (&q)[kHeadDim / 4], u32 k) {
  const Parts keys{k, 16, 8 * kRowBytes};
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; i++)
    mma_held(s, q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], keys.columns(i, kKeyChunk), i != 0);
}

// Weights times values; without `accumulate` what was in o is lost, so that nobody need set it to zero.
__device__ __forceinline__ void add_values(float (&o)[kHeadDim / 2], const u32 (&p)[kKeys / 4], u32 v, int accumulate = 1) {
  const Parts values{v, kKeyChunk, 8 * kRowBytes};
#pragma unroll
  for (int i = 0; i < kKeys / 16; i++)
    mma_pv(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], values.at(i * 16 * kRowBytes), i != 0 || accumulate);
}

// Adds a mask to scores; see masks.cuh. Commits in each branch: after one the compiler would insert an empty product.
__device__ __forceinline__ void add_mask(float (&s)[kKeys / 2], const u32 (&hidden)[2][2][2], u32 places, int steps) {
  auto add = [&](int i) {
    mma_held(s, hidden[0][i][0], hidden[1][i][0], hidden[0][i][1], hidden[1][i][1], operand<64>(places + 32 * i, 16, 8 * 64), 1);
  };
  if (steps == 1) {
    add(0);
    mma_commit();
  } else {
    add(0), add(1);
    mma_commit();
  }
}

__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 bar, int column, int c1, int c2, int c3, int c4) {
#pragma unroll
  for (int i = 0; i < kChunks; i++) tensor_load(to + i * kKeyChunk, map, bar, column + i * kColumns, c1, c2, c3, c4);
}
