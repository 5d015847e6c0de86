/* loss.cuh - kernels of the cross-entropy over the vocabulary: a block per row.
 *
 * The forward goes over a row once, with a running maximum and the sum of exponentials that goes with it.  Both
 * directions at once keep as much of the row as shared memory holds (most of 128256 bfloat16 logits), so that
 * little is read from memory a second time.  A thread reads and writes the same elements: dlogits may be logits. */
#ifndef PYLORA_LOSS_CUH
#define PYLORA_LOSS_CUH

#include "vector.cuh"

enum { LOSS_AHEAD = 4 /* vectors that a thread loads before it looks at the first */ };

DEVICE float negative_infinity(void) { return float_of_bits(0xff800000u); }

/* log sum exp of row i; its first `cached` elements (a multiple of 4) are left in `cache`, each for the thread that put
 * it there.  The order of the sum is decided by the columns and the block. */
template <bool ALIGNED>
DEVICE float log_sum_exp(const View &x, int64_t i, void *cache, int64_t cached) {
  SHARED(float, scratch, WARP);
  const int64_t k = x.cols, step = 4 * (int64_t)blockDim.x;
  float top = negative_infinity(), sum = 0;
  for (int64_t base = 4 * (int64_t)threadIdx.x; base < k; base += LOSS_AHEAD * step) {
    Raw<4> r[LOSS_AHEAD];
    UNROLL
    for (int u = 0; u < LOSS_AHEAD; u++) {
      const int64_t j = base + u * step;
      if (j < k) r[u] = fetch_four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j);
    }
    UNROLL
    for (int u = 0; u < LOSS_AHEAD; u++) {
      const int64_t j = base + u * step;
      if (j >= k) continue;
      if (j < cached) put_raw(cache, x.dtype, j, r[u]);
      Numbers<4> f = widen(r[u], x.dtype);
      for (int q = 0; !ALIGNED && q < 4; q++)
        if (q >= k - j) f.v[q] = negative_infinity(); /* past the end: exp gives 0 */
      float high = top;
      for (int q = 0; q < 4; q++) high = fmaxf(high, f.v[q]);
      if (high > top) {
        sum *= expf(top - high);
        top = high;
      }
      /* -inf so far: any shift will do, but -inf - -inf is not a number */
      const float shift = top == negative_infinity() ? 0.0f : top;
      for (int q = 0; q < 4; q++) sum += expf(f.v[q] - shift);
    }
  }
  const float most = block_max(top, scratch);
  sum = block_sum(sum * expf(top - most), scratch);
  return most + logf(sum);
}

/* What a row's label asks for. */
enum { LABEL_FINE, LABEL_IGNORED, LABEL_BAD };
DEVICE int kind_of(int64_t label, int64_t cols) {
  return label == PYLORA_IGNORE       ? LABEL_IGNORED
         : label >= 0 && label < cols ? LABEL_FINE
                                      : LABEL_BAD;
}
/* By one thread of the row's block. */
DEVICE void put_loss(const View &x, int64_t i, int64_t label, float total, float *nll, float *lse,
                     int32_t *bad) {
  const int kind = kind_of(label, x.cols);
  if (kind == LABEL_BAD) flag_bad_index(bad);
  lse[i] = total;
  nll[i] = kind == LABEL_FINE      ? total - load(x.p, x.dtype, i * x.ld + label)
           : kind == LABEL_IGNORED ? 0.0f
                                   : quiet_nan();
}

/* d = weight (exp(x - lse) - onehot(label)) of four elements from column j on; `vectors`: d takes them. */
DEVICE void loss_gradient(const Raw<4> &bits, int dtype, int64_t label, int kind, float lse,
                          float weight, const View &d, bool vectors, int64_t i, int64_t j) {
  Numbers<4> f = all<4>(kind == LABEL_BAD ? quiet_nan() : 0.0f);
  if (kind == LABEL_FINE) {
    f = widen(bits, dtype);
    for (int q = 0; q < 4; q++)
      f.v[q] = weight * (expf(f.v[q] - lse) - (j + q == label ? 1.0f : 0.0f));
  }
  if (vectors)
    put_four<true>(d.p, d.dtype, i * d.ld + j, 4, f);
  else
    put_four<false>(d.p, d.dtype, i * d.ld + j, d.cols - j, f);
}
template <bool ALIGNED>
DEVICE void loss_gradients(const View &x, int64_t i, int64_t label, float lse, float weight,
                           const View &d, bool vectors, const void *cache, int64_t cached) {
  const int kind = kind_of(label, x.cols);
  const int64_t k = x.cols, step = 4 * (int64_t)blockDim.x;
  for (int64_t base = 4 * (int64_t)threadIdx.x; base < k; base += LOSS_AHEAD * step) {
    Raw<4> r[LOSS_AHEAD];
    UNROLL
    for (int u = 0; u < LOSS_AHEAD; u++) {
      const int64_t j = base + u * step;
      if (j >= k || kind != LABEL_FINE) continue;
      r[u] = j < cached ? fetch<4>(cache, x.dtype, j)
                        : fetch_four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j);
    }
    UNROLL
    for (int u = 0; u < LOSS_AHEAD; u++) {
      const int64_t j = base + u * step;
      if (j < k) loss_gradient(r[u], x.dtype, label, kind, lse, weight, d, vectors, i, j);
    }
  }
}

