/* The kernels for Intel's AMX on tiles emulated in software (amx_emulation.h): no instruction that would
 * fault, no access outside, and for every size the bits that the definition of TDPBF16PS gives, and with
 * quantized weights those of the kernel without tiles.
 * Where this machine has AMX, the same checks run on the processor. */
#include "amx_emulation.h"
#if defined(PYLORA_AMX_EMULATED) /* in the core, too: `make amx` */
#define WITHOUT_HARDWARE 1
#else
#define PYLORA_AMX_EMULATED 1
#endif
#define SET amx_here /* beside the table in the core, if this build has it */
#include "../../csrc/cpu/kernels_amx.c"
#include "check.h"

static const pylora_kernels *K;
static const pylora_kernels *plain; /* the same sums of bytes without tiles */

static int same(float a, float b) { return memcmp(&a, &b, 4) == 0 || (a != a && b != b); }

/* The definition again, for one element and from the manual's text: `pairs` terms a[2t], a[2t + 1]. */
static float by_the_book(int64_t pairs, const uint16_t *a, const uint16_t *b, int64_t ldb, float c,
                         int mode) {
  float sum = mode == GEMM_SET ? 0 : c;
  for (int64_t block = 0; block < pairs; block += 16) {
    float temp[2] = {0, 0};
    for (int64_t t = block; t < block + 16; t++) /* filled up with zeros, which turn -0 into 0 */
      for (int e = 0; e < 2; e++)
        temp[e] = amx_fma(t < pairs ? bf16_widen(a[2 * t + e]) : 0,
                          t < pairs ? bf16_widen(b[t * ldb + e]) : 0, temp[e]);
    sum = amx_add(sum, amx_add(temp[0], temp[1]));
  }
  return sum;
}

static uint16_t ordinary(void) {
  return (uint16_t)((bits64() & 0x807f) | (uint64_t)(112 + below(24)) << 7);
}
/* Products and sums around the smallest normal number, and inputs below it. */
static uint16_t tiny(void) {
  return (uint16_t)((bits64() & 0x807f) | (uint64_t)(below(8) ? 57 + below(14) : 0) << 7);
}
static uint16_t wild(void) {
  return below(6) ? ordinary()
                  : (uint16_t)PICK(0x7f80, 0xff80, 0x7fc0, 0, 0x8000, 0x7f7f, 0xff7f, 1);
}

static void once(int64_t m, int64_t n, int64_t pairs, int mode, uint16_t (*draw)(void)) {
  const int64_t lda = 2 * pairs + PICK(0, 1, 2, 37), ldb = 2 * n + PICK(0, 1, 2, 64),
                ldc = n + PICK(0, 1, 32);
  /* Allocated to the byte; c's gaps are NaN. */
  const int64_t a_size = m && pairs ? (m - 1) * lda + 2 * pairs : 0,
                b_size = pairs ? (pairs - 1) * ldb + 2 * n : 0, size = m ? (m - 1) * ldc + n : 0;
  uint16_t *a = bytes_of((size_t)a_size * 2), *b = bytes_of((size_t)b_size * 2);
  float *c = floats(size, 1), *before = bytes_of((size_t)size * sizeof(float)),
        *alone = bytes_of((size_t)size * sizeof(float));
  for (int64_t i = 0; i < a_size; i++) a[i] = draw();
  for (int64_t i = 0; i < b_size; i++) b[i] = draw();
  for (int64_t i = 0; i < size; i++) {
    if (draw != ordinary) c[i] = amx_flush(bf16_widen(draw()));
    if (i % ldc >= n) c[i] = NAN;
  }
  if (size) memcpy(before, c, (size_t)size * sizeof(float));
  if (size) memcpy(alone, c, (size_t)size * sizeof(float));
  snprintf(context, sizeof context, "%s, %d x %d, %d pairs, mode %d", K->name, (int)m, (int)n,
           (int)pairs, mode);
  K->gemm_bf16(m, (int)n, pairs, a, lda, b, ldb, c, ldc, mode);
  EXPECT(!amx_configured, "tiles were not released");
  for (int64_t i = 0; i < m; i++) {
    K->gemm_bf16(1, (int)n, pairs, a + i * lda, lda, b, ldb, alone + i * ldc, ldc, mode);
    for (int64_t j = 0; j < n; j++) {
      const int64_t at = i * ldc + j;
      const float want = by_the_book(pairs, a + i * lda, b + 2 * j, ldb, before[at], mode);
      EXPECT(same(c[at], want), "[%d,%d] %.9g, not %.9g", (int)i, (int)j, (double)c[at],
             (double)want);
      EXPECT(same(c[at], alone[at]), "[%d,%d] %.9g, alone %.9g", (int)i, (int)j, (double)c[at],
             (double)alone[at]);
    }
  }
  for (int64_t i = 0; i < size; i++) EXPECT(i % ldc < n || c[i] != c[i], "a gap of c was written");
  release();
}

