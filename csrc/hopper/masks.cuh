// Masks of one box of columns, in the registers of a warpgroup's accumulator, and what becomes of the accumulator.
//
// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16: s[4 g + 2 r + i] is row r, column 8 g + 2 (lane % 4) + i.
// A mask has one bit for each column of a row that the thread holds, bit 2 g + i.
#pragma once
#include "hopper/ptx.cuh"

#define MINUS_INFINITY (-__int_as_float(0x7f800000))
constexpr int kMaskWords = (kKeys / 4 + 31) / 32;

// Words of the table for key boxes of that shape.
__device__ __forceinline__ int mask_table_words(const int (&keys)[3]) { return (keys[0] + keys[1] + keys[2] + 3) * 4 * kMaskWords; }

// table[position][lane class][word]: columns whose coordinate in a dimension is below the position; dimension after dimension.
__device__ __forceinline__ void fill_mask_table(u32* table, const int (&keys)[3]) {
  const int all = keys[0] * keys[1] * keys[2];
  for (int i = threadIdx.x; i < mask_table_words(keys); i += blockDim.x) {
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

// Columns of a box that lie in a row's window: in every dimension that hides any those below its end, less those below its
// start.
__device__ __forceinline__ void window_mask(
    u32 (&mask)[kMaskWords], const u32* table, const int2 (&window)[3], const KeyBox& box, const int (&keys)[3], int lane_class) {
#pragma unroll
  for (int w = 0; w < kMaskWords; w++) mask[w] = ~0u;
#pragma unroll
  for (int d = 0; d < 3; table += (keys[d] + 1) * 4 * kMaskWords, d++) {
    if (!(box.mask >> d & 1)) continue;
    const int begin = min(max(window[d].x - box.begin[d], 0), keys[d]), end = min(max(window[d].y - box.begin[d], 0), keys[d]);
#pragma unroll
    for (int w = 0; w < kMaskWords; w++)
      mask[w] &= table[(end * 4 + lane_class) * kMaskWords + w] & ~table[(begin * 4 + lane_class) * kMaskWords + w];
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

// ---- Masks as a product, which scores are added to: of what is hidden among the coordinates of a key box (a row's, minus
// 2^127 each) and coordinates of its columns (2^127 each). Hidden scores become minus infinity, others stay as they are. Not in
// float16, which has no 2^127, nor for three consumers, which have no registers to spare.
constexpr bool kMaskProducts = !FLOAT16 && CONSUMERS == 2;

// The column of the product that a place stands for: such that a thread holds places lane class + 8 i in its first four
// elements of a row, and places 4 + lane class + 8 i in its second four.
__device__ __forceinline__ int place_column(int place, int steps) {
  const int low = steps == 1 ? place % 4 : place % 8, i = steps == 1 ? place / 4 : place / 8;
  return low / 4 * 16 + low % 4 * 2 + i % 2 + i / 2 * 8;
}

// The operand in shared memory: columns' coordinates, kPlaces 16-bit floats each, swizzled. Rows that no box fills have the
// last place, which is always hidden.
constexpr int kPlaces = 32, kPlaceBytes = 2 * kPlaces;

__device__ __forceinline__ void fill_places(unsigned char* to, const Places& places, const int (&keys)[3]) {
  for (int n = threadIdx.x; n < kKeys; n += blockDim.x) {
    unsigned char* const row = to + n * kPlaceBytes;
    for (int i = 0; i < kPlaceBytes / 16; i++) ((int4*)row)[i] = make_int4(0, 0, 0, 0);
    auto mark = [&](int place) {
      const int column = place_column(place, places.steps);
      *(unsigned short*)(row + (column / 8 ^ n / 2 % 4) * 16 + column % 8 * 2) = 0x7f00;
    };
    if (n >= keys[0] * keys[1] * keys[2]) mark(16 * places.steps - 1);
    else {
      const u32 at = coordinates(n, keys);
      for (int d = 0; d < 3; d++)
        if (~places.others[d]) mark(places.first[d] + (at >> 8 * d & 255));
    }
  }
}

// The operand in registers, of one row: two registers for each step.
__device__ __forceinline__ void hidden_places(
    u32 (&to)[2][2], const int2 (&window)[3], const KeyBox& box, const Places& places, const int (&keys)[3], int lane_class) {
  u32 seen = places.seen;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    if (!(box.mask >> d & 1)) continue;
    const int first = places.first[d], shift = first - box.begin[d];
    const int begin = max(window[d].x + shift, first), end = min(window[d].y + shift, first + keys[d]);
    seen &= bits(begin, max(end - begin, 0)) | places.others[d];
  }
  if (places.steps == 1) {  // four bits to a byte
    seen = pick_bytes(seen, 0, 0x4140);
    seen = (seen | seen << 4) & 0x0f0f0f0f;
  }
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const u32 hidden = ~seen << (7 - 4 * step - lane_class);  // ours are the sign bits of bytes
    to[step][0] = pick_bytes(hidden, 0, 0x9484), to[step][1] = pick_bytes(hidden, 0, 0xb4a4);
  }
}

// An accumulator of 16 columns is exactly one operand of the next multiplication, once it has 16-bit floats.
__device__ __forceinline__ void to_operand(const float (&s)[kKeys / 2], u32 (&p)[kKeys / 4]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}
