/* attention_plain.cuh - attention without tensor cores: strict float32, and 16-bit matrices whose head_dim or layout
 * copies of 16 bytes do not fit.  Any type, stride and head_dim up to 256.
 *
 * A block of 128 threads has a tile of 32 rows (or keys) and meets the other side in tiles of 32.  Tiles are
 * float32 in shared memory, DT numbers (the head's D, filled up with zeros) and 4 to keep rows in different
 * banks.  Thread (ty, tx) = (thread / 8, thread % 8) has scores of tile rows 2 ty, 2 ty + 1 with rows
 * tx, tx + 8, tx + 16, tx + 24 of the other tile, and results in columns 4 tx .. 4 tx + 3, 4 tx + 32 .. */
#ifndef PYLORA_ATTENTION_PLAIN_CUH
#define PYLORA_ATTENTION_PLAIN_CUH

#include "attention_common.cuh"

enum { PLAIN = 32, PLAIN_THREADS = 128, PLAIN_W = PLAIN + 1 };
#define PLAIN_LD(DT) ((DT) + 4)

/* One row of a tile, by eight threads: D numbers from element `at`, or zeros. */
template <int DT>
DEVICE void plain_row(const View &x, bool in, int64_t at, int D, int tx, float *to) {
  for (int c = tx; c < DT; c += 8) to[c] = in && c < D ? load(x.p, x.dtype, at + c) : 0;
}
template <int DT>
DEVICE void plain_queries(const AttentionArgs &a, const View &x, const Span &s, int kv, int32_t R0,
                          float *tile) {
  for (int r = threadIdx.x / 8; r < PLAIN; r += PLAIN_THREADS / 8) {
    const bool in = r < s.queries * a.group - R0;
    plain_row<DT>(x, in, in ? attention_at(a, x, s, kv, R0 + r) : 0, a.D, threadIdx.x % 8,
                  tile + r * PLAIN_LD(DT));
  }
}
/* Rows row0 + [0, PLAIN), those in [0, end). */
template <int DT>
DEVICE void plain_keys(const AttentionArgs &a, const View &x, int64_t row0, int64_t end, int kv,
                       float *tile) {
  for (int r = threadIdx.x / 8; r < PLAIN; r += PLAIN_THREADS / 8) {
    const int64_t row = row0 + r;
    plain_row<DT>(x, row >= 0 && row < end, row * x.ld + (int64_t)kv * a.D, a.D, threadIdx.x % 8,
                  tile + r * PLAIN_LD(DT));
  }
}

DEVICE float4 plain_four(const float *p) { return *(const float4 *)p; }

/* s[i][j] = row 2 ty + i of A's tile times row tx + 8 j of B's. */
template <int DT> DEVICE void plain_scores(float (&s)[2][4], const float *A, const float *B) {
  const int ty = threadIdx.x / 8, tx = threadIdx.x % 8;
  ATTENTION_UNROLL
  for (int i = 0; i < 2; i++) ATTENTION_UNROLL
  for (int j = 0; j < 4; j++) s[i][j] = 0;
  ATTENTION_ROLLED
  for (int c = 0; c < DT; c += 4) {
    float4 x[2];
    x[0] = plain_four(A + 2 * ty * PLAIN_LD(DT) + c);
    x[1] = plain_four(A + (2 * ty + 1) * PLAIN_LD(DT) + c);
    ATTENTION_UNROLL
    for (int j = 0; j < 4; j++) {
      const float4 y = plain_four(B + (tx + 8 * j) * PLAIN_LD(DT) + c);
      ATTENTION_UNROLL
      for (int i = 0; i < 2; i++) {
        s[i][j] = fmaf(x[i].x, y.x, s[i][j]), s[i][j] = fmaf(x[i].y, y.y, s[i][j]);
        s[i][j] = fmaf(x[i].z, y.z, s[i][j]), s[i][j] = fmaf(x[i].w, y.w, s[i][j]);
      }
    }
  }
}

/* Products become scores.  A pass of its own, so that tanhf meets few live registers: inside the softmax it made
 * the kernel spill. */
