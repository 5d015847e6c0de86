/* attention_plain_backward.cuh - the gradients of attention without tensor cores, in strict float32: the blocks and
 * sums of attention_backward.cuh, with the tiles of attention_plain.cuh. */
#ifndef PYLORA_ATTENTION_PLAIN_BACKWARD_CUH
#define PYLORA_ATTENTION_PLAIN_BACKWARD_CUH

#include "attention_backward.cuh"
#include "attention_plain.cuh"

/* dv, dk of 32 keys. */
template <int DT> DEVICE void attention_keys_plain(const AttentionArgs &a) {
  enum { LD = PLAIN_LD(DT) };
  DYNAMIC_SHARED(float, shared);
  SHARED(float, lse, PLAIN);
  SHARED(float, delta, PLAIN);
  SHARED(int32_t, pos, PLAIN);
  float *const K = shared, *const V = K + PLAIN * LD;
  float *const Q = V + PLAIN * LD, *const O = Q + PLAIN * LD;
  float *const P = O + PLAIN * LD, *const S = P + PLAIN * PLAIN_W; /* P and dS */
  const int ty = threadIdx.x / 8, tx = threadIdx.x % 8;
  const KeyBlock b = key_block(a, PLAIN);
  float4 dv[2][DT / 32], dk[2][DT / 32];
  bool used[2] = {false, false}, loaded = false;
  plain_zero<DT>(dv), plain_zero<DT>(dk);

  for (int64_t i = b.first; i < b.end; i++) {
    const Span s = attention_span(a, i);
    const int64_t j0 = b.row0 - s.k0;
    int32_t R, end, key[2];
    if (!rows_of_keys(a, s, j0, PLAIN, &R, &end)) continue;
    ATTENTION_UNROLL
    for (int h = 0; h < 2; h++) {
      const int64_t j = j0 + 2 * ty + h;
      key[h] = j >= 0 && j < s.keys ? (int32_t)j : ATTENTION_MOST;
      used[h] = used[h] || key[h] != ATTENTION_MOST;
    }
    if (R >= end) continue;
    if (!loaded) {
      plain_keys<DT>(a, a.k, b.row0, a.k.rows, b.kv, K);
      plain_keys<DT>(a, a.v, b.row0, a.k.rows, b.kv, V);
      loaded = true;
    }
    for (R = R / PLAIN * PLAIN; R < end; R += PLAIN) {
      plain_queries<DT>(a, a.q, s, b.kv, R, Q);
      plain_queries<DT>(a, a.d_o, s, b.kv, R, O);
      if (threadIdx.x < PLAIN) {
        const RowFacts f = row_facts(a, s, b.kv, R + threadIdx.x);
        lse[threadIdx.x] = f.lse, delta[threadIdx.x] = f.delta, pos[threadIdx.x] = f.pos;
      }
      __syncthreads();
      float p[2][4], ds[2][4];
      uint32_t seen[2] = {0, 0};
      plain_scores<DT>(p, K, Q);
      plain_scores<DT>(ds, V, O);
      for (int r = 0; r < PLAIN; r++) ATTENTION_UNROLL
      for (int h = 0; h < 2; h++)
        seen[h] |= (uint32_t)attention_sees(pos[r], a.window, key[h]) << r;
      ATTENTION_UNROLL
      for (int h = 0; h < 2; h++) ATTENTION_UNROLL
      for (int j = 0; j < 4; j++) {
        const int r = tx + 8 * j, at = (2 * ty + h) * PLAIN_W + r;
        float slope;
        const float e = expf(attention_score(a, p[h][j], &slope) - lse[r]);
        P[at] = e, S[at] = e * (ds[h][j] - delta[r]) * slope;
      }
      __syncwarp();
      plain_weighted<DT>(dv, P, O, seen);
      plain_weighted<DT>(dk, S, Q, seen);
      __syncthreads();
    }
  }
  ATTENTION_UNROLL
  for (int h = 0; h < 2; h++) {
    if (!used[h]) continue;
    const int64_t row = b.row0 + 2 * ty + h, col = (int64_t)b.kv * a.D;
    plain_store<DT>(a.dv, row * a.dv.ld + col, a.D, dv[h], 1);
    plain_store<DT>(a.dk, row * a.dk.ld + col, a.D, dk[h], a.scale);
  }
}

