/* transformer.c - what a Llama block needs besides linear layers and attention: RMSNorm, rotary
 * embedding, SwiGLU and the token embedding, each with its backward. Rows are independent tasks; sums
 * over rows (dw, dW) are split by columns instead, so that each is added up in the order of the rows. */
#include <math.h>

#include "formats/format.h"

enum {
  WORK = 16 * 1024, /* elements per task: microseconds, against the cost of handing it over */
  PIECE = 512,      /* numbers widened at a time */
};

/* Tasks of several rows each: fn(ctx, first, end). */
typedef struct rows {
  void (*fn)(const void *ctx, int64_t first, int64_t end);
  const void *ctx;
  int64_t n, per_task;
} rows;

static void rows_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const rows *r = ctx;
  r->fn(r->ctx, task * r->per_task, min64((task + 1) * r->per_task, r->n));
}

void pylora_each_row(void (*fn)(const void *, int64_t, int64_t), const void *ctx, int64_t n,
                     int64_t elements) {
  rows r = {fn, ctx, n, max64(1, WORK / max64(1, elements))};
  pylora_parallel(rows_task, &r, ceil_div(n, r.per_task), pylora_num_threads());
}

/* ---- another type ---- */

typedef struct cast {
  const pylora_kernels *K;
  const pylora_mat *x, *y;
} cast;

static void cast_rows(const void *ctx, int64_t first, int64_t end) {
  const cast *f = ctx;
  const int64_t k = f->x->cols;
  for (int64_t i = first; i < end; i++) {
    const pylora_vec x = row_at(f->x, i, 0), y = row_at(f->y, i, 0);
    if (x.p && y.b)
      f->K->to_bf16(k, x.p, y.b);
    else if (x.b && y.p)
      f->K->from_bf16(k, x.b, y.p);
    else if (x.p)
      memmove(y.p, x.p, (size_t)k * sizeof *x.p);
    else
      memmove(y.b, x.b, (size_t)k * sizeof *x.b);
  }
}

int pylora_cast(const pylora_mat *x, const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_mat16(x, x->rows, x->cols, 0));
  TRY(check_mat16(y, x->rows, x->cols, 1));
  if (x->rows == 0 || x->cols == 0) return PYLORA_OK;
  const cast f = {.K = pylora_table(), .x = x, .y = y};
  pylora_each_row(cast_rows, &f, x->rows, x->cols);
  return PYLORA_OK;
}

/* ---- RMSNorm ---- */

typedef struct norm {
  const pylora_kernels *K;
  const pylora_mat *x, *dy, *y; /* y: the result, dx in backward */
  const float *w;
  float eps, *rstd;
  const float *rstd_in;
  int add;
  float *dw;
} norm;

/* Rows in bfloat16 are widened a piece at a time. */
static void norm_row16(const pylora_kernels *K, int64_t k, const uint16_t *x, const float *w,
                       float eps, pylora_vec y, float *rstd) {
  float piece[PIECE], squares = 0;
  for (int64_t j = 0; j < k; j += PIECE) {
    K->from_bf16(min64(PIECE, k - j), x + j, piece);
    squares += K->sum_squares(min64(PIECE, k - j), piece);
  }
  *rstd = 1.0f / sqrtf(squares / (float)k + eps);
  for (int64_t j = 0; j < k; j += PIECE) {
    K->from_bf16(min64(PIECE, k - j), x + j, piece);
    K->rms_forward(min64(PIECE, k - j), piece, w + j, *rstd, vec_at(y, j));
  }
}

void pylora_norm_rows(const pylora_kernels *K, const pylora_mat *x, const pylora_norm *norm,
                      const pylora_mat *y, float *rstd, int64_t first, int64_t end) {
  const int64_t k = x->cols;
  const float *w = norm->w, eps = norm->eps;
  if (norm->kind == PYLORA_LAYER) {
    pylora_layer_rows(K, x, norm, y, rstd, first, end);
    return;
  }
  for (int64_t i = first; i < end; i++) {
    const pylora_vec row = row_at(x, i, 0), out = row_at(y, i, 0);
    if (row.b) {
      norm_row16(K, k, row.b, w, eps, out, rstd + i);
      continue;
    }
    rstd[i] = 1.0f / sqrtf(K->sum_squares(k, row.p) / (float)k + eps);
    K->rms_forward(k, row.p, w, rstd[i], out);
  }
}

