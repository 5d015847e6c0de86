/* cpu/vec_q.h - vectors of 32-bit lanes, in which gemm_q.inc and its kin are written, and how panels of quantized
 * weights and rows of x lie (format_q.h).
 *
 * As many lanes as vec.h has floats.  Halves of a lane are the 16-bit numbers in it. */
#ifndef PYLORA_CPU_VEC_Q_H
#define PYLORA_CPU_VEC_Q_H

#include "vec.h"
#include "formats/format_q.h"
#include "formats/half.h"

#if defined(VEC_AVX512)
typedef __m512i vint;
INLINE vint n_zero(void) { return _mm512_setzero_si512(); }
INLINE vint n_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vint n_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void n_store(void *p, vint x) { _mm512_storeu_si512(p, x); }
INLINE vint n_add(vint a, vint b) { return _mm512_add_epi32(a, b); }
INLINE vint n_and(vint a, vint b) { return _mm512_and_si512(a, b); }
INLINE vint n_max(vint a, vint b) { return _mm512_max_epi32(a, b); }
#define N_LEFT16(a, n) _mm512_slli_epi16(a, n)   /* halves of a lane */
#define N_RIGHT16(a, n) _mm512_srli_epi16(a, n)  /* unsigned */
#define N_SRIGHT16(a, n) _mm512_srai_epi16(a, n) /* signed */
#define N_LEFT32(a, n) _mm512_slli_epi32(a, n)
#define N_SRIGHT32(a, n) _mm512_srai_epi32(a, n)
INLINE vint n_dot(vint sum, vint a, vint b) { /* sum + a.low b.low + a.high b.high */
#if defined(VEC_VNNI)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
#if defined(VEC_VNNI)
#define Q_BYTES 1 /* rows of x are bytes: unsigned bytes of W times signed ones of x */
INLINE vint n_dot4(vint sum, vint a, vint b) { return _mm512_dpbusd_epi32(sum, a, b); }
INLINE vint n_xor(vint a, vint b) { return _mm512_xor_si512(a, b); }
INLINE vint n_join16(vint a, vint b) { /* the lower halves of lanes, those of a first */
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)),
                            _mm512_cvtepi32_epi16(b), 1);
}
#endif
INLINE int32_t n_top(vint a) { return _mm512_reduce_max_epi32(a); }
INLINE int32_t n_total(vint a) { return _mm512_reduce_add_epi32(a); }
INLINE vf n_float(vint a) { return _mm512_cvtepi32_ps(a); }
INLINE vint n_round(vf x) { return _mm512_cvtps_epi32(x); }
INLINE vint n_bits(vf x) { return _mm512_castps_si512(x); }
INLINE void n_store16(int16_t *p, vint x) {
  _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(x));
}
INLINE vf n_half(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

#elif defined(VEC_AVX2)
typedef __m256i vint;
INLINE vint n_zero(void) { return _mm256_setzero_si256(); }
INLINE vint n_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vint n_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE void n_store(void *p, vint x) { _mm256_storeu_si256(p, x); }
INLINE vint n_add(vint a, vint b) { return _mm256_add_epi32(a, b); }
INLINE vint n_and(vint a, vint b) { return _mm256_and_si256(a, b); }
INLINE vint n_max(vint a, vint b) { return _mm256_max_epi32(a, b); }
#define N_LEFT16(a, n) _mm256_slli_epi16(a, n)
#define N_RIGHT16(a, n) _mm256_srli_epi16(a, n)
#define N_SRIGHT16(a, n) _mm256_srai_epi16(a, n)
#define N_LEFT32(a, n) _mm256_slli_epi32(a, n)
#define N_SRIGHT32(a, n) _mm256_srai_epi32(a, n)
INLINE vint n_dot(vint sum, vint a, vint b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
INLINE int32_t n_top(vint a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
INLINE int32_t n_total(vint a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
INLINE vf n_float(vint a) { return _mm256_cvtepi32_ps(a); }
INLINE vint n_round(vf x) { return _mm256_cvtps_epi32(x); }
INLINE vint n_bits(vf x) { return _mm256_castps_si256(x); }
INLINE void n_store16(int16_t *p, vint x) {
  __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
  _mm_storeu_si128((__m128i *)(void *)p, _mm_packs_epi32(low, high));
}
INLINE vf n_half(const uint16_t *p) { /* not every processor with AVX2 need have F16C */
  __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
  __m256i size = _mm256_and_si256(h, _mm256_set1_epi32(0x7fff));
  __m256i odd = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7bff)); /* infinite or NaN */
  vf v = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(size, 13)), _mm256_set1_ps(0x1p112f));
  __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(h, 15), 31);
  __m256i top = _mm256_and_si256(odd, _mm256_set1_epi32(0x7f800000));
  return _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_or_si256(sign, top)));
}

