/* low_down.cuh - h = drop(x) Aᵀ, and in backward g = dy B: many columns in, few ranks out.
 *
 * A block has 128 rows of x and up to 64 ranks, of several adapters; a warp 32 rows.  A lane reads 16 bytes of a row,
 * eight neighbours, and multiplies them as they lie: which of the 16 terms of a tensor core's product a number is does
 * not matter as long as both factors agree.  So x goes from memory to the tensor cores without shared memory.  A and B
 * are rounded once for the block, into shared memory.
 *
 * The terms are split over blocks where rows are few; the partial sums are added in one order by pylora_low_reduce. */
#ifndef PYLORA_LOW_DOWN_CUH
#define PYLORA_LOW_DOWN_CUH

#include "low_rank.cuh"

/* OF_B: the factor is B [d,r], a row for each term of the sum; else A [r,k].  no partial: one split. */
template <int T, bool OF_B>
DEVICE void low_down(const LowJobs &jobs, const LowGroups &groups, float *partial) {
  enum { N = Rounded<T>::TERMS, MMA = Rounded<T>::MMA, U = N == 3 ? 2 : LOW_UNITS, RANKS = 8 * U };
  SHARED(uint16_t, factor, 2 * N * RANKS * 32); /* [buffer][term][rank][32 terms of the sum] */
  const int32_t group = group_of(groups, blockIdx.x);
  const LowRows g = rows_of(groups, group);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, quad = lane / 4, pair = lane % 4;
  const int64_t k = g.x.cols, splits = gridDim.y, split = blockIdx.y;
  const int64_t piece = (k + 32 * splits - 1) / (32 * splits) * 32;
  const int64_t begin = split * piece, end = begin + piece < k ? begin + piece : k;
  const int64_t i0 = (blockIdx.x - g.first) * LOW_ROWS + warp * 32 + quad;
  Drop drop = job_of(jobs, unit_of(groups, group, 0).job).drop; /* a group of its own then */
  if (OF_B) drop.threshold = 0;                                 /* dy is not dropped */

  /* The part of the factor that this thread brings: 16 numbers. */
  const int unit = OF_B ? (int)threadIdx.x / 32 * 2 : (int)threadIdx.x / 16;
  const float *from[2] = {nullptr, nullptr};
  int64_t stride[2] = {0, 0};
  int ranks[2] = {0, 0};
  bool vec[2] = {false, false};
  UNROLL for (int e = 0; e < (OF_B ? 2 : 1); e++) {
    if (unit + e >= g.units) continue;
    const LowUnit its = unit_of(groups, group, unit + e);
    const LowJob job = job_of(jobs, its.job);
    const int q = its.q0 + (OF_B ? 0 : (int)threadIdx.x / 2 % 8);
    ranks[e] = job.r - q;
    from[e] = OF_B ? job.B + q : job.A + q * job.lda;
    vec[e] = OF_B ? job.vec_B : job.vec_A;
    stride[e] = job.ldb;
  }

  float acc[2][U][4];
  UNROLL for (int m = 0; m < 2; m++) UNROLL for (int u = 0; u < U; u++)
      UNROLL for (int e = 0; e < 4; e++) acc[m][u][e] = 0;

  int buffer = 0;
  ROLLED for (int64_t t = begin; t < end; t += 32, buffer ^= 1) {
    float4 f[4];
    if (OF_B) {
      const int64_t at = t + lane;
      UNROLL for (int e = 0; e < 2; e++) UNROLL for (int c = 0; c < 2; c++) {
        const int64_t n = at < end ? ranks[e] - 4 * c : 0;
        f[2 * e + c] = load_some(from[e], at * stride[e] + 4 * c, n, vec[e]);
      }
    } else {
      const int64_t at = t + threadIdx.x % 2 * 16;
      UNROLL for (int c = 0; c < 4; c++) f[c] =
          load_some(from[0], at + 4 * c, ranks[0] > 0 ? end - at - 4 * c : 0, vec[0]);
    }
    uint32_t x[2][2][4][N];
    UNROLL for (int m = 0; m < 2; m++) UNROLL for (int e = 0; e < 2; e++) {
      const int64_t i = i0 + 16 * m + 8 * e, at = t + 8 * pair;
      const int64_t row = g.row0 + i, n = i < g.rows ? end - at : 0;
      if (drop.threshold == 0) {
        words8<T>(g.x.p, g.x.dtype, row * g.x.ld + at, n, g.vec, x[m][e]);
      } else {
        float v[8];
        load8(g.x.p, g.x.dtype, row * g.x.ld + at, n, g.vec, v);
        if (n > 0) drop8(drop, (uint64_t)(drop.row0 + row) * (uint64_t)k + (uint64_t)at, v);
        UNROLL for (int j = 0; j < 4; j++) round2<T>(v[2 * j], v[2 * j + 1], x[m][e][j]);
      }
    }
    uint16_t *const to = factor + buffer * (N * RANKS * 32);
    if (unit < U) {
      const float v[16] = {f[0].x, f[0].y, f[0].z, f[0].w, f[1].x, f[1].y, f[1].z, f[1].w,
                           f[2].x, f[2].y, f[2].z, f[2].w, f[3].x, f[3].y, f[3].z, f[3].w};
      UNROLL for (int j = 0; j < 8; j++) {
        uint32_t w[N];
        round2<T>(v[2 * j], v[2 * j + 1], w);
        UNROLL for (int n = 0; n < N; n++) if (OF_B) {
          const int rank = unit * 8 + 2 * j;
          if (rank < RANKS) {
            to[(n * RANKS + rank) * 32 + lane] = (uint16_t)w[n];
            to[(n * RANKS + rank + 1) * 32 + lane] = (uint16_t)(w[n] >> 16);
          }
        }
        else {
          const int rank = (int)threadIdx.x / 2, word = (int)threadIdx.x % 2 * 8 + j;
          *(uint32_t *)(to + (n * RANKS + rank) * 32 + 2 * word) = w[n];
        }
      }
    }
    __syncthreads(); /* two buffers: who is ahead writes the other one */
    UNROLL for (int u = 0; u < U; u++) {
      if (u >= g.units) break;
      uint32_t w[4][N];
      UNROLL for (int n = 0; n < N; n++) {
        const uint4 q = *(const uint4 *)(to + (n * RANKS + u * 8 + quad) * 32 + 8 * pair);
        w[0][n] = q.x, w[1][n] = q.y, w[2][n] = q.z, w[3][n] = q.w;
      }
      UNROLL for (int half = 0; half < 2; half++) {
        uint32_t b[N][2];
        UNROLL for (int n = 0; n < N; n++) b[n][0] = w[2 * half][n], b[n][1] = w[2 * half + 1][n];
        UNROLL for (int m = 0; m < 2; m++) {
          uint32_t a[N][4];
          UNROLL for (int n = 0; n < N; n++) {
            a[n][0] = x[m][0][2 * half][n], a[n][1] = x[m][1][2 * half][n];
            a[n][2] = x[m][0][2 * half + 1][n], a[n][3] = x[m][1][2 * half + 1][n];
          }
          mma_terms<MMA, N, N, 2 * (N - 1)>(acc[m][u], a, b);
        }
      }
    }
  }

  UNROLL for (int u = 0; u < U; u++) {
    if (u >= g.units) break;
    const LowUnit unit = unit_of(groups, group, u);
    const LowJob job = job_of(jobs, unit.job);
    UNROLL for (int m = 0; m < 2; m++) UNROLL for (int e = 0; e < 4; e++) {
      const int64_t i = i0 + 16 * m + e / 2 * 8;
      const int q = 2 * pair + e % 2;
      if (i >= g.rows || unit.q0 + q >= job.r) continue;
      if (partial)
        partial[g.at * splits + (split * g.rows + i) * (8 * g.units) + 8 * u + q] = acc[m][u][e];
      else
        job.h[(g.row0 + i) * job.ldh + unit.q0 + q] = acc[m][u][e];
    }
  }
}

