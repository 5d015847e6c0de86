/* features.c - what families of models have that Llama has not: LayerNorm, other activations, with a gate
 * or without, and caps of logits, each with its backward.  Rows are independent tasks. */
#include <math.h>

#include "runtime/internal.h"

enum { WORK = 16 * 1024 }; /* elements per task, as in transformer.c */

typedef struct call {
  const pylora_kernels *K;
  const pylora_mat *x, *up, *dy, *y, *dup; /* y: the result, dx in backward */
  const float *w, *b, *rstd_in;
  float eps, *rstd, multiplier, cap;
  int add, kind;
} call;

typedef struct rows {
  void (*fn)(const call *, int64_t i);
  const call *f;
  int64_t n, per_task;
} rows;

static void rows_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const rows *r = ctx;
  const int64_t end = min64((task + 1) * r->per_task, r->n);
  for (int64_t i = task * r->per_task; i < end; i++) r->fn(r->f, i);
}

static void each_row(void (*fn)(const call *, int64_t), const call *f) {
  const int64_t n = f->x->rows, k = f->x->cols;
  rows r = {fn, f, n, max64(1, WORK / max64(1, k))};
  pylora_parallel(rows_task, &r, ceil_div(n, r.per_task), pylora_num_threads());
}

static float get(pylora_vec r, int64_t j) { return r.b ? bf16_widen(r.b[j]) : r.p[j]; }

static void put(pylora_vec r, int64_t j, float x) {
  if (r.b)
    r.b[j] = bf16_round(x);
  else
    r.p[j] = x;
}

/* ---- LayerNorm: sums in double, as a row's mean may be large against what is left of it ---- */

static double mean_of(pylora_vec x, int64_t k) {
  double sum = 0;
  for (int64_t j = 0; j < k; j++) sum += get(x, j);
  return sum / (double)k;
}

static void layer_row(const call *f, int64_t i) {
  const int64_t k = f->x->cols;
  const pylora_vec x = row_at(f->x, i, 0), y = row_at(f->y, i, 0);
  const double mean = mean_of(x, k);
  double squares = 0;
  for (int64_t j = 0; j < k; j++) {
    const double c = get(x, j) - mean;
    squares += c * c;
  }
  const double r = 1.0 / sqrt(squares / (double)k + f->eps);
  f->rstd[i] = (float)r;
  for (int64_t j = 0; j < k; j++) {
    const double n = (get(x, j) - mean) * r * f->w[j];
    put(y, j, (float)(f->b ? n + f->b[j] : n));
  }
}

int pylora_layer_norm_forward(const pylora_mat *x, const float *w, const float *b, float eps,
                              const pylora_mat *y, float *rstd) {
  if (!x || !y) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_mat16(x, m, k, 0));
  TRY(check_mat16(y, m, k, 1));
  if (m == 0) return PYLORA_OK;
  if (k == 0) return PYLORA_E_SHAPE; /* the mean of nothing */
  if (!w || !rstd) return PYLORA_E_NULL;
  const call f = {.x = x, .y = y, .w = w, .b = b, .eps = eps, .rstd = rstd};
  each_row(layer_row, &f);
  return PYLORA_OK;
}

static void layer_back_row(const call *f, int64_t i) {
  const int64_t k = f->x->cols;
  const pylora_vec x = row_at(f->x, i, 0), dy = row_at(f->dy, i, 0);
  const double mean = mean_of(x, k), r = f->rstd_in[i];
  double sum = 0, with = 0;
  for (int64_t j = 0; j < k; j++) {
    const double g = (double)get(dy, j) * f->w[j];
    sum += g;
    with += g * (get(x, j) - mean) * r;
  }
  sum /= (double)k, with /= (double)k;
  float *dx = f->y->p + i * f->y->ld;
  for (int64_t j = 0; j < k; j++) {
    const double g = (double)get(dy, j) * f->w[j], n = (get(x, j) - mean) * r;
    const float d = (float)(r * (g - sum - n * with));
    dx[j] = f->add ? dx[j] + d : d;
  }
}

int pylora_layer_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                               const float *rstd, const pylora_mat *dx, int add_dx) {
  if (!x || !dy || !dx) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_mat16(x, m, k, 0));
  TRY(check_mat16(dy, m, k, 0));
  TRY(check_mat(dx, m, k, 1));
  if (m && k == 0) return PYLORA_E_SHAPE;
  if (m && (!w || !rstd)) return PYLORA_E_NULL;
  const call f = {.x = x, .dy = dy, .y = dx, .w = w, .rstd_in = rstd, .add = add_dx};
  each_row(layer_back_row, &f);
  return PYLORA_OK;
}

/* ---- activations ---- */

static const pylora_vec none = {NULL, NULL};

/* x (1 + erf(x / sqrt 2)) / 2 has no kernel: erff is the C library's, element by element. */
static void erf_row(const call *f, pylora_vec x, pylora_vec up, pylora_vec y) {
  for (int64_t j = 0; j < f->x->cols; j++) {
    const float v = get(x, j), a = v * 0.5f * erfcf(-v * 0.70710678f);
    put(y, j, f->up ? a * get(up, j) : a);
  }
}

