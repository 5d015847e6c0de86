/* format_q.c - quantized weights, ggml's Q8_0, Q4_0 and Q4_1: groups of 32 inputs share a float16 scale.
 *
 * Forward multiplies integers: see cpu/gemm_q.inc.  Backward multiplies dy with the weight's exact values
 * in float32, a chunk of which is dequantized at a time. */
#include <math.h>

#include "formats/format.h"
#include "formats/format_q.h"
#include "formats/half.h"

enum {
  PANEL = PYLORA_PANEL,
  GROUP = PYLORA_QGROUP,
  PIECE = PYLORA_CHUNK / GROUP, /* groups whose sums are added in one chain; L1 holds a panel's */
};

typedef struct block { /* of one output: ggml's, taken apart */
  uint16_t scale, minimum;
  int8_t code[GROUP];
} block;

static size_t group_bytes(int kind) {
  return kind == PYLORA_Q8_0   ? PYLORA_Q8_BYTES
         : kind == PYLORA_Q4_0 ? PYLORA_Q4_0_BYTES
                               : PYLORA_Q4_1_BYTES;
}

/* ---- float16 ---- */

static uint16_t to_half(float x) { /* to nearest even */
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
  if (size < 0x38800000)                                    /* subnormal: units of 2^-24 */
    return (uint16_t)(sign | (uint32_t)rintf(fabsf(x) * 0x1p24f));
  return (uint16_t)(sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112u << 10)));
}

/* ---- ggml's reference quantization: every step in float32, as there ---- */

/* A code, whatever x is: NaN gives 0. */
static int8_t code_of(float x, float low, float high) {
  return (int8_t)(x > low ? (x < high ? x : high) : x <= low ? low : 0);
}

static block quantize(int dtype, const float *x) {
  block b = {0};
  float low = x[0], high = x[0], top = 0, size = 0;
  int nan = 0;
  for (int t = 0; t < GROUP; t++) {
    const float a = fabsf(x[t]);
    if (a > size) size = a, top = x[t]; /* the first of the largest */
    if (x[t] < low) low = x[t];
    if (x[t] > high) high = x[t];
    nan |= x[t] != x[t];
  }
  if (nan) { /* no number of the group can be told any more */
    b.scale = b.minimum = 0x7e00;
    return b;
  }
  const float d = dtype == PYLORA_Q8_0   ? size / 127
                  : dtype == PYLORA_Q4_0 ? top / -8
                                         : (high - low) / 15;
  const float by = d != 0 ? 1 / d : 0;
  b.scale = to_half(d);
  if (dtype == PYLORA_Q4_1) b.minimum = to_half(low);
  for (int t = 0; t < GROUP; t++) {
    if (dtype == PYLORA_Q8_0) { /* roundf: halves away from zero */
      const float v = x[t] * by, whole = truncf(v);
      b.code[t] = code_of(fabsf(v - whole) >= 0.5f ? whole + copysignf(1, v) : whole, -127, 127);
    } else {
      const float v = dtype == PYLORA_Q4_0 ? x[t] * by + 8.5f : (x[t] - low) * by + 0.5f;
      b.code[t] = code_of(v, 0, 15);
    }
  }
  return b;
}

/* ---- a panel's group and one output's block ---- */

static void put(int dtype, char *group, int i, const block *b) {
  uint16_t *codes = (uint16_t *)(void *)group;
  const int arrays = dtype == PYLORA_Q8_0 ? 8 : 4;
  for (int a = 0; a < arrays; a++)
    for (int e = 0; e < 2; e++) {
      const int8_t *q = b->code + a * (GROUP / arrays) + e;
      codes[(a * PANEL + i) * 2 + e] = dtype == PYLORA_Q8_0
                                           ? (uint16_t)((uint8_t)q[0] | (uint8_t)q[2] << 8)
                                           : (uint16_t)(q[0] | q[2] << 4 | q[4] << 8 | q[6] << 12);
    }
  uint16_t *scales = codes + arrays * PANEL * 2;
  scales[i] = b->scale;
  if (dtype == PYLORA_Q4_1) scales[PANEL + i] = b->minimum;
}

