// What passes whose rows are keys read of the queries that stream by; statistics.cu writes it.
#pragma once
#include "hopper/masks.cuh"

// Where this lane's queries are in a box that streams by: one of 32 rows.
struct InBox {
  u32 at[(kKeys + 31) / 32];
  __device__ __forceinline__ explicit InBox(const int (&box)[3]) {
#pragma unroll
    for (int i = 0; i < (kKeys + 31) / 32; i++) at[i] = coordinates(threadIdx.x % 32 + 32 * i, box);
  }
};

// Log-sum-exp (base 2) and delta of a query in the box; those that do not exist weigh nothing.
__device__ __forceinline__ float2 statistics_of(
    int row, u32 in_box, const Work& W, const BackwardParams& P, const KeyWalk& at, const float2* head, int box_keys) {
  const float2 nothing = make_float2(-MINUS_INFINITY, 0.f);
  if (row >= box_keys) return nothing;
  if (at.is_text()) {
    const int text = at.set - MAP_SETS, i = at.c2 + row;
    return i < W.text[text] ? head[P.text_token[text] + i] : nothing;
  }
  const bool plain = TEXT && W.kind;  // keys of text meet the undivided grid
  const int place[3] = {at.c0 + (int)(in_box & 255), at.c1 + (int)(in_box >> 8 & 255), at.c2 + (int)(in_box >> 16)};
  int token = plain ? P.grid_token : W.token;
  bool exists = true;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    exists &= (u32)place[d] < (u32)P.length[W.lengths][d];
    token += place[d] * (plain ? P.group_stride[d] : P.token_stride[d]);
  }
  return exists ? head[token] : nothing;
}
