/* attention.c - causal grouped-query attention over sequences of any lengths: what its directions
 * share, checks and scratch. attention_forward.c, attention_decode.c and attention_backward.c do it.
 *
 * The unit of work is a panel: up to 32 columns of scores for one kv head, where a column is a query
 * of one head and a row is a key. Scores come from keys times the transposed queries, so no key is
 * ever transposed, and the softmax runs down the columns, one query per vector lane, keys in
 * ascending order.
 *
 * A query's sums run over its own keys alone, in the order of the keys: pylora_band walks the
 * staircase under the diagonal (and under the sliding window) in rectangles and never touches what is
 * masked, so neither a block's position nor what other rows hold (NaN included) changes a row's bits.
 *
 * Scores are float32; they are products of bfloat16 pairs where both sides are stored so. P, and what
 * is multiplied with it, is float32 always. Scratch is linear in the length of a sequence. */
#include <float.h>

#include "ops/attention.h"

enum { STAIR = 4 /* rows below which a staircase is walked row by row */ };

static void rectangle(const product *p, int64_t r0, int64_t r1, int64_t t0, int64_t t1) {
  for (int64_t j = 0; j < p->cols; j += PANEL)
    p->K->gemm(r1 - r0, (int)min64(PANEL, p->cols - j), t1 - t0, p->a + r0 * p->ars + t0 * p->acs,
               p->ars, p->acs, p->b + t0 * p->ldb + j, p->ldb, p->c + r0 * p->ldc + j, p->ldc,
               GEMM_CONTINUE);
}

/* Rows [r0, r1) over the part of [t0, t1) that they see. Splits until the rest is rectangles; each
 * row meets its columns in ascending order however that falls out. */
void pylora_band(const product *p, band_shape s, int64_t r0, int64_t r1, int64_t t0, int64_t t1) {
  t0 = max64(t0, max64(0, r0 + s.low));
  t1 = min64(t1, min64(s.n, r1 - 1 + s.high));
  if (r0 >= r1 || t0 >= t1) return;
  /* What all rows see: the last row starts last, the first one ends first. */
  int64_t u0 = max64(t0, r1 - 1 + s.low), u1 = min64(t1, r0 + s.high);
  if (u0 == t0 && u1 == t1) {
    rectangle(p, r0, r1, t0, t1);
    return;
  }
  if (r1 - r0 <= STAIR) {
    for (int64_t r = r0; r < r1; r++) {
      u0 = max64(t0, r + s.low), u1 = min64(t1, r + s.high);
      if (u0 < u1) rectangle(p, r, r + 1, u0, u1);
    }
    return;
  }
  const int64_t mid = r0 + (r1 - r0) / 2;
  if (2 * (u1 - u0) < t1 - t0) {
    pylora_band(p, s, r0, mid, t0, t1);
    pylora_band(p, s, mid, r1, t0, t1);
    return;
  }
  pylora_band(p, s, r0, mid, t0, u0);
  pylora_band(p, s, mid, r1, t0, u0);
  rectangle(p, r0, r1, u0, u1);
  pylora_band(p, s, r0, mid, u1, t1);
  pylora_band(p, s, mid, r1, u1, t1);
}

/* ---- sequences and blocks ---- */

block pylora_block_of(span s, const pylora_attn *a, int64_t first, int64_t n) {
  const int64_t seen = s.keys - (s.queries - 1 - first); /* by the first query */
  const int64_t window = a->window > 0 ? a->window : s.keys;
  const int64_t low = max64(0, seen - window), high = seen - low;
  const int64_t keys = seen + n - 1 - low;
  block b = {s.q0 + first,
             n,
             s.k0 + low,
             keys,
             {high - window, high, keys},
             {1 - high, 1 - high + window, n}};
  return b;
}

int pylora_check_attn(const pylora_attn *a) {
  if (!a) return PYLORA_E_NULL;
  if (a->heads < 1 || a->kv_heads < 1 || a->head_dim < 1 || a->heads % a->kv_heads)
    return PYLORA_E_SHAPE;
  const int good = a->window >= 0 && a->softcap >= 0 && a->scale > 0 && a->scale <= FLT_MAX;
  return good ? PYLORA_OK : PYLORA_E_VALUE; /* NaN is none of these */
}

