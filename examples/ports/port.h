/* port.h - a LoRA port in C on pylora.h: memory, random streams, layers, an adapter file, a block
 * and a training step. vectors.h holds it against the golden vectors. */
#ifndef PORT_H
#define PORT_H

#include <stdint.h>

#include "pylora.h"

/* ---- memory and errors (lora.c) ---------------------------------------------------------- */

void *take(size_t bytes); /* zeros that live until release() */
void release(void);
_Noreturn void stop(const char *what, const char *why); /* prints both and ends with status 2 */
void must(int status);                                  /* stops unless it is PYLORA_OK */
pylora_mat zeros(int64_t rows, int64_t cols);
pylora_mat copy(pylora_mat a);
pylora_mat transposed(pylora_mat a);
pylora_packed pack(pylora_mat W);

/* ---- layers (lora.c) --------------------------------------------------------------------- */

/* y; *h, if there is an adapter, is made for the backward pass. What is absent is NULL. */
pylora_mat lora_forward(pylora_mat x, const pylora_packed *W, const float *bias,
                        const pylora_lora *lora, const pylora_mat *residual, pylora_mat *h);
/* What is wanted is made beforehand; dx is added to. */
void lora_backward(pylora_mat dy, const pylora_mat *x, const pylora_mat *h, const pylora_packed *W,
                   const pylora_lora *lora, const pylora_mat *dx, const pylora_mat *dA,
                   const pylora_mat *dB);
/* An embedding with an adapter, F-5 and B-6: A [r,vocab], B [hidden,r]. */
pylora_mat embedding_forward(const int64_t *ids, int64_t m, pylora_mat W, pylora_mat A,
                             pylora_mat B, float s, pylora_mat *h);
void embedding_backward(const int64_t *ids, pylora_mat dy, pylora_mat h, pylora_mat A, pylora_mat B,
                        float s, pylora_mat *dA, pylora_mat *dB);

/* ---- random streams (sha256.c, random.c) ------------------------------------------------- */

void sha256(const void *data, size_t n, unsigned char digest[32]);
uint64_t stream(const char *name);                                       /* */
void units(double *u, int64_t n, uint64_t seed, uint64_t stream_number); /* */
double quantile(double u);                                               /* */
void uniform(pylora_mat out, double bound, uint64_t seed, const char *name);
void normal(pylora_mat out, double deviation, uint64_t seed, const char *name);

/* ---- an adapter file (adapter.c) --------------------------------------------------------- */

typedef struct adapter {
  pylora_mat A, B;
  float s;
} adapter;

void *read_file(const char *path, size_t *size); /* with a 0 behind it; NULL if there is none */
const char *after(const char *text, const char *key); /* where `key` ends; stops if it is absent */
/* The module at `path`, of shape [d,k], out of a PEFT directory (K). */
adapter load_adapter(const char *folder, const char *path, int64_t d, int64_t k);

/* ---- several adapters on a layer (several.c) --------------------------------------------- */

typedef struct layer_out {
  pylora_mat y, dx, dA[8], dB[8];
} layer_out;

/* n adapters (at most 8), all at once, or with `rows` that of number rows[i] for row i. */
layer_out several(pylora_mat x, pylora_mat W, int n, const pylora_lora *loras, const int64_t *rows,
                  pylora_mat dy);

/* ---- a transformer (block.c, training.c) ------------------------------------------------- */

typedef struct linear {
  pylora_packed W;
  pylora_mat A, B, dA, dB, x, h;
  pylora_mat mA, vA, mB, vB; /* the optimizer's moments; made by the first step */
  float s;
  pylora_drop drop; /* p = 0: none */
} linear;

enum { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };
extern const char *const projection_names[PROJECTIONS]; /* "self_attn.q_proj", ... */

typedef struct shape { /* what all blocks share */
  int64_t rows;
  const int64_t *position;
  pylora_seqs seqs;
  pylora_attn attn;
  pylora_mat cosines, sines;
  float eps;
} shape;

typedef struct block { /* weights, and what forward and backward leave */
  linear L[PROJECTIONS];
  const float *norm1, *norm2;
  float *rstd1, *rstd2;
  pylora_mat x, normed1, q, k, v, o, lse, mid, normed2, gate, up, act, y;
  pylora_mat dact, dgate, dup, dnormed2, dmid, d_o, dq, dk, dv, dnormed1, dx;
} block;

/* cos and sin of these positions, [positions, head_dim / 2]. */
void angles(pylora_mat cosines, pylora_mat sines, const int64_t *position, double theta);
shape shape_of(pylora_attn attn, double theta, double eps, int64_t n, const int64_t *lengths);
void attention_forward(const shape *s, pylora_mat q, pylora_mat k, pylora_mat v, pylora_mat *o,
                       pylora_mat *lse);
void attention_backward(const shape *s, pylora_mat d_o, pylora_mat q, pylora_mat k, pylora_mat v,
                        pylora_mat o, pylora_mat lse, pylora_mat *dq, pylora_mat *dk,
                        pylora_mat *dv);
void block_forward(block *b, const shape *s, pylora_mat x);
void block_backward(block *b, const shape *s, pylora_mat dy);

/* ---- what families have beside (features.c) ---------------------------------------------- */

typedef struct stretch { /* A-25; a type's own settings, 0 where there are none */
  const char *type;      /* "linear", "llama3", "dynamic", "yarn", "longrope"; NULL: none */
  double factor, original, low, high, beta_fast, beta_slow, attention_factor, mscale, mscale_all;
  double length, trained; /* of this sequence, and of the model's training */
  int truncate;
  const double *short_factor, *long_factor;
} stretch;

/* Radians per position of each of `pairs` pairs; what cos and sin are multiplied by. */
double frequencies(double *out, int64_t pairs, double theta, const stretch *s);
/* A-29, from dw [m,k] of the chosen weights to the logits' gradient. */
pylora_mat choose_backward(pylora_mat dw, pylora_mat p, const int64_t *chosen, int normalize);

typedef struct llama { /* the output layer is the embedding */
  int64_t layers;
  block *blocks;
  pylora_packed embed;
  const float *norm;
  shape s;
} llama;

/* One step on p; the first makes the moments, which begin as {0}. */
void adamw(pylora_mat p, pylora_mat grad, pylora_mat *m, pylora_mat *v, const pylora_adamw *o);
/* O-4: the norm of all gradients together; they are scaled down to the limit. */
double clip(int n, const pylora_mat *grads, double limit);
/* Step o.step (from 1) on one batch; trains A and B in place and gives the loss before the step. */
double train_step(llama *model, const int64_t *ids, const int64_t *labels, pylora_adamw o, float p,
                  uint64_t seed);
#endif
