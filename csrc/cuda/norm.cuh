/* norm.cuh - kernels of RMSNorm: rstd = 1 / sqrt(mean(x²) + eps), y = x rstd w, and its gradients.
 *
 * Narrow rows are a warp's each, others a block's. A thread keeps the first KEEP vectors of its share in
 * registers, as they were loaded, so that a row of up to KEEP * 4 * 512 columns is read from memory once; what is
 * beyond is read again.  Sums are in an order that the number of columns decides alone. */
#ifndef PYLORA_NORM_CUH
#define PYLORA_NORM_CUH

#include "norm_rows.cuh"

DEVICE float add_squares(float sum, const Numbers<4> &x) {
  for (int q = 0; q < 4; q++) sum += x.v[q] * x.v[q];
  return sum;
}
/* y = x r w of four elements from column j on */
template <bool ALIGNED>
DEVICE void rms_norm_put(const Numbers<4> &x, float r, const float *w, const View &y, int64_t i,
                         int64_t j) {
  const int64_t left = y.cols - j;
  Numbers<4> f = four<ALIGNED>(w, PYLORA_F32, j, left);
  for (int q = 0; q < 4; q++) f.v[q] = x.v[q] * r * f.v[q];
  put_four<ALIGNED>(y.p, y.dtype, i * y.ld + j, left, f);
}

template <bool ALIGNED, bool BLOCK>
DEVICE void rms_norm_forward(const View &x, const float *w, float eps, const View &y, float *rstd) {
  SHARED(float, scratch, WARP);
  const NormShare<BLOCK> s = norm_share<BLOCK>();
  const int64_t k = x.cols, step = 4 * s.threads, rest = 4 * s.t + NORM_KEEP * step;
  for (int64_t i = s.row; i < x.rows; i += s.row_step) {
    const int64_t from = i * x.ld;
    Raw<4> keep[NORM_KEEP];
    UNROLL
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = 4 * s.t + u * step;
      if (j < k) keep[u] = fetch_four<ALIGNED>(x.p, x.dtype, from + j, k - j);
    }
    float sum = 0;
    UNROLL
    for (int u = 0; u < NORM_KEEP; u++)
      if (4 * s.t + u * step < k) sum = add_squares(sum, widen(keep[u], x.dtype));
    for (int64_t j = rest; j < k; j += step)
      sum = add_squares(sum, four<ALIGNED>(x.p, x.dtype, from + j, k - j));
    const float r = 1.0f / sqrtf(norm_sum<BLOCK>(sum, scratch) / (float)k + eps);
    if (s.t == 0) rstd[i] = r;
    UNROLL
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = 4 * s.t + u * step;
      if (j < k) rms_norm_put<ALIGNED>(widen(keep[u], x.dtype), r, w, y, i, j);
    }
    for (int64_t j = rest; j < k; j += step)
      rms_norm_put<ALIGNED>(four<ALIGNED>(x.p, x.dtype, from + j, k - j), r, w, y, i, j);
  }
}

#define RMS_NORM_FORWARD(name, ALIGNED, BLOCK)                       \
  KERNEL __launch_bounds__(BLOCK ? NORM_THREADS : NORM_WARPS * WARP) \
      name(View x, const float *w, float eps, View y, float *rstd) { \
    rms_norm_forward<ALIGNED, BLOCK>(x, w, eps, y, rstd);            \
  }
RMS_NORM_FORWARD(pylora_rms_norm_forward_block_4, true, true)
RMS_NORM_FORWARD(pylora_rms_norm_forward_block_1, false, true)
RMS_NORM_FORWARD(pylora_rms_norm_forward_warp_4, true, false)
RMS_NORM_FORWARD(pylora_rms_norm_forward_warp_1, false, false)

/* + sum of dy w x over four elements from column j on */
template <bool ALIGNED>
DEVICE float add_products(float sum, const Numbers<4> &dy, const Numbers<4> &x, const float *w,
                          int64_t j, int64_t k) {
  const Numbers<4> weight = four<ALIGNED>(w, PYLORA_F32, j, k - j);
  for (int q = 0; q < 4; q++) sum += dy.v[q] * weight.v[q] * x.v[q];
  return sum;
}
/* dx = [dx +] r (dy w - x c) of four elements of row i from column j on */
template <bool ALIGNED>
DEVICE void rms_norm_gradient(const Numbers<4> &dy, const Numbers<4> &x, const float *w, float r,
                              float c, const View &dx, bool add, int64_t i, int64_t j) {
  const int64_t left = dx.cols - j, to = i * dx.ld + j;
  const Numbers<4> weight = four<ALIGNED>(w, PYLORA_F32, j, left);
  Numbers<4> d = all<4>(0);
  if (add) d = four<ALIGNED>(dx.p, dx.dtype, to, left);
  for (int q = 0; q < 4; q++) {
    const float t = r * (dy.v[q] * weight.v[q] - x.v[q] * c);
    d.v[q] = add ? d.v[q] + t : t;
  }
  put_four<ALIGNED>(dx.p, dx.dtype, to, left, d);
}