/* dq of 32 rows. */
template <int DT> DEVICE void attention_rows_plain(const AttentionArgs &a) {
  enum { LD = PLAIN_LD(DT) };
  DYNAMIC_SHARED(float, shared);
  float *const Q = shared, *const O = Q + PLAIN * LD;
  float *const K = O + PLAIN * LD, *const V = K + PLAIN * LD, *const S = V + PLAIN * LD;
  const int ty = threadIdx.x / 8, tx = threadIdx.x % 8, kv = blockIdx.x % a.kv_heads;
  const int64_t rest = blockIdx.x / a.kv_heads;
  const int32_t row0 = (int32_t)(a.tiles - 1 - rest / a.n) * PLAIN;
  const Span s = attention_span(a, rest % a.n);
  const int32_t rows = s.queries * a.group;
  if (row0 >= rows) return;
  const KeyRange r = attention_keys(a, s, row0, rows < row0 + PLAIN ? rows : row0 + PLAIN);
  RowFacts facts[2];
  facts[0] = row_facts(a, s, kv, row0 + 2 * ty), facts[1] = row_facts(a, s, kv, row0 + 2 * ty + 1);
  float4 dq[2][DT / 32];
  plain_zero<DT>(dq);
  plain_queries<DT>(a, a.q, s, kv, row0, Q);
  plain_queries<DT>(a, a.d_o, s, kv, row0, O);
  for (int32_t j0 = r.first / PLAIN * PLAIN; j0 < r.end; j0 += PLAIN) {
    plain_keys<DT>(a, a.k, s.k0 + j0, s.k0 + r.end, kv, K);
    plain_keys<DT>(a, a.v, s.k0 + j0, s.k0 + r.end, kv, V);
    __syncthreads();
    float p[2][4], ds[2][4];
    uint32_t seen[2];
    plain_scores<DT>(p, Q, K);
    plain_scores<DT>(ds, O, V);
    ATTENTION_UNROLL
    for (int i = 0; i < 2; i++) {
      seen[i] = plain_seen(a, facts[i].pos, j0, r);
      ATTENTION_UNROLL
      for (int j = 0; j < 4; j++) {
        float slope;
        const float e = expf(attention_score(a, p[i][j], &slope) - facts[i].lse);
        S[(2 * ty + i) * PLAIN_W + tx + 8 * j] = e * (ds[i][j] - facts[i].delta) * slope;
      }
    }
    __syncwarp();
    plain_weighted<DT>(dq, S, K, seen);
    __syncthreads();
  }
  const float factor = s.ok ? a.scale : quiet_nan();
  ATTENTION_UNROLL
  for (int i = 0; i < 2; i++)
    if (row0 + 2 * ty + i < rows)
      plain_store<DT>(a.dq, attention_at(a, a.dq, s, kv, row0 + 2 * ty + i), a.D, dq[i], factor);
}

#define ATTENTION_PLAIN_BACKWARD(DT)                                                \
  KERNEL __launch_bounds__(128) pylora_attention_keys_plain_##DT(AttentionArgs a) { \
    attention_keys_plain<DT>(a);                                                    \
  }                                                                                 \
  KERNEL __launch_bounds__(128) pylora_attention_rows_plain_##DT(AttentionArgs a) { \
    attention_rows_plain<DT>(a);                                                    \
  }
ATTENTION_PLAIN_BACKWARD(64)
ATTENTION_PLAIN_BACKWARD(128)
ATTENTION_PLAIN_BACKWARD(256)
#undef ATTENTION_PLAIN_BACKWARD

#endif
