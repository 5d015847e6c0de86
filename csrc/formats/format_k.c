/* format_k.c - weights in the blocks of ggml's K-quants and their kin, packed from a file and multiplied as they are.
 *
 * Codes, scales and the numbers that scales are made of keep their bits; only their places change (format_k.h).
 * Forward multiplies integers (cpu/gemm_k.inc), backward dy with the weight's exact values in float32.  Numbers are
 * not quantized to these types here: who quantizes for them looks at more than a block. */
#include "formats/format.h"
#include "formats/format_k.h"
#include "formats/half.h"

enum {
  PANEL = PYLORA_PANEL,
  GROUP = PYLORA_KGROUP,
  QUADS = PYLORA_KQUADS,
  PIECE = PYLORA_CHUNK / GROUP, /* groups whose sums are added in one chain */
  WORDS = 4,                    /* of scales, at most */
};

static const int8_t iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};
static const int8_t fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* ---- a block of a file: little-endian, whatever this machine is ---- */

static uint32_t word(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint16_t half(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

/* Bit i of four -> the lowest bit of byte i. */
static uint32_t spread(uint32_t four) { return (four & 15) * 0x00204081u & 0x01010101u; }

/* The codes of group g of a block as quads: bytes of four inputs each. */
static void codes_of(int type, const uint8_t *b, int g, uint32_t quad[QUADS]) {
  const uint8_t *low = b, *high = b;
  uint32_t bits = 0;
  switch (type) {
  case PYLORA_Q5_0:
  case PYLORA_Q5_1:
    bits = word(b + (type == PYLORA_Q5_0 ? 2 : 4));
    low = b + (type == PYLORA_Q5_0 ? 6 : 8);
    break;
  case PYLORA_IQ4_NL:
    low = b + 2;
    break;
  case PYLORA_IQ4_XS:
    low = b + 8 + 16 * g;
    break;
  case PYLORA_MXFP4:
    low = b + 1;
    break;
  case PYLORA_Q2_K:
    low = b + 16 + 32 * (g / 4);
    break;
  case PYLORA_Q3_K:
    low = b + 32 + 32 * (g / 4);
    break;
  case PYLORA_Q4_K:
    low = b + 16 + 32 * (g / 2);
    break;
  case PYLORA_Q5_K:
    high = b + 16, low = b + 48 + 32 * (g / 2);
    break;
  default: /* Q6_K */
    low = b + 64 * (g / 4) + 32 * (g % 2), high = b + 128 + 32 * (g / 4);
  }
  for (int q = 0; q < QUADS; q++) {
    uint32_t w;
    if (k_low_bits(type) == 2) { /* 32 bytes hold four groups, 2 bits each */
      w = word(low + 4 * q) >> 2 * (g % 4) & 0x03030303u;
      if (type == PYLORA_Q3_K) w |= (word(high + 4 * q) >> g & 0x01010101u) << 2;
    } else if (type == PYLORA_Q4_K || type == PYLORA_Q5_K) { /* two groups, 4 bits each */
      w = word(low + 4 * q) >> 4 * (g % 2) & 0x0f0f0f0fu;
      if (type == PYLORA_Q5_K) w |= (word(high + 4 * q) >> g & 0x01010101u) << 4;
    } else if (type == PYLORA_Q6_K) {
      w = word(low + 4 * q) >> (g % 4 < 2 ? 0 : 4) & 0x0f0f0f0fu;
      w |= (word(high + 4 * q) >> 2 * (g % 4) & 0x03030303u) << 4;
    } else { /* two halves of a group */
      w = word(low + 4 * (q % 4)) >> (q < 4 ? 0 : 4) & 0x0f0f0f0fu;
      w |= spread(bits >> 4 * q) << 4;
    }
    quad[q] = w;
  }
}

/* Scales: float16 numbers (MXFP4: an exponent), and words of what they are multiplied with. */
typedef struct head {
  uint16_t d, m;
  uint32_t words[WORDS];
} head;

static int words_of(int type) {
  return type == PYLORA_Q2_K || type == PYLORA_Q6_K                          ? 4
         : type == PYLORA_Q3_K || type == PYLORA_Q4_K || type == PYLORA_Q5_K ? 3
         : type == PYLORA_IQ4_XS                                             ? 1
                                                                             : 0;
}

static head head_of(int type, const uint8_t *b) {
  head h = {0};
  const uint8_t *d = b, *m = b, *words = b;
  switch (type) {
  case PYLORA_MXFP4:
    h.d = b[0];
    return h;
  case PYLORA_Q5_1:
    m = b + 2;
    break;
  case PYLORA_Q4_K:
  case PYLORA_Q5_K:
    m = b + 2, words = b + 4;
    break;
  case PYLORA_Q2_K:
    d = b + 80, m = b + 82;
    break;
  case PYLORA_Q3_K:
    d = b + 108, words = b + 96;
    break;
  case PYLORA_Q6_K:
    d = b + 208, words = b + 192;
    break;
  case PYLORA_IQ4_XS: /* the second number: upper bits of the scales */
    m = b + 2, words = b + 4;
    break;
  default:
    break;
  }
  h.d = half(d), h.m = half(m);
  for (int i = 0; i < words_of(type); i++) h.words[i] = word(words + 4 * i);
  return h;
}

/* ---- a super of a panel, and output i of it ---- */

static int has_second(int type) { return k_has_minimum(type) || type == PYLORA_IQ4_XS; }

static void put_head(int type, char *super, int i, const head *h) {
  if (type == PYLORA_MXFP4) {
    super[i] = (char)h->d;
    return;
  }
  memcpy(super + 2 * i, &h->d, 2);
  if (has_second(type)) memcpy(super + 64 + 2 * i, &h->m, 2);
  char *words = super + (has_second(type) ? 128 : 64);
  for (int n = 0; n < words_of(type); n++) memcpy(words + 128 * n + 4 * i, &h->words[n], 4);
}

static head get_head(int type, const char *super, int i) {
  head h = {0};
  if (type == PYLORA_MXFP4) {
    h.d = (uint8_t)super[i];
    return h;
  }
  memcpy(&h.d, super + 2 * i, 2);
  if (has_second(type)) memcpy(&h.m, super + 64 + 2 * i, 2);
  const char *words = super + (has_second(type) ? 128 : 64);
  for (int n = 0; n < words_of(type); n++) memcpy(&h.words[n], words + 128 * n + 4 * i, 4);
  return h;
}

/* The planes of a group: word n of lower bits, of upper ones behind them. */
static void put_codes(int type, char *group, int i, const uint32_t quad[QUADS]) {
  const int low = k_low_bits(type), high = k_high_bits(type), each = 8 / low;
  for (int n = 0; n < low; n++) {
    uint32_t w = 0;
    for (int t = 0; t < each; t++)
      w |= (quad[n * each + t] & (low == 2 ? 0x03030303u : 0x0f0f0f0fu)) << t * low;
    memcpy(group + 128 * n + 4 * i, &w, 4);
  }
  for (int n = 0; n < high; n++) {
    uint32_t w = 0;
    for (int t = 0; t < 8 / high; t++)
      w |= (quad[n * (8 / high) + t] >> low & (high == 2 ? 0x03030303u : 0x01010101u)) << t * high;
    memcpy(group + 128 * (low + n) + 4 * i, &w, 4);
  }
}

static void get_codes(int type, const char *group, int i, uint32_t quad[QUADS]) {
  const int low = k_low_bits(type), high = k_high_bits(type);
  for (int q = 0; q < QUADS; q++) {
    uint32_t w;
    memcpy(&w, group + 128 * (q * low / 8) + 4 * i, 4);
    quad[q] = w >> q * low % 8 & (low == 2 ? 0x03030303u : 0x0f0f0f0fu);
    if (!high) continue;
    memcpy(&w, group + 128 * (low + q * high / 8) + 4 * i, 4);
    quad[q] |= (w >> q * high % 8 & (high == 2 ? 0x03030303u : 0x01010101u)) << low;
  }
}

/* Scale s of a block, and what is added to its values: in ggml's order of float32 products. */
static float scale_of(int type, const head *h, int s, float *add) {
  *add = 0;
  if (type == PYLORA_MXFP4) { /* half of 2^(e - 127), as the values are doubled */
    const uint32_t e = h->d, bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
    float d;
    memcpy(&d, &bits, 4);
    return d;
  }
  const float d = from_half(h->d), m = from_half(h->m);
  const int byte = (int)(h->words[s / 4] >> 8 * (s % 4) & 255);
  if (type == PYLORA_Q6_K) return d * (float)(byte < 128 ? byte : byte - 256);
  if (type == PYLORA_Q2_K) {
    *add = -(m * (float)(byte >> 4));
    return d * (float)(byte & 15);
  }
  if (type == PYLORA_Q3_K) {
    const int low = (int)(h->words[s / 4 % 2] >> (8 * (s % 4) + s / 8 * 4) & 15),
              up = (int)(h->words[2] >> (8 * (s % 4) + s / 4 * 2) & 3);
    return d * (float)((low | up << 4) - 32);
  }
  if (type == PYLORA_IQ4_XS)
    return d *
           (float)((int)((h->words[0] >> 4 * s & 15) | (uint32_t)(h->m >> 2 * s & 3) << 4) - 32);
  if (type == PYLORA_Q4_K || type == PYLORA_Q5_K) {
    const int at = 8 * (s % 4);
    const uint32_t a = h->words[0] >> at & 255, b = h->words[1] >> at & 255,
                   c = h->words[2] >> at & 255;
    *add = -(m * (float)(s < 4 ? b & 63 : c >> 4 | (b >> 6) << 4));
    return d * (float)(s < 4 ? a & 63 : (c & 15) | (a >> 6) << 4);
  }
  if (type == PYLORA_Q5_1) *add = m;
  return d;
}

/* ---- the format ---- */

static void pack_blocks(int type, const void *rows, int64_t row_bytes, int64_t d, int64_t k,
                        int64_t first, char *panel, size_t panel_bytes) {
  const int64_t supers = k / (GROUP * k_groups(type)), n = min64(PANEL, d - first);
  const int64_t used = supers * k_super_bytes(type);
  if (n < PANEL)
    memset(panel, 0, panel_bytes);
  else
    memset(panel + used, 0, panel_bytes - (size_t)used);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t *b = (const uint8_t *)rows + (first + i) * row_bytes;
    char *super = panel;
    for (int64_t s = 0; s < supers; s++, b += k_block_bytes(type), super += k_super_bytes(type)) {
      const head h = head_of(type, b);
      put_head(type, super, (int)i, &h);
      for (int g = 0; g < k_groups(type); g++) {
        uint32_t quad[QUADS];
        codes_of(type, b, g, quad);
        put_codes(type, super + k_head_bytes(type) + g * k_group_bytes(type), (int)i, quad);
      }
    }
  }
}

static void unpack(int type, const char *super, int64_t k, int row, float *out) {
  const int64_t supers = k / (GROUP * k_groups(type));
  const int halves = k_halves(type), table = k_is_table(type), offset = k_offset(type);
  const int8_t *values = type == PYLORA_MXFP4 ? fp4 : iq4;
  for (int64_t s = 0; s < supers; s++, super += k_super_bytes(type)) {
    const head h = get_head(type, super, row);
    for (int g = 0; g < k_groups(type); g++) {
      uint32_t quad[QUADS];
      get_codes(type, super + k_head_bytes(type) + g * k_group_bytes(type), row, quad);
      for (int part = 0; part < halves; part++) {
        float add;
        const float scale = scale_of(type, &h, g * halves + part, &add);
        for (int t = part * GROUP / halves; t < (part + 1) * GROUP / halves; t++) {
          const int q = (int)(quad[t / 4] >> 8 * (t % 4) & 255);
          const float v = scale * (float)(table ? values[q] : q - offset);
          *out++ = k_has_minimum(type) ? v + add : v;
        }
      }
    }
  }
}

static size_t row_bytes(int64_t k) {
  return pylora_row_stride((size_t)(k / GROUP) * sizeof(pylora_krow));
}

static void prepare(int most, const pylora_kernels *K, const pylora_mat *x, int64_t first,
                    int64_t n, void *out) {
  enum { COLS = 16 * GROUP };
  float wide[COLS];
  const size_t stride = row_bytes(x->cols);
  for (int64_t i = 0; i < n; i++) {
    pylora_krow *to = (pylora_krow *)(void *)((char *)out + (size_t)i * stride);
    for (int64_t t = 0; t < x->cols; t += COLS) {
      const int64_t cols = min64(COLS, x->cols - t);
      const float *from = pylora_row(K, x, first + i, t, cols, wide);
      K->quantize_bytes(most, cols / GROUP, from, to + t / GROUP);
    }
  }
}

static void prepare16(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n,
                      void *out) {
  prepare(PYLORA_KROW_MAX, K, x, first, n, out);
}
static void prepare8(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n,
                     void *out) {
  prepare(PYLORA_KROW_MAX8, K, x, first, n, out);
}

static void product(int dtype, const pylora_kernels *K, int64_t n, int64_t k, const char *rows,
                    size_t stride, const char *panel, float *tile) {
  const int type = dtype & ~PYLORA_A8;
  const int64_t groups = k / GROUP;
  int64_t g = 0;
  do {
    const int64_t some = min64(PIECE, groups - g);
    K->gemm_k(dtype, n, some / k_groups(type), rows + (size_t)g * sizeof(pylora_krow), stride,
              panel + g / k_groups(type) * k_super_bytes(type), tile, PANEL,
              g ? GEMM_ADD : GEMM_SET);
    g += PIECE;
  } while (g < groups);
}

static void transpose(int type, size_t panel, const pylora_kernels *K, const char *panels,
                      int64_t d0, int64_t rows, int64_t j, float *chunk) {
  const int64_t g = j / GROUP;
  const char *super =
      panels + (size_t)(d0 / PANEL) * panel + g / k_groups(type) * k_super_bytes(type);
  float values[GROUP * PANEL];
  for (int64_t q = 0; q < rows; q += PANEL, super += panel) {
    K->dequantize_k(type, super, (int)(g % k_groups(type)), values);
    K->transpose(PANEL, PANEL, values, PANEL, chunk + q * PANEL, PANEL);
  }
}

/* A constant expression, which C wants of k_groups here. */
#define k_groups_of(type) \
  (((type) >= PYLORA_Q2_K && (type) <= PYLORA_Q6_K) || (type) == PYLORA_IQ4_XS ? 8 : 1)

/* The same functions for each type, as pylora_format wants them, with 16 and with 8 bits of x. */
#define FORMAT(name, type)                                                                         \
  static size_t panel_bytes_##name(int64_t k) {                                                    \
    return round_up((size_t)(k / (GROUP * k_groups(type))) * (size_t)k_super_bytes(type));         \
  }                                                                                                \
  static void pack_blocks_##name(const void *rows, int64_t row_bytes, int64_t d, int64_t k,        \
                                 int64_t first, void *panel) {                                     \
    pack_blocks(type, rows, row_bytes, d, k, first, panel, panel_bytes_##name(k));                 \
  }                                                                                                \
  static size_t blocks_bytes_##name(int64_t k) {                                                   \
    return (size_t)(k / (GROUP * k_groups(type))) * (size_t)k_block_bytes(type);                   \
  }                                                                                                \
  static void unpack_##name(const void *panel, int64_t k, int row, float *out) {                   \
    unpack(type, panel, k, row, out);                                                              \
  }                                                                                                \
  static void product_##name(const pylora_kernels *K, int64_t n, int64_t k, const void *rows,      \
                             size_t stride, const void *panel, float *tile) {                      \
    product(type, K, n, k, rows, stride, panel, tile);                                             \
  }                                                                                                \
  static void product8_##name(const pylora_kernels *K, int64_t n, int64_t k, const void *rows,     \
                              size_t stride, const void *panel, float *tile) {                     \
    product(PYLORA_A8 + type, K, n, k, rows, stride, panel, tile);                                 \
  }                                                                                                \
  static void transpose_##name(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0, \
                               int64_t rows, int64_t j, void *chunk) {                             \
    transpose(type, panel_bytes_##name(k), K, panels, d0, rows, j, chunk);                         \
  }                                                                                                \
  const pylora_format pylora_format_##name[2] = {                                                  \
      EACH(name, type, prepare16, product_##name),                                                 \
      EACH(name, PYLORA_A8 + type, prepare8, product8_##name)}

#define EACH(name, type, prepare_, product_)                \
  {                                                         \
      .dtype = type,                                        \
      .multiple = k_groups_of((type) & ~PYLORA_A8) * GROUP, \
      .panel_bytes = panel_bytes_##name,                    \
      .pack_blocks = pack_blocks_##name,                    \
      .blocks_bytes = blocks_bytes_##name,                  \
      .unpack = unpack_##name,                              \
      .row_bytes = row_bytes,                               \
      .prepare = prepare_,                                  \
      .product = product_,                                  \
      .back = PYLORA_F32,                                   \
      .transpose = transpose_##name,                        \
  }

FORMAT(q5_0, PYLORA_Q5_0);
FORMAT(q5_1, PYLORA_Q5_1);
FORMAT(q2_k, PYLORA_Q2_K);
FORMAT(q3_k, PYLORA_Q3_K);
FORMAT(q4_k, PYLORA_Q4_K);
FORMAT(q5_k, PYLORA_Q5_K);
FORMAT(q6_k, PYLORA_Q6_K);
FORMAT(iq4_nl, PYLORA_IQ4_NL);
FORMAT(iq4_xs, PYLORA_IQ4_XS);
FORMAT(mxfp4, PYLORA_MXFP4);
