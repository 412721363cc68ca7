// Online softmax of one key box, in the registers of a warpgroup's accumulator; masks.cuh says what a thread holds.
#pragma once
#include "hopper/masks.cuh"

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
