/* lora.c - LoRA in a C program that has nothing but pylora.h: memory, a linear layer, an
 * embedding. Workspaces are as large as pylora.h says, and handed back after each call. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "port.h"

/* ---- memory and errors ------------------------------------------------------------------- */

typedef struct piece {
  struct piece *next;
  max_align_t data[];
} piece;
static piece *pieces;

void *take(size_t bytes) {
  piece *p = bytes < SIZE_MAX - sizeof *p ? calloc(1, sizeof *p + bytes) : NULL;
  if (!p) stop("memory", "there is not enough");
  p->next = pieces, pieces = p;
  return p->data;
}

void release(void) {
  for (piece *next; pieces; pieces = next) next = pieces->next, free(pieces);
}

void stop(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

void must(int status) {
  if (status != PYLORA_OK) stop("pylora", pylora_status_text(status));
}

static void *workspace(size_t bytes) {
  void *ws = bytes ? malloc(bytes) : NULL;
  if (!ws) stop("a workspace", "its sizes are too large");
  return ws;
}

pylora_mat zeros(int64_t rows, int64_t cols) {
  return (pylora_mat){take((size_t)(rows * cols) * sizeof(float)), rows, cols, cols, NULL, NULL};
}

pylora_mat copy(pylora_mat a) {
  const pylora_mat b = zeros(a.rows, a.cols);
  memcpy(b.p, a.p, (size_t)(a.rows * a.cols) * sizeof(float));
  return b;
}

pylora_mat transposed(pylora_mat a) {
  const pylora_mat b = zeros(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < a.cols; j++) b.p[j * b.ld + i] = a.p[i * a.ld + j];
  return b;
}

pylora_packed pack(pylora_mat W) {
  pylora_packed P;
  must(pylora_pack(PYLORA_F32, &W, take(pylora_pack_bytes(PYLORA_F32, W.rows, W.cols)), &P));
  return P;
}

/* ---- a linear layer ---------------------------------------------------------------------- */

pylora_mat lora_forward(pylora_mat x, const pylora_packed *W, const float *bias,
                        const pylora_lora *lora, const pylora_mat *residual, pylora_mat *h) {
  const pylora_mat y = zeros(x.rows, W->d);
  const size_t bytes = pylora_lora_workspace(x.rows, W->d, W->k, lora ? lora->r : 0);
  void *ws = workspace(bytes);
  if (lora) *h = zeros(x.rows, lora->r);
  must(pylora_lora_forward(&x, W, bias, lora, residual, &y, lora ? h : NULL, ws, bytes));
  free(ws);
  return y;
}

void lora_backward(pylora_mat dy, const pylora_mat *x, const pylora_mat *h, const pylora_packed *W,
                   const pylora_lora *lora, const pylora_mat *dx, const pylora_mat *dA,
                   const pylora_mat *dB) {
  const int64_t k = W ? W->k : x ? x->cols : 0;
  const size_t bytes = pylora_lora_workspace(dy.rows, dy.cols, k, lora ? lora->r : 0);
  void *ws = workspace(bytes);
  must(pylora_lora_backward(&dy, x, h, W, lora, dx, 1, dA, dB, ws, bytes));
  free(ws);
}

/* ---- an embedding: A is looked up, and B is a linear layer of its own --------------------- */

static pylora_mat times(float s, pylora_mat a) {
  const pylora_mat b = copy(a);
  for (int64_t i = 0; i < b.rows * b.cols; i++) b.p[i] *= s;
  return b;
}

pylora_mat embedding_forward(const int64_t *ids, int64_t m, pylora_mat W, pylora_mat A,
                             pylora_mat B, float s, pylora_mat *h) {
  const pylora_packed base = pack(W), down = pack(transposed(A)), up = pack(B);
  const pylora_mat y = zeros(m, W.cols);
  must(pylora_embedding_forward(ids, m, &base, &y));
  *h = zeros(m, A.rows);
  must(pylora_embedding_forward(ids, m, &down, h));
  for (int64_t i = 0; i < B.rows * B.cols; i++) /* F-2: B = 0 leaves the base's bits */
    if (B.p[i] != 0) return lora_forward(times(s, *h), &up, NULL, NULL, &y, NULL);
  return y;
}

void embedding_backward(const int64_t *ids, pylora_mat dy, pylora_mat h, pylora_mat A, pylora_mat B,
                        float s, pylora_mat *dA, pylora_mat *dB) {
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, s, NULL, NULL};
  const pylora_packed up = pack(B);
  const pylora_mat g = zeros(dy.rows, B.cols), dAt = zeros(A.cols, A.rows);
  *dB = zeros(B.rows, B.cols);
  lora_backward(dy, NULL, &h, NULL, &lora, NULL, NULL, dB);
  lora_backward(dy, NULL, NULL, &up, NULL, &g, NULL, NULL); /* g = dy B */
  const pylora_mat sg = times(s, g);
  must(pylora_embedding_backward(ids, &sg, &dAt)); /* sums what one token's rows give */
  *dA = transposed(dAt);
}
