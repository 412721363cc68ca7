// Sums of the queries' gradients, which a fused backward adds up in 32 bits, to gradients of 16 bits.
//
// A row has 32 columns after the other: pieces 2 q and 2 q + 1 of four are columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of the
// first and the second 16 columns (backward.cu, hand_over).
typedef long long i64;

#if FLOAT16
#define PACK "cvt.rn.f16x2.f32 %0, %1, %2;"
#else
#define PACK "cvt.rn.bf16x2.f32 %0, %1, %2;"
#endif
__device__ __forceinline__ unsigned int pack(float low, float high) {
  unsigned int r;
  asm(PACK : "=r"(r) : "f"(high), "f"(low));
  return r;
}

struct Rounding {
  const float4* sums;  // [rows, columns of sums / 4]
  void* to;            // 16-bit floats
  i64 strides[3];      // elements from one batch entry, head, token of the result to the next
  i64 rows;
  int heads, tokens, head_dim, pieces;  // pieces of 16 columns in a row of sums
};

extern "C" __global__ void __launch_bounds__(256) gna_round(const __grid_constant__ Rounding P) {
  const i64 piece = (i64)blockIdx.x * 256 + threadIdx.x, row = piece / P.pieces;
  const int column = (int)(piece % P.pieces) * 16;
  if (row >= P.rows || column >= P.head_dim) return;
  const i64 token = row % P.tokens, head = row / P.tokens % P.heads, batch = row / P.tokens / P.heads;
  uint4* to = (uint4*)((unsigned short*)P.to + batch * P.strides[0] + head * P.strides[1] + token * P.strides[2] + column);
  float4 x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = P.sums[8 * (piece / 2) + 2 * i + piece % 2];
  to[0] = make_uint4(pack(x[0].x, x[0].y), pack(x[1].x, x[1].y), pack(x[2].x, x[2].y), pack(x[3].x, x[3].y));
  if (column + 8 < P.head_dim)
    to[1] = make_uint4(pack(x[0].z, x[0].w), pack(x[1].z, x[1].w), pack(x[2].z, x[2].w), pack(x[3].z, x[3].w));
}
