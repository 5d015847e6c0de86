/* check.h - what the C tests share: expectations, random matrices in awkward layouts, bounds.
 *
 * Each test_*.c is a program: 0 when everything held. Matrices are allocated to the byte, so that a
 * sanitizer sees an access outside; the gaps between rows hold NaN, which spreads if it is read, and
 * are checked at the end, so that a write is seen too. */
#ifndef CHECK_H
#define CHECK_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pylora.h"
#include "reference.h"

/* ---- expectations ---- */

static int failures;
static char context[200]; /* what is being tested, for the message */

#define EXPECT(condition, ...)                                              \
  do {                                                                      \
    if (!(condition)) {                                                     \
      if (failures++ < 20) {                                                \
        printf("%s:%d: %s [%s] ", __FILE__, __LINE__, #condition, context); \
        printf(" " __VA_ARGS__);                                            \
        printf("\n");                                                       \
      }                                                                     \
    }                                                                       \
  } while (0)
#define EXPECT_STATUS(wanted, call)                                          \
  do {                                                                       \
    const int got_ = (call);                                                 \
    EXPECT(got_ == (wanted), "%s gave %s", #call, pylora_status_text(got_)); \
  } while (0)
#define OK(call) EXPECT_STATUS(PYLORA_OK, call)

/* ---- random numbers: splitmix64 ---- */

static uint64_t state = 20210617;

static inline uint64_t bits64(void) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
static inline int64_t below(int64_t n) { return (int64_t)(bits64() % (uint64_t)n); }
static inline float uniform(void) {
  return (float)((int64_t)(bits64() >> 40) - (1 << 23)) / (1 << 23);
}
#define PICK(...) /* one of these numbers */ \
  ((const int64_t[]){__VA_ARGS__})[below(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))]

/* ---- memory: freed all at once ---- */

typedef struct block {
  struct block *next;
  float *base; /* of a matrix: checked for writes to its gaps */
  uint16_t *base16;
  pylora_mat mat;
  int64_t n, offset;
  void *memory;
} block;
static block *blocks;

static inline block *take(size_t bytes) {
  block *b = calloc(1, sizeof *b);
  if (!b || !(b->memory = malloc(bytes ? bytes : 1))) abort();
  b->next = blocks;
  return blocks = b;
}
static inline void *bytes_of(size_t n) { return take(n)->memory; }
static inline float *floats(int64_t n, float size) {
  float *p = bytes_of((size_t)n * sizeof(float));
  for (int64_t i = 0; i < n; i++) p[i] = size * uniform();
  return p;
}
static inline int64_t *ids_below(int64_t n, int64_t end) {
  int64_t *p = bytes_of((size_t)n * sizeof(int64_t));
  for (int64_t i = 0; i < n; i++) p[i] = below(end);
  return p;
}

/* rows x cols of numbers in (-size, size): packed or with gaps, top down or bottom up. */
static inline pylora_mat matrix(int64_t rows, int64_t cols, float size) {
  const int64_t stride = cols + PICK(0, 0, 1, 5), offset = PICK(0, 1, 3);
  const int64_t n = rows && cols ? offset + (rows - 1) * stride + cols : 0;
  block *b = take((size_t)n * sizeof(float));
  b->base = b->memory, b->n = n, b->offset = offset;
  for (int64_t i = 0; i < n; i++) b->base[i] = NAN;
  pylora_mat a = {n ? b->base + offset : NULL, rows, cols, stride, NULL, NULL};
  if (n && below(3) == 0) a.p += (rows - 1) * stride, a.ld = -stride;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) a.p[i * a.ld + j] = size * uniform();
  return b->mat = a;
}
/* The same in bfloat16, not filled. */
enum { GAP16 = 0x7fc1 }; /* a NaN */
static inline pylora_mat matrix16(int64_t rows, int64_t cols) {
  const int64_t stride = cols + PICK(0, 0, 1, 5), offset = PICK(0, 1, 3);
  const int64_t n = rows && cols ? offset + (rows - 1) * stride + cols : 0;
  block *b = take((size_t)n * sizeof(uint16_t));
  b->base16 = b->memory, b->n = n, b->offset = offset;
  for (int64_t i = 0; i < n; i++) b->base16[i] = GAP16;
  pylora_mat a = {NULL, rows, cols, stride, n ? b->base16 + offset : NULL, NULL};
  if (n && below(3) == 0) a.b += (rows - 1) * stride, a.ld = -stride;
  return b->mat = a;
}
static inline float *el(const pylora_mat *a, int64_t i, int64_t j) { return a->p + i * a->ld + j; }
static inline void fill(const pylora_mat *a, float value) {
  for (int64_t i = 0; i < a->rows; i++)
    for (int64_t j = 0; j < a->cols; j++) *el(a, i, j) = value;
}
static inline void copy(const pylora_mat *from, const pylora_mat *to) {
  for (int64_t i = 0; i < from->rows; i++)
    for (int64_t j = 0; j < from->cols; j++) *el(to, i, j) = *el(from, i, j);
}
static inline pylora_mat copy_of(const pylora_mat *a) {
  pylora_mat b = matrix(a->rows, a->cols, 0);
  copy(a, &b);
  return b;
}
/* bfloat16: the nearest, ties to even; and back. */
static inline uint16_t bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  if (isnan(x)) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
static inline float from_bf16(uint16_t b) {
  const uint32_t u = (uint32_t)b << 16;
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}
static inline pylora_mat rounded(const pylora_mat *a) {
  pylora_mat b = matrix16(a->rows, a->cols);
  for (int64_t i = 0; i < a->rows; i++)
    for (int64_t j = 0; j < a->cols; j++) b.b[i * b.ld + j] = bf16(*el(a, i, j));
  return b;
}
static inline pylora_mat widened(const pylora_mat *b) {
  pylora_mat a = matrix(b->rows, b->cols, 0);
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < a.cols; j++) *el(&a, i, j) = from_bf16(b->b[i * b->ld + j]);
  return a;
}
static inline pylora_mat abs_of(const pylora_mat *a) {
  pylora_mat b = matrix(a->rows, a->cols, 0);
  for (int64_t i = 0; i < a->rows; i++)
    for (int64_t j = 0; j < a->cols; j++) *el(&b, i, j) = fabsf(*el(a, i, j));
  return b;
}
static inline float *abs_floats(int64_t n, const float *x) {
  float *y = floats(n, 0);
  for (int64_t i = 0; i < n; i++) y[i] = fabsf(x[i]);
  return y;
}
static inline pylora_mat row_of(const pylora_mat *a, int64_t i) {
  return (pylora_mat){a->p + i * a->ld, 1, a->cols, a->ld, NULL, NULL};
}
static inline pylora_mat column(float *p, int64_t n) {
  return (pylora_mat){p, n, 1, 1, NULL, NULL};
}

