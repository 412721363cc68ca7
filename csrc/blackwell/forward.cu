// Attention forward for Blackwell (sm_100 and its family): boxes of queries against boxes of keys, as csrc/hopper has it.
// It has been compiled and checked without such a GPU, and never run on one: see csrc/README.md.
//
// Compile-time: HEAD_DIM (columns, a multiple of 32), KEYS (rows of a slot), KEY_STAGES (slots of keys or values),
// OUTPUT_STAGES (slots of one tile's output, one chunk of columns), POLYNOMIAL (of 8 pairs of exponentials in the middle,
// those computed without the unit for them), FLOAT16 (else bfloat16), FLOAT8 (e4m3 in, bfloat16 out), DILATED,
// MAP_SETS (of dilation group lengths), TEXT (whether there may be text), BOUNDED_WAITS (debug).
//
// One CTA has two tiles of at most 128 queries, boxes that lie side by side and share the key boxes. Its warps have roles:
//   0-3, 4-7  softmax of tile 0 and of tile 1: a thread owns a row. They apply masks and write the log-sum-exp.
//   8-11      correction: multiplies outputs whose row's maximum was raised; divides by the sum at the end.
//   12        multiplication: one thread issues all of it.
//   13        stores outputs; 14 loads keys and values; 15 fetches items and loads their queries. One thread each.
// Scores of one tile are computed while the other tile's become weights. Scores, weights and outputs stay in tensor memory;
// weights overlie their scores. Multiplications complete in the order in which they are issued, so the next scores may
// overwrite weights that an earlier multiplication reads.
#define kKeys KEYS
#define kPolynomial POLYNOMIAL
#include "blackwell/softmax.cuh"

constexpr int kHeadDim = HEAD_DIM, kKeyStages = KEY_STAGES, kOutputStages = OUTPUT_STAGES;
constexpr int kBytes = FLOAT8 ? 1 : 2, kSummed = 32 / kBytes;  // of an element; those that one multiplication sums over
// Columns of a chunk, of output and of what comes in. A row of one has 128 or 64 bytes, which is also its swizzle.
constexpr int kOutColumns = kHeadDim % 64 == 0 ? 64 : 32, kOutChunks = kHeadDim / kOutColumns, kOutRowBytes = 2 * kOutColumns;
constexpr int kColumns = FLOAT8 ? kHeadDim : kOutColumns, kChunks = kHeadDim / kColumns, kRowBytes = kBytes * kColumns;
constexpr int kRows = 128, kTiles = 2;
constexpr int kRecords = 2;  // items that are known: the current one and the next
// First warps of roles; those of softmax come first, and the one that fetches items comes last.
constexpr int kCorrection = 8, kMultiply = 12, kStore = 13, kLoad = 14, kWarps = 16;
constexpr int kSoftmaxRegisters = 184, kCorrectionRegisters = 96, kOtherRegisters = 48;
static_assert(2 * kSoftmaxRegisters + kCorrectionRegisters + kOtherRegisters <= 512, "a multiprocessor has 64 K registers");
static_assert(kHeadDim % 32 == 0 && kHeadDim <= 128, "head dims are multiples of 32 up to 128; pad others");
static_assert(!FLOAT8 || kHeadDim == 64 || kHeadDim == 128, "in 8 bits head dims are 64 and 128, bytes of a swizzle");
static_assert(kKeys % 32 == 0 && kKeys <= 128, "slots of keys have 32, 64, 96 or 128 rows");
static_assert(kKeyStages >= 2, "values and the next keys are in use at once");
static_assert(kOutputStages >= 1, "output leaves through shared memory");
static_assert(kPolynomial >= 0 && kPolynomial <= 8, "a share of 8 pairs");

// Shared memory: columns of one chunk lie side by side (kRowBytes a row, swizzled), chunk after chunk.
constexpr u32 kQueryChunk = kTiles * kRows * kRowBytes, kQueryBytes = kChunks * kQueryChunk;
constexpr u32 kOutputBytes = kRows * kOutRowBytes;
constexpr u32 kKeyChunk = kKeys * kRowBytes, kKeyBytes = kChunks * kKeyChunk;
constexpr u32 kQueries = 0, kOutputs = kQueries + kQueryBytes, kRing = kOutputs + kOutputStages * kOutputBytes,
              kTable = kRing + kKeyStages * kKeyBytes, kFactors = kTable + (kKeys + 5) * 16,
              kWork = kFactors + kTiles * kRows * 4, kBarriers = kWork + kRecords * sizeof(Work);

// Tensor memory, in columns.
constexpr u32 kScores = 0, kWeights = 64, kOutput = 256, kTileColumns = 128;

