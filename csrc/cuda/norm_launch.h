/* norm_launch.h - how the kernels of norms are launched: a row is a warp's or a block's. */
#ifndef PYLORA_CUDA_NORM_LAUNCH_H
#define PYLORA_CUDA_NORM_LAUNCH_H

#include "host.h"
#include "norm_rows.cuh"

enum { WARP_VECTORS = 4 * WARP /* rows of up to this many vectors are a warp's each */ };

/* The launch for rows of n vectors of four: the same wherever they lie. */
struct NormLaunch {
  bool block;
  dim3 grid;
  unsigned threads;
  NormLaunch(int64_t m, int64_t n) : block(n > WARP_VECTORS) {
    threads = block ? (unsigned)min64(NORM_THREADS, ceil_div(ceil_div(n, NORM_KEEP), WARP) * WARP)
                    : NORM_WARPS * WARP;
    grid = dim3((unsigned)min64(block ? m : ceil_div(m, NORM_WARPS), INT32_MAX));
  }
};

static inline View weight_view(const float *w, int64_t k) {
  const View v = {(void *)(uintptr_t)w, 1, k, k, PYLORA_F32};
  return v;
}

#define LAUNCH_NORM(kernel, how, four, ...)                                    \
  do {                                                                         \
    if (how.block && four)                                                     \
      LAUNCH(kernel##_block_4, how.grid, how.threads, 0, stream, __VA_ARGS__); \
    else if (how.block)                                                        \
      LAUNCH(kernel##_block_1, how.grid, how.threads, 0, stream, __VA_ARGS__); \
    else if (four)                                                             \
      LAUNCH(kernel##_warp_4, how.grid, how.threads, 0, stream, __VA_ARGS__);  \
    else                                                                       \
      LAUNCH(kernel##_warp_1, how.grid, how.threads, 0, stream, __VA_ARGS__);  \
  } while (0)

#endif
