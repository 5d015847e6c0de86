/* encode_k.c - weights into ggml's Q2_K to Q6_K: blocks of 256 numbers, with a search for each group's scale.
 *
 * A group's scale (and minimum) is the best of some twenty that are tried, by a weighted sum of squares; then the
 * scales of the block's groups are themselves rounded, and the codes taken anew for what is left of them.  Sums
 * run over the numbers from the first to the last, since another order would give other bytes. */
#include "formats/encode.h"

enum { BLOCK = 256 };

/* To the nearest integer, to even between two, of |v| < 2^22: as adding 1.5 * 2^23 does. */
static int nearest(float v) { return (int)(bits_of_float(v + 12582912.f) & 0x7fffff) - 0x400000; }

static int between(int low, int v, int high) { return v < low ? low : v > high ? high : v; }

/* ---- Q2_K, Q4_K, Q5_K: (d scale) q - dmin minimum, 16 groups of 16 or 8 groups of 32 ---- */

typedef struct group {
  const float *x;   /* [n] */
  int n, plain;     /* plain: what is summed is the error itself, not its square */
  float weight[32]; /* of a number's error */
  uint8_t code[32];
  float scale, minimum; /* x = scale code - minimum */
} group;

/* How far a scale and an offset are from the numbers. */
static float off_by(const group *g, const uint8_t *code, float scale, float offset) {
  float sum = 0;
  for (int i = 0; i < g->n; i++) {
    const float d = scale * (float)code[i] + offset - g->x[i];
    sum += g->weight[i] * (g->plain ? fabsf(d) : d * d);
  }
  return sum;
}

static void search(group *g, int top, float first, float step, int steps) {
  const float *x = g->x, *w = g->weight;
  float low = x[0], high = x[0], sum_w = w[0], sum_x = sum_w * x[0];
  for (int i = 1; i < g->n; i++) {
    if (x[i] < low) low = x[i];
    if (x[i] > high) high = x[i];
    sum_w += w[i];
    sum_x += w[i] * x[i];
  }
  if (low > 0) low = 0;
  memset(g->code, 0, sizeof g->code);
  g->scale = 0, g->minimum = -low;
  if (high == low) return;
  float by = (float)top / (high - low), scale = 1 / by;
  for (int i = 0; i < g->n; i++) g->code[i] = (uint8_t)between(0, nearest(by * (x[i] - low)), top);
  float best = off_by(g, g->code, scale, low);
  for (int s = 0; s <= steps; s++) { /* from the offset that is best so far */
    uint8_t code[32];
    float sum_q = 0, sum_qq = 0, sum_qx = 0;
    by = (first + step * (float)s + (float)top) / (high - low);
    for (int i = 0; i < g->n; i++) {
      const int q = between(0, nearest(by * (x[i] - low)), top);
      code[i] = (uint8_t)q;
      sum_q += w[i] * (float)q;
      sum_qq += w[i] * (float)q * (float)q;
      sum_qx += w[i] * (float)q * x[i];
    }
    const float D = sum_w * sum_qq - sum_q * sum_q;
    if (!(D > 0)) continue;
    float found = (sum_w * sum_qx - sum_x * sum_q) / D,
          offset = (sum_qq * sum_x - sum_q * sum_qx) / D;
    if (offset > 0) offset = 0, found = sum_qx / sum_qq;
    const float error = off_by(g, code, found, offset);
    if (error < best) {
      memcpy(g->code, code, (size_t)g->n);
      best = error, scale = found, low = offset;
    }
  }
  g->scale = scale, g->minimum = -low;
}

/* 6 bits of scale and minimum of each of 8 groups in 12 bytes. */
static void put_scales(uint8_t *p, const uint8_t *scale, const uint8_t *minimum) {
  for (int g = 0; g < 4; g++) {
    p[g] = (uint8_t)(scale[g] | (scale[4 + g] >> 4) << 6);
    p[4 + g] = (uint8_t)(minimum[g] | (minimum[4 + g] >> 4) << 6);
    p[8 + g] = (uint8_t)((scale[4 + g] & 15) | (minimum[4 + g] & 15) << 4);
  }
}