static void norm_rows(const void *ctx, int64_t first, int64_t end) {
  const norm *f = ctx;
  const pylora_norm rms = {.w = f->w, .eps = f->eps};
  pylora_norm_rows(f->K, f->x, &rms, f->y, f->rstd, first, end);
}

int pylora_rms_norm_forward(const pylora_mat *x, const float *w, float eps, const pylora_mat *y,
                            float *rstd) {
  if (!x || !y) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_mat16(x, m, k, 0));
  TRY(check_mat16(y, m, k, 1));
  if (m == 0) return PYLORA_OK;
  if (k == 0) return PYLORA_E_SHAPE; /* the mean of nothing */
  if (!w || !rstd) return PYLORA_E_NULL;
  const norm f = {.K = pylora_table(), .x = x, .y = y, .w = w, .eps = eps, .rstd = rstd};
  pylora_each_row(norm_rows, &f, m, k);
  return PYLORA_OK;
}

static void norm_back_rows(const void *ctx, int64_t first, int64_t end) {
  const norm *f = ctx;
  for (int64_t i = first; i < end; i++)
    f->K->rms_backward(f->x->cols, row_at(f->dy, i, 0), row_at(f->x, i, 0), f->w, f->rstd_in[i],
                       f->y->p + i * f->y->ld, f->add);
}

static void norm_weight_columns(const void *ctx, int64_t first, int64_t end) {
  const norm *f = ctx;
  memset(f->dw + first, 0, (size_t)(end - first) * sizeof(float));
  for (int64_t i = 0; i < f->x->rows; i++)
    f->K->rms_weight(end - first, row_at(f->dy, i, first), row_at(f->x, i, first), f->rstd_in[i],
                     f->dw + first);
}

int pylora_rms_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                             const float *rstd, const pylora_mat *dx, int add_dx, float *dw) {
  if (!x || !dy || !dx) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_mat16(x, m, k, 0));
  TRY(check_mat16(dy, m, k, 0));
  TRY(check_mat(dx, m, k, 1));
  if (m && k == 0) return PYLORA_E_SHAPE;
  if (m && (!w || !rstd)) return PYLORA_E_NULL;
  const norm f = {.K = pylora_table(),
                  .x = x,
                  .dy = dy,
                  .y = dx,
                  .w = w,
                  .rstd_in = rstd,
                  .add = add_dx,
                  .dw = dw};
  if (dw)
    pylora_each_row(norm_weight_columns, &f, k, max64(m, WORK / 128)); /* first: dx may be dy */
  pylora_each_row(norm_back_rows, &f, m, k);
  return PYLORA_OK;
}

/* ---- rotary embedding ---- */

typedef struct rope {
  const pylora_kernels *K;
  const pylora_mat *x, *c, *s, *y;
  const int64_t *position;
  int64_t dim;
  int layout, inverse;
} rope;

static float get(pylora_vec r, int64_t j) { return r.b ? bf16_widen(r.b[j]) : r.p[j]; }

static void put(pylora_vec r, int64_t j, float x) {
  if (r.b)
    r.b[j] = bf16_round(x);
  else
    r.p[j] = x;
}