template <bool ALIGNED>
DEVICE void cross_entropy_forward(const View &x, const int64_t *labels, float *nll, float *lse,
                                  int32_t *bad) {
  for (int64_t i = blockIdx.x; i < x.rows; i += gridDim.x) {
    const float total = log_sum_exp<ALIGNED>(x, i, 0, 0);
    if (threadIdx.x == 0) put_loss(x, i, labels[i], total, nll, lse, bad);
  }
}
KERNEL __launch_bounds__(1024)
    pylora_cross_entropy_forward_4(View x, const int64_t *labels, float *nll, float *lse,
                                   int32_t *bad) {
  cross_entropy_forward<true>(x, labels, nll, lse, bad);
}
KERNEL __launch_bounds__(1024)
    pylora_cross_entropy_forward_1(View x, const int64_t *labels, float *nll, float *lse,
                                   int32_t *bad) {
  cross_entropy_forward<false>(x, labels, nll, lse, bad);
}

template <bool ALIGNED>
DEVICE void cross_entropy_backward(const View &x, const int64_t *labels, const float *lse,
                                   const float *weight, const View &d, bool vectors, int32_t *bad) {
  for (int64_t i = blockIdx.x; i < x.rows; i += gridDim.x) {
    const int64_t label = labels[i];
    if (threadIdx.x == 0 && kind_of(label, x.cols) == LABEL_BAD) flag_bad_index(bad);
    loss_gradients<ALIGNED>(x, i, label, lse[i], weight[i], d, vectors, 0, 0);
  }
}
KERNEL __launch_bounds__(1024)
    pylora_cross_entropy_backward_4(View x, const int64_t *labels, const float *lse,
                                    const float *weight, View d, int32_t vectors, int32_t *bad) {
  cross_entropy_backward<true>(x, labels, lse, weight, d, vectors != 0, bad);
}
KERNEL __launch_bounds__(1024)
    pylora_cross_entropy_backward_1(View x, const int64_t *labels, const float *lse,
                                    const float *weight, View d, int32_t vectors, int32_t *bad) {
  cross_entropy_backward<false>(x, labels, lse, weight, d, vectors != 0, bad);
}

/* Both.  The loss reads the label's logit before the barrier, after which dlogits, which may be logits, is written. */
template <bool ALIGNED>
DEVICE void cross_entropy(const View &x, const int64_t *labels, const float *weight, float *nll,
                          float *lse, const View &d, bool vectors, int64_t cached, int32_t *bad) {
  DYNAMIC_SHARED(uint8_t, cache);
  for (int64_t i = blockIdx.x; i < x.rows; i += gridDim.x) {
    const float total = log_sum_exp<ALIGNED>(x, i, cache, cached);
    if (threadIdx.x == 0) put_loss(x, i, labels[i], total, nll, lse, bad);
    __syncthreads();
    loss_gradients<ALIGNED>(x, i, labels[i], total, weight[i], d, vectors, cache, cached);
  }
}
KERNEL __launch_bounds__(1024)
    pylora_cross_entropy_4(View x, const int64_t *labels, const float *weight, float *nll,
                           float *lse, View d, int32_t vectors, int64_t cached, int32_t *bad) {
  cross_entropy<true>(x, labels, weight, nll, lse, d, vectors != 0, cached, bad);
}
KERNEL __launch_bounds__(1024)
    pylora_cross_entropy_1(View x, const int64_t *labels, const float *weight, float *nll,
                           float *lse, View d, int32_t vectors, int64_t cached, int32_t *bad) {
  cross_entropy<false>(x, labels, weight, nll, lse, d, vectors != 0, cached, bad);
}

#endif