#define LOW_DOWN(T, name, OF_B)                                                \
  KERNEL __launch_bounds__(LOW_THREADS, T == PYLORA_F32 ? 2 : 3)               \
      pylora_low_down_##name(LowJobs jobs, LowGroups groups, float *partial) { \
    low_down<T, OF_B>(jobs, groups, partial);                                  \
  }
LOW_DOWN(PYLORA_F32, A_f32, false)
LOW_DOWN(PYLORA_BF16, A_bf16, false)
LOW_DOWN(PYLORA_F16, A_f16, false)
LOW_DOWN(PYLORA_F32, B_f32, true)
LOW_DOWN(PYLORA_BF16, B_bf16, true)
LOW_DOWN(PYLORA_F16, B_f16, true)

/* The sums of the parts, in their order: blocks as of low_down, and a unit of 8 ranks each. */
KERNEL pylora_low_reduce(LowJobs jobs, LowGroups groups, const float *partial, int32_t splits) {
  const int32_t group = group_of(groups, blockIdx.x);
  const LowRows g = rows_of(groups, group);
  const int u = blockIdx.y;
  if (u >= g.units) return;
  const LowUnit unit = unit_of(groups, group, u);
  const LowJob job = job_of(jobs, unit.job);
  const int64_t first = (blockIdx.x - g.first) * LOW_ROWS;
  for (int n = threadIdx.x; n < LOW_ROWS * 8; n += blockDim.x) {
    const int64_t i = first + n / 8;
    const int q = n % 8;
    if (i >= g.rows || unit.q0 + q >= job.r) continue;
    const float *p = partial + g.at * splits + i * (8 * g.units) + 8 * u + q;
    const int64_t step = g.rows * (8 * g.units);
    float sum = 0;
    for (int s = 0; s < splits; s++) sum += p[s * step];
    job.h[(g.row0 + i) * job.ldh + unit.q0 + q] = sum;
  }
}

/* A table from a kernel's arguments into the workspace: no copy from the host, so that it can be captured. */
struct LowBlob {
  uint32_t words[896];
};
KERNEL pylora_low_table(LowBlob blob, uint32_t *to, int32_t n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = blob.words[i];
}

#endif