// Barriers: how many of each kind, and arrivals of a phase.
#define BARRIERS(X)                                                        \
  X(item_full, kRecords, 1)       /* fetch -> all */                       \
  X(item_empty, kRecords, 387)    /* all -> fetch */                       \
  X(q_full, 1, 1)                 /* queries -> multiply */                \
  X(q_empty, 1, 1)                /* multiply -> queries */                \
  X(kv_full, kKeyStages, 1)       /* load -> multiply */                   \
  X(kv_empty, kKeyStages, 1)      /* multiply -> load */                   \
  X(s_full, kTiles, 1)            /* multiply -> softmax: scores */        \
  X(p_full, kTiles, 256)          /* softmax and correction -> multiply */ \
  X(factor_full, kTiles, 128)     /* softmax -> correction */              \
  X(factor_empty, kTiles, 128)    /* correction -> softmax */              \
  X(o_full, kTiles, 1)            /* multiply -> correction */             \
  X(out_full, kOutputStages, 128) /* correction -> store */                \
  X(out_empty, kOutputStages, 1)  /* store -> correction */
#define FIRST_OF(name, count, arrivals) name, name##_last = name + count - 1,
enum { BARRIERS(FIRST_OF) kBarrierCount };
#undef FIRST_OF
constexpr u32 kMemoryAddress = kBarriers + 8 * kBarrierCount, kSharedBytes = kMemoryAddress + 16;
static_assert(kSharedBytes <= 232448, "too much shared memory: fewer stages, or fewer keys");

// What all roles know.
struct Cta {
  const Maps& maps;
  const Params& P;
  unsigned char* shared;
  u32 base, memory;
  int box_keys;

  __device__ __forceinline__ u32 bar(int i) const { return base + kBarriers + 8 * i; }
  __device__ __forceinline__ void wait(int i, u32 phase) const { barrier_wait(bar(i), phase); }
  __device__ __forceinline__ void arrive(int i) const { barrier_arrive(bar(i)); }
  __device__ __forceinline__ Work& work(const Stage& R) const { return ((Work*)(shared + kWork))[R.index]; }
  __device__ __forceinline__ float& factor(int tile) const {
    return ((float*)(shared + kFactors))[tile * kRows + threadIdx.x % kRows];
  }
  // A thread's lane of tensor memory; a warp reaches 32 lanes.
  __device__ __forceinline__ u32 lane() const { return memory + (threadIdx.x % kRows / 32 << 21); }
  // The next item, as a role that fetches none meets it; its `boxes` are 0 at the end.
  __device__ __forceinline__ const Work& item(const Stage& R) const {
    wait(item_full + R.index, R.phase);
    return work(R);
  }
};

// Fetches items, one ahead, and loads their queries.
__device__ __forceinline__ void fetch_items(const Cta& C) {
  Stage R{0, 1}, Q{0, 1};
  for (int w = blockIdx.x, next;; w = next, R.next(kRecords), Q.next(1)) {
    next = atomicAdd(C.P.counters, 1) + gridDim.x;  // used only after this item's loads, which hides its latency
    C.wait(item_empty + R.index, R.phase);
    Work& W = C.work(R);
    if (w >= C.P.total) {
      W.boxes = 0;
      C.arrive(item_full + R.index);
      break;
    }
    const Queries queries = describe(W, C.P, w, C.box_keys);
    const int lengths = W.lengths;
    C.arrive(item_full + R.index);
    C.wait(q_empty, Q.phase);
    load_queries<kTiles, kRows, kColumns, kChunks, kBytes>(
        C.base + kQueries, C.bar(q_full), C.maps.q, C.P.q, queries, lengths, C.P);
  }
  // The last CTA to get here resets the counters for the next launch: nobody fetches items any more.
  if (atomicAdd(C.P.counters + 1, 1) == gridDim.x - 1) C.P.counters[0] = C.P.counters[1] = 0;
}

// Loads the keys, then the values of each box.
__device__ __forceinline__ void load_keys(const Cta& C) {
  Stage R{0, 0}, K{0, 1};
  for (;; R.next(kRecords)) {
    const Work& W = C.item(R);
    const int boxes = W.boxes;
    if (boxes == 0) break;
    KeyWalk at(W);
#pragma unroll 1
    for (int j = 0; j < 2 * boxes; j++, K.next(kKeyStages)) {
      const bool keys = j % 2 == 0;
      if (keys && j > 0) at.advance(W, C.P.keys, C.box_keys);
      const TensorMap* map = keys ? &C.maps.k[at.set] : &C.maps.v[at.set];
      int column = keys ? W.k_column : W.v_column;
      if (at.is_text()) column = W.key_head * (keys ? C.P.k.head_column : C.P.v.head_column);
      C.wait(kv_empty + K.index, K.phase);
      barrier_expect(C.bar(kv_full + K.index), C.box_keys * kRowBytes * kChunks);
      for (int i = 0; i < kChunks; i++)
        tensor_load(C.base + kRing + K.index * kKeyBytes + i * kKeyChunk, map, C.bar(kv_full + K.index), column + i * kColumns,
                    at.c2, at.c1, at.c0, keys ? W.k_place : W.v_place);
    }
    C.arrive(item_empty + R.index);
  }
}

