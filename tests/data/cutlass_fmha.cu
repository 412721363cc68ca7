// CUTLASS's example 77, attention forward for Blackwell: its kernel, and the parameters that its own host code makes for it.
// No GPU is needed: cuTensorMapEncodeTiled, here, keeps its arguments in the 128 bytes of the map, behind a magic number.
//
// Compile-time: HEAD_DIM, ELEMENT (cutlass::half_t or bfloat16_t), MASK (of CUTLASS's).
// Arguments: queries, keys, query heads of a key head, key heads, batch, CTAs, then addresses of q, k, v, o and the log-sum-exp.
// Output: "blocks threads shared_bytes", and the parameters, all in hexadecimal.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/kernel_hardware_info.h"
#include "collective/fmha_fusion.hpp"
#include "collective/sm100_fmha_fwd_epilogue_tma_warpspecialized.hpp"
#include "collective/sm100_fmha_fwd_mainloop_tma_warpspecialized.hpp"
#include "kernel/fmha_options.hpp"
#include "kernel/fmha_tile_scheduler.hpp"
#include "kernel/sm100_fmha_fwd_kernel_tma_warpspecialized.hpp"
using namespace cute;
using namespace cutlass::fmha;

using Element = ELEMENT;
using Heads = tuple<tuple<int, int>, int>;  // query heads of a key head, key heads; batch
using Problem = tuple<int, int, int, Heads>;
using Queries = tuple<int, _1, Heads>;
using Keys = tuple<int, _1, tuple<tuple<_0, int>, int>>;
using Mainloop = collective::Sm100FmhaFwdMainloopTmaWarpspecialized<
    Element, float, float, Shape<_256, _128, Int<HEAD_DIM>>, Queries, Keys, Keys, MASK>;
using Epilogue =
    collective::Sm100FmhaFwdEpilogueTmaWarpspecialized<Element, float, Mainloop::TileShapePV, Queries, tuple<_1, Heads>>;
using Kernel = kernel::Sm100FmhaFwdKernelTmaWarpspecialized<Problem, Mainloop, Epilogue, kernel::PersistentTileScheduler>;

constexpr unsigned long long kMagic = 0x70616d20726f736e;

extern "C" CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims, const cuuint64_t* strides,
    const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  struct {
    unsigned long long magic, address, dims[5], strides[4];
    unsigned short box[5];
    unsigned char steps[5], rank, type, interleave, swizzle, fill;
  } kept = {kMagic};
  static_assert(sizeof kept <= sizeof *map);
  kept.address = (unsigned long long)address, kept.rank = rank, kept.type = type;
  kept.interleave = interleave, kept.swizzle = swizzle, kept.fill = fill;
  for (unsigned i = 0; i < rank; i++) kept.dims[i] = dims[i], kept.box[i] = box[i], kept.steps[i] = steps[i];
  for (unsigned i = 0; i + 1 < rank; i++) kept.strides[i] = strides[i];
  memset(map, 0, sizeof *map);
  memcpy(map, &kept, sizeof kept);
  return CUDA_SUCCESS;
}

extern "C" __global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, 1) fmha(const __grid_constant__ Kernel::Params params) {
  extern __shared__ char shared[];
  Kernel()(params, shared);
}

int main(int, char** arguments) {
  auto number = [&](int i) { return (int)atol(arguments[i]); };
  auto pointer = [&](int i) { return strtoull(arguments[i], nullptr, 0); };
  const int queries = number(1), keys = number(2), group = number(3), heads = number(4), batch = number(5), all = group * heads;
  const Problem problem{queries, keys, HEAD_DIM, Heads{{group, heads}, batch}};
  // Heads lie within a token.
  const Queries q{all * HEAD_DIM, {}, {{HEAD_DIM, group * HEAD_DIM}, queries * all * HEAD_DIM}};
  const Keys k{heads * HEAD_DIM, {}, {{{}, HEAD_DIM}, keys * heads * HEAD_DIM}};
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = number(6);
  const Kernel::Arguments given{
      problem,
      {{(Element*)pointer(7), q, (Element*)pointer(8), k, (Element*)pointer(9), k}},
      {(Element*)pointer(10), q, (float*)pointer(11), {{}, {{queries, queries * group}, queries * all}}},
      hardware};
  if (!Kernel::can_implement(given)) return 1;
  const Kernel::Params params = Kernel::to_underlying_arguments(given, nullptr);
  const dim3 grid = Kernel::get_grid_shape(params);
  printf("%x %x %x ", grid.x, Kernel::MaxThreadsPerBlock, Kernel::SharedStorageSize);
  for (size_t i = 0; i < sizeof params; i++) printf("%02x", ((const unsigned char*)&params)[i]);
  printf("\n");
}
