// Masks and online softmax of one key box, in the registers of a warpgroup's accumulator.
//
// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16: s[4 g + 2 r + i] is row r, column 8 g + 2 (lane % 4) + i.
// A mask has one bit for each column of a row that the thread holds, bit 2 g + i.
#pragma once
#include "hopper/ptx.cuh"

constexpr int kMaskWords = (kKeys / 4 + 31) / 32;
#define MINUS_INFINITY (-__int_as_float(0x7f800000))

// table[position][lane class][word]: columns whose coordinate in a dimension is below the position; dimension after dimension.
__device__ __forceinline__ void fill_mask_table(u32* table, const int (&keys)[3]) {
  const int all = keys[0] * keys[1] * keys[2];
  for (int i = threadIdx.x; i < (keys[0] + keys[1] + keys[2] + 3) * 4 * kMaskWords; i += blockDim.x) {
    int position = i / (4 * kMaskWords), d = 0;
    while (position > keys[d]) position -= keys[d++] + 1;
    const int inner = d == 0 ? keys[1] * keys[2] : d == 1 ? keys[2] : 1;
    u32 bits = 0;
    for (int b = 0; b < 32; b++) {
      const int bit = i % kMaskWords * 32 + b, column = 8 * (bit / 2) + 2 * (i / kMaskWords % 4) + bit % 2;
      if (bit < kKeys / 4 && column < all && column / inner % keys[d] < position) bits |= 1u << b;
    }
    table[i] = bits;
  }
}

// Columns of a box that lie in a row's window: in every dimension those below its end, less those below its start.
__device__ __forceinline__ void window_mask(
    u32 (&mask)[kMaskWords], const u32* table, const int2 (&window)[3], const KeyBox& box, const int (&keys)[3], int lane_class) {
#pragma unroll
  for (int w = 0; w < kMaskWords; w++) mask[w] = ~0u;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    const int begin = min(max(window[d].x - box.begin[d], 0), keys[d]), end = min(max(window[d].y - box.begin[d], 0), keys[d]);
#pragma unroll
    for (int w = 0; w < kMaskWords; w++)
      mask[w] &= table[(end * 4 + lane_class) * kMaskWords + w] & ~table[(begin * 4 + lane_class) * kMaskWords + w];
    table += (keys[d] + 1) * 4 * kMaskWords;
  }
}

// The first `count` columns.
__device__ __forceinline__ void count_mask(u32 (&mask)[kMaskWords], int count, int lane_class) {
  const int mine = count - 2 * lane_class, pairs = mine >= 2 ? (mine - 2) / 8 + 1 : 0, bits = 2 * pairs + (mine - 8 * pairs == 1);
#pragma unroll
  for (int w = 0; w < kMaskWords; w++) {
    const int here = min(max(bits - 32 * w, 0), 32);
    mask[w] = here == 32 ? ~0u : (1u << here) - 1;
  }
}

// Running maximum (of raw scores), sum and last rescaling factor of a thread's two rows.
struct Rows {
  float maximum[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.f, 0.f}, rescale[2];
};

// Turns scores into weights and updates the rows. Returns whether the output so far must be multiplied by `rescale`: the
// maximum is kept while no score is more than 2^8 times larger, which the final division makes exact.
template <bool kMasked>
__device__ __forceinline__ bool softmax(float (&s)[kKeys / 2], Rows& rows, float scale, const u32 (&mask)[2][kMaskWords]) {
  bool raised = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m0 = rows.maximum[r], m1 = MINUS_INFINITY;
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) {
      float &x = s[4 * g + 2 * r], &y = s[4 * g + 2 * r + 1];
      if (kMasked) {
        x = mask[r][g / 16] & 1u << 2 * g % 32 ? x : MINUS_INFINITY;
        y = mask[r][g / 16] & 2u << 2 * g % 32 ? y : MINUS_INFINITY;
      }
      m0 = fmaxf(m0, x);
      m1 = fmaxf(m1, y);
    }
    m0 = fmaxf(m0, m1);
    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 1));
    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 2));
    const bool raise = (m0 - rows.maximum[r]) * scale > 8.f;
    if (!raise) m0 = rows.maximum[r];
    const float shift = kMasked && m0 == MINUS_INFINITY ? 0.f : m0 * scale;  // no key so far: any finite maximum will do
    rows.rescale[r] = raise ? exp2_fast(fmaf(rows.maximum[r], scale, -shift)) : 1.f;
    rows.maximum[r] = m0;
    raised |= raise;
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) {
      float &x = s[4 * g + 2 * r], &y = s[4 * g + 2 * r + 1];
      x = exp2_fast(fmaf(x, scale, -shift));
      y = exp2_fast(fmaf(y, scale, -shift));
      a += x;
      b += y;
    }
    rows.sum[r] = fmaf(rows.sum[r], rows.rescale[r], a + b);
  }
  return raised;
}

// An accumulator of 16 columns is exactly one operand of the next multiplication, once it has 16-bit floats.
__device__ __forceinline__ void to_operand(const float (&s)[kKeys / 2], u32 (&p)[kKeys / 4]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}