static block get(int dtype, const char *group, int i) {
  const uint16_t *codes = (const uint16_t *)(const void *)group;
  const int arrays = dtype == PYLORA_Q8_0 ? 8 : 4, pairs = 16 / arrays;
  block b;
  for (int a = 0; a < arrays; a++)
    for (int e = 0; e < 2; e++) {
      const unsigned u = codes[(a * PANEL + i) * 2 + e];
      for (int n = 0; n < pairs; n++)
        b.code[(a * pairs + n) * 2 + e] =
            dtype == PYLORA_Q8_0 ? (int8_t)(uint8_t)(u >> 8 * n) : (int8_t)(u >> 4 * n & 15);
    }
  b.scale = codes[arrays * PANEL * 2 + i];
  b.minimum = dtype == PYLORA_Q4_1 ? codes[arrays * PANEL * 2 + PANEL + i] : 0;
  return b;
}

/* A block as it lies in a file: little-endian, whatever this machine is. */
static block parse(int dtype, const uint8_t *p) {
  block b = {0};
  b.scale = (uint16_t)(p[0] | p[1] << 8);
  p += 2;
  if (dtype == PYLORA_Q8_0) {
    memcpy(b.code, p, GROUP);
    return b;
  }
  if (dtype == PYLORA_Q4_1) {
    b.minimum = (uint16_t)(p[0] | p[1] << 8);
    p += 2;
  }
  for (int t = 0; t < GROUP / 2; t++) {
    b.code[t] = p[t] & 15;
    b.code[t + GROUP / 2] = p[t] >> 4;
  }
  return b;
}

/* ---- the format ---- */

static void pack(int dtype, const pylora_mat *W, int64_t first, char *panel) {
  const int64_t groups = W->cols / GROUP, n = min64(PANEL, W->rows - first);
  const size_t bytes = group_bytes(dtype);
  if (n < PANEL) memset(panel, 0, (size_t)groups * bytes);
  for (int64_t i = 0; i < n; i++)
    for (int64_t g = 0; g < groups; g++) {
      const block b = quantize(dtype, W->p + (first + i) * W->ld + g * GROUP);
      put(dtype, panel + (size_t)g * bytes, (int)i, &b);
    }
}

static void pack_blocks(int dtype, const void *rows, int64_t row_bytes, int64_t d, int64_t k,
                        int64_t first, char *panel) {
  const int64_t groups = k / GROUP, n = min64(PANEL, d - first);
  const size_t bytes = group_bytes(dtype);
  const int64_t size = (int64_t)(bytes / PANEL); /* a block takes as many bytes as in a file */
  if (n < PANEL) memset(panel, 0, (size_t)groups * bytes);
  for (int64_t i = 0; i < n; i++)
    for (int64_t g = 0; g < groups; g++) {
      const block b = parse(dtype, (const uint8_t *)rows + (first + i) * row_bytes + g * size);
      put(dtype, panel + (size_t)g * bytes, (int)i, &b);
    }
}

static void unpack(int dtype, const char *panel, int64_t k, int row, float *out) {
  for (int64_t g = 0; g < k / GROUP; g++) {
    const block b = get(dtype, panel + (size_t)g * group_bytes(dtype), row);
    const float scale = from_half(b.scale), minimum = from_half(b.minimum);
    for (int t = 0; t < GROUP; t++) {
      const float v = scale * (float)(b.code[t] - (dtype == PYLORA_Q4_0 ? 8 : 0));
      *out++ = dtype == PYLORA_Q4_1 ? v + minimum : v;
    }
  }
}

static size_t row_bytes(int64_t k) {
  return pylora_row_stride((size_t)(k / GROUP) * sizeof(pylora_qrow));
}

static void prepare(int dtype, const pylora_kernels *K, const pylora_mat *x, int64_t first,
                    int64_t n, char *out) {
  enum { COLS = 16 * GROUP };
  float wide[COLS];
  const size_t stride = row_bytes(x->cols);
  for (int64_t i = 0; i < n; i++) {
    pylora_qrow *to = (pylora_qrow *)(void *)(out + (size_t)i * stride);
    for (int64_t t = 0; t < x->cols; t += COLS) {
      const int64_t cols = min64(COLS, x->cols - t);
      const float *from = pylora_row(K, x, first + i, t, cols, wide);
      K->quantize_row(dtype, cols / GROUP, from, to + t / GROUP);
    }
  }
}

