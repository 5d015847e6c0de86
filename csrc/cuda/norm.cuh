/* norm.cuh - kernels of RMSNorm: rstd = 1 / sqrt(mean(x²) + eps), y = x rstd w, and its gradients.
 *
 * Narrow rows are a warp's each, others a block's. A thread keeps the first KEEP vectors of its share in
 * registers, as they were loaded, so that a row of up to KEEP * 4 * 1024 columns is read from memory once; what is
 * beyond is read again.  Sums are in an order that the number of columns decides alone. */
#ifndef PYLORA_NORM_CUH
#define PYLORA_NORM_CUH

#include "vector.cuh"

enum { NORM_KEEP = 4, NORM_WARPS = 4 /* of a block whose warps have a row each */ };

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

template <int W> DEVICE float add_squares(float sum, const Numbers<W> &x) {
  for (int q = 0; q < W; q++) sum += x.v[q] * x.v[q];
  return sum;
}
template <int W> DEVICE Numbers<W> scaled(Numbers<W> x, float r, const float *w, int64_t j) {
  const Numbers<W> weight = numbers<W>(w, PYLORA_F32, j);
  for (int q = 0; q < W; q++) x.v[q] = x.v[q] * r * weight.v[q];
  return x;
}

template <int W, bool BLOCK>
DEVICE void rms_norm_forward(const View &x, const float *w, float eps, const View &y, float *rstd) {
  SHARED(float, scratch, WARP);
  const NormShare<BLOCK> s = norm_share<BLOCK>();
  const int64_t n = x.cols / W;
  for (int64_t i = s.row; i < x.rows; i += s.row_step) {
    const int64_t from = i * x.ld, to = i * y.ld;
    Raw<W> keep[NORM_KEEP];
    for (int u = 0; u < NORM_KEEP; u++)
      if (s.t + u * s.threads < n)
        keep[u] = fetch<W>(x.p, x.dtype, from + (int64_t)(s.t + u * s.threads) * W);
    float sum = 0;
    for (int u = 0; u < NORM_KEEP; u++)
      if (s.t + u * s.threads < n) sum = add_squares(sum, widen(keep[u], x.dtype));
    for (int64_t v = s.t + NORM_KEEP * s.threads; v < n; v += s.threads)
      sum = add_squares(sum, numbers<W>(x.p, x.dtype, from + v * W));
    const float r = 1.0f / sqrtf(norm_sum<BLOCK>(sum, scratch) / (float)x.cols + eps);
    if (s.t == 0) rstd[i] = r;
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = (int64_t)(s.t + u * s.threads) * W;
      if (j < x.cols) put(y.p, y.dtype, to + j, scaled(widen(keep[u], x.dtype), r, w, j));
    }
    for (int64_t v = s.t + NORM_KEEP * s.threads; v < n; v += s.threads)
      put(y.p, y.dtype, to + v * W, scaled(numbers<W>(x.p, x.dtype, from + v * W), r, w, v * W));
  }
}

#define RMS_NORM_FORWARD(name, W, BLOCK)                             \
  KERNEL __launch_bounds__(BLOCK ? 1024 : NORM_WARPS * WARP)         \
      name(View x, const float *w, float eps, View y, float *rstd) { \
    rms_norm_forward<W, BLOCK>(x, w, eps, y, rstd);                  \
  }
RMS_NORM_FORWARD(pylora_rms_norm_forward_block_4, 4, true)
RMS_NORM_FORWARD(pylora_rms_norm_forward_block_1, 1, true)
RMS_NORM_FORWARD(pylora_rms_norm_forward_warp_4, 4, false)
RMS_NORM_FORWARD(pylora_rms_norm_forward_warp_1, 1, false)

