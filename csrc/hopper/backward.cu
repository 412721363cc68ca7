// Attention backward for Hopper (sm_90a). Two passes, deterministic: one for queries' gradients, one for those of keys and
// values. Or a single one.
//
// Compile-time: as in forward.cu, and ROWS_ARE_KEYS, FUSED. QUERY_STAGES are slots of rows, KEY_STAGES of what streams by.
//
// All passes are one kernel. Rows, a box of at most 64 for each consumer, stay; boxes of what they meet stream by:
//   ROWS_ARE_KEYS 0: rows are queries and gradients of their outputs; keys and values stream.     dQ += dS K
//   ROWS_ARE_KEYS 1: rows are keys and values; queries and gradients of their outputs stream.     dV += P^T dO, dK += dS^T Q
//   FUSED 1:         as before, and dS goes to shared memory: both consumers multiply it by all keys, half of the columns
//                    each, and tensor copies add that to sums in global memory, in an order that nobody knows.
// Of each pair, scores come from the first products' (rows1 inner1^T), gradients of weights from the second (rows2 inner2^T):
//   P = 2^(scores * scale - lse),  dS = P (dP - delta),  delta = sum(dO O) over columns, less the gradient of the log-sum-exp.
// P and dS are accumulators that become operands in registers; with FUSED dS is an operand in shared memory of dK, too, not only of
// dQ. Without FUSED results repeat in every bit.
//
// The consumers take turns: while one computes weights, the other one multiplies, its last products of a box and the scores of
// the next. Left alone they drift into doing the same at the same time.
//
// Names of the forward are kept: "queries" are the rows of an item and "keys" what streams by. Items, their boxes and windows
// come from the same tables, built for the inverse windows where rows are keys; see gna_flex/cuda/backward.py.
#define kKeys KEYS
#include "hopper/masks.cuh"
#include "hopper/products.cuh"
#include "hopper/statistics.cuh"
#include "hopper/sums.cuh"

constexpr bool kRowsAreKeys = ROWS_ARE_KEYS, kFused = FUSED;
constexpr int kStages = KEY_STAGES, kRowStages = QUERY_STAGES;
constexpr int kRecords = 2;  // items that are known: the current one and the next
// The next item is taken when so many boxes are left: long enough before its rows are needed, and so late that CTAs with
// neighboring items, which begin one after the other, meet the same boxes at about the same time: those are in the L2 cache.
constexpr int kFewBoxes = 8;
// Registers of a thread. Where rows are keys, a consumer has two accumulators and needs all that there are; see the loop.
constexpr int kConsumerRegisters = kRowsAreKeys ? 240 : 232, kProducerRegisters = kRowsAreKeys ? 24 : 40;
static_assert(kConsumers == 2, "registers are shared out for two consumers");
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168, "a launch of 384 threads has 168 registers for each");
static_assert(kHeadDim <= (kRowsAreKeys ? 128 : 256), "two accumulators of more columns leave no registers");
static_assert(!kFused || (kRowsAreKeys && kKeys == 64 && kHeadDim % 64 == 0), "dS of 64 queries, half of the columns in whole chunks");

constexpr u32 kQueryBytes = kChunks * kQueryChunk, kKeyBytes = kChunks * kKeyChunk;
constexpr u32 kRows1 = 0, kRows2 = kRows1 + kRowStages * kQueryBytes, kRing = kRows2 + kRowStages * kQueryBytes,
              kScoreGrads = kRing + kStages * 2 * kKeyBytes, kScoreGradBytes = kRows * 2 * kKeys,
              kQueryGrads = kScoreGrads + kFused * 3 * kScoreGradBytes, kQueryGradBytes = kKeys * kHeadDim / 2 * sizeof(float),
              kTable = kQueryGrads + kFused * kConsumers * kQueryGradBytes, kWindows = kTable + (kKeys + 5) * 16 * kMaskWords,
              kStatistics = kWindows + kConsumers * kRows * 3 * sizeof(int2),
              kWork = kStatistics + kRowsAreKeys * kStages * kKeys * sizeof(float2), kBoxes = kWork + kRecords * sizeof(Work),
              kBarriers = kBoxes + kStages * sizeof(KeyBox),
              kSumsFull = kBarriers + 8 * (2 * kRecords + 4 * kRowStages + 2 * kStages + 1 + kConsumers + (2 + 2 * kConsumers) * kFused),
              kSharedBytes = kSumsFull + 8 * kRoundStages * kConsumers * kFused;