// Issues multiplications: per box and tile, weights times values, then the scores of the next box.
__device__ __forceinline__ void multiply(const Cta& C) {
  constexpr u32 scores_shape = mma_shape(kRows, kKeys, false, kTypes), values_shape = mma_shape(kRows, kHeadDim, true, kTypes);
  Stage R{0, 0}, Q{0, 0}, K{0, 0}, S{0, 0};
  auto slot = [&] { return C.base + kRing + K.index * kKeyBytes; };
  auto issue_scores = [&](int tile, u32 keys) {
    u32 q = C.base + kQueries + tile * kRows * kRowBytes;
    asm volatile("" : "+r"(q));  // else all operands are kept in registers, too many for this warp
#pragma unroll
    for (int i = 0; i < kHeadDim / kSummed; i++) {
      const u32 chunk = i / (kColumns / kSummed), within = i % (kColumns / kSummed) * 32;
      mma_shared(C.memory + kScores + tile * kTileColumns,
                 operand(q + chunk * kQueryChunk + within, 16, 8 * kRowBytes, kRowBytes),
                 operand(keys + chunk * kKeyChunk + within, 16, 8 * kRowBytes, kRowBytes), scores_shape, i != 0);
    }
    mma_commit(C.bar(s_full + tile));
  };
  auto issue_values = [&](int tile, u32 values, bool accumulate) {
    u32 weights = C.memory + kWeights + tile * kTileColumns;
    asm volatile("" : "+r"(weights));
#pragma unroll
    for (int i = 0; i < kKeys / kSummed; i++)
      mma_memory(C.memory + kOutput + tile * kTileColumns, weights + 8 * i,
                 operand(values + i * kSummed * kRowBytes, kChunks > 1 ? kKeyChunk : 0, 8 * kRowBytes, kRowBytes), values_shape,
                 accumulate || i != 0);
  };
  for (;; R.next(kRecords), Q.next(1)) {
    const int boxes = C.item(R).boxes;
    C.arrive(item_empty + R.index);
    if (boxes == 0) break;
    // Scores of the first box.
    C.wait(kv_full + K.index, K.phase);
    C.wait(q_full, Q.phase);
    for (int tile = 0; tile < kTiles; tile++) issue_scores(tile, slot());
    mma_commit(C.bar(kv_empty + K.index));
    if (boxes == 1) mma_commit(C.bar(q_empty));
    K.next(kKeyStages);
#pragma unroll 1
    for (int j = 0; j < boxes; j++, S.next(1)) {
      const Stage V = K;
      const u32 values = slot();
      const bool more = j + 1 < boxes;
      C.wait(kv_full + V.index, V.phase);
      K.next(kKeyStages);
      for (int tile = 0; tile < kTiles; tile++) {
        C.wait(p_full + tile, S.phase);
        fence_after();
        issue_values(tile, values, j > 0);
        if (tile == kTiles - 1) mma_commit(C.bar(kv_empty + V.index));
        if (!more) {
          mma_commit(C.bar(o_full + tile));
          continue;
        }
        if (tile == 0) C.wait(kv_full + K.index, K.phase);
        issue_scores(tile, slot());
      }
      if (!more) continue;
      mma_commit(C.bar(kv_empty + K.index));
      if (j + 2 == boxes) mma_commit(C.bar(q_empty));
      K.next(kKeyStages);
    }
  }
}

