/* decode.h - n blocks of each of ggml's types as float32.
 *
 * The values are those of gguf-py, bit for bit: products and sums are taken in its order, in float32.  A block's
 * layout stands at its function; all numbers in it are little-endian. */
#ifndef PYLORA_DECODE_H
#define PYLORA_DECODE_H

#include "files/files.h"
#include "ops/number.h"

#define PYLORA_DECODER(name) void pylora_decode_##name(const uint8_t *b, int64_t n, float *y)

PYLORA_DECODER(f32);
PYLORA_DECODER(f16);
PYLORA_DECODER(bf16);
PYLORA_DECODER(q4_0);
PYLORA_DECODER(q4_1);
PYLORA_DECODER(q5_0);
PYLORA_DECODER(q5_1);
PYLORA_DECODER(q8_0);
PYLORA_DECODER(iq4_nl);
PYLORA_DECODER(mxfp4);
PYLORA_DECODER(nvfp4);
PYLORA_DECODER(q2_k);
PYLORA_DECODER(q3_k);
PYLORA_DECODER(q4_k);
PYLORA_DECODER(q5_k);
PYLORA_DECODER(q6_k);
PYLORA_DECODER(tq1_0);
PYLORA_DECODER(tq2_0);
PYLORA_DECODER(iq2_xxs);
PYLORA_DECODER(iq2_xs);
PYLORA_DECODER(iq2_s);
PYLORA_DECODER(iq3_xxs);
PYLORA_DECODER(iq3_s);
PYLORA_DECODER(iq1_s);
PYLORA_DECODER(iq1_m);
PYLORA_DECODER(iq4_xs);

static inline float half_at(const uint8_t *p) { return (float)widen_f16(load16(p)); }

extern const int8_t pylora_iq4_values[16];

#endif
