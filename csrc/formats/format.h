/* format.h - how a frozen weight is stored and multiplied: one pylora_format for each dtype.
 *
 * lora_forward.c and lora_backward.c know rows, panels, threads and adapters; a format knows what is in
 * a panel.  Forward works on `prepared` rows of x: float32, bfloat16 or 16-bit integers.  Backward works
 * on rows of dy and on a chunk of W transposed on the way, both float32 or both bfloat16. */
#ifndef PYLORA_FORMAT_H
#define PYLORA_FORMAT_H

#include "runtime/internal.h"

enum {
  PYLORA_CHUNK = 1024, /* terms of a sum that are added up in one chain */
};

typedef struct pylora_format {
  int dtype;
  int multiple; /* k must be a multiple of it */

  size_t (*panel_bytes)(int64_t k); /* of 32 outputs, a multiple of 64 */
  /* Outputs first .. first + 31 of W (fewer at the end: zeros) -> panel.  W may be bf16 for BF16.  NULL
   * where numbers are not made into the format: only a file has such blocks. */
  void (*pack)(const pylora_kernels *K, const pylora_mat *W, int64_t first, void *panel);
  /* The same from rows of ggml's blocks (d of them in all), `row_bytes` apart, each at least
   * blocks_bytes(k) long; both NULL where the format is none of ggml's. */
  void (*pack_blocks)(const void *rows, int64_t row_bytes, int64_t d, int64_t k, int64_t first,
                      void *panel);
  size_t (*blocks_bytes)(int64_t k);
  /* Row `row` (< 32) of a panel: its exact values [k]. */
  void (*unpack)(const void *panel, int64_t k, int row, float *out);

  /* ---- forward: tile [n][32] = x panelᵀ ---- */
  size_t (*row_bytes)(int64_t k); /* of a prepared row, a multiple of 64, no multiple of 2048 */
  /* Rows first .. first + n - 1 of x, float32 or bf16 -> out, row_bytes apart. */
  void (*prepare)(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n,
                  void *out);
  /* `stride` is the distance of prepared rows in bytes. Sums longer than PYLORA_CHUNK in pieces. */
  void (*product)(const pylora_kernels *K, int64_t n, int64_t k, const void *rows, size_t stride,
                  const void *panel, float *tile);
  /* The same for w panels: tiles [w][n][32], which go to `put`.  NULL: they are taken one after the other. */
  void (*products)(const pylora_kernels *K, int64_t n, int64_t w, int64_t k, const void *rows,
                   size_t stride, const void *panels, float *tiles, const pylora_put *put);
  int many; /* `products` is for so many rows and more; 0: for any, on tiles alone */
  /* Up to PYLORA_FEW single rows, each with a panel of its own, or with a matrix of w <= 32 columns in the
   * order of a panel.  NULL where a format has no such kernel. */
  void (*few)(const pylora_kernels *K, int n, int w, int64_t k, const void *const *rows,
              const void *const *panels, float *const *tiles);

  /* ---- backward: tile [n][32] += dy chunk ---- */
  int back; /* PYLORA_F32, PYLORA_BF16 or PYLORA_F32X3: of the rows of dy and of the chunk */
  /* Outputs d0 .. d0 + rows - 1 (both multiples of 32) and inputs j .. j + 31 (< k: zeros beyond; j a
   * multiple of 32) of all panels -> chunk [rows][32], or in pairs [rows / 2][32][2] for bfloat16; for
   * F32X3 in pairs twice, of the upper and of the lower halves. */
  void (*transpose)(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0,
                    int64_t rows, int64_t j, void *chunk);
} pylora_format;

extern const pylora_format pylora_format_f32, pylora_format_bf16, pylora_format_q8_0,
    pylora_format_q4_0, pylora_format_q4_1, pylora_format_q8_0_a8, pylora_format_q4_0_a8,
    pylora_format_q4_1_a8, pylora_format_f32x3;
/* K-quants and their kin, [1]: with 8 bits of x. (format_k.c) */
extern const pylora_format pylora_format_q5_0[2], pylora_format_q5_1[2], pylora_format_q2_k[2],
    pylora_format_q3_k[2], pylora_format_q4_k[2], pylora_format_q5_k[2], pylora_format_q6_k[2],
    pylora_format_iq4_nl[2], pylora_format_iq4_xs[2], pylora_format_mxfp4[2];

/* NULL for a dtype that no weight can have. (pack.c) */
const pylora_format *pylora_format_of(int dtype);
int pylora_check_packed(const pylora_packed *P);

/* c [m,n] = sum over kk terms, in pieces of equal length of at most PYLORA_CHUNK, added up: long chains
 * lose small terms.  Where the cuts are depends on kk alone. (format_f32.c, format_bf16.c) */
static inline int64_t pylora_piece(int64_t kk) {
  return ceil_div(kk, max64(1, ceil_div(kk, PYLORA_CHUNK)));
}
void pylora_product(const pylora_kernels *K, int64_t m, int64_t n, int64_t kk, const float *a,
                    int64_t ars, int64_t acs, const float *b, int64_t ldb, float *c, int64_t ldc);
void pylora_product_bf16(const pylora_kernels *K, int64_t m, int64_t n, int64_t kk,
                         const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                         int64_t ldc);

/* Tiles of all kk terms, with the cuts of pylora_piece: `j` is filled in but for pairs and mode. */
void pylora_panels_bf16(const pylora_kernels *K, panels_job j, int64_t kk);
/* Asks for memory that is needed soon; it need not exist. */
static inline void pylora_prefetch(const void *p, size_t bytes) {
#if defined(__GNUC__)
  for (size_t i = 0; i < bytes; i += PYLORA_ALIGN) __builtin_prefetch((const char *)p + i, 0, 2);
#else
  (void)p, (void)bytes;
#endif
}

/* From one row to the next of prepared x, of so many bytes each.  Rows a multiple of 2048 bytes apart fall into
 * the same few sets of an L1 cache. */
static inline size_t pylora_row_stride(size_t bytes) {
  const size_t n = round_up(bytes);
  return n % 2048 ? n : n + PYLORA_ALIGN;
}

/* Elements from the upper to the lower halves of a row. */
static inline int64_t pylora_x3_low(int64_t k) {
  return (int64_t)(round_up((size_t)k * sizeof(uint16_t)) / sizeof(uint16_t));
}

/* A row of float32 or bfloat16 as float32: the row itself, or widened into out. */
static inline const float *pylora_row(const pylora_kernels *K, const pylora_mat *x, int64_t i,
                                      int64_t col, int64_t n, float *out) {
  if (!x->b) return x->p + i * x->ld + col;
  K->from_bf16(n, x->b + i * x->ld + col, out);
  return out;
}

#endif