static_assert(!kFused || kRoundShared <= kTable, "what is rounded at the end lies where rows, boxes and dQ were");
static_assert(kSharedBytes <= 232448, "too much shared memory: fewer stages, or fewer keys");

// Boxes that an item meets: those of one head of queries after the other where rows are keys.
__device__ __forceinline__ int inner_heads(const BackwardParams& P) { return kRowsAreKeys ? P.queries_per_key_head : 1; }

extern "C" __global__ void __launch_bounds__(128 * (kConsumers + 1), 1)
gna_backward(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams P) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = shared_address(shared);
  // Full and empty: x and z are the slots of rows1 and rows2, y those of what streams by, r records.
  const u32 x_full = base + kBarriers, x_empty = x_full + 8 * kRowStages, z_full = x_empty + 8 * kRowStages, z_empty = z_full + 8 * kRowStages;
  const u32 y_full = z_empty + 8 * kRowStages, y_empty = y_full + 8 * kStages, r_full = y_empty + 8 * kStages, r_empty = r_full + 8 * kRecords;
  const u32 few_left = r_empty + 8 * kRecords, turn = few_left + 8;                                    // turn, dq_*: one for each consumer
  const u32 ds_full = turn + 8 * kConsumers, ds_empty = ds_full + 8, dq_full = ds_empty + 8, dq_empty = dq_full + 8 * kConsumers;
  u32* table = (u32*)(shared + kTable);
  Work* work = (Work*)(shared + kWork);
  KeyBox* key_boxes = (KeyBox*)(shared + kBoxes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int box_keys = P.keys[0][0] * P.keys[0][1] * P.keys[0][2];

  if (threadIdx.x == 0) {
    for (int i = 0; i < kRecords; i++) barrier_init(r_full + 8 * i, 1), barrier_init(r_empty + 8 * i, 4 * kConsumers + 1 + kRowsAreKeys + kFused);
    for (int i = 0; i < kRowStages; i++) {
      barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, 4 * kConsumers);
      barrier_init(z_full + 8 * i, 1), barrier_init(z_empty + 8 * i, 4 * kConsumers);
    }
    for (int i = 0; i < kStages; i++) barrier_init(y_full + 8 * i, 1 + kRowsAreKeys), barrier_init(y_empty + 8 * i, 4 * kConsumers);
    barrier_init(few_left, 1);
    for (int i = 0; i < kConsumers; i++) barrier_init(turn + 8 * i, 4);
    if (kFused) {
      barrier_init(ds_full, 4 * kConsumers), barrier_init(ds_empty, 4 * kConsumers);
      for (int i = 0; i < kConsumers; i++) barrier_init(dq_full + 8 * i, 4), barrier_init(dq_empty + 8 * i, 1);
      for (int i = 0; i < kConsumers * kRoundStages; i++) barrier_init(base + kSumsFull + 8 * i, 1);
    }
    barrier_init_done();
  }
  fill_mask_table(table, P.keys[0]);
  if (kFused || box_keys < kKeys) {  // rows that no box ever fills: a weight of zero must not meet a NaN there
    for (u32 i = (kFused ? kRows1 : kRing) / 16 + threadIdx.x; i < kScoreGrads / 16; i += blockDim.x) ((int4*)shared)[i] = make_int4(0, 0, 0, 0);
    fence_async();
  }
  __syncthreads();

  if (warpgroup == 0) {  // ---------------- producers
    give_registers<kProducerRegisters>();
    if (warp == 0 && lane == 0) {  // items and their rows
      Stage R{0, 1}, X{0, 1}, F{0, 0};
      const int rounders = kFused ? P.sums.rounders : 0;  // the first CTAs, as others wait for them
      for (int w = (int)blockIdx.x < rounders ? P.total : blockIdx.x - rounders;; R.next(kRecords), X.next(kRowStages), F.next(1)) {
        barrier_wait(r_empty + 8 * R.index, R.phase);
        Work& W = work[R.index];
        if (w >= P.total) {
          W.boxes = 0;
          barrier_arrive(r_full + 8 * R.index);
          break;
        }
        const Queries queries = describe<kRowsAreKeys>(W, P, w, box_keys);
        const int lengths = W.lengths;
#if FUSED
        W.dq_column = first_column(P.dq, 0, queries.item.group);
        W.dq_counter = (int)(&queries.item - P.items) % P.items_per_head / P.sums.items_per_counter;
        await_place(P, W.head, W.dq_counter);
#endif
        barrier_arrive(r_full + 8 * R.index);

        auto load = [&](u32 rows, u32 full, u32 empty, const TensorMap* map, const Address& at) {
          barrier_wait(empty + 8 * X.index, X.phase);
          load_queries<kConsumers, kRows, kColumns, kChunks, /*kBytes*/ 2, /*kOnce*/ true>(
              base + rows + X.index * kQueryBytes, full + 8 * X.index, map, at, queries, lengths, P);
        };
        load(kRows2, z_full, z_empty, maps.rows2, P.rows2);  // free first: once the item before has its last gradients of weights
        load(kRows1, x_full, x_empty, maps.rows1, P.q);
        barrier_wait(few_left, F.phase);
        w = atomicAdd(P.counters, 1) + gridDim.x - rounders;
      }
      // The last CTA to get here resets the counters for the next launch: nobody fetches items any more.
      if (atomicAdd(P.counters + 1, 1) == gridDim.x - 1) P.counters[0] = P.counters[1] = 0;
    }
    // Every role walks the boxes of an item, those of each head of queries after the other where rows are keys.
    auto walk = [&](auto&& visit) {
      Stage R{0, 0}, Y{0, 1};
      for (;; R.next(kRecords)) {
        barrier_wait(r_full + 8 * R.index, R.phase);
        const Work& W = work[R.index];
        const int boxes = W.boxes;
        if (boxes == 0) break;
#pragma unroll 1
        for (int h = 0; h < inner_heads(P); h++) {
          KeyWalk at(W);
#pragma unroll 1
          for (int j = 0; j < boxes; j++, Y.next(kStages)) {
            if (j > 0) at.advance(W, P.keys, box_keys);
            visit(W, at, h, Y);
          }
        }
        if (lane == 0) barrier_arrive(r_empty + 8 * R.index);
      }
    };
    if (warp == 1 && lane == 0) {  // boxes that stream by
      int left = 0;
      walk([&](const Work& W, const KeyWalk& at, int h, const Stage& Y) {
        const int boxes = W.boxes * inner_heads(P);
        if (left == 0) left = boxes;
        if (left-- == min(boxes, kFewBoxes)) barrier_arrive(few_left);
        barrier_wait(y_empty + 8 * Y.index, Y.phase);
        const u32 full = y_full + 8 * Y.index, slot = base + kRing + Y.index * 2 * kKeyBytes;
        key_boxes[Y.index] = at.box(W, box_keys, kKeys);
        barrier_expect(full, 2 * box_keys * kRowBytes * kChunks);
        const int k_column = (at.is_text() ? W.key_head * P.k.head_column : W.k_column) + h * P.k.head_column;
        const int v_column = (at.is_text() ? W.key_head * P.v.head_column : W.v_column) + h * P.v.head_column;
        load_box(slot, &maps.inner1[at.set], full, k_column, at.c2, at.c1, at.c0, W.k_place + h * P.k.head_place);
        load_box(slot + kKeyBytes, &maps.inner2[at.set], full, v_column, at.c2, at.c1, at.c0, W.v_place + h * P.v.head_place);
      });
    }
    if (kRowsAreKeys && warp == 2) {  // statistics of the queries in these boxes
      const InBox in_box(P.keys[0]);
      walk([&](const Work& W, const KeyWalk& at, int h, const Stage& Y) {
        const float2* head = P.statistics + (long long)(W.head * P.queries_per_key_head + h) * P.tokens;
        float2 found[(kKeys + 31) / 32];
#pragma unroll
        for (int i = 0; i < (kKeys + 31) / 32; i++) found[i] = statistics_of(lane + 32 * i, in_box.at[i], W, P, at, head, box_keys);
        barrier_wait(y_empty + 8 * Y.index, Y.phase);  // only now, which hides the latency of loads
        float* to = (float*)(shared + kStatistics) + Y.index * 2 * kKeys;
#pragma unroll
        for (int i = 0; i < (kKeys + 31) / 32; i++)
          if (lane + 32 * i < kKeys) to[lane + 32 * i] = found[i].x, to[kKeys + lane + 32 * i] = found[i].y;
        __syncwarp();
        if (lane == 0) barrier_arrive(y_full + 8 * Y.index);
      });
    }
#if FUSED
    if (warp == 3 && lane == 0) {  // sums of queries' gradients
      u32 phase = 0;
      int left = 0, place = 0;
      walk([&](const Work& W, const KeyWalk& at, int h, const Stage&) {
        if (left == 0) {
          left = W.boxes * inner_heads(P);
          place = W.head % P.sums.places * P.queries_per_key_head;
        }
        const int column = at.is_text() ? 0 : W.dq_column;
        for (int half = kConsumers - 1; half >= 0; half--) {  // consumer 0 comes later
          barrier_wait(dq_full + 8 * half, phase);
          for (int i = half * kHeadDim / 64; i < (half + 1) * kHeadDim / 64; i++)
            tensor_add(&maps.dq[at.set], base + kQueryGrads + i * kKeys * 128, column + 32 * i, at.c2, at.c1, at.c0,
                       (place + h) * P.dq.head_place);
          stores_begin(), stores_read();
          barrier_arrive(dq_empty + 8 * half);
        }
        phase ^= 1;
        if (--left == 0) count_up(items_done(P.sums, W.head) + W.dq_counter);
      });
    }
#endif
    return;
  }

  // ---------------- consumers
  take_registers<kConsumerRegisters>();
  const int consumer = warpgroup - 1, lane_class = lane % 4;
  const u32 leads = consumer == 0;
  // Where a lane's rows of dS and dQ are in shared memory, kept: the compiler would work them out in every box.
  u32 in_ds = (warp * 16 + lane % 16) * 128 + (lane / 16 ^ lane & 7) * 16, in_dq = (warp * 16 + lane / 4) * 128 + (2 * lane_class ^ lane / 4) * 16;
  if (kFused) asm volatile("" : "+r"(in_ds), "+r"(in_dq));
  Stage X{0, 0}, Y{0, 0}, R{0, 0}, D{0, 0};
  float first[kHeadDim / 2];                        // dQ or dK
  float second[kHeadDim / 2];                       // dV, where rows are keys
  u32 p[kKeys / 4];        // weights as an operand, where rows are keys
  float lse[2], delta[2];  // of this thread's rows, where they are queries
  u32 counts[2];           // bits of masks, of this thread's rows: none for keys that do not exist or count, if FUSED
  bool some_ignored = false;  // whether there are such keys among the warp's
  // The window of row r of this thread in dimension d. In shared memory, as registers are short; only its warp meets it.
  auto window = [&](int r, int d) -> int2& { return ((int2*)(shared + kWindows))[(consumer * kRows + warp * 16 + lane / 4 + 8 * r) * 3 + d]; };

  auto release = [&](u32 bar) {
    if (lane == 0) barrier_arrive(bar);
  };
  auto row_of = [&](int r) { return warp * 16 + lane / 4 + 8 * r; };
  auto is_text = [](const Work& W) { return TEXT && W.kind; };
  // Position of a thread's row r in dimension d.
  auto position = [&](const Work& W, int r, int d) {
    const int i = row_of(r);
    if (is_text(W)) return d == 2 ? W.query[2] + consumer * kRows + i : 0;
    const int in_box = d == 0 ? i / (P.box[2] * P.box[1]) : d == 1 ? i / P.box[2] % P.box[1] : i % P.box[2];
    return W.query[d] + consumer * P.beside[d] + in_box;
  };
  // The token of a thread's row r, or -1 if there is none.
  auto token_of = [&](const Work& W, int r) {
    int token = W.token;
    if (is_text(W)) return position(W, r, 2) < P.text_tokens[W.kind - 1] ? token + position(W, r, 2) : -1;
    bool exists = row_of(r) < P.box[0] * P.box[1] * P.box[2];
#pragma unroll
    for (int d = 0; d < 3; d++) {
      const int at = position(W, r, d);
      exists &= at < P.length[W.lengths][d];
      token += at * P.token_stride[d];
    }
    return exists ? token : -1;
  };
  // Whether a thread's row r is a key of text that does not count.
  auto ignored = [&](const Work& W, int r) {
    return TEXT && kRowsAreKeys && is_text(W) && P.text_valid && position(W, r, 2) >= P.text_valid[2 * W.batch + W.kind - 1];
  };
  auto own_rows = [&](u32 first_row) { return base + first_row + X.index * kQueryBytes + consumer * kRows * kRowBytes; };

  // Begins an item: no gradients yet, windows and statistics of this thread's rows.
  auto begin = [&](const Work& W) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i++) first[i] = second[i] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!kRowsAreKeys) {
        const int token = token_of(W, r);
        const float2 known = token < 0 ? make_float2(-MINUS_INFINITY, 0.f) : P.statistics[(long long)W.head * P.tokens + token];
        lse[r] = known.x, delta[r] = known.y;
      }
      if (kFused) counts[r] = token_of(W, r) < 0 || ignored(W, r) ? 0 : ~0u;
      if (W.masked && lane_class < 3) {
        const int d = lane_class, length = P.length[W.lengths][d], at = min(position(W, r, d), length - 1);
        window(r, d) = is_text(W) ? make_int2(0, length) : P.windows[W.windows + P.window_row[W.lengths][d] + at];
      }
    }
    if (kFused) some_ignored = __any_sync(~0u, ~(counts[0] & counts[1]));
    __syncwarp();
  };
  // Scores to weights. The mask comes before exponentials, in a branch: instructions that a predicate turns off are issued all
  // the same, and a branch after them would make them wait.
  auto weigh = [&](float (&s)[kKeys / 2], const KeyBox& box, const float* statistics) {
    // Queries of text that do not exist weigh nothing anyway.
    const bool masked = box.mask != kNoMask && !(kRowsAreKeys && box.mask == kCountMask);
    if (masked || some_ignored) {
      u32 mask[2][kMaskWords];
#pragma unroll
      for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int w = 0; w < kMaskWords; w++) mask[r][w] = ~0u;
        const int2 windows[3] = {window(r, 0), window(r, 1), window(r, 2)};
        if (TEXT && !kRowsAreKeys && box.mask == kCountMask) count_mask(mask[r], box.begin[0], lane_class);
        else if (masked) window_mask(mask[r], table, windows, box, P.keys[0], lane_class);
        if (kFused)
#pragma unroll
          for (int w = 0; w < kMaskWords; w++) mask[r][w] &= counts[r];
      }
      hide(s, mask);
    }
    auto weight = [&](float score, float of_query) { return exp2_fast(fmaf(score, P.scale_log2, -of_query)); };
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) {
      const float2 column = kRowsAreKeys ? *(const float2*)(statistics + 8 * g + 2 * lane_class) : make_float2(0.f, 0.f);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float &x = s[4 * g + 2 * r], &y = s[4 * g + 2 * r + 1];
        x = weight(x, kRowsAreKeys ? column.x : lse[r]);
        y = weight(y, kRowsAreKeys ? column.y : lse[r]);
      }
    }
  };
  // Weights and their gradients to gradients of scores.
  auto differentiate = [&](float (&s)[kKeys / 2], const float (&d)[kKeys / 2], const float* statistics) {
#pragma unroll
    for (int g = 0; g < kKeys / 8; g++) {
      const float2 column = kRowsAreKeys ? *(const float2*)(statistics + kKeys + 8 * g + 2 * lane_class) : make_float2(0.f, 0.f);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        s[4 * g + 2 * r] *= fmaf(d[4 * g + 2 * r], P.scale, -(kRowsAreKeys ? column.x : delta[r]));
        s[4 * g + 2 * r + 1] *= fmaf(d[4 * g + 2 * r + 1], P.scale, -(kRowsAreKeys ? column.y : delta[r]));
      }
    }
  };
  // Writes gradients of this thread's rows. Keys of text that do not count have none.
  auto write = [&](const Work& W, const float (&x)[kHeadDim / 2], void* results) {
    const long long head = W.batch * P.result_strides[0] + (W.head - W.batch * P.heads) * P.result_strides[1];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = token_of(W, r);
      const u32 kept = ignored(W, r) ? 0 : ~0u;
      unsigned short* const to = (unsigned short*)results + head + token * P.result_strides[2] + 8 * lane_class;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i += 16) {  // 32 columns of a row, of which four threads have two of each 8
        const float* v = x + i + 2 * r;
        u32 words[4];
#pragma unroll
        for (int g = 0; g < 4; g++) words[g] = pack(v[4 * g], v[4 * g + 1]) & kept;
        transpose(words, lane_class);
        if (token >= 0 && 2 * i + 8 * lane_class < P.head_dim) store_global(to + 2 * i, words);
      }
    }
  };
