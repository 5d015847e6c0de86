/* few_rows.cuh - linears of at most 16 rows (decoding): W is streamed once at the speed of memory, and everything else
 * happens at the end of it.
 *
 * A block has 16 outputs of one projection; its 8 warps take every eighth piece of 32 inputs.  W's rows and x's rows are
 * read in 16 bytes a lane and multiplied as they lie (low_down.cuh), W as the tensor core's 16 rows and up to 8 rows of
 * x as its columns.  A row's bits do not depend on the number of rows. */
#ifndef PYLORA_FEW_ROWS_CUH
#define PYLORA_FEW_ROWS_CUH

#include "low_rank.cuh"

enum { FEW_ROWS = 16, FEW_THREADS = 256, FEW_WARPS = FEW_THREADS / WARP, FEW_PROJECTIONS = 8 };

struct FewProjection {
  const void *W;    /* [d,k] */
  int64_t d, first; /* first: its first block */
  const float *bias;
  View residual, y;
  int64_t first_job;
};
struct FewRows {
  View x;       /* any type */
  int64_t jobs; /* of a projection, by rows */
  int32_t n, vec_x, vec_W;
  FewProjection p[FEW_PROJECTIONS];
};

template <int T> DEVICE void few_rows(const FewRows &f, const LowJobs &jobs) {
  enum { N = Rounded<T>::TERMS, MMA = Rounded<T>::MMA, AT_ONCE = N == 3 ? 2 : 4 };
  SHARED(float, parts, FEW_WARPS * 16 * 17);
  int which = 0;
  while (which + 1 < f.n && f.p[which + 1].first <= blockIdx.x) which++;
  const FewProjection p = f.p[which];
  const int64_t o0 = (blockIdx.x - p.first) * 16, k = f.x.cols, m = f.x.rows;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, quad = lane / 4, pair = lane % 4;

  float acc[2][4];
  UNROLL for (int b = 0; b < 2; b++) UNROLL for (int e = 0; e < 4; e++) acc[b][e] = 0;
  ROLLED for (int64_t t = 32 * warp + 8 * pair; t - 8 * pair < k; t += 32 * FEW_WARPS * AT_ONCE) {
    uint32_t w[AT_ONCE][2][4][N]; /* all under way before the first is used */
    UNROLL for (int s = 0; s < AT_ONCE; s++) UNROLL for (int e = 0; e < 2; e++) {
      const int64_t o = o0 + quad + 8 * e, at = t + 32 * FEW_WARPS * s;
      words8<T>(p.W, T, o * k + at, o < p.d ? k - at : 0, f.vec_W, w[s][e]);
    }
    UNROLL for (int b = 0; b < 2; b++) {
      if (8 * b >= m) break;
      UNROLL for (int s = 0; s < AT_ONCE; s++) {
        const int64_t i = quad + 8 * b, at = t + 32 * FEW_WARPS * s;
        uint32_t x[4][N];
        words8<T>(f.x.p, f.x.dtype, i * f.x.ld + at, i < m ? k - at : 0, f.vec_x, x);
        UNROLL for (int half = 0; half < 2; half++) {
          uint32_t a[N][4], c[N][2];
          UNROLL for (int n = 0; n < N; n++) {
            a[n][0] = w[s][0][2 * half][n], a[n][1] = w[s][1][2 * half][n];
            a[n][2] = w[s][0][2 * half + 1][n], a[n][3] = w[s][1][2 * half + 1][n];
            c[n][0] = x[2 * half][n], c[n][1] = x[2 * half + 1][n];
          }
          mma_terms<MMA, N, N, 2 * (N - 1)>(acc[b], a, c);
        }
      }
    }
  }
  UNROLL for (int b = 0; b < 2; b++) UNROLL for (int e = 0; e < 4; e++)
      parts[(warp * 16 + quad + e / 2 * 8) * 17 + 8 * b + 2 * pair + e % 2] = acc[b][e];
  __syncthreads();

  const int64_t o = o0 + threadIdx.x % 16, i = threadIdx.x / 16;
  if (o >= p.d || i >= m) return;
  float sum = parts[(threadIdx.x % 16) * 17 + i];
  for (int n = 1; n < FEW_WARPS; n++) sum += parts[(n * 16 + threadIdx.x % 16) * 17 + i];
  if (p.bias) sum += p.bias[o];
  if (p.residual.p) sum = load(p.residual.p, p.residual.dtype, i * p.residual.ld + o) + sum;
  for (int64_t s = 0; s < f.jobs; s++) {
    const LowJob job = job_of(jobs, p.first_job + s);
    if (i < job.row0 || i >= job.row0 + job.rows) continue;
    bool row_set = false, column_set = false; /* low_up.cuh: zeros add nothing */
    float low = 0;
    for (int q = 0; q < job.r; q++) {
      const float h = job.h[i * job.ldh + q], b = job.B[o * job.ldb + q];
      row_set = row_set || h != 0, column_set = column_set || b != 0;
      low = fmaf(h, b, low);
    }
    if (row_set && column_set) sum += job.s * low;
    break;
  }
  store(p.y.p, p.y.dtype, i * p.y.ld + o, sum);
}

#define FEW_ROWS_OF(T, name)                                                                    \
  KERNEL __launch_bounds__(FEW_THREADS, 2) pylora_few_rows_##name(FewRows rows, LowJobs jobs) { \
    few_rows<T>(rows, jobs);                                                                    \
  }
FEW_ROWS_OF(PYLORA_F32, f32)
FEW_ROWS_OF(PYLORA_BF16, bf16)
FEW_ROWS_OF(PYLORA_F16, f16)

#endif
