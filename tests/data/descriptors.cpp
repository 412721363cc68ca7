// CUTLASS's descriptors of tcgen05 operands, evaluated on the host, beside those of csrc/blackwell/ptx.cuh.
// One line each: name, CUTLASS's, the kernel's.
#include <cstdio>
#include <cute/tensor.hpp>
#include <cute/arch/mma_sm100_desc.hpp>
#include <cute/atom/mma_traits_sm100.hpp>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
using namespace cute;
typedef unsigned u32;
typedef unsigned long long u64;
#include "kernel_functions.h"

void show(const char* name, int a, int b, u64 cutlass, u64 ours) { printf("%s-%d-%d %llx %llx\n", name, a, b, cutlass, ours); }

template <class T, int kColumns, UMMA::Major kMajor>
void shape(const char* name, u32 types) {
  auto cutlass = UMMA::make_instr_desc<T, T, float, 128, kColumns, UMMA::Major::K, kMajor>();
  show(name, !types, kColumns, u32(cutlass), mma_shape(128, kColumns, kMajor == UMMA::Major::MN, types));
}

template <int kColumns>
void shapes() {
  shape<bfloat16_t, kColumns, UMMA::Major::K>("scores", 1);
  shape<bfloat16_t, kColumns, UMMA::Major::MN>("values", 1);
  shape<half_t, kColumns, UMMA::Major::K>("scores", 0);
  shape<half_t, kColumns, UMMA::Major::MN>("values", 0);
  shape<float_e4m3_t, kColumns, UMMA::Major::K>("scores-in-8-bits", 0);
  shape<float_e4m3_t, kColumns, UMMA::Major::MN>("values-in-8-bits", 0);
}

// Rows of kHeadDim columns as boxes leave them in shared memory: a chunk of kColumns columns after the other.
template <class T, int kHeadDim, int kKeys, int kColumns>
void operands(const char* const (&names)[6]) {
  constexpr int kBytes = sizeof(T), kRowBytes = kBytes * kColumns, kChunk = kKeys * kRowBytes, kSummed = 32 / kBytes;
  using Keys = conditional_t<kRowBytes == 128, UMMA::Layout_K_SW128_Atom<T>, UMMA::Layout_K_SW64_Atom<T>>;
  using Values = conditional_t<kRowBytes == 128, UMMA::Layout_MN_SW128_Atom<T>, UMMA::Layout_MN_SW64_Atom<T>>;
  alignas(1024) static T memory[kKeys * kHeadDim];
  auto keys = make_tensor(make_smem_ptr(memory), tile_to_shape(Keys{}, Shape<Int<kKeys>, Int<kHeadDim>>{}));
  auto values = make_tensor(make_smem_ptr(memory), tile_to_shape(Values{}, Shape<Int<kHeadDim>, Int<kKeys>>{}, Step<_2, _1>{}));
  auto k = UMMA::make_umma_desc<UMMA::Major::K>(local_tile(keys, Shape<Int<kKeys>, Int<kSummed>>{}, make_coord(0, 0)));
  auto v = UMMA::make_umma_desc<UMMA::Major::MN>(local_tile(values, Shape<Int<kHeadDim>, Int<kSummed>>{}, make_coord(0, 0)));
  // Host code has no shared addresses: those of CUTLASS's descriptors are 0.
  show(names[0], kHeadDim, kKeys, k.desc_, operand(0, 16, 8 * kRowBytes, kRowBytes));
  show(names[1], kHeadDim, kKeys, v.desc_, operand(0, kHeadDim > kColumns ? kChunk : 0, 8 * kRowBytes, kRowBytes));
  // Where each multiplication's columns, or keys, begin; and where each 16 bytes of a chunk are.
  auto at = [&](auto const& tensor, int i, int j) { return u64(&tensor(i, j) - &tensor(0, 0)) * kBytes; };
  for (int i = 0; i < kHeadDim / kSummed; i++)
    show(names[2], kHeadDim, i, at(keys, 0, kSummed * i), i / (kColumns / kSummed) * kChunk + i % (kColumns / kSummed) * 32);
  for (int i = 0; i < kKeys / kSummed; i++) show(names[3], kHeadDim, i, at(values, 0, kSummed * i), i * kSummed * kRowBytes);
  for (int row = 0; row < kKeys; row++)
    for (int piece = 0; piece < kRowBytes / 16; piece++) {
      const int swizzled = kRowBytes == 128 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
      show(names[4], row, piece, at(keys, row, 16 / kBytes * piece), row * kRowBytes + swizzled * 16);
      show(names[5], row, piece, at(values, 16 / kBytes * piece, row), row * kRowBytes + swizzled * 16);
    }
}

template <int kHeadDim, int kKeys>
void operands() {
  operands<bfloat16_t, kHeadDim, kKeys, kHeadDim % 64 == 0 ? 64 : 32>({"keys", "values", "column", "row", "piece", "value-piece"});
}

template <int kHeadDim, int kKeys>
void operands_in_8_bits() {
  operands<float_e4m3_t, kHeadDim, kKeys, kHeadDim>({"keys-in-8-bits", "values-in-8-bits", "column-in-8-bits", "row-in-8-bits",
                                                     "piece-in-8-bits", "value-piece-in-8-bits"});
}

// Weights in tensor memory: bytes from the first one of a row to each, and each multiplication's first column.
template <class T>
void weights(const char* name) {
  constexpr int kSummed = 32 / sizeof(T);
  auto shape = make_shape(Shape<_128, Int<kSummed>>{}, _1{}, Int<128 / kSummed>{});
  auto all = UMMA::tmem_frg_1sm<T, T, UMMA::TmemAllocMode::NonInterleaved>::make(shape);
  for (int key = 0; key < 128; key++) {
    auto place = all.layout()(make_coord(0, key % kSummed), 0, key / kSummed) * sizeof(T);
    show(name, 0, key, u64(place), key * sizeof(T));
  }
  for (int i = 0; i < 128 / kSummed; i++)
    show(name, 1, i, raw_pointer_cast(all(make_coord(_, _), _, i).data()), 8 * i);
}

int main() {
  shapes<32>(), shapes<64>(), shapes<96>(), shapes<128>();
  operands<32, 128>(), operands<64, 128>(), operands<96, 128>(), operands<128, 128>(), operands<128, 96>();
  operands_in_8_bits<64, 128>(), operands_in_8_bits<128, 128>(), operands_in_8_bits<128, 96>(), operands_in_8_bits<64, 32>();
  weights<bfloat16_t>("weights"), weights<float_e4m3_t>("weights-in-8-bits");
}
