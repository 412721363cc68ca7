// Online softmax of one key box, in the registers of a warpgroup's accumulator; masks.cuh says what a thread holds.
#pragma once
#include "hopper/masks.cuh"

// A row's weights are exponentials of its scaled scores less a shift: their maximum so far. These two stand for others, and
// make weights of zero: of a row that has met no key, and of one that a box does not have, whose maximum never changes.
#define NO_KEY (-MINUS_INFINITY)
constexpr float kNoRow = 0x1.fffffep127f;

// Shift, sum and last rescaling factor of a thread's two rows.
struct Rows {
  float shift[2], sum[2], rescale[2];
};

// Scores of row r to weights; their sum.
__device__ __forceinline__ float weights(float (&s)[kKeys / 2], int r, float scale, float shift) {
  float sum[2];
#pragma unroll
  for (int g = 0; g < kKeys / 8; g++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float& x = s[4 * g + 2 * r + i];
      x = exp2_fast(fmaf(x, scale, -shift));
      sum[i] = g ? sum[i] + x : x;  // an addition of zero would be one more instruction
    }
  return sum[0] + sum[1];
}

// Turns scores into weights and updates the rows. Returns whether the output so far must be multiplied by `rescale`.
__device__ __forceinline__ bool softmax(float (&s)[kKeys / 2], Rows& rows, float scale) {
  bool raised = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m0 = MINUS_INFINITY, m1 = MINUS_INFINITY;
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) m0 = fmaxf(m0, s[4 * g + 2 * r]), m1 = fmaxf(m1, s[4 * g + 2 * r + 1]);
    m0 = fmaxf(m0, m1);
    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 1));
    m0 = fmaxf(m0, __shfl_xor_sync(~0u, m0, 2));
    const float maximum = m0 * scale;
    const bool first = rows.shift[r] == NO_KEY, raise = maximum > (first ? MINUS_INFINITY : rows.shift[r]);
    rows.rescale[r] = raise && !first ? exp2_fast(rows.shift[r] - maximum) : 1.f;
    if (raise) rows.shift[r] = maximum;
    raised |= raise;
    rows.sum[r] = fmaf(rows.sum[r], rows.rescale[r], weights(s, r, scale, rows.shift[r]));
  }
  return raised;
}

// Whether some row of the warp has met no key so far.
__device__ __forceinline__ bool has_no_key(const Rows& rows) {
  return __any_sync(~0u, rows.shift[0] == NO_KEY || rows.shift[1] == NO_KEY);
}

// Whether some row of the warp meets keys for the first time.
__device__ __forceinline__ bool meets_first_key(const Rows& rows, const u32 (&mask)[2][kMaskWords]) {
  bool meets = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 seen = 0;
#pragma unroll
    for (int w = 0; w < kMaskWords; w++) seen |= mask[r][w];
    meets |= rows.shift[r] == NO_KEY && seen;
  }
  return __any_sync(~0u, meets);
}

// What a thread's weights in one box may sum to where shifts are kept, which the final division makes exact. Bfloat16 has
// room for much more, but so must have sums of weights times values.
constexpr float kLargestSum = FLOAT16 ? 0x1p12f : 0x1p40f;

// The same with the shifts as they are, which needs no pass over the scores to find maxima: exponentials start at once.
// Returns false if that will not do for some row of the warp; then its scores are lost, and its rows are as before.
__device__ __forceinline__ bool softmax_kept(float (&s)[kKeys / 2], Rows& rows, float scale) {
  const float first = weights(s, 0, scale, rows.shift[0]), second = weights(s, 1, scale, rows.shift[1]);
  if (!__all_sync(~0u, first + second <= kLargestSum)) return false;  // as it is not for NaN
  rows.sum[0] += first, rows.sum[1] += second;
  return true;
}
