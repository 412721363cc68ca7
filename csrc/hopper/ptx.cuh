// Instructions that only Hopper has, or only its kernel needs: matrix multiplication of a warpgroup.
#pragma once
#include "common/items.cuh"

// ---- matrix multiplication of a warpgroup; the instructions themselves are generated for the tile sizes

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins an accumulator in its registers between asm statements.
template <int N>
__device__ __forceinline__ void keep(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void load_matrices(u32 from, u32* to) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_four(u32 to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// In one piece, which the compiler would not promise, and for the L2 cache to give up first: nobody reads it soon.
__device__ __forceinline__ void store_global(void* to, const u32 (&x)[4]) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// ---- bits and bytes

// `count` bits from bit `first` on; none beyond the word.
__device__ __forceinline__ u32 bits(u32 first, u32 count) {
  u32 r;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(r) : "r"(first), "r"(count));
  return r;
}

// Four bytes out of eight, each as chosen by four bits, of which the highest asks for eight copies of the byte's sign.
__device__ __forceinline__ u32 pick_bytes(u32 low, u32 high, u32 choice) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(choice));
  return r;
}

// Words of four threads side by side become those of one: thread `lane_class` gets its word of each.
__device__ __forceinline__ void transpose(u32 (&words)[4], int lane_class) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool high = lane_class & step;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      u32 &low_word = words[i], &high_word = words[i + step];
      const u32 other = __shfl_xor_sync(~0u, high ? low_word : high_word, step);
      if (high) low_word = other;
      else high_word = other;
    }
  }
}

// ---- matrix multiplication of a warp: c[16, 8] += a[16, 16] b[16, 8]

__device__ __forceinline__ void mma_warp(float* c, const u32* a, const u32* b) {
#if FLOAT16
#define KINDS "f16.f16"
#else
#define KINDS "bf16.bf16"
#endif
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KINDS ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#undef KINDS
}