/* d, dmin and the groups' scales into b, the codes into `code` [256]. */
static void with_minimums(const float *x, uint8_t *b, uint8_t *code, int top, float first,
                          float step, int steps) {
  group g[8];
  float most = 0, deepest = 0;
  for (int j = 0; j < 8; j++) {
    float squares = 0;
    g[j].x = x + 32 * j, g[j].n = 32, g[j].plain = 0;
    for (int i = 0; i < 32; i++) squares += g[j].x[i] * g[j].x[i];
    const float usual = sqrtf(squares / 32);
    for (int i = 0; i < 32; i++) g[j].weight[i] = usual + fabsf(g[j].x[i]);
    search(&g[j], top, first, step, steps);
    if (g[j].scale > most) most = g[j].scale;
    if (g[j].minimum > deepest) deepest = g[j].minimum;
  }
  const float by = most > 0 ? 63.f / most : 0.f, min_by = deepest > 0 ? 63.f / deepest : 0.f;
  uint8_t scale[8], minimum[8];
  for (int j = 0; j < 8; j++) {
    const uint8_t s = (uint8_t)nearest(by * g[j].scale),
                  m = (uint8_t)nearest(min_by * g[j].minimum);
    scale[j] = s < 63 ? s : 63;
    minimum[j] = m < 63 ? m : 63;
  }
  put_half(b, most / 63.f);
  put_half(b + 2, deepest / 63.f);
  put_scales(b + 4, scale, minimum);
  const float whole = (float)widen_f16((uint16_t)(b[0] | b[1] << 8)),
              dip = (float)widen_f16((uint16_t)(b[2] | b[3] << 8));
  for (int j = 0; j < 8; j++) {
    const float d = whole * (float)scale[j], m = dip * (float)minimum[j];
    for (int i = 0; i < 32; i++)
      code[32 * j + i] =
          d == 0 ? g[j].code[i] : (uint8_t)between(0, nearest((g[j].x[i] + m) / d), top);
  }
}

/* Two groups share 32 bytes: one in their low halves, the next in their high ones. */
static void put_fours(uint8_t *q, const uint8_t *code) {
  for (int pair = 0; pair < 4; pair++)
    for (int i = 0; i < 32; i++)
      q[32 * pair + i] =
          (uint8_t)((code[64 * pair + i] & 15) | (code[64 * pair + 32 + i] & 15) << 4);
}

/* d, dmin, 12 bytes of scales, codes of 4 bits. */
PYLORA_ENCODER(q4_k) {
  for (; n-- > 0; x += BLOCK, b += 144) {
    uint8_t code[BLOCK];
    with_minimums(x, b, code, 15, -1.f, 0.1f, 20);
    put_fours(b + 16, code);
  }
}

/* The same with the fifth bits, of group g in bit g of 32 bytes, before the lower four. */
PYLORA_ENCODER(q5_k) {
  for (; n-- > 0; x += BLOCK, b += 176) {
    uint8_t code[BLOCK];
    with_minimums(x, b, code, 31, -0.5f, 0.1f, 15);
    for (int i = 0; i < 32; i++) {
      b[16 + i] = 0;
      for (int g = 0; g < 8; g++) b[16 + i] |= (uint8_t)((code[32 * g + i] >> 4) << g);
    }
    put_fours(b + 48, code);
  }
}

/* Codes of two bits: four runs of 32 in 32 bytes, the first in the lowest bits. */
static void put_twos(uint8_t *q, const uint8_t *code) {
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 32; i++) {
      const uint8_t *c = code + 128 * half + i;
      q[32 * half + i] = (uint8_t)(c[0] | c[32] << 2 | c[64] << 4 | c[96] << 6);
    }
}