// Scores to weights, in tensor memory; sums and the log-sum-exp.
__device__ __forceinline__ void compute_weights(const Cta& C, int tile) {
  const Params& P = C.P;
  const int row = threadIdx.x % kRows;
  const u32 scores = C.lane() + kScores + tile * kTileColumns, weights = C.lane() + kWeights + tile * kTileColumns;
  const uint4* table = (const uint4*)(C.shared + kTable);
  // Coordinates of the row in its box, 8 bits each; those of rows beyond it are some or other.
  const u32 in_box = coordinates(row, P.box);
  Stage R{0, 0}, S{0, 0}, F{0, 1};
  auto send_factor = [&](float factor) {
    C.wait(factor_empty + tile, F.phase);
    F.next(1);
    C.factor(tile) = factor;
    fence_before();
    C.arrive(factor_full + tile);
  };
  for (;; R.next(kRecords)) {
    const Work& W = C.item(R);
    const int boxes = W.boxes;
    if (boxes == 0) break;
    const bool is_text = TEXT && W.kind;
    auto position = [&](int d) {
      if (is_text) return d == 2 ? W.query[2] + tile * kRows + row : 0;
      return W.query[d] + tile * P.beside[d] + (int)(in_box >> 8 * d & 255);
    };
    int2 window[3] = {};
    if (W.masked)
#pragma unroll
      for (int d = 0; d < 3; d++) {
        const int length = P.length[W.lengths][d];
        window[d] = is_text ? make_int2(0, length)
                            : P.windows[W.windows + P.window_row[W.lengths][d] + min(position(d), length - 1)];
      }
    const bool walks = TEXT || W.masked;
    KeyWalk at(W);
    Row own;
#pragma unroll 1
    for (int j = 0; j < boxes; j++, S.next(1)) {
      // Which mask the box needs; none where the windows of all rows of this warp hold it.
      u32 mask[4];
      bool masked = false;
      if (walks) {
        if (j > 0) at.advance(W, P.keys, C.box_keys);
        const KeyBox box = at.box(W, C.box_keys, kKeys);
        if (TEXT && box.mask == kCountMask) {
          masked = true;
          count_mask(mask, box.begin[0]);
        } else if (box.mask != kNoMask) {
          masked = !__all_sync(~0u, C.box_keys == kKeys && window_holds(window, box, P.keys[0]));
          if (masked) window_mask(mask, table, window, box, P.keys[0]);
        }
      }
      C.wait(s_full + tile, S.phase);
      fence_after();
      u32 x[kFragments][32];
#pragma unroll
      for (int f = 0; f < kFragments; f++) memory_load(x[f], scores + 32 * f);
      memory_loaded(x);
      if (masked) apply_mask(x, mask);
      const float rescale = raise_maximum(x, own, P.scale_log2);
      send_factor(rescale);
      weigh(x, weights, own, P.scale_log2);
      memory_stored();
      fence_before();
      C.arrive(p_full + tile);
      add_weights(x, own, rescale);
    }
    send_factor(reciprocal(own.sum));
    bool exists = true;
    int token = W.token;
    if (is_text) {
      exists = position(2) < P.text_tokens[W.kind - 1];
      token += position(2);
    } else {
      exists = row < P.box[0] * P.box[1] * P.box[2];
#pragma unroll
      for (int d = 0; d < 3; d++) {
        exists &= position(d) < P.length[W.lengths][d];
        token += position(d) * P.token_stride[d];
      }
    }
    const float lse = fmaf(own.maximum, P.scale_log2, __log2f(own.sum) - kLift) * 0.69314718f;
    if (exists) P.lse[(long long)W.head * P.tokens + token] = lse;
    C.arrive(item_empty + R.index);
  }
}

// Multiplies outputs in tensor memory by factors of their rows; the last time, on their way to shared memory.
__device__ __forceinline__ void correct(const Cta& C) {
  const int row = threadIdx.x % kRows;
  Stage R{0, 0}, F{0, 0}, O{0, 0}, E{0, 1};
  auto receive_factor = [&](int tile) {
    C.wait(factor_full + tile, F.phase);
    const float factor = C.factor(tile);
    C.arrive(factor_empty + tile);
    return factor;
  };
  auto output = [&](int tile) { return C.lane() + kOutput + tile * kTileColumns; };
  for (;; R.next(kRecords), O.next(1)) {
    const int boxes = C.item(R).boxes;
    C.arrive(item_empty + R.index);
    if (boxes == 0) break;
#pragma unroll 1
    for (int j = 0; j < boxes; j++, F.next(1))
      for (int tile = 0; tile < kTiles; tile++) {
        const float factor = receive_factor(tile);
        if (j > 0 && __any_sync(~0u, factor != 1.f)) {
          fence_after();
          const u64 factors = pair(factor, factor);
#pragma unroll
          for (int c = 0; c < kHeadDim; c += 32) {
            u32 o[1][32];
            memory_load(o[0], output(tile) + c);
            memory_loaded(o);
#pragma unroll
            for (int i = 0; i < 32; i += 2) {
              float a, b;
              unpair(multiply2(pair(__uint_as_float(o[0][i]), __uint_as_float(o[0][i + 1])), factors), a, b);
              o[0][i] = __float_as_uint(a), o[0][i + 1] = __float_as_uint(b);
            }
            memory_store(output(tile) + c, o[0]);
          }
          memory_stored();
        }
        fence_before();
        C.arrive(p_full + tile);
      }
    for (int tile = 0; tile < kTiles; tile++) {
      const float inverse = receive_factor(tile);
      C.wait(o_full + tile, O.phase);
      fence_after();
#pragma unroll
      for (int chunk = 0; chunk < kOutChunks; chunk++, E.next(kOutputStages)) {
        C.wait(out_empty + E.index, E.phase);
#pragma unroll
        for (int c = 0; c < kOutColumns; c += 32) {
          u32 o[1][32];
          memory_load(o[0], output(tile) + chunk * kOutColumns + c);
          memory_loaded(o);
          auto value = [&](int i) { return __uint_as_float(o[0][i]) * inverse; };
#pragma unroll
          for (int i = 0; i < 32; i += 8) {
            const int piece = (c + i) / 8, swizzled = kOutColumns == 64 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
            store_shared(C.base + kOutputs + E.index * kOutputBytes + row * kOutRowBytes + swizzled * 16,
                         pack(value(i), value(i + 1)), pack(value(i + 2), value(i + 3)),
                         pack(value(i + 4), value(i + 5)), pack(value(i + 6), value(i + 7)));
          }
        }
        fence_async();
        C.arrive(out_full + E.index);
      }
    }
    F.next(1);
  }
}

