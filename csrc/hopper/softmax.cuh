// Online softmax of one key box, in the registers of a warpgroup's accumulator; masks.cuh says what a thread holds.
#pragma once
#include "hopper/masks.cuh"

// Running maximum (of raw scores), sum and last rescaling factor of a thread's two rows.
struct Rows {
  float maximum[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.f, 0.f}, rescale[2];
};

// Scores of columns that a mask leaves out become minus infinity.
__device__ __forceinline__ void hide(float (&s)[kKeys / 2], const u32 (&mask)[2][kMaskWords]) {
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) {
      float &x = s[4 * g + 2 * r], &y = s[4 * g + 2 * r + 1];
      x = mask[r][g / 16] & 1u << 2 * g % 32 ? x : MINUS_INFINITY;
      y = mask[r][g / 16] & 2u << 2 * g % 32 ? y : MINUS_INFINITY;
    }
}

// Scores of row r to weights; their sum.
__device__ __forceinline__ float weights(float (&s)[kKeys / 2], int r, float scale, float shift) {
  float a = 0.f, b = 0.f;
#pragma unroll
  for (int g = 0; g < kKeys / 8; g++) {
    float &x = s[4 * g + 2 * r], &y = s[4 * g + 2 * r + 1];
    x = exp2_fast(fmaf(x, scale, -shift));
    y = exp2_fast(fmaf(y, scale, -shift));
    a += x;
    b += y;
  }
  return a + b;
}

// Turns scores into weights and updates the rows. Returns whether the output so far must be multiplied by `rescale`.
__device__ __forceinline__ bool softmax(float (&s)[kKeys / 2], Rows& rows, float scale) {
  bool raised = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m0 = rows.maximum[r], m1 = MINUS_INFINITY;
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) m0 = fmaxf(m0, s[4 * g + 2 * r]), m1 = fmaxf(m1, s[4 * g + 2 * r + 1]);
    m0 = fmaxf(m0, m1);
    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 1));
    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 2));
    const bool raise = m0 > rows.maximum[r];
    const float shift = m0 == MINUS_INFINITY ? 0.f : m0 * scale;  // no key so far: any finite maximum will do
    rows.rescale[r] = raise ? exp2_fast(fmaf(rows.maximum[r], scale, -shift)) : 1.f;
    rows.maximum[r] = m0;
    raised |= raise;
    rows.sum[r] = fmaf(rows.sum[r], rows.rescale[r], weights(s, r, scale, shift));
  }
  return raised;
}

// Whether some row of the warp has seen no key so far. A row r of the thread counts if 8 r < left: in others there is
// something left over from other items, which must not decide.
__device__ __forceinline__ bool has_no_key(const Rows& rows, int left) {
  return __any_sync(~0u, (rows.maximum[0] == MINUS_INFINITY && left > 0) || (rows.maximum[1] == MINUS_INFINITY && left > 8));
}

// Whether some row of the warp sees keys for the first time.
__device__ __forceinline__ bool meets_first_key(const Rows& rows, const u32 (&mask)[2][kMaskWords], int left) {
  bool meets = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 seen = 0;
#pragma unroll
    for (int w = 0; w < kMaskWords; w++) seen |= mask[r][w];
    meets |= rows.maximum[r] == MINUS_INFINITY && seen && left > 8 * r;
  }
  return __any_sync(~0u, meets);
}

// What a thread's weights of one row may sum to where a maximum is kept, which the final division makes exact. Bfloat16 has
// room for much more, but so must have sums of weights times values.
constexpr float kLargestSum = FLOAT16 ? 0x1p12f : 0x1p40f;

// The same with the maxima as they are, which needs no pass over the scores to find them: exponentials start at once. Returns
// false if that will not do for some row of the warp; then its scores are lost, and its rows are as before.
__device__ __forceinline__ bool softmax_kept(float (&s)[kKeys / 2], Rows& rows, float scale, bool masked, int left) {
  float sum[2];
  bool fits = true;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    // Without a key so far nothing weighs anything if all is hidden (meets_first_key); else all weighs infinitely much.
    const float shift = masked && rows.maximum[r] == MINUS_INFINITY ? -MINUS_INFINITY : rows.maximum[r] * scale;
    sum[r] = weights(s, r, scale, shift);
    fits &= sum[r] <= kLargestSum || left <= 8 * r;  // false for NaN
  }
  if (!__all_sync(~0u, fits)) return false;
  rows.sum[0] += sum[0], rows.sum[1] += sum[1];
  return true;
}
