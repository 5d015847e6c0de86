/* attention_common.cuh - what all kernels of attention share: their arguments, sequences, what a row sees.
 *
 * The unit of a sequence's queries is a row: a query of one head of a group that shares a kv head.  Row R is
 * query R / group, head R % group of the group, so that heads side by side read each key once.  Positions in
 * a sequence are 32 bits (pylora_cuda_attention_* refuse more); rows of the matrices are 64. */
#ifndef PYLORA_ATTENTION_COMMON_CUH
#define PYLORA_ATTENTION_COMMON_CUH

#include "device.cuh"

#ifdef PYLORA_EMULATE
#define ATTENTION_UNROLL
#define ATTENTION_ROLLED
#define ATTENTION_BY_TWO
#else
#define ATTENTION_UNROLL _Pragma("unroll")
#define ATTENTION_ROLLED _Pragma("unroll 1")
#define ATTENTION_BY_TWO _Pragma("unroll 2")
#endif

#define ATTENTION_LOG2E 1.44269504088896341f
#define ATTENTION_LN2 0.693147180559945309f
#define ATTENTION_MOST 0x7fffffff /* a window that hides nothing */

struct AttentionArgs {
  View q, k, v, o;      /* o: a result in forward, given in backward */
  View d_o, dq, dk, dv; /* backward */
  View lse;             /* [m, heads] float32 */
  const int64_t *q_start, *k_start, *k_len;
  int64_t n, max_q; /* sequences; queries of the longest one */
  int32_t heads, kv_heads, group, D;
  int32_t window;        /* ATTENTION_MOST: none */
  int32_t tiles;         /* of a sequence's rows, or keys: the grid has as many for each */
  int32_t splits, chunk; /* forward: pieces of the keys, and how many keys each has */
  int32_t pairs;         /* results may be written in pairs */
  float scale;
  float softcap;           /* 0: none; only without tensor cores */
  float *part_o, *part_ml; /* of the pieces: [splits][m * heads][D] and [..][2], maximum and sum */
  float *delta;            /* [m * heads]: rowsum(do o) */
  const float
      *factor; /* do, and with it delta, is multiplied by this power of two; NULL: it is not */
  int32_t *bad;
};

/* A sequence's first row of q and of k, and their numbers. */
struct Span {
  int64_t q0, k0;
  int32_t queries, keys, off; /* query t sees the keys up to t + off */
  bool ok;
};

DEVICE Span attention_span(const AttentionArgs &a, int64_t i) {
  Span s;
  const int64_t q0 = a.q_start[i], queries = a.q_start[i + 1] - q0;
  s.q0 = q0, s.k0 = 0, s.keys = 0, s.off = 0, s.ok = true;
  if (q0 < 0 || queries < 0 || q0 > a.q.rows || queries > a.q.rows - q0) {
    flag_bad_index(a.bad);
    s.queries = 0, s.ok = false;
    return s;
  }
  s.queries = (int32_t)(queries < a.max_q ? queries : a.max_q);
  if (queries == 0) return s; /* whatever stands in k_start and k_len */
  const int64_t k0 = a.k_start ? a.k_start[i] : q0, keys = a.k_len ? a.k_len[i] : queries;
  if (queries > a.max_q || keys < queries || k0 < 0 || k0 > a.k.rows || keys > a.k.rows - k0 ||
      keys >= ATTENTION_MOST) {
    flag_bad_index(a.bad);
    s.ok = false;
    return s;
  }
  s.k0 = k0, s.keys = (int32_t)keys, s.off = s.keys - s.queries;
  return s;
}

/* The score of a product, and the slope of the cap there. */
DEVICE float attention_score(const AttentionArgs &a, float product, float *slope) {
  const float s = product * a.scale;
  *slope = 1;
  if (a.softcap == 0) return s;
  const float t = tanhf(s / a.softcap);
  *slope = 1 - t * t;
  return a.softcap * t;
}

DEVICE bool attention_sees(int32_t pos, int32_t window, int32_t key) {
  return key <= pos && key > pos - window;
}

