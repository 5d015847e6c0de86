/* low_outer.cuh - dB = s dyᵀ h and dA = s gᵀ drop(x): sums over the rows.
 *
 * A block has 128 columns of dy or x and up to 64 ranks; x is read once for the adapters of all its projections (with
 * dropout: once for each).  Numbers are taken as they are, in 1, 2 or 3 bfloat16 terms as their type needs, and h and
 * g in 3: the products are exact.  Dropout's mask is applied to x, and its 1 / (1 - p) to the sum.
 *
 * The rows are split over blocks; pylora_outer_reduce adds the parts in one order. */
#ifndef PYLORA_LOW_OUTER_CUH
#define PYLORA_LOW_OUTER_CUH

#include "low_rank.cuh"

DEVICE void outer_store(const LowJob &job, int64_t q, int64_t c, float sum) {
  const float s = job.drop.threshold ? job.s * job.drop.scale : job.s;
  job.out[job.by_rank ? q * job.ldo + c : c * job.ldo + q] = s * sum;
}

/* NX: terms of a number of x.  no partial: one split. */
template <int NX>
DEVICE void low_outer(const LowJobs &jobs, const LowGroups &groups, float *partial) {
  enum { STEP = 32, LDX = LOW_COLUMNS + 8, LDH = 8 * LOW_UNITS + 8 }; /* + 8: banks */
  SHARED(uint16_t, xs, NX * STEP * LDX);                              /* [term][row][column] */
  SHARED(uint32_t, hs, 3 * STEP / 2 * LDH); /* [term][pair of rows][rank] */
  const int32_t group = group_of(groups, blockIdx.x);
  const LowRows g = rows_of(groups, group);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, quad = lane / 4, pair = lane % 4;
  const int64_t m = g.x.rows, columns = g.x.cols, splits = gridDim.y, split = blockIdx.y;
  const int64_t piece = (m + STEP * splits - 1) / (STEP * splits) * STEP;
  const int64_t begin = split * piece, end = begin + piece < m ? begin + piece : m;
  const int64_t c0 = (blockIdx.x - g.first) * LOW_COLUMNS;
  Drop drop = job_of(jobs, unit_of(groups, group, 0).job).drop;
  drop.scale = 1; /* the mask alone */

  /* The ranks that this thread brings: unit threadIdx.x % 8, of two rows. */
  const int unit = threadIdx.x % 8;
  const float *h = nullptr;
  int64_t ldh = 0;
  int ranks = 0;
  bool vec_h = false;
  if (unit < g.units) {
    const LowUnit its = unit_of(groups, group, unit);
    const LowJob job = job_of(jobs, its.job);
    h = job.h + its.q0;
    ldh = job.ldh, ranks = job.r - its.q0, vec_h = job.vec_h;
  }

  float acc[2][LOW_UNITS][4];
  UNROLL for (int a = 0; a < 2; a++) UNROLL for (int u = 0; u < LOW_UNITS; u++)
      UNROLL for (int e = 0; e < 4; e++) acc[a][u][e] = 0;

  ROLLED for (int64_t i0 = begin; i0 < end; i0 += STEP) {
    __syncthreads(); /* the step before is done with */
    UNROLL for (int part = 0; part < 4; part++) {
      const int row = (int)threadIdx.x / 16 + 8 * part, column = (int)threadIdx.x % 16 * 8;
      const int64_t i = i0 + row, c = c0 + column, n = i < end ? columns - c : 0;
      float v[8];
      load8(g.x.p, g.x.dtype, i * g.x.ld + c, n, g.vec, v);
      if (drop.threshold && n > 0)
        drop8(drop, (uint64_t)(drop.row0 + i) * (uint64_t)columns + (uint64_t)c, v);
      uint32_t w[4][NX];
      UNROLL for (int j = 0; j < 4; j++) cut2(v[2 * j], v[2 * j + 1], w[j]);
      UNROLL for (int t = 0; t < NX; t++) {
        uint4 q;
        q.x = w[0][t], q.y = w[1][t], q.z = w[2][t], q.w = w[3][t];
        *(uint4 *)(xs + (t * STEP + row) * LDX + column) = q;
      }
    }
    {
      const int two = (int)threadIdx.x / 8; /* which pair of rows */
      const int64_t i = i0 + 2 * two;
      UNROLL for (int c = 0; c < 2; c++) {
        const float4 f = load_some(h, i * ldh + 4 * c, i < end ? ranks - 4 * c : 0, vec_h),
                     e = load_some(h, (i + 1) * ldh + 4 * c, i + 1 < end ? ranks - 4 * c : 0,
                                   vec_h);
        const float one[4] = {f.x, f.y, f.z, f.w}, other[4] = {e.x, e.y, e.z, e.w};
        UNROLL for (int q = 0; q < 4; q++) {
          uint32_t w[3];
          cut2(one[q], other[q], w);
          UNROLL for (int t = 0; t < 3; t++)
              hs[(t * (STEP / 2) + two) * LDH + 8 * unit + 4 * c + q] = w[t];
        }
      }
    }
    __syncthreads();
    UNROLL for (int k = 0; k < STEP; k += 16) {
      uint32_t a[2][NX][4];
      UNROLL for (int b = 0; b < 2; b++) UNROLL for (int t = 0; t < NX; t++)
          load_matrix_x4<true>(a[b][t], xs + (t * STEP + k + lane / 16 * 8 + lane % 8) * LDX +
                                            warp * 32 + b * 16 + lane / 8 % 2 * 8);
      UNROLL for (int u = 0; u < LOW_UNITS; u++) {
        if (u >= g.units) break;
        uint32_t b[3][2];
        UNROLL for (int t = 0; t < 3; t++) UNROLL for (int e = 0; e < 2; e++) b[t][e] =
            hs[(t * (STEP / 2) + k / 2 + pair + 4 * e) * LDH + 8 * u + quad];
        mma_terms<PYLORA_BF16, NX, 3, NX + 1>(acc[0][u], a[0], b);
        mma_terms<PYLORA_BF16, NX, 3, NX + 1>(acc[1][u], a[1], b);
      }
    }
  }

  UNROLL for (int u = 0; u < LOW_UNITS; u++) {
    if (u >= g.units) break;
    const LowUnit unit = unit_of(groups, group, u);
    const LowJob job = job_of(jobs, unit.job);
    UNROLL for (int b = 0; b < 2; b++) UNROLL for (int e = 0; e < 4; e++) {
      const int64_t c = c0 + warp * 32 + b * 16 + quad + e / 2 * 8;
      const int q = 2 * pair + e % 2;
      if (c >= columns || unit.q0 + q >= job.r) continue;
      if (partial)
        partial[g.at * splits + (split * 8 * g.units + 8 * u + q) * columns + c] = acc[b][u][e];
      else
        outer_store(job, unit.q0 + q, c, acc[b][u][e]);
    }
  }
}

