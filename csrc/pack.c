/* pack.c - frozen weights in the order the kernels read them: panels of 32 outputs, [k][32] each. */
#include "internal.h"

size_t pylora_pack_bytes(int64_t d, int64_t k) {
  if (d < 0 || k < 0 || d > INT64_MAX - PYLORA_PANEL) return 0;
  int64_t rows = ceil_div(d, PYLORA_PANEL) * PYLORA_PANEL;
  int64_t limit = (int64_t)(SIZE_MAX / 2 / sizeof(float));
  if (k > 0 && rows > limit / k) return 0;
  size_t bytes = (size_t)rows * (size_t)k * sizeof(float);
  return bytes ? bytes : PYLORA_ALIGN; /* never 0 for a legal size */
}

typedef struct job {
  const pylora_mat *W;
  float *panels;
} job;

static void pack_panel(void *ctx, int64_t p, int thread) {
  (void)thread;
  const job *j = ctx;
  const pylora_mat *W = j->W;
  int64_t k = W->cols, first = p * PYLORA_PANEL, n = min64(PYLORA_PANEL, W->rows - first);
  float *out = j->panels + p * k * PYLORA_PANEL;
  if (n < PYLORA_PANEL) memset(out, 0, (size_t)(k * PYLORA_PANEL) * sizeof(float));
  for (int64_t t0 = 0; t0 < k; t0 += 32) /* in blocks, so that both sides stay in L1 */
    for (int64_t i = 0; i < n; i++)
      for (int64_t t = t0; t < min64(k, t0 + 32); t++)
        out[t * PYLORA_PANEL + i] = W->p[(first + i) * W->ld + t];
}

int pylora_pack(const pylora_mat *W, void *buffer, pylora_packed *out) {
  if (!W || !out || !buffer) return PYLORA_E_NULL;
  TRY(check_mat(W, W->rows, W->cols, 0));
  if (!pylora_pack_bytes(W->rows, W->cols)) return PYLORA_E_SHAPE;
  job j = {W, buffer};
  if (W->cols)
    pylora_parallel(pack_panel, &j, ceil_div(W->rows, PYLORA_PANEL), pylora_num_threads());
  *out = (pylora_packed){PYLORA_MAGIC, PYLORA_F32, W->rows, W->cols, buffer};
  return PYLORA_OK;
}

int pylora_unpack(const pylora_packed *P, const pylora_mat *W) {
  TRY(check_packed(P));
  TRY(check_mat(W, P->d, P->k, 1));
  const float *panels = P->data;
  for (int64_t i = 0; i < P->d; i++) {
    const float *column = panels + i / PYLORA_PANEL * P->k * PYLORA_PANEL + i % PYLORA_PANEL;
    for (int64_t t = 0; t < P->k; t++) W->p[i * W->ld + t] = column[t * PYLORA_PANEL];
  }
  return PYLORA_OK;
}