void pylora_rope_row(const pylora_kernels *K, pylora_vec x, int64_t cols, int64_t head_dim,
                     int64_t half, int layout, int inverse, const float *c, const float *s,
                     pylora_vec y) {
  for (int64_t h = 0; h < cols; h += head_dim) {
    const pylora_vec from = vec_at(x, h), to = vec_at(y, h);
    for (int64_t j = 2 * half; j < head_dim; j++) put(to, j, get(from, j));
    if (layout == PYLORA_ROPE_HALF) {
      K->rotate(half, from, vec_at(from, half), c, s, inverse, to, vec_at(to, half));
      continue;
    }
    for (int64_t j = 0; j < half; j++) {
      const float a = get(from, 2 * j), b = get(from, 2 * j + 1), sin = inverse ? -s[j] : s[j];
      put(to, 2 * j, a * c[j] - b * sin);
      put(to, 2 * j + 1, b * c[j] + a * sin);
    }
  }
}

static void rope_rows(const void *ctx, int64_t first, int64_t end) {
  const rope *f = ctx;
  for (int64_t i = first; i < end; i++) {
    const int64_t at = f->position[i];
    pylora_rope_row(f->K, row_at(f->x, i, 0), f->x->cols, f->dim, f->c->cols, f->layout, f->inverse,
                    f->c->p + at * f->c->ld, f->s->p + at * f->s->ld, row_at(f->y, i, 0));
  }
}

int pylora_check_rope(const pylora_mat *cosines, const pylora_mat *sines, const int64_t *position,
                      int64_t m, int64_t cols, int64_t head_dim, int layout) {
  const int64_t half = cosines->cols; /* of a part of the head, perhaps */
  if (head_dim < 2 || half < 1 || 2 * half > head_dim || cols % head_dim) return PYLORA_E_SHAPE;
  if (layout != PYLORA_ROPE_HALF && layout != PYLORA_ROPE_INTERLEAVED) return PYLORA_E_VALUE;
  TRY(check_mat(cosines, cosines->rows, half, 0));
  TRY(check_mat(sines, cosines->rows, half, 0));
  if (m && !position) return PYLORA_E_NULL;
  for (int64_t i = 0; i < m; i++)
    if (position[i] < 0 || position[i] >= cosines->rows) return PYLORA_E_INDEX;
  return PYLORA_OK;
}

int pylora_rope(const pylora_mat *x, const pylora_mat *cosines, const pylora_mat *sines,
                const int64_t *position, int32_t head_dim, int layout, int inverse,
                const pylora_mat *y) {
  if (!x || !cosines || !sines || !y) return PYLORA_E_NULL;
  TRY(check_mat16(x, x->rows, x->cols, 0));
  TRY(check_mat16(y, x->rows, x->cols, 1));
  TRY(pylora_check_rope(cosines, sines, position, x->rows, x->cols, head_dim, layout));
  const rope f = {pylora_table(), x, cosines, sines, y, position, head_dim, layout, inverse};
  pylora_each_row(rope_rows, &f, x->rows, x->cols);
  return PYLORA_OK;
}

/* ---- SwiGLU ---- */

typedef struct swiglu {
  const pylora_kernels *K;
  const pylora_mat *gate, *up, *y, *dy, *dgate, *dup;
} swiglu;

static void swiglu_rows(const void *ctx, int64_t first, int64_t end) {
  const swiglu *f = ctx;
  for (int64_t i = first; i < end; i++)
    f->K->swiglu_forward(f->gate->cols, row_at(f->gate, i, 0), row_at(f->up, i, 0),
                         row_at(f->y, i, 0));
}

int pylora_swiglu_forward(const pylora_mat *gate, const pylora_mat *up, const pylora_mat *y) {
  if (!gate || !up || !y) return PYLORA_E_NULL;
  TRY(check_mat16(gate, gate->rows, gate->cols, 0));
  TRY(check_mat16(up, gate->rows, gate->cols, 0));
  TRY(check_mat16(y, gate->rows, gate->cols, 1));
  const swiglu f = {.K = pylora_table(), .gate = gate, .up = up, .y = y};
  pylora_each_row(swiglu_rows, &f, gate->rows, gate->cols);
  return PYLORA_OK;
}

