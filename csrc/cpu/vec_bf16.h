/* cpu/vec_bf16.h - vectors of bfloat16 pairs, for gemm_bf16.inc.
 *
 * A bfloat16 is the upper half of a float32.  A vp holds VL pairs, each in one 32-bit word whose lower
 * half is the even element, so that either is widened by one operation: exactly. */
#ifndef PYLORA_CPU_VEC_BF16_H
#define PYLORA_CPU_VEC_BF16_H

#include "vec.h"

INLINE uint32_t pair_at(const uint16_t *p) {
  uint32_t u;
  memcpy(&u, p, 4);
  return u;
}

#if defined(VEC_AVX512)

typedef __m512i vp;
INLINE vp p_load(const uint16_t *p) { return _mm512_loadu_si512(p); }
INLINE vp p_load_n(const uint16_t *p, int n) { /* n pairs */
  return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1u), p);
}
INLINE vp p_set1(const uint16_t *p) { return _mm512_set1_epi32((int)pair_at(p)); }
INLINE vf p_even(vp x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
INLINE vf p_odd(vp x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)));
}

#elif defined(VEC_AVX2)

typedef __m256i vp;
INLINE vp p_load(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
INLINE vp p_load_n(const uint16_t *p, int n) {
  return _mm256_castps_si256(_mm256_maskload_ps((const float *)(const void *)p, v_mask_n(n)));
}
INLINE vp p_set1(const uint16_t *p) { return _mm256_set1_epi32((int)pair_at(p)); }
INLINE vf p_even(vp x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
INLINE vf p_odd(vp x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000u)));
}

#elif defined(VEC_NEON)

typedef uint32x4_t vp;
INLINE vp p_load(const uint16_t *p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
INLINE vp p_load_n(const uint16_t *p, int n) {
  uint16_t t[8] = {0};
  memcpy(t, p, (size_t)n * 4);
  return p_load(t);
}
INLINE vp p_set1(const uint16_t *p) { return vdupq_n_u32(pair_at(p)); }
INLINE vf p_even(vp x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); }
INLINE vf p_odd(vp x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))); }

#else

#if defined(__GNUC__)
typedef uint32_t vp __attribute__((vector_size(16)));
#else
typedef struct vp {
  uint32_t l[4];
} vp;
#endif
INLINE vp p_load(const uint16_t *p) {
  vp r;
  memcpy(&r, p, sizeof r);
  return r;
}
INLINE vp p_load_n(const uint16_t *p, int n) {
  vp r = {0};
  memcpy(&r, p, (size_t)n * 4);
  return r;
}
#if defined(__GNUC__)
INLINE vp p_set1(const uint16_t *p) {
  const uint32_t u = pair_at(p);
  return (vp){u, u, u, u};
}
INLINE vf p_even(vp x) { return (vf)(x << 16); }
INLINE vf p_odd(vp x) { return (vf)(x & 0xffff0000u); }
#else
INLINE vp p_set1(const uint16_t *p) {
  const uint32_t u = pair_at(p);
  vp r = {{u, u, u, u}};
  return r;
}
INLINE vf p_even(vp x) {
  vf r;
  for (int i = 0; i < 4; i++) x.l[i] <<= 16;
  memcpy(&r, &x, sizeof r);
  return r;
}
INLINE vf p_odd(vp x) {
  vf r;
  for (int i = 0; i < 4; i++) x.l[i] &= 0xffff0000u;
  memcpy(&r, &x, sizeof r);
  return r;
}
#endif
#endif

/* acc + a b over both elements of each pair: the odd ones first. */
#if defined(VEC_BF16)
INLINE __m512bh p_bits(vp x) {
#if defined(_MSC_VER) && !defined(__clang__)
  __m512bh r; /* no cast between these types there */
  memcpy(&r, &x, sizeof r);
  return r;
#else
  return (__m512bh)x;
#endif
}
INLINE vf p_dot(vp a, vp b, vf acc) { return _mm512_dpbf16_ps(acc, p_bits(a), p_bits(b)); }
#else
INLINE vf p_dot(vp a, vp b, vf acc) {
  return v_fma(p_even(a), p_even(b), v_fma(p_odd(a), p_odd(b), acc));
}
#endif

/* To the nearest, to even between two; NaN keeps its sign and upper bits and becomes quiet. */
INLINE uint16_t bf16_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (x != x) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE float float_of_bf16(uint16_t x) {
  const uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

/* VL of them widened, or the first n; VL floats rounded. */
#if defined(VEC_AVX512)
INLINE vf v_of_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE __m256i v_to_bf16(vf x) {
#if defined(VEC_BF16) && !(defined(_MSC_VER) && !defined(__clang__))
  /* The instruction takes subnormal numbers for 0, which other tables keep. */
  if (!_mm512_fpclass_ps_mask(x, 0x20)) return (__m256i)_mm512_cvtneps_pbh(x);
#endif
  const __m512i u = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u,
                           _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
INLINE vf v_load_bf16(const uint16_t *p) {
  return v_of_bf16(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
INLINE vf v_load_bf16_n(const uint16_t *p, int n) {
  return v_of_bf16(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1u), p));
}
INLINE void v_store_bf16(uint16_t *p, vf x) {
  _mm256_storeu_si256((__m256i *)(void *)p, v_to_bf16(x));
}
INLINE void v_store_bf16_n(uint16_t *p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), v_to_bf16(x));
}
#elif defined(VEC_AVX2)
INLINE vf v_load_bf16(const uint16_t *p) {
  const __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
INLINE vf v_load_bf16_n(const uint16_t *p, int n) {
  uint16_t t[VL] = {0};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return v_load_bf16(t);
}
INLINE void v_store_bf16(uint16_t *p, vf x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
  /* Within each 128 bits four numbers, then the same again. */
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
}
INLINE void v_store_bf16_n(uint16_t *p, vf x, int n) {
  uint16_t t[VL];
  v_store_bf16(t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
}
#else
INLINE vf v_load_bf16(const uint16_t *p) {
  float t[VL];
  for (int i = 0; i < VL; i++) t[i] = float_of_bf16(p[i]);
  return v_load(t);
}
INLINE vf v_load_bf16_n(const uint16_t *p, int n) {
  float t[VL];
  for (int i = 0; i < VL; i++) t[i] = i < n ? float_of_bf16(p[i]) : 0.0f;
  return v_load(t);
}
INLINE void v_store_bf16(uint16_t *p, vf x) {
  float t[VL];
  v_store(t, x);
  for (int i = 0; i < VL; i++) p[i] = bf16_of(t[i]);
}
INLINE void v_store_bf16_n(uint16_t *p, vf x, int n) {
  float t[VL];
  v_store(t, x);
  for (int i = 0; i < n; i++) p[i] = bf16_of(t[i]);
}
#endif

#endif