/* Every number of rows and of outputs, every remainder of pairs, and the places where pieces end. */
static void sizes(void) {
  for (int64_t m = 0; m <= 70; m++)
    once(m, PICK(1, 7, 16, 17, 31, 32), PICK(1, 5, 16, 23), (int)(m % 3), ordinary);
  for (int64_t n = 1; n <= 32; n++)
    for (int mode = GEMM_SET; mode <= GEMM_ADD; mode++)
      once(PICK(1, 3, 16, 17, 32, 33, 49), n, PICK(1, 15, 16, 17, 33), mode, ordinary);
  for (int64_t pairs = 0; pairs <= 66; pairs++)
    once(PICK(1, 5, 17), PICK(1, 16, 20, 32), pairs, (int)(pairs % 3), ordinary);
  static const int64_t longer[] = {100, 256, 272, 287, 288, 289, 304,
                                   305, 511, 512, 575, 577, 600, 865};
  for (size_t i = 0; i < sizeof longer / sizeof *longer; i++)
    for (int mode = GEMM_SET; mode <= GEMM_ADD; mode++)
      once(PICK(1, 19, 35, 64, 97), PICK(1, 18, 32), longer[i], mode, ordinary);
}

static void numbers(void) {
  for (int i = 0; i < 60; i++) {
    once(PICK(1, 17, 34), PICK(3, 32), PICK(1, 4, 16, 40), i % 3, tiny);
    once(PICK(1, 17, 34), PICK(3, 32), PICK(1, 4, 16, 40), i % 3, wild);
  }
}

static int in_bytes = Q_BYTES; /* rows of x: as the tables' quantize_row makes them */

/* Quantized weights: rows and a panel of any codes, those at their limits among them. */
static void quantized(int dtype, int64_t m, int64_t groups, int mode) {
  const size_t row = sizeof(pylora_qrow), stride = (size_t)groups * row + PICK(0, 4, 64) * (m > 1);
  const int kind = pylora_q_kind(dtype);
  const int most = kind == dtype ? PYLORA_QROW_MAX : PYLORA_QROW_MAX8;
  const size_t panel_bytes = (size_t)(groups * q_bytes(kind));
  const int64_t ldc = 32 + PICK(0, 1, 32), size = m ? (m - 1) * ldc + 32 : 0;
  char *rows = bytes_of(m ? (size_t)(m - 1) * stride + (size_t)groups * row : 0);
  uint16_t *panel = bytes_of(panel_bytes);
  float *c = floats(size, 1), *want = bytes_of((size_t)size * sizeof(float));
  snprintf(context, sizeof context, "%s, dtype %d, %d rows, %d groups, mode %d", K->name, dtype,
           (int)m, (int)groups, mode);
  for (int64_t i = 0; i < m; i++)
    for (int64_t g = 0; g < groups; g++) {
      pylora_qrow q = {.scale = (float)(1 + below(100)) * 1e-4f};
      int32_t sum = 0;
      const int limits = below(4) == 0;
      int16_t code[PYLORA_QGROUP];
      for (int t = 0; t < PYLORA_QGROUP; t++) {
        code[t] = limits ? (int16_t)PICK(most, -most, 127, PYLORA_A8 & dtype ? 0 : 128, -126,
                                         PYLORA_A8 & dtype ? 1 : -129)
                         : (int16_t)(below(2 * most + 1) - most);
        sum += code[t];
      }
      if (in_bytes)
        q_split(kind, code, q.low, q.high);
      else
        memcpy(q.code, code, sizeof code);
      if (kind == PYLORA_Q4_1)
        q.sum = (float)sum;
      else
        q.start = kind == PYLORA_Q4_0 ? -8 * sum : in_bytes ? -128 * sum : 0;
      if (below(40) == 0) q = (pylora_qrow){.scale = NAN};
      memcpy(rows + (size_t)i * stride + (size_t)g * row, &q, row);
    }
  const size_t codes = (size_t)q_arrays(kind) * 128, group = (size_t)q_bytes(kind);
  for (size_t i = 0; i < panel_bytes; i += 2) { /* scales are finite, as those of a file are */
    const uint16_t u = (uint16_t)bits64();
    panel[i / 2] =
        i % group < codes ? (below(8) ? u : (uint16_t)PICK(0x8080, 0x7f7f, 0xffff, 0)) : u & 0xbfff;
  }
  for (int64_t i = 0; i < size; i++)
    if (i % ldc >= 32) c[i] = NAN;
  if (size) memcpy(want, c, (size_t)size * sizeof(float));
  plain->gemm_q(dtype, m, groups, rows, stride, panel, want, ldc, mode);
  K->gemm_q(dtype, m, groups, rows, stride, panel, c, ldc, mode);
  EXPECT(!amx_configured, "tiles were not released");
  for (int64_t i = 0; i < size; i++)
    EXPECT(same(c[i], want[i]), "[%d] %.9g, without tiles %.9g", (int)i, (double)c[i],
           (double)want[i]);
  release();
}

