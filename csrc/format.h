/* format.h - how a frozen weight is stored and multiplied: one pylora_format for each dtype.
 *
 * lora_forward.c and lora_backward.c know rows, panels, threads and adapters; a format knows what is in
 * a panel.  Forward works on `prepared` rows of x: float32, bfloat16 or 16-bit integers.  Backward works
 * on rows of dy and on a chunk of W transposed on the way, both float32 or both bfloat16. */
#ifndef PYLORA_FORMAT_H
#define PYLORA_FORMAT_H

#include "internal.h"

enum {
  PYLORA_CHUNK = 1024, /* terms of a sum that are added up in one chain */
};

typedef struct pylora_format {
  int dtype;
  int multiple; /* k must be a multiple of it */

  size_t (*panel_bytes)(int64_t k); /* of 32 outputs, a multiple of 64 */
  /* Outputs first .. first + 31 of W (fewer at the end: zeros) -> panel.  W may be bf16 for BF16. */
  void (*pack)(const pylora_kernels *K, const pylora_mat *W, int64_t first, void *panel);
  /* Row `row` (< 32) of a panel: its exact values [k]. */
  void (*unpack)(const void *panel, int64_t k, int row, float *out);

  /* ---- forward: tile [n][32] = x panelᵀ ---- */
  size_t (*row_bytes)(int64_t k); /* of a prepared row, a multiple of 64, no multiple of 2048 */
  /* Rows first .. first + n - 1 of x, float32 or bf16 -> out, row_bytes apart. */
  void (*prepare)(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n, void *out);
  /* `stride` is the distance of prepared rows in bytes. Sums longer than PYLORA_CHUNK in pieces. */
  void (*product)(const pylora_kernels *K, int64_t n, int64_t k, const void *rows, size_t stride,
                  const void *panel, float *tile);

  /* ---- backward: tile [n][32] += dy chunk ---- */
  int back; /* PYLORA_F32 or PYLORA_BF16: of the rows of dy and of the chunk */
  /* Outputs d0 .. d0 + rows - 1 (both multiples of 32) and inputs j .. j + 31 (< k: zeros beyond; j a
   * multiple of 32) of all panels -> chunk [rows][32], or in pairs [rows / 2][32][2] for bfloat16. */
  void (*transpose)(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0, int64_t rows,
                    int64_t j, void *chunk);
} pylora_format;

extern const pylora_format pylora_format_f32, pylora_format_bf16, pylora_format_q8_0,
    pylora_format_q4_0, pylora_format_q4_1;

/* NULL for a dtype that no weight can have. (pack.c) */
const pylora_format *pylora_format_of(int dtype);

#endif
