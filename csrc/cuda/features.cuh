/* features.cuh - kernels of what families have beside Llama's operations: LayerNorm, activations with a gate or
 * without, and soft caps. */
#ifndef PYLORA_FEATURES_CUH
#define PYLORA_FEATURES_CUH

#include "norm_rows.cuh"
#include "sigmoid.cuh"

/* ---- LayerNorm: rows and sums as in norm.cuh ---- */

/* The mean of a row, and of (x - mean)². */
template <bool ALIGNED, bool BLOCK>
DEVICE float layer_mean(const View &x, int64_t i, const NormShare<BLOCK> &s, float *scratch) {
  float sum = 0;
  for (int64_t j = 4 * s.t; j < x.cols; j += 4 * s.threads) {
    const Numbers<4> v = four<ALIGNED>(x.p, x.dtype, i * x.ld + j, x.cols - j);
    for (int q = 0; q < 4; q++) sum += v.v[q]; /* those beyond the row are 0 */
  }
  return norm_sum<BLOCK>(sum, scratch) / (float)x.cols;
}
template <bool ALIGNED, bool BLOCK>
DEVICE float layer_variance(const View &x, int64_t i, float mean, const NormShare<BLOCK> &s,
                            float *scratch) {
  float sum = 0;
  for (int64_t j = 4 * s.t; j < x.cols; j += 4 * s.threads) {
    const Numbers<4> v = four<ALIGNED>(x.p, x.dtype, i * x.ld + j, x.cols - j);
    for (int q = 0; q < 4; q++)
      if (j + q < x.cols) sum += (v.v[q] - mean) * (v.v[q] - mean);
  }
  return norm_sum<BLOCK>(sum, scratch) / (float)x.cols;
}

template <bool ALIGNED, bool BLOCK>
DEVICE void layer_norm_forward(const View &x, const float *w, const float *b, float eps,
                               const View &y, float *rstd) {
  SHARED(float, scratch, WARP);
  const NormShare<BLOCK> s = norm_share<BLOCK>();
  const int64_t k = x.cols;
  for (int64_t i = s.row; i < x.rows; i += s.row_step) {
    const float mean = layer_mean<ALIGNED, BLOCK>(x, i, s, scratch);
    const float r = 1.0f / sqrtf(layer_variance<ALIGNED, BLOCK>(x, i, mean, s, scratch) + eps);
    if (s.t == 0) rstd[i] = r;
    for (int64_t j = 4 * s.t; j < k; j += 4 * s.threads) {
      const Numbers<4> v = four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j);
      Numbers<4> f = four<ALIGNED>(w, PYLORA_F32, j, k - j), more = all<4>(0);
      if (b) more = four<ALIGNED>(b, PYLORA_F32, j, k - j);
      for (int q = 0; q < 4; q++) f.v[q] = (v.v[q] - mean) * r * f.v[q] + more.v[q];
      put_four<ALIGNED>(y.p, y.dtype, i * y.ld + j, k - j, f);
    }
  }
}

/* dx = [dx +] r (g - mean(g) - n mean(g n)), g = dy w, n = (x - mean(x)) r.  A thread reads again what is its own
 * before it writes there: dx may be dy. */
