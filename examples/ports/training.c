/* training.c - one optimizer step of a Llama with adapters: loss, gradients, AdamW (statements O of
 * docs/spec.md). The base's weights get neither gradient nor update (B-2, O-5). */
#include <math.h>
#include <stdio.h>

#include "port.h"

void adamw(pylora_mat p, pylora_mat grad, pylora_mat *m, pylora_mat *v, const pylora_adamw *o) {
  if (!m->p) *m = zeros(p.rows, p.cols), *v = zeros(p.rows, p.cols);
  must(pylora_adamw_step(p.rows * p.cols, p.p, grad.p, m->p, v->p, o));
}

double clip(int n, const pylora_mat *grads, double limit) {
  double total = 0, squares;
  for (int i = 0; i < n; i++) {
    must(pylora_sum_squares(grads[i].rows * grads[i].cols, grads[i].p, &squares));
    total += squares;
  }
  const double norm = sqrt(total), factor = norm > limit ? limit / norm : 1;
  for (int i = 0; i < n; i++)
    for (int64_t e = 0; e < grads[i].rows * grads[i].cols; e++)
      grads[i].p[e] = (float)(grads[i].p[e] * factor);
  return norm;
}

/* A mask of its own for each module and step (D-5, D-7). */
static void set_dropout(llama *model, float p, uint64_t seed, int64_t step) {
  char name[160];
  for (int64_t n = 0; n < model->layers; n++)
    for (int i = 0; i < PROJECTIONS; i++) {
      snprintf(name, sizeof name, "dropout/model.layers.%lld.%s/%lld", (long long)n,
               projection_names[i], (long long)step);
      model->blocks[n].L[i].drop = (pylora_drop){p, seed, stream(name), 0};
    }
}

double train_step(llama *model, const int64_t *ids, const int64_t *labels, pylora_adamw o, float p,
                  uint64_t seed) {
  const shape *s = &model->s;
  const int64_t m = s->rows, hidden = model->embed.k;
  const pylora_mat embedded = zeros(m, hidden), normed = zeros(m, hidden);
  const pylora_mat dnormed = zeros(m, hidden), dlast = zeros(m, hidden);
  float *rstd = zeros(1, m).p, *nll = zeros(1, m).p, *lse = zeros(1, m).p, *weight = zeros(1, m).p;
  set_dropout(model, p, seed, o.step);

  must(pylora_embedding_forward(ids, m, &model->embed, &embedded));
  pylora_mat x = embedded;
  for (int64_t n = 0; n < model->layers; n++) {
    block_forward(&model->blocks[n], s, x);
    x = model->blocks[n].y;
  }
  must(pylora_rms_norm_forward(&x, model->norm, s->eps, &normed, rstd));
  const pylora_mat logits = lora_forward(normed, &model->embed, NULL, NULL, NULL, NULL);
  must(pylora_cross_entropy_forward(&logits, labels, nll, lse));

  int64_t counted = 0;
  double total = 0;
  for (int64_t i = 0; i < m; i++) counted += labels[i] != PYLORA_IGNORE, total += nll[i];
  if (!counted) stop("labels", "there is none to learn from");
  for (int64_t i = 0; i < m; i++) weight[i] = 1 / (float)counted; /* O-1 */

  must(pylora_cross_entropy_backward(&logits, labels, lse, weight, &logits));
  lora_backward(logits, NULL, NULL, &model->embed, NULL, &dnormed, NULL, NULL);
  must(pylora_rms_norm_backward(&dnormed, &x, model->norm, rstd, &dlast, 0, NULL));
  pylora_mat dx = dlast;
  for (int64_t n = model->layers - 1; n >= 0; n--) {
    block_backward(&model->blocks[n], s, dx);
    dx = model->blocks[n].dx;
  }
  for (int64_t n = 0; n < model->layers; n++)
    for (linear *l = model->blocks[n].L; l < model->blocks[n].L + PROJECTIONS; l++) {
      adamw(l->A, l->dA, &l->mA, &l->vA, &o);
      adamw(l->B, l->dB, &l->mB, &l->vB, &o);
    }
  return total / (double)counted;
}