#if FUSED
  // Consumer 0 leads by half a step, and multiplies dS of the box before when consumer 1 multiplies that of this one. Its own
  // dS has two slots, those of even and of odd boxes.
  auto score_grads = [&](u32 odd) { return base + kScoreGrads + (1 + odd) * kScoreGradBytes; };
  // dS to shared memory, for both consumers: 64 queries side by side in a key's row.
  auto share = [&](const u32 (&ds)[kKeys / 4]) {
    const u32 to = (leads ? score_grads(D.phase) : base + kScoreGrads) + in_ds;
#pragma unroll
    for (int g = 0; g < kKeys / 16; g++) store_matrices(to ^ 32 * g, ds[4 * g], ds[4 * g + 1], ds[4 * g + 2], ds[4 * g + 3]);
    fence_async();
    named_barrier(1 + consumer, 128);  // products of dK read what all warps of the consumer wrote
    release(ds_full);
  };
  // This consumer's columns of dQ: dS K over all keys.
  auto multiply_shared = [&](float (&dq)[kHeadDim / 4], u32 ds0, u32 ds1) {
    const u32 keys = base + kRows1 + X.index * kQueryBytes, column = consumer * kHeadDim / 2;
    const u32 from = keys + column / kColumns * kQueryChunk + column % kColumns * 2;
#pragma unroll
    for (int i = 0; i < kConsumers * kRows / 16; i++) {
      const u32 ds = (i < kRows / 16 ? ds0 : ds1) + i % (kRows / 16) * 16 * 128;
      mma_dq(dq, operand<128>(ds, 16, 8 * 128), operand(from + i * 16 * kRowBytes, 16, 8 * kRowBytes), i != 0);
    }
  };
  // dS^T Q over the queries of a box. With an operand in registers the consumer would wait here for all products before.
  auto multiply_own = [&](float (&dk)[kHeadDim / 2], u32 queries) {
    const Parts ds{leads ? score_grads(D.phase) : base + kScoreGrads, 16, 8 * 128}, columns{queries, kKeyChunk, 8 * kRowBytes};
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++) mma_dk(dk, ds.at(32 * i), columns.at(i * 16 * kRowBytes), 1);
  };
  // dQ to shared memory for the tensor copies, 32 columns in a row, 128-byte swizzle. Of these, pieces 2 q and 2 q + 1 are
  // what thread q of four holds, so that no bank is met twice; sums.cuh puts columns in order.
  auto hand_over = [&](const float (&dq)[kHeadDim / 4], u32 odd) {
    const u32 to = base + kQueryGrads + consumer * kQueryGradBytes + in_dq;
    barrier_wait(dq_empty + 8 * consumer, odd ^ 1);
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float* x = dq + 8 * i + 2 * r;
        store_four((to ^ i % 2 * 16) + i / 2 * kKeys * 128 + r * 8 * 128, x[0], x[1], x[4], x[5]);
      }
    fence_async();
    __syncwarp();
    release(dq_full + 8 * consumer);
  };
