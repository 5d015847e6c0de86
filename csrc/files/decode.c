/* decode.c - plain numbers, and ggml's blocks of 32 (NVFP4: 64) numbers. */
#include "files/decode.h"

PYLORA_DECODER(f32) { memcpy(y, b, (size_t)n * sizeof *y); }

PYLORA_DECODER(f16) {
  for (int64_t i = 0; i < n; i++) y[i] = half_at(b + 2 * i);
}

PYLORA_DECODER(bf16) {
  for (int64_t i = 0; i < n; i++) y[i] = float_of_bits((uint32_t)load16(b + 2 * i) << 16);
}

/* d, 16 bytes of two codes: d (q - 8). */
PYLORA_DECODER(q4_0) {
  for (; n-- > 0; b += 18, y += 32) {
    const float d = half_at(b);
    for (int i = 0; i < 16; i++) {
      y[i] = d * (float)((b[2 + i] & 15) - 8);
      y[i + 16] = d * (float)((b[2 + i] >> 4) - 8);
    }
  }
}

/* d, m, 16 bytes of two codes: d q + m. */
PYLORA_DECODER(q4_1) {
  for (; n-- > 0; b += 20, y += 32) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int i = 0; i < 16; i++) {
      y[i] = d * (float)(b[4 + i] & 15) + m;
      y[i + 16] = d * (float)(b[4 + i] >> 4) + m;
    }
  }
}

/* d, the fifth bits of 32 codes, their lower four: d (q - 16). */
PYLORA_DECODER(q5_0) {
  for (; n-- > 0; b += 22, y += 32) {
    const float d = half_at(b);
    const uint32_t high = load32(b + 2);
    for (int i = 0; i < 16; i++) {
      const int low = b[6 + i] & 15, up = b[6 + i] >> 4;
      y[i] = d * (float)((low | (int)(high >> i & 1) << 4) - 16);
      y[i + 16] = d * (float)((up | (int)(high >> (i + 16) & 1) << 4) - 16);
    }
  }
}

/* The same with a minimum: d q + m. */
PYLORA_DECODER(q5_1) {
  for (; n-- > 0; b += 24, y += 32) {
    const float d = half_at(b), m = half_at(b + 2);
    const uint32_t high = load32(b + 4);
    for (int i = 0; i < 16; i++) {
      const int low = b[8 + i] & 15, up = b[8 + i] >> 4;
      y[i] = d * (float)(low | (int)(high >> i & 1) << 4) + m;
      y[i + 16] = d * (float)(up | (int)(high >> (i + 16) & 1) << 4) + m;
    }
  }
}

/* d, 32 codes of 8 bits: d q. */
PYLORA_DECODER(q8_0) {
  for (; n-- > 0; b += 34, y += 32) {
    const float d = half_at(b);
    for (int i = 0; i < 32; i++) y[i] = d * (float)(int8_t)b[2 + i];
  }
}

const int8_t pylora_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};

/* d, 16 bytes of two codes that choose one of 16 values. */
PYLORA_DECODER(iq4_nl) {
  for (; n-- > 0; b += 18, y += 32) {
    const float d = half_at(b);
    for (int i = 0; i < 16; i++) {
      y[i] = d * (float)pylora_iq4_values[b[2 + i] & 15];
      y[i + 16] = d * (float)pylora_iq4_values[b[2 + i] >> 4];
    }
  }
}

/* Twice the values of FP4 (E2M1). */
static const int8_t fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* A power of two as its exponent (E8M0; half of it, as the values are doubled), 16 bytes of two codes. */
PYLORA_DECODER(mxfp4) {
  for (; n-- > 0; b += 17, y += 32) {
    const uint32_t e = b[0];
    const float d = float_of_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    for (int i = 0; i < 16; i++) {
      y[i] = d * (float)fp4[b[1 + i] & 15];
      y[i + 16] = d * (float)fp4[b[1 + i] >> 4];
    }
  }
}

/* An unsigned FP8 (E4M3), halved; 0x7f, which is none, counts as 0. */
static float scale_of_e4m3(uint8_t u) {
  const int e = u >> 3 & 15, m = u & 7;
  if (u == 0 || u == 0x7f) return 0;
  if (e == 0) return (float)m * 0x1p-10f;
  return (1.0f + (float)m / 8.0f) * float_of_bits((uint32_t)(e - 7 + 127) << 23) * 0.5f;
}

/* Four scales, then 8 bytes of two codes for each: low halves first. */
PYLORA_DECODER(nvfp4) {
  for (; n-- > 0; b += 36)
    for (int part = 0; part < 4; part++, y += 16) {
      const float d = scale_of_e4m3(b[part]);
      const uint8_t *q = b + 4 + 8 * part;
      for (int i = 0; i < 8; i++) {
        y[i] = d * (float)fp4[q[i] & 15];
        y[i + 8] = d * (float)fp4[q[i] >> 4];
      }
    }
}