#define LOW_OUTER(name, NX)                                                     \
  KERNEL __launch_bounds__(LOW_THREADS, 3)                                      \
      pylora_low_outer_##name(LowJobs jobs, LowGroups groups, float *partial) { \
    low_outer<NX>(jobs, groups, partial);                                       \
  }
LOW_OUTER(bf16, 1)
LOW_OUTER(f16, 2)
LOW_OUTER(f32, 3)

/* Blocks as of low_outer, and a unit of 8 ranks each. */
KERNEL pylora_outer_reduce(LowJobs jobs, LowGroups groups, const float *partial, int32_t splits) {
  const int32_t group = group_of(groups, blockIdx.x);
  const LowRows g = rows_of(groups, group);
  const int u = blockIdx.y;
  if (u >= g.units) return;
  const LowUnit unit = unit_of(groups, group, u);
  const LowJob job = job_of(jobs, unit.job);
  const int64_t columns = g.x.cols, c0 = (blockIdx.x - g.first) * LOW_COLUMNS;
  for (int n = threadIdx.x; n < LOW_COLUMNS * 8; n += blockDim.x) {
    const int64_t c = c0 + n % LOW_COLUMNS;
    const int q = n / LOW_COLUMNS;
    if (c >= columns || unit.q0 + q >= job.r) continue;
    const float *p = partial + g.at * splits + (8 * u + q) * columns + c;
    const int64_t step = 8 * g.units * columns;
    float sum = 0;
    for (int s = 0; s < splits; s++) sum += p[s * step];
    outer_store(job, unit.q0 + q, c, sum);
  }
}

#endif