/* 16 bytes of a scale and a minimum of 4 bits each, 64 of codes, d, dmin. */
PYLORA_ENCODER(q2_k) {
  for (; n-- > 0; x += BLOCK, b += 84) {
    group g[16];
    uint8_t code[BLOCK];
    float most = 0, deepest = 0;
    for (int j = 0; j < 16; j++) {
      g[j].x = x + 16 * j, g[j].n = 16, g[j].plain = 1;
      for (int i = 0; i < 16; i++) g[j].weight[i] = fabsf(g[j].x[i]);
      search(&g[j], 3, -0.5f, 0.1f, 15);
      if (g[j].scale > most) most = g[j].scale;
      if (g[j].minimum > deepest) deepest = g[j].minimum;
    }
    const float by = most > 0 ? 15.f / most : 0.f, min_by = deepest > 0 ? 15.f / deepest : 0.f;
    for (int j = 0; j < 16; j++)
      b[j] = (uint8_t)((most > 0 ? nearest(by * g[j].scale) : 0) |
                       (deepest > 0 ? (uint8_t)(nearest(min_by * g[j].minimum) << 4) : 0));
    put_half(b + 80, most > 0 ? most / 15.f : 0.f);
    put_half(b + 82, deepest > 0 ? deepest / 15.f : 0.f);
    const float whole = (float)widen_f16((uint16_t)(b[80] | b[81] << 8)),
                dip = (float)widen_f16((uint16_t)(b[82] | b[83] << 8));
    for (int j = 0; j < 16; j++) {
      const float d = whole * (float)(b[j] & 15), m = dip * (float)(b[j] >> 4);
      for (int i = 0; i < 16; i++)
        code[16 * j + i] =
            d == 0 ? g[j].code[i] : (uint8_t)between(0, nearest((g[j].x[i] + m) / d), 3);
    }
    put_twos(b + 16, code);
  }
}

/* ---- Q3_K: (d (scale - 32)) (q - 4), 16 groups of 16 ---- */

/* The scale of a group, its codes, -4 .. 3, into `code` [16]: from the largest number's, each code is moved to where
 * it is best while the others stay, up to five times over. */
static float search_odd(const float *x, int *code) {
  float size = 0, peak = 0;
  for (int i = 0; i < 16; i++)
    if (fabsf(x[i]) > size) size = fabsf(x[i]), peak = x[i];
  for (int i = 0; i < 16; i++) code[i] = -4; /* where there is no scale */
  if (size < 1e-15f) return 0;
  const float by = -4 / peak;
  float sum_qx = 0, sum_qq = 0;
  for (int i = 0; i < 16; i++) {
    const float w = x[i] * x[i];
    code[i] = between(-4, nearest(by * x[i]), 3);
    sum_qx += w * x[i] * (float)code[i];
    sum_qq += w * (float)code[i] * (float)code[i];
  }
  int moved = 1;
  for (int round = 0; round < 5 && moved; round++) {
    moved = 0;
    for (int i = 0; i < 16; i++) {
      const float w = x[i] * x[i], q = (float)code[i];
      float qx = sum_qx - w * x[i] * q, qq = sum_qq - w * q * q;
      if (!(qx > 0)) continue;
      const int better = between(-4, nearest(x[i] * qq / qx), 3);
      if (better == code[i]) continue;
      qx += w * x[i] * (float)better;
      qq += w * (float)better * (float)better;
      if (qq > 0 && qx * qx * sum_qq > sum_qx * sum_qx * qq)
        code[i] = better, sum_qx = qx, sum_qq = qq, moved = 1;
    }
  }
  return sum_qq > 0 ? sum_qx / sum_qq : 0.f;
}

