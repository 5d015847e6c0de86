/* decoder_step.h - one step of a whole model: what was asked for, and the memory that it runs in. */
#ifndef PYLORA_DECODER_STEP_H
#define PYLORA_DECODER_STEP_H

#include "runtime/internal.h"

enum { SHARED = 3 /* projections of one x at most */, EXPERT = 3 /* modules of one expert */ };

/* Pieces of the workspace; what is left of it is the operations' own. */
typedef struct buffers {
  pylora_mat x, normed, raw_q, raw_k, qkv, q, k, v, o, gate, up, gate_up, last, lse;
  pylora_mat out, inner;         /* what is added to x [m,hidden], where it is not added at once */
  pylora_mat logits, p, weights; /* of the router: logits and p [m,experts], weights [m,top_k] */
  pylora_mat some;               /* [m,hidden]: the rows of one expert */
  float *rstd, *h;               /* of heads; h [m,r]: of the embedding's adapter */
  const pylora_lora **lora;      /* [SHARED * segments] */
  const float **factor;          /* the same */
  int64_t *head_start, *start;   /* [segments + 1]: segments of the outputs, of one expert's rows */
  int64_t *chosen, *row,
      *place; /* [m,top_k]; [m]: tokens of one expert, and which of their choices it is */
} buffers;

typedef struct run {
  const pylora_decoder *model;
  const pylora_step *step;
  int64_t hidden, q_size, kv_size, inner, vocab;
  int64_t attention_modules, mlp_modules; /* of a layer; the latter without experts */
  int64_t head;                           /* its number */
  int64_t experts, top_k;                 /* the most of a layer */
  int64_t segments;
  int own_bias; /* some adapter has a bias */
  buffers b;
  void *ws; /* for the operations */
  size_t ws_bytes;
} run;

static inline const pylora_adapter *adapter_of(const run *f, int64_t segment) {
  return f->step->adapter ? f->step->adapter[segment] : NULL;
}

/* Tokens of a segment. */
static inline int64_t first_of(const run *f, int64_t segment) {
  return f->step->seg_start ? f->step->seg_start[segment] : segment * f->step->m;
}

static inline const pylora_lora *lora_of(const pylora_adapter *a, int64_t module) {
  return a && a->lora ? a->lora[module] : NULL;
}

/* Fills in all but the buffers, of a model and a step that fit each other. */
int pylora_decoder_begin(run *f, const pylora_decoder *model, const pylora_step *step);

/* Counts bytes when `p` is NULL. */
typedef struct pieces {
  char *p, *end;
  double bytes;
} pieces;

/* Lays the buffers out; `a->p` is NULL where they do not fit. */
void pylora_decoder_lay_out(run *f, pieces *a);

/* ---- projections (decoder.c) ---- */

/* Projections module .. module + n - 1 of one x; `start` are its segments (NULL: one). */
typedef struct group {
  const pylora_mat *x;
  const pylora_norm *norm; /* or NULL */
  int64_t module;
  int n;
  pylora_linear *linear;
  const pylora_finish *finish; /* or NULL */
  const int64_t *start;
} group;

int pylora_decoder_linears(const run *f, const group *g);

static inline pylora_linear linear_of(const pylora_layer *l, int64_t module, const pylora_mat *y) {
  return (pylora_linear){.W = l->W[module], .bias = l->bias ? l->bias[module] : NULL, .y = y};
}

/* The first `cols` columns of a buffer, side by side. */
static inline pylora_mat part(const pylora_mat *a, int64_t cols) {
  return (pylora_mat){a->p, a->rows, cols, cols, a->b, NULL};
}

/* y = norm(x), or x where there is none, in y's type. */
int pylora_decoder_norm(const run *f, const pylora_mat *x, const pylora_norm *norm,
                        const pylora_mat *y);
/* x += y s */
void pylora_decoder_add(const pylora_mat *x, const pylora_mat *y, float s);
/* What is added to x is multiplied by this. */
static inline float residual_of(const pylora_decoder *model) {
  return model->residual_multiplier == 0 ? 1.0f : model->residual_multiplier;
}

/* ---- parts of a layer ---- */

int pylora_decoder_layer(const run *f, int64_t i, const pylora_kv *kv);
/* b.inner = what the experts of layer i make of the norm of x (decoder_experts.c) */
int pylora_decoder_experts(const run *f, int64_t i);

#endif
