/* block.c - a transformer block with LoRA on its seven projections, forward and backward, out of
 * the operations of pylora.h: statement A-1 of docs/spec.md. */
#include <math.h>
#include <stdlib.h>

#include "port.h"

const char *const projection_names[PROJECTIONS] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

static pylora_mat like(pylora_mat a) { return zeros(a.rows, a.cols); }

void angles(pylora_mat cosines, pylora_mat sines, const int64_t *position, double theta) {
  const int64_t half = cosines.cols;
  for (int64_t i = 0; i < cosines.rows * half; i++) { /* in double, rounded once */
    const double pair = (double)(i % half);
    const double angle = (double)position[i / half] * pow(theta, -pair / (double)half);
    cosines.p[i] = (float)cos(angle), sines.p[i] = (float)sin(angle);
  }
}

shape shape_of(pylora_attn attn, double theta, double eps, int64_t n, const int64_t *lengths) {
  int64_t *start = take((size_t)(n + 1) * sizeof *start), longest = 0;
  for (int64_t i = 0; i < n; i++) {
    start[i + 1] = start[i] + lengths[i];
    if (lengths[i] > longest) longest = lengths[i];
  }
  int64_t *position = take((size_t)start[n] * sizeof *position); /* each sequence counts from 0 */
  for (int64_t i = 0; i < n; i++)
    for (int64_t t = start[i]; t < start[i + 1]; t++) position[t] = t - start[i];
  int64_t *each = take((size_t)longest * sizeof *each); /* a row of the tables is a position */
  for (int64_t i = 0; i < longest; i++) each[i] = i;
  const pylora_mat cosines = zeros(longest, attn.head_dim / 2), sines = copy(cosines);
  angles(cosines, sines, each, theta);
  return (shape){start[n], position, {n, start, NULL, NULL}, attn, cosines, sines, (float)eps};
}

void attention_forward(const shape *s, pylora_mat q, pylora_mat k, pylora_mat v, pylora_mat *o,
                       pylora_mat *lse) {
  const size_t bytes = pylora_attention_workspace(&s->seqs, &s->attn);
  void *ws = malloc(bytes + 1);
  *o = like(q), *lse = zeros(q.rows, s->attn.heads);
  must(pylora_attention_forward(&q, &k, &v, &s->seqs, &s->attn, o, lse, ws, bytes));
  free(ws);
}

void attention_backward(const shape *s, pylora_mat d_o, pylora_mat q, pylora_mat k, pylora_mat v,
                        pylora_mat o, pylora_mat lse, pylora_mat *dq, pylora_mat *dk,
                        pylora_mat *dv) {
  const size_t bytes = pylora_attention_workspace(&s->seqs, &s->attn);
  void *ws = malloc(bytes + 1);
  *dq = like(q), *dk = like(k), *dv = like(v);
  must(pylora_attention_backward(&d_o, &q, &k, &v, &o, &lse, &s->seqs, &s->attn, dq, dk, dv, ws,
                                 bytes));
  free(ws);
}

static void rotate(const shape *s, pylora_mat x, int inverse) {
  must(pylora_rope(&x, &s->cosines, &s->sines, s->position, s->attn.head_dim, PYLORA_ROPE_HALF,
                   inverse, &x));
}

static pylora_lora lora_of(const linear *l) {
  return (pylora_lora){
      l->A.rows, l->A.p, l->A.ld, l->B.p, l->B.ld, l->s, l->drop.p > 0 ? &l->drop : NULL, NULL};
}

static pylora_mat forward(linear *l, pylora_mat x, const pylora_mat *residual) {
  const pylora_lora lora = lora_of(l);
  l->x = x;
  return lora_forward(x, &l->W, NULL, &lora, residual, &l->h);
}

/* dx is added to; the mask of the forward pass is drawn again, D-3. */
static void backward(linear *l, pylora_mat dy, pylora_mat dx) {
  const pylora_lora lora = lora_of(l);
  l->dA = like(l->A), l->dB = like(l->B);
  lora_backward(dy, &l->x, &l->h, &l->W, &lora, &dx, &l->dA, &l->dB);
}

void block_forward(block *b, const shape *s, pylora_mat x) {
  linear *L = b->L;
  b->x = x, b->normed1 = like(x), b->normed2 = like(x);
  b->rstd1 = zeros(1, x.rows).p, b->rstd2 = zeros(1, x.rows).p;
  must(pylora_rms_norm_forward(&x, b->norm1, s->eps, &b->normed1, b->rstd1));
  b->q = forward(&L[Q], b->normed1, NULL);
  b->k = forward(&L[K], b->normed1, NULL);
  b->v = forward(&L[V], b->normed1, NULL);
  rotate(s, b->q, 0), rotate(s, b->k, 0);
  attention_forward(s, b->q, b->k, b->v, &b->o, &b->lse);
  b->mid = forward(&L[O], b->o, &x);
  must(pylora_rms_norm_forward(&b->mid, b->norm2, s->eps, &b->normed2, b->rstd2));
  b->gate = forward(&L[GATE], b->normed2, NULL);
  b->up = forward(&L[UP], b->normed2, NULL);
  b->act = like(b->gate);
  must(pylora_swiglu_forward(&b->gate, &b->up, &b->act));
  b->y = forward(&L[DOWN], b->act, &b->mid);
}

void block_backward(block *b, const shape *s, pylora_mat dy) {
  linear *L = b->L;
  b->dact = like(b->act), b->dgate = like(b->act), b->dup = like(b->act);
  b->dnormed1 = like(b->x), b->dnormed2 = like(b->x), b->d_o = like(b->o);
  backward(&L[DOWN], dy, b->dact);
  must(pylora_swiglu_backward(&b->dact, &b->gate, &b->up, &b->dgate, &b->dup));
  backward(&L[UP], b->dup, b->dnormed2);
  backward(&L[GATE], b->dgate, b->dnormed2);
  b->dmid = copy(dy); /* the residual's gradient, and the norm's on top of it */
  must(pylora_rms_norm_backward(&b->dnormed2, &b->mid, b->norm2, b->rstd2, &b->dmid, 1, NULL));
  backward(&L[O], b->dmid, b->d_o);
  attention_backward(s, b->d_o, b->q, b->k, b->v, b->o, b->lse, &b->dq, &b->dk, &b->dv);
  const pylora_mat dq = copy(b->dq), dk = copy(b->dk); /* before the rotation */
  rotate(s, dq, 1), rotate(s, dk, 1);
  backward(&L[V], b->dv, b->dnormed1);
  backward(&L[K], dk, b->dnormed1);
  backward(&L[Q], dq, b->dnormed1);
  b->dx = copy(b->dmid);
  must(pylora_rms_norm_backward(&b->dnormed1, &b->x, b->norm1, b->rstd1, &b->dx, 1, NULL));
}