#elif defined(VEC_NEON)
typedef int32x4_t vint;
INLINE vint n_zero(void) { return vdupq_n_s32(0); }
INLINE vint n_set1(int32_t x) { return vdupq_n_s32(x); }
INLINE vint n_load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
INLINE void n_store(void *p, vint x) { vst1q_u8(p, vreinterpretq_u8_s32(x)); }
INLINE vint n_add(vint a, vint b) { return vaddq_s32(a, b); }
INLINE vint n_and(vint a, vint b) { return vandq_s32(a, b); }
INLINE vint n_max(vint a, vint b) { return vmaxq_s32(a, b); }
#define N_LEFT16(a, n) vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(a), n))
#define N_RIGHT16(a, n) vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(a), n))
#define N_SRIGHT16(a, n) vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(a), n))
#define N_LEFT32(a, n) vshlq_n_s32(a, n)
#define N_SRIGHT32(a, n) vshrq_n_s32(a, n)
INLINE vint n_dot(vint sum, vint a, vint b) {
  int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  return vaddq_s32(sum,
                   vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}
INLINE int32_t n_top(vint a) { return vmaxvq_s32(a); }
INLINE int32_t n_total(vint a) { return vaddvq_s32(a); }
INLINE vf n_float(vint a) { return vcvtq_f32_s32(a); }
INLINE vint n_round(vf x) { return vcvtnq_s32_f32(x); }
INLINE vint n_bits(vf x) { return vreinterpretq_s32_f32(x); }
INLINE void n_store16(int16_t *p, vint x) { vst1_s16(p, vmovn_s32(x)); }
INLINE vf n_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

#else /* portable: loops over the four lanes; shifts through unsigned, where C defines them */
typedef struct vint {
  int32_t l[4];
} vint;
#define N_EACH(expr)                                     \
  vint r_;                                               \
  for (int i = 0; i < 4; i++) r_.l[i] = (int32_t)(expr); \
  return r_
INLINE int32_t lane_low(int32_t a) { return (int16_t)((uint32_t)a & 0xffff); }
INLINE int32_t lane_high(int32_t a) { return (int16_t)((uint32_t)a >> 16); }
INLINE uint32_t lane_join(uint32_t low, uint32_t high) { return (low & 0xffff) | high << 16; }
INLINE vint n_set1(int32_t x) { N_EACH(x); }
INLINE vint n_zero(void) { return n_set1(0); }
INLINE vint n_load(const void *p) {
  vint r;
  memcpy(&r, p, sizeof r);
  return r;
}
INLINE void n_store(void *p, vint x) { memcpy(p, &x, sizeof x); }
INLINE vint n_add(vint a, vint b) { N_EACH(a.l[i] + b.l[i]); }
INLINE vint n_and(vint a, vint b) { N_EACH(a.l[i] & b.l[i]); }
INLINE vint n_max(vint a, vint b) { N_EACH(a.l[i] > b.l[i] ? a.l[i] : b.l[i]); }
INLINE vint N_LEFT16(vint a, int n) {
  N_EACH(lane_join((uint32_t)a.l[i] << n, (uint32_t)a.l[i] >> 16 << n));
}
INLINE vint N_RIGHT16(vint a, int n) {
  N_EACH(lane_join(((uint32_t)a.l[i] & 0xffff) >> n, (uint32_t)a.l[i] >> 16 >> n));
}
INLINE vint N_SRIGHT16(vint a, int n) {
  N_EACH(lane_join((uint32_t)(lane_low(a.l[i]) >> n), (uint32_t)(lane_high(a.l[i]) >> n)));
}
INLINE vint N_LEFT32(vint a, int n) { N_EACH((uint32_t)a.l[i] << n); }
INLINE vint N_SRIGHT32(vint a, int n) { N_EACH(a.l[i] >> n); }
INLINE vint n_dot(vint sum, vint a, vint b) {
  N_EACH(sum.l[i] + lane_low(a.l[i]) * lane_low(b.l[i]) + lane_high(a.l[i]) * lane_high(b.l[i]));
}
INLINE int32_t n_top(vint a) {
  int32_t top = a.l[0];
  for (int i = 1; i < 4; i++) top = a.l[i] > top ? a.l[i] : top;
  return top;
}
INLINE int32_t n_total(vint a) { return a.l[0] + a.l[1] + a.l[2] + a.l[3]; }
INLINE vf n_float(vint a) { V_EACH((float)a.l[i]); }
INLINE vint n_round(vf x) { N_EACH(rintf(LANE(x, i))); } /* numbers of codes, so always in range */
INLINE vint n_bits(vf x) {
  vint r;
  memcpy(&r, &x, sizeof r);
  return r;
}
INLINE void n_store16(int16_t *p, vint x) {
  for (int i = 0; i < 4; i++) p[i] = (int16_t)x.l[i];
}
INLINE vf n_half(const uint16_t *p) { V_EACH(from_half(p[i])); }
#endif

#if !defined(Q_BYTES)
#define Q_BYTES 0
#endif

enum { Q_PANEL = 32 };

/* Of a kind of blocks (pylora_q_kind): bytes of a group of a panel, ... */
INLINE int64_t q_bytes(int kind) {
  return kind == PYLORA_Q8_0 ? PYLORA_Q8_BYTES
                             : (kind == PYLORA_Q4_0 ? PYLORA_Q4_0_BYTES : PYLORA_Q4_1_BYTES);
}
/* ... and arrays of 32 x 2 uint16 in it, and so pairs of inputs in each. */
INLINE int q_arrays(int kind) { return kind == PYLORA_Q8_0 ? 8 : 4; }

/* Which of eight inputs is number i of two quads. */
#define Q_ORDER(kind, i)                                               \
  ((kind) == PYLORA_Q8_0 ? ((i) & 4) | ((i) & 1) << 1 | ((i) >> 1 & 1) \
                         : ((i) >> 2 & 1) << 1 | ((i) & 1) << 2 | ((i) >> 1 & 1))

/* 32 codes of x -> their low and high bytes, each in the order of a panel's quads. */
#if defined(VEC_AVX512)
INLINE void q_split_words(const int kind, __m512i x, int8_t *low, int8_t *high) {
  const __m512i up = _mm512_add_epi16(x, _mm512_set1_epi16(128)); /* its upper byte */
  const __m512i both = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaau, x, up);
  /* Within each 128 bits: eight low bytes, then eight high ones. */
#define AT(i) (char)(2 * Q_ORDER(kind, i)), (char)(2 * Q_ORDER(kind, i + 1))
#define AT1(i) (char)(2 * Q_ORDER(kind, i) + 1), (char)(2 * Q_ORDER(kind, i + 1) + 1)
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_setr_epi8(AT(0), AT(2), AT(4), AT(6), AT1(0), AT1(2), AT1(4), AT1(6)));
#undef AT
#undef AT1
  const __m512i apart = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
                                                 _mm512_shuffle_epi8(both, order));
  _mm256_storeu_si256((__m256i *)(void *)low, _mm512_castsi512_si256(apart));
  _mm256_storeu_si256((__m256i *)(void *)high, _mm512_extracti64x4_epi64(apart, 1));
}
#endif
INLINE void q_split(const int kind, const int16_t *code, int8_t *low, int8_t *high) {
#if defined(VEC_AVX512)
  q_split_words(kind, _mm512_loadu_si512(code), low, high);
#else
  for (int t = 0; t < PYLORA_QGROUP; t += 8)
    for (int i = 0; i < 8; i++) {
      const int c = code[t + Q_ORDER(kind, i)], l = (int8_t)(uint8_t)((unsigned)c & 0xff);
      low[t + i] = (int8_t)l;
      high[t + i] = (int8_t)((c - l) / 256);
    }
#endif
}

#endif