static void swiglu_back_rows(const void *ctx, int64_t first, int64_t end) {
  const swiglu *f = ctx;
  for (int64_t i = first; i < end; i++)
    f->K->swiglu_backward(f->gate->cols, row_at(f->dy, i, 0), row_at(f->gate, i, 0),
                          row_at(f->up, i, 0), row_at(f->dgate, i, 0), row_at(f->dup, i, 0));
}

int pylora_swiglu_backward(const pylora_mat *dy, const pylora_mat *gate, const pylora_mat *up,
                           const pylora_mat *dgate, const pylora_mat *dup) {
  if (!dy || !gate || !up || !dgate || !dup) return PYLORA_E_NULL;
  const int64_t m = gate->rows, n = gate->cols;
  TRY(check_mat16(gate, m, n, 0));
  TRY(check_mat16(up, m, n, 0));
  TRY(check_mat16(dy, m, n, 0));
  TRY(check_mat16(dgate, m, n, 1));
  TRY(check_mat16(dup, m, n, 1));
  const swiglu f = {pylora_table(), gate, up, NULL, dy, dgate, dup};
  pylora_each_row(swiglu_back_rows, &f, m, n);
  return PYLORA_OK;
}

/* ---- embedding ---- */

typedef struct gather {
  const int64_t *ids;
  const pylora_packed *W;
  const pylora_format *F;
  const pylora_mat *y;
} gather;

typedef struct embedding {
  const int64_t *ids;
  const float *W;
  int64_t m, k;
  const pylora_mat *y;
} embedding;

static void gather_rows(const void *ctx, int64_t first, int64_t end) {
  const gather *f = ctx;
  const size_t bytes = f->F->panel_bytes(f->W->k);
  for (int64_t i = first; i < end; i++) {
    const int64_t id = f->ids[i];
    f->F->unpack((const char *)f->W->data + (size_t)(id / PYLORA_PANEL) * bytes, f->W->k,
                 (int)(id % PYLORA_PANEL), f->y->p + i * f->y->ld);
  }
}

static int check_ids(const int64_t *ids, int64_t m, int64_t vocab) {
  if (m && !ids) return PYLORA_E_NULL;
  for (int64_t i = 0; i < m; i++)
    if (ids[i] < 0 || ids[i] >= vocab) return PYLORA_E_INDEX;
  return PYLORA_OK;
}

int pylora_embedding_forward(const int64_t *ids, int64_t m, const pylora_packed *W,
                             const pylora_mat *y) {
  if (!W || !y) return PYLORA_E_NULL;
  TRY(pylora_check_packed(W));
  TRY(check_mat(y, m, W->k, 1));
  TRY(check_ids(ids, m, W->d));
  const gather f = {ids, W, pylora_format_of(W->dtype), y};
  pylora_each_row(gather_rows, &f, m, W->k);
  return PYLORA_OK;
}

static void scatter_columns(const void *ctx, int64_t first, int64_t end) {
  const embedding *f = ctx; /* y is dW, W is dy with the row stride k */
  const pylora_mat *dW = f->y;
  for (int64_t t = 0; t < dW->rows; t++)
    memset(dW->p + t * dW->ld + first, 0, (size_t)(end - first) * sizeof(float));
  for (int64_t i = 0; i < f->m; i++) {
    float *to = dW->p + f->ids[i] * dW->ld;
    const float *from = f->W + i * f->k;
    for (int64_t j = first; j < end; j++) to[j] += from[j];
  }
}

int pylora_embedding_backward(const int64_t *ids, const pylora_mat *dy, const pylora_mat *dW) {
  if (!dy || !dW) return PYLORA_E_NULL;
  TRY(check_mat(dy, dy->rows, dy->cols, 0));
  TRY(check_mat(dW, dW->rows, dy->cols, 1));
  TRY(check_ids(ids, dy->rows, dW->rows));
  if (dW->cols == 0 || dW->rows == 0) return PYLORA_OK;
  const embedding f = {ids, dy->p, dy->rows, dy->ld, dW};
  pylora_each_row(scatter_columns, &f, dW->cols, WORK / 64); /* 64 columns per task */
  return PYLORA_OK;
}
