// Masks and online softmax of one key box: a thread owns a row, and holds its kKeys scores in registers.
//
// Bit i % 32 of word i / 32 of a mask is column i.
#pragma once
#include "blackwell/ptx.cuh"

constexpr int kFragments = kKeys / 32, kPacked = FLOAT8 ? 8 : 16;  // and registers of a fragment's weights
#define MINUS_INFINITY (-__int_as_float(0x7f800000))

// The weight of a row's maximum is 2^kLift, which the final division takes back, and the maximum is kept while no score makes
// a weight 2^kSlack times larger. Floats of 8 bits reach from 2^-9 to 448 and have a mantissa of 3 bits: their maximum is never
// kept, so that the largest weight, often most of the sum, is exact.
constexpr float kLift = FLOAT8 ? 8.f : 0.f, kSlack = FLOAT8 ? 0.f : 8.f;

// table[position]: columns whose coordinate in a dimension is below the position; dimension after dimension.
__device__ __forceinline__ void fill_mask_table(u32* table, const int (&keys)[3]) {
  const int all = keys[0] * keys[1] * keys[2];
  for (int i = threadIdx.x; i < (keys[0] + keys[1] + keys[2] + 3) * 4; i += blockDim.x) {
    int position = i / 4, d = 0;
    while (position > keys[d]) position -= keys[d++] + 1;
    const int inner = d == 0 ? keys[1] * keys[2] : d == 1 ? keys[2] : 1;
    u32 bits = 0;
    for (int b = 0; b < 32; b++) {
      const int column = i % 4 * 32 + b;
      if (column < all && column / inner % keys[d] < position) bits |= 1u << b;
    }
    table[i] = bits;
  }
}

// Columns of a box that lie in a row's window: in every dimension those below its end, less those below its start.
__device__ __forceinline__ void window_mask(
    u32 (&mask)[4], const uint4* table, const int2 (&window)[3], const KeyBox& box, const int (&keys)[3]) {
#pragma unroll
  for (int w = 0; w < 4; w++) mask[w] = ~0u;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    const uint4 begin = table[min(max(window[d].x - box.begin[d], 0), keys[d])];
    const uint4 end = table[min(max(window[d].y - box.begin[d], 0), keys[d])];
    mask[0] &= end.x & ~begin.x, mask[1] &= end.y & ~begin.y, mask[2] &= end.z & ~begin.z, mask[3] &= end.w & ~begin.w;
    table += keys[d] + 1;
  }
}

// Whether a row's window holds all of a box.
__device__ __forceinline__ bool window_holds(const int2 (&window)[3], const KeyBox& box, const int (&keys)[3]) {
  bool holds = true;
#pragma unroll
  for (int d = 0; d < 3; d++) holds &= window[d].x <= box.begin[d] && box.begin[d] + keys[d] <= window[d].y;
  return holds;
}

// The first `count` columns.
__device__ __forceinline__ void count_mask(u32 (&mask)[4], int count) {
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int here = min(max(count - 32 * w, 0), 32);
    mask[w] = here == 32 ? ~0u : (1u << here) - 1;
  }
}

__device__ __forceinline__ void apply_mask(u32 (&x)[kFragments][32], const u32 (&mask)[4]) {
#pragma unroll
  for (int f = 0; f < kFragments; f++)
#pragma unroll
    for (int i = 0; i < 32; i++) x[f][i] = mask[f] & 1u << i ? x[f][i] : __float_as_uint(MINUS_INFINITY);
}

// 2^x and 2^y without the unit for exponentials: an integer part, by rounding x down, and a cubic in the rest.
__device__ __forceinline__ void exp2_polynomial(float& x, float& y) {
  const u64 v = pair(fmaxf(x, -127.f), fmaxf(y, -127.f));
  const u64 shifted = add2_down(v, pair(12582912.f, 12582912.f));  // 1.5 * 2^23: the integer is in the lowest bits
  const u64 whole = add2(shifted, pair(-12582912.f, -12582912.f)), rest = fma2(whole, pair(-1.f, -1.f), v);
  u64 p = fma2(rest, pair(0.0770613f, 0.0770613f), pair(0.2276512f, 0.2276512f));
  p = fma2(p, rest, pair(0.6951154f, 0.6951154f));
  p = fma2(p, rest, pair(1.f, 1.f));
  float a, b, n, m;
  unpair(p, a, b), unpair(shifted, n, m);
  x = __int_as_float((__float_as_int(n) << 23) + __float_as_int(a));
  y = __int_as_float((__float_as_int(m) << 23) + __float_as_int(b));
}

// Running maximum (of raw scores) and sum of a thread's row.
struct Row {
  float maximum = MINUS_INFINITY, sum = 0.f;
};

// Updates the maximum, unless it is kept. Returns what the output and the sum so far must be multiplied by.
__device__ __forceinline__ float raise_maximum(const u32 (&x)[kFragments][32], Row& row, float scale) {
  float m[2] = {row.maximum, MINUS_INFINITY};
#pragma unroll
  for (int f = 0; f < kFragments; f++)
#pragma unroll
    for (int i = 0; i < 32; i += 2) m[i / 2 % 2] = fmaxf(m[i / 2 % 2], fmaxf(__uint_as_float(x[f][i]), __uint_as_float(x[f][i + 1])));
  const float top = fmaxf(m[0], m[1]), before = row.maximum;
  if (!((top - before) * scale > kSlack)) return 1.f;
  row.maximum = top;
  return exp2_fast((before - top) * scale);
}

// Turns scores into weights, in place and as floats of 16 or 8 bits in tensor memory. The first and the last 32 columns use
// the unit for exponentials only; of the others, kPolynomial of 8 pairs do not.
__device__ __forceinline__ void weigh(u32 (&x)[kFragments][32], u32 to, const Row& row, float scale) {
  // Without a key so far any maximum will do.
  const float shift = row.maximum == MINUS_INFINITY ? 0.f : FLOAT8 ? kLift - row.maximum * scale : -row.maximum * scale;
  const u64 scales = pair(scale, scale), shifts = pair(shift, shift);
#pragma unroll
  for (int f = 0; f < kFragments; f++) {
    u32 packed[kPacked];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      float a, b;
      unpair(fma2(pair(__uint_as_float(x[f][2 * i]), __uint_as_float(x[f][2 * i + 1])), scales, shifts), a, b);
      if (f > 0 && f < kFragments - 1 && i % 8 < kPolynomial) exp2_polynomial(a, b);
      else a = exp2_fast(a), b = exp2_fast(b);
      x[f][2 * i] = __float_as_uint(a), x[f][2 * i + 1] = __float_as_uint(b);
#if FLOAT8
      if (i % 2) packed[i / 2] = pack(__uint_as_float(x[f][2 * i - 2]), __uint_as_float(x[f][2 * i - 1]), a, b);
#else
      packed[i] = pack(a, b);
#endif
    }
    memory_store(to + kPacked * f, packed);
  }
}

__device__ __forceinline__ void add_weights(const u32 (&x)[kFragments][32], Row& row, float rescale) {
  u64 sums[2] = {0, 0};
#pragma unroll
  for (int f = 0; f < kFragments; f++)
#pragma unroll
    for (int i = 0; i < 32; i += 2)
      sums[i / 2 % 2] = add2(sums[i / 2 % 2], pair(__uint_as_float(x[f][i]), __uint_as_float(x[f][i + 1])));
  float a, b;
  unpair(add2(sums[0], sums[1]), a, b);
  row.sum = fmaf(row.sum, rescale, a + b);
}
