/* The kernel table by itself: products, transposed tiles and conversions against plain loops, for every
 * number of columns, in every mode, beside memory that must not be touched. */
#include "check.h"
#include "runtime/internal.h"

static const pylora_kernels *K;
static int chain; /* bfloat16 products are one chain; if not, test_amx.c knows their order */

static float wide(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
/* Same bits, or both NaN: which NaN comes out of several is open. */
static int same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

/* A bfloat16 whose products and their sums stay far from overflow and from subnormal numbers. */
static uint16_t ordinary(void) {
  return (uint16_t)((bits64() & 0x807f) | (uint64_t)(112 + below(24)) << 7);
}
static uint16_t anything(void) {
  return below(4) ? ordinary() : (uint16_t)PICK(0x7f80, 0xff80, 0x7fc0, 0, 0x8000, 0x7f7f, 0xff7f);
}

static uint16_t *halves(int64_t n, uint16_t (*draw)(void)) {
  uint16_t *p = bytes_of((size_t)n * 2);
  for (int64_t i = 0; i < n; i++) p[i] = draw();
  return p;
}

/* ---- products ---- */

typedef struct shape {
  int64_t m, n, kk, lda, ldb, ldc; /* kk: pairs for bfloat16 */
} shape;

/* c with m rows of n numbers; what lies between them is NaN, and checked by gaps_are_whole. */
static float *result(const shape *s, int64_t *size) {
  *size = s->m && s->n ? (s->m - 1) * s->ldc + s->n : 0;
  float *c = floats(*size, 1);
  for (int64_t i = 0; i < *size; i++)
    if (i % s->ldc >= s->n) c[i] = NAN;
  return c;
}
static void gaps_are_whole(const shape *s, const float *c, int64_t size) {
  for (int64_t i = 0; i < size; i++)
    if (i % s->ldc >= s->n) EXPECT(isnan(c[i]), "a gap of c was written at %d", (int)i);
}
static float *copy_floats(const float *x, int64_t n) {
  float *y = bytes_of((size_t)n * sizeof(float));
  memcpy(y, x, (size_t)n * sizeof(float));
  return y;
}

static void one_bf16(const shape *s, int mode, uint16_t (*draw)(void), int exact) {
  const int64_t a_size = s->m && s->kk ? (s->m - 1) * s->lda + 2 * s->kk : 0;
  const int64_t b_size = s->n && s->kk ? (s->kk - 1) * s->ldb + 2 * s->n : 0;
  const uint16_t *a = halves(a_size, draw), *b = halves(b_size, draw);
  int64_t size;
  float *c = result(s, &size), *before = copy_floats(c, size), *alone = copy_floats(c, size);
  K->gemm_bf16(s->m, (int)s->n, s->kk, a, s->lda, b, s->ldb, c, s->ldc, mode);
  gaps_are_whole(s, c, size);
  for (int64_t i = 0; i < s->m; i++) {
    K->gemm_bf16(1, (int)s->n, s->kk, a + i * s->lda, s->lda, b, s->ldb, alone + i * s->ldc, s->ldc,
                 mode);
    for (int64_t j = 0; j < s->n; j++) {
      const int64_t at = i * s->ldc + j;
      EXPECT(same(c[at], alone[at]), "row %d of %d, column %d of %d: other bits alone", (int)i,
             (int)s->m, (int)j, (int)s->n);
      float sum = mode == GEMM_CONTINUE ? before[at] : 0.0f;
      for (int64_t t = 0; t < s->kk; t++)
        for (int odd = 1; odd >= 0; odd--)
          sum = fmaf(wide(a[i * s->lda + 2 * t + odd]), wide(b[t * s->ldb + 2 * j + odd]), sum);
      if (mode == GEMM_ADD) sum = before[at] + sum;
      if (exact && chain)
        EXPECT(same(c[at], sum), "mode %d, [%d,%d] of %d x %d, %d pairs: %.9g, not %.9g", mode,
               (int)i, (int)j, (int)s->m, (int)s->n, (int)s->kk, (double)c[at], (double)sum);
    }
  }
}

/* Products of float32 are rounded where the table has no fused multiply-add: near, not equal. */
static void one_f32(const shape *s, int mode) {
  const int64_t a_size = s->m && s->kk ? (s->m - 1) * s->lda + s->kk : 0;
  const int64_t b_size = s->n && s->kk ? (s->kk - 1) * s->ldb + s->n : 0;
  const float *a = floats(a_size, 1), *b = floats(b_size, 1);
  float *turned = bytes_of((size_t)(s->m * s->kk) * sizeof(float)); /* a with its axes exchanged */
  for (int64_t i = 0; i < s->m; i++)
    for (int64_t t = 0; t < s->kk; t++) turned[t * s->m + i] = a[i * s->lda + t];
  int64_t size;
  float *c = result(s, &size), *before = copy_floats(c, size), *alone = copy_floats(c, size),
        *other = copy_floats(c, size);
  K->gemm(s->m, (int)s->n, s->kk, a, s->lda, 1, b, s->ldb, c, s->ldc, mode);
  K->gemm(s->m, (int)s->n, s->kk, turned, 1, s->m, b, s->ldb, other, s->ldc, mode);
  gaps_are_whole(s, c, size);
  for (int64_t i = 0; i < s->m; i++) {
    K->gemm(1, (int)s->n, s->kk, a + i * s->lda, s->lda, 1, b, s->ldb, alone + i * s->ldc, s->ldc,
            mode);
    for (int64_t j = 0; j < s->n; j++) {
      const int64_t at = i * s->ldc + j;
      EXPECT(same(c[at], alone[at]) && same(c[at], other[at]), "row %d of %d, column %d of %d",
             (int)i, (int)s->m, (int)j, (int)s->n);
      double sum = mode == GEMM_SET ? 0 : before[at], magnitude = fabs(sum);
      for (int64_t t = 0; t < s->kk; t++) {
        const double p = (double)a[i * s->lda + t] * b[t * s->ldb + j];
        sum += p, magnitude += fabs(p);
      }
      const double bound = gamma_n((double)(2 * s->kk + 1)) * magnitude + FLT_MIN;
      EXPECT(fabs(c[at] - sum) <= bound, "mode %d, [%d,%d]: %.9g, not %.9g", mode, (int)i, (int)j,
             (double)c[at], sum);
    }
  }
}

static void products(void) {
  for (int64_t n = 1; n <= PYLORA_PANEL; n++)
    for (int mode = GEMM_SET; mode <= GEMM_ADD; mode++) {
      shape s = {.m = below(31), .n = n, .kk = PICK(0, 1, 2, 3, 4, 7, 18, 33)};
      s.ldc = n + PICK(0, 1, 5);
      s.lda = 2 * s.kk + PICK(0, 1, 6), s.ldb = 2 * n + PICK(0, 1, 8);
      one_bf16(&s, mode, ordinary, 1);
      one_bf16(&s, mode, anything, 0);
      s.lda = s.kk + PICK(0, 1, 6), s.ldb = n + PICK(0, 1, 8);
      one_f32(&s, mode);
      release();
    }
  for (int64_t m = 0; m <= 40; m++) { /* every way to cut rows into tiles */
    shape s = {m, PYLORA_PANEL, 5, 11, 2 * PYLORA_PANEL, PYLORA_PANEL};
    one_bf16(&s, GEMM_CONTINUE, ordinary, 1);
    s.ldb = PYLORA_PANEL;
    one_f32(&s, GEMM_CONTINUE);
    release();
  }
}

/* Many rows and a panel: gemm's bits, whatever is asked for meanwhile, and nothing of that is written. */
static void many_rows(void) {
  for (int64_t m = 0; m <= 60; m++) {
    rows_job j = {.m = m, .kk = PICK(0, 1, 3, 17, 40), .mode = below(3)};
    j.lda = j.kk + PICK(0, 1, 6);
    j.a = floats(m * j.lda, 1), j.b = floats(j.kk * PYLORA_PANEL, 1);
    j.c = floats(m * PYLORA_PANEL, 1);
    float *other = copy_floats(j.c, m * PYLORA_PANEL), *near = floats(m * 48 + 4096, 1);
    const float *kept = copy_floats(near, m * 48 + 4096);
    if (below(2)) j.put = (pylora_put){(const char *)near, 48 * sizeof(float), 128};
    if (below(2)) j.next = (const char *)near, j.pieces = below(70), j.piece_bytes = 256;
    j.piece_step = 512;
    K->rows_f32(&j);
    K->gemm(m, PYLORA_PANEL, j.kk, j.a, j.lda, 1, j.b, PYLORA_PANEL, other, PYLORA_PANEL, j.mode);
    for (int64_t i = 0; i < m * PYLORA_PANEL; i++)
      EXPECT(same(j.c[i], other[i]), "mode %d, number %d of %d rows", j.mode, (int)i, (int)m);
    EXPECT(memcmp(near, kept, (size_t)(m * 48 + 4096) * sizeof(float)) == 0, "m = %d", (int)m);
    release();
  }
}

/* One term at a time, so that it is known what inf, NaN and zeros give. */
static void specials(void) {
  static const uint16_t x[] = {0x3f80, 0xc000, 0, 0x8000, 0x7f80, 0xff80, 0x7fc0, 0xffc1};
  enum { N = sizeof x / sizeof *x };
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++)
      for (int odd = 0; odd < 2; odd++) {
        uint16_t a[2] = {0, 0}, b[2] = {0, 0};
        a[odd] = x[i], b[odd] = x[j];
        float c = 3;
        K->gemm_bf16(1, 1, 1, a, 2, b, 2, &c, 1, GEMM_CONTINUE);
        const float want = 3 + wide(x[i]) * wide(x[j]);
        EXPECT(same(c, want), "%g x %g + 3 gave %g", (double)wide(x[i]), (double)wide(x[j]),
               (double)c);
      }
}

