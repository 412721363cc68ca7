// Attention forward for Hopper (sm_90a): boxes of queries against boxes of keys, straight from the tokens' own order.
//
// Compile-time: HEAD_DIM (columns, a multiple of 32), KEYS (rows of a key slot), QUERY_STAGES, KEY_STAGES, CONSUMERS
// (warpgroups of 64 queries), HOLDS_QUERIES (in registers), FLOAT16 (else bfloat16), DILATED, MAP_SETS (of dilation group
// lengths), KEY_SHAPES (of key boxes), SKIPS, TEXT (whether there may be text), BOUNDED_WAITS (debug).
// "generated.cuh" has the matrix multiplications for these sizes: mma_qk(s, q, k, accumulate), or mma_held(s, q..., k,
// accumulate) for queries in registers, and mma_pv(o, p..., v, accumulate).
//
// One CTA is a producer warpgroup, of which two threads work, and the consumer warpgroups. Each consumer owns a box of at
// most 64 queries; all share the key boxes, which may start anywhere. The first producer fetches items from a counter, one
// ahead, and loads their queries. The second walks the key boxes of an item and sends each with its coordinates and the
// kind of mask that it needs, so consumers know nothing of windows but [lo, hi) of their rows.
//
// Weights are exponentials of scores less a maximum, which is found in an item's first box, amid the others, and kept. A pass
// over the scores of every box to find its maximum took 5 to 11 % of the time, as exponentials had to wait for it. Should a
// weight become too large after all, its warp computes scores once more and raises the maximum.
//
// Where it can be, a mask is added to scores by the tensor cores (masks.cuh). Bit by bit keys are hidden in first boxes of items,
// where a row has met no key, in boxes with long sides, of text, and in scores that are computed once more: a NaN ends up there.
//
// With SKIPS each consumer leaves out key boxes at both ends of the walk that none of its queries sees, and gives them back
// unread. Then the walk begins at the first box, so that what a consumer does not skip is in one piece.
//
// With HOLDS_QUERIES products of scores read a third less from shared memory. The next item's queries are taken from their
// slot while the last values are multiplied, and then the output of this item enters it.
//
// Tried and left out: key boxes that one warpgroup of two skips (6 % fewer boxes, no gain but for one shape), clusters of two
// CTAs that share key boxes by multicast (README.md: less energy, but more stalls), turns of the consumers as in
// backward.cu (no gain), scores of the next item beside the last values of this one (in one loop over the boxes of all items, or
// between two items: fewer idle cycles, but 2 to 4 % slower), exponentials as polynomials (4 to 10 % slower), windows in shared
// memory (0 to 1 % slower). The GPU runs at its power limit: cycles saved while the tensor cores wait lower the clock, so count
// bytes and instructions rather than bubbles.
#define kKeys KEYS
#include "hopper/softmax.cuh"
#include "hopper/products.cuh"

constexpr int kQueryStages = QUERY_STAGES, kKeyStages = KEY_STAGES;
constexpr bool kHolds = HOLDS_QUERIES;
constexpr int kRecords = 2;  // items that are known: the current one and the next
// Registers of a thread: 512 for the same thread of four warpgroups, 504 of three. The producer may spill, consumers hardly;
// 232 beat 224 by 1 to 2 % at head dim 128 and lost 5 % at 64.
constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kHeadDim >= 128 ? 232 : 224;
constexpr int kProducerRegisters = kConsumers == 3 ? 32 : kHeadDim >= 128 ? 40 : 56;

// Shared memory: columns of one chunk lie side by side (kRowBytes a row, swizzled), chunk after chunk.
constexpr u32 kQueryBytes = kChunks * kQueryChunk, kKeyBytes = kChunks * kKeyChunk;
constexpr u32 kQueries = 0, kKeysAt = kQueries + kQueryStages * kQueryBytes, kValues = kKeysAt + kKeyStages * kKeyBytes,
              kPlacesAt = kValues + kKeyStages * kKeyBytes, kTable = kPlacesAt + kMaskProducts * kKeys * kPlaceBytes,
              kInBox = kTable + (kKeys + 5) * 16 * kMaskWords, kWork = kInBox + kRows * sizeof(u32),
              kBoxes = kWork + kRecords * sizeof(Work), kBarriers = kBoxes + kKeyStages * sizeof(KeyBox),
              kSharedBytes = kBarriers + 8 * (2 * kRecords + 2 * kQueryStages + 4 * kKeyStages);