/* m and n are the rows of q and of k; negative: not known. */
int pylora_check_seqs(const pylora_seqs *s, int64_t m, int64_t n) {
  if (!s) return PYLORA_E_NULL;
  if (s->n < 0) return PYLORA_E_SHAPE;
  if (s->n == 0) return m > 0 ? PYLORA_E_SHAPE : PYLORA_OK;
  if (!s->q_start || !s->k_start != !s->k_len) return PYLORA_E_NULL;
  if (s->q_start[0] != 0 || (m >= 0 && s->q_start[s->n] != m)) return PYLORA_E_SHAPE;
  const int64_t most = n >= 0 ? n : (int64_t)1 << 40;
  for (int64_t i = 0; i < s->n; i++) {
    if (s->q_start[i + 1] < s->q_start[i] || s->q_start[i + 1] > (int64_t)1 << 40)
      return PYLORA_E_SHAPE;
    const span p = span_of(s, i);
    if (p.k0 < 0 || p.k0 > most || p.keys < 0 || p.keys > most - p.k0) return PYLORA_E_INDEX;
    if (p.keys < p.queries) return PYLORA_E_SHAPE; /* every query sees a key */
  }
  return PYLORA_OK;
}

int64_t pylora_owner(const int64_t *first, int64_t sequences, int64_t n) {
  int64_t low = 0, high = sequences; /* first[low] <= n < first[high] */
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    if (first[mid] <= n)
      low = mid;
    else
      high = mid;
  }
  return low;
}

/* ---- scratch ---- */

static int64_t longest(const pylora_seqs *s) {
  int64_t most = 1;
  for (int64_t i = 0; i < s->n; i++) most = max64(most, span_of(s, i).keys);
  return most;
}

/* `keys`: of the longest sequence. Floats of a thread's scratch, and where each piece starts if p is not NULL. */
static double carve(const pylora_attn *a, int64_t keys, float *p, scratch *out) {
  const int64_t seen = a->window > 0 ? min64(keys, a->window + (int64_t)PANEL - 1) : keys;
  const int64_t D = a->head_dim, pad = pad_panel(D);
  struct {
    float **at;
    double rows;
    int64_t cols;
  } pieces[] = {
      {&out->s, (double)seen, PANEL},
      {&out->dp, (double)seen, PANEL},
      {&out->qt, (double)pad, PANEL},
      {&out->ot, (double)pad, PANEL},
      {&out->k, (double)keys, pad},
      {&out->v, (double)keys, pad},
      {&out->q, PANEL, pad},
      {&out->d_o, PANEL, pad},
      {&out->acc, PANEL, pad},
      {&out->row, 1, pad},
      {&out->heads, 2.0 * a->heads, pad},
  };
  double n = 0;
  for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
    if (p) *pieces[i].at = p + (int64_t)n;
    n += pieces[i].rows * (double)pieces[i].cols; /* whole lines: PANEL and pad are */
  }
  return n;
}

/* Keys that a query alone in its sequence sees. */
static int64_t seen_alone(span s, const pylora_attn *a) {
  return a->window > 0 ? min64(s.keys, a->window) : s.keys;
}

/* Floats that the threads share. */
static double shared_floats(const pylora_seqs *s, const pylora_attn *a, int backward) {
  double n = 0;
  for (int64_t i = 0; i < s->n; i++) {
    const span p = span_of(s, i);
    if (backward)
      n += 2.0 * (double)chunks_of(p.queries) * (double)p.keys * a->kv_heads * a->head_dim;
    else if (p.queries == 1)
      n += (double)a->heads * (double)(seen_alone(p, a) + 1);
  }
  return n;
}

