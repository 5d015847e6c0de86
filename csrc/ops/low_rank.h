/* low_rank.h - what the two directions of a LoRA linear share: packed adapters and workspace sizes. */
#ifndef PYLORA_LOW_RANK_H
#define PYLORA_LOW_RANK_H

#include "formats/format.h"

enum {
  PYLORA_MAX_ROWS = 2048, /* rows of all tiles of a task at most; sizes the scratch */
  PYLORA_CHUNK_D =
      576, /* backward: rows of W transposed at a time (72 KiB); forward: ranks of a panel of B,
              or panels of heads that are rotated together */
  PYLORA_TILE = (PYLORA_MAX_ROWS + PYLORA_CHUNK_D) *
      PYLORA_PANEL, /* floats of scratch per thread */
};

/* Backward: rows of a W of `dtype` transposed at a time.  Of float32 32 KiB, which fit in L1; tiles like them
 * equal. */
static inline int64_t pylora_chunk_d(const pylora_kernels *K, int dtype, int64_t d) {
  if (dtype == PYLORA_F32) return 256;
  if (!K->tiles) return 512;
  return pad_panel(ceil_div(d, max64(1, ceil_div(d, PYLORA_CHUNK_D))));
}

/* A and B of one adapter, packed for a weight of `dtype`:
 * At: panels of 32 of the rank, [k][w] (in pairs for bfloat16, [ceil(k/2)][w][2]), w = min(32, left);
 * Bt: panels of 32 outputs, [r][32], s B transposed, float32. */
typedef struct low_pack {
  uint32_t magic;
  int32_t dtype;
  int64_t d, k, r;
  int64_t active; /* B has an element that is not 0 */
  int64_t at, bt; /* offsets from the start of this struct, in bytes */
} low_pack;

int pylora_check_lora(const pylora_lora *l, int64_t d, int64_t k);
int pylora_any_nonzero(const float *B, int64_t rows, int64_t cols, int64_t ld);

/* M [rows, cols] -> panels of 32 rows in pairs of columns, [ceil(cols/2)][w][2], rounded to bfloat16. */
void pylora_pack_pairs(const pylora_kernels *K, const float *M, int64_t rows, int64_t cols,
                       int64_t ld, uint16_t *out);

/* The two parts of pylora_lora_pack: all but Bt, and one panel of Bt, [r][32]. */
int pylora_pack_down(int dtype, int64_t d, int64_t k, const pylora_lora *l, void *buffer);
void pylora_pack_up(const pylora_kernels *K, const pylora_lora *l, int64_t d, int64_t panel,
                    float *out);

/* out [m,r] = rows Aᵀ: rows float32 with any stride, or bfloat16 where P was packed for it. */
void pylora_down(const pylora_kernels *K, const low_pack *P, int64_t m, const void *rows,
                 int64_t stride, float *out, int64_t ld);

/* pylora_down of up to PYLORA_FEW single rows, each with an adapter of its own; all of one rank and dtype. */
void pylora_down_few(const pylora_kernels *K, int n, const low_pack *const *P,
                     const void *const *rows, float *const *out);

static inline const float *low_bt(const low_pack *P, int64_t panel) {
  return (const float *)(const void *)((const char *)P + P->bt) + panel * P->r * PYLORA_PANEL;
}

/* The tiles of rows from i on and columns from j on of y. */
static inline pylora_put pylora_put_at(const pylora_mat *y, int64_t i, int64_t j) {
  const pylora_vec at = row_at(y, i, j);
  const int64_t size = at.b ? sizeof *at.b : sizeof *at.p;
  return (pylora_put){at.b ? (const char *)at.b : (const char *)at.p, y->ld * size,
                      PYLORA_PANEL * size};
}

/* A piece of work this small is not worth handing to another thread. */
static inline int pylora_threads_for(double flops, int threads) {
  return flops < 2e5 ? 1 : threads;
}

#endif
