/* optim.c - AdamW in one pass over memory, and the sum of squares that gradient clipping needs. */
#include <math.h>

#include "runtime/internal.h"

enum { CHUNK = 16 * 1024, PARTS = 256 /* partial sums, whatever the number of threads */ };

typedef struct adam {
  const pylora_kernels *K;
  int64_t n;
  float *param, *m, *v;
  const float *grad;
  float c[9];
} adam;

static void adam_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const adam *f = ctx;
  const int64_t i = task * CHUNK;
  f->K->adamw(min64(CHUNK, f->n - i), f->param + i, f->grad + i, f->m + i, f->v + i, f->c);
}

int pylora_adamw_step(int64_t n, float *param, const float *grad, float *m, float *v,
                      const pylora_adamw *o) {
  if (!o) return PYLORA_E_NULL;
  if (n < 0) return PYLORA_E_SHAPE;
  if (n && (!param || !grad || !m || !v)) return PYLORA_E_NULL;
  const int fine = o->step >= 1 && o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0 && o->beta2 < 1 &&
                   o->eps >= 0 && isfinite(o->eps) && isfinite(o->lr) && isfinite(o->weight_decay);
  if (!fine) return PYLORA_E_VALUE;
  /* In double: 1 - beta^step loses what float has left when beta is near 1. */
  const double unbias1 = 1 - pow(o->beta1, (double)o->step),
               unbias2 = 1 - pow(o->beta2, (double)o->step);
  adam f = {pylora_table(), n, param, m, v, grad, {0}};
  const double c[9] = {o->grad_scale,  o->beta1,    1 - o->beta1, o->beta2,
                       1 - o->beta2,   1 / unbias2, o->eps,       1 - o->lr * o->weight_decay,
                       o->lr / unbias1};
  for (int i = 0; i < 9; i++) f.c[i] = (float)c[i];
  pylora_parallel(adam_task, &f, ceil_div(n, CHUNK), pylora_num_threads());
  return PYLORA_OK;
}

typedef struct squares {
  int64_t n, per_part;
  const float *x;
  double part[PARTS];
} squares;

static void squares_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  squares *f = ctx;
  const int64_t end = min64(f->n, (task + 1) * f->per_part);
  double acc[8] = {0};
  int64_t i = task * f->per_part;
  for (; i + 8 <= end; i += 8)
    for (int j = 0; j < 8; j++) acc[j] += (double)f->x[i + j] * f->x[i + j];
  for (; i < end; i++) acc[0] += (double)f->x[i] * f->x[i];
  f->part[task] = ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
}

int pylora_sum_squares(int64_t n, const float *x, double *out) {
  if (!out || (n > 0 && !x)) return PYLORA_E_NULL;
  if (n < 0) return PYLORA_E_SHAPE;
  squares f = {n, max64(CHUNK, ceil_div(n, PARTS)), x, {0}};
  const int64_t parts = ceil_div(n, f.per_part);
  pylora_parallel(squares_task, &f, parts, pylora_num_threads());
  double total = 0;
  for (int64_t i = 0; i < parts; i++) total += f.part[i];
  *out = total;
  return PYLORA_OK;
}
