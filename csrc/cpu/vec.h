/* cpu/vec.h - the vector of floats that the kernels are written in, per instruction set.
 *
 * The including file defines exactly one of VEC_AVX512, VEC_AVX2, VEC_NEON, or none (portable).
 * v_load_n / v_store_n touch only the first n (1 <= n <= VL) elements; the other lanes are 0. */
#ifndef PYLORA_CPU_VEC_H
#define PYLORA_CPU_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER) && !defined(__clang__)
#define INLINE static __forceinline
#define NOINLINE __declspec(noinline)
#define UNROLL
#else
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define UNROLL /* checks of every access, 32 times over, take minutes to compile */
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#endif

#if defined(VEC_AVX512)

#include <immintrin.h>
#define VL 16
typedef __m512 vf;
typedef __m512i vi;
INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
INLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf v_load_n(const float *p, int n) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
}
INLINE void v_store_n(float *p, vf x, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), x);
}
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); } /* b where either is NaN */
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, 8); }
/* 2^n for whole n in [-126, 127] */
INLINE vf v_pow2(vf n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
/* a < b ? x : y */
INLINE vf v_lt(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

/* 64-bit lanes: the product of the low halves, and what Philox needs beside it */
#define VQ 8
typedef __m512i vq;
INLINE vq q_set1(uint64_t x) { return _mm512_set1_epi64((long long)x); }
INLINE vq q_load(const uint64_t *p) { return _mm512_loadu_si512(p); }
INLINE void q_store(uint64_t *p, vq x) { _mm512_storeu_si512(p, x); }
INLINE vq q_mul(vq a, vq b) { return _mm512_mul_epu32(a, b); }
INLINE vq q_xor(vq a, vq b) { return _mm512_xor_si512(a, b); }
INLINE vq q_high(vq a) { return _mm512_srli_epi64(a, 32); }

#elif defined(VEC_AVX2)

#include <immintrin.h>
#define VL 8
typedef __m256 vf;
INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
INLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE __m256i v_mask_n(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf v_load_n(const float *p, int n) { return _mm256_maskload_ps(p, v_mask_n(n)); }
INLINE void v_store_n(float *p, vf x, int n) { _mm256_maskstore_ps(p, v_mask_n(n), x); }
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_round(vf a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE vf v_pow2(vf n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vf v_lt(vf a, vf b, vf x, vf y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

#define VQ 4
typedef __m256i vq;
INLINE vq q_set1(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
INLINE vq q_load(const uint64_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
INLINE void q_store(uint64_t *p, vq x) { _mm256_storeu_si256((__m256i *)(void *)p, x); }
INLINE vq q_mul(vq a, vq b) { return _mm256_mul_epu32(a, b); }
INLINE vq q_xor(vq a, vq b) { return _mm256_xor_si256(a, b); }
INLINE vq q_high(vq a) { return _mm256_srli_epi64(a, 32); }

#elif defined(VEC_NEON)

#include <arm_neon.h>
#define VL 4
typedef float32x4_t vf;
INLINE vf v_zero(void) { return vdupq_n_f32(0); }
INLINE vf v_set1(float x) { return vdupq_n_f32(x); }
INLINE vf v_load(const float *p) { return vld1q_f32(p); }
INLINE void v_store(float *p, vf x) { vst1q_f32(p, x); }
INLINE vf v_load_n(const float *p, int n) {
  float t[4] = {0, 0, 0, 0};
  memcpy(t, p, (size_t)n * sizeof(float));
  return vld1q_f32(t);
}
INLINE void v_store_n(float *p, vf x, int n) {
  float t[4];
  vst1q_f32(t, x);
  memcpy(p, t, (size_t)n * sizeof(float));
}
INLINE vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
INLINE vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
INLINE vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
INLINE vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
INLINE vf v_lt(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
INLINE vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vf v_sqrt(vf a) { return vsqrtq_f32(a); }
INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf v_round(vf a) { return vrndnq_f32(a); }
INLINE vf v_pow2(vf n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

#define VQ 2
typedef uint64x2_t vq;
INLINE vq q_set1(uint64_t x) { return vdupq_n_u64(x); }
INLINE vq q_load(const uint64_t *p) { return vld1q_u64(p); }
INLINE void q_store(uint64_t *p, vq x) { vst1q_u64(p, x); }
INLINE vq q_mul(vq a, vq b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
INLINE vq q_xor(vq a, vq b) { return veorq_u64(a, b); }
INLINE vq q_high(vq a) { return vshrq_n_u64(a, 32); }

#else /* portable: four lanes that any compiler can turn into what the target's baseline has */

#define VL 4
#if defined(__GNUC__)
typedef float vf __attribute__((vector_size(16)));
#define LANE(x, i) ((x)[i])
#define V_BINARY(op, a, b) return (a)op(b)
#else
typedef struct vf {
  float l[4];
} vf;
#define LANE(x, i) ((x).l[i])
#define V_BINARY(op, a, b) V_EACH(LANE(a, i) op LANE(b, i))
#endif
#define V_EACH(expr)                                \
  vf r_ = {0};                                      \
  for (int i = 0; i < 4; i++) LANE(r_, i) = (expr); \
  return r_
INLINE vf v_set1(float x) { V_EACH(x); }
INLINE vf v_zero(void) { return v_set1(0); }
INLINE vf v_load(const float *p) {
  vf r;
  memcpy(&r, p, sizeof r);
  return r;
}
INLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf v_load_n(const float *p, int n) { V_EACH(i < n ? p[i] : 0.0f); }
INLINE void v_store_n(float *p, vf x, int n) { memcpy(p, &x, (unsigned)n * sizeof(float)); }
INLINE vf v_add(vf a, vf b) { V_BINARY(+, a, b); }
INLINE vf v_sub(vf a, vf b) { V_BINARY(-, a, b); }
INLINE vf v_mul(vf a, vf b) { V_BINARY(*, a, b); }
INLINE vf v_div(vf a, vf b) { V_BINARY(/, a, b); }
INLINE vf v_max(vf a, vf b) { V_EACH(LANE(a, i) > LANE(b, i) ? LANE(a, i) : LANE(b, i)); }
INLINE vf v_min(vf a, vf b) { V_EACH(LANE(a, i) < LANE(b, i) ? LANE(a, i) : LANE(b, i)); }
INLINE vf v_sqrt(vf a) { V_EACH(sqrtf(LANE(a, i))); }
INLINE vf v_fma(vf a, vf b, vf c) { return v_add(v_mul(a, b), c); } /* two roundings */
INLINE vf v_round(vf a) { V_EACH(rintf(LANE(a, i))); }
INLINE vf v_lt(vf a, vf b, vf x, vf y) {
  V_EACH(LANE(a, i) < LANE(b, i) ? LANE(x, i) : LANE(y, i));
}
INLINE vf v_pow2(vf n) {
  vf r;
  for (int i = 0; i < 4; i++) {
    const float e = LANE(n, i); /* NaN has no integer; what it is multiplied by is NaN then, too */
    uint32_t u = (uint32_t)((e >= -126 && e <= 127 ? (int32_t)e : 0) + 127) << 23;
    float f;
    memcpy(&f, &u, 4);
    LANE(r, i) = f;
  }
  return r;
}

#define VQ 1
typedef uint64_t vq;
INLINE vq q_set1(uint64_t x) { return x; }
INLINE vq q_load(const uint64_t *p) { return *p; }
INLINE void q_store(uint64_t *p, vq x) { *p = x; }
INLINE vq q_mul(vq a, vq b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
INLINE vq q_xor(vq a, vq b) { return a ^ b; }
INLINE vq q_high(vq a) { return a >> 32; }
#endif

INLINE vf v_neg(vf a) { return v_sub(v_set1(-0.0f), a); }

/* y 2^n for whole n in [-252, 254]; both factors are normal numbers, so only the result is rounded. */
INLINE vf v_scale2(vf y, vf n) {
#if defined(VEC_AVX512)
  return _mm512_scalef_ps(y, n);
#else
  vf half = v_round(v_mul(n, v_set1(0.5f)));
  return v_mul(v_mul(y, v_pow2(half)), v_pow2(v_sub(n, half)));
#endif
}

/* e^x within 2 ulp: x = n ln 2 + f, |f| <= ln 2 / 2 (n ln 2 in two parts, the first exact: Cody & Waite),
 * e^f by the minimax polynomial of Cephes' expf, times 2^n. 0 at -inf and where it underflows, with
 * subnormal results on the way; inf where it overflows; NaN at NaN. */
INLINE vf v_exp(vf x) {
  x = v_max(v_set1(-150.0f),
            v_min(v_set1(128.0f), x)); /* in this order of arguments NaN survives */
  vf n = v_round(v_mul(x, v_set1(1.44269504f)));
  vf f = v_fma(n, v_set1(-0.693359375f), x);
  f = v_fma(n, v_set1(2.12194440e-4f), f);
  vf p = v_set1(1.9875691500e-4f);
  p = v_fma(p, f, v_set1(1.3981999507e-3f));
  p = v_fma(p, f, v_set1(8.3334519073e-3f));
  p = v_fma(p, f, v_set1(4.1665795894e-2f));
  p = v_fma(p, f, v_set1(1.6666665459e-1f));
  p = v_fma(p, f, v_set1(5.0000001201e-1f));
  p = v_add(v_set1(1.0f), v_fma(p, v_mul(f, f), f));
  return v_scale2(p, n);
}

/* sigmoid(x) and sigmoid(-x), each to full relative accuracy: e = exp(-|x|) <= 1 never overflows. */
INLINE void v_sigmoid(vf x, vf *s, vf *minus) {
  vf e = v_exp(v_min(x, v_neg(x)));
  vf large = v_div(v_set1(1.0f), v_add(v_set1(1.0f), e));
  vf small = v_mul(e, large);
  *s = v_lt(x, v_zero(), small, large);
  *minus = v_lt(x, v_zero(), large, small);
}

/* tanh: a polynomial of x² where |x| is small, else 1 - 2 / (e^2|x| + 1). Infinity and NaN as in C. */
INLINE vf v_tanh(vf x) {
  const vf a = v_max(x, v_neg(x)), t = v_mul(x, x), one = v_set1(1.0f);
  vf p = v_set1(-0.00595221901f);
  p = v_fma(p, t, v_set1(0.0208728984f));
  p = v_fma(p, t, v_set1(-0.0538157448f));
  p = v_fma(p, t, v_set1(0.133324116f));
  p = v_fma(p, t, v_set1(-0.333333194f));
  const vf small = v_fma(v_mul(p, t), x, x);
  const vf large = v_sub(one, v_div(v_set1(2.0f), v_add(v_exp(v_add(a, a)), one)));
  return v_lt(a, v_set1(0.625f), small, v_lt(x, v_zero(), v_neg(large), large));
}

/* Lanes added in a fixed tree: ((0 + 8) + (4 + 12)) + ... : the same for every call. */
INLINE float v_hsum(vf x) {
  float t[VL];
  v_store(t, x);
  for (int w = VL / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] += t[i + w];
  return t[0];
}
INLINE float v_hmax(vf x) {
  float t[VL];
  v_store(t, x);
  for (int w = VL / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
  return t[0];
}

#endif
