/* attention_backward.c - the gradients of attention. A task is a kv head and a part of a sequence's
 * queries: dq is then one task's own, while dk and dv, which are sums over the queries, are summed
 * per part and the parts added in their order. How a sequence is cut depends on its length alone. */
#include <math.h>

#include "ops/attention.h"

/* Where a part's dk and dv [keys][kv_width] are, or go; rows as far as its queries see. */
typedef struct partial {
  float *dk, *dv;
  int64_t ldk, ldv; /* of dk, dv */
  int64_t first, end;
} partial;

/* Is part 0 summed where the result goes? */
static int in_place(const call *f) { return f->dk->p && f->dv->p && !f->shared_keys; }

/* Parts of equal work: it grows with the square of the queries. Whole panels. */
static int64_t cut(int64_t queries, int64_t chunk) {
  const int64_t n = chunks_of(queries);
  if (chunk == n) return queries;
  const double at = (double)queries * sqrt((double)chunk / (double)n);
  return (int64_t)(at / PANEL + 0.5) * PANEL;
}

static partial partial_of(const call *f, int64_t i, int64_t chunk) {
  const span s = span_of(f->seqs, i);
  const int64_t width = (int64_t)f->a->kv_heads * f->a->head_dim;
  const int64_t q0 = cut(s.queries, chunk), q1 = cut(s.queries, chunk + 1);
  const block b = pylora_block_of(s, f->a, q0, q1 - q0);
  partial r = {NULL, NULL, width, width, b.key - s.k0, b.key - s.k0 + b.keys};
  if (chunk == 0 && in_place(f)) {
    r.dk = f->dk->p + s.k0 * f->dk->ld, r.dv = f->dv->p + s.k0 * f->dv->ld;
    r.ldk = f->dk->ld, r.ldv = f->dv->ld;
    r.first = 0, r.end = s.keys; /* all of it is set */
  } else {
    r.dk = f->shared + f->at[i] + 2 * chunk * s.keys * width;
    r.dv = r.dk + s.keys * width;
  }
  return r;
}

/* What the panels of one task have in common: k [keys][D] float32; k and v as scores want them. */
typedef struct sides {
  const float *k;
  int64_t ldk;
  pylora_vec key, value;
  int64_t ld_key, ld_value;
  int64_t at; /* the row of k that they start with */
} sides;

static pylora_vec step(pylora_vec x, int64_t n) {
  return (pylora_vec){x.b ? NULL : x.p + n, x.b ? x.b + n : NULL};
}

static void backward_panel(const call *f, const block *b, int64_t head, const sides *x,
                           const partial *to, int64_t k0, const scratch *w) {
  const int64_t D = f->a->head_dim, kv = head / (f->a->heads / f->a->kv_heads) * D;
  const int64_t skip = b->key - x->at;
  const int qk = in_pairs(f->q, f->k, D), ov = in_pairs(f->d_o, f->v, D);
  int64_t ldq, ldg, ldo;
  const float *q = pylora_rows(f->K, f->q, b->row, head * D, b->n, D, w->q, &ldq);
  const float *g = pylora_rows(f->K, f->d_o, b->row, head * D, b->n, D, w->d_o, &ldg);
  float lse[PANEL], delta[PANEL];
  for (int64_t c = 0; c < b->n; c++) {
    const float *o = pylora_rows(f->K, f->o, b->row + c, head * D, 1, D, w->row, &ldo);
    lse[c] = f->lse->p[(b->row + c) * f->lse->ld + head];
    delta[c] = f->K->dot(D, g + c * ldg, o);
  }
  pylora_transpose(f->K, row_at(f->q, b->row, head * D), f->q->ld, b->n, D, qk, w->qt);
  pylora_transpose(f->K, row_at(f->d_o, b->row, head * D), f->d_o->ld, b->n, D, ov, w->ot);
  pylora_scores(f, b->keys, b->n, qk, step(x->key, skip * x->ld_key), x->ld_key, w->qt, w->s);
  pylora_scores(f, b->keys, b->n, ov, step(x->value, skip * x->ld_value), x->ld_value, w->ot,
                w->dp);
  if (f->a->softcap > 0)
    f->K->softmax_columns_backward_capped(b->keys, (int)b->n, w->s, w->dp, lse, delta, f->a->scale,
                                          f->a->softcap);
  else
    f->K->softmax_columns_backward(b->keys, (int)b->n, w->s, w->dp, lse, delta, f->a->scale);

  float *dq = f->dq->b ? w->acc : f->dq->p + b->row * f->dq->ld + head * D;
  const int64_t ld_dq = f->dq->b ? D : f->dq->ld, first = b->key - k0;
  for (int64_t c = 0; c < b->n; c++) memset(dq + c * ld_dq, 0, (size_t)D * sizeof(float));
  const product pq = {f->K, w->dp, 1, PANEL, x->k + skip * x->ldk, x->ldk, dq, ld_dq, D};
  const product pk = {f->K, w->dp, PANEL, 1, q, ldq, to->dk + first * to->ldk + kv, to->ldk, D};
  const product pv = {f->K, w->s, PANEL, 1, g, ldg, to->dv + first * to->ldv + kv, to->ldv, D};
  pylora_band(&pq, b->of_query, 0, b->n, 0, b->keys);
  pylora_band(&pk, b->of_key, 0, b->keys, 0, b->n);
  pylora_band(&pv, b->of_key, 0, b->keys, 0, b->n);
  for (int64_t c = 0; c < b->n && f->dq->b; c++)
    f->K->to_bf16(D, dq + c * D, f->dq->b + (b->row + c) * f->dq->ld + head * D);
}

