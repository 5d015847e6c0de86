/* low_rank.cuh - what the kernels of the low-rank path share: adapters in tables, and numbers as the tensor cores take
 * them.
 *
 * The tensor cores multiply 16-bit numbers.  A factor that W's type rounds (x, dy, A and B in h = x Aᵀ and g = dy B,
 * see pylora.h) is one number of that type.  A factor that stays float32 is a sum of three bfloat16 numbers, which is
 * exact: 24 bits are three times 8.  The products of all terms are exact, too, and are summed in float32.
 * (An infinity times a number whose later terms are 0 is NaN then.) */
#ifndef PYLORA_LOW_RANK_CUH
#define PYLORA_LOW_RANK_CUH

#include "philox.cuh"

enum { LOW_UNITS = 8, LOW_FEW = 8, LOW_ROWS = 128, LOW_COLUMNS = 128, LOW_THREADS = 128 };

/* One adapter on one run of rows of one projection; in backward also where a gradient goes. */
struct LowJob {
  const float *A, *B; /* [r,k], [d,r] */
  int64_t lda, ldb;
  float *h; /* [.,r] by the rows of the whole batch: h in forward, g in backward */
  int64_t ldh;
  float *out; /* dA [r,k] or dB [d,r] */
  int64_t ldo;
  int64_t row0, rows;
  Drop drop;
  float s;
  int32_t r;
  uint8_t by_rank;             /* out is dA, a row for each rank */
  uint8_t vec_A, vec_B, vec_h; /* rows can be read in float4 */
};

/* Up to 64 ranks, in units of 8, of adapters whose factor is the same x on the same rows: x is read once for all. */
struct LowRows {
  View x;
  int64_t row0, rows;
  int64_t first; /* its first block */
  int64_t at;    /* its partial sums, in floats, for one split */
  int32_t units, vec;
};
struct LowUnit {
  int32_t job, q0;
};
struct LowGroup {
  LowRows of;
  LowUnit unit[LOW_UNITS];
};