static void activate_row(const call *f, int64_t i) {
  const pylora_vec x = row_at(f->x, i, 0), up = f->up ? row_at(f->up, i, 0) : none;
  const pylora_vec y = row_at(f->y, i, 0);
  if (f->kind == PYLORA_GELU_ERF)
    erf_row(f, x, up, y);
  else
    f->K->activate(f->kind, f->x->cols, x, up, y);
}

static int check_kind(int kind) {
  return kind < PYLORA_SILU || kind > PYLORA_RELU2 ? PYLORA_E_VALUE : PYLORA_OK;
}

int pylora_activation_forward(int kind, const pylora_mat *x, const pylora_mat *up,
                              const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_kind(kind));
  TRY(check_mat16(x, x->rows, x->cols, 0));
  if (up) TRY(check_mat16(up, x->rows, x->cols, 0));
  TRY(check_mat16(y, x->rows, x->cols, 1));
  const call f = {.K = pylora_table(), .x = x, .up = up, .y = y, .kind = kind};
  each_row(activate_row, &f);
  return PYLORA_OK;
}

static void erf_back_row(const call *f, pylora_vec dy, pylora_vec x, pylora_vec up, pylora_vec dx,
                         pylora_vec dup) {
  for (int64_t j = 0; j < f->x->cols; j++) {
    const float v = get(x, j), d = get(dy, j), half = 0.5f * erfcf(-v * 0.70710678f);
    const float slope = half + v * 0.39894228f * expf(-0.5f * v * v);
    put(dx, j, (f->up ? d * get(up, j) : d) * slope); /* before dup, which may be up */
    if (f->up) put(dup, j, d * v * half);
  }
}

static void activate_back_row(const call *f, int64_t i) {
  const pylora_vec x = row_at(f->x, i, 0), up = f->up ? row_at(f->up, i, 0) : none;
  const pylora_vec dy = row_at(f->dy, i, 0), dx = row_at(f->y, i, 0);
  const pylora_vec dup = f->up ? row_at(f->dup, i, 0) : none;
  if (f->kind == PYLORA_GELU_ERF)
    erf_back_row(f, dy, x, up, dx, dup);
  else
    f->K->activate_backward(f->kind, f->x->cols, dy, x, up, dx, dup);
}

int pylora_activation_backward(int kind, const pylora_mat *dy, const pylora_mat *x,
                               const pylora_mat *up, const pylora_mat *dx, const pylora_mat *dup) {
  if (!x || !dy || !dx || !up != !dup) return PYLORA_E_NULL;
  TRY(check_kind(kind));
  const int64_t m = x->rows, n = x->cols;
  TRY(check_mat16(x, m, n, 0));
  TRY(check_mat16(dy, m, n, 0));
  TRY(check_mat16(dx, m, n, 1));
  if (up) TRY(check_mat16(up, m, n, 0));
  if (up) TRY(check_mat16(dup, m, n, 1));
  const call f = {
      .K = pylora_table(), .x = x, .up = up, .dy = dy, .y = dx, .dup = dup, .kind = kind};
  each_row(activate_back_row, &f);
  return PYLORA_OK;
}

/* ---- caps ---- */

static void cap_row(const call *f, int64_t i) {
  const float *x = f->x->p + i * f->x->ld;
  float *y = f->y->p + i * f->y->ld;
  if (f->cap > 0)
    f->K->soft_cap(f->x->cols, x, f->multiplier, f->cap, y);
  else
    f->K->scale(f->x->cols, x, f->multiplier, y);
}

int pylora_soft_cap_forward(const pylora_mat *x, float multiplier, float cap, const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_mat(x, x->rows, x->cols, 0));
  TRY(check_mat(y, x->rows, x->cols, 1));
  if (!(cap >= 0)) return PYLORA_E_VALUE;
  const call f = {.K = pylora_table(), .x = x, .y = y, .multiplier = multiplier, .cap = cap};
  each_row(cap_row, &f);
  return PYLORA_OK;
}

static void cap_back_row(const call *f, int64_t i) {
  const float *dy = f->dy->p + i * f->dy->ld, *y = f->x->p + i * f->x->ld;
  float *dx = f->y->p + i * f->y->ld;
  for (int64_t j = 0; j < f->x->cols; j++) {
    const float t = f->cap > 0 ? y[j] / f->cap : 0.0f;
    dx[j] = dy[j] * (f->multiplier * (1.0f - t * t));
  }
}

int pylora_soft_cap_backward(const pylora_mat *dy, const pylora_mat *y, float multiplier, float cap,
                             const pylora_mat *dx) {
  if (!dy || !y || !dx) return PYLORA_E_NULL;
  TRY(check_mat(dy, dy->rows, dy->cols, 0));
  TRY(check_mat(y, dy->rows, dy->cols, 0));
  TRY(check_mat(dx, dy->rows, dy->cols, 1));
  if (!(cap >= 0)) return PYLORA_E_VALUE;
  const call f = {.x = y, .dy = dy, .y = dx, .multiplier = multiplier, .cap = cap};
  each_row(cap_back_row, &f);
  return PYLORA_OK;
}
