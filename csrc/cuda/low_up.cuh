/* low_up.cuh - the end of a linear: out = prior + base + bias + s h Bᵀ, and in backward dx = base + Σ s drop'(g A),
 * for a tile whose large product `base` cuBLAS has just left in float32.
 *
 * One pass reads the base product (from L2, since tiles are cut to fit there), adds everything else in float32 and
 * rounds once.  A warp has 16 rows and 32 or 64 columns; which column of a tile is which of a tensor core's is chosen so that
 * a lane ends with four neighbours.  h, A and B are taken in float32 (low_rank.cuh).
 *
 * A row of h, or of B, that is all zeros adds nothing to any bit, also where the other factor is not finite. */
#ifndef PYLORA_LOW_UP_CUH
#define PYLORA_LOW_UP_CUH

#include "low_rank.cuh"

enum { UP_ROWS = 64, UP_COLUMNS_B = 64, UP_COLUMNS_A = 32 }; /* A's columns take more registers */

/* Columns j .. j+3 of a row, of which n are there. */
DEVICE float4 up_load(const void *p, int dtype, int64_t i, int64_t n, bool vec) {
  if (vec && n >= 4) return load4(p, dtype, i);
  float4 f;
  f.x = n > 0 ? load(p, dtype, i) : 0.0f;
  f.y = n > 1 ? load(p, dtype, i + 1) : 0.0f;
  f.z = n > 2 ? load(p, dtype, i + 2) : 0.0f;
  f.w = n > 3 ? load(p, dtype, i + 3) : 0.0f;
  return f;
}

/* Which of the elements e .. e+3 of the stream are kept, a bit each. */
DEVICE uint32_t kept4(const Drop &drop, uint64_t e) {
  uint32_t bits = 0;
  ROLLED for (uint64_t b = e / 4; b <= (e + 3) / 4; b++) {
    const uint4 w = philox(drop.seed, drop.stream, b);
    const uint32_t all =
        (uint32_t)(w.x >= drop.threshold) | (uint32_t)(w.y >= drop.threshold) << 1 |
        (uint32_t)(w.z >= drop.threshold) << 2 | (uint32_t)(w.w >= drop.threshold) << 3;
    bits |= 4 * b >= e ? all << (4 * b - e) : all >> (e - 4 * b);
  }
  return bits & 15;
}

