/* cpu/loops.h - what the kernels' sources share: a row in full vectors and a tail, and one case of a loop for
 * each small number of rows. */
#ifndef PYLORA_CPU_LOOPS_H
#define PYLORA_CPU_LOOPS_H

#include "vec_bf16.h"

/* The body uses LOAD(p) and STORE(p, x) at j, the index of the vector's first element. */
#define EACH(n, ...)                   \
  do {                                 \
    int64_t j = 0;                     \
    for (; j + VL <= (n); j += VL) {   \
      enum { full = 1, left = VL };    \
      __VA_ARGS__                      \
    }                                  \
    if (j < (n)) {                     \
      enum { full = 0 };               \
      const int left = (int)((n) - j); \
      __VA_ARGS__                      \
    }                                  \
  } while (0)
#define LOAD(p) (full ? v_load((p) + j) : v_load_n((p) + j, left))
#define STORE(p, x)                \
  do {                             \
    if (full)                      \
      v_store((p) + j, x);         \
    else                           \
      v_store_n((p) + j, x, left); \
  } while (0)

/* The same of a row in either type. */
#define IN(r) \
  ((r).b ? (full ? v_load_bf16((r).b + j) : v_load_bf16_n((r).b + j, left)) : LOAD((r).p))
#define OUT(r, x)                         \
  do {                                    \
    if (!(r).b)                           \
      STORE((r).p, x);                    \
    else if (full)                        \
      v_store_bf16((r).b + j, x);         \
    else                                  \
      v_store_bf16_n((r).b + j, x, left); \
  } while (0)

/* The last m rows, fewer than a tile has, in one tile, so that b is read but once for them. */
#define ROWS_CASE(rows) \
  case rows:            \
    TILE(rows);         \
    break;
#define ROWS_3 ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3)
#define ROWS_5 ROWS_3 ROWS_CASE(4) ROWS_CASE(5)
#define ROWS_7 ROWS_5 ROWS_CASE(6) ROWS_CASE(7)
#define ROWS_11 ROWS_7 ROWS_CASE(8) ROWS_CASE(9) ROWS_CASE(10) ROWS_CASE(11)

#if defined(VEC_AVX512)
/* w columns in nv vectors, the last one of `tail`; jobs and nv are constants at every call. */
INLINE void few_put(const int jobs, const int nv, int tail, vf acc[PYLORA_FEW][2], float *const *c,
                    int mode) {
  UNROLL
  for (int i = 0; i < jobs; i++) {
    UNROLL
    for (int j = 0; j < nv; j++) {
      float *to = c[i] + j * VL;
      const int n = j < nv - 1 ? VL : tail;
      v_store_n(to, mode == GEMM_ADD ? v_add(v_load_n(to, n), acc[i][j]) : acc[i][j], n);
    }
  }
}
#define FEW_CASES(fn, ...)       \
  switch (jobs * 2 + (w > VL)) { \
  case 2:                        \
    fn(1, 1, __VA_ARGS__);       \
    return;                      \
  case 3:                        \
    fn(1, 2, __VA_ARGS__);       \
    return;                      \
  case 4:                        \
    fn(2, 1, __VA_ARGS__);       \
    return;                      \
  case 5:                        \
    fn(2, 2, __VA_ARGS__);       \
    return;                      \
  case 6:                        \
    fn(3, 1, __VA_ARGS__);       \
    return;                      \
  case 7:                        \
    fn(3, 2, __VA_ARGS__);       \
    return;                      \
  case 8:                        \
    fn(4, 1, __VA_ARGS__);       \
    return;                      \
  default:                       \
    fn(4, 2, __VA_ARGS__);       \
    return;                      \
  }
#endif

#endif