DEVICE void plain_scaled(const AttentionArgs &a, float (&s)[2][4]) {
  ATTENTION_UNROLL
  for (int i = 0; i < 2; i++) ATTENTION_UNROLL
  for (int j = 0; j < 4; j++) {
    float slope;
    s[i][j] = attention_score(a, s[i][j], &slope);
  }
}

DEVICE void plain_add(float4 &acc, float w, const float4 &x) {
  acc.x = fmaf(w, x.x, acc.x), acc.y = fmaf(w, x.y, acc.y);
  acc.z = fmaf(w, x.z, acc.z), acc.w = fmaf(w, x.w, acc.w);
}

/* acc[i][c] += sum over j of W[2 ty + i][j] times row j of B's tile, j ascending.  seen[i]: bit j says whether
 * the row sees j at all; what it does not see may be NaN. */
template <int DT>
DEVICE void plain_weighted(float4 (&acc)[2][DT / 32], const float *W, const float *B,
                           const uint32_t (&seen)[2]) {
  const int ty = threadIdx.x / 8, tx = threadIdx.x % 8;
  ATTENTION_ROLLED
  for (int j = 0; j < PLAIN; j++) {
    float w[2];
    w[0] = W[2 * ty * PLAIN_W + j], w[1] = W[(2 * ty + 1) * PLAIN_W + j];
    ATTENTION_UNROLL
    for (int c = 0; c < DT / 32; c++) {
      const float4 x = plain_four(B + j * PLAIN_LD(DT) + 4 * tx + 32 * c);
      ATTENTION_UNROLL
      for (int i = 0; i < 2; i++)
        if (seen[i] >> j & 1) plain_add(acc[i][c], w[i], x);
    }
  }
}

template <int DT> DEVICE void plain_zero(float4 (&acc)[2][DT / 32]) {
  ATTENTION_UNROLL
  for (int i = 0; i < 2; i++) ATTENTION_UNROLL
  for (int c = 0; c < DT / 32; c++) acc[i][c].x = acc[i][c].y = acc[i][c].z = acc[i][c].w = 0;
}

/* The thread's columns of a row of results, times `factor`, from element `at`. */
template <int DT>
DEVICE void plain_store(const View &x, int64_t at, int D, const float4 (&acc)[DT / 32],
                        float factor) {
  ATTENTION_UNROLL
  for (int c = 0; c < DT / 32; c++) {
    const int col = 4 * (threadIdx.x % 8) + 32 * c;
    if (col < D) store(x.p, x.dtype, at + col, acc[c].x * factor);
    if (col + 1 < D) store(x.p, x.dtype, at + col + 1, acc[c].y * factor);
    if (col + 2 < D) store(x.p, x.dtype, at + col + 2, acc[c].z * factor);
    if (col + 3 < D) store(x.p, x.dtype, at + col + 3, acc[c].w * factor);
  }
}

