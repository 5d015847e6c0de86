/* decode_iq.c - ggml's IQ types: groups of 4 or 8 numbers are points of a grid, with scales and signs apart.
 *
 * The grids (iq_grids.inc, written by tools/iq_grids.py) hold 2 or 3 bits for each number of a point, which
 * choose its value. */
#include "files/decode.h"
#include "files/iq_grids.inc"

/* The signs of 8 numbers from 7 bits: the eighth makes their number even. */
static unsigned even_signs(unsigned seven) {
  unsigned p = seven ^ seven >> 4;
  p ^= p >> 2;
  p ^= p >> 1;
  return seven | (p & 1) << 7;
}

/* 8 numbers: d v, with signs. */
static float *point2(float *y, float d, unsigned packed, unsigned signs) {
  static const float values[4] = {8, 25, 43, 0};
  for (int i = 0; i < 8; i++) {
    const float v = d * values[packed >> (2 * i) & 3];
    *y++ = signs >> i & 1 ? v * -1.0f : v;
  }
  return y;
}

/* 4 numbers of three bits each. */
static float *point3(float *y, const float *values, float d, unsigned packed, unsigned signs) {
  for (int i = 0; i < 4; i++) {
    const float v = d * values[packed >> (3 * i) & 7];
    *y++ = signs >> i & 1 ? v * -1.0f : v;
  }
  return y;
}

/* d; for each 32: four points of 8 bits, then four signs of 7 bits and a scale of 4. */
PYLORA_DECODER(iq2_xxs) {
  for (; n-- > 0; b += 66) {
    const float d = half_at(b);
    for (int g = 0; g < 8; g++) {
      const uint8_t *q = b + 2 + 8 * g;
      const uint32_t rest = load32(q + 4);
      const float db = d * (0.5f + (float)(rest >> 28)) * 0.25f;
      for (int i = 0; i < 4; i++)
        y = point2(y, db, iq2_xxs_grid[q[i]], even_signs(rest >> (7 * i) & 127));
    }
  }
}

/* d; 32 points of 9 bits with signs of 7; 16 scales of 4 bits. */
PYLORA_DECODER(iq2_xs) {
  for (; n-- > 0; b += 74) {
    const float d = half_at(b);
    for (int i = 0; i < 32; i++) {
      const unsigned q = load16(b + 2 + 2 * i), s = b[66 + i / 4] >> (i / 2 % 2 ? 4 : 0) & 15;
      const float db = d * (0.5f + (float)s) * 0.25f;
      y = point2(y, db, iq2_xs_grid[q & 511], even_signs(q >> 9));
    }
  }
}

/* d; the lower 8 bits of 32 points; their signs; their upper 2 bits; 16 scales of 4 bits. */
PYLORA_DECODER(iq2_s) {
  for (; n-- > 0; b += 82) {
    const float d = half_at(b);
    for (int i = 0; i < 32; i++) {
      const unsigned q = b[2 + i] | (unsigned)(b[66 + i / 4] >> (2 * (i % 4)) & 3) << 8;
      const unsigned s = b[74 + i / 4] >> (i / 2 % 2 ? 4 : 0) & 15;
      const float db = d * (0.5f + (float)s) * 0.25f;
      y = point2(y, db, iq2_s_grid[q], b[34 + i]);
    }
  }
}

static const float iq3_xxs_values[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const float iq3_s_values[8] = {1, 3, 5, 7, 9, 11, 13, 15};

/* d; 64 points of 8 bits; for each 32: four signs of 7 bits and a scale of 4. */
PYLORA_DECODER(iq3_xxs) {
  for (; n-- > 0; b += 98) {
    const float d = half_at(b);
    for (int i = 0; i < 64; i++) {
      const uint32_t rest = load32(b + 66 + 4 * (i / 8));
      const float db = d * (0.5f + (float)(rest >> 28)) * 0.5f;
      const unsigned signs = even_signs(rest >> (7 * (i / 2 % 4)) & 127);
      y = point3(y, iq3_xxs_values, db, iq3_xxs_grid[b[2 + i]], signs >> (i % 2 ? 4 : 0));
    }
  }
}

/* d; the lower 8 bits of 64 points; their ninth; signs; 8 scales of 4 bits. */
PYLORA_DECODER(iq3_s) {
  for (; n-- > 0; b += 110) {
    const float d = half_at(b);
    for (int i = 0; i < 64; i++) {
      const unsigned q = b[2 + i] | (unsigned)(b[66 + i / 8] >> (i % 8) & 1) << 8;
      const unsigned s = b[106 + i / 16] >> (i / 8 % 2 ? 4 : 0) & 15;
      const float db = d * (float)(1 + 2 * s);
      y = point3(y, iq3_s_values, db, iq3_s_grid[q], b[74 + i / 2] >> (i % 2 ? 4 : 0));
    }
  }
}

/* 8 numbers of -1, 0 and 1, all moved by delta. */
static float *point1(float *y, float d, unsigned packed, float delta) {
  for (int i = 0; i < 8; i++) *y++ = d * ((float)((int)(packed >> (2 * i) & 3) - 1) + delta);
  return y;
}

/* d; the lower 8 bits of 32 points; for each 32: their upper 3 bits, a scale of 3, the sign of delta. */
PYLORA_DECODER(iq1_s) {
  for (; n-- > 0; b += 50) {
    const float d = half_at(b);
    for (int i = 0; i < 32; i++) {
      const unsigned h = load16(b + 34 + 2 * (i / 4));
      const float dl = d * (float)(2 * (h >> 12 & 7) + 1);
      const unsigned q = b[2 + i] | (h >> (3 * (i % 4)) & 7) << 8;
      y = point1(y, dl, iq1_s_grid[q], h & 0x8000 ? -0.125f : 0.125f);
    }
  }
}

/* The lower 8 bits of 32 points; upper 3 bits and the sign of delta of each; 16 scales of 3 bits, with a quarter
 * of d in the upper bits of each four. */
PYLORA_DECODER(iq1_m) {
  for (; n-- > 0; b += 56) {
    unsigned bits = 0;
    for (int i = 0; i < 4; i++) bits |= (unsigned)(load16(b + 48 + 2 * i) & 0xf000) >> (12 - 4 * i);
    const float d = (float)widen_f16((uint16_t)bits);
    for (int i = 0; i < 32; i++) {
      const unsigned s = load16(b + 48 + 2 * (i / 8)) >> (3 * (i / 2 % 4)) & 7;
      const unsigned h = b[32 + i / 2] >> (i % 2 ? 4 : 0);
      y = point1(y, d * (float)(2 * s + 1), iq1_s_grid[b[i] | (h & 7) << 8],
                 h & 8 ? -0.125f : 0.125f);
    }
  }
}

/* d; the upper 2 bits of 8 scales, their lower 4; codes that choose one of 16 values: (d (s - 32)) v. */
PYLORA_DECODER(iq4_xs) {
  for (; n-- > 0; b += 136) {
    const float d = half_at(b);
    const unsigned high = load16(b + 2);
    for (int g = 0; g < 8; g++) {
      const int low = b[4 + g / 2] >> (g % 2 ? 4 : 0) & 15, up = (int)(high >> (2 * g) & 3);
      const float dl = d * (float)((low | up << 4) - 32);
      const uint8_t *q = b + 8 + 16 * g;
      for (int i = 0; i < 16; i++) *y++ = dl * (float)pylora_iq4_values[q[i] & 15];
      for (int i = 0; i < 16; i++) *y++ = dl * (float)pylora_iq4_values[q[i] >> 4];
    }
  }
}
