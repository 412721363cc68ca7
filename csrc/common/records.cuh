// What the host tells the kernels. The same structures are in gna_flex/cuda/forward.py and tables.py.
#pragma once
#include "common/ptx.cuh"

// Shapes of key boxes: 1; or 2, and an item's keys are a grid of boxes of one shape, and one of the other beside it.
#ifndef KEY_SHAPES
#define KEY_SHAPES 1
#endif
// Whether warpgroups skip key boxes at both ends of an item's walk which none of their queries sees.
#ifndef SKIPS
#define SKIPS 0
#endif

// One query tile. Positions are those inside of its dilation group; dimensions are (T, H, W), missing ones of length 1.
struct Item {
  int query[3];       // first query of warpgroup 0; the next warpgroups' boxes lie beside it
  int key[3];         // where key boxes start
  int boxes[3];       // key boxes per dimension
  int full_begin[3];  // the boxes [full_begin, full_begin + full) need no mask
  int full[3];
  int group[3];       // dilation group
  int lengths;        // which row of Params::length and of the tensor maps: lengths of dilation groups differ by one
  int kind;           // 0: grid, 1: text before it, 2: text after it
  int masked;         // whether any key box of the grid needs the mask
#if KEY_SHAPES > 1
  int rest_key[3], rest_boxes[3], rest_full_begin[3], rest_full[3];  // the boxes of the second shape; maybe none
#endif
  int skips[3];  // with SKIPS: of each warpgroup, boxes that it skips at the beginning and, << 16, at the end
};

// The key boxes of one shape that an item walks, in tokens.
struct KeyGrid {
  int key[3], key_end[3];  // where boxes start and end
  int first[3];            // the box that is walked first
  int full_begin[3];       // boxes in [full_begin, full_begin + full) need no mask
  u32 full[3];
};

// An item as its producer hands it on, in shared memory.
struct alignas(16) Work {
  int boxes;     // key boxes, those of text included; 0 ends the kernel
  int head;      // batch * heads + head
  int batch;     // so that nobody divides
  int query[3];
  int lengths;
  int kind;
  int masked;
  int column;    // where the query's columns start in dimension 0 of the output's map
  int token;     // index of the token at position 0 of the dilation group
  int windows;   // first row of the head's windows
#if SKIPS
  int skips[3];
#endif
  // For the producer of keys and values.
  KeyGrid grids[KEY_SHAPES];
  int text[2];                 // text tokens that count
  int key_head, k_column, v_column, k_place, v_place;
  int dq_column, dq_counter;   // in a fused backward: where sums of the queries' gradients start, who counts that it is done
};

// What hides keys of a box: windows in the dimensions whose bits (1, 2, 4) are set, or a count. kProductMask: windows, and
// their mask is a product. kRestMask: windows, in a box of the second shape.
enum { kNoMask = 0, kCountMask = 8, kProductMask = 16, kRestMask = 32 };

// A key box, in shared memory beside its keys.
struct alignas(16) KeyBox {
  int begin[3];  // coordinates; for kCountMask begin[0] is the number of keys that count
  int mask;
};

// How tensor maps reach a head: the column of dimension 0, and the coordinate of dimension 4.
struct Address {
  int head_column, head_place, batch_place;
  int group_column[3];  // columns from one dilation group to the next
};

// Where coordinates of a key box are among the columns of a mask as a product, masks.cuh; those of a dimension side by side.
struct Places {
  int steps;      // of 16 columns, 1 or 2; 0 if there are too many coordinates
  int first[3];   // place of coordinate 0; unused in a dimension that hides nothing in any box
  u32 others[3];  // places of all but this dimension's coordinates
  u32 seen;       // all places but the last one, if that stands for rows of a slot which no box fills
};

struct Params {
  const Item* items;
  const int2* windows;      // [lo, hi) per dimension and position
  int* counters;            // next item, finished CTAs; both are 0 before and after
  float* lse;               // [batch, heads, tokens], natural logarithm
  const int* text_valid;    // [batch, 2] text tokens that count, or null: all
  const int* gna_of_head;   // [heads], or null: one for all
  float scale_log2;
  int items_per_head, text_items, text_total, total, heads, queries_per_key_head, window_rows, tokens;
  int box[3], beside[3], keys[KEY_SHAPES][3];
  int length[MAP_SETS][3], window_row[MAP_SETS][3];
  int token_stride[3], group_stride[3];  // tokens from one position, one dilation group to the next
  Places places;
  int grid_token, text_tokens[2], text_token[2];
  Address q, k, v, o;
};

// One set of maps for each combination of dilation group lengths; text before and after the grid comes last. Maps of the second
// shape of key boxes have a place of their own.
struct Maps {
  TensorMap q[MAP_SETS + 2 * TEXT], k[MAP_SETS + 2 * TEXT], v[MAP_SETS + 2 * TEXT], o[MAP_SETS + 2 * TEXT];
#if KEY_SHAPES > 1
  TensorMap rest_k[MAP_SETS], rest_v[MAP_SETS];
#endif
};

// Sums of the queries' gradients, in a fused backward; see hopper/sums.cuh.
struct Sums {
  float4* ring;          // [places, heads of a group, tokens, columns / 4]
  void* to;              // the gradients: 16-bit floats
  long long strides[3];  // elements from one batch entry, head, token of `to` to the next
  int* counters;         // of slices that are taken; for each group: of items that are done, then of slices that are rounded
  const int2* of_slice;    // the first and the last counter of items that add to a slice
  const int2* of_counter;  // the first and the last counter of slices to which the items of a counter add
  int places, groups, slices, slice_rows;                                    // slices of a head
  int item_counters, slice_counters, items_per_counter, slices_per_counter;  // of a group; how many share one
  int rounders;                                                              // CTAs that do nothing else
};

// The passes of backward. "Queries" of Params and of items are rows, "keys" what streams by: where rows are keys, the
// other way round. `q` leads to rows1, `k` and `v` to what streams by.
struct BackwardParams : Params {
  const float2* statistics;     // [batch, heads of queries, tokens]: log-sum-exp in base 2, and delta
  void* results[2];             // 16-bit floats, of which rows have `head_dim`: gradients of queries; or of keys and of values
  long long result_strides[3];  // elements from one batch entry, head, token to the next
  Address rows2, dq;
  float scale;
  int head_dim;
  Sums sums;
};

struct BackwardMaps {
  TensorMap rows1[MAP_SETS + 2 * TEXT], rows2[MAP_SETS + 2 * TEXT], inner1[MAP_SETS + 2 * TEXT], inner2[MAP_SETS + 2 * TEXT];
#if defined(FUSED) && FUSED
  TensorMap dq[MAP_SETS + 2 * TEXT];
#endif
};
