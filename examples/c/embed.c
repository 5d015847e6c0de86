/* embed.c - LoRA in a C program that has nothing but pylora.h: pack a frozen weight, train an
 * adapter on it, merge the adapter, and take it out again bit for bit.
 *
 *   make -C examples/c        builds it against the sources of the core and runs it
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pylora.h"

enum { M = 64, K = 48, D = 40, R = 4, STEPS = 300 };

/* Every function returns a status; a program decides itself what to do about it. */
static void must(int status, const char *what) {
  if (status == PYLORA_OK) return;
  fprintf(stderr, "%s: %s\n", what, pylora_status_text(status));
  exit(1);
}

static void *allocate(size_t bytes) {
  void *p = calloc(bytes ? bytes : 1, 1);
  if (!p) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return p;
}

/* Uniform in (-1, 1) times `size`, from the same counter-based generator that pylora uses. */
static void fill(float *x, int64_t n, uint64_t stream, float size) {
  uint32_t *words = allocate((size_t)n * sizeof *words);
  must(pylora_philox(7, stream, 0, n, words), "philox");
  for (int64_t i = 0; i < n; i++)
    x[i] = size * ((float)(words[i] >> 8) * (1.0f / 8388608.0f) - 1.0f);
  free(words);
}

static float W[D * K], goal[D * K], x[M * K], y[M * D], want[M * D], dy[M * D];
static float A[R * K], B[D * R], dA[R * K], dB[D * R], h[M * R];
static float mA[R * K], vA[R * K], mB[D * R], vB[D * R]; /* AdamW's moments */

int main(void) {
  pylora_mat Wm = {W, D, K, K, NULL, NULL}, goalm = {goal, D, K, K, NULL, NULL},
             xm = {x, M, K, K, NULL, NULL}, ym = {y, M, D, D, NULL, NULL};
  pylora_mat wantm = {want, M, D, D, NULL, NULL}, dym = {dy, M, D, D, NULL, NULL},
             hm = {h, M, R, R, NULL, NULL};
  pylora_mat dAm = {dA, R, K, K, NULL, NULL}, dBm = {dB, D, R, R, NULL, NULL};

  /* The frozen weight, and a goal that differs from it by a matrix of rank R. */
  fill(W, D * K, 1, 0.1f);
  fill(x, M * K, 2, 1.0f);
  fill(A, R * K, 3, 1.0f);
  fill(B, D * R, 4, 0.3f);
  pylora_lora hidden = {R, A, K, B, R, 0.5f, NULL, NULL};
  must(pylora_merge(PYLORA_F32, D, K, W, K, &hidden, goal, K, NULL), "merge");

  /* Pack both once; the buffers belong to us. */
  void *buffer = allocate(pylora_pack_bytes(PYLORA_F32, D, K)),
       *goal_buffer = allocate(pylora_pack_bytes(PYLORA_F32, D, K));
  pylora_packed P, G;
  must(pylora_pack(PYLORA_F32, &Wm, buffer, &P), "pack");
  must(pylora_pack(PYLORA_F32, &goalm, goal_buffer, &G), "pack");
  size_t ws_bytes = pylora_lora_workspace(M, D, K, R);
  void *ws = allocate(ws_bytes);
  must(pylora_lora_forward(&xm, &G, NULL, NULL, NULL, &wantm, NULL, ws, ws_bytes), "forward");

  /* A fresh adapter: A random, B zero, so that it starts as the base model. */
  fill(A, R * K, 5, 0.2f);
  memset(B, 0, sizeof B);
  pylora_lora lora = {R, A, K, B, R, 2.0f, NULL, NULL};
  double first = 0, loss = 0;
  for (int step = 1; step <= STEPS; step++) {
    must(pylora_lora_forward(&xm, &P, NULL, &lora, NULL, &ym, &hm, ws, ws_bytes), "forward");
    loss = 0;
    for (int i = 0; i < M * D; i++) {
      float e = y[i] - want[i];
      loss += 0.5 * e * e / M;
      dy[i] = e / M;
    }
    if (step == 1) first = loss;
    must(pylora_lora_backward(&dym, &xm, &hm, &P, &lora, NULL, 0, &dAm, &dBm, ws, ws_bytes),
         "backward");
    pylora_adamw o = {0.02f, 0.9f, 0.999f, 1e-8f, 0.0f, 1.0f, step};
    must(pylora_adamw_step(R * K, A, dA, mA, vA, &o), "adamw");
    must(pylora_adamw_step(D * R, B, dB, mB, vB, &o), "adamw");
  }
  printf("kernels %s, %d threads\n", pylora_isa(), pylora_num_threads());
  printf("loss %.6f at first, %.6f after %d steps\n", first, loss, STEPS);

  /* Merge, and keep what rounding loses: first the count of each row, then positions and bits. */
  static float merged[D * K], back[D * K];
  static int64_t row_lossy[D];
  must(pylora_merge(PYLORA_F32, D, K, W, K, &lora, merged, K, row_lossy), "merge");
  int64_t lossy = 0;
  for (int i = 0; i < D; i++) lossy += row_lossy[i];
  int64_t *position = allocate((size_t)lossy * sizeof *position);
  uint32_t *bits = allocate((size_t)lossy * sizeof *bits);
  must(pylora_merge_residue(PYLORA_F32, D, K, W, K, merged, K, &lora, row_lossy, position, bits),
       "residue");
  must(pylora_unmerge(PYLORA_F32, D, K, merged, K, &lora, lossy, position, bits, back, K),
       "unmerge");
  int same = memcmp(back, W, sizeof W) == 0;
  printf("merged; %lld of %d elements kept aside; unmerged: %s\n", (long long)lossy, D * K,
         same ? "bit for bit the base" : "NOT the base");

  free(bits);
  free(position);
  free(ws);
  free(goal_buffer);
  free(buffer);
  return same && loss < 0.05 * first ? 0 : 1;
}
