// Instructions that only Blackwell (sm_100 and its family) has: tensor memory, its matrix multiplication, packed floats.
#pragma once
#include "common/items.cuh"

// One thread of a warp, always the same. Unlike with a comparison of its number, the compiler knows that it is one: it need
// not put each instruction that one thread issues for all into a loop over threads.
__device__ __forceinline__ bool is_leader() {
  u32 leads;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(leads));
  return leads;
}

// ---- tensor memory: 128 lanes of 512 columns of 32 bits. An address is a lane in the upper 16 bits, a column in the lower.

// All of it, to be called by one warp; its address is written to shared memory. No other CTA gets any.
__device__ __forceinline__ void memory_alloc(u32 to) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 512;" ::"r"(to) : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}

__device__ __forceinline__ void memory_free(u32 memory) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 512;" ::"r"(memory));
}

// Order between tensor memory and barriers: `before` an arrival that tells others, `after` a wait that was told.
__device__ __forceinline__ void fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ __forceinline__ void fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

__device__ __forceinline__ void memory_stored() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

#define OUT4(r, i) "=r"(r[i]), "=r"(r[i + 1]), "=r"(r[i + 2]), "=r"(r[i + 3])
#define IN4(r, i) "r"(r[i]), "r"(r[i + 1]), "r"(r[i + 2]), "r"(r[i + 3])
#define OUT16(r, i) OUT4(r, i), OUT4(r, i + 4), OUT4(r, i + 8), OUT4(r, i + 12)
#define IN16(r, i) IN4(r, i), IN4(r, i + 4), IN4(r, i + 8), IN4(r, i + 12)

// 32 columns of a thread's lane. The registers are valid only after memory_loaded() of them.
__device__ __forceinline__ void memory_load(u32 (&r)[32], u32 from) {
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
               " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];"
               : OUT16(r, 0), OUT16(r, 16) : "r"(from) : "memory");
}

__device__ __forceinline__ void memory_store(u32 to, const u32 (&r)[32]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14,"
               " %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31};"
               ::IN16(r, 0), IN16(r, 16), "r"(to) : "memory");
}

__device__ __forceinline__ void memory_store(u32 to, const u32 (&r)[8]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x8.b32 [%8], {%0, %1, %2, %3, %4, %5, %6, %7};" ::IN4(r, 0), IN4(r, 4), "r"(to)
               : "memory");
}

__device__ __forceinline__ void memory_store(u32 to, const u32 (&r)[16]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x16.b32 [%16], {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14,"
               " %15};" ::IN16(r, 0), "r"(to) : "memory");
}

// Waits for all loads so far; nothing that uses these registers can move before it.
template <int N>
__device__ __forceinline__ void memory_loaded(u32 (&r)[N][32]) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+r"(r[n][i])::"memory");
}

#undef OUT4
#undef IN4
#undef OUT16
#undef IN16

// ---- matrix multiplication, issued by one thread; d is in tensor memory

#if FLOAT8
#define MMA "tcgen05.mma.cta_group::1.kind::f8f6f4"
#else
#define MMA "tcgen05.mma.cta_group::1.kind::f16"
#endif
constexpr u32 kTypes = FLOAT16 || FLOAT8 ? 0 : 1;  // number of the type of operands in its kind: float16, e4m3; bfloat16

// d (+)= a b with both operands in shared memory.
__device__ __forceinline__ void mma_shared(u32 d, u64 a, u64 b, u32 shape, u32 accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\n" MMA " [%0], %1, %2, %3, p;\n}"
               ::"r"(d), "l"(a), "l"(b), "r"(shape), "r"(accumulate) : "memory");
}

// d (+)= a b with a in tensor memory.
__device__ __forceinline__ void mma_memory(u32 d, u32 a, u64 b, u32 shape, u32 accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\n" MMA " [%0], [%1], %2, %3, p;\n}"
               ::"r"(d), "r"(a), "l"(b), "r"(shape), "r"(accumulate) : "memory");
}

// Arrives at a barrier once all multiplications that this thread has issued are complete.
__device__ __forceinline__ void mma_commit(u32 bar) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(bar) : "memory");
}

// Shared-memory operand with rows of row_bytes, 128 or 64 (which is also its swizzle); distances in bytes.
__host__ __device__ constexpr u64 operand(u32 address, u32 leading, u32 stride, u32 row_bytes) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 46 |
         (row_bytes == 128 ? 2ull : 4ull) << 61;
}

// Shape of a multiplication into 32-bit floats; `transposed`: b has its columns side by side.
__host__ __device__ constexpr u32 mma_shape(u32 rows, u32 columns, bool transposed, u32 types) {
  return 1u << 4 | types << 7 | types << 10 | (transposed ? 1u << 16 : 0u) | columns >> 3 << 17 | rows >> 4 << 24;
}

// ---- two floats at a time

__device__ __forceinline__ u64 pair(float x, float y) {
  u64 r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "f"(x), "f"(y));
  return r;
}

__device__ __forceinline__ void unpair(u64 r, float& x, float& y) { asm("mov.b64 {%0, %1}, %2;" : "=f"(x), "=f"(y) : "l"(r)); }

__device__ __forceinline__ u64 fma2(u64 a, u64 b, u64 c) {
  u64 r;
  asm("fma.rn.ftz.f32x2 %0, %1, %2, %3;" : "=l"(r) : "l"(a), "l"(b), "l"(c));
  return r;
}

__device__ __forceinline__ u64 add2(u64 a, u64 b) {
  u64 r;
  asm("add.rn.ftz.f32x2 %0, %1, %2;" : "=l"(r) : "l"(a), "l"(b));
  return r;
}

// Rounds down.
__device__ __forceinline__ u64 add2_down(u64 a, u64 b) {
  u64 r;
  asm("add.rm.ftz.f32x2 %0, %1, %2;" : "=l"(r) : "l"(a), "l"(b));
  return r;
}

__device__ __forceinline__ u64 multiply2(u64 a, u64 b) {
  u64 r;
  asm("mul.rn.ftz.f32x2 %0, %1, %2;" : "=l"(r) : "l"(a), "l"(b));
  return r;
}

// Four floats as one register of e4m3, the first one in the lowest byte.
__device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
  u32 r;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}" : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

// 16 bytes to shared memory.
__device__ __forceinline__ void store_shared(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
