/* cpu/vec_k.h - lanes of four bytes, one output's codes of four inputs, and their products with x; on top of vec_q.h.
 *
 * Bytes of codes are 0 .. 63, but for those of IQ4's table: signed, -127 .. 113, or (K_BIAS) that many above.
 * A product adds four terms to each lane; K_RUN products at most may be added before k_flush takes the sums, which
 * are 16-bit where the instruction set has no sums of 32 bits. */
#ifndef PYLORA_CPU_VEC_K_H
#define PYLORA_CPU_VEC_K_H

#include "vec_q.h"
#include "formats/format_k.h"

/* What IQ4's values have been raised by.  AMX multiplies signed bytes. */
#if defined(VEC_VNNI) && !defined(VEC_AMX)
#define K_BIAS 128
#else
#define K_BIAS 0
#endif

#if defined(VEC_AMX) /* unpacked codes are signed bytes, with nothing to be taken off */
#define K_LESS(w, type) k_less(w, K_EVERY(k_above(type)))
#else
#define K_LESS(w, type) (w)
#endif

#if defined(VEC_AVX512)
#define N_RIGHT32(a, n) _mm512_srli_epi32(a, n)
INLINE vint n_or(vint a, vint b) { return _mm512_or_si512(a, b); }
INLINE vint n_bytes(const uint8_t *p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
INLINE vint n_half_words(const uint16_t *p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
INLINE vf n_as_float(vint a) { return _mm512_castsi512_ps(a); }
INLINE vint k_less(vint a, vint b) { return _mm512_sub_epi8(a, b); } /* bytes */
INLINE vint k_table(const int8_t *values) {                          /* 16 of them */
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)values));
}
INLINE vint k_choose(vint table, vint codes) { return _mm512_shuffle_epi8(table, codes); }
#if defined(VEC_VNNI)
#define K_SHORT 0
INLINE vint k_dot(const int sign, vint sum, vint w, vint x) {
  (void)sign;
  return _mm512_dpbusd_epi32(sum, w, x);
}
INLINE vint k_flush(vint sum) { return sum; }
#else
#define K_SHORT 1
INLINE vint k_dot(const int sign, vint sum, vint w, vint x) {
  if (sign) { /* |x| (w or -w) */
    w = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w);
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(_mm512_abs_epi8(x), w));
  }
  return _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x));
}
INLINE vint k_flush(vint sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
#endif

#elif defined(VEC_AVX2)
#define N_RIGHT32(a, n) _mm256_srli_epi32(a, n)
INLINE vint n_or(vint a, vint b) { return _mm256_or_si256(a, b); }
INLINE vint n_bytes(const uint8_t *p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}
INLINE vint n_half_words(const uint16_t *p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
INLINE vf n_as_float(vint a) { return _mm256_castsi256_ps(a); }
INLINE vint k_table(const int8_t *values) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)values));
}
INLINE vint k_choose(vint table, vint codes) { return _mm256_shuffle_epi8(table, codes); }
#define K_SHORT 1
INLINE vint k_dot(const int sign, vint sum, vint w, vint x) {
  if (sign)
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x)));
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}
INLINE vint k_flush(vint sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

#elif defined(VEC_NEON)
#define N_RIGHT32(a, n) vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n))
INLINE vint n_or(vint a, vint b) { return vorrq_s32(a, b); }
INLINE vint n_bytes(const uint8_t *p) {
  const int32_t four[4] = {p[0], p[1], p[2], p[3]};
  return vld1q_s32(four);
}
INLINE vint n_half_words(const uint16_t *p) {
  return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p)));
}
INLINE vf n_as_float(vint a) { return vreinterpretq_f32_s32(a); }
INLINE vint k_table(const int8_t *values) { return vreinterpretq_s32_s8(vld1q_s8(values)); }
INLINE vint k_choose(vint table, vint codes) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(codes)));
}
#define K_SHORT 0
INLINE vint k_dot(const int sign, vint sum, vint w, vint x) {
  (void)sign;
  const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b))),
                                   vpaddlq_s16(vmull_high_s8(a, b))));
#endif
}
INLINE vint k_flush(vint sum) { return sum; }

#else
INLINE vint N_RIGHT32(vint a, int n) { N_EACH((uint32_t)a.l[i] >> n); }
INLINE vint n_or(vint a, vint b) { N_EACH(a.l[i] | b.l[i]); }
INLINE vint n_bytes(const uint8_t *p) { N_EACH(p[i]); }
INLINE vint n_half_words(const uint16_t *p) { N_EACH(p[i]); }
INLINE vint k_less(vint a, vint b) {
  uint8_t x[16], y[16];
  memcpy(x, &a, 16);
  memcpy(y, &b, 16);
  for (int i = 0; i < 16; i++) x[i] = (uint8_t)(x[i] - y[i]);
  memcpy(&a, x, 16);
  return a;
}
INLINE vf n_as_float(vint a) {
  vf r;
  memcpy(&r, &a, sizeof r);
  return r;
}
INLINE vint k_table(const int8_t *values) {
  vint r;
  memcpy(&r, values, sizeof r);
  return r;
}
INLINE vint k_choose(vint table, vint codes) {
  int8_t values[16], out[16];
  uint8_t which[16];
  memcpy(values, &table, 16);
  memcpy(which, &codes, 16);
  for (int i = 0; i < 16; i++) out[i] = values[which[i] & 15];
  return k_table(out);
}
#define K_SHORT 0
INLINE vint k_dot(const int sign, vint sum, vint w, vint x) {
  (void)sign;
  int8_t a[16], b[16];
  memcpy(a, &w, 16);
  memcpy(b, &x, 16);
  N_EACH(sum.l[i] + a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] +
         a[4 * i + 2] * b[4 * i + 2] + a[4 * i + 3] * b[4 * i + 3]);
}
INLINE vint k_flush(vint sum) { return sum; }
#endif

/* Loops over quads and lanes are unrolled where lanes are registers; the portable table would be a megabyte. */
#if defined(VEC_AVX512) || defined(VEC_AVX2) || defined(VEC_NEON)
#define K_REGISTERS 1
#define K_UNROLL UNROLL
#else
#define K_REGISTERS 0
#define K_UNROLL
#endif

#define K_EVERY(byte) n_set1((int32_t)(0x01010101u * (byte)))

#endif
