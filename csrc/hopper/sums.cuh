// Sums of the queries' gradients in float32, of a fused backward: who adds to them when, and their rounding to 16 bits.
//
// A group is the heads of queries that share a head of keys. Items come group by group; once all that meet a slice of a head's
// rows have added their share, it is rounded, and zeros take its place, to which items of a later group add. So a ring with
// room for a few groups is enough, most of which stays in the L2 cache. Consumers round who have no item left, or never had one:
// while others multiply, which leaves memory idle. All accesses to sums are copies; counters order them.
#pragma once
#include "hopper/products.cuh"

constexpr int kRoundRows = 32, kRoundStages = 6;  // rows of a copy, copies under way for each consumer
constexpr u32 kRoundBytes = kRoundRows * kHeadDim * sizeof(float), kRoundZeros = kConsumers * kRoundStages * kRoundBytes,
              kRoundShared = kRoundZeros + kRoundBytes;

__device__ __forceinline__ int* items_done(const Sums& S, int group) { return S.counters + 1 + group * (S.item_counters + S.slice_counters); }
__device__ __forceinline__ int* slices_rounded(const Sums& S, int group) { return items_done(S, group) + S.item_counters; }

// One of kLanes threads that wait for counters, from the first to the last of a range. Of `total` items or slices, `each`
// share a counter, and are counted `times` times.
template <int kLanes>
__device__ __forceinline__ void await_range(const int* counters, int2 range, int total, int each, int times) {
  for (int i = range.x + threadIdx.x % kLanes; i <= range.y; i += kLanes) wait_for(counters + i, min(total - i * each, each) * times);
  if (kLanes > 1) __syncwarp();
  fence_all();
}

// Before an item: what it adds to must be rounded, of the group that had the place before.
__device__ __forceinline__ void await_place(const BackwardParams& P, int group, int counter) {
  const Sums& S = P.sums;
  if (group >= S.places)
    await_range<1>(slices_rounded(S, group - S.places), S.of_counter[counter], S.slices, S.slices_per_counter, P.queries_per_key_head);
}

// Counts one more, once all stores and additions of this thread are done.
__device__ __forceinline__ void count_up(int* counter) {
  stores_done();
  add_release(counter, 1);
}

// Rounds slices until none is left, in shared memory that nothing else needs any more. kTaken and kFull: where beside it
// numbers of slices are, and barriers of kRoundStages for each consumer: constants, as registers are short before.
//
// A row has 32 columns after the other, in eight pieces of four: pieces 2 q and 2 q + 1 are columns 2 q, 2 q + 1, 2 q + 8 and
// 2 q + 9 of the first and of the second 16 (backward.cu, hand_over). Threads with neighboring q exchange halves.
template <u32 kTaken, u32 kFull>
__device__ __forceinline__ void round_sums(const BackwardParams& P, unsigned char* shared) {
  constexpr int kPieces = kHeadDim / 4, kRowsApart = 128 / kPieces, kMine = kRoundRows / kRowsApart;
  const Sums& S = P.sums;
  const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, piece = thread % kPieces, odd = piece >> 1 & 1;
  const int column = piece / 8 * 32 + piece % 2 * 16 + odd * 8 + piece / 4 % 2 * 4;
  const u32 ring = consumer * kRoundStages * kRoundBytes, base = shared_address(shared), full = base + kFull + 8 * kRoundStages * consumer;
  int* const taken = (int*)(shared + kTaken) + consumer;
  named_barrier(1 + kConsumers, 128 * kConsumers);  // no consumer has an item any more
  for (u32 i = threadIdx.x - 128; i < kRoundBytes / 16; i += 128 * kConsumers)
    ((int4*)(shared + kRoundZeros))[i] = make_int4(0, 0, 0, 0);
  fence_async();
  named_barrier(1 + kConsumers, 128 * kConsumers);

  Stage F{0, 0};
  for (;;) {
    if (thread == 0) *taken = atomicAdd(S.counters, 1);
    named_barrier(1 + consumer, 128);
    const int of_group = *taken % P.queries_per_key_head, slice = *taken / P.queries_per_key_head % S.slices;
    const int group = *taken / P.queries_per_key_head / S.slices;
    if (group >= S.groups) break;
    if (thread < 32) await_range<32>(items_done(S, group), S.of_slice[slice], P.items_per_head, S.items_per_counter, 1);
    const int first = slice * S.slice_rows, rows = min(P.tokens - first, S.slice_rows);
    const int batch = group / P.heads, head = group % P.heads * P.queries_per_key_head + of_group;
    const bool again = group + S.places < S.groups;  // whether another group gets the place
    float4* const sums = S.ring + ((long long)(group % S.places * P.queries_per_key_head + of_group) * P.tokens + first) * kPieces;
    unsigned short* const to = (unsigned short*)S.to + batch * S.strides[0] + head * S.strides[1] + first * S.strides[2] + column;
    auto bytes = [&](int row) { return min(rows - row, kRoundRows) * kHeadDim * (u32)sizeof(float); };
    auto load = [&](int row, int stage) {
      barrier_expect(full + 8 * stage, bytes(row));
      bulk_load(base + ring + stage * kRoundBytes, sums + (long long)row * kPieces, bytes(row), full + 8 * stage);
    };
    // Not unrolled: its six copies made the compiler keep operands of products in other registers, 2 % of all time.
    if (thread == 0)
#pragma unroll 1
      for (int i = 0; i < kRoundStages && i * kRoundRows < rows; i++) load(i * kRoundRows, (F.index + i) % kRoundStages);
#pragma unroll 1
    for (int row = 0; row < rows; row += kRoundRows, F.next(kRoundStages)) {
      barrier_wait(full + 8 * F.index, F.phase);
      const float4* from = (const float4*)(shared + ring + F.index * kRoundBytes);
      float4 x[kMine];
#pragma unroll
      for (int i = 0; i < kMine; i++) x[i] = from[thread + 128 * i];
      named_barrier(1 + consumer, 128);
      if (thread == 0) {
        if (again) bulk_store(sums + (long long)row * kPieces, base + kRoundZeros, bytes(row));
        stores_begin();
        if (row + kRoundStages * kRoundRows < rows) load(row + kRoundStages * kRoundRows, F.index);
      }
#pragma unroll
      for (int i = 0; i < kMine; i++) {
        const int at = row + thread / kPieces + kRowsApart * i;
        const u32 low = pack(x[i].x, x[i].y), high = pack(x[i].z, x[i].w), other = __shfl_xor_sync(~0u, odd ? low : high, 2);
        if (at < rows && column < P.head_dim) __stcs((uint2*)(to + at * S.strides[2]), odd ? make_uint2(other, high) : make_uint2(low, other));
      }
    }
    if (thread == 0) count_up(slices_rounded(S, group) + slice / S.slices_per_counter);
  }
}
