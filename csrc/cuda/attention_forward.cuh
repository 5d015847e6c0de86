/* attention_forward.cuh - causal attention forward on tensor cores, for prompts, training and decoding alike.
 *
 * A block has 16 WARPS rows of one kv head (attention_common.cuh) and goes over the keys they see in tiles of BN,
 * one tile being copied while the one before is worked on; the softmax's maximum and sum are kept per row and
 * corrected as it goes (Milakov & Gimelshein 2018; Dao 2023).  Decoding has few rows and many keys: then the
 * keys are cut into pieces of a.chunk, and pylora_attention_combine puts the pieces' sums together.
 * Scores, softmax and sums are float32; P is rounded to the 16-bit type for P V. */
#ifndef PYLORA_ATTENTION_FORWARD_CUH
#define PYLORA_ATTENTION_FORWARD_CUH

#include "attention_tensor.cuh"

/* Writes a row's result, or its piece's. */
template <int DT>
DEVICE void forward_row(const AttentionArgs &a, const Span &s, int kv, int32_t R, float top,
                        float sum, const float (&acc)[DT / 8][4], int half) {
  const int pair = threadIdx.x % 4;
  const int64_t q = s.q0 + R / a.group, head = kv * a.group + R % a.group;
  if (a.splits > 1) {
    const int64_t at = ((int64_t)blockIdx.y * a.q.rows + q) * a.heads + head;
    ATTENTION_UNROLL
    for (int c = 0; c < DT / 8; c++)
      if (8 * c < a.D && sum != 0) { /* 0: no keys, and nobody reads acc */
        float2 f;
        f.x = acc[c][2 * half], f.y = acc[c][2 * half + 1];
        *(float2 *)(a.part_o + at * a.D + 8 * c + 2 * pair) = f;
      }
    if (pair == 0) a.part_ml[2 * at] = top, a.part_ml[2 * at + 1] = sum;
    return;
  }
  const float inverse = 1 / sum;
  const int64_t at = q * a.o.ld + head * a.D + 2 * pair;
  ATTENTION_UNROLL
  for (int c = 0; c < DT / 8; c++)
    if (8 * c < a.D)
      attention_store2(a.o, at + 8 * c, acc[c][2 * half] * inverse, acc[c][2 * half + 1] * inverse,
                       a.pairs);
  if (pair == 0) ((float *)a.lse.p)[q * a.lse.ld + head] = top * ATTENTION_LN2 + logf(sum);
}