/* OF_A: the second factor is A [r,k], a column for each column of out; else B [d,r], a row. */
template <int ORDER, bool OF_A> DEVICE void low_up(const LowUp &t, const LowJobs &jobs) {
  enum { COLUMNS = OF_A ? UP_COLUMNS_A : UP_COLUMNS_B, P = COLUMNS / 16 };
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, quad = lane / 4, pair = lane % 4;
  const int64_t i0 = (int64_t)blockIdx.y * UP_ROWS + warp * 16, j0 = (int64_t)blockIdx.x * COLUMNS;
  if (i0 >= t.out.rows) return;
  float total[2][P][4]; /* [row quad, quad + 8][16 columns][4 of them] */
  UNROLL for (int e = 0; e < 2; e++) UNROLL for (int p = 0; p < P; p++) {
    const int64_t i = i0 + quad + 8 * e, j = j0 + 16 * p + 4 * pair;
    const int64_t n = i < t.out.rows ? t.out.cols - j : 0;
    float4 f = up_load(t.base, PYLORA_F32, i * t.ldb + j, t.base ? n : 0, t.vec_base);
    if (t.bias) {
      const float4 b = up_load(t.bias, PYLORA_F32, j, n, false);
      f.x += b.x, f.y += b.y, f.z += b.z, f.w += b.w;
    }
    if (t.prior.p) {
      const float4 b = up_load(t.prior.p, t.prior.dtype, i * t.prior.ld + j, n, t.vec_prior);
      f.x = b.x + f.x, f.y = b.y + f.y, f.z = b.z + f.z, f.w = b.w + f.w;
    }
    total[e][p][0] = f.x, total[e][p][1] = f.y, total[e][p][2] = f.z, total[e][p][3] = f.w;
  }

  /* The jobs of these rows: their runs follow each other (forward), or all have all rows (backward). */
  const int64_t top = t.row0 + i0, bottom = top + 16;
  int64_t low = 0, high = t.jobs; /* the first job that ends after `top` */
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const int64_t end =
        jobs.table ? jobs.table[t.first_job + middle].row0 + jobs.table[t.first_job + middle].rows
                   : jobs.few[t.first_job + middle].row0 + jobs.few[t.first_job + middle].rows;
    if (end <= top)
      low = middle + 1;
    else
      high = middle;
  }
  ROLLED for (; low < t.jobs; low++) {
    const LowJob job = job_of(jobs, t.first_job + low);
    if (job.row0 >= bottom) break;
    float sum[2 * P][4]; /* as the tensor cores leave them: tile u is columns 16 (u / 2) .. */
    UNROLL for (int u = 0; u < 2 * P; u++) UNROLL for (int e = 0; e < 4; e++) sum[u][e] = 0;
    bool row_set[2] = {false, false};
    uint32_t column_set = 0; /* a bit for each u: this lane saw a number that is not 0 */
    ROLLED for (int q = 4 * pair; q - 4 * pair < job.r; q += 16) {
      const float *const row =
          OF_A && q < job.r ? job.A + q * job.lda + t.col0 + j0 + quad / 2 * 4 + quad % 2 : nullptr;
      uint32_t a[3][4];
      UNROLL for (int e = 0; e < 2; e++) {
        const int64_t i = top + quad + 8 * e;
        const bool mine = i >= job.row0 && i < job.row0 + job.rows && i - t.row0 < t.out.rows;
        const float4 f = load_some(job.h, i * job.ldh + q, mine ? job.r - q : 0, job.vec_h);
        row_set[e] = row_set[e] || f.x != 0 || f.y != 0 || f.z != 0 || f.w != 0;
        uint32_t w[3];
        cut2(f.x, f.y, w);
        a[0][e] = w[0], a[1][e] = w[1], a[2][e] = w[2];
        cut2(f.z, f.w, w);
        a[0][2 + e] = w[0], a[1][2 + e] = w[1], a[2][2 + e] = w[2];
      }
      UNROLL for (int u = 0; u < 2 * P; u++) {
        const int64_t j = j0 + 16 * (u / 2) + quad / 2 * 4 + quad % 2 + u % 2 * 2;
        const int64_t n = j < t.out.cols ? job.r - q : 0;
        float4 f;
        if (OF_A) {
          const int c = 16 * (u / 2) + 2 * (u % 2);
          f.x = n > 0 ? row[c] : 0.0f;
          f.y = n > 1 ? row[job.lda + c] : 0.0f;
          f.z = n > 2 ? row[2 * job.lda + c] : 0.0f;
          f.w = n > 3 ? row[3 * job.lda + c] : 0.0f;
        } else {
          f = load_some(job.B, (t.col0 + j) * job.ldb + q, n, job.vec_B);
        }
        if (f.x != 0 || f.y != 0 || f.z != 0 || f.w != 0) column_set |= 1u << u;
        uint32_t b[3][2], w[3];
        cut2(f.x, f.y, w);
        b[0][0] = w[0], b[1][0] = w[1], b[2][0] = w[2];
        cut2(f.z, f.w, w);
        b[0][1] = w[0], b[1][1] = w[1], b[2][1] = w[2];
        mma_terms<PYLORA_BF16, 3, 3, ORDER>(sum[u], a, b);
      }
    }
    uint32_t keep = ALL_LANES; /* of total, four bits for each [e][p] */
    if (OF_A && job.drop.threshold) {
      keep = 0;
      ROLLED for (int n = 0; n < 2 * P; n++) {
        const int64_t i = top + quad + n / P * 8, j = t.col0 + j0 + n % P * 16 + 4 * pair;
        keep |= kept4(job.drop, (uint64_t)(job.drop.row0 + i) * (uint64_t)t.k + (uint64_t)j)
                << (4 * n);
      }
    }
    const float factor = OF_A && job.drop.threshold ? job.s * job.drop.scale : job.s;
    const uint32_t rows0 = __ballot_sync(ALL_LANES, row_set[0]),
                   rows1 = __ballot_sync(ALL_LANES, row_set[1]);
    UNROLL for (int u = 0; u < 2 * P; u++) {
      const uint32_t columns = __ballot_sync(ALL_LANES, column_set >> u & 1);
      UNROLL for (int e = 0; e < 4; e++) {
        const int p = u / 2, c = u % 2 * 2 + e % 2;
        const bool rows = ((e < 2 ? rows0 : rows1) >> (4 * quad) & 15) != 0;
        const bool column = (columns >> (4 * (2 * pair + e % 2)) & 15) != 0;
        const bool here = (keep >> (4 * P * (e / 2) + 4 * p + c) & 1) != 0;
        if (rows && column && here) total[e / 2][p][c] += factor * sum[u][e];
      }
    }
  }

  UNROLL for (int e = 0; e < 2; e++) UNROLL for (int p = 0; p < P; p++) {
    const int64_t i = i0 + quad + 8 * e, j = j0 + 16 * p + 4 * pair;
    if (i >= t.out.rows) continue;
    const int64_t at = i * t.out.ld + j;
    const float *v = total[e][p];
    if (t.vec_out && j + 4 <= t.out.cols) {
      float4 f;
      f.x = v[0], f.y = v[1], f.z = v[2], f.w = v[3];
      store4(t.out.p, t.out.dtype, at, f);
    } else {
      UNROLL for (int c = 0; c < 4; c++) if (j + c < t.out.cols)
          store(t.out.p, t.out.dtype, at + c, v[c]);
    }
  }
}

/* Strict float32: every term.  For 16-bit weights, whose adapters are rounded to 8 or 11 bits on the other side, what
 * is below 2^-21 of a product is left out. */
#define LOW_UP(name, ORDER, OF_A, BLOCKS)                                                        \
  KERNEL __launch_bounds__(LOW_THREADS, BLOCKS) pylora_low_up_##name(LowUp tile, LowJobs jobs) { \
    low_up<ORDER, OF_A>(tile, jobs);                                                             \
  }
LOW_UP(B_strict, 4, false, 3)
LOW_UP(B, 2, false, 3)
LOW_UP(A_strict, 4, true, 3)
LOW_UP(A, 2, true, 3)

#endif
