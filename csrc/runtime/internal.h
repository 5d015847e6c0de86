/* internal.h - what the sources of the core share: argument checks, workspaces, the thread pool. */
#ifndef PYLORA_INTERNAL_H
#define PYLORA_INTERNAL_H

#include <stdint.h>
#include <string.h>

#include "cpu/kernels.h"
#include "pylora.h"

#define PYLORA_MAGIC 0x504c3031u /* "PL01" */

#define TRY(expr)                \
  do {                           \
    int status_ = (expr);        \
    if (status_) return status_; \
  } while (0)

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t pad_panel(int64_t n) { return ceil_div(n, PYLORA_PANEL) * PYLORA_PANEL; }

/* NULL data is legal only for an empty matrix; rows must not overlap in an output (`out`).  check_mat
 * is for operations that take float32 only. */
static inline int check_mat16(const pylora_mat *a, int64_t rows, int64_t cols, int out) {
  if (!a) return PYLORA_E_NULL;
  if (a->rows != rows || a->cols != cols || rows < 0 || cols < 0) return PYLORA_E_SHAPE;
  if (a->h) return PYLORA_E_UNSUPPORTED;
  if (a->p && a->b) return PYLORA_E_VALUE;
  if (rows == 0 || cols == 0) return PYLORA_OK;
  if (!a->p && !a->b) return PYLORA_E_NULL;
  if (out && rows > 1 && a->ld < cols && a->ld > -cols) return PYLORA_E_SHAPE;
  return PYLORA_OK;
}

static inline int check_mat(const pylora_mat *a, int64_t rows, int64_t cols, int out) {
  if (a && a->b) return PYLORA_E_UNSUPPORTED;
  return check_mat16(a, rows, cols, out);
}

/* One number between the two types: exact, and to nearest even (NaN stays NaN).  Rows: kernels.h. */
static inline float bf16_widen(uint16_t x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

static inline uint16_t bf16_round(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

static inline pylora_vec vec_at(pylora_vec r, int64_t j) {
  pylora_vec at = {r.b ? NULL : r.p + j, r.b ? r.b + j : NULL};
  return at;
}

/* A piece of row i, from column j on, for the kernels. */
static inline pylora_vec row_at(const pylora_mat *a, int64_t i, int64_t j) {
  const int64_t at = i * a->ld + j;
  pylora_vec r = {a->b ? NULL : a->p + at, a->b ? a->b + at : NULL};
  return r;
}

/* n pieces of `elements` each, in parallel: fn(ctx, first, end). (transformer.c) */
void pylora_each_row(void (*fn)(const void *, int64_t, int64_t), const void *ctx, int64_t n,
                     int64_t elements);
/* Rows first .. end - 1 of the norm of x, and their rstd. (transformer.c) */
void pylora_norm_rows(const pylora_kernels *K, const pylora_mat *x, const pylora_norm *norm,
                      const pylora_mat *y, float *rstd, int64_t first, int64_t end);
void pylora_layer_rows(const pylora_kernels *K, const pylora_mat *x, const pylora_norm *norm,
                       const pylora_mat *y, float *rstd, int64_t first, int64_t end);
/* The heads of a row of `cols` numbers rotated by `half` angles whose cosines and sines are c and s. */
void pylora_rope_row(const pylora_kernels *K, pylora_vec x, int64_t cols, int64_t head_dim,
                     int64_t half, int layout, int inverse, const float *c, const float *s,
                     pylora_vec y);
int pylora_check_rope(const pylora_mat *cosines, const pylora_mat *sines, const int64_t *position,
                      int64_t m, int64_t cols, int64_t head_dim, int layout);

/* y = act(gate) up */
static inline void pylora_gate(const pylora_kernels *K, int kind, int64_t n, pylora_vec gate,
                               pylora_vec up, pylora_vec y) {
  if (kind == PYLORA_SILU)
    K->swiglu_forward(n, gate, up, y);
  else
    K->activation_forward(kind, n, gate, up, y);
}

/* A bump pointer over the caller's workspace; every piece is 64-byte aligned. */
typedef struct arena {
  char *p, *end;
} arena;

#define PYLORA_ALIGN 64
static inline size_t round_up(size_t n) {
  return (n + PYLORA_ALIGN - 1) & ~(size_t)(PYLORA_ALIGN - 1);
}

static inline arena arena_of(void *p, size_t bytes) {
  uintptr_t a = ((uintptr_t)p + PYLORA_ALIGN - 1) & ~(uintptr_t)(PYLORA_ALIGN - 1);
  arena r = {(char *)a, (char *)p + (p ? bytes : 0)};
  return r;
}

/* NULL if the workspace is too small. */
static inline void *arena_bytes(arena *a, size_t n) {
  size_t bytes = round_up(n);
  if (!a->p || a->p > a->end || (size_t)(a->end - a->p) < bytes) return NULL;
  void *r = a->p;
  a->p += bytes;
  return r;
}

static inline float *arena_floats(arena *a, int64_t n) {
  return (float *)arena_bytes(a, (size_t)n * sizeof(float));
}

/* Runs fn(ctx, task, thread) for task = 0 .. n-1 on at most `threads` threads, the caller's among them;
 * `thread` is 0 .. threads-1 and no two tasks run at the same time with the same one.  An operation
 * asks pylora_num_threads() once, sizes its scratch by it and passes it on, so that a change in
 * between does no harm.  The order of the tasks is not fixed: a task must not depend on another.  All
 * run on the caller's thread when the pool is busy with another caller's work. */
typedef void (*pylora_task)(void *ctx, int64_t task, int thread);
void pylora_parallel(pylora_task fn, void *ctx, int64_t n, int threads);

/* Dropout of a piece of a [.,k] matrix: x holds rows row.. and columns col.. of it.  (random.c) */
int pylora_dropout_at(const pylora_mat *x, const pylora_drop *drop, int64_t row, int64_t col,
                      int64_t k, const pylora_mat *y);

#endif
