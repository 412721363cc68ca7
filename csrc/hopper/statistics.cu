// What the passes of backward read of every query: its log-sum-exp in base 2, and delta, as backward.cu has it.
typedef unsigned int u32;
typedef long long i64;

#if FLOAT16
__device__ __forceinline__ float2 unpack(u32 pair) {
  float2 r;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(r.x), "=f"(r.y) : "r"(pair));
  return r;
}
#else
__device__ __forceinline__ float2 unpack(u32 pair) {
  return make_float2(__int_as_float(pair << 16), __int_as_float(pair & 0xffff0000u));
}
#endif

struct Statistics {
  const void *out, *grad;                   // 16-bit floats
  const float *lse, *grad_lse;              // [batch, heads, tokens], natural logarithm; grad_lse may be null
  float2* to;                               // [batch, heads, tokens]
  i64 out_strides[3], grad_strides[3];      // elements from one batch entry, head, token to the next
  u32 rows, heads, tokens, head_dim;
  float scale;
};

constexpr int kLanes = 16;  // that share a row, 8 columns at a time

extern "C" __global__ void __launch_bounds__(256) gna_statistics(const __grid_constant__ Statistics P) {
  const u32 row = blockIdx.x * (256 / kLanes) + threadIdx.x / kLanes;
  const u32 lane = threadIdx.x % kLanes;
  float sum = 0.f;
  if (row < P.rows) {
    // Divisions of 64 bits would take a fifth of the time.
    const u32 token = row % P.tokens, head = row / P.tokens % P.heads, batch = row / P.tokens / P.heads;
    const i64 out = batch * P.out_strides[0] + head * P.out_strides[1] + token * P.out_strides[2];
    const i64 grad = batch * P.grad_strides[0] + head * P.grad_strides[1] + token * P.grad_strides[2];
    for (u32 column = 8 * lane; column < P.head_dim; column += 8 * kLanes) {
      const uint4 a = __ldcs((const uint4*)((const unsigned short*)P.out + out + column));
      const uint4 b = __ldcs((const uint4*)((const unsigned short*)P.grad + grad + column));
      const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 u = unpack(x[i]), v = unpack(y[i]);
        sum += u.x * v.x + u.y * v.y;
      }
    }
  }
#pragma unroll
  for (int i = kLanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (row < P.rows && lane == 0) {
    const float less = P.grad_lse ? P.grad_lse[row] : 0.f, lse = P.lse[row], infinity = __int_as_float(0x7f800000);
    // A query that saw no key has no weights: they are exponentials of scores less this.
    P.to[row] = make_float2(lse == -infinity ? infinity : lse * 1.4426950408889634f, (sum - less) * P.scale);
  }
}
