/* decode_k.c - ggml's K-quants and ternary types: blocks of 256 numbers with scales for groups in them. */
#include "files/decode.h"

/* 16 scales and minima of 4 bits, 64 bytes of four codes of 2 bits, d, dmin: (d s) q - dmin m. */
PYLORA_DECODER(q2_k) {
  for (; n-- > 0; b += 84) {
    const uint8_t *scale = b, *q = b + 16;
    const float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int part = 0; part < 2; part++, q += 32)
      for (int shift = 0; shift < 8; shift += 2)
        for (int group = 0; group < 2; group++, scale++) {
          const float dl = d * (float)(*scale & 15), ml = dmin * (float)(*scale >> 4);
          for (int i = 0; i < 16; i++) *y++ = dl * (float)(q[16 * group + i] >> shift & 3) - ml;
        }
  }
}

/* The third bits of 256 codes, 64 bytes of their lower two, 16 scales of 6 bits, d: (d (s - 32)) q. */
PYLORA_DECODER(q3_k) {
  for (; n-- > 0; b += 110) {
    const uint8_t *high = b, *q = b + 32, *s = b + 96;
    const float d = half_at(b + 108);
    for (int group = 0; group < 16; group++) {
      const int low = s[group % 8] >> (group < 8 ? 0 : 4) & 15;
      const int up = s[8 + group % 4] >> (2 * (group / 4)) & 3;
      const float dl = d * (float)((low | up << 4) - 32);
      const int plane = group / 2, first = 16 * (group % 2); /* 8 planes of 32 codes */
      for (int i = 0; i < 16; i++) {
        const int code = q[32 * (plane / 4) + first + i] >> (2 * (plane % 4)) & 3;
        *y++ = dl * (float)(code - (high[first + i] >> plane & 1 ? 0 : 4));
      }
    }
  }
}

/* Scale and minimum of group g of 8, 6 bits each, in the 12 bytes of Q4_K and Q5_K. */
static void scale_min(const uint8_t *s, int g, int *scale, int *minimum) {
  if (g < 4) {
    *scale = s[g] & 63, *minimum = s[4 + g] & 63;
    return;
  }
  *scale = (s[4 + g] & 15) | (s[g - 4] >> 2 & 48);
  *minimum = s[4 + g] >> 4 | (s[g] >> 2 & 48);
}

/* d, dmin, 8 scales and minima, codes of 4 bits: (d s) q - dmin m. */
PYLORA_DECODER(q4_k) {
  for (; n-- > 0; b += 144) {
    const float d = half_at(b), dmin = half_at(b + 2);
    for (int g = 0; g < 8; g++) {
      int scale, minimum;
      scale_min(b + 4, g, &scale, &minimum);
      const float dl = d * (float)scale, ml = dmin * (float)minimum;
      const uint8_t *q = b + 16 + 32 * (g / 2);
      for (int i = 0; i < 32; i++) *y++ = dl * (float)(q[i] >> (g % 2 ? 4 : 0) & 15) - ml;
    }
  }
}

/* The same with the fifth bits of the codes before the lower four. */
PYLORA_DECODER(q5_k) {
  for (; n-- > 0; b += 176) {
    const float d = half_at(b), dmin = half_at(b + 2);
    const uint8_t *high = b + 16;
    for (int g = 0; g < 8; g++) {
      int scale, minimum;
      scale_min(b + 4, g, &scale, &minimum);
      const float dl = d * (float)scale, ml = dmin * (float)minimum;
      const uint8_t *q = b + 48 + 32 * (g / 2);
      for (int i = 0; i < 32; i++) {
        const int code = (q[i] >> (g % 2 ? 4 : 0) & 15) | (high[i] >> g & 1) << 4;
        *y++ = dl * (float)code - ml;
      }
    }
  }
}

/* 128 bytes of lower four bits, 64 of upper two, 16 scales of 8 bits, d: (d s) (q - 32). */
PYLORA_DECODER(q6_k) {
  for (; n-- > 0; b += 210) {
    const int8_t *scale = (const int8_t *)b + 192;
    const float d = half_at(b + 208);
    for (int plane = 0; plane < 8; plane++) { /* 32 codes each */
      const int half = plane / 4, part = plane % 4;
      const uint8_t *low = b + 64 * half + 32 * (part % 2), *up = b + 128 + 32 * half;
      for (int i = 0; i < 32; i++) {
        const int code = (low[i] >> (part < 2 ? 0 : 4) & 15) | (up[i] >> (2 * part) & 3) << 4;
        const float dl = d * (float)scale[2 * plane + i / 16];
        *y++ = dl * (float)(code - 32);
      }
    }
  }
}

/* -1, 0 or 1 as the digit of a number of base 3 that a byte holds as a fraction of 256. */
static int trit(uint8_t q, int digit) {
  static const uint8_t power[5] = {1, 3, 9, 27, 81};
  return ((uint8_t)(q * power[digit]) * 3 >> 8) - 1;
}

/* 48 bytes of five digits (in runs of 32 and of 16), 4 bytes of four, d. */
PYLORA_DECODER(tq1_0) {
  for (; n-- > 0; b += 54) {
    const float d = half_at(b + 52);
    for (int k = 0; k < 5; k++)
      for (int i = 0; i < 32; i++) *y++ = d * (float)trit(b[i], k);
    for (int k = 0; k < 5; k++)
      for (int i = 0; i < 16; i++) *y++ = d * (float)trit(b[32 + i], k);
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < 4; i++) *y++ = d * (float)trit(b[48 + i], k);
  }
}

/* 64 bytes of four codes of 2 bits, d: d (q - 1). */
PYLORA_DECODER(tq2_0) {
  for (; n-- > 0; b += 66) {
    const float d = half_at(b + 64);
    for (int part = 0; part < 2; part++)
      for (int shift = 0; shift < 8; shift += 2)
        for (int i = 0; i < 32; i++) *y++ = d * (float)((b[32 * part + i] >> shift & 3) - 1);
  }
}
