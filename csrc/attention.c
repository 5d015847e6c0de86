/* attention.c - causal grouped-query attention, forward and backward, over sequences of any lengths.
 *
 * The unit of work is a panel: up to 32 columns of scores for one kv head, where a column is a query
 * (32 consecutive queries of one head; or, for a single query, the heads that share the kv head) and
 * a row is a key. Scores come from keys times the transposed queries, so no key is ever transposed,
 * and the softmax runs down the columns, one query per vector lane, keys in ascending order.
 *
 * A query's sums run over its own keys alone, in the order of the keys: `band` walks the staircase
 * under the diagonal (and under the sliding window) in rectangles and never touches what is masked,
 * so neither a block's position nor what other rows hold (NaN included) changes a row's bits.
 *
 * Scratch is a panel per thread: linear in the length of a sequence, never [T, T].
 *
 * Forward, one task = a block of queries of a sequence, for one kv head. Backward, one task = a
 * sequence and a kv head, because its dk and dv are sums over all the queries. */
#include <math.h>

#include "internal.h"

enum { PANEL = PYLORA_PANEL, STAIR = 4 /* rows below which a staircase is walked row by row */ };

/* Rows r of a staircase see the columns [max(0, r + low), min(n, r + high)). */
typedef struct band_shape {
  int64_t low, high, n;
} band_shape;

/* c[r,:] += sum over the t that row r sees of a[r*ars + t*acs] b[t*ldb + :], t ascending. */
typedef struct product {
  const pylora_kernels *K;
  const float *a;
  int64_t ars, acs;
  const float *b;
  int64_t ldb;
  float *c;
  int64_t ldc, cols;
} product;

static void rectangle(const product *p, int64_t r0, int64_t r1, int64_t t0, int64_t t1) {
  for (int64_t j = 0; j < p->cols; j += PANEL)
    p->K->gemm(r1 - r0, (int)min64(PANEL, p->cols - j), t1 - t0, p->a + r0 * p->ars + t0 * p->acs,
               p->ars, p->acs, p->b + t0 * p->ldb + j, p->ldb, p->c + r0 * p->ldc + j, p->ldc,
               GEMM_CONTINUE);
}

/* Rows [r0, r1) over the part of [t0, t1) that they see. Splits until the rest is rectangles; each
 * row meets its columns in ascending order however that falls out. */
static void band(const product *p, band_shape s, int64_t r0, int64_t r1, int64_t t0, int64_t t1) {
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
    band(p, s, r0, mid, t0, t1);
    band(p, s, mid, r1, t0, t1);
    return;
  }
  band(p, s, r0, mid, t0, u0);
  band(p, s, mid, r1, t0, u0);
  rectangle(p, r0, r1, u0, u1);
  band(p, s, r0, mid, u1, t1);
  band(p, s, mid, r1, u1, t1);
}

/* ---- sequences and panels ---- */

typedef struct span {
  int64_t q0, queries, k0, keys;
} span;

static span span_of(const pylora_seqs *s, int64_t i) {
  span r = {s->q_start[i], s->q_start[i + 1] - s->q_start[i], 0, 0};
  r.k0 = s->k_start ? s->k_start[i] : r.q0;
  r.keys = s->k_len ? s->k_len[i] : r.queries;
  return r;
}

/* Queries [first, first + n) of a sequence, and the union of the keys that they see. */
typedef struct block {
  int64_t row, n;      /* rows of q */
  int64_t key, keys;   /* rows of k and v */
  band_shape of_query; /* rows: queries, columns: keys of the union */
  band_shape of_key;   /* the same seen from the keys */
} block;

