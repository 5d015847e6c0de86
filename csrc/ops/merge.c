/* merge.c - W' = round(W + s B A), and the exact way back.
 *
 * The delta is summed in double in a fixed order; a product of two floats is exact in double, so
 * fused or not, vectorized or not, every machine gets the same bits.  Subtracting it again from W' gives
 * back most elements of W; the others (the residue) are kept with their bits. */
#include "runtime/internal.h"
#include "ops/number.h"

typedef struct job {
  const pylora_kernels *K;
  int dtype, mode;
  int64_t d, k, ldw, ldm;
  const char *W;
  char *merged;
  const pylora_lora *l;
  int64_t *row_lossy, *position;
  uint32_t *bits;
} job;

/* Rows [first, first + m) and n columns from j on. */
static void run(const job *q, int64_t first, int m, int64_t j, int64_t n, uint16_t *lossy) {
  const pylora_lora *l = q->l;
  const merge_job f = {.m = m,
                       .n = n,
                       .r = l->r,
                       .lda = l->lda,
                       .ldb = l->ldb,
                       .ldw = q->ldw,
                       .ldo = q->ldm,
                       .A = l->r ? l->A + j : NULL,
                       .B = l->r ? l->B + first * l->ldb : NULL,
                       .s = (double)l->s,
                       .w = q->W + (first * q->ldw + j) * width_of(q->dtype),
                       .out = q->merged + (first * q->ldm + j) * width_of(q->dtype),
                       .lossy = lossy};
  q->K->merge_rows(q->dtype, q->mode, &f);
}

static int ones(unsigned x) { /* of 16 bits */
  x -= x >> 1 & 0x5555u;
  x = (x & 0x3333u) + (x >> 2 & 0x3333u);
  x = (x + (x >> 4)) & 0x0f0fu;
  return (int)((x + (x >> 8)) & 0x1fu);
}

/* MERGE_ROWS rows of out = round(W + t), or W - t. */
static void merge_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const job *q = ctx;
  const int64_t first = task * MERGE_ROWS;
  const int m = (int)min64(MERGE_ROWS, q->d - first);
  if (!q->row_lossy) {
    run(q, first, m, 0, q->k, NULL);
    return;
  }
  uint16_t lossy[MERGE_ROWS * MERGE_WORDS];
  int64_t lost[MERGE_ROWS] = {0};
  for (int64_t j = 0; j < q->k; j += MERGE_COLS) {
    const int64_t n = min64(MERGE_COLS, q->k - j);
    run(q, first, m, j, n, lossy);
    for (int i = 0; i < m; i++)
      for (int c = 0; c < ceil_div(n, 16); c++) lost[i] += ones(lossy[i * MERGE_WORDS + c]);
  }
  memcpy(q->row_lossy + first, lost, (size_t)m * sizeof *lost);
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
  pylora_parallel(merge_task, &q, ceil_div(d, MERGE_ROWS), pylora_num_threads());
  return PYLORA_OK;
}

/* Elements of m rows that do not come back: those of row i go to at[i] .. end[i] - 1. */
static void residue_tile(const job *q, int64_t first, int m, int64_t *at, const int64_t *end) {
  uint16_t lossy[MERGE_ROWS * MERGE_WORDS];
  for (int64_t j = 0; j < q->k; j += MERGE_COLS) {
    const int64_t n = min64(MERGE_COLS, q->k - j);
    run(q, first, m, j, n, lossy);
    for (int i = 0; i < m; i++) {
      const char *W = q->W + (first + i) * q->ldw * width_of(q->dtype);
      for (int c = 0; c < ceil_div(n, 16); c++) {
        int64_t column = j + 16 * c;
        for (unsigned x = lossy[i * MERGE_WORDS + c]; x; x >>= 1, column++) {
          if (!(x & 1) || at[i] >= end[i]) continue;
          q->position[at[i]] = (first + i) * q->k + column;
          q->bits[at[i]++] = get_bits(q->dtype, W, column);
        }
      }
    }
  }
}

static void residue_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const job *q = ctx;
  const int64_t first = task * MERGE_ROWS;
  const int m = (int)min64(MERGE_ROWS, q->d - first);
  int64_t at[MERGE_ROWS], end[MERGE_ROWS], next = 0;
  for (int64_t i = 0; i < first; i++) next += q->row_lossy[i];
  const int64_t begin = next;
  for (int i = 0; i < m; i++) at[i] = next, end[i] = next += q->row_lossy[first + i];
  if (next > begin) residue_tile(q, first, m, at, end);
}

int pylora_merge_residue(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                         const void *merged, int64_t ldm, const pylora_lora *lora,
                         const int64_t *row_lossy, int64_t *position, uint32_t *bits) {
  TRY(check(dtype, d, k, W, merged, lora, ldm));
  if (!row_lossy || !position || !bits) return d ? PYLORA_E_NULL : PYLORA_OK;
  job q = {.K = pylora_table(),
           .dtype = dtype,
           .mode = MERGE_FIND,
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
  pylora_parallel(residue_task, &q, ceil_div(d, MERGE_ROWS), pylora_num_threads());
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
           .mode = MERGE_TAKE,
           .d = d,
           .k = k,
           .ldw = ldm,
           .ldm = ldo,
           .W = merged,
           .merged = out,
           .l = lora};
  pylora_parallel(merge_task, &q, ceil_div(d, MERGE_ROWS), pylora_num_threads());
  for (int64_t i = 0; i < n; i++) {
    char *row = (char *)out + position[i] / k * ldo * width_of(dtype);
    set_bits(dtype, row, position[i] % k, bits[i]);
  }
  return PYLORA_OK;
}
