/* encode.h - what encode.c and encode_k.c share: n blocks of one of ggml's types out of float32 numbers.
 *
 * The bytes are those of ggml's own quantizer without an importance matrix: every product, sum and quotient is
 * taken in its order, in float32, which this core's build never contracts. */
#ifndef PYLORA_ENCODE_H
#define PYLORA_ENCODE_H

#include "ops/number.h"

#define PYLORA_ENCODER(name) void pylora_encode_##name(const float *x, int64_t n, uint8_t *b)

PYLORA_ENCODER(q4_0);
PYLORA_ENCODER(q4_1);
PYLORA_ENCODER(q5_0);
PYLORA_ENCODER(q5_1);
PYLORA_ENCODER(q8_0);
PYLORA_ENCODER(q2_k);
PYLORA_ENCODER(q3_k);
PYLORA_ENCODER(q4_k);
PYLORA_ENCODER(q5_k);
PYLORA_ENCODER(q6_k);

static inline void put_half(uint8_t *p, float x) {
  const uint16_t h = narrow_f16((double)x);
  p[0] = (uint8_t)h;
  p[1] = (uint8_t)(h >> 8);
}

#endif