static void backward_task(void *ctx, int64_t task, int thread) {
  const call *f = ctx;
  const int64_t D = f->a->head_dim, group = f->a->heads / f->a->kv_heads;
  const int64_t n = task / f->a->kv_heads, kv = task % f->a->kv_heads;
  const int64_t i = pylora_owner(f->first, f->seqs->n, n), chunk = n - f->first[i];
  const span s = span_of(f->seqs, i);
  const partial to = partial_of(f, i, chunk);
  const int64_t q0 = cut(s.queries, chunk), q1 = cut(s.queries, chunk + 1);
  const block all = pylora_block_of(s, f->a, q0, q1 - q0); /* its keys */
  const scratch w = pylora_attention_scratch(f, thread);
  for (int64_t t = to.first; t < to.end; t++) {
    memset(to.dk + t * to.ldk + kv * D, 0, (size_t)D * sizeof(float));
    memset(to.dv + t * to.ldv + kv * D, 0, (size_t)D * sizeof(float));
  }
  sides x = {.at = all.key,
             .key = row_at(f->k, all.key, kv * D),
             .value = row_at(f->v, all.key, kv * D),
             .ld_key = f->k->ld,
             .ld_value = f->v->ld};
  x.k = pylora_rows(f->K, f->k, all.key, kv * D, all.keys, D, w.k, &x.ldk);
  if (x.key.b && !in_pairs(f->q, f->k, D)) x.key = (pylora_vec){w.k, NULL}, x.ld_key = D;
  if (x.value.b && !in_pairs(f->d_o, f->v, D)) {
    pylora_rows(f->K, f->v, all.key, kv * D, all.keys, D, w.v, &x.ld_value);
    x.value = (pylora_vec){w.v, NULL};
  }
  for (int64_t h = kv * group; h < (kv + 1) * group; h++)
    for (int64_t first = q0; first < q1; first += PANEL) {
      const block b = pylora_block_of(s, f->a, first, min64(PANEL, q1 - first));
      backward_panel(f, &b, h, &x, &to, s.k0, &w);
    }
}

/* ---- the parts' sums ---- */

enum { PIECE = 256, SUM_ROWS = 16 };