static void product(int dtype, const pylora_kernels *K, int64_t n, int64_t k, const char *rows,
                    size_t stride, const char *panel, float *tile) {
  const int64_t groups = k / GROUP;
  int64_t g = 0;
  do {
    K->gemm_q(dtype, n, min64(PIECE, groups - g), rows + (size_t)g * sizeof(pylora_qrow), stride,
              panel + (size_t)g * group_bytes(pylora_q_kind(dtype)), tile, PANEL,
              g ? GEMM_ADD : GEMM_SET);
    g += PIECE;
  } while (g < groups);
}

static void transpose(int dtype, const pylora_kernels *K, const char *panels, int64_t k, int64_t d0,
                      int64_t rows, int64_t j, float *chunk) {
  const size_t bytes = group_bytes(dtype), panel = (size_t)(k / GROUP) * bytes;
  const char *group = panels + (size_t)(d0 / PANEL) * panel + (size_t)(j / GROUP) * bytes;
  float values[GROUP * PANEL];
  for (int64_t q = 0; q < rows; q += PANEL, group += panel) {
    K->dequantize(dtype, group, values);
    K->transpose(PANEL, PANEL, values, PANEL, chunk + q * PANEL, PANEL);
  }
}

/* The same functions for each kind of blocks, as pylora_format wants them, ... */
#define KIND(name, type)                                                                           \
  static size_t panel_bytes_##name(int64_t k) { return (size_t)(k / GROUP) * group_bytes(type); }  \
  static void pack_##name(const pylora_kernels *K, const pylora_mat *W, int64_t first,             \
                          void *panel) {                                                           \
    (void)K;                                                                                       \
    pack(type, W, first, panel);                                                                   \
  }                                                                                                \
  static void pack_blocks_##name(const void *rows, int64_t row_bytes, int64_t d, int64_t k,        \
                                 int64_t first, void *panel) {                                     \
    pack_blocks(type, rows, row_bytes, d, k, first, panel);                                        \
  }                                                                                                \
  static size_t blocks_bytes_##name(int64_t k) {                                                   \
    return (size_t)(k / GROUP) * (group_bytes(type) / PANEL);                                      \
  }                                                                                                \
  static void unpack_##name(const void *panel, int64_t k, int row, float *out) {                   \
    unpack(type, panel, k, row, out);                                                              \
  }                                                                                                \
  static void transpose_##name(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0, \
                               int64_t rows, int64_t j, void *chunk) {                             \
    transpose(type, K, panels, k, d0, rows, j, chunk);                                             \
  }                                                                                                \
  FORMAT(name, name, type)                                                                         \
  FORMAT(name##_a8, name, type##_A8)

/* ... and for 16 and for 8 bits of x. */
#define FORMAT(name, kind, type)                                                              \
  static void prepare_##name(const pylora_kernels *K, const pylora_mat *x, int64_t first,     \
                             int64_t n, void *out) {                                          \
    prepare(type, K, x, first, n, out);                                                       \
  }                                                                                           \
  static void product_##name(const pylora_kernels *K, int64_t n, int64_t k, const void *rows, \
                             size_t stride, const void *panel, float *tile) {                 \
    product(type, K, n, k, rows, stride, panel, tile);                                        \
  }                                                                                           \
  const pylora_format pylora_format_##name = {                                                \
      .dtype = type,                                                                          \
      .multiple = GROUP,                                                                      \
      .panel_bytes = panel_bytes_##kind,                                                      \
      .pack = pack_##kind,                                                                    \
      .pack_blocks = pack_blocks_##kind,                                                      \
      .blocks_bytes = blocks_bytes_##kind,                                                    \
      .unpack = unpack_##kind,                                                                \
      .row_bytes = row_bytes,                                                                 \
      .prepare = prepare_##name,                                                              \
      .product = product_##name,                                                              \
      .back = PYLORA_F32,                                                                     \
      .transpose = transpose_##kind,                                                          \
  };

KIND(q8_0, PYLORA_Q8_0)
KIND(q4_0, PYLORA_Q4_0)
KIND(q4_1, PYLORA_Q4_1)