/* The same of K-quants and their kin. */
static void kin(int dtype, int64_t m, int64_t supers, int mode) {
  const int type = dtype & ~PYLORA_A8, most = type == dtype ? PYLORA_KROW_MAX : PYLORA_KROW_MAX8;
  const int64_t groups = supers * k_groups(type);
  const size_t stride = (size_t)groups * sizeof(pylora_krow) + PICK(0, 4, 64) * (m > 1);
  const size_t panel_bytes = (size_t)(supers * k_super_bytes(type));
  const int64_t ldc = 32 + PICK(0, 1, 32), size = m ? (m - 1) * ldc + 32 : 0;
  char *rows = bytes_of((size_t)m * stride);
  uint8_t *panel = bytes_of(panel_bytes);
  float *c = floats(size, 1), *want = bytes_of((size_t)size * sizeof(float)),
        *x = floats(groups * 32, 1);
  snprintf(context, sizeof context, "%s, dtype %d, %d rows, %d supers, mode %d", K->name, dtype,
           (int)m, (int)supers, mode);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t t = 0; t < groups * 32; t++) x[t] = below(9) ? uniform() : (float)PICK(1, -1, 0);
    if (below(20) == 0) x[below(groups * 32)] = NAN;
    plain->quantize_bytes(most, groups, x, rows + (size_t)i * stride);
  }
  for (size_t i = 0; i < panel_bytes; i++) panel[i] = (uint8_t)bits64();
  for (int64_t s = 0; s < supers; s++) /* float16 scales are finite, and no exponent is 255 */
    for (int i = 0; i < (type == PYLORA_MXFP4 ? 32 : k_has_minimum(type) ? 128 : 64); i++)
      panel[s * k_super_bytes(type) + i] &= type == PYLORA_MXFP4 ? 0x7f : i % 2 ? 0xbf : 0xff;
  if (size) memcpy(want, c, (size_t)size * sizeof(float));
  plain->gemm_k(dtype, m, supers, rows, stride, panel, want, ldc, mode);
  K->gemm_k(dtype, m, supers, rows, stride, panel, c, ldc, mode);
  EXPECT(!amx_configured, "tiles were not released");
  for (int64_t i = 0; i < size; i++)
    EXPECT(same(c[i], want[i]), "[%d] %.9g, without tiles %.9g", (int)i, (double)c[i],
           (double)want[i]);
  release();
}

static void kin_sizes(void) {
  for (int type = PYLORA_Q5_0; type <= PYLORA_MXFP4; type++)
    for (int a8 = 0; a8 <= PYLORA_A8; a8 += PYLORA_A8) {
      const int64_t rows[] = {1, 7, 8, 9, 15, 16, 17, 24, 33, 64, 73, 90};
      for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        kin(type + a8, rows[i], 1 + below(k_groups(type) == 8 ? 2 : 12), (int)(i % 3));
    }
}

static void quantized_sizes(void) {
  static const int dtypes[] = {PYLORA_Q8_0,    PYLORA_Q4_0,    PYLORA_Q4_1,
                               PYLORA_Q8_0_A8, PYLORA_Q4_0_A8, PYLORA_Q4_1_A8};
  for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
    for (int64_t m = 0; m <= 50; m++) quantized(dtypes[d], m, 1 + below(6), (int)(m % 3));
    for (int64_t groups = 1; groups <= 33; groups++)
      for (int mode = GEMM_SET; mode <= GEMM_ADD; mode++)
        quantized(dtypes[d], PICK(8, 16, 23, 24), groups, mode);
  }
}

/* The check before the table is offered: right tiles pass, each kind of wrong ones does not. */
static void self_test(void) {
  snprintf(context, sizeof context, "self-test");
  for (amx_fault = 1; amx_fault <= 3; amx_fault++)
    EXPECT(!amx_right(), "wrong tiles of kind %d were taken for right", amx_fault);
  for (; amx_fault <= 5; amx_fault++)
    EXPECT(!amxq_right(), "wrong tiles of kind %d were taken for right", amx_fault);
  amx_fault = 0;
  EXPECT(amxq_right(), "right tiles of bytes were taken for wrong");
  EXPECT(amxk_right(), "right tiles of K-quants were taken for wrong");
  EXPECT(amx_right(), "right tiles were taken for wrong");
  EXPECT(pylora_kernels_amx_here.supported(), "the table is not offered");
}

int main(int argc, char **argv) {
  if (argc > 1) state += strtoull(argv[1], NULL, 10); /* other numbers */
  self_test();
  K = &pylora_kernels_amx_here;
#if defined(VEC_AVX512)
  plain = &pylora_kernels_avx512vnni;
#else
  plain = &pylora_kernels_portable;
#endif
  sizes();
  numbers();
  quantized_sizes();
  kin_sizes();
#if defined(PYLORA_AMX) && !defined(WITHOUT_HARDWARE)
  if (pylora_use_isa("amx") == PYLORA_OK) {
    K = pylora_table();
    plain = &pylora_kernels_avx512vnni;
    in_bytes = 1;
    sizes();
    numbers();
    quantized_sizes();
    kin_sizes();
    printf("AMX itself was checked, too\n");
  }
#endif
  return finish("test_amx");
}
