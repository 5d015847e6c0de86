/* random.cuh - kernels: words of a Philox stream, and dropout keyed by them; the bits of csrc/ops/random.c. */
#ifndef PYLORA_RANDOM_CUH
#define PYLORA_RANDOM_CUH

#include "philox.cuh"

/* Words first .. first+n-1; a thread makes one block of four.  `aligned`: first and out allow 16-byte stores. */
KERNEL pylora_philox_words(uint64_t seed, uint64_t stream, int64_t first, int64_t n, uint32_t *out,
                           int32_t aligned) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, end = first + n;
  for (int64_t b = first / 4 + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; b <= (end - 1) / 4;
       b += step) {
    const uint4 w = philox(seed, stream, (uint64_t)b);
    const int64_t at = 4 * b - first; /* of w.x in out; may be below 0 */
    if (aligned && n - at >= 4) {
      *(uint4 *)(out + at) = w;
      continue;
    }
    if (at >= 0) out[at] = w.x;
    if (at + 1 >= 0 && at + 1 < n) out[at + 1] = w.y;
    if (at + 2 >= 0 && at + 2 < n) out[at + 2] = w.z;
    if (at + 3 < n) out[at + 3] = w.w;
  }
}

/* y = drop(x) [m,k].  A thread takes the elements of a row that share a block of words, four or, at the row's ends,
 * fewer.  `aligned`: rows start with a block (k % 4 == 0) and both matrices take vectors of four. */
KERNEL pylora_dropout_rows(View x, Drop drop, View y, int32_t aligned) {
  const int64_t k = x.cols;
  for (int64_t i = blockIdx.y; i < x.rows; i += gridDim.y) {
    const int64_t first = (drop.row0 + i) * k, end = first + k;
    for (int64_t b = first / 4 + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; b <= (end - 1) / 4;
         b += (int64_t)gridDim.x * blockDim.x) {
      const int64_t j = 4 * b - first, from = i * x.ld + j, to = i * y.ld + j;
      if (aligned) {
        store4(y.p, y.dtype, to, dropped(drop, (uint64_t)b, load4(x.p, x.dtype, from)));
        continue;
      }
      const bool in0 = j >= 0, in1 = j + 1 >= 0 && j + 1 < k, in2 = j + 2 >= 0 && j + 2 < k,
                 in3 = j + 3 < k;
      float4 v;
      v.x = in0 ? load(x.p, x.dtype, from) : 0.0f;
      v.y = in1 ? load(x.p, x.dtype, from + 1) : 0.0f;
      v.z = in2 ? load(x.p, x.dtype, from + 2) : 0.0f;
      v.w = in3 ? load(x.p, x.dtype, from + 3) : 0.0f;
      v = dropped(drop, (uint64_t)b, v);
      if (in0) store(y.p, y.dtype, to, v.x);
      if (in1) store(y.p, y.dtype, to + 1, v.y);
      if (in2) store(y.p, y.dtype, to + 2, v.z);
      if (in3) store(y.p, y.dtype, to + 3, v.w);
    }
  }
}

#endif