/* Over the eight threads of a row. */
DEVICE float plain_max(float x) {
  for (int step = 4; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}
DEVICE float plain_sum(float x) {
  for (int step = 4; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
/* The keys of a tile, which starts at j0, that a row sees: those in [first, end) up to pos, in the window. */
DEVICE uint32_t plain_seen(const AttentionArgs &a, int32_t pos, int32_t j0, const KeyRange &r) {
  uint32_t seen = 0;
  for (int j = 0; j < PLAIN; j++)
    if (attention_sees(pos, a.window, j0 + j) && j0 + j >= r.first && j0 + j < r.end)
      seen |= 1u << j;
  return seen;
}

template <int DT> DEVICE void attention_forward_plain(const AttentionArgs &a) {
  enum { LD = PLAIN_LD(DT) };
  DYNAMIC_SHARED(float, shared);
  float *const Q = shared, *const K = Q + PLAIN * LD, *const V = K + PLAIN * LD;
  float *const W = V + PLAIN * LD;
  const int ty = threadIdx.x / 8, tx = threadIdx.x % 8, kv = blockIdx.x % a.kv_heads;
  const int64_t rest = blockIdx.x / a.kv_heads;
  const int32_t row0 = (int32_t)(a.tiles - 1 - rest / a.n) * PLAIN;
  const Span s = attention_span(a, rest % a.n);
  const int32_t rows = s.queries * a.group;
  if (row0 >= rows) return;
  KeyRange r = attention_keys(a, s, row0, rows < row0 + PLAIN ? rows : row0 + PLAIN);
  attention_piece(a, blockIdx.y, PLAIN, &r);
  const float none = float_of_bits(0xff800000u);
  float4 acc[2][DT / 32];
  float top[2] = {none, none}, sum[2] = {0, 0};
  if (!s.ok) sum[0] = sum[1] = quiet_nan();
  plain_zero<DT>(acc);
  plain_queries<DT>(a, a.q, s, kv, row0, Q);
  for (int32_t j0 = r.first / PLAIN * PLAIN; j0 < r.end; j0 += PLAIN) {
    plain_keys<DT>(a, a.k, s.k0 + j0, s.k0 + r.end, kv, K);
    plain_keys<DT>(a, a.v, s.k0 + j0, s.k0 + r.end, kv, V);
    __syncthreads();
    float w[2][4];
    uint32_t seen[2];
    plain_scores<DT>(w, Q, K);
    plain_scaled(a, w);
    ATTENTION_UNROLL
    for (int i = 0; i < 2; i++) {
      seen[i] = plain_seen(a, (row0 + 2 * ty + i) / a.group + s.off, j0, r);
      float high = top[i];
      ATTENTION_UNROLL
      for (int j = 0; j < 4; j++) {
        w[i][j] = seen[i] >> (tx + 8 * j) & 1 ? w[i][j] : none;
        high = fmaxf(high, w[i][j]);
      }
      high = plain_max(high);
      const float least = high == none ? 0 : high, correct = expf(top[i] - least);
      top[i] = high, sum[i] *= correct;
      ATTENTION_UNROLL
      for (int c = 0; c < DT / 32; c++) {
        acc[i][c].x *= correct, acc[i][c].y *= correct;
        acc[i][c].z *= correct, acc[i][c].w *= correct;
      }
      ATTENTION_UNROLL
      for (int j = 0; j < 4; j++) {
        const float p = expf(w[i][j] - least);
        sum[i] += p;
        W[(2 * ty + i) * PLAIN_W + tx + 8 * j] = p;
      }
    }
    __syncwarp(); /* a row's weights are its warp's own */
    plain_weighted<DT>(acc, W, V, seen);
    __syncthreads();
  }
  ATTENTION_UNROLL
  for (int i = 0; i < 2; i++) {
    const float total = plain_sum(sum[i]);
    const int32_t R = row0 + 2 * ty + i;
    if (R >= rows) continue;
    const int64_t q = s.q0 + R / a.group, head = kv * a.group + R % a.group;
    if (a.splits > 1) {
      const int64_t at = ((int64_t)blockIdx.y * a.q.rows + q) * a.heads + head;
      View part = a.o;
      part.p = a.part_o, part.dtype = PYLORA_F32;
      plain_store<DT>(part, at * a.D, a.D, acc[i], 1);
      if (tx == 0) a.part_ml[2 * at] = top[i] * ATTENTION_LOG2E, a.part_ml[2 * at + 1] = total;
    } else {
      plain_store<DT>(a.o, q * a.o.ld + head * a.D, a.D, acc[i], 1 / total);
      if (tx == 0) ((float *)a.lse.p)[q * a.lse.ld + head] = top[i] + logf(total);
    }
  }
}

KERNEL __launch_bounds__(128) pylora_attention_forward_plain_64(AttentionArgs a) {
  attention_forward_plain<64>(a);
}
KERNEL __launch_bounds__(128) pylora_attention_forward_plain_128(AttentionArgs a) {
  attention_forward_plain<128>(a);
}
KERNEL __launch_bounds__(128) pylora_attention_forward_plain_256(AttentionArgs a) {
  attention_forward_plain<256>(a);
}

#endif