/* Gaps still hold NaN? Then everything is given back. */
static inline void release(void) {
  while (blocks) {
    block *b = blocks;
    for (int64_t i = 0; i < b->n; i++) {
      const int64_t ld = llabs(b->mat.ld), at = i - b->offset;
      if (at < 0 || at % ld >= b->mat.cols)
        EXPECT(b->base ? isnan(b->base[i]) : b->base16[i] == GAP16, "gap of a matrix was written");
    }
    blocks = b->next;
    free(b->memory);
    free(b);
  }
}

static inline pylora_packed packed(const pylora_mat *W) {
  pylora_packed P;
  OK(pylora_pack(PYLORA_F32, W, bytes_of(pylora_pack_bytes(PYLORA_F32, W->rows, W->cols)), &P));
  return P;
}

/* ---- bounds: see tests/support/bounds.py for the theorems ---- */

enum { EXP = 8 }; /* roundings that an exp or log may be off by: 2 ulp are at most 4 u */
static const double U = 0x1p-24; /* unit roundoff of float */

static inline double gamma_n(double n) { return n * U / (1 - n * U); } /* Higham, lemma 3.1 */

/* |got - want| <= gamma_n magnitude, and one rounding for the reference's own result. */
static inline void expect_near(const char *what, const pylora_mat *got, const pylora_mat *want,
                               const pylora_mat *magnitude, double n) {
  for (int64_t i = 0; i < got->rows; i++)
    for (int64_t j = 0; j < got->cols; j++) {
      const double g = *el(got, i, j), w = *el(want, i, j);
      const double bound = gamma_n(n) * *el(magnitude, i, j) + U * fabs(w) + FLT_MIN;
      EXPECT(g == w || fabs(g - w) <= bound, "%s[%d,%d] %.9g, not %.9g: off %.3g, allowed %.3g",
             what, (int)i, (int)j, g, w, fabs(g - w), bound);
    }
}
static inline void expect_same(const char *what, const pylora_mat *a, const pylora_mat *b) {
  for (int64_t i = 0; i < a->rows; i++)
    EXPECT(a->cols == 0 || memcmp(el(a, i, 0), el(b, i, 0), (size_t)a->cols * sizeof(float)) == 0,
           "%s: row %d has other bits", what, (int)i);
}

/* a is b rounded, to the bit? */
static inline void expect_rounded(const char *what, const pylora_mat *a, const pylora_mat *b) {
  for (int64_t i = 0; i < b->rows; i++)
    for (int64_t j = 0; j < b->cols; j++) {
      const uint16_t got = a->b[i * a->ld + j], want = bf16(*el(b, i, j));
      EXPECT(got == want, "%s[%d,%d] is %g, not %g", what, (int)i, (int)j, (double)from_bf16(got),
             (double)from_bf16(want));
    }
}
/* A matrix of either type for an output, and whether it holds `want` (float32), rounded if need be. */
static inline pylora_mat either(int64_t rows, int64_t cols) {
  return below(2) ? matrix16(rows, cols) : matrix(rows, cols, 0);
}
static inline void expect_stored(const char *what, const pylora_mat *a, const pylora_mat *want) {
  if (a->b)
    expect_rounded(what, a, want);
  else
    expect_same(what, a, want);
}
/* Numbers of a random type: x is what an operation gets, and wide its values in float32. */
typedef struct input {
  pylora_mat x, wide;
} input;
static inline input input_of(int64_t rows, int64_t cols, float size) {
  input in = {matrix(rows, cols, size), {0}};
  in.wide = in.x;
  if (below(2)) in.x = rounded(&in.wide), in.wide = widened(&in.x);
  return in;
}

/* ---- every kernel table, one thread and several ---- */

static inline void each_setup(void (*test)(void)) {
  const char *name, *only = getenv("PYLORA_TEST_ISA");
  for (int t = 0; (name = pylora_isa_name(t)); t++) {
    if (only && strcmp(only, name) != 0) continue;
    for (int threads = 1; threads <= 3; threads += 2) {
      OK(pylora_use_isa(name));
      OK(pylora_set_num_threads(threads));
      snprintf(context, sizeof context, "%s, %d threads", name, threads);
      test();
      release();
    }
  }
}
static inline int finish(const char *name) {
  if (failures)
    printf("%s: %d FAILED\n", name, failures);
  else
    printf("%s: passed\n", name);
  return failures != 0;
}

#endif