/* Tables: a few in the kernel's arguments, more in the workspace. */
struct LowJobs {
  const LowJob *table;
  LowJob few[LOW_FEW];
};
struct LowGroups {
  const LowGroup *table;
  int32_t n;
  LowGroup few[LOW_FEW];
};
DEVICE LowJob job_of(const LowJobs &jobs, int64_t i) {
  if (jobs.table) return jobs.table[i];
  return jobs.few[i];
}
/* The group that a block belongs to. */
DEVICE int32_t group_of(const LowGroups &groups, int64_t block) {
  int32_t low = 0, high = groups.n - 1; /* the last one whose first block is not after `block` */
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if ((groups.table ? groups.table[middle].of.first : groups.few[middle].of.first) <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}
DEVICE LowRows rows_of(const LowGroups &groups, int32_t group) {
  if (groups.table) return groups.table[group].of;
  return groups.few[group].of;
}
DEVICE LowUnit unit_of(const LowGroups &groups, int32_t group, int u) {
  if (groups.table) return groups.table[group].unit[u];
  return groups.few[group].unit[u];
}

/* A tile of the end of a linear: low_up.cuh. */
struct LowUp {
  View out, prior;    /* the tile; prior.p NULL: nothing */
  const float *base;  /* [rows,cols] or NULL: zeros; may be out */
  int64_t ldb;        /* of base */
  const float *bias;  /* [cols] or NULL */
  int64_t row0, col0; /* of the tile in the whole matrix */
  int64_t k;          /* columns of the whole matrix, for dropout */
  int64_t first_job, jobs;
  int32_t vec_base, vec_out, vec_prior;
};

/* ---- numbers as words of two ------------------------------------------------------------ */

/* How many terms a factor that is rounded to type T has, and what multiplies them. */
template <int T> struct Rounded {
  enum { TERMS = T == PYLORA_F32 ? 3 : 1, MMA = T == PYLORA_F16 ? PYLORA_F16 : PYLORA_BF16 };
};

/* f as the first N of its three bfloat16 terms, each cut off, not rounded: rounding could overflow. */
template <int N> DEVICE void cut(float f, uint32_t (&t)[N]) {
  const uint32_t u = bits_of_float(f);
  t[0] = u >> 16;
  for (int i = 1; i < N; i++) t[i] = 0;
  if ((u & 0x7f800000u) == 0x7f800000u) { /* an infinity or NaN is one term */
    if (u & 0x007fffffu) t[0] |= 0x40u;
    return;
  }
  UNROLL for (int i = 1; i < N; i++) {
    f -= float_of_bits(t[i - 1] << 16);
    t[i] = bits_of_float(f) >> 16;
  }
}
template <int N> DEVICE void cut2(float a, float b, uint32_t (&w)[N]) {
  uint32_t ta[N], tb[N];
  cut(a, ta);
  cut(b, tb);
  UNROLL for (int i = 0; i < N; i++) w[i] = ta[i] | tb[i] << 16;
}
/* a and b rounded to T, a word for each term. */
template <int T> DEVICE void round2(float a, float b, uint32_t (&w)[Rounded<T>::TERMS]) {
  if (T == PYLORA_F32)
    cut2(a, b, w);
  else if (T == PYLORA_BF16)
    w[0] = round_bf16(a) | (uint32_t)round_bf16(b) << 16;
  else
    w[0] = round_f16(a) | (uint32_t)round_f16(b) << 16;
}

/* Four floats side by side from p[at] on, of which n are there (any number, also below 0); the others are 0. */
DEVICE float4 load_some(const float *p, int64_t at, int64_t n, bool vec) {
  float4 f;
  f.x = f.y = f.z = f.w = 0;
  if (n <= 0) return f;
  p += at;
  if (n >= 4 && vec) return *(const float4 *)p;
  f.x = p[0];
  if (n > 1) f.y = p[1];
  if (n > 2) f.z = p[2];
  if (n > 3) f.w = p[3];
  return f;
}

/* Elements e .. e+7 of the stream that `drop` names: kept and scaled, or 0. */
DEVICE void drop8(const Drop &drop, uint64_t e, float (&v)[8]) {
  if (e % 4 == 0) {
    UNROLL for (int i = 0; i < 8; i += 4) {
      float4 f;
      f.x = v[i], f.y = v[i + 1], f.z = v[i + 2], f.w = v[i + 3];
      f = dropped(drop, e / 4 + i / 4, f);
      v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
    }
    return;
  }
  ROLLED for (int b = 0; b < 3; b++) { /* eight elements touch three blocks of four */
    const uint4 w = philox(drop.seed, drop.stream, e / 4 + b);
    UNROLL for (int i = 0; i < 8; i++) {
      const int at = (int)(e % 4) + i - 4 * b;
      const uint32_t word = at == 0 ? w.x : at == 1 ? w.y : at == 2 ? w.z : w.w;
      if (at >= 0 && at < 4) v[i] = word >= drop.threshold ? v[i] * drop.scale : 0.0f;
    }
  }
}

/* Eight elements from element i on of p, of which `n` are there; the others are 0. */
DEVICE void load8(const void *p, int dtype, int64_t i, int64_t n, bool vec, float (&v)[8]) {
  if (vec && n >= 8) {
    const float4 a = load4(p, dtype, i), b = load4(p, dtype, i + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    UNROLL for (int e = 0; e < 8; e++) v[e] = e < n ? load(p, dtype, i + e) : 0.0f;
  }
}

/* Eight elements rounded to T, as four words of each term. */
template <int T>
DEVICE void words8(const void *p, int dtype, int64_t i, int64_t n, bool vec,
                   uint32_t (&w)[4][Rounded<T>::TERMS]) {
  if (T != PYLORA_F32 && dtype == T && vec && n >= 8) {
    const uint4 u = *(const uint4 *)((const uint16_t *)p + i);
    w[0][0] = u.x, w[1][0] = u.y, w[2][0] = u.z, w[3][0] = u.w;
    return;
  }
  float v[8];
  load8(p, dtype, i, n, vec, v);
  UNROLL for (int j = 0; j < 4; j++) round2<T>(v[2 * j], v[2 * j + 1], w[j]);
}

/* d += a b over all pairs of terms whose numbers add up to at most ORDER: what is left out is smaller than the sum
 * by 2^-(8 ORDER). */
template <int MMA, int NA, int NB, int ORDER>
DEVICE void mma_terms(float (&d)[4], const uint32_t (&a)[NA][4], const uint32_t (&b)[NB][2]) {
  UNROLL for (int o = ORDER; o >= 0; o--) /* the small ones first */
      UNROLL for (int i = 0; i < NA; i++) if (o - i >= 0 && o - i < NB)
          mma_16816<MMA>(d, a[i], b[o - i]);
}

#endif
