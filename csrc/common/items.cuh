// Work items as both kernels walk them: what an item is, its key boxes, rings of buffers.
#pragma once
#include "common/records.cuh"

// A stage of a ring of buffers, and the parity of its current phase.
struct Stage {
  int index;
  u32 phase;
  __device__ __forceinline__ void next(int stages) {
    if (++index == stages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// The column of dimension 0 at which a head's dilation group starts.
__device__ __forceinline__ int first_column(const Address& at, int head, const int (&group)[3]) {
  int column = head * at.head_column;
  if (DILATED) column += group[0] * at.group_column[0] + group[1] * at.group_column[1] + group[2] * at.group_column[2];
  return column;
}

// Coordinates of row i of a box, 8 bits each; of rows beyond the box some or other.
__device__ __forceinline__ u32 coordinates(int i, const int (&box)[3]) {
  return i / (box[2] * box[1]) | i / box[2] % box[1] << 8 | i % box[2] << 16;
}

// An item's record, and whose queries they are.
struct Queries {
  const Item& item;
  int batch, head;
  bool is_text;
};

// Item number w, and where its tokens are. Items of text, much the longest, come before all others.
//
// In backward, rows may be keys and what they are multiplied with queries: then one head has those of several others, and
// all tokens of text count.
//
// The walk over key boxes may begin amid those that need no mask, or amid all: there most rows see keys.
template <bool kRowsAreKeys = false, bool kFromCenter = false>
__device__ __forceinline__ Queries describe(Work& W, const Params& P, int w, int box_keys) {
  int i = w, per_head = P.items_per_head, first = 0;
  if (TEXT) {
    if (w < P.text_total) per_head = P.text_items;
    else i -= P.text_total, per_head -= P.text_items, first = P.text_items;
  }
  const int head = i / per_head, b = head / P.heads, h = head % P.heads;
  const int key_head = kRowsAreKeys ? h * P.queries_per_key_head : h / P.queries_per_key_head;
  const int gna = P.gna_of_head ? P.gna_of_head[h] : 0;
  const Item& I = P.items[gna * P.items_per_head + first + i % per_head];
  const bool is_text = TEXT && I.kind;
  int boxes = I.boxes[0] * I.boxes[1] * I.boxes[2];
#if KEY_SHAPES > 1
  boxes += I.rest_boxes[0] * I.rest_boxes[1] * I.rest_boxes[2];
#endif
  for (int i = 0; i < 2; i++) {  // written without text, too: wide loads of what lies beside it read it
    W.text[i] = !TEXT ? 0 : P.text_valid && !kRowsAreKeys ? min(max(P.text_valid[2 * b + i], 0), P.text_tokens[i]) : P.text_tokens[i];
    if (TEXT) boxes += (W.text[i] + box_keys - 1) / box_keys;
  }
  W.boxes = boxes, W.head = head, W.batch = b, W.lengths = MAP_SETS > 1 ? I.lengths : 0, W.kind = I.kind, W.masked = I.masked;
  W.column = first_column(P.o, h, I.group), W.windows = gna * P.window_rows;
  W.token = is_text ? P.text_token[I.kind - 1] : P.grid_token;
  if (DILATED) W.token += I.group[0] * P.group_stride[0] + I.group[1] * P.group_stride[1] + I.group[2] * P.group_stride[2];
  W.key_head = key_head;
  W.k_column = first_column(P.k, key_head, I.group), W.v_column = first_column(P.v, key_head, I.group);
  W.k_place = key_head * P.k.head_place + b * P.k.batch_place, W.v_place = key_head * P.v.head_place + b * P.v.batch_place;
  auto walks = [](KeyGrid& G, int d, int side, int key, int boxes, int full_begin, int full, bool from_center) {
    G.key[d] = key, G.key_end[d] = key + boxes * side;
    G.full_begin[d] = key + full_begin * side, G.full[d] = full * side;
    const int center = full ? full_begin + full / 2 : boxes / 2;
    G.first[d] = key + (from_center ? center * side : 0);
  };
  for (int d = 0; d < 3; d++) {
    W.query[d] = I.query[d];
#if SKIPS
    W.skips[d] = I.skips[d];
#endif
    walks(W.grids[0], d, P.keys[0][d], I.key[d], I.boxes[d], I.full_begin[d], I.full[d], kFromCenter);
#if KEY_SHAPES > 1
    walks(W.grids[1], d, P.keys[1][d], I.rest_key[d], I.rest_boxes[d], I.rest_full_begin[d], I.rest_full[d], false);
#endif
  }
  return {I, b, h, is_text};
}

// Loads the queries of an item: boxes of at most kRows for kTiles tiles, which lie side by side in each chunk of columns.
template <int kTiles, int kRows, int kColumns, int kChunks, int kBytes = 2, bool kOnce = false>
__device__ __forceinline__ void load_queries(
    u32 to, u32 bar, const TensorMap* maps, const Address& at, const Queries& Q, int lengths, const Params& P) {
  const Item& I = Q.item;
  const int set = Q.is_text ? MAP_SETS + I.kind - 1 : lengths, rows = Q.is_text ? kRows : P.box[0] * P.box[1] * P.box[2];
  const int column = first_column(at, Q.head, I.group), place = Q.head * at.head_place + Q.batch * at.batch_place;
  barrier_expect(bar, kTiles * rows * kBytes * kColumns * kChunks);
#pragma unroll 1
  for (int i = 0; i < kTiles * kChunks; i++) {
    const int g = i % kTiles, chunk = i / kTiles;
    tensor_load<kOnce>(to + (chunk * kTiles + g) * kRows * kBytes * kColumns, &maps[set], bar, column + chunk * kColumns,
                       I.query[2] + g * (Q.is_text ? kRows : P.beside[2]), I.query[1] + g * (Q.is_text ? 0 : P.beside[1]),
                       I.query[0] + g * (Q.is_text ? 0 : P.beside[0]), place);
  }
}

// The key boxes of an item: those of the grid in row-major order, around the ends of every dimension, then those of its second
// shape, then those of text.
struct KeyWalk {
  int c0, c1, c2, set;
  int shape = 0;  // of boxes of the grid

  __device__ __forceinline__ explicit KeyWalk(const Work& W) : set(W.lengths) { begin(W.grids[0]); }

  __device__ __forceinline__ void begin(const KeyGrid& G) { c0 = G.first[0], c1 = G.first[1], c2 = G.first[2]; }

  __device__ __forceinline__ bool is_text() const { return TEXT && set >= MAP_SETS; }

  __device__ __forceinline__ void advance(const Work& W, const int (&keys)[KEY_SHAPES][3], int box_keys) {
    if (is_text()) {
      if ((c2 += box_keys) >= W.text[0] && set == MAP_SETS) set++, c2 = 0;
      return;
    }
    const KeyGrid& G = W.grids[shape];
    // One step along a dimension; whether it has gone around.
    auto around = [&](int d, int& c) {
      if ((c += keys[shape][d]) == G.key_end[d]) c = G.key[d];
      return c == G.first[d];
    };
    if (!around(2, c2) || !around(1, c1) || !around(0, c0)) return;
    if (KEY_SHAPES > 1 && shape == 0) {
      const KeyGrid& rest = W.grids[KEY_SHAPES - 1];
      bool any = true;
      for (int d = 0; d < 3; d++) any &= rest.key_end[d] > rest.key[d];
      if (any) return shape = 1, begin(rest);
    }
    if (TEXT) set = MAP_SETS + (W.text[0] == 0), shape = c0 = c1 = c2 = 0;
  }

  // The map of the current box, of those for the first and for the second shape.
  __device__ __forceinline__ const TensorMap* map(const TensorMap* first, const TensorMap* rest) const {
    return KEY_SHAPES > 1 && shape ? &rest[set] : &first[set];
  }

  // The box, and the mask that it needs in a slot of `slot` keys.
  __device__ __forceinline__ KeyBox box(const Work& W, int box_keys, int slot) const {
    if (is_text()) {
      const int count = min(W.text[set - MAP_SETS] - c2, box_keys);
      return KeyBox{{count, 0, 0}, count == slot ? kNoMask : kCountMask};
    }
    const KeyGrid& G = W.grids[shape];
    auto hides = [&](int d, int c) { return ((u32)(c - G.full_begin[d]) >= G.full[d]) << d; };
    const int mask = hides(0, c0) | hides(1, c1) | hides(2, c2);
    return KeyBox{{c0, c1, c2}, shape && mask ? mask | kRestMask : mask};
  }
};