/* Rows and columns of one matrix: dk or dv. */
static void sum_parts(const call *f, int64_t row, int64_t i0, int64_t i1, int value) {
  const pylora_mat *out = value ? f->dv : f->dk;
  for (int64_t c = 0; c < out->cols; c += PIECE) {
    float sum[PIECE];
    const int64_t n = min64(PIECE, out->cols - c);
    int parts = 0;
    for (int64_t i = i0; i < i1; i++) {
      const span s = span_of(f->seqs, i);
      const int64_t t = row - s.k0;
      if (t < 0 || t >= s.keys) continue;
      for (int64_t chunk = 0; chunk < chunks_of(s.queries); chunk++) {
        const partial p = partial_of(f, i, chunk);
        if (t < p.first || t >= p.end) continue;
        const float *x = value ? p.dv + t * p.ldv + c : p.dk + t * p.ldk + c;
        for (int64_t j = 0; j < n; j++) sum[j] = parts ? sum[j] + x[j] : x[j];
        parts++;
      }
      if (parts == 0) memset(sum, 0, sizeof sum), parts = 1; /* a key of this one, unseen */
    }
    if (parts == 0) return; /* no sequence's: left as it is */
    const pylora_vec y = row_at(out, row, c);
    if (y.b)
      f->K->to_bf16(n, sum, y.b);
    else
      memcpy(y.p, sum, (size_t)n * sizeof(float));
  }
}

static void sum_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const call *f = ctx;
  int64_t i0 = 0, i1 = f->seqs->n, row, end;
  if (f->shared_keys) {
    row = task * SUM_ROWS, end = min64(row + SUM_ROWS, f->k->rows);
  } else { /* f->alone counts blocks of rows */
    i0 = pylora_owner(f->alone, f->seqs->n, task), i1 = i0 + 1;
    const span s = span_of(f->seqs, i0);
    row = s.k0 + (task - f->alone[i0]) * SUM_ROWS, end = min64(row + SUM_ROWS, s.k0 + s.keys);
  }
  for (; row < end; row++) sum_parts(f, row, i0, i1, 0), sum_parts(f, row, i0, i1, 1);
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
  TRY(pylora_check_attn(a));
  if (!d_o || !q || !k || !v || !o || !lse || !dq || !dk || !dv) return PYLORA_E_NULL;
  const int64_t width = (int64_t)a->heads * a->head_dim,
                kv_width = (int64_t)a->kv_heads * a->head_dim;
  TRY(check_mat16(q, q->rows, width, 0));
  TRY(check_mat16(k, k->rows, kv_width, 0));
  TRY(check_mat16(v, k->rows, kv_width, 0));
  TRY(check_mat16(o, q->rows, width, 0));
  TRY(check_mat16(d_o, q->rows, width, 0));
  TRY(check_mat(lse, q->rows, a->heads, 0));
  TRY(check_mat16(dq, q->rows, width, 1));
  TRY(check_mat16(dk, k->rows, kv_width, 1));
  TRY(check_mat16(dv, k->rows, kv_width, 1));
  TRY(pylora_check_seqs(seqs, q->rows, k->rows));
  call f = {.K = pylora_table(),
            .q = q,
            .k = k,
            .v = v,
            .o = o,
            .lse = lse,
            .d_o = d_o,
            .dq = dq,
            .dk = dk,
            .dv = dv,
            .seqs = seqs,
            .a = a,
            .threads = pylora_num_threads(),
            .shared_keys = keys_shared(seqs)};
  TRY(pylora_take_scratch(&f, 1, ws, ws_bytes));
  f.first[0] = f.alone[0] = f.at[0] = 0;
  for (int64_t i = 0; i < seqs->n; i++) {
    const span s = span_of(seqs, i);
    const int64_t n = chunks_of(s.queries), sums = in_place(&f) && n == 1 ? 0 : s.keys;
    f.first[i + 1] = f.first[i] + n;
    f.alone[i + 1] = f.alone[i] + ceil_div(sums, SUM_ROWS);
    f.at[i + 1] = f.at[i] + 2 * n * s.keys * kv_width;
  }
  pylora_parallel(backward_task, &f, f.first[seqs->n] * a->kv_heads, f.threads);
  pylora_parallel(sum_task, &f, f.shared_keys ? ceil_div(k->rows, SUM_ROWS) : f.alone[seqs->n],
                  f.threads);
  return PYLORA_OK;
}
