/* cpu/kernels.h - the table of inner loops that each instruction set fills in.
 *
 * Everything above it (lora.c, transformer.c, ...) is plain C that knows tiles, threads and memory,
 * but no instruction set.  Everything below it (gemm.inc, rows.inc) is one source, compiled once per
 * instruction set with the vector type of vec.h.
 *
 * One rule makes the library's determinism: an element of a result is summed over k in the order
 * k = 0, 1, 2, ... in one accumulator, whatever the tile.  So no tiling, row count or thread count
 * changes its bits. */
#ifndef PYLORA_CPU_KERNELS_H
#define PYLORA_CPU_KERNELS_H

#include <stdint.h>

typedef struct pylora_kernels {
  const char *name;
  int (*supported)(void); /* can this CPU run the table? */

  /* c[i,j] = (add ? c[i,j] : 0) + sum_t a[i*ars + t*acs] * b[t*ldb + j]  for i < m, j < n, t < kk.
   * n <= PYLORA_PANEL; b and c are touched only at j < n. */
  void (*gemm)(int64_t m, int n, int64_t kk, const float *a, int64_t ars, int64_t acs, const float *b,
               int64_t ldb, float *c, int64_t ldc, int add);
  /* One 32 x 32 tile: dst[j*32 + i] = src[i*32 + j]. */
  void (*transpose32)(const float *src, float *dst);

#include "rows_table.h" /* loops over one row: norms, softmax, SwiGLU, AdamW */
} pylora_kernels;

extern const pylora_kernels pylora_kernels_portable;
#if defined(__x86_64__) || defined(_M_X64)
#define PYLORA_X86 1
extern const pylora_kernels pylora_kernels_avx2;
extern const pylora_kernels pylora_kernels_avx512;
#elif defined(__aarch64__) || defined(_M_ARM64)
#define PYLORA_ARM64 1
extern const pylora_kernels pylora_kernels_neon;
#endif

/* The table in use; chosen at the first call. */
const pylora_kernels *pylora_table(void);

#endif
