/* features.c - what families have beside Llama's operations: LayerNorm, activations, soft caps, and the
 * choice of experts.  Each row by itself, as in transformer.c. */
#include <math.h>

#include "runtime/internal.h"

/* ---- LayerNorm ---- */

typedef struct layer {
  const pylora_kernels *K;
  const pylora_mat *x, *dy, *y; /* y: the result, dx in backward */
  const pylora_norm *norm;
  float *rstd;
  const float *rstd_in;
  int add;
} layer;

static float mean_of(const pylora_kernels *K, int64_t k, pylora_vec x) {
  return K->sum(k, x) / (float)k;
}

void pylora_layer_rows(const pylora_kernels *K, const pylora_mat *x, const pylora_norm *norm,
                       const pylora_mat *y, float *rstd, int64_t first, int64_t end) {
  const int64_t k = x->cols;
  for (int64_t i = first; i < end; i++) {
    const pylora_vec row = row_at(x, i, 0);
    const float mean = mean_of(K, k, row);
    rstd[i] = 1.0f / sqrtf(K->deviations(k, row, mean) / (float)k + norm->eps);
    K->layer_forward(k, row, norm->w, norm->b, mean, rstd[i], row_at(y, i, 0));
  }
}

static void layer_rows(const void *ctx, int64_t first, int64_t end) {
  const layer *f = ctx;
  pylora_layer_rows(f->K, f->x, f->norm, f->y, f->rstd, first, end);
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
  const pylora_norm norm = {.w = w, .b = b, .eps = eps, .kind = PYLORA_LAYER};
  const layer f = {.K = pylora_table(), .x = x, .y = y, .norm = &norm, .rstd = rstd};
  pylora_each_row(layer_rows, &f, m, k);
  return PYLORA_OK;
}

static void layer_back_rows(const void *ctx, int64_t first, int64_t end) {
  const layer *f = ctx;
  const int64_t k = f->x->cols;
  for (int64_t i = first; i < end; i++) {
    const pylora_vec x = row_at(f->x, i, 0);
    f->K->layer_backward(k, row_at(f->dy, i, 0), x, f->norm->w, mean_of(f->K, k, x), f->rstd_in[i],
                         f->y->p + i * f->y->ld, f->add);
  }
}

int pylora_layer_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                               const float *rstd, const pylora_mat *dx, int add_dx) {
  if (!x || !dy || !dx) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_mat16(x, m, k, 0));
  TRY(check_mat16(dy, m, k, 0));
  TRY(check_mat(dx, m, k, 1));
  if (m == 0) return PYLORA_OK;
  if (k == 0) return PYLORA_E_SHAPE;
  if (!w || !rstd) return PYLORA_E_NULL;
  const pylora_norm norm = {.w = w, .kind = PYLORA_LAYER};
  const layer f = {.K = pylora_table(),
                   .x = x,
                   .dy = dy,
                   .y = dx,
                   .norm = &norm,
                   .rstd_in = rstd,
                   .add = add_dx};
  pylora_each_row(layer_back_rows, &f, m, k);
  return PYLORA_OK;
}

/* ---- activations ---- */

typedef struct activation {
  const pylora_kernels *K;
  int kind;
  const pylora_mat *x, *up, *y, *dy, *dup; /* y: dx in backward */
} activation;

static const pylora_vec none = {NULL, NULL};

static pylora_vec row_or_none(const pylora_mat *a, int64_t i) { return a ? row_at(a, i, 0) : none; }

static void activation_rows(const void *ctx, int64_t first, int64_t end) {
  const activation *f = ctx;
  for (int64_t i = first; i < end; i++) {
    const pylora_vec x = row_at(f->x, i, 0), y = row_at(f->y, i, 0);
    if (f->up)
      pylora_gate(f->K, f->kind, f->x->cols, x, row_at(f->up, i, 0), y);
    else
      f->K->activation_forward(f->kind, f->x->cols, x, none, y);
  }
}

static int check_activation(int kind, const pylora_mat *x, const pylora_mat *up) {
  if (kind < PYLORA_SILU || kind > PYLORA_RELU2) return PYLORA_E_VALUE;
  TRY(check_mat16(x, x->rows, x->cols, 0));
  return up ? check_mat16(up, x->rows, x->cols, 0) : PYLORA_OK;
}

int pylora_activation_forward(int kind, const pylora_mat *x, const pylora_mat *up,
                              const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_activation(kind, x, up));
  TRY(check_mat16(y, x->rows, x->cols, 1));
  if (x->cols == 0) return PYLORA_OK;
  const activation f = {.K = pylora_table(), .kind = kind, .x = x, .up = up, .y = y};
  pylora_each_row(activation_rows, &f, x->rows, x->cols);
  return PYLORA_OK;
}

static void activation_back_rows(const void *ctx, int64_t first, int64_t end) {
  const activation *f = ctx;
  const int64_t n = f->x->cols;
  for (int64_t i = first; i < end; i++) {
    const pylora_vec x = row_at(f->x, i, 0), dy = row_at(f->dy, i, 0), dx = row_at(f->y, i, 0);
    const pylora_vec up = row_or_none(f->up, i), dup = row_or_none(f->dup, i);
    if (f->up && f->kind == PYLORA_SILU)
      f->K->swiglu_backward(n, dy, x, up, dx, dup);
    else
      f->K->activation_backward(f->kind, n, dy, x, up, dx, dup);
  }
}