/* A thread has read its share of dy before any thread of the row writes dx, and what it reads again is its own: dx may
 * be dy. */
template <bool ALIGNED, bool BLOCK>
DEVICE void rms_norm_backward(const View &dy, const View &x, const float *w, const float *rstd,
                              const View &dx, bool add) {
  SHARED(float, scratch, WARP);
  const NormShare<BLOCK> s = norm_share<BLOCK>();
  const int64_t k = x.cols, step = 4 * s.threads, rest = 4 * s.t + NORM_KEEP * step;
  for (int64_t i = s.row; i < x.rows; i += s.row_step) {
    Raw<4> keep_dy[NORM_KEEP], keep_x[NORM_KEEP];
    UNROLL
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = 4 * s.t + u * step;
      if (j >= k) continue;
      keep_dy[u] = fetch_four<ALIGNED>(dy.p, dy.dtype, i * dy.ld + j, k - j);
      keep_x[u] = fetch_four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j);
    }
    float sum = 0;
    UNROLL
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = 4 * s.t + u * step;
      if (j < k)
        sum = add_products<ALIGNED>(sum, widen(keep_dy[u], dy.dtype), widen(keep_x[u], x.dtype), w,
                                    j, k);
    }
    for (int64_t j = rest; j < k; j += step)
      sum = add_products<ALIGNED>(sum, four<ALIGNED>(dy.p, dy.dtype, i * dy.ld + j, k - j),
                                  four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j), w, j, k);
    const float r = rstd[i], c = norm_sum<BLOCK>(sum, scratch) / (float)k * r * r;
    UNROLL
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = 4 * s.t + u * step;
      if (j < k)
        rms_norm_gradient<ALIGNED>(widen(keep_dy[u], dy.dtype), widen(keep_x[u], x.dtype), w, r, c,
                                   dx, add, i, j);
    }
    for (int64_t j = rest; j < k; j += step)
      rms_norm_gradient<ALIGNED>(four<ALIGNED>(dy.p, dy.dtype, i * dy.ld + j, k - j),
                                 four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j), w, r, c, dx, add,
                                 i, j);
  }
}

#define RMS_NORM_BACKWARD(name, ALIGNED, BLOCK)                                        \
  KERNEL __launch_bounds__(BLOCK ? NORM_THREADS : NORM_WARPS * WARP)                   \
      name(View dy, View x, const float *w, const float *rstd, View dx, int32_t add) { \
    rms_norm_backward<ALIGNED, BLOCK>(dy, x, w, rstd, dx, add != 0);                   \
  }
RMS_NORM_BACKWARD(pylora_rms_norm_backward_block_4, true, true)
RMS_NORM_BACKWARD(pylora_rms_norm_backward_block_1, false, true)
RMS_NORM_BACKWARD(pylora_rms_norm_backward_warp_4, true, false)
RMS_NORM_BACKWARD(pylora_rms_norm_backward_warp_1, false, false)

/* part[chunk,:] = sum of dy x rstd over the rows of the chunk, in their order; part [chunks,k]. */
template <int W>
DEVICE void rms_norm_weight(const View &dy, const View &x, const float *rstd, int64_t chunk,
                            float *part) {
  const int64_t first = blockIdx.y * chunk, end = first + chunk < x.rows ? first + chunk : x.rows;
  const int64_t j = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * W;
  if (j >= x.cols) return;
  Numbers<W> sum = all<W>(0);
  for (int64_t i = first; i < end; i++) {
    const Numbers<W> d = numbers<W>(dy.p, dy.dtype, i * dy.ld + j),
                     v = numbers<W>(x.p, x.dtype, i * x.ld + j);
    const float r = rstd[i];
    for (int q = 0; q < W; q++) sum.v[q] += d.v[q] * v.v[q] * r;
  }
  for (int q = 0; q < W; q++) part[blockIdx.y * x.cols + j + q] = sum.v[q];
}
KERNEL pylora_rms_norm_weight_4(View dy, View x, const float *rstd, int64_t chunk, float *part) {
  rms_norm_weight<4>(dy, x, rstd, chunk, part);
}
KERNEL pylora_rms_norm_weight_1(View dy, View x, const float *rstd, int64_t chunk, float *part) {
  rms_norm_weight<1>(dy, x, rstd, chunk, part);
}
/* dw = the sum of the chunks, in their order */
KERNEL pylora_rms_norm_weight_sum(const float *part, int64_t chunks, int64_t k, float *dw) {
  const int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= k) return;
  float sum = 0;
  for (int64_t c = 0; c < chunks; c++) sum += part[c * k + j];
  dw[j] = sum;
}

#endif