#endif
  for (;; X.next(kRowStages), R.next(kRecords)) {
    barrier_wait(r_full + 8 * R.index, R.phase);
    const Work& W = work[R.index];
    const int boxes = W.boxes * inner_heads(P);
    if (boxes == 0) break;
    begin(W);
    barrier_wait(x_full + 8 * X.index, X.phase);
    barrier_wait(z_full + 8 * X.index, X.phase);
    const u32 rows1 = own_rows(kRows1), rows2 = own_rows(kRows2);
    u32 used = 0;  // the slot of the last box, to be given back once its last product is done
#pragma unroll 1
    for (int j = 0; j < boxes; j++, Y.next(kStages), D.next(1)) {
      float s[kKeys / 2], d[kKeys / 2];
      u32 ds[kKeys / 4];
      const u32 slot = base + kRing + Y.index * 2 * kKeyBytes;
      const float* statistics = (const float*)(shared + kStatistics) + Y.index * 2 * kKeys;
      barrier_wait(y_full + 8 * Y.index, Y.phase);
      const KeyBox box = key_boxes[Y.index];
      keep(s), keep(d), mma_fence();
      scores(s, rows1, slot);
      mma_commit();
      scores(d, rows2, slot + kKeyBytes);
      mma_commit();
      if (j > 0) release(turn + 8 * leads);
      mma_wait<1>(), keep(s), keep(first);
      if (j > 0) release(used);
      used = y_empty + 8 * Y.index;
      weigh(s, box, statistics);
      mma_wait<0>(), keep(d);
      if (kRowsAreKeys) to_operand(s, p);
      if (j == boxes - 1) release(z_empty + 8 * X.index);
      differentiate(s, d, statistics);
      to_operand(s, ds);
      // No product is in flight while operands are packed: else the compiler would need further registers, and serialise all.
      const u32 odd = D.phase ^ leads;  // of the box whose dQ comes now, if FUSED
#if FUSED
      float dq[kHeadDim / 4];
      barrier_wait(leads ? ds_full : ds_empty, D.phase ^ 1);
      share(ds);
      keep(dq);
#endif
      barrier_wait(turn + 8 * consumer, odd);
      mma_fence();
      if (kRowsAreKeys) {
        add_values(second, p, slot + kKeyBytes);
        mma_commit();
      }
#if FUSED
      if (!leads) barrier_wait(ds_full, odd);
      // Of the box before the first one there is nothing: any product that nobody reads, as a branch costs registers.
      multiply_shared(dq, j < leads ? rows1 : score_grads(odd), j < leads ? rows1 : base + kScoreGrads);
      mma_commit();
      multiply_own(first, slot);
#else
      add_values(first, ds, slot);
#endif
      mma_commit();
      if (kRowsAreKeys) mma_wait<1>(), keep(second);
#if FUSED
      keep(dq);
      if (j >= leads) {
        release(ds_empty);
        hand_over(dq, odd);
      }
#endif
    }
    release(turn + 8 * leads);
    if (kFused && !leads) release(x_empty + 8 * X.index);
    if (kRowsAreKeys) write(W, second, P.results[1]);
#if FUSED
    if (leads) {
      float dq[kHeadDim / 4];
      const u32 odd = D.phase ^ 1;
      barrier_wait(ds_full, odd);
      keep(dq), mma_fence();
      multiply_shared(dq, score_grads(odd), base + kScoreGrads);
      mma_commit();
      mma_wait<0>(), keep(dq);
      release(ds_empty);
      release(x_empty + 8 * X.index);
      hand_over(dq, odd);
    }
#endif
    mma_wait<0>(), keep(first);
    release(used);
    if (!kFused) release(x_empty + 8 * X.index);
    write(W, first, P.results[0]);
    __syncwarp();
    release(r_empty + 8 * R.index);
  }
#if FUSED
  barrier_wait(dq_empty + 8 * consumer, D.phase ^ 1);  // the last dQ has left, too
  round_sums<kTable, kSumsFull>(P, shared);
#endif
}
