/* recode.c - blocks that products do not take as blocks that they do, their codes kept: Q5_0 as Q8_0, Q4_K as Q4_1.
 *
 * The rules, and what they may move, are those of pylora/numbers/recode.py: Q5_0 exactly; of Q4_K the scale and the
 * minimum of each group of 32 are rounded to float16, and a weight with one that float16 cannot hold is not recoded. */
#include "files/decode.h"

/* Scale and minimum of the groups of a block of Q4_K, as Q4_1's; 0: one is not finite in float16. */
static int heads_of_q4_k(const uint8_t *b, uint16_t head[16]) {
  const float d = half_at(b), dmin = half_at(b + 2);
  const uint8_t *s = b + 4;
  int finite = 1;
  for (int g = 0; g < 8; g++) {
    const int low = g % 4, scale = g < 4 ? s[low] & 63 : (s[8 + low] & 15) | s[low] >> 6 << 4;
    const int minimum = g < 4 ? s[4 + low] & 63 : s[8 + low] >> 4 | s[4 + low] >> 6 << 4;
    head[2 * g] = narrow_f16((double)(d * (float)scale));
    head[2 * g + 1] = narrow_f16((double)-(dmin * (float)minimum));
    finite &= (head[2 * g] & 0x7c00) != 0x7c00 && (head[2 * g + 1] & 0x7c00) != 0x7c00;
  }
  return finite;
}

static void q4_k_row(const uint8_t *b, int64_t blocks, uint8_t *out) {
  for (; blocks-- > 0; b += 144) {
    uint16_t head[16];
    heads_of_q4_k(b, head);
    for (int g = 0; g < 8; g++, out += 20) {
      const uint8_t *q = b + 16 + 32 * (g / 2);
      const int shift = g % 2 ? 4 : 0;
      memcpy(out, head + 2 * g, 4);
      for (int i = 0; i < 16; i++)
        out[4 + i] = (uint8_t)((q[i] >> shift & 15) | (q[i + 16] >> shift & 15) << 4);
    }
  }
}

static void q5_0_row(const uint8_t *b, int64_t blocks, uint8_t *out) {
  for (; blocks-- > 0; b += 22, out += 34) {
    const uint32_t high = load32(b + 2);
    memcpy(out, b, 2);
    for (int i = 0; i < 32; i++) {
      const int low = i < 16 ? b[6 + i] & 15 : b[6 + i - 16] >> 4;
      out[2 + i] = (uint8_t)((low | (int)(high >> i & 1) << 4) - 16);
    }
  }
}

int pylora_recodes(const pylora_tensor *t, int dtype) {
  const int q5_0 = strcmp(t->type, "Q5_0") == 0;
  if (q5_0 || dtype != PYLORA_Q4_1 || strcmp(t->type, "Q4_K") != 0)
    return q5_0 && dtype == PYLORA_Q8_0;
  uint16_t head[16];
  for (int64_t at = 0; at < t->bytes; at += 144)
    if (!heads_of_q4_k((const uint8_t *)t->data + at, head)) return 0;
  return 1;
}

void pylora_recode_row(const pylora_tensor *t, int64_t i, uint8_t *out) {
  const pylora_kind *kind = pylora_kind_of(t->kind);
  const int64_t blocks = pylora_columns(t) / kind->block;
  const uint8_t *row = (const uint8_t *)t->data + i * blocks * kind->bytes;
  if (kind->block == 256)
    q4_k_row(row, blocks, out);
  else
    q5_0_row(row, blocks, out);
}
