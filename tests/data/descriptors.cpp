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
void shape(const char* name, bool float16) {
  auto cutlass = UMMA::make_instr_desc<T, T, float, 128, kColumns, UMMA::Major::K, kMajor>();
  show(name, float16, kColumns, u32(cutlass), mma_shape(128, kColumns, kMajor == UMMA::Major::MN, float16));
}

template <int kColumns>
void shapes() {
  shape<bfloat16_t, kColumns, UMMA::Major::K>("scores", false);
  shape<bfloat16_t, kColumns, UMMA::Major::MN>("values", false);
  shape<half_t, kColumns, UMMA::Major::K>("scores", true);
  shape<half_t, kColumns, UMMA::Major::MN>("values", true);
}

// Rows of kHeadDim columns as boxes leave them in shared memory: a chunk of 64 or 32 columns after the other.
template <int kHeadDim, int kKeys>
void operands() {
  constexpr int kColumns = kHeadDim % 64 == 0 ? 64 : 32, kRowBytes = 2 * kColumns, kChunk = kKeys * kRowBytes;
  using Keys = conditional_t<kColumns == 64, UMMA::Layout_K_SW128_Atom<bfloat16_t>, UMMA::Layout_K_SW64_Atom<bfloat16_t>>;
  using Values = conditional_t<kColumns == 64, UMMA::Layout_MN_SW128_Atom<bfloat16_t>, UMMA::Layout_MN_SW64_Atom<bfloat16_t>>;
  alignas(1024) static bfloat16_t memory[kKeys * kHeadDim];
  auto keys = make_tensor(make_smem_ptr(memory), tile_to_shape(Keys{}, Shape<Int<kKeys>, Int<kHeadDim>>{}));
  auto values = make_tensor(make_smem_ptr(memory), tile_to_shape(Values{}, Shape<Int<kHeadDim>, Int<kKeys>>{}, Step<_2, _1>{}));
  auto k = UMMA::make_umma_desc<UMMA::Major::K>(local_tile(keys, Shape<Int<kKeys>, _16>{}, make_coord(0, 0)));
  auto v = UMMA::make_umma_desc<UMMA::Major::MN>(local_tile(values, Shape<Int<kHeadDim>, _16>{}, make_coord(0, 0)));
  // Host code has no shared addresses: those of CUTLASS's descriptors are 0.
  show("keys", kHeadDim, kKeys, k.desc_, operand(0, 16, 8 * kRowBytes, kRowBytes));
  show("values", kHeadDim, kKeys, v.desc_, operand(0, kHeadDim > kColumns ? kChunk : 0, 8 * kRowBytes, kRowBytes));
  // Where each multiplication's 16 columns, or 16 keys, begin; and where each element of a chunk is.
  auto at = [&](auto const& tensor, int i, int j) { return u64(&tensor(i, j) - &tensor(0, 0)) * 2; };
  for (int i = 0; i < kHeadDim / 16; i++)
    show("column", kHeadDim, i, at(keys, 0, 16 * i), i / (kColumns / 16) * kChunk + i % (kColumns / 16) * 32);
  for (int i = 0; i < kKeys / 16; i++) show("row", kHeadDim, i, at(values, 0, 16 * i), i * 16 * kRowBytes);
  for (int row = 0; row < kKeys; row++)
    for (int piece = 0; piece < kColumns / 8; piece++) {
      const int swizzled = kColumns == 64 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
      show("piece", row, piece, at(keys, row, 8 * piece), row * kRowBytes + swizzled * 16);
      show("value-piece", row, piece, at(values, 8 * piece, row), row * kRowBytes + swizzled * 16);
    }
}

int main() {
  shapes<32>(), shapes<64>(), shapes<96>(), shapes<128>();
  operands<32, 128>(), operands<64, 128>(), operands<96, 128>(), operands<128, 128>(), operands<128, 96>();
}
