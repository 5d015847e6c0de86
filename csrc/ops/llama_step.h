/* llama_step.h - one step of a whole model: what was asked for, and the memory that it runs in. */
#ifndef PYLORA_LLAMA_STEP_H
#define PYLORA_LLAMA_STEP_H

#include "runtime/internal.h"

enum { MODULES = PYLORA_LAYER_MODULES, SHARED = 3 /* projections of one x at most */ };

/* Pieces of the workspace; what is left of it is the operations' own. */
typedef struct buffers {
  pylora_mat x, raw_q, raw_k, q, k, v, o, gate, up, last, lse;
  float *rstd, *h;          /* of heads; h [m,r]: of the embedding's adapter */
  const pylora_lora **lora; /* [SHARED * segments] */
  int64_t *head_start;      /* [segments + 1]: segments of the outputs */
} buffers;

typedef struct run {
  const pylora_llama *model;
  const pylora_step *step;
  int64_t hidden, q_size, kv_size, inner, vocab;
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
int pylora_llama_begin(run *f, const pylora_llama *model, const pylora_step *step);

/* Counts bytes when `p` is NULL. */
typedef struct pieces {
  char *p, *end;
  double bytes;
} pieces;

/* Lays the buffers out; `a->p` is NULL where they do not fit. */
void pylora_llama_lay_out(run *f, pieces *a);

#endif
