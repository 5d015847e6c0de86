/* format_k.h - what format_k.c and the kernels (cpu/gemm_k.inc) agree on: how the blocks of ggml's K-quants and
 * their kin lie in a panel, and the rows they are multiplied with.
 *
 * A type's block has 32 or 256 inputs.  32 outputs' blocks of the same inputs, transposed, are a `super`: as many
 * bytes as in the file, cut into planes, each with a number of every output side by side.  First the scales:
 *   Q4_K, Q5_K   d, dmin: float16 [32] each; the block's 12 bytes of 6-bit numbers as words, uint32 [3][32]
 *   Q2_K         d, dmin; its 16 bytes, uint32 [4][32]
 *   Q3_K         d; its 12 bytes, uint32 [3][32]
 *   Q6_K         d; its 16 bytes, uint32 [4][32]
 *   IQ4_XS       d; the upper 2 bits of 8 scales, uint16 [32]; their lower 4, uint32 [32]
 *   Q5_0, IQ4_NL d       Q5_1  d, m       MXFP4  an exponent, uint8 [32]
 * then the codes of each group of 32 inputs.  Four inputs are a quad, a byte each; quad q of a code's bits is at
 *   4 bits   word q / 2, in its lower or (q odd) upper halves of bytes: uint32 [4][32]   (all but Q2_K, Q3_K)
 *   2 bits   word q / 4, bits 2 (q % 4) of each byte: uint32 [2][32]                     (Q2_K, Q3_K; on top: Q6_K)
 *   1 bit    bit q of each byte: uint32 [32]                                (on top: Q5_0, Q5_1, Q5_K, Q3_K) */
#ifndef PYLORA_FORMAT_K_H
#define PYLORA_FORMAT_K_H

#include <stdint.h>

#include "pylora.h"

enum {
  PYLORA_KGROUP = 32, /* inputs that share a scale of x */
  PYLORA_KQUADS = PYLORA_KGROUP / 4,
};

#define PYLORA_KROW_MAX 32639 /* 127 * 256 + 127 */
#define PYLORA_KROW_MAX8 127

/* 32 numbers of a row of x, rounded as in pylora_qrow: x = scale * code, code = 256 high + low, balanced bytes.
 * With PYLORA_A8 codes are no larger than 127, and high is 0. */
typedef struct pylora_krow {
  int8_t low[PYLORA_KGROUP], high[PYLORA_KGROUP];
  float scale;
  int32_t sum[2]; /* of the codes of either half */
} pylora_krow;

static inline int pylora_is_k(int dtype) { return dtype >= PYLORA_Q5_0 && dtype <= PYLORA_MXFP4; }

/* ---- a type's numbers: constants where the type is one ---- */

static inline int k_block_bytes(int type) { /* bytes of a block, as in a file */
  return type == PYLORA_Q5_0     ? 22
         : type == PYLORA_Q5_1   ? 24
         : type == PYLORA_Q2_K   ? 84
         : type == PYLORA_Q3_K   ? 110
         : type == PYLORA_Q4_K   ? 144
         : type == PYLORA_Q5_K   ? 176
         : type == PYLORA_Q6_K   ? 210
         : type == PYLORA_IQ4_NL ? 18
         : type == PYLORA_IQ4_XS ? 136
                                 : 17;
}
static inline int k_groups(int type) { /* of 32 inputs in a block */
  return (type >= PYLORA_Q2_K && type <= PYLORA_Q6_K) || type == PYLORA_IQ4_XS ? 8 : 1;
}
static inline int k_halves(int type) { /* scales in a group */
  return type == PYLORA_Q2_K || type == PYLORA_Q3_K || type == PYLORA_Q6_K ? 2 : 1;
}
static inline int k_has_minimum(int type) {
  return type == PYLORA_Q5_1 || type == PYLORA_Q2_K || type == PYLORA_Q4_K || type == PYLORA_Q5_K;
}
/* What is taken off a code; IQ4's are values of a table. */
static inline int k_offset(int type) {
  return type == PYLORA_Q5_0    ? 16
         : type == PYLORA_Q3_K  ? 4
         : type == PYLORA_Q6_K  ? 32
         : type == PYLORA_MXFP4 ? 12
                                : 0;
}
static inline int k_is_table(int type) { /* codes choose one of 16 values */
  return type == PYLORA_IQ4_NL || type == PYLORA_IQ4_XS || type == PYLORA_MXFP4;
}
static inline int k_low_bits(int type) {
  return type == PYLORA_Q2_K || type == PYLORA_Q3_K ? 2 : 4;
}
static inline int k_high_bits(int type) { /* above the lower ones */
  return type == PYLORA_Q6_K ? 2
         : type == PYLORA_Q5_0 || type == PYLORA_Q5_1 || type == PYLORA_Q5_K || type == PYLORA_Q3_K
             ? 1
             : 0;
}
/* Bytes of a super's scales and of the codes of one of its groups. */
static inline int k_head_bytes(int type) {
  return type == PYLORA_Q4_K || type == PYLORA_Q5_K     ? 128 + 384
         : type == PYLORA_Q2_K                          ? 128 + 512
         : type == PYLORA_Q3_K                          ? 64 + 384
         : type == PYLORA_Q6_K                          ? 64 + 512
         : type == PYLORA_IQ4_XS                        ? 64 + 64 + 128
         : type == PYLORA_Q5_1                          ? 128
         : type == PYLORA_Q5_0 || type == PYLORA_IQ4_NL ? 64
                                                        : 32;
}
static inline int k_group_bytes(int type) { return 128 * (k_low_bits(type) + k_high_bits(type)); }
static inline int k_super_bytes(int type) {
  return k_head_bytes(type) + k_groups(type) * k_group_bytes(type);
}

#endif