template <bool ALIGNED, bool BLOCK>
DEVICE void layer_norm_backward(const View &dy, const View &x, const float *w, const float *rstd,
                                const View &dx, bool add) {
  SHARED(float, scratch, WARP);
  const NormShare<BLOCK> s = norm_share<BLOCK>();
  const int64_t k = x.cols;
  for (int64_t i = s.row; i < x.rows; i += s.row_step) {
    const float mean = layer_mean<ALIGNED, BLOCK>(x, i, s, scratch), r = rstd[i];
    float slope = 0, along = 0;
    for (int64_t j = 4 * s.t; j < k; j += 4 * s.threads) {
      const Numbers<4> d = four<ALIGNED>(dy.p, dy.dtype, i * dy.ld + j, k - j),
                       v = four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j),
                       f = four<ALIGNED>(w, PYLORA_F32, j, k - j);
      for (int q = 0; q < 4; q++) {
        if (j + q >= k) break;
        slope += d.v[q] * f.v[q];
        along += d.v[q] * f.v[q] * ((v.v[q] - mean) * r);
      }
    }
    slope = norm_sum<BLOCK>(slope, scratch) / (float)k;
    along = norm_sum<BLOCK>(along, scratch) / (float)k;
    for (int64_t j = 4 * s.t; j < k; j += 4 * s.threads) {
      const int64_t to = i * dx.ld + j;
      const Numbers<4> d = four<ALIGNED>(dy.p, dy.dtype, i * dy.ld + j, k - j),
                       v = four<ALIGNED>(x.p, x.dtype, i * x.ld + j, k - j),
                       f = four<ALIGNED>(w, PYLORA_F32, j, k - j);
      Numbers<4> out = all<4>(0);
      if (add) out = four<ALIGNED>(dx.p, dx.dtype, to, k - j);
      for (int q = 0; q < 4; q++) {
        const float t = r * (d.v[q] * f.v[q] - slope - (v.v[q] - mean) * r * along);
        out.v[q] = add ? out.v[q] + t : t;
      }
      put_four<ALIGNED>(dx.p, dx.dtype, to, k - j, out);
    }
  }
}

#define LAYER_NORM(name, ALIGNED, BLOCK)                                                          \
  KERNEL __launch_bounds__(BLOCK ? NORM_THREADS : NORM_WARPS * WARP)                              \
      pylora_layer_norm_forward_##name(View x, const float *w, const float *b, float eps, View y, \
                                       float *rstd) {                                             \
    layer_norm_forward<ALIGNED, BLOCK>(x, w, b, eps, y, rstd);                                    \
  }                                                                                               \
  KERNEL __launch_bounds__(BLOCK ? NORM_THREADS : NORM_WARPS * WARP)                              \
      pylora_layer_norm_backward_##name(View dy, View x, const float *w, const float *rstd,       \
                                        View dx, int32_t add) {                                   \
    layer_norm_backward<ALIGNED, BLOCK>(dy, x, w, rstd, dx, add != 0);                            \
  }
LAYER_NORM(block_4, true, true)
LAYER_NORM(block_1, false, true)
LAYER_NORM(warp_4, true, false)
LAYER_NORM(warp_1, false, false)
#undef LAYER_NORM

/* ---- activations ---- */

enum { ACT_SILU = 0, ACT_GELU_TANH = 1, ACT_GELU_ERF = 2, ACT_RELU2 = 3 }; /* pylora_activation */

/* act(x) and its derivative */
DEVICE void activation(int kind, float x, float *y, float *slope) {
  float s, t;
  if (kind == ACT_SILU) {
    sigmoid(x, &s, &t);
    *y = x * s, *slope = s * (x * t + 1.0f);
  } else if (kind == ACT_GELU_TANH) {
    const float c = 1.59576912f, d = 0.044715f; /* 2 sqrt(2 / pi) */
    sigmoid(c * (d * x * x * x + x), &s, &t);
    /* Far out one of the sigmoids is 0, and x² may be infinite. */
    const float r = fabsf(x) < 20.0f ? x : 0.0f * x;
    *y = x * s, *slope = s * (c * r * t * (3.0f * d * r * r + 1.0f) + 1.0f);
  } else if (kind == ACT_GELU_ERF) {
    s = 0.5f * erfcf(-0.707106781f * x), t = 0.398942280f * expf(-0.5f * x * x);
    *y = x * s, *slope = x * t + s;
  } else {
    const float r = x > 0 ? x : 0.0f * x;
    *y = r * r, *slope = r + r;
  }
}

