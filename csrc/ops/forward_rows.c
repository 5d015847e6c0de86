/* forward_rows.c - rows of x: normed, prepared for W's format, and h = x Aᵀ of each projection. */
#include "ops/forward.h"

/* Rows that are alone in their segment, collected until the kernel has work for its latencies. */
typedef struct few {
  int n;
  const low_pack *P[PYLORA_FEW];
  const void *row[PYLORA_FEW];
  float *out[PYLORA_FEW];
} few;

static void flush(const forward *f, few *q) {
  pylora_down_few(f->K, q->n, q->P, q->row, q->out);
  q->n = 0;
}

static void down(const forward *f, int64_t i, int64_t end) {
  few q = {0};
  for (int64_t s = segment_of(f, i); s < f->segments && f->start[s] < end; s++) {
    const int64_t a = max64(i, f->start[s]), n = min64(end, f->start[s + 1]) - a;
    if (n <= 0) continue;
    for (const projection *p = f->p; p < f->p + f->n; p++) {
      const low_pack *P = p->h && !p->apart ? adapter_in(p, s) : NULL;
      if (!P) continue;
      const size_t size = P->dtype == PYLORA_BF16 ? sizeof(uint16_t) : sizeof(float);
      const void *rows = (const char *)f->low_rows + a * f->low_stride * (int64_t)size;
      float *out = p->h + a * p->ldh;
      if (n > 1) {
        pylora_down(f->K, P, n, rows, f->low_stride, out, p->ldh);
        continue;
      }
      if (q.n == PYLORA_FEW || (q.n && P->r != q.P[0]->r)) flush(f, &q);
      q.P[q.n] = P, q.row[q.n] = rows, q.out[q.n++] = out;
    }
  }
  if (q.n) flush(f, &q);
}

void pylora_rows_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const forward *f = ctx;
  const int64_t i = task * f->per_rows, end = min64(i + f->per_rows, f->m);
  if (f->raw) {
    const pylora_mat *x = f->x;
    pylora_norm_rows(f->K, f->raw, f->norm, x, f->rstd, i, end);
    for (int64_t t = i; x->b && f->k % 2 && t < end; t++) x->b[t * x->ld + f->k] = 0;
  }
  if (f->prepared && f->k)
    f->F->prepare(f->K, f->x, i, end - i, (char *)f->prepared + (size_t)i * f->stride);
  for (int64_t t = i; f->wide && t < end; t++)
    f->K->from_bf16(f->k, f->x->b + t * f->x->ld, f->wide + t * f->k);
  if (f->down) down(f, i, end);
}