template <int DTYPE, int DT, int WARPS, int BN>
DEVICE void attention_forward_tile(const AttentionArgs &a) {
  enum { ROWS = 16 * WARPS, THREADS = WARP * WARPS, N = BN / 8 };
  DYNAMIC_SHARED(uint16_t, shared);
  SHARED(int32_t, marks, BN);
  uint16_t *const Q = shared, *const KV = shared + ROWS * DT; /* [2 stages][k, v][BN][DT] */
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane % 4;
  const int kv = blockIdx.x % a.kv_heads;
  const int64_t rest = blockIdx.x / a.kv_heads;
  /* The last rows see most keys: they go first. */
  const int32_t row0 = (int32_t)(a.tiles - 1 - rest / a.n) * ROWS;
  const Span s = attention_span(a, rest % a.n);
  const int32_t rows = s.queries * a.group;
  if (row0 >= rows) return;

  KeyRange r = attention_keys(a, s, row0, rows < row0 + ROWS ? rows : row0 + ROWS);
  attention_piece(a, blockIdx.y, BN, &r);
  const bool idle = row0 + 16 * warp >= rows; /* a warp without rows helps to copy */
  const int32_t R = row0 + 16 * warp + lane / 4;
  const int32_t pos[2] = {R / a.group + s.off, (R + 8) / a.group + s.off};
  const float scale = a.scale * ATTENTION_LOG2E, none = float_of_bits(0xff800000u);
  float acc[DT / 8][4], top[2] = {none, none}, sum[2] = {0, 0};
  if (!s.ok) sum[0] = sum[1] = quiet_nan();
  ATTENTION_UNROLL
  for (int c = 0; c < DT / 8; c++) acc[c][0] = acc[c][1] = acc[c][2] = acc[c][3] = 0;

  int32_t j0 = r.first / BN * BN;
  if (j0 < r.end) {
    copy_queries<DT, ROWS, THREADS>(a, a.q, s, kv, row0, Q);
    copy_keys<DT, BN, THREADS>(a, a.k, s.k0 + j0, s.k0 + r.end, kv, KV);
    copy_keys<DT, BN, THREADS>(a, a.v, s.k0 + j0, s.k0 + r.end, kv, KV + BN * DT);
    copy_async_commit();
  }
  for (int stage = 0; j0 < r.end; j0 += BN, stage ^= 1) {
    uint16_t *const K = KV + stage * 2 * BN * DT, *const V = K + BN * DT;
    if (r.end - j0 > BN) {
      uint16_t *const next = KV + (stage ^ 1) * 2 * BN * DT;
      copy_keys<DT, BN, THREADS>(a, a.k, s.k0 + j0 + BN, s.k0 + r.end, kv, next);
      copy_keys<DT, BN, THREADS>(a, a.v, s.k0 + j0 + BN, s.k0 + r.end, kv, next + BN * DT);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const bool edge = j0 < r.first || j0 < r.whole || r.end - j0 < BN || r.shared - j0 < BN;
    if (edge)
      for (int j = threadIdx.x; j < BN; j += THREADS) marks[j] = 0;
    __syncthreads();
    if (edge) {
      mark_not_finite<DTYPE, DT, BN, THREADS>(V, marks);
      __syncthreads();
    }
    if (!idle) {
      float w[N][4];
      tile_scores<DTYPE, DT, N>(w, Q, 16 * warp, K);
      float high[2] = {top[0], top[1]};
      ATTENTION_UNROLL
      for (int j = 0; j < N; j++) ATTENTION_UNROLL
      for (int e = 0; e < 4; e++) {
        w[j][e] *= scale;
        if (edge) {
          const int32_t key = j0 + 8 * j + 2 * pair + e % 2;
          if (!attention_sees(pos[e / 2], a.window, key) || key < r.first || key >= r.end)
            w[j][e] = none;
          else if (marks[8 * j + 2 * pair + e % 2])
            w[j][e] = quiet_nan();
        }
        high[e / 2] = fmaxf(high[e / 2], w[j][e]);
      }
      ATTENTION_UNROLL
      for (int h = 0; h < 2; h++) {
        high[h] = fmaxf(high[h], __shfl_xor_sync(ALL_LANES, high[h], 1));
        high[h] = fmaxf(high[h], __shfl_xor_sync(ALL_LANES, high[h], 2));
        const float least = high[h] == none ? 0 : high[h]; /* a row that has seen no key yet */
        const float correct = exp2f(top[h] - least);
        top[h] = high[h], high[h] = least;
        sum[h] *= correct;
        ATTENTION_UNROLL
        for (int c = 0; c < DT / 8; c++) acc[c][2 * h] *= correct, acc[c][2 * h + 1] *= correct;
      }
      ATTENTION_UNROLL
      for (int j = 0; j < N; j++) ATTENTION_UNROLL
      for (int e = 0; e < 4; e++) {
        w[j][e] = exp2f(w[j][e] - high[e / 2]);
        sum[e / 2] += w[j][e];
      }
      tile_weighted<DTYPE, DT, N>(acc, w, V);
    }
    __syncthreads();
  }
  if (idle) return;
  ATTENTION_UNROLL
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], 1);
    sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], 2);
  }
  if (R < rows) forward_row<DT>(a, s, kv, R, top[0], sum[0], acc, 0);
  if (R + 8 < rows) forward_row<DT>(a, s, kv, R + 8, top[1], sum[1], acc, 1);
}

/* _8: many rows; _1: few of them, and one warp a block. */
#define ATTENTION_FORWARD(type, TYPE, DT, BN)                                                 \
  KERNEL __launch_bounds__(256) pylora_attention_forward_##type##_##DT##_8(AttentionArgs a) { \
    attention_forward_tile<TYPE, DT, 8, BN>(a);                                               \
  }                                                                                           \
  KERNEL __launch_bounds__(32) pylora_attention_forward_##type##_##DT##_1(AttentionArgs a) {  \
    attention_forward_tile<TYPE, DT, 1, 32>(a);                                               \
  }
ATTENTION_FORWARD(bf16, PYLORA_BF16, 64, 64)
ATTENTION_FORWARD(bf16, PYLORA_BF16, 128, 64)
ATTENTION_FORWARD(bf16, PYLORA_BF16, 256, 32)
ATTENTION_FORWARD(f16, PYLORA_F16, 64, 64)
ATTENTION_FORWARD(f16, PYLORA_F16, 128, 64)
ATTENTION_FORWARD(f16, PYLORA_F16, 256, 32)
#undef ATTENTION_FORWARD

#endif