static block block_of(span s, const pylora_attn *a, int64_t first, int64_t n) {
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

static int check_attn(const pylora_attn *a) {
  if (!a) return PYLORA_E_NULL;
  if (a->heads < 1 || a->kv_heads < 1 || a->head_dim < 1 || a->heads % a->kv_heads)
    return PYLORA_E_SHAPE;
  return a->window < 0 ? PYLORA_E_VALUE : PYLORA_OK;
}

/* m and n are the rows of q and of k; negative: not known. */
static int check_seqs(const pylora_seqs *s, int64_t m, int64_t n) {
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

/* Scratch of one thread. */
typedef struct scratch {
  float *s, *dp;  /* [keys][32] */
  float *qt, *ot; /* queries and do transposed, [pad_panel(D)][32] */
} scratch;

static int64_t panel_keys(const pylora_seqs *s, const pylora_attn *a) {
  int64_t most = 1;
  for (int64_t i = 0; i < s->n; i++) most = max64(most, span_of(s, i).keys);
  return a->window > 0 ? min64(most, a->window + (int64_t)PANEL - 1) : most;
}

static size_t scratch_bytes(const pylora_seqs *seqs, const pylora_attn *a, int threads) {
  const double floats = 2.0 * PANEL * (double)(panel_keys(seqs, a) + pad_panel(a->head_dim));
  const double bytes = floats * sizeof(float) * threads;
  return bytes > 1e15 ? 0 : (size_t)bytes + PYLORA_ALIGN;
}

size_t pylora_attention_workspace(const pylora_seqs *seqs, const pylora_attn *a) {
  if (check_attn(a) || check_seqs(seqs, -1, -1)) return 0;
  return scratch_bytes(seqs, a, pylora_num_threads());
}

/* out[t][c] = scale * x[c*ld + t] for c < cols, t < dim */
static void transpose(const pylora_kernels *K, const float *x, int64_t ld, int64_t cols,
                      int64_t dim, float scale, float *out) {
  float tile[PANEL * PANEL];
  memset(tile, 0,
         sizeof tile); /* what is beyond cols and dim is multiplied by nothing, but defined */
  for (int64_t t = 0; t < dim; t += PANEL, out += PANEL * PANEL) {
    for (int64_t c = 0; c < cols; c++)
      K->scale(min64(PANEL, dim - t), x + c * ld + t, scale, tile + c * PANEL);
    K->transpose32(tile, out);
  }
}

/* ---- forward ---- */

typedef struct call {
  const pylora_kernels *K;
  const pylora_mat *q, *k, *v, *o, *lse;
  const pylora_mat *d_o, *dq, *dk, *dv; /* backward only */
  const pylora_seqs *seqs;
  const pylora_attn *a;
  scratch w;
  int64_t panel_keys;
  int threads;
} call;

static int take_scratch(call *f, void *ws, size_t bytes) {
  const size_t need = scratch_bytes(f->seqs, f->a, f->threads);
  if (need == 0) return PYLORA_E_SHAPE;
  if (!ws) return PYLORA_E_NULL;
  if (bytes < need) return PYLORA_E_WORKSPACE;
  arena r = arena_of(ws, bytes);
  const int64_t keys = f->threads * f->panel_keys * PANEL,
                dim = f->threads * pad_panel(f->a->head_dim) * PANEL;
  f->w = (scratch){arena_floats(&r, keys), arena_floats(&r, keys), arena_floats(&r, dim),
                   arena_floats(&r, dim)};
  return f->w.s && f->w.dp && f->w.qt && f->w.ot ? PYLORA_OK : PYLORA_E_WORKSPACE;
}

static scratch of_thread(const call *f, int thread) {
  const int64_t s = thread * f->panel_keys * PANEL, t = thread * pad_panel(f->a->head_dim) * PANEL;
  return (scratch){f->w.s + s, f->w.dp + s, f->w.qt + t, f->w.ot + t};
}

/* Columns: n > 1 queries of one head, or `heads` heads of one query. */
static void forward_panel(const call *f, const block *b, int64_t head, int64_t heads, scratch w) {
  const int64_t D = f->a->head_dim, kv = head / (f->a->heads / f->a->kv_heads) * D;
  const int64_t cols = b->n > 1 ? b->n : heads;
  const float *q = f->q->p + b->row * f->q->ld + head * D;
  float *o = f->o->p + b->row * f->o->ld + head * D;
  const int64_t ldq = b->n > 1 ? f->q->ld : D, ldo = b->n > 1 ? f->o->ld : D;
  const float *k = f->k->p + b->key * f->k->ld + kv, *v = f->v->p + b->key * f->v->ld + kv;
  float top[PANEL], sum[PANEL];

  transpose(f->K, q, ldq, cols, D, f->a->scale, w.qt);
  f->K->gemm(b->keys, (int)cols, D, k, f->k->ld, 1, w.qt, PANEL, w.s, PANEL, GEMM_SET);
  for (int64_t c = 0; c < cols && b->n > 1; c++) {
    const int64_t low = max64(0, c + b->of_query.low), high = c + b->of_query.high;
    for (int64_t t = 0; t < low; t++) w.s[t * PANEL + c] = -INFINITY;
    for (int64_t t = high; t < b->keys; t++) w.s[t * PANEL + c] = -INFINITY;
  }
  f->K->softmax_columns(b->keys, (int)cols, w.s, top, sum);

  for (int64_t c = 0; c < cols; c++) memset(o + c * ldo, 0, (size_t)D * sizeof(float));
  const product p = {f->K, w.s, 1, PANEL, v, f->v->ld, o, ldo, D};
  if (b->n > 1)
    band(&p, b->of_query, 0, cols, 0, b->keys);
  else
    rectangle(&p, 0, cols, 0, b->keys);
  for (int64_t c = 0; c < cols; c++) {
    f->K->scale(D, o + c * ldo, 1.0f / sum[c], o + c * ldo);
    float *lse = b->n > 1 ? f->lse->p + (b->row + c) * f->lse->ld + head
                          : f->lse->p + b->row * f->lse->ld + head + c;
    *lse = top[c] + logf(sum[c]);
  }
}

static void forward_task(void *ctx, int64_t task, int thread) {
  const call *f = ctx;
  const int64_t group = f->a->heads / f->a->kv_heads, kv_head = task % f->a->kv_heads;
  int64_t n = task / f->a->kv_heads, i = 0; /* block n of all; of sequence i */
  for (;; i++) {
    const int64_t blocks = ceil_div(span_of(f->seqs, i).queries, PANEL);
    if (n < blocks) break;
    n -= blocks;
  }
  const span s = span_of(f->seqs, i);
  const block b = block_of(s, f->a, n * PANEL, min64(PANEL, s.queries - n * PANEL));
  const scratch w = of_thread(f, thread);
  const int64_t step = b.n > 1 ? 1 : PANEL;
  for (int64_t h = 0; h < group; h += step)
    forward_panel(f, &b, kv_head * group + h, min64(step, group - h), w);
}

int pylora_attention_forward(const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                             const pylora_seqs *seqs, const pylora_attn *a, const pylora_mat *o,
                             const pylora_mat *lse, void *ws, size_t ws_bytes) {
  TRY(check_attn(a));
  if (!q || !k || !v || !o || !lse) return PYLORA_E_NULL;
  const int64_t width = (int64_t)a->heads * a->head_dim,
                kv_width = (int64_t)a->kv_heads * a->head_dim;
  TRY(check_mat(q, q->rows, width, 0));
  TRY(check_mat(k, k->rows, kv_width, 0));
  TRY(check_mat(v, k->rows, kv_width, 0));
  TRY(check_mat(o, q->rows, width, 1));
  TRY(check_mat(lse, q->rows, a->heads, 1));
  TRY(check_seqs(seqs, q->rows, k->rows));
  call f = {pylora_table(),
            q,
            k,
            v,
            o,
            lse,
            NULL,
            NULL,
            NULL,
            NULL,
            seqs,
            a,
            {0},
            panel_keys(seqs, a),
            pylora_num_threads()};
  TRY(take_scratch(&f, ws, ws_bytes));
  int64_t blocks = 0;
  for (int64_t i = 0; i < seqs->n; i++) blocks += ceil_div(span_of(seqs, i).queries, PANEL);
  pylora_parallel(forward_task, &f, blocks * a->kv_heads, f.threads);
  return PYLORA_OK;
}

/* ---- backward ---- */

static void backward_panel(const call *f, const block *b, int64_t head, scratch w) {
  const int64_t D = f->a->head_dim, kv = head / (f->a->heads / f->a->kv_heads) * D;
  const float *q = f->q->p + b->row * f->q->ld + head * D,
              *o = f->o->p + b->row * f->o->ld + head * D;
  const float *d_o = f->d_o->p + b->row * f->d_o->ld + head * D;
  const float *k = f->k->p + b->key * f->k->ld + kv, *v = f->v->p + b->key * f->v->ld + kv;
  float *dq = f->dq->p + b->row * f->dq->ld + head * D;
  float *dk = f->dk->p + b->key * f->dk->ld + kv, *dv = f->dv->p + b->key * f->dv->ld + kv;
  float lse[PANEL], delta[PANEL];

  for (int64_t c = 0; c < b->n; c++) {
    lse[c] = f->lse->p[(b->row + c) * f->lse->ld + head];
    delta[c] = f->K->dot(D, d_o + c * f->d_o->ld, o + c * f->o->ld);
    memset(dq + c * f->dq->ld, 0, (size_t)D * sizeof(float));
  }
  transpose(f->K, q, f->q->ld, b->n, D, f->a->scale, w.qt);
  transpose(f->K, d_o, f->d_o->ld, b->n, D, 1.0f, w.ot);
  f->K->gemm(b->keys, (int)b->n, D, k, f->k->ld, 1, w.qt, PANEL, w.s, PANEL, GEMM_SET);
  f->K->gemm(b->keys, (int)b->n, D, v, f->v->ld, 1, w.ot, PANEL, w.dp, PANEL, GEMM_SET);
  f->K->softmax_columns_backward(b->keys, (int)b->n, w.s, w.dp, lse, delta, f->a->scale);

  const product pq = {f->K, w.dp, 1, PANEL, k, f->k->ld, dq, f->dq->ld, D};
  const product pk = {f->K, w.dp, PANEL, 1, q, f->q->ld, dk, f->dk->ld, D};
  const product pv = {f->K, w.s, PANEL, 1, d_o, f->d_o->ld, dv, f->dv->ld, D};
  band(&pq, b->of_query, 0, b->n, 0, b->keys);
  band(&pk, b->of_key, 0, b->keys, 0, b->n);
  band(&pv, b->of_key, 0, b->keys, 0, b->n);
}

static void backward_sequence(const call *f, int64_t i, int64_t kv_head, int thread) {
  const int64_t group = f->a->heads / f->a->kv_heads;
  const span s = span_of(f->seqs, i);
  const scratch w = of_thread(f, thread);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
    for (int64_t first = 0; first < s.queries; first += PANEL) {
      const block b = block_of(s, f->a, first, min64(PANEL, s.queries - first));
      backward_panel(f, &b, h, w);
    }
}

static void zero_keys(const call *f, int64_t i, int64_t kv_head) {
  const span s = span_of(f->seqs, i);
  const int64_t D = f->a->head_dim;
  for (int64_t t = s.k0; t < s.k0 + s.keys; t++) {
    memset(f->dk->p + t * f->dk->ld + kv_head * D, 0, (size_t)D * sizeof(float));
    memset(f->dv->p + t * f->dv->ld + kv_head * D, 0, (size_t)D * sizeof(float));
  }
}

static void backward_task(void *ctx, int64_t task, int thread) {
  const call *f = ctx;
  const int64_t i = task / f->a->kv_heads, kv_head = task % f->a->kv_heads;
  zero_keys(f, i, kv_head);
  backward_sequence(f, i, kv_head, thread);
}

/* Sequences that share keys (a common prefix): their sums go to the same rows, one after the other. */
static void backward_shared_task(void *ctx, int64_t kv_head, int thread) {
  const call *f = ctx;
  for (int64_t i = 0; i < f->seqs->n; i++) zero_keys(f, i, kv_head);
  for (int64_t i = 0; i < f->seqs->n; i++) backward_sequence(f, i, kv_head, thread);
}

static int keys_shared(const pylora_seqs *s) {
  int64_t end = 0;
  for (int64_t i = 0; i < s->n; i++) {
    const span p = span_of(s, i);
    if (p.keys && p.k0 < end) return 1; /* also when merely not in order */
    if (p.keys) end = p.k0 + p.keys;
  }
  return 0;
}

int pylora_attention_backward(const pylora_mat *d_o, const pylora_mat *q, const pylora_mat *k,
                              const pylora_mat *v, const pylora_mat *o, const pylora_mat *lse,
                              const pylora_seqs *seqs, const pylora_attn *a, const pylora_mat *dq,
                              const pylora_mat *dk, const pylora_mat *dv, void *ws,
                              size_t ws_bytes) {
  TRY(check_attn(a));
  if (!d_o || !q || !k || !v || !o || !lse || !dq || !dk || !dv) return PYLORA_E_NULL;
  const int64_t width = (int64_t)a->heads * a->head_dim,
                kv_width = (int64_t)a->kv_heads * a->head_dim;
  TRY(check_mat(q, q->rows, width, 0));
  TRY(check_mat(k, k->rows, kv_width, 0));
  TRY(check_mat(v, k->rows, kv_width, 0));
  TRY(check_mat(o, q->rows, width, 0));
  TRY(check_mat(d_o, q->rows, width, 0));
  TRY(check_mat(lse, q->rows, a->heads, 0));
  TRY(check_mat(dq, q->rows, width, 1));
  TRY(check_mat(dk, k->rows, kv_width, 1));
  TRY(check_mat(dv, k->rows, kv_width, 1));
  TRY(check_seqs(seqs, q->rows, k->rows));
  call f = {
      pylora_table(),      q, k, v, o, lse, d_o, dq, dk, dv, seqs, a, {0}, panel_keys(seqs, a),
      pylora_num_threads()};
  TRY(take_scratch(&f, ws, ws_bytes));
  if (keys_shared(seqs))
    pylora_parallel(backward_shared_task, &f, a->kv_heads, f.threads);
  else
    pylora_parallel(backward_task, &f, seqs->n * a->kv_heads, f.threads);
  return PYLORA_OK;
}