/* ---- transposed tiles ---- */

/* Words of any bits, NaN among them; nothing beside the result is written to. */
static void transposed_words(int64_t m, int64_t n) {
  const int64_t lds = n + PICK(0, 1, 9), ldd = m + PICK(0, 1, 9), room = n * ldd + 1;
  float *src = floats(m * lds + 1, 0), *dst = floats(room, 0), *want = floats(room, 0);
  memset(dst, 0, (size_t)room * sizeof *dst); /* floats may give -0.0 */
  memset(want, 0, (size_t)room * sizeof *want);
  for (int64_t i = 0; i < m * lds; i++) {
    const uint32_t word = (uint32_t)bits64();
    memcpy(src + i, &word, sizeof word);
  }
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) memcpy(want + j * ldd + i, src + i * lds + j, sizeof *src);
  K->transpose(m, n, src, lds, dst, ldd);
  EXPECT(memcmp(dst, want, (size_t)room * sizeof *dst) == 0, "%d x %d", (int)m, (int)n);
  release();
}

static void transposed(void) {
  for (int64_t m = 0; m <= 40; m++)
    for (int64_t n = 0; n <= 40; n++) transposed_words(m, n);
  uint16_t *pairs = halves(32 * 32, ordinary), *turned = halves(32 * 32, ordinary);
  for (int i = 0; i < 32 * 32; i++) pairs[i] = (uint16_t)i; /* each number once */
  K->transpose32_bf16(pairs, turned);
  for (int i = 0; i < 32; i++)
    for (int j = 0; j < 32; j++) {
      const uint16_t got = turned[i / 2 * 64 + 2 * j + i % 2],
                     want = pairs[j / 2 * 64 + 2 * i + j % 2];
      EXPECT(got == want, "output %d, input %d: %d, not %d", i, j, got, want);
    }
}

