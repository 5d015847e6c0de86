/* optim.cuh - kernels of the optimizer: AdamW on many arrays in one launch, and the sum of squares that clipping
 * needs.
 *
 * The arrays come as a table in the kernel's arguments: nothing is copied to the device first, so that a CUDA
 * graph keeps it.  A block has one piece of one array. */
#ifndef PYLORA_OPTIM_CUH
#define PYLORA_OPTIM_CUH

#include "device.cuh"

enum {
  OPTIM_THREADS = 256,
  ADAMW_PIECE = 4096, /* elements of a block: four vectors of a thread */
  SQUARES_PIECE = 16384,
  ADAMW_ARRAYS = 56, /* of a table: 4 kB of arguments is what every driver takes */
  SQUARES_ARRAYS = 128,
};

struct AdamwArray {
  float *param, *m, *v;
  const float *grad;
  int64_t n;
  int64_t block;     /* the first one of this array */
  float decay, rate; /* 1 - lr weight_decay, and lr / (1 - beta1^step) */
  int32_t aligned;   /* all four to 16 bytes */
  int32_t unused;
};
struct AdamwTable {
  AdamwArray array[ADAMW_ARRAYS];
  int32_t count;
  float grad_scale, beta1, rest1, beta2, rest2, unbias2,
      eps; /* rest: 1 - beta; unbias2: 1 / (1 - beta2^step) */
};

/* Which of `count` ascending first blocks has this one. */
template <typename T> DEVICE int owner_of(const T *array, int count, int64_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (array[middle].block <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/* csrc/cpu/rows.inc, adamw: the same operations in the same order. */
DEVICE void adamw(const AdamwTable &t, float decay, float rate, float &param, float grad, float &m,
                  float &v) {
  const float g = grad * t.grad_scale;
  m = fmaf(t.beta1, m, t.rest1 * g);
  v = fmaf(t.beta2, v, t.rest2 * g * g);
  const float step = rate * m / (sqrtf(v * t.unbias2) + t.eps);
  param = param * decay - step;
}

KERNEL pylora_adamw_arrays(const __grid_constant__ AdamwTable table) {
  const int64_t block = blockIdx.x;
  const AdamwArray &a = table.array[owner_of(table.array, table.count, block)];
  const int64_t first = (block - a.block) * ADAMW_PIECE,
                end = first + ADAMW_PIECE < a.n ? first + ADAMW_PIECE : a.n;
  float *const param = a.param, *const m = a.m, *const v = a.v;
  const float *const grad = a.grad;
  const float decay = a.decay, rate = a.rate;
  int64_t i = first + 4 * (int64_t)threadIdx.x;
  if (a.aligned)
    for (; i + 4 <= end; i += 4 * OPTIM_THREADS) {
      float4 p = *(float4 *)(param + i), M = *(float4 *)(m + i), V = *(float4 *)(v + i);
      const float4 g = *(const float4 *)(grad + i);
      adamw(table, decay, rate, p.x, g.x, M.x, V.x);
      adamw(table, decay, rate, p.y, g.y, M.y, V.y);
      adamw(table, decay, rate, p.z, g.z, M.z, V.z);
      adamw(table, decay, rate, p.w, g.w, M.w, V.w);
      *(float4 *)(param + i) = p, *(float4 *)(m + i) = M, *(float4 *)(v + i) = V;
    }
  else
    i = first + threadIdx.x;
  /* What vectors leave over: the last few of an array, or all of one that is not aligned. */
  const int64_t stop = a.aligned ? (i < end ? end : i) : end, step = a.aligned ? 1 : OPTIM_THREADS;
  for (; i < stop; i += step) {
    float p = param[i], M = m[i], V = v[i];
    adamw(table, decay, rate, p, grad[i], M, V);
    param[i] = p, m[i] = M, v[i] = V;
  }
}

struct SquaresArray {
  const float *x;
  int64_t n, block;
};
struct SquaresTable {
  SquaresArray array[SQUARES_ARRAYS];
  int32_t count;
};

/* part[block] = sum x² of a piece, in double. */
KERNEL pylora_squares(const __grid_constant__ SquaresTable table, double *part) {
  SHARED(double, scratch, WARP);
  const int64_t block = blockIdx.x;
  const SquaresArray &a = table.array[owner_of(table.array, table.count, block)];
  const int64_t first = (block - a.block) * SQUARES_PIECE,
                end = first + SQUARES_PIECE < a.n ? first + SQUARES_PIECE : a.n;
  const float *const x = a.x;
  double sum = 0;
  for (int64_t i = first + threadIdx.x; i < end; i += 8 * OPTIM_THREADS) {
    float f[8]; /* eight loads under way, each of a warp's side by side whatever the alignment */
    for (int u = 0; u < 8; u++)
      f[u] = i + u * OPTIM_THREADS < end ? x[i + u * OPTIM_THREADS] : 0.0f;
    for (int u = 0; u < 8; u++) sum += (double)f[u] * f[u];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) part[block] = sum;
}
/* out = the sum of the parts, by one block */
KERNEL pylora_squares_sum(const double *part, int64_t parts, double *out) {
  SHARED(double, scratch, WARP);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) sum += part[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *out = sum;
}

#endif