// Stores the output, a box of each tile for each chunk of columns.
__device__ __forceinline__ void store_outputs(const Cta& C) {
  const Params& P = C.P;
  Stage R{0, 0}, O{0, 0};
  for (;; R.next(kRecords)) {
    const Work& W = C.item(R);
    if (W.boxes == 0) break;
    const bool is_text = TEXT && W.kind;
    const int h = W.head - W.batch * P.heads, set = is_text ? MAP_SETS + W.kind - 1 : W.lengths;
#pragma unroll 1
    for (int i = 0; i < kTiles * kOutChunks; i++, O.next(kOutputStages)) {
      const int tile = i / kOutChunks, chunk = i % kOutChunks;
      C.wait(out_full + O.index, O.phase);
      tensor_store(&C.maps.o[set], C.base + kOutputs + O.index * kOutputBytes, W.column + chunk * kOutColumns,
                   W.query[2] + tile * (is_text ? kRows : P.beside[2]), W.query[1] + tile * (is_text ? 0 : P.beside[1]),
                   W.query[0] + tile * (is_text ? 0 : P.beside[0]), h * P.o.head_place + W.batch * P.o.batch_place);
      stores_begin();
      stores_read();
      C.arrive(out_empty + O.index);
    }
    C.arrive(item_empty + R.index);
  }
  stores_done();
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, 1)
gna_forward(const __grid_constant__ Maps maps, const __grid_constant__ Params P) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Cta C{maps, P, shared, shared_address(shared), 0, P.keys[0][0] * P.keys[0][1] * P.keys[0][2]};

  // Barriers, tensor memory, and rows that no box ever fills: a weight of zero must not meet a NaN there.
  if (threadIdx.x == 0) {
#define INIT(name, count, arrivals) \
  for (int i = 0; i < count; i++) barrier_init(C.bar(name + i), arrivals);
    BARRIERS(INIT)
#undef INIT
    barrier_init_done();
  }
  if (warp == kMultiply) memory_alloc(C.base + kMemoryAddress);
  fill_mask_table((u32*)(shared + kTable), P.keys[0]);
  if (C.box_keys < kKeys) {
    for (u32 i = kRing / 16 + threadIdx.x; i < kTable / 16; i += blockDim.x) ((int4*)shared)[i] = make_int4(0, 0, 0, 0);
    fence_async();
  }
  fence_before();
  __syncthreads();
  fence_after();
  C.memory = *(volatile u32*)(shared + kMemoryAddress);

  // Registers go by groups of four warps.
  if (warp < kCorrection) {
    take_registers<kSoftmaxRegisters>();
    compute_weights(C, warp / 4);
  } else if (warp < kMultiply) {
    give_registers<kCorrectionRegisters>();
    correct(C);
  } else {
    give_registers<kOtherRegisters>();
    if (is_leader()) {
      if (warp == kMultiply) multiply(C);
      else if (warp == kStore) store_outputs(C);
      else if (warp == kLoad) load_keys(C);
      else fetch_items(C);
    }
    __syncwarp();
  }

  // Tensor memory goes back once nobody uses it.
  fence_before();
  __syncthreads();
  fence_after();
  if (warp == kMultiply) memory_free(C.memory);
}
