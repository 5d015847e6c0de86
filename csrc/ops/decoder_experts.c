/* decoder_experts.c - a mixture of experts: each expert computes the tokens that chose it, and no others, so
 * that a token reads the weights of its own experts alone.
 *
 * Experts come one after the other, in ascending order; a token's sum has that order, whatever tokens are
 * beside it. */
#include "ops/decoder_step.h"

/* The tokens of expert e, ascending, and where each segment starts among them. */
static int64_t rows_of(const run *f, int64_t e, int64_t top_k) {
  const buffers *b = &f->b;
  int64_t n = 0;
  for (int64_t s = 0; s < f->segments; s++) {
    b->start[s] = n;
    for (int64_t t = first_of(f, s); t < first_of(f, s + 1); t++)
      for (int64_t c = 0; c < top_k; c++)
        if (b->chosen[t * top_k + c] == e) b->row[n] = t, b->place[n++] = c;
  }
  b->start[f->segments] = n;
  return n;
}

static pylora_mat first_rows(const pylora_mat *a, int64_t rows, int64_t cols) {
  return (pylora_mat){a->p, rows, cols, cols, a->b, NULL};
}

static int expert(const run *f, const pylora_layer *l, int64_t e, int64_t n) {
  const buffers *b = &f->b;
  const int64_t at = f->attention_modules + EXPERT * e, *start = b->start;
  const int64_t inner = l->W[at]->d, size = b->some.b ? sizeof(uint16_t) : sizeof(float);
  const pylora_mat x = first_rows(&b->some, n, f->hidden), gate = first_rows(&b->gate, n, inner),
                   up = first_rows(&b->up, n, inner), out = first_rows(&b->out, n, f->hidden);
  for (int64_t i = 0; i < n; i++) {
    const pylora_vec to = row_at(&x, i, 0), from = row_at(&b->normed, b->row[i], 0);
    memcpy(to.b ? (void *)to.b : (void *)to.p, from.b ? (void *)from.b : (void *)from.p,
           (size_t)(f->hidden * size));
  }
  const int kind = f->model->activation;
  pylora_linear both[] = {linear_of(l, at, &gate), linear_of(l, at + 1, &up)};
  const pylora_finish finish[] = {{.product = NULL}, {.product = &gate, .activation = kind}};
  const int together = both[0].W->dtype == both[1].W->dtype;
  const group in = {&x, NULL, l->module + at, 2, both, together ? finish : NULL, start};
  TRY(pylora_decoder_linears(f, &in));
  if (!together) TRY(pylora_activation_forward(kind, &gate, &up, &gate));
  pylora_linear down = linear_of(l, at + 2, &out);
  const group last = {&gate, NULL, l->module + at + 2, 1, &down, NULL, start};
  TRY(pylora_decoder_linears(f, &last));
  for (int64_t i = 0; i < n; i++) {
    const float w = *(b->weights.p + b->row[i] * b->weights.ld + b->place[i]);
    float *y = b->inner.p + b->row[i] * b->inner.ld;
    const float *from = out.p + i * out.ld;
    for (int64_t j = 0; j < f->hidden; j++) {
      const float part = from[j] * w;
      y[j] += part;
    }
  }
  return PYLORA_OK;
}

int pylora_decoder_experts(const run *f, int64_t i) {
  const pylora_layer *l = &f->model->layer[i];
  const pylora_experts *mix = l->experts;
  const buffers *b = &f->b;
  const pylora_mat logits = part(&b->logits, mix->count), p = part(&b->p, mix->count),
                   weights = part(&b->weights, mix->top_k);
  TRY(pylora_decoder_norm(f, &b->x, &l->mid_norm, &b->normed));
  const pylora_linear router = {.W = mix->router, .y = &logits};
  TRY(pylora_linear_forward(&b->normed, 1, &router, 1, NULL, f->ws, f->ws_bytes));
  TRY(pylora_choose(&logits, mix->top_k, mix->normalize, &p, b->chosen, &weights));
  run own = *f;
  own.b.weights = weights;
  memset(b->inner.p, 0, (size_t)(b->inner.rows * f->hidden) * sizeof(float));
  for (int64_t e = 0; e < mix->count; e++) {
    const int64_t n = rows_of(&own, e, mix->top_k);
    if (n) TRY(expert(&own, l, e, n));
  }
  return PYLORA_OK;
}
