/* loss.c - cross-entropy over the vocabulary, masked by PYLORA_IGNORE. The forward keeps one number
 * per row (lse), from which the backward makes the softmax again, in place if asked to, so that no
 * second [tokens, vocab] array exists. Both at once (pylora_cross_entropy) take a row while it is in
 * the cache, so that the logits pass through memory once. */
#include <math.h>

#include "runtime/internal.h"

typedef struct loss {
  const pylora_kernels *K;
  const pylora_mat *logits, *d;
  const int64_t *labels;
  const float *lse_in, *weight;
  float *nll, *lse;
} loss;

static int check_labels(const pylora_mat *logits, const int64_t *labels) {
  if (logits->rows == 0) return PYLORA_OK;
  if (logits->cols == 0) return PYLORA_E_SHAPE; /* the softmax of nothing */
  if (!labels) return PYLORA_E_NULL;
  for (int64_t i = 0; i < logits->rows; i++)
    if (labels[i] != PYLORA_IGNORE && (labels[i] < 0 || labels[i] >= logits->cols))
      return PYLORA_E_INDEX;
  return PYLORA_OK;
}

static void forward_row(const loss *f, int64_t i) {
  const float *x = f->logits->p + i * f->logits->ld;
  float top, sum;
  f->K->exp_sum(f->logits->cols, x, &top, &sum);
  f->lse[i] = top + logf(sum);
  f->nll[i] = f->labels[i] == PYLORA_IGNORE ? 0.0f : f->lse[i] - x[f->labels[i]];
}

static void backward_row(const loss *f, int64_t i, float lse) {
  const int64_t n = f->logits->cols, label = f->labels[i];
  const float *x = f->logits->p + i * f->logits->ld;
  const pylora_vec d = row_at(f->d, i, 0);
  if (label == PYLORA_IGNORE) {
    if (d.b)
      memset(d.b, 0, (size_t)n * sizeof *d.b);
    else
      memset(d.p, 0, (size_t)n * sizeof *d.p);
    return;
  }
  const float logit = x[label]; /* before d, which may be x */
  float p;
  f->K->exp_scaled(n, x, lse, f->weight[i], d);
  f->K->exp_scaled(1, &logit, lse, 1.0f, (pylora_vec){&p, NULL});
  const float at_label = f->weight[i] * (p - 1.0f);
  if (d.b)
    d.b[label] = bf16_round(at_label);
  else
    d.p[label] = at_label;
}

static void forward_task(void *ctx, int64_t i, int thread) {
  (void)thread;
  forward_row(ctx, i);
}

static void backward_task(void *ctx, int64_t i, int thread) {
  (void)thread;
  const loss *f = ctx;
  backward_row(f, i, f->lse_in[i]);
}

static void both_task(void *ctx, int64_t i, int thread) {
  (void)thread;
  const loss *f = ctx;
  forward_row(f, i);
  backward_row(f, i, f->lse[i]);
}

int pylora_cross_entropy_forward(const pylora_mat *logits, const int64_t *labels, float *nll,
                                 float *lse) {
  if (!logits) return PYLORA_E_NULL;
  TRY(check_mat(logits, logits->rows, logits->cols, 0));
  TRY(check_labels(logits, labels));
  if (logits->rows && (!nll || !lse)) return PYLORA_E_NULL;
  loss f = {.K = pylora_table(), .logits = logits, .labels = labels, .nll = nll, .lse = lse};
  pylora_parallel(forward_task, &f, logits->rows, pylora_num_threads());
  return PYLORA_OK;
}

int pylora_cross_entropy_backward(const pylora_mat *logits, const int64_t *labels, const float *lse,
                                  const float *weight, const pylora_mat *dlogits) {
  if (!logits || !dlogits) return PYLORA_E_NULL;
  TRY(check_mat(logits, logits->rows, logits->cols, 0));
  TRY(check_mat16(dlogits, logits->rows, logits->cols, 1));
  TRY(check_labels(logits, labels));
  if (logits->rows && (!lse || !weight)) return PYLORA_E_NULL;
  loss f = {.K = pylora_table(),
            .logits = logits,
            .d = dlogits,
            .labels = labels,
            .lse_in = lse,
            .weight = weight};
  pylora_parallel(backward_task, &f, logits->rows, pylora_num_threads());
  return PYLORA_OK;
}

int pylora_cross_entropy(const pylora_mat *logits, const int64_t *labels, const float *weight,
                         float *nll, float *lse, const pylora_mat *dlogits) {
  if (!logits || !dlogits) return PYLORA_E_NULL;
  TRY(check_mat(logits, logits->rows, logits->cols, 0));
  TRY(check_mat16(dlogits, logits->rows, logits->cols, 1));
  TRY(check_labels(logits, labels));
  if (logits->rows && (!nll || !lse || !weight)) return PYLORA_E_NULL;
  loss f = {.K = pylora_table(),
            .logits = logits,
            .d = dlogits,
            .labels = labels,
            .weight = weight,
            .nll = nll,
            .lse = lse};
  pylora_parallel(both_task, &f, logits->rows, pylora_num_threads());
  return PYLORA_OK;
}