/* ---- conversions ---- */

/* The nearer of the two bfloat16 between which x lies, by their distances; float's range ends where a
 * next step would be 2^128. */
static uint16_t nearest(float x) {
  const uint32_t u = bits_of(x);
  const uint16_t low = (uint16_t)(u >> 16), high = (uint16_t)(low + 1);
  if (isinf(x) || (u & 0xffff) == 0) return low;
  const double above = (high & 0x7fff) == 0x7f80 ? copysign(0x1p128, x) : wide(high);
  const double to_low = fabs((double)x - wide(low)), to_high = fabs(above - (double)x);
  return to_low < to_high || (to_low == to_high && low % 2 == 0) ? low : high;
}

static void check_rounding(const float *x, const uint16_t *y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    if (x[i] != x[i])
      EXPECT(y[i] == (bits_of(x[i]) >> 16 | 0x40), "NaN %08x became %04x", bits_of(x[i]), y[i]);
    else
      EXPECT(y[i] == nearest(x[i]), "%.9g (%08x) became %04x, not %04x", (double)x[i],
             bits_of(x[i]), y[i], nearest(x[i]));
  }
}

static void conversions(void) {
  enum { ALL = 1 << 16, SAMPLES = 4096 };
  uint16_t *h = bytes_of(ALL * 2), *again = bytes_of(ALL * 2);
  float *f = bytes_of(ALL * sizeof(float)), *g = bytes_of(ALL * sizeof(float));
  for (int i = 0; i < ALL; i++) h[i] = (uint16_t)i;
  K->from_bf16(ALL, h, f);
  for (int i = 0; i < ALL; i++) EXPECT(bits_of(f[i]) == (uint32_t)i << 16, "%04x widened", i);
  K->to_bf16(ALL, f, again);
  check_rounding(f, again, ALL);

  static const uint32_t low[] = {1, 0x7fff, 0x8000, 0x8001, 0xffff}; /* below, on and above ties */
  for (size_t l = 0; l < sizeof low / sizeof *low; l++) {
    for (int i = 0; i < ALL; i++) g[i] = float_of(bits_of(f[i]) | low[l]);
    K->to_bf16(ALL, g, again);
    check_rounding(g, again, ALL);
  }
  for (int i = 0; i < SAMPLES; i++) g[i] = float_of((uint32_t)bits64());
  K->to_bf16(SAMPLES, g, again);
  check_rounding(g, again, SAMPLES);

  for (int n = 0; n < 70; n++) { /* tails end where the memory ends */
    const int at = (int)below(SAMPLES);
    float *x = bytes_of((size_t)n * sizeof(float)), *back = bytes_of((size_t)n * sizeof(float));
    uint16_t *y = bytes_of((size_t)n * 2);
    if (n) memcpy(x, g + at, (size_t)n * sizeof(float));
    K->to_bf16(n, x, y);
    check_rounding(x, y, n);
    K->from_bf16(n, y, back);
    for (int i = 0; i < n; i++) EXPECT(bits_of(back[i]) == (uint32_t)y[i] << 16, "%d of %d", i, n);
  }
}

static void all(void) {
  K = pylora_table();
  chain = strcmp(K->name, "amx") != 0;
  products();
  many_rows();
  specials();
  transposed();
  conversions();
}

int main(void) {
  const char *name;
  for (int t = 0; (name = pylora_isa_name(t)); t++) {
    OK(pylora_use_isa(name));
    snprintf(context, sizeof context, "%s", name);
    all();
    release();
  }
  return finish("kernels");
}