static size_t scratch_bytes(const pylora_seqs *s, const pylora_attn *a, int threads) {
  scratch none;
  const double lists = 3.0 * (double)(s->n + 1) * sizeof(int64_t);
  const double forward = shared_floats(s, a, 0), backward = shared_floats(s, a, 1);
  const double bytes =
      (carve(a, longest(s), NULL, &none) * threads + (forward > backward ? forward : backward)) *
          sizeof(float) +
      lists;
  return bytes > 1e15 ? 0 : (size_t)bytes + 6 * PYLORA_ALIGN;
}

size_t pylora_attention_workspace(const pylora_seqs *seqs, const pylora_attn *a) {
  if (pylora_check_attn(a) || pylora_check_seqs(seqs, -1, -1)) return 0;
  return scratch_bytes(seqs, a, pylora_num_threads());
}

int pylora_take_scratch(call *f, int backward, void *ws, size_t bytes) {
  const size_t need = scratch_bytes(f->seqs, f->a, f->threads);
  if (need == 0) return PYLORA_E_SHAPE;
  if (!ws) return PYLORA_E_NULL;
  if (bytes < need) return PYLORA_E_WORKSPACE;
  arena r = arena_of(ws, bytes);
  scratch none;
  const size_t list = (size_t)(f->seqs->n + 1) * sizeof(int64_t);
  f->keys = longest(f->seqs);
  f->first = arena_bytes(&r, list);
  f->alone = arena_bytes(&r, list);
  f->at = arena_bytes(&r, list);
  f->scratch =
      arena_bytes(&r, (size_t)(carve(f->a, f->keys, NULL, &none) * f->threads) * sizeof(float));
  f->shared = arena_floats(&r, (int64_t)shared_floats(f->seqs, f->a, backward));
  return f->first && f->alone && f->at && f->scratch && f->shared ? PYLORA_OK : PYLORA_E_WORKSPACE;
}

scratch pylora_attention_scratch(const call *f, int thread) {
  scratch w;
  const int64_t n = (int64_t)carve(f->a, f->keys, NULL, &w);
  carve(f->a, f->keys, (float *)(void *)f->scratch + thread * n, &w);
  return w;
}

/* ---- rows in either type ---- */

void pylora_transpose(const pylora_kernels *K, pylora_vec x, int64_t ld, int64_t cols, int64_t D,
                      int pairs, float *out) {
  float tile[PANEL * PANEL];
  const int64_t width = pairs ? D / 2 : D;
  for (int64_t t = 0; t < width; t += PANEL, out += PANEL * PANEL) {
    const int64_t n = min64(PANEL, width - t);
    if (cols < PANEL || n < PANEL) memset(tile, 0, sizeof tile); /* multiplied by nothing */
    for (int64_t c = 0; c < cols; c++) {
      if (!x.b && n == PANEL) /* a copy whose length is known is a few moves */
        memcpy(tile + c * PANEL, x.p + c * ld + t, PANEL * sizeof(float));
      else if (pairs && n == PANEL) /* the bits of pairs, as if each were a float */
        memcpy(tile + c * PANEL, x.b + c * ld + 2 * t, PANEL * sizeof(float));
      else if (pairs)
        memcpy(tile + c * PANEL, x.b + c * ld + 2 * t, (size_t)n * sizeof(float));
      else if (x.b)
        K->from_bf16(n, x.b + c * ld + t, tile + c * PANEL);
      else
        memcpy(tile + c * PANEL, x.p + c * ld + t, (size_t)n * sizeof(float));
    }
    K->transpose(PANEL, PANEL, tile, PANEL, out, PANEL);
  }
}

const float *pylora_rows(const pylora_kernels *K, const pylora_mat *x, int64_t row, int64_t col,
                         int64_t n, int64_t D, float *out, int64_t *ld) {
  if (!x->b) {
    *ld = x->ld;
    return x->p + row * x->ld + col;
  }
  for (int64_t i = 0; i < n; i++) K->from_bf16(D, x->b + (row + i) * x->ld + col, out + i * D);
  *ld = D;
  return out;
}

void pylora_put_scaled(const pylora_kernels *K, int64_t D, const float *x, float s, pylora_vec y,
                       float *row) {
  K->scale(D, x, s, y.b ? row : y.p);
  if (y.b) K->to_bf16(D, row, y.b);
}