template <int W>
DEVICE void activation_forward(int kind, const View &x, const View &up, const View &y,
                               int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < x.rows; i += c.row_step)
    for (int64_t j = c.col * W; j < x.cols; j += c.col_step * W) {
      const Numbers<W> v = numbers<W>(x.p, x.dtype, i * x.ld + j);
      Numbers<W> u = all<W>(1), r;
      if (up.p) u = numbers<W>(up.p, up.dtype, i * up.ld + j);
      for (int q = 0; q < W; q++) {
        float a, slope;
        activation(kind, v.v[q], &a, &slope);
        r.v[q] = up.p ? a * u.v[q] : a;
      }
      put(y.p, y.dtype, i * y.ld + j, r);
    }
}
template <int W>
DEVICE void activation_backward(int kind, const View &dy, const View &x, const View &up,
                                const View &dx, const View &dup, int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < x.rows; i += c.row_step)
    for (int64_t j = c.col * W; j < x.cols; j += c.col_step * W) {
      const Numbers<W> d = numbers<W>(dy.p, dy.dtype, i * dy.ld + j),
                       v = numbers<W>(x.p, x.dtype, i * x.ld + j);
      Numbers<W> u = all<W>(1), r, more;
      if (up.p) u = numbers<W>(up.p, up.dtype, i * up.ld + j);
      for (int q = 0; q < W; q++) {
        float a, slope;
        activation(kind, v.v[q], &a, &slope);
        r.v[q] = up.p ? d.v[q] * u.v[q] * slope : d.v[q] * slope;
        more.v[q] = d.v[q] * a;
      }
      put(dx.p, dx.dtype, i * dx.ld + j, r);
      if (up.p) put(dup.p, dup.dtype, i * dup.ld + j, more);
    }
}

/* ---- soft caps ---- */

/* y = cap tanh(by x / cap); cap = 0: by x */
template <int W>
DEVICE void soft_cap_forward(const View &x, float by, float cap, const View &y, int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < x.rows; i += c.row_step)
    for (int64_t j = c.col * W; j < x.cols; j += c.col_step * W) {
      Numbers<W> v = numbers<W>(x.p, x.dtype, i * x.ld + j);
      for (int q = 0; q < W; q++) {
        v.v[q] *= by;
        if (cap > 0) v.v[q] = cap * tanhf(v.v[q] / cap);
      }
      put(y.p, y.dtype, i * y.ld + j, v);
    }
}
/* dx = dy (1 - (y / cap)²) by */
template <int W>
DEVICE void soft_cap_backward(const View &dy, const View &y, float by, float cap, const View &dx,
                              int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < dy.rows; i += c.row_step)
    for (int64_t j = c.col * W; j < dy.cols; j += c.col_step * W) {
      Numbers<W> d = numbers<W>(dy.p, dy.dtype, i * dy.ld + j);
      const Numbers<W> v = numbers<W>(y.p, y.dtype, i * y.ld + j);
      for (int q = 0; q < W; q++) {
        const float t = cap > 0 ? v.v[q] / cap : 0;
        d.v[q] = d.v[q] * (1.0f - t * t) * by;
      }
      put(dx.p, dx.dtype, i * dx.ld + j, d);
    }
}

#define FEATURE_ROWS(W)                                                                            \
  KERNEL pylora_activation_forward_##W(int32_t kind, View x, View up, View y, int32_t lanes) {     \
    activation_forward<W>(kind, x, up, y, lanes);                                                  \
  }                                                                                                \
  KERNEL pylora_activation_backward_##W(int32_t kind, View dy, View x, View up, View dx, View dup, \
                                        int32_t lanes) {                                           \
    activation_backward<W>(kind, dy, x, up, dx, dup, lanes);                                       \
  }                                                                                                \
  KERNEL pylora_soft_cap_forward_##W(View x, float by, float cap, View y, int32_t lanes) {         \
    soft_cap_forward<W>(x, by, cap, y, lanes);                                                     \
  }                                                                                                \
  KERNEL pylora_soft_cap_backward_##W(View dy, View y, float by, float cap, View dx,               \
                                      int32_t lanes) {                                             \
    soft_cap_backward<W>(dy, y, by, cap, dx, lanes);                                               \
  }
FEATURE_ROWS(4)
FEATURE_ROWS(1)
#undef FEATURE_ROWS

#endif