/* Keys [first, end) are what the rows row0 .. row1-1 see together; each of them sees [whole, shared). */
struct KeyRange {
  int32_t first, end, whole, shared;
};
DEVICE KeyRange attention_keys(const AttentionArgs &a, const Span &s, int32_t row0, int32_t row1) {
  const int32_t top = row0 / a.group + s.off, bottom = (row1 - 1) / a.group + s.off;
  KeyRange r;
  r.first = top - a.window + 1 > 0 && a.window != ATTENTION_MOST ? top - a.window + 1 : 0;
  r.whole = a.window != ATTENTION_MOST && bottom - a.window + 1 > 0 ? bottom - a.window + 1 : 0;
  r.end = s.ok ? bottom + 1 : 0;
  r.shared = top + 1;
  return r;
}

/* The piece of [first, end) that block row `split` of the grid takes; pieces start at multiples of `step`. */
DEVICE void attention_piece(const AttentionArgs &a, int split, int step, KeyRange *r) {
  if (a.splits == 1) return;
  const int64_t base = r->first / step * step, from = base + (int64_t)split * a.chunk;
  const int64_t to = split == a.splits - 1 ? r->end : from + a.chunk;
  if (split && from > r->first) r->first = (int32_t)(from < r->end ? from : r->end);
  if (to < r->end) r->end = (int32_t)to;
}

/* The element of a [m, heads * D] matrix where row R of a sequence starts. */
DEVICE int64_t attention_at(const AttentionArgs &a, const View &x, const Span &s, int kv,
                            int32_t R) {
  return (s.q0 + R / a.group) * x.ld + (int64_t)(kv * a.group + R % a.group) * a.D;
}

/* Two results side by side; `pairs`: the address is a multiple of two elements. */
DEVICE void attention_store2(const View &x, int64_t at, float f0, float f1, int pairs) {
  if (!pairs) {
    store(x.p, x.dtype, at, f0), store(x.p, x.dtype, at + 1, f1);
  } else if (x.dtype == PYLORA_F32) {
    float2 f;
    f.x = f0, f.y = f1;
    *(float2 *)((float *)x.p + at) = f;
  } else {
    const uint32_t low = x.dtype == PYLORA_BF16 ? round_bf16(f0) : round_f16(f0);
    const uint32_t high = x.dtype == PYLORA_BF16 ? round_bf16(f1) : round_f16(f1);
    *(uint32_t *)((uint16_t *)x.p + at) = low | high << 16;
  }
}

/* o and lse of a row, from the sums of its pieces: a warp per row and head.  The order is that of the keys. */
KERNEL pylora_attention_combine(AttentionArgs a) {
  const int lane = threadIdx.x % WARP;
  const int64_t index = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  const int64_t i = index / a.heads / a.max_q, head = index % a.heads;
  if (i >= a.n) return;
  const Span s = attention_span(a, i);
  const int64_t t = index / a.heads % a.max_q;
  if (t >= s.queries) return;
  const int64_t rows = a.q.rows * a.heads, row = (s.q0 + t) * a.heads + head;
  float top = float_of_bits(0xff800000u), sum = 0, acc[8];
  for (int p = lane; p < a.splits; p += WARP) top = fmaxf(top, a.part_ml[2 * (p * rows + row)]);
  top = warp_max(top);
  const float high = top == float_of_bits(0xff800000u) ? 0 : top;
  ATTENTION_UNROLL
  for (int c = 0; c < 8; c++) acc[c] = 0;
  for (int p = 0; p < a.splits; p++) {
    const int64_t at = p * rows + row;
    const float part = a.part_ml[2 * at + 1];
    if (part == 0) continue; /* no keys here */
    const float weight = exp2f(a.part_ml[2 * at] - high);
    sum += weight * part;
    ATTENTION_UNROLL
    for (int c = 0; c < 8; c++)
      if (lane + WARP * c < a.D) acc[c] += weight * a.part_o[at * a.D + lane + WARP * c];
  }
  const float inverse = 1 / sum;
  ATTENTION_UNROLL
  for (int c = 0; c < 8; c++)
    if (lane + WARP * c < a.D)
      store(a.o.p, a.o.dtype, (s.q0 + t) * a.o.ld + head * a.D + lane + WARP * c, acc[c] * inverse);
  if (lane == 0) ((float *)a.lse.p)[(s.q0 + t) * a.lse.ld + head] = top * ATTENTION_LN2 + logf(sum);
}

#endif
