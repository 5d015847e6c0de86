/* attention_backward.cuh - the gradients of attention on tensor cores: P is computed again from lse, a block owns what
 * it sums, and so every sum has one order and nothing is added across blocks.
 *
 * pylora_attention_delta is first.  Then a block has 64 keys of a kv head and goes over the rows (of all the
 * group's heads) that see them: dv = Pᵀ do, dk = scale dSᵀ q; and a block of another kernel has 64 rows and goes over
 * their keys: dq = scale dS k.  Scores, P and dS are float32; P and dS are rounded to the 16-bit type for products. */
#ifndef PYLORA_ATTENTION_BACKWARD_CUH
#define PYLORA_ATTENTION_BACKWARD_CUH

#include "attention_tensor.cuh"

/* The largest finite |do| that each block meets. */
KERNEL pylora_attention_largest(View d_o, float *largest) {
  SHARED(float, scratch, WARP);
  float most = 0;
  for (int64_t i = blockIdx.x; i < d_o.rows; i += gridDim.x)
    for (int64_t c = threadIdx.x; c < d_o.cols; c += blockDim.x) {
      const float x = fabsf(load(d_o.p, d_o.dtype, i * d_o.ld + c));
      if (x < float_of_bits(0x7f800000u)) most = fmaxf(most, x);
    }
  most = block_max(most, scratch);
  if (threadIdx.x == 0) largest[blockIdx.x] = most;
}
/* The power of two that brings the largest of them to [4, 8): gradients are often too small for float16. */
KERNEL pylora_attention_factor(const float *largest, int32_t n, float *factor) {
  SHARED(float, scratch, WARP);
  float most = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) most = fmaxf(most, largest[i]);
  most = block_max(most, scratch);
  int exponent = 129 - (int)(bits_of_float(most) >> 23);
  exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
  if (threadIdx.x == 0) *factor = most > 0 ? float_of_bits((uint32_t)(127 + exponent) << 23) : 1;
}

/* delta = rowsum(do o), a warp per row and head.  `copy` not NULL: do times the factor goes there in 16 bits,
 * [m, heads * D], and delta is that of the rounded numbers, which is what the products see. */