/* The third bits of codes, 64 bytes of the lower two, 12 bytes of scales of 6 bits, d. */
PYLORA_ENCODER(q3_k) {
  for (; n-- > 0; x += BLOCK, b += 110) {
    int code[BLOCK];
    uint8_t low[BLOCK];
    float scale[16], size = 0, peak = 0;
    for (int j = 0; j < 16; j++) {
      scale[j] = search_odd(x + 16 * j, code + 16 * j);
      if (fabsf(scale[j]) > size) size = fabsf(scale[j]), peak = scale[j];
    }
    memset(b, 0, 110);
    const float by = peak != 0 ? -32.f / peak : 0.f;
    put_half(b + 108, peak != 0 ? 1 / by : 0.f);
    const float whole = (float)widen_f16((uint16_t)(b[108] | b[109] << 8));
    uint8_t *kept = b + 96;
    for (int j = 0; j < 16; j++) {
      /* a block without scales is stored with zeros, which stand for -32 */
      const int s = peak != 0 ? between(-32, (int8_t)nearest(by * scale[j]), 31) + 32 : 0;
      kept[j % 8] |= (uint8_t)((s & 15) << (j < 8 ? 0 : 4));
      kept[8 + j % 4] |= (uint8_t)((s >> 4) << 2 * (j / 4));
      const float d = whole * (float)(s - 32);
      for (int i = 16 * j; i < 16 * j + 16; i++)
        if (d != 0) code[i] = between(-4, nearest(x[i] / d), 3);
    }
    for (int i = 0; i < BLOCK; i++) {
      if (code[i] >= 0) b[i % 32] |= (uint8_t)(1 << i / 32);
      low[i] = (uint8_t)((code[i] + 4) & 3);
    }
    put_twos(b + 32, low);
  }
}

/* ---- Q6_K: (d scale) (q - 32), 16 groups of 16 ---- */

/* The scale of a group; its codes, which are 32 more than what they stand for, into `code` [16]. */
static float search_even(const float *x, uint8_t *code) {
  float size = 0, peak = 0;
  for (int i = 0; i < 16; i++)
    if (fabsf(x[i]) > size) size = fabsf(x[i]), peak = x[i];
  memset(code, 0, 16);
  if (size < 1e-15f) return 0;
  float scale = 0, best = 0;
  for (int trial = 0; trial < 19; trial++) {
    /* the plain scale first, then a little more and less: -9 .. 9 without 0 */
    const int s = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9;
    const float by = s == 0 ? -32 / peak : -(32 + 0.1f * (float)s) / peak;
    float sum_qx = 0, sum_qq = 0;
    for (int i = 0; i < 16; i++) {
      const float q = (float)between(-32, nearest(by * x[i]), 31), w = x[i] * x[i];
      sum_qx += w * x[i] * q;
      sum_qq += w * q * q;
    }
    if (s != 0 && !(sum_qq > 0 && sum_qx * sum_qx > best * sum_qq)) continue;
    for (int i = 0; i < 16; i++) code[i] = (uint8_t)(32 + between(-32, nearest(by * x[i]), 31));
    scale = sum_qq != 0 ? sum_qx / sum_qq : 0.f;
    best = scale * sum_qx;
  }
  return scale;
}

/* 128 bytes of the lower four bits, 64 of the upper two, 16 scales of 8 bits, d. */
PYLORA_ENCODER(q6_k) {
  for (; n-- > 0; x += BLOCK, b += 210) {
    uint8_t code[BLOCK];
    float scale[16], size = 0, peak = 0;
    for (int g = 0; g < 16; g++) {
      scale[g] = search_even(x + 16 * g, code + 16 * g);
      if (fabsf(scale[g]) > size) size = fabsf(scale[g]), peak = scale[g];
    }
    memset(b, 0, 210);
    if (size < 1e-15f) continue;
    const float by = -128.f / peak;
    put_half(b + 208, 1 / by);
    const float whole = (float)widen_f16((uint16_t)(b[208] | b[209] << 8));
    for (int g = 0; g < 16; g++) {
      const int s = nearest(by * scale[g]);
      const int8_t kept = (int8_t)(s < 127 ? s : 127);
      b[192 + g] = (uint8_t)kept;
      const float d = whole * (float)kept;
      for (int i = 16 * g; i < 16 * g + 16 && d != 0; i++)
        code[i] = (uint8_t)(32 + between(-32, nearest(x[i] / d), 31));
    }
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 32; i++) {
        const uint8_t *c = code + 128 * half + i;
        b[64 * half + i] = (uint8_t)((c[0] & 15) | (c[64] & 15) << 4);
        b[64 * half + 32 + i] = (uint8_t)((c[32] & 15) | (c[96] & 15) << 4);
        b[128 + 32 * half + i] =
            (uint8_t)(c[0] >> 4 | (c[32] >> 4) << 2 | (c[64] >> 4) << 4 | (c[96] >> 4) << 6);
      }
  }
}
