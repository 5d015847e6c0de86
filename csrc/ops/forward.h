/* forward.h - the tasks of a forward pass through projections of one x, and what they share.
 *
 * Rows first: a task takes some rows of x through the norm, into the form that W's format multiplies, and
 * through A (forward_rows.c).  Then tiles: a task takes some panels of 32 outputs of a block of rows
 * through the product, B and what follows (forward_tiles.c).  Every sum runs in one order (see
 * cpu/kernels.h), whatever the blocks, segments and threads. */
#ifndef PYLORA_FORWARD_H
#define PYLORA_FORWARD_H

#include "ops/low_rank.h"

/* One projection, looked at once before any work. */
typedef struct projection {
  const pylora_linear *l;
  const pylora_finish *finish; /* or NULL */
  const low_pack *own;         /* packed here (one segment), or NULL */
  int up_later;                /* own has no Bt: each task packs the panel that it alone needs */
  float *h;                    /* [m, ldh]; NULL: no adapters */
  int64_t ldh;
  int64_t panels, groups;  /* of y; 0 groups: the projection before does this one, too */
  int64_t unit, per_group; /* panels that only go together; per task */
  int pair;                /* 2: with the one after it, for their product; else 1 */
  int apart;               /* its h is not of x itself: made afterwards */
  int scaled;              /* some segment has a factor */
} projection;

typedef struct forward {
  const pylora_kernels *K;
  const pylora_format *F;
  int64_t m, k, n;
  const projection *p;
  int64_t segments;
  const int64_t *start; /* [segments + 1] */

  /* rows */
  int64_t per_rows;      /* of a task */
  const pylora_mat *raw; /* what `norm` norms to x, or NULL */
  const pylora_norm *norm;
  float *rstd;
  const pylora_mat *x;
  void *prepared;       /* where x is prepared to, or NULL: it is multiplied as it lies */
  float *wide;          /* where x is widened to for A, or NULL */
  int down;             /* h is made, too */
  const void *low_rows; /* what A is multiplied with: float32 or bfloat16 */
  int64_t low_stride;   /* in elements */

  /* tiles */
  const void *rows; /* prepared x */
  size_t stride;
  int64_t block, all_groups;
  float *tiles;
} forward;

void pylora_rows_task(void *forward, int64_t task, int thread);
void pylora_tiles_task(void *forward, int64_t task, int thread);

static inline const low_pack *adapter_in(const projection *p, int64_t segment) {
  if (p->own) return p->own;
  const pylora_lora *l = p->l->lora ? p->l->lora[segment] : NULL;
  return l && l->r ? l->packed : NULL;
}

static inline const float *factor_in(const projection *p, int64_t segment) {
  return p->scaled ? p->l->factor[segment] : NULL;
}

/* Are tiles of n rows made of several panels at a time? */
static inline int pylora_in_panels(const forward *f, int64_t n) {
  return f->F->products && (f->F->many ? n >= f->F->many : f->K->tiles);
}

/* The last segment that starts at or before row i; from there on they are in order. */
static inline int64_t segment_of(const forward *f, int64_t i) {
  int64_t s = 0, top = f->segments - 1;
  while (s < top) {
    const int64_t mid = (s + top + 1) / 2;
    if (f->start[mid] <= i)
      s = mid;
    else
      top = mid - 1;
  }
  return s;
}

#endif