KERNEL pylora_attention_delta(AttentionArgs a, uint16_t *copy) {
  const int lane = threadIdx.x % WARP;
  const int64_t index = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (index >= a.q.rows * a.heads) return;
  const int64_t row = index / a.heads, col = index % a.heads * a.D;
  const float factor = a.factor ? *a.factor : 1;
  float sum = 0;
  for (int c = lane; c < a.D; c += WARP) {
    float x = load(a.d_o.p, a.d_o.dtype, row * a.d_o.ld + col + c) * factor;
    if (copy) {
      const int64_t at = row * a.heads * a.D + col + c;
      store(copy, a.q.dtype, at, x);
      x = load(copy, a.q.dtype, at);
    }
    sum = fmaf(x, load(a.o.p, a.o.dtype, row * a.o.ld + col + c), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) a.delta[index] = sum;
}

/* What a block that owns keys knows of one row; pos -1: there is no such row, or it sees nothing. */
struct RowFacts {
  float lse, delta;
  int32_t pos;
};
DEVICE RowFacts row_facts(const AttentionArgs &a, const Span &s, int kv, int32_t R) {
  RowFacts f;
  f.lse = f.delta = 0, f.pos = -1;
  if (R >= s.queries * a.group) return f;
  const int64_t q = s.q0 + R / a.group, head = kv * a.group + R % a.group;
  f.lse = ((const float *)a.lse.p)[q * a.lse.ld + head];
  f.delta = a.delta[q * a.heads + head];
  f.pos = R / a.group + s.off;
  return f;
}

/* The keys that a block owns: rows row0 .. of k and v.  Without k_start each sequence has its own blocks; with it
 * sequences may have keys in common, and a block asks all of them, in their order. */
struct KeyBlock {
  int64_t row0, first, end; /* sequences first .. end-1 */
  int kv;
};
DEVICE KeyBlock key_block(const AttentionArgs &a, int keys) {
  KeyBlock b;
  int64_t rest = blockIdx.x / a.kv_heads;
  b.kv = blockIdx.x % a.kv_heads;
  if (a.k_start) {
    b.row0 = rest * keys, b.first = 0, b.end = a.n;
  } else {
    b.first = rest % a.n, b.end = b.first + 1;
    b.row0 = a.q_start[b.first] + rest / a.n * keys;
  }
  return b;
}
/* The rows [from, end) of a sequence that see any of the keys j0 .. j0+n-1; false: it has none of those keys. */
DEVICE bool rows_of_keys(const AttentionArgs &a, const Span &s, int64_t j0, int n, int32_t *from,
                         int32_t *end) {
  if (!s.ok || s.queries == 0 || j0 >= s.keys || j0 + n <= 0) return false;
  const int32_t low = j0 > 0 ? (int32_t)j0 : 0;
  const int32_t high = j0 + n < s.keys ? (int32_t)j0 + n : s.keys;
  const int32_t t0 = low - s.off > 0 ? low - s.off : 0;
  int64_t t1 = (int64_t)high - 1 - s.off + a.window;
  if (t1 > s.queries) t1 = s.queries;
  if (t1 < t0) t1 = t0;
  *from = t0 * a.group, *end = (int32_t)t1 * a.group;
  return true;
}
/* Does every row of R .. R+rows-1 see every key of j0 .. j0+n-1? */
DEVICE bool all_see_all(const AttentionArgs &a, const Span &s, int32_t R, int rows, int64_t j0,
                        int n) {
  return j0 >= 0 && j0 + n <= s.keys && R + rows <= s.queries * a.group &&
         R / a.group + s.off >= j0 + n - 1 &&
         (int64_t)(R + rows - 1) / a.group + s.off - a.window < j0;
}

/* dv, dk or both, of 64 keys; BM rows at a time. */
template <int DTYPE, int DT, int BM, bool DV, bool DK>
DEVICE void attention_keys_tile(const AttentionArgs &a) {
  enum { BN = 64, THREADS = 128, N = BM / 8 };
  DYNAMIC_SHARED(uint16_t, shared);
  SHARED(float, lse, 2 * BM);
  SHARED(float, delta, 2 * BM);
  SHARED(int32_t, pos, 2 * BM);
  SHARED(int32_t, marks, BM);
  uint16_t *const K = shared, *const V = K + BN * DT;
  uint16_t *const QO = V + BN * DT; /* [2 stages][q, do][BM][DT] */
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane % 4;
  const KeyBlock b = key_block(a, BN);
  const int own = 16 * warp + lane / 4; /* and own + 8 */
  const float scale = a.scale * ATTENTION_LOG2E;
  float dv[DT / 8][4], dk[DT / 8][4];
  bool used[2] = {false, false}, loaded = false;
  ATTENTION_UNROLL
  for (int c = 0; c < DT / 8; c++) ATTENTION_UNROLL
  for (int e = 0; e < 4; e++) dv[c][e] = dk[c][e] = 0;

  for (int64_t i = b.first; i < b.end; i++) {
    const Span s = attention_span(a, i);
    const int64_t j0 = b.row0 - s.k0;
    int32_t R, end;
    if (!rows_of_keys(a, s, j0, BN, &R, &end)) continue;
    int32_t key[2]; /* of the sequence; ATTENTION_MOST: not one of it */
    ATTENTION_UNROLL
    for (int h = 0; h < 2; h++) {
      const int64_t j = j0 + own + 8 * h;
      key[h] = j >= 0 && j < s.keys ? (int32_t)j : ATTENTION_MOST;
      used[h] = used[h] || key[h] != ATTENTION_MOST;
    }
    if (R >= end) continue;
    R = R / BM * BM;
    if (!loaded) {
      copy_keys<DT, BN, THREADS>(a, a.k, b.row0, a.k.rows, b.kv, K);
      if (DK) copy_keys<DT, BN, THREADS>(a, a.v, b.row0, a.k.rows, b.kv, V);
      loaded = true;
    }
    copy_queries<DT, BM, THREADS>(a, a.q, s, b.kv, R, QO);
    copy_queries<DT, BM, THREADS>(a, a.d_o, s, b.kv, R, QO + BM * DT);
    copy_async_commit();
    RowFacts facts;
    if (threadIdx.x < BM) facts = row_facts(a, s, b.kv, R + threadIdx.x);
    for (int stage = 0; R < end; R += BM, stage ^= 1) {
      uint16_t *const Q = QO + stage * 2 * BM * DT, *const O = Q + BM * DT;
      const bool edge = !all_see_all(a, s, R, BM, j0, BN);
      if (threadIdx.x < BM) {
        lse[stage * BM + threadIdx.x] = facts.lse * ATTENTION_LOG2E;
        delta[stage * BM + threadIdx.x] = facts.delta;
        pos[stage * BM + threadIdx.x] = facts.pos;
        marks[threadIdx.x] = 0;
      }
      if (end - R > BM) {
        uint16_t *const next = QO + (stage ^ 1) * 2 * BM * DT;
        copy_queries<DT, BM, THREADS>(a, a.q, s, b.kv, R + BM, next);
        copy_queries<DT, BM, THREADS>(a, a.d_o, s, b.kv, R + BM, next + BM * DT);
        copy_async_commit();
        if (threadIdx.x < BM) facts = row_facts(a, s, b.kv, R + BM + threadIdx.x);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncthreads();
      if (edge) {
        mark_not_finite<DTYPE, DT, BM, THREADS>(Q, marks);
        mark_not_finite<DTYPE, DT, BM, THREADS>(O, marks);
        __syncthreads();
      }
      float p[N][4], ds[N][4];
      tile_scores<DTYPE, DT, N>(p, K, 16 * warp, Q);
      if (DK) tile_scores<DTYPE, DT, N>(ds, V, 16 * warp, O);
      ATTENTION_UNROLL
      for (int j = 0; j < N; j++) ATTENTION_UNROLL
      for (int e = 0; e < 4; e++) {
        const int r = 8 * j + 2 * pair + e % 2, at = stage * BM + r;
        p[j][e] = exp2f(p[j][e] * scale - lse[at]);
        if (DK) ds[j][e] = p[j][e] * (ds[j][e] - delta[at]);
        if (edge) {
          const bool sees = attention_sees(pos[at], a.window, key[e / 2]);
          if (!sees) p[j][e] = 0;
          if (DK && !sees) ds[j][e] = 0;
          if (sees && marks[r]) p[j][e] = ds[j][e] = quiet_nan();
        }
      }
      if (DV) tile_weighted<DTYPE, DT, N>(dv, p, O);
      if (DK) tile_weighted<DTYPE, DT, N>(dk, ds, Q);
      __syncthreads();
    }
  }
  const float inverse = a.factor ? 1 / *a.factor : 1;
  ATTENTION_UNROLL
  for (int h = 0; h < 2; h++) {
    if (!used[h]) continue;
    const int64_t row = b.row0 + own + 8 * h, col = (int64_t)b.kv * a.D + 2 * pair;
    ATTENTION_UNROLL
    for (int c = 0; c < DT / 8; c++) {
      if (8 * c >= a.D) continue;
      if (DV)
        attention_store2(a.dv, row * a.dv.ld + col + 8 * c, dv[c][2 * h] * inverse,
                         dv[c][2 * h + 1] * inverse, a.pairs);
      if (DK)
        attention_store2(a.dk, row * a.dk.ld + col + 8 * c, dk[c][2 * h] * inverse * a.scale,
                         dk[c][2 * h + 1] * inverse * a.scale, a.pairs);
    }
  }
}

/* dq of 64 rows; BN keys at a time. */
template <int DTYPE, int DT, int BN> DEVICE void attention_rows_tile(const AttentionArgs &a) {
  enum { ROWS = 64, THREADS = 128, N = BN / 8 };
  DYNAMIC_SHARED(uint16_t, shared);
  SHARED(int32_t, marks, BN);
  uint16_t *const Q = shared, *const O = Q + ROWS * DT;
  uint16_t *const KV = O + ROWS * DT; /* [2 stages][k, v][BN][DT] */
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane % 4;
  const int kv = blockIdx.x % a.kv_heads;
  const int64_t rest = blockIdx.x / a.kv_heads;
  const int32_t row0 = (int32_t)(a.tiles - 1 - rest / a.n) * ROWS;
  const Span s = attention_span(a, rest % a.n);
  const int32_t rows = s.queries * a.group;
  if (row0 >= rows) return;
  const KeyRange r = attention_keys(a, s, row0, rows < row0 + ROWS ? rows : row0 + ROWS);
  const bool idle = row0 + 16 * warp >= rows;
  const int32_t R = row0 + 16 * warp + lane / 4;
  const float scale = a.scale * ATTENTION_LOG2E, inverse = a.factor ? 1 / *a.factor : 1;
  RowFacts facts[2];
  facts[0] = row_facts(a, s, kv, R), facts[1] = row_facts(a, s, kv, R + 8);
  float dq[DT / 8][4];
  ATTENTION_UNROLL
  for (int c = 0; c < DT / 8; c++) ATTENTION_UNROLL
  for (int e = 0; e < 4; e++) dq[c][e] = s.ok ? 0 : quiet_nan();

  int32_t j0 = r.first / BN * BN;
  if (j0 < r.end) {
    copy_queries<DT, ROWS, THREADS>(a, a.q, s, kv, row0, Q);
    copy_queries<DT, ROWS, THREADS>(a, a.d_o, s, kv, row0, O);
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
    const bool edge = !all_see_all(a, s, row0, ROWS, j0, BN);
    if (edge)
      for (int j = threadIdx.x; j < BN; j += THREADS) marks[j] = 0;
    __syncthreads();
    if (edge) {
      mark_not_finite<DTYPE, DT, BN, THREADS>(K, marks);
      __syncthreads();
    }
    if (!idle) {
      float p[N][4], ds[N][4];
      tile_scores<DTYPE, DT, N>(p, Q, 16 * warp, K);
      tile_scores<DTYPE, DT, N>(ds, O, 16 * warp, V);
      ATTENTION_UNROLL
      for (int j = 0; j < N; j++) ATTENTION_UNROLL
      for (int e = 0; e < 4; e++) {
        const RowFacts &f = facts[e / 2];
        ds[j][e] = exp2f(p[j][e] * scale - f.lse * ATTENTION_LOG2E) * (ds[j][e] - f.delta);
        if (edge) {
          const int at = 8 * j + 2 * pair + e % 2;
          if (!attention_sees(f.pos, a.window, j0 + at))
            ds[j][e] = 0;
          else if (marks[at])
            ds[j][e] = quiet_nan();
        }
      }
      tile_weighted<DTYPE, DT, N>(dq, ds, K);
    }
    __syncthreads();
  }
  ATTENTION_UNROLL
  for (int h = 0; h < 2; h++) {
    if (R + 8 * h >= rows) continue;
    const int64_t at = attention_at(a, a.dq, s, kv, R + 8 * h) + 2 * pair;
    ATTENTION_UNROLL
    for (int c = 0; c < DT / 8; c++)
      if (8 * c < a.D)
        attention_store2(a.dq, at + 8 * c, dq[c][2 * h] * inverse * a.scale,
                         dq[c][2 * h + 1] * inverse * a.scale, a.pairs);
  }
}

/* dk and dv of 256 columns are more than the registers hold: one, then the other. */
#define ATTENTION_BACKWARD(type, TYPE)                                                \
  KERNEL __launch_bounds__(128) pylora_attention_keys_##type##_64(AttentionArgs a) {  \
    attention_keys_tile<TYPE, 64, 32, true, true>(a);                                 \
  }                                                                                   \
  KERNEL __launch_bounds__(128) pylora_attention_keys_##type##_128(AttentionArgs a) { \
    attention_keys_tile<TYPE, 128, 32, true, true>(a);                                \
  }                                                                                   \
  KERNEL __launch_bounds__(128) pylora_attention_dv_##type##_256(AttentionArgs a) {   \
    attention_keys_tile<TYPE, 256, 32, true, false>(a);                               \
  }                                                                                   \
  KERNEL __launch_bounds__(128) pylora_attention_dk_##type##_256(AttentionArgs a) {   \
    attention_keys_tile<TYPE, 256, 32, false, true>(a);                               \
  }                                                                                   \
  KERNEL __launch_bounds__(128) pylora_attention_rows_##type##_64(AttentionArgs a) {  \
    attention_rows_tile<TYPE, 64, 64>(a);                                             \
  }                                                                                   \
  KERNEL __launch_bounds__(128) pylora_attention_rows_##type##_128(AttentionArgs a) { \
    attention_rows_tile<TYPE, 128, 32>(a);                                            \
  }                                                                                   \
  KERNEL __launch_bounds__(128) pylora_attention_rows_##type##_256(AttentionArgs a) { \
    attention_rows_tile<TYPE, 256, 16>(a);                                            \
  }
ATTENTION_BACKWARD(bf16, PYLORA_BF16)
ATTENTION_BACKWARD(f16, PYLORA_F16)
#undef ATTENTION_BACKWARD

#endif
