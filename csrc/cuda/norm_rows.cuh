/* norm_rows.cuh - how the kernels of norms share out rows: a warp's or a block's each, and sums over a row. */
#ifndef PYLORA_NORM_ROWS_CUH
#define PYLORA_NORM_ROWS_CUH

#include "vector.cuh"

enum {
  NORM_KEEP = 4,
  NORM_THREADS = 512 /* of a block that has a row, at most */,
  NORM_WARPS = 4 /* of a block whose warps have a row each */
};

/* A thread's share of a row: vectors t, t + threads, ... */
template <bool BLOCK> struct NormShare {
  int64_t row, row_step;
  int t, threads;
};
template <bool BLOCK> DEVICE NormShare<BLOCK> norm_share(void) {
  NormShare<BLOCK> s;
  const int warps = (int)blockDim.x / WARP;
  s.row = BLOCK ? (int64_t)blockIdx.x : (int64_t)blockIdx.x * warps + (int)threadIdx.x / WARP;
  s.row_step = BLOCK ? (int64_t)gridDim.x : (int64_t)gridDim.x * warps;
  s.t = BLOCK ? (int)threadIdx.x : (int)threadIdx.x % WARP;
  s.threads = BLOCK ? (int)blockDim.x : (int)WARP;
  return s;
}
template <bool BLOCK> DEVICE float norm_sum(float x, float *scratch) {
  return BLOCK ? block_sum(x, scratch) : warp_sum(x);
}

#endif
