/* attention_decode.c - attention of sequences with one query, as in decoding: a pass over the keys and a
 * pass over the values, as fast as memory gives them.
 *
 * The first pass makes scores, its tasks being pieces of a sequence's keys; the second one sums up the
 * values, its tasks being pieces of their columns, because a column's sum is one chain over the keys.
 * So every thread has work with a single sequence, too, and each sum has the order that it has in
 * attention_forward.c: a query gets the same bits in both. */
#include <math.h>

#include "ops/attention.h"
#include "ops/low_rank.h"

enum {
  COLUMNS = 32,
  VALUE_KEYS = 64 /* keys whose values are summed before the next columns' are */
};

typedef struct query {
  int64_t row, key, keys;
  float *s, *top; /* [heads][keys] and [heads] */
} query;

static query query_of(const call *f, int64_t i) {
  const block b = pylora_block_of(span_of(f->seqs, i), f->a, 0, 1);
  float *s = f->shared + f->at[i];
  return (query){b.row, b.key, b.keys, s, s + f->a->heads * b.keys};
}

static void score_task(void *ctx, int64_t task, int thread) {
  const call *f = ctx;
  const int64_t D = f->a->head_dim, group = f->a->heads / f->a->kv_heads;
  const int64_t i = pylora_owner(f->alone, f->seqs->n, task);
  const query t = query_of(f, i);
  const int64_t first = (task - f->alone[i]) * ALONE_KEYS, n = min64(ALONE_KEYS, t.keys - first);
  pylora_vec q = row_at(f->q, t.row, 0);
  if (q.b && !in_pairs(f->q, f->k, D)) {
    float *wide = pylora_attention_scratch(f, thread).heads;
    f->K->from_bf16(f->q->cols, q.b, wide);
    q = (pylora_vec){wide, NULL};
  }
  for (int64_t kv = 0; kv < f->a->kv_heads; kv++) {
    const int64_t at = kv * group * D;
    const pylora_vec own = {q.b ? NULL : q.p + at, q.b ? q.b + at : NULL};
    f->K->few_scores(n, D, (int)group, own, row_at(f->k, t.key + first, kv * D), f->k->ld,
                     t.s + kv * group * t.keys + first, t.keys);
    for (int64_t h = kv * group; f->a->softcap > 0 && h < (kv + 1) * group; h++) {
      float *s = t.s + h * t.keys + first;
      f->K->soft_cap(n, s, f->a->scale, f->a->softcap, s);
    }
  }
}

/* Which sequence of one query is number n of them? f->first counts the others, f->alone its pieces. */
static int64_t nth_alone(const call *f, int64_t n) {
  int64_t i = 0;
  for (;; i++)
    if (f->alone[i + 1] > f->alone[i] && n-- == 0) return i;
}

static void softmax(const call *f, const query *t, int64_t head) {
  f->K->softmax_row(t->keys, pylora_scale(f->a), t->s + head * t->keys, &t->top[head]);
}

static void softmax_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const call *f = ctx;
  const query t = query_of(f, nth_alone(f, task / f->a->heads));
  softmax(f, &t, task % f->a->heads);
}

/* Columns [c, end) of one kv head in v. */
typedef struct piece {
  int64_t kv, c, end;
} piece;

static piece piece_of(int64_t D, int64_t unit, int64_t last) {
  const int64_t per_head = ceil_div(D, COLUMNS), kv = unit / per_head;
  const int64_t end = min64(last, (kv + 1) * per_head);
  return (piece){kv, unit % per_head * COLUMNS, min64(D, (end - kv * per_head) * COLUMNS)};
}

static void value_task(void *ctx, int64_t task, int thread) {
  const call *f = ctx;
  const int64_t D = f->a->head_dim, group = f->a->heads / f->a->kv_heads;
  const query t = query_of(f, nth_alone(f, task / f->parts));
  const int64_t units = f->a->kv_heads * ceil_div(D, COLUMNS), part = task % f->parts;
  const int64_t first = units * part / f->parts, last = units * (part + 1) / f->parts;
  const scratch w = pylora_attention_scratch(f, thread);
  float *o = w.heads, *sum = w.heads + f->a->heads * D; /* [heads][D] and [heads] */
  memset(o, 0, (size_t)(f->a->heads * D) * sizeof(float));
  memset(sum, 0, (size_t)f->a->heads * sizeof(float));
  if (f->parts == 1)
    for (int64_t h = 0; h < f->a->heads; h++) softmax(f, &t, h);

  const int64_t per_head = ceil_div(D, COLUMNS);
  for (int64_t j = 0; j < t.keys; j += VALUE_KEYS) {
    const int64_t n = min64(VALUE_KEYS, t.keys - j);
    for (int64_t u = first; u < last; u = (u / per_head + 1) * per_head) {
      const piece p = piece_of(D, u, last);
      f->K->few_values(n, p.end - p.c, (int)group, t.s + p.kv * group * t.keys + j, t.keys,
                       row_at(f->v, t.key + j, p.kv * D + p.c), f->v->ld,
                       o + p.kv * group * D + p.c, D, sum + p.kv * group);
    }
  }
  for (int64_t u = first; u < last; u = (u / per_head + 1) * per_head) {
    const piece p = piece_of(D, u, last);
    for (int64_t h = p.kv * group; h < (p.kv + 1) * group; h++) {
      pylora_put_scaled(f->K, p.end - p.c, o + h * D + p.c, 1.0f / sum[h],
                        row_at(f->o, t.row, h * D + p.c), w.row);
      if (p.c == 0) f->lse->p[t.row * f->lse->ld + h] = t.top[h] + logf(sum[h]);
    }
  }
}

void pylora_attention_alone(call *f, int64_t pieces) {
  int64_t n = 0;
  for (int64_t i = 0; i < f->seqs->n; i++) n += f->alone[i + 1] > f->alone[i];
  const int64_t units = f->a->kv_heads * ceil_div(f->a->head_dim, COLUMNS);
  double keys = 0; /* one thread, where waking others would take as long */
  for (int64_t i = 0; i < f->seqs->n; i++)
    if (f->alone[i + 1] > f->alone[i]) keys += (double)query_of(f, i).keys;
  const int threads =
      pylora_threads_for(4 * keys * (double)(f->a->heads * f->a->head_dim), f->threads);
  f->parts = n >= 4 * threads ? 1 : min64(units, threads);
  pylora_parallel(score_task, f, pieces, threads);
  if (f->parts > 1) pylora_parallel(softmax_task, f, n * f->a->heads, threads);
  pylora_parallel(value_task, f, n * f->parts, threads);
}