static_assert(kSharedBytes <= 232448, "too much shared memory: fewer stages, or fewer keys");
static_assert(!SKIPS || (kConsumers == 3 && KEY_SHAPES == 1), "three consumers skip key boxes, of one shape");

extern "C" __global__ void __launch_bounds__(128 * (kConsumers + 1), 1)
gna_forward(const __grid_constant__ Maps maps, const __grid_constant__ Params P) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = shared_address(shared);
  const u32 q_full = base + kBarriers, q_empty = q_full + 8 * kQueryStages, k_full = q_empty + 8 * kQueryStages,
            k_empty = k_full + 8 * kKeyStages, v_full = k_empty + 8 * kKeyStages, v_empty = v_full + 8 * kKeyStages, r_full = v_empty + 8 * kKeyStages,
            r_empty = r_full + 8 * kRecords;
  u32* table = (u32*)(shared + kTable);
  u32* in_box = (u32*)(shared + kInBox);  // coordinates of a box's rows
  Work* work = (Work*)(shared + kWork);
  KeyBox* key_boxes = (KeyBox*)(shared + kBoxes);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  auto table_of = [&](int shape) { return table + (shape ? mask_table_words(P.keys[0]) : 0); };
  const int box_keys = P.keys[0][0] * P.keys[0][1] * P.keys[0][2];
  auto box_rows = [&] { return P.box[0] * P.box[1] * P.box[2]; };  // worked out anew, as registers are short

  if (threadIdx.x == 0) {
    for (int i = 0; i < kRecords; i++) barrier_init(r_full + 8 * i, 1), barrier_init(r_empty + 8 * i, kConsumers + 1);
    for (int i = 0; i < kQueryStages; i++) barrier_init(q_full + 8 * i, 1), barrier_init(q_empty + 8 * i, kConsumers);
    for (int i = 0; i < kKeyStages; i++) {
      barrier_init(k_full + 8 * i, 1), barrier_init(k_empty + 8 * i, 4 * kConsumers);
      barrier_init(v_full + 8 * i, 1), barrier_init(v_empty + 8 * i, 4 * kConsumers);
    }
    barrier_init_done();
  }
  for (int shape = 0; shape < KEY_SHAPES; shape++) fill_mask_table(table_of(shape), P.keys[shape]);
  if (kMaskProducts && P.places.steps) fill_places(shared + kPlacesAt, P.places, P.keys[0]);
  if (threadIdx.x < kRows) in_box[threadIdx.x] = coordinates(threadIdx.x, P.box);
  // Rows that no box ever fills: a weight of zero must not meet a NaN there, nor a row that nobody needs have scores of NaN.
  const u32 zeros = box_rows() < kRows ? kQueries : kKeysAt, zeros_end = box_keys < kKeys ? kPlacesAt : kKeysAt;
  for (u32 i = zeros / 16 + threadIdx.x; i < zeros_end / 16; i += blockDim.x) ((int4*)shared)[i] = make_int4(0, 0, 0, 0);
  fence_async();
  __syncthreads();

  if (warpgroup == 0) {  // ---------------- producers
    give_registers<kProducerRegisters>();
    if (lane != 0) return;
    if (warp == 0) {  // items and queries
      Stage R{0, 1}, Q{0, 1};
      for (int w = blockIdx.x, next;; w = next, R.next(kRecords), Q.next(kQueryStages)) {
        next = atomicAdd(P.counters, 1) + gridDim.x;  // used only after this item's loads, which hides its latency
        barrier_wait(r_empty + 8 * R.index, R.phase);
        Work& W = work[R.index];
        if (w >= P.total) {
          W.boxes = 0;
          barrier_arrive(r_full + 8 * R.index);
          if (kHolds) {  // the last output enters the slot of queries that do not come
            barrier_wait(q_empty + 8 * Q.index, Q.phase);
            barrier_arrive(q_full + 8 * Q.index);
          }
          break;
        }
        const Queries queries = describe<false, !SKIPS>(W, P, w, box_keys);
        barrier_arrive(r_full + 8 * R.index);

        barrier_wait(q_empty + 8 * Q.index, Q.phase);
        load_queries<kConsumers, kRows, kColumns, kChunks>(base + kQueries + Q.index * kQueryBytes, q_full + 8 * Q.index, maps.q, P.q, queries, W.lengths, P);
      }
      // The last CTA to get here resets the counters for the next launch: nobody fetches items any more.
      if (atomicAdd(P.counters + 1, 1) == gridDim.x - 1) P.counters[0] = P.counters[1] = 0;
    }
    if (warp == 1) {  // keys and values
      Stage R{0, 0}, K{0, 1}, V{0, 1};
      const u32 key_bytes = box_keys * kRowBytes * kChunks;
      const TensorMap *rest_k = maps.k, *rest_v = maps.v;
#if KEY_SHAPES > 1
      rest_k = maps.rest_k, rest_v = maps.rest_v;
#endif
      for (;; R.next(kRecords)) {
        barrier_wait(r_full + 8 * R.index, R.phase);
        const Work& W = work[R.index];
        const int boxes = W.boxes;
        if (boxes == 0) break;
        KeyWalk at(W);
        auto load_keys = [&] {
          KeyBox box = at.box(W, box_keys, kKeys);  // all that can be done before the slot is free
          if (kMaskProducts && P.places.steps && box.mask != kNoMask && box.mask != kCountMask && !at.shape) box.mask |= kProductMask;
          const int column = at.is_text() ? W.key_head * P.k.head_column : W.k_column;
          barrier_wait(k_empty + 8 * K.index, K.phase);
          key_boxes[K.index] = box;
          barrier_expect(k_full + 8 * K.index, key_bytes);
          load_box(base + kKeysAt + K.index * kKeyBytes, at.map(maps.k, rest_k), k_full + 8 * K.index, column, at.c2, at.c1, at.c0, W.k_place);
          K.next(kKeyStages);
        };
        // Each box's values follow the next box's keys.
#pragma unroll 1
        for (int j = 0; j <= boxes; j++) {
          const KeyWalk last = at;
          if (j > 0 && j < boxes) at.advance(W, P.keys, box_keys);
          if (j < boxes) load_keys();
          if (j == 0) continue;
          const int column = last.is_text() ? W.key_head * P.v.head_column : W.v_column;
          barrier_wait(v_empty + 8 * V.index, V.phase);
          barrier_expect(v_full + 8 * V.index, key_bytes);
          load_box(base + kValues + V.index * kKeyBytes, last.map(maps.v, rest_v), v_full + 8 * V.index, column, last.c2, last.c1, last.c0, W.v_place);
          V.next(kKeyStages);
        }
        barrier_arrive(r_empty + 8 * R.index);
      }
    }
    return;
  }

  // ---------------- consumers
  take_registers<kConsumerRegisters>();
  const int consumer = warpgroup - 1, lane_class = lane % 4;
  Stage K{0, 0}, V{0, 0}, Q{0, 0}, R{0, 0};
  float o[kHeadDim / 2] = {};
  u32 p[kKeys / 4];
  Rows rows;
  Work W = {};
  int box_mask;  // of the current key box; where it begins is read only where there is a mask, as registers are short
  u32 mask[2][kMaskWords];
  int2 window[2][3];

  auto release = [&](u32 bar) {
    if (lane == 0) barrier_arrive(bar);
  };
  auto row_of = [&](int r) { return warp * 16 + lane / 4 + 8 * r; };
  auto is_text = [&] { return TEXT && work[R.index].kind; };
  // Position of a thread's row r in dimension d.
  auto position = [&](int r, int d) {
    if (is_text()) return d == 2 ? W.query[2] + consumer * kRows + row_of(r) : 0;
    return W.query[d] + consumer * P.beside[d] + (int)(in_box[row_of(r)] >> 8 * d & 255);
  };
  // The query slot that the last output leaves from, to be given back once it has left: while the next scores are computed.
  u32 owed = 0;
  auto give_back = [&] {
    if (owed) {
      stores_read();
      barrier_arrive(owed);
      owed = 0;
    }
  };
  auto query_rows = [&] { return base + kQueries + Q.index * kQueryBytes + consumer * kRows * kRowBytes; };
  // Where 8 columns of a row are: piece `piece` of the row in a chunk of columns.
  auto matrix_row = [](u32 chunk, int row, int piece) {
    return chunk + row * kRowBytes + (kColumns == 64 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3)) * 16;
  };
  // Where this lane's row of 8 of the columns [16 i, 16 i + 16) is, as queries and outputs move between slot and registers.
  auto query_row = [&](u32 q_rows, int i) {
    return matrix_row(q_rows + i / (kColumns / 16) * kQueryChunk, warp * 16 + lane % 16, i % (kColumns / 16) * 2 + lane / 16);
  };
  u32 held[kHeadDim / 4];  // queries as an operand, with HOLDS_QUERIES
  auto take_queries = [&] {
    barrier_wait(q_full + 8 * Q.index, Q.phase);
    if (kHolds)
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; i++)
        load_matrices(query_row(query_rows(), i), held + 4 * i);
  };

  // Begins an item: no keys yet, and the windows of this thread's rows.
  auto begin = [&] {
#pragma unroll
    for (int r = 0; r < 2; r++) rows.sum[r] = 0.f, rows.shift[r] = row_of(r) < (is_text() ? kRows : box_rows()) ? NO_KEY : kNoRow;
    if (!W.masked) return;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int d = 0; d < 3; d++) {
        const int length = P.length[W.lengths][d];
        window[r][d] = is_text() ? make_int2(0, length)
                                  : P.windows[W.windows + P.window_row[W.lengths][d] + min(position(r, d), length - 1)];
      }
  };
  // Issues the scores of the next key box.
  auto issue_scores = [&](float (&s)[kKeys / 2], u32 q_rows) {
    barrier_wait(k_full + 8 * K.index, K.phase);
    keep(s), mma_fence();
    const u32 keys = base + kKeysAt + K.index * kKeyBytes;
    if (kHolds) scores(s, held, keys);
    else scores(s, q_rows, keys);
    mma_commit();
    box_mask = key_boxes[K.index].mask;  // only now: its latency is hidden
  };
  // Issues the mask of that box as a product.
  auto issue_mask = [&](float (&s)[kKeys / 2], u32 (&hidden)[2][2][2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) hidden_places(hidden[r], window[r], key_boxes[K.index], P.places, P.keys[0], lane_class);
    mma_fence();
    add_mask(s, hidden, base + kPlacesAt, P.places.steps);
  };
  // Issues the last weights times the next values; the first ones of an item begin its output.
  auto issue_values = [&](bool first) {
    barrier_wait(v_full + 8 * V.index, V.phase);
    keep(o), mma_fence();
    add_values(o, p, base + kValues + V.index * kKeyBytes, !first);
    mma_commit();
  };
  // Scores of the current key box once more, by this warp alone: 8 keys at a time enter the registers from behind. Unrolled,
  // this was no faster but for scores beyond reason, and spilled.
  auto scores_again = [&](float (&s)[kKeys / 2], u32 q_rows) {
    const u32 keys = base + kKeysAt + K.index * kKeyBytes;
#pragma unroll 1
    for (int g = 0; g < kKeys / 8; g++) {
      float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; i += 2) {
        u32 loaded[8], k[4];  // 16 queries and 8 keys, 32 columns of both
        if (!kHolds) load_matrices(query_row(q_rows, i), loaded), load_matrices(query_row(q_rows, i + 1), loaded + 4);
        const u32* q = kHolds ? held + 4 * i : loaded;
        load_matrices(matrix_row(keys + i / (kColumns / 16) * kKeyChunk, 8 * g + lane % 8, i % (kColumns / 16) * 2 + lane / 8), k);
        mma_warp(c, q, k), mma_warp(c, q + 4, k + 2);
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; i++) s[i] = i + 4 < kKeys / 2 ? s[i + 4] : c[i + 4 - kKeys / 2];
    }
  };
  auto keys_used = [&] { release(k_empty + 8 * K.index), K.next(kKeyStages); };
  auto values_used = [&] { release(v_empty + 8 * V.index), V.next(kKeyStages); };
  // How many key boxes of the item this consumer skips: at the beginning and, << 16, at the end.
  auto skips_of = [&] {
#if SKIPS
    return work[R.index].skips[consumer];
#else
    return 0;
#endif
  };
  auto skip = [&](int boxes) {
    if (!SKIPS) return;
#pragma unroll 1
    for (int i = 0; i < boxes; i++) {
      barrier_wait(k_full + 8 * K.index, K.phase), keys_used();
      barrier_wait(v_full + 8 * V.index, V.phase), values_used();
    }
  };
  // The mask of the current key box, bit by bit.
  auto find_mask = [&] {
    if (box_mask == kNoMask) return;
    const KeyBox box = key_boxes[K.index];
    const int shape = KEY_SHAPES > 1 && box_mask & kRestMask;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (TEXT && box_mask == kCountMask) count_mask(mask[r], box.begin[0], lane_class);
      else window_mask(mask[r], table_of(shape), window[r], box, P.keys[shape], lane_class);
    }
  };
  // Scores to weights, with new maxima; whether the output must be rescaled.
  auto weigh = [&](float (&s)[kKeys / 2]) {
    if (box_mask != kNoMask) hide(s, mask);
    return softmax(s, rows, P.scale_log2);
  };
  // Ends an item: sums, and the log-sum-exp.
  auto write_lse = [&] {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
      rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
      rows.rescale[r] = reciprocal(rows.sum[r]);
      bool exists = lane_class == 0;
      int token = TEXT ? work[R.index].token : W.token;  // registers are short with text
      if (is_text()) {
        const int at = position(r, 2);
        exists &= at < P.text_tokens[work[R.index].kind - 1];
        token += at;
      } else {
        exists &= row_of(r) < box_rows();
#pragma unroll
        for (int d = 0; d < 3; d++) {
          const int at = position(r, d);
          exists &= at < P.length[W.lengths][d];
          token += at * P.token_stride[d];
        }
      }
      const float lse = rows.sum[r] == 0.f ? MINUS_INFINITY : (rows.shift[r] + __log2f(rows.sum[r])) * 0.69314718f;
      if (exists) P.lse[(long long)W.head * P.tokens + token] = lse;
    }
  };
  // The output, through this warpgroup's rows of the query slot, stored as one box.
  auto write_output = [&] {
    const u32 q_rows = query_rows();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; i++) {
      const int x = 8 * i;
      const float a = rows.rescale[0], b = rows.rescale[1];
      store_matrices(query_row(q_rows, i), pack(o[x] * a, o[x + 1] * a), pack(o[x + 2] * b, o[x + 3] * b),
                     pack(o[x + 4] * a, o[x + 5] * a), pack(o[x + 6] * b, o[x + 7] * b));
    }
    // Rows that a box does not have stay zeros, as the next item computes scores of them: NaN would have all computed again.
    if (box_rows() < kRows && !is_text()) {
      const int row = warp * 16 + lane / 2, half = lane % 2 * kRowBytes / 2;
      __syncwarp();
      for (int i = 0; row >= box_rows() && i < kChunks * kRowBytes / 32; i++)
        *(int4*)(shared + (q_rows - base) + i % kChunks * kQueryChunk + row * kRowBytes + half + i / kChunks * 16) = make_int4(0, 0, 0, 0);
    }
    fence_async();
    named_barrier(1 + consumer, 128);
    if (threadIdx.x % 128 == 0) {
      const int h = W.head - W.batch * P.heads, set = is_text() ? MAP_SETS + work[R.index].kind - 1 : W.lengths;
      const int step0 = is_text() ? 0 : P.beside[0], step1 = is_text() ? 0 : P.beside[1], step2 = is_text() ? kRows : P.beside[2];
      for (int i = 0; i < kChunks; i++)
        tensor_store(&maps.o[set], q_rows + i * kQueryChunk, W.column + i * kColumns, W.query[2] + consumer * step2,
                     W.query[1] + consumer * step1, W.query[0] + consumer * step0, h * P.o.head_place + W.batch * P.o.batch_place);
      stores_begin();
      barrier_arrive(r_empty + 8 * R.index);
      owed = q_empty + 8 * Q.index;
    }
  };

  if (kHolds) {  // queries of the first item: no output waits for their slot
    take_queries();
    named_barrier(1 + consumer, 128);
    if (threadIdx.x % 128 == 0) barrier_arrive(q_empty + 8 * Q.index);
    Q.next(kQueryStages);
  }
  for (;; Q.next(kQueryStages), R.next(kRecords)) {
    if (!kHolds) barrier_wait(r_full + 8 * R.index, R.phase);  // held queries come after it
    W = work[R.index];
    if (W.boxes == 0) break;
    const u32 q_rows = query_rows();
    begin();
    if (!kHolds) take_queries();
    const int skips = skips_of(), boxes = W.boxes - (skips & 0xffff) - (skips >> 16);
    skip(skips & 0xffff);
    // First key box, nothing else in flight.
    {
      float s[kKeys / 2];
      issue_scores(s, q_rows);
      if (kQueryStages > 1 || kHolds) give_back();
      find_mask();
      mma_wait<0>(), keep(s);
      keys_used();
      weigh(s);
      to_operand(s, p);
    }
    // Scores of the next box are computed before the weights of the last one meet its values.
#pragma unroll 1
    for (int j = 1; j < boxes; j++) {
      float s[kKeys / 2];
      issue_scores(s, q_rows);
      u32 hidden[2][2][2];  // of a mask as a product: row, step, pair
      if (kMaskProducts && box_mask & kProductMask) issue_mask(s, hidden);
      issue_values(j == 1);
      // Bit by bit where it is no product, or a row has met no key so far.
      const bool by_bits = box_mask != kNoMask && (!kMaskProducts || !(box_mask & kProductMask) || has_no_key(rows));
      if (by_bits) find_mask();
      mma_wait<1>(), keep(s);
      if (kMaskProducts && box_mask & kProductMask)
#pragma unroll
        for (int i = 0; i < 8; i++) asm volatile("" ::"r"(hidden[i / 4][i / 2 % 2][i % 2]));  // until then they were read
      bool fits = false;
      const bool first_key = by_bits && meets_first_key(rows, mask);
      if (!first_key) {
        if (by_bits) hide(s, mask);
        fits = softmax_kept(s, rows, P.scale_log2);
        if (!fits) scores_again(s, q_rows), find_mask();
      }
      if (!fits && __any_sync(~0u, weigh(s))) {
        mma_wait<0>(), keep(o);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; i++) o[i] *= rows.rescale[i >> 1 & 1];
      }
      keys_used();
      mma_wait<0>(), keep(o);
      values_used();
      to_operand(s, p);
    }
    issue_values(boxes == 1);
    write_lse();
    if (kHolds) take_queries();
    mma_wait<0>(), keep(o);
    values_used();
    write_output();
    skip(skips >> 16);
    if (kQueryStages == 1 && !kHolds) give_back();
  }
  if (threadIdx.x % 128 == 0) stores_done();
}
