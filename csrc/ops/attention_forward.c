/* attention_forward.c - attention of prompts and training batches: a task is a block of 32 queries of a
 * sequence, for one kv head. Sequences of a single query go to attention_decode.c, where the same
 * sums are made in the same order. */
#include <math.h>

#include "ops/attention.h"

static void forward_panel(const call *f, const block *b, int64_t head, pylora_vec k, int64_t ldk,
                          const float *v, int64_t ldv, const scratch *w) {
  const int64_t D = f->a->head_dim, cols = b->n;
  const int pairs = in_pairs(f->q, f->k, D);
  float top[PANEL], sum[PANEL];

  pylora_transpose(f->K, row_at(f->q, b->row, head * D), f->q->ld, cols, D, pairs, w->qt);
  pylora_scores(f, b->keys, cols, pairs, k, ldk, w->qt, w->s);
  if (f->a->softcap > 0) /* scaled and capped; columns that are not used are left alone */
    for (int64_t t = 0; t < b->keys; t += cols == PANEL ? b->keys : 1)
      f->K->soft_cap(cols == PANEL ? b->keys * PANEL : cols, w->s + t * PANEL, f->a->scale,
                     f->a->softcap, w->s + t * PANEL);
  for (int64_t c = 0; c < cols; c++) {
    const int64_t low = max64(0, c + b->of_query.low), high = c + b->of_query.high;
    for (int64_t t = 0; t < low; t++) w->s[t * PANEL + c] = -INFINITY;
    for (int64_t t = high; t < b->keys; t++) w->s[t * PANEL + c] = -INFINITY;
  }
  f->K->softmax_columns(b->keys, (int)cols, pylora_scale(f->a), w->s, top, sum);

  memset(w->acc, 0, (size_t)(cols * D) * sizeof(float));
  const product p = {f->K, w->s, 1, PANEL, v, ldv, w->acc, D, D};
  pylora_band(&p, b->of_query, 0, cols, 0, b->keys);
  for (int64_t c = 0; c < cols; c++) {
    pylora_put_scaled(f->K, D, w->acc + c * D, 1.0f / sum[c], row_at(f->o, b->row + c, head * D),
                      w->row);
    f->lse->p[(b->row + c) * f->lse->ld + head] = top[c] + logf(sum[c]);
  }
}

static void forward_task(void *ctx, int64_t task, int thread) {
  const call *f = ctx;
  const int64_t D = f->a->head_dim, group = f->a->heads / f->a->kv_heads;
  const int64_t last = f->first[f->seqs->n] - 1; /* late blocks see most keys: they go first */
  const int64_t kv = task % f->a->kv_heads, n = last - task / f->a->kv_heads;
  const int64_t i = pylora_owner(f->first, f->seqs->n, n), at = (n - f->first[i]) * PANEL;
  const span s = span_of(f->seqs, i);
  const block b = pylora_block_of(s, f->a, at, min64(PANEL, s.queries - at));
  const scratch w = pylora_attention_scratch(f, thread);
  int64_t ldk = f->k->ld, ldv;
  pylora_vec k = row_at(f->k, b.key, kv * D);
  if (k.b && !in_pairs(f->q, f->k, D)) { /* the kernel's argument is not const, but only read */
    pylora_rows(f->K, f->k, b.key, kv * D, b.keys, D, w.k, &ldk);
    k = (pylora_vec){w.k, NULL};
  }
  const float *v = pylora_rows(f->K, f->v, b.key, kv * D, b.keys, D, w.v, &ldv);
  for (int64_t h = kv * group; h < (kv + 1) * group; h++)
    forward_panel(f, &b, h, k, ldk, v, ldv, &w);
}

int pylora_attention_forward(const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                             const pylora_seqs *seqs, const pylora_attn *a, const pylora_mat *o,
                             const pylora_mat *lse, void *ws, size_t ws_bytes) {
  TRY(pylora_check_attn(a));
  if (!q || !k || !v || !o || !lse) return PYLORA_E_NULL;
  const int64_t width = (int64_t)a->heads * a->head_dim,
                kv_width = (int64_t)a->kv_heads * a->head_dim;
  TRY(check_mat16(q, q->rows, width, 0));
  TRY(check_mat16(k, k->rows, kv_width, 0));
  TRY(check_mat16(v, k->rows, kv_width, 0));
  TRY(check_mat16(o, q->rows, width, 1));
  TRY(check_mat(lse, q->rows, a->heads, 1));
  TRY(pylora_check_seqs(seqs, q->rows, k->rows));
  call f = {.K = pylora_table(),
            .q = q,
            .k = k,
            .v = v,
            .o = o,
            .lse = lse,
            .seqs = seqs,
            .a = a,
            .threads = pylora_num_threads()};
  TRY(pylora_take_scratch(&f, 0, ws, ws_bytes));
  f.first[0] = f.alone[0] = f.at[0] = 0;
  for (int64_t i = 0; i < seqs->n; i++) {
    const span s = span_of(seqs, i);
    const int alone = s.queries == 1;
    const int64_t keys = alone ? pylora_block_of(s, a, 0, 1).keys : 0;
    f.first[i + 1] = f.first[i] + (alone ? 0 : ceil_div(s.queries, PANEL));
    f.alone[i + 1] = f.alone[i] + ceil_div(keys, ALONE_KEYS);
    f.at[i + 1] = f.at[i] + (alone ? a->heads * (keys + 1) : 0);
  }
  pylora_parallel(forward_task, &f, f.first[seqs->n] * a->kv_heads, f.threads);
  if (f.alone[seqs->n]) pylora_attention_alone(&f, f.alone[seqs->n]);
  return PYLORA_OK;
}
