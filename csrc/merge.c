/* merge.c - W' = round(W + s B A), and the exact way back.
 *
 * The delta is summed in double in a fixed order; a product of two floats is exact in double, so
 * fused or not, vectorized or not, every machine gets the same bits.  Subtracting it again from W' gives
 * back most elements of W; the others (the residue) are kept with their bits. */
#include "internal.h"
#include "number.h"

enum {
  COLS = 256, /* columns of delta at a time, on the stack */
  TILE = 4,   /* rows per task of merge and unmerge: they share what is read of A */
  ROWS = 64,  /* rows per task where the residue is collected */
};

/* ---- rows ---- */

typedef struct job {
  const pylora_kernels *K;
  int dtype, subtract;
  int64_t d, k, ldw, ldm;
  const char *W;
  char *merged;
  const pylora_lora *l;
  int64_t *row_lossy, *position;
  uint32_t *bits;
} job;

/* t[j] = s * sum_i B[row,i] A[i,j0+j], in double */
static void delta(const pylora_lora *l, int64_t row, int64_t j0, int64_t n, double *t) {
  for (int64_t j = 0; j < n; j++) t[j] = 0;
  for (int64_t i = 0; i < l->r; i++) {
    const double b = (double)l->B[row * l->ldb + i];
    const float *A = l->A + i * l->lda + j0;
    for (int64_t j = 0; j < n; j++) t[j] += b * (double)A[j];
  }
  for (int64_t j = 0; j < n; j++) t[j] *= (double)l->s;
}

static size_t width(int dtype) { return dtype == PYLORA_F32 ? 4 : 2; }
static const void *row_of(const void *p, int dtype, int64_t i, int64_t ld) {
  return (const char *)p + i * ld * (int64_t)width(dtype);
}

/* Does round(merged - t) give back the bits of w?  (As a value, so that a NaN never does.) */
static int restores(int dtype, const void *merged, int64_t j, double t, uint32_t w) {
  return encode(dtype, decode(dtype, get_bits(dtype, merged, j)) - t) == w;
}

/* TILE rows of out = round(W + t), or W - t. */
static void merge_tile(void *ctx, int64_t task, int thread) {
  (void)thread;
  const job *q = ctx;
  const pylora_lora *l = q->l;
  const int64_t first = task * TILE, size = (int64_t)width(q->dtype);
  const int m = (int)min64(TILE, q->d - first);
  double t[TILE * COLS];
  int64_t lossy[TILE] = {0};
  for (int64_t j = 0; j < q->k; j += COLS) {
    const int n = (int)min64(COLS, q->k - j);
    q->K->merge_delta(m, n, l->r, l->r ? l->A + j : NULL, l->lda,
                      l->r ? l->B + first * l->ldb : NULL, l->ldb, t, COLS);
    for (int i = 0; i < m; i++)
      lossy[i] += q->K->merge_row(q->dtype, q->subtract, q->row_lossy != NULL, n, t + i * COLS,
                                  (double)l->s, q->W + ((first + i) * q->ldw + j) * size,
                                  q->merged + ((first + i) * q->ldm + j) * size);
  }
  if (q->row_lossy)
    for (int i = 0; i < m; i++) q->row_lossy[first + i] = lossy[i];
}

static int check(int dtype, int64_t d, int64_t k, const void *W, const void *out,
                 const pylora_lora *l, int64_t ldo) {
  if (dtype != PYLORA_F32 && dtype != PYLORA_BF16 && dtype != PYLORA_F16)
    return PYLORA_E_UNSUPPORTED;
  if (d < 0 || k < 0 || (d > 1 && ldo < k && ldo > -k)) return PYLORA_E_SHAPE;
  if (!l) return PYLORA_E_NULL;
  if (l->r < 0) return PYLORA_E_SHAPE;
  if (d && k && (!W || !out || (l->r && (!l->A || !l->B)))) return PYLORA_E_NULL;
  return PYLORA_OK;
}

