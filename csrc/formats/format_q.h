/* format_q.h - what format_q.c and the kernels (cpu/gemm_q.inc) agree on: how quantized weights and the
 * rows they are multiplied with lie in memory.
 *
 * Codes are multiplied two inputs at a time, so a panel's group of 32 inputs is, for each of the 16 pairs
 * of inputs, 32 outputs x 2 codes; several pairs share one array of 32 x 2 uint16:
 *   Q8_0        [8][32][2]   pair 2v in the low byte, pair 2v + 1 in the high byte, both signed
 *   Q4_0, Q4_1  [4][32][2]   pair 4v + n in bits 4n .. 4n + 3
 * Behind the codes lie the scales, float16 [32], and (Q4_1) the minimums, float16 [32]. */
#ifndef PYLORA_FORMAT_Q_H
#define PYLORA_FORMAT_Q_H

#include <stdint.h>

#include "pylora.h"

enum {
  PYLORA_QGROUP = 32, /* inputs that share a scale */
  PYLORA_Q8_BYTES = 8 * 32 * 2 * 2 +
      64, /* of a group of 32 outputs: 34 bytes a block, as in a file */
  PYLORA_Q4_0_BYTES = 4 * 32 * 2 * 2 + 64,
  PYLORA_Q4_1_BYTES = 4 * 32 * 2 * 2 + 128,
};

/* 32 numbers of a row of x: x[i] = scale * code[i] within scale / 2.  |code| <= 32639, which two balanced
 * bytes can hold (127 * 256 + 127); 127 with PYLORA_A8.  scale = max |x| / that, but no less than the smallest
 * normal number; NaN, with codes of 0, where the group is not finite.
 *
 * A row is made and read by kernels of one table.  Some multiply bytes: there a code is 256 high + low, and both
 * are in the order of a panel's quads.  Quad q is four inputs of each output, a byte each: of Q8_0 array q, of Q4_0
 * and Q4_1 the lower (q even) or upper halves of array q / 2's bytes.  (cpu/vec_q.h) */
typedef struct pylora_qrow {
  union {
    int16_t code[PYLORA_QGROUP];
    struct {
      int8_t low[PYLORA_QGROUP], high[PYLORA_QGROUP]; /* high: without PYLORA_A8 */
    };
  };
  float scale;
  union {
    float sum; /* Q4_1: of the codes, which float32 holds exactly */
    int32_t
        start; /* Q4_0: -8 times that sum; Q8_0: 0, or -128 times where W's bytes are read as unsigned */
  };
} pylora_qrow;

/* The blocks of W, whatever becomes of x. */
static inline int pylora_q_kind(int dtype) { return dtype & ~PYLORA_A8; }

#define PYLORA_QROW_MAX 32639
#define PYLORA_QROW_MAX8 127
#define PYLORA_QROW_SMALLEST 1.17549435e-38f

#endif