/* + sum of dy w x over a vector at column j */
template <int W>
DEVICE float add_products(float sum, const Numbers<W> &dy, const Numbers<W> &x, const float *w,
                          int64_t j) {
  const Numbers<W> weight = numbers<W>(w, PYLORA_F32, j);
  for (int q = 0; q < W; q++) sum += dy.v[q] * weight.v[q] * x.v[q];
  return sum;
}
/* dx = [dx +] r (dy w - x c) of a vector at column j of row i */
template <int W>
DEVICE void rms_norm_gradient(const Numbers<W> &dy, const Numbers<W> &x, const float *w, float r,
                              float c, const View &dx, bool add, int64_t i, int64_t j) {
  const Numbers<W> weight = numbers<W>(w, PYLORA_F32, j);
  Numbers<W> d = add ? numbers<W>(dx.p, dx.dtype, i * dx.ld + j) : all<W>(0);
  for (int q = 0; q < W; q++) {
    const float t = r * (dy.v[q] * weight.v[q] - x.v[q] * c);
    d.v[q] = add ? d.v[q] + t : t;
  }
  put(dx.p, dx.dtype, i * dx.ld + j, d);
}

/* A thread has read its share of dy before any thread of the row writes dx, and what it reads again is its own: dx may
 * be dy. */
template <int W, bool BLOCK>
DEVICE void rms_norm_backward(const View &dy, const View &x, const float *w, const float *rstd,
                              const View &dx, bool add) {
  SHARED(float, scratch, WARP);
  const NormShare<BLOCK> s = norm_share<BLOCK>();
  const int64_t n = x.cols / W;
  for (int64_t i = s.row; i < x.rows; i += s.row_step) {
    Raw<W> keep_dy[NORM_KEEP], keep_x[NORM_KEEP];
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = (int64_t)(s.t + u * s.threads) * W;
      if (j >= x.cols) continue;
      keep_dy[u] = fetch<W>(dy.p, dy.dtype, i * dy.ld + j);
      keep_x[u] = fetch<W>(x.p, x.dtype, i * x.ld + j);
    }
    float sum = 0;
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = (int64_t)(s.t + u * s.threads) * W;
      if (j < x.cols)
        sum = add_products(sum, widen(keep_dy[u], dy.dtype), widen(keep_x[u], x.dtype), w, j);
    }
    for (int64_t v = s.t + NORM_KEEP * s.threads; v < n; v += s.threads)
      sum = add_products(sum, numbers<W>(dy.p, dy.dtype, i * dy.ld + v * W),
                         numbers<W>(x.p, x.dtype, i * x.ld + v * W), w, v * W);
    const float r = rstd[i], c = norm_sum<BLOCK>(sum, scratch) / (float)x.cols * r * r;
    for (int u = 0; u < NORM_KEEP; u++) {
      const int64_t j = (int64_t)(s.t + u * s.threads) * W;
      if (j < x.cols)
        rms_norm_gradient(widen(keep_dy[u], dy.dtype), widen(keep_x[u], x.dtype), w, r, c, dx, add,
                          i, j);
    }
    for (int64_t v = s.t + NORM_KEEP * s.threads; v < n; v += s.threads)
      rms_norm_gradient(numbers<W>(dy.p, dy.dtype, i * dy.ld + v * W),
                        numbers<W>(x.p, x.dtype, i * x.ld + v * W), w, r, c, dx, add, i, v * W);
  }
}

#define RMS_NORM_BACKWARD(name, W, BLOCK)                                              \
  KERNEL __launch_bounds__(BLOCK ? 1024 : NORM_WARPS * WARP)                           \
      name(View dy, View x, const float *w, const float *rstd, View dx, int32_t add) { \
    rms_norm_backward<W, BLOCK>(dy, x, w, rstd, dx, add != 0);                         \
  }
RMS_NORM_BACKWARD(pylora_rms_norm_backward_block_4, 4, true)
RMS_NORM_BACKWARD(pylora_rms_norm_backward_block_1, 1, true)
RMS_NORM_BACKWARD(pylora_rms_norm_backward_warp_4, 4, false)
RMS_NORM_BACKWARD(pylora_rms_norm_backward_warp_1, 1, false)

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