int pylora_merge(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                 const pylora_lora *lora, void *out, int64_t ldo, int64_t *row_lossy) {
  TRY(check(dtype, d, k, W, out, lora, ldo));
  job q = {.K = pylora_table(),
           .dtype = dtype,
           .d = d,
           .k = k,
           .ldw = ldw,
           .ldm = ldo,
           .W = W,
           .merged = out,
           .l = lora,
           .row_lossy = row_lossy};
  pylora_parallel(merge_tile, &q, ceil_div(d, TILE), pylora_num_threads());
  return PYLORA_OK;
}

static int64_t residue_row(const job *q, int64_t i, int64_t at) {
  if (!q->row_lossy[i]) return at;
  const void *W = row_of(q->W, q->dtype, i, q->ldw),
             *merged = row_of(q->merged, q->dtype, i, q->ldm);
  const int64_t end = at + q->row_lossy[i];
  double t[COLS];
  for (int64_t j = 0; j < q->k && at < end; j += COLS) {
    int64_t n = min64(COLS, q->k - j);
    delta(q->l, i, j, n, t);
    for (int64_t c = 0; c < n && at < end; c++) {
      uint32_t w = get_bits(q->dtype, W, j + c);
      if (restores(q->dtype, merged, j + c, t[c], w)) continue;
      q->position[at] = i * q->k + j + c;
      q->bits[at++] = w;
    }
  }
  return end;
}

static void residue_rows(void *ctx, int64_t task, int thread) {
  (void)thread;
  const job *q = ctx;
  int64_t at = 0, first = task * ROWS;
  for (int64_t p = 0; p < first; p++) at += q->row_lossy[p];
  for (int64_t i = first; i < min64(q->d, first + ROWS); i++) at = residue_row(q, i, at);
}

int pylora_merge_residue(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                         const void *merged, int64_t ldm, const pylora_lora *lora,
                         const int64_t *row_lossy, int64_t *position, uint32_t *bits) {
  TRY(check(dtype, d, k, W, merged, lora, ldm));
  if (!row_lossy || !position || !bits) return d ? PYLORA_E_NULL : PYLORA_OK;
  job q = {.K = pylora_table(),
           .dtype = dtype,
           .d = d,
           .k = k,
           .ldw = ldw,
           .ldm = ldm,
           .W = W,
           .merged = (char *)(uintptr_t)merged,
           .l = lora,
           .row_lossy = (int64_t *)(uintptr_t)row_lossy,
           .position = position,
           .bits = bits};
  pylora_parallel(residue_rows, &q, ceil_div(d, ROWS), pylora_num_threads());
  return PYLORA_OK;
}

int pylora_unmerge(int dtype, int64_t d, int64_t k, const void *merged, int64_t ldm,
                   const pylora_lora *lora, int64_t n, const int64_t *position,
                   const uint32_t *bits, void *out, int64_t ldo) {
  TRY(check(dtype, d, k, merged, out, lora, ldo));
  if (n < 0) return PYLORA_E_SHAPE;
  if (n && (!position || !bits)) return PYLORA_E_NULL;
  for (int64_t i = 0; i < n; i++)
    if (position[i] < 0 || k == 0 || position[i] / k >= d) return PYLORA_E_INDEX;
  job q = {.K = pylora_table(),
           .dtype = dtype,
           .subtract = 1,
           .d = d,
           .k = k,
           .ldw = ldm,
           .ldm = ldo,
           .W = merged,
           .merged = out,
           .l = lora};
  pylora_parallel(merge_tile, &q, ceil_div(d, TILE), pylora_num_threads());
  for (int64_t i = 0; i < n; i++) {
    char *row = (char *)out + position[i] / k * ldo * (int64_t)width(dtype);
    set_bits(dtype, row, position[i] % k, bits[i]);
  }
  return PYLORA_OK;
}
