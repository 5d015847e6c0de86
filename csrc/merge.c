/* merge.c - W' = round(W + s B A), and the exact way back.
 *
 * The delta is summed in double in a fixed order; a product of two floats is exact in double, so
 * fused or not, vectorized or not, every machine gets the same bits.  Subtracting it again from W' gives
 * back most elements of W; the others (the residue) are kept with their bits. */
#include <math.h>

#include "internal.h"

enum {
  COLS = 256, /* columns of delta at a time, on the stack */
  ROWS = 64,  /* rows per task where the residue is collected */
};

/* ---- one element: dtype <-> double ---- */

static double widen_bf16(uint16_t u) {
  uint32_t bits = (uint32_t)u << 16;
  float f;
  memcpy(&f, &bits, 4);
  return (double)f;
}

static uint16_t narrow_bf16(double t) {
  float f = (float)t;
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return (uint16_t)((u >> 16) | 0x40);
  uint32_t low = u & 0xffff, up = low > 0x8000;
  if (low ==
      0x8000) { /* a tie of bf16: was the double on it, or did float's rounding put it there? */
    double exact = (double)f;
    up = t == exact ? (u >> 16 & 1) : fabs(t) > fabs(exact);
  }
  return (uint16_t)((u >> 16) + up);
}

static double widen_f16(uint16_t u) {
  int e = u >> 10 & 31, f = u & 1023;
  double v = e == 31 ? (f ? (double)NAN : (double)INFINITY)
             : e     ? ldexp(1024 + f, e - 25)
                     : ldexp(f, -24);
  return u & 0x8000 ? -v : v;
}

static uint16_t narrow_f16(double t) {
  uint16_t sign = signbit(t) ? 0x8000 : 0;
  t = fabs(t);
  if (t != t) return sign | 0x7e00;
  if (t >= 65520) return sign | 0x7c00; /* rounds to infinity */
  int e;
  frexp(t, &e);                      /* t in [2^(e-1), 2^e) */
  if (t == 0 || e < -13) e = -13;    /* subnormals share the smallest exponent */
  double n = rint(ldexp(t, 11 - e)); /* in units of the last place, to nearest even: 0 .. 2048 */
  return (uint16_t)(sign | (uint16_t)(n + (e + 13) * 1024));
}

/* A number as bits, and back, rounded once to `dtype`. */
static double decode(int dtype, uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return dtype == PYLORA_F32    ? (double)f
         : dtype == PYLORA_BF16 ? widen_bf16((uint16_t)u)
                                : widen_f16((uint16_t)u);
}
static uint32_t encode(int dtype, double t) {
  if (dtype != PYLORA_F32) return dtype == PYLORA_BF16 ? narrow_bf16(t) : narrow_f16(t);
  float f = (float)t;
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

/* Element i of a row of `dtype`. Rows are floats to one place and bits to another, so that they are
 * read and written as bytes: a compiler may take a float and an integer to lie apart. */
static uint32_t bits_of(int dtype, const void *row, int64_t i) {
  uint32_t u;
  uint16_t narrow;
  if (dtype == PYLORA_F32) {
    memcpy(&u, (const char *)row + i * 4, 4);
    return u;
  }
  memcpy(&narrow, (const char *)row + i * 2, 2);
  return narrow;
}
static void set_bits(int dtype, void *row, int64_t i, uint32_t u) {
  uint16_t narrow = (uint16_t)u;
  if (dtype == PYLORA_F32)
    memcpy((char *)row + i * 4, &u, 4);
  else
    memcpy((char *)row + i * 2, &narrow, 2);
}
static double get(int dtype, const void *row, int64_t i) {
  return decode(dtype, bits_of(dtype, row, i));
}
static void put(int dtype, void *row, int64_t i, double t) {
  set_bits(dtype, row, i, encode(dtype, t));
}

/* ---- a row at a time ---- */

typedef struct job {
  int dtype;
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
  return encode(dtype, get(dtype, merged, j) - t) == w;
}

static void merge_row(void *ctx, int64_t i, int thread) {
  (void)thread;
  const job *q = ctx;
  const void *W = row_of(q->W, q->dtype, i, q->ldw);
  void *out = q->merged + i * q->ldm * (int64_t)width(q->dtype);
  double t[COLS];
  uint32_t before[COLS];
  int64_t lossy = 0;
  for (int64_t j = 0; j < q->k; j += COLS) {
    int64_t n = min64(COLS, q->k - j);
    delta(q->l, i, j, n, t);
    for (int64_t c = 0; c < n; c++) before[c] = bits_of(q->dtype, W, j + c); /* out may be W */
    if (q->dtype == PYLORA_F32) {
      const float *w = (const float *)W + j;
      float *o = (float *)out + j;
      for (int64_t c = 0; c < n; c++) o[c] = (float)((double)w[c] + t[c]);
      for (int64_t c = 0; c < n; c++) {
        float back = (float)((double)o[c] - t[c]);
        uint32_t u;
        memcpy(&u, &back, 4);
        lossy += u != before[c];
      }
    } else {
      for (int64_t c = 0; c < n; c++) {
        put(q->dtype, out, j + c, get(q->dtype, W, j + c) + t[c]);
        lossy += !restores(q->dtype, out, j + c, t[c], before[c]);
      }
    }
  }
  if (q->row_lossy) q->row_lossy[i] = lossy;
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
  job q = {.dtype = dtype,
           .d = d,
           .k = k,
           .ldw = ldw,
           .ldm = ldo,
           .W = W,
           .merged = out,
           .l = lora,
           .row_lossy = row_lossy};
  pylora_parallel(merge_row, &q, d, pylora_num_threads());
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
      uint32_t w = bits_of(q->dtype, W, j + c);
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
  job q = {.dtype = dtype,
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

static void unmerge_row(void *ctx, int64_t i, int thread) {
  (void)thread;
  const job *q = ctx;
  const void *merged = row_of(q->W, q->dtype, i, q->ldw);
  void *out = q->merged + i * q->ldm * (int64_t)width(q->dtype);
  double t[COLS];
  for (int64_t j = 0; j < q->k; j += COLS) {
    int64_t n = min64(COLS, q->k - j);
    delta(q->l, i, j, n, t);
    for (int64_t c = 0; c < n; c++) put(q->dtype, out, j + c, get(q->dtype, merged, j + c) - t[c]);
  }
}

int pylora_unmerge(int dtype, int64_t d, int64_t k, const void *merged, int64_t ldm,
                   const pylora_lora *lora, int64_t n, const int64_t *position,
                   const uint32_t *bits, void *out, int64_t ldo) {
  TRY(check(dtype, d, k, merged, out, lora, ldo));
  if (n < 0) return PYLORA_E_SHAPE;
  if (n && (!position || !bits)) return PYLORA_E_NULL;
  for (int64_t i = 0; i < n; i++)
    if (position[i] < 0 || k == 0 || position[i] / k >= d) return PYLORA_E_INDEX;
  job q = {.dtype = dtype,
           .d = d,
           .k = k,
           .ldw = ldm,
           .ldm = ldo,
           .W = merged,
           .merged = out,
           .l = lora};
  pylora_parallel(unmerge_row, &q, d, pylora_num_threads());
  for (int64_t i = 0; i < n; i++) {
    char *row = (char *)out + position[i] / k * ldo * (int64_t)width(dtype);
    set_bits(dtype, row, position[i] % k, bits[i]);
  }
  return PYLORA_OK;
}