int pylora_activation_backward(int kind, const pylora_mat *dy, const pylora_mat *x,
                               const pylora_mat *up, const pylora_mat *dx, const pylora_mat *dup) {
  if (!dy || !x || !dx || !up != !dup) return PYLORA_E_NULL;
  TRY(check_activation(kind, x, up));
  TRY(check_mat16(dy, x->rows, x->cols, 0));
  TRY(check_mat16(dx, x->rows, x->cols, 1));
  if (dup) TRY(check_mat16(dup, x->rows, x->cols, 1));
  if (x->cols == 0) return PYLORA_OK;
  const activation f = {
      .K = pylora_table(), .kind = kind, .x = x, .up = up, .y = dx, .dy = dy, .dup = dup};
  pylora_each_row(activation_back_rows, &f, x->rows, x->cols);
  return PYLORA_OK;
}

/* ---- soft caps ---- */

typedef struct capped {
  const pylora_kernels *K;
  const pylora_mat *x, *y, *out; /* forward: x -> out; backward: x is dy */
  float multiplier, cap;
} capped;

static void cap_rows(const void *ctx, int64_t first, int64_t end) {
  const capped *f = ctx;
  const int64_t n = f->x->cols;
  for (int64_t i = first; i < end; i++) {
    const float *x = f->x->p + i * f->x->ld;
    float *out = f->out->p + i * f->out->ld;
    if (f->cap == 0)
      f->K->scale(n, x, f->multiplier, out);
    else if (f->y)
      f->K->soft_cap_backward(n, x, f->y->p + i * f->y->ld, f->multiplier, f->cap, out);
    else
      f->K->soft_cap(n, x, f->multiplier, f->cap, out);
  }
}

static int cap(const pylora_mat *x, const pylora_mat *y, float multiplier, float c,
               const pylora_mat *out) {
  if (!(c >= 0)) return PYLORA_E_VALUE;
  TRY(check_mat(x, x->rows, x->cols, 0));
  TRY(check_mat(out, x->rows, x->cols, 1));
  if (x->cols == 0) return PYLORA_OK;
  const capped f = {pylora_table(), x, y, out, multiplier, c};
  pylora_each_row(cap_rows, &f, x->rows, x->cols);
  return PYLORA_OK;
}

int pylora_soft_cap_forward(const pylora_mat *x, float multiplier, float c, const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  return cap(x, NULL, multiplier, c, y);
}

int pylora_soft_cap_backward(const pylora_mat *dy, const pylora_mat *y, float multiplier, float c,
                             const pylora_mat *dx) {
  if (!dy || !y || !dx) return PYLORA_E_NULL;
  TRY(check_mat(y, dy->rows, dy->cols, 0));
  return cap(dy, y, multiplier, c, dx);
}

/* ---- experts ---- */

typedef struct choice {
  const pylora_kernels *K;
  const pylora_mat *logits, *p, *weights;
  int64_t top_k, *chosen;
  int normalize;
} choice;

static void choose_rows(const void *ctx, int64_t first, int64_t end) {
  const choice *f = ctx;
  const int64_t n = f->logits->cols;
  for (int64_t i = first; i < end; i++) {
    const float *x = f->logits->p + i * f->logits->ld;
    float *p = f->p->p + i * f->p->ld, *w = f->weights->p + i * f->weights->ld, top = x[0];
    int64_t *chosen = f->chosen + i * f->top_k;
    for (int64_t e = 1; e < n; e++) top = x[e] > top ? x[e] : top;
    f->K->exp_scaled(n, x, top, 1.0f, (pylora_vec){p, NULL});
    const float total = f->K->sum(n, (pylora_vec){p, NULL});
    for (int64_t e = 0; e < n; e++) p[e] /= total;
    float sum = 0;
    for (int64_t t = 0; t < f->top_k; t++) {
      int64_t best = -1;
      for (int64_t e = 0; e < n; e++) {
        int taken = 0;
        for (int64_t s = 0; s < t; s++) taken |= chosen[s] == e;
        if (taken) continue;
        if (best < 0 || p[e] > p[best] || (isnan(p[best]) && !isnan(p[e]))) best = e;
      }
      chosen[t] = best;
      w[t] = p[best];
      sum += w[t];
    }
    for (int64_t t = 0; f->normalize && t < f->top_k; t++) w[t] /= sum;
  }
}

int pylora_choose(const pylora_mat *logits, int64_t top_k, int normalize, const pylora_mat *p,
                  int64_t *chosen, const pylora_mat *weights) {
  if (!logits || !p || !weights) return PYLORA_E_NULL;
  const int64_t m = logits->rows, n = logits->cols;
  TRY(check_mat(logits, m, n, 0));
  TRY(check_mat(p, m, n, 1));
  if (top_k < 1 || top_k > n) return PYLORA_E_VALUE;
  TRY(check_mat(weights, m, top_k, 1));
  if (m && !chosen) return PYLORA_E_NULL;
  const choice f = {pylora_table(), logits, p, weights, top_k, chosen, normalize};
  pylora_each_row(choose_rows, &f, m, n * (top_k + 4));
  return PYLORA_OK;
}
