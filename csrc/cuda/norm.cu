/* norm.cu - pylora_cuda_rms_norm_forward and _backward: checks and launches. */
#include "norm.cuh"
#include "cover.h"
#include "host.h"
#include "norm_launch.h"

enum {
  LEAST_CHUNK = 32, /* rows whose part of dw is added up by one thread, at least */
  MOST_CHUNKS = 64,
};

int pylora_cuda_rms_norm_forward(pylora_cuda *g, void *stream, const pylora_mat *x, const float *w,
                                 float eps, const pylora_mat *y, float *rstd) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_view(x, m, k, false));
  TRY(check_view(y, m, k, true));
  if (m == 0) return PYLORA_OK;
  if (k == 0) return PYLORA_E_SHAPE; /* the mean of nothing */
  if (!w || !rstd) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View from = view_of(x), to = view_of(y);
  const bool four = all_fit(4, from, to, weight_view(w, k));
  const NormLaunch how(m, ceil_div(k, 4));
  LAUNCH_NORM(pylora_rms_norm_forward, how, four, from, w, eps, to, rstd);
  return PYLORA_OK;
}

/* Rows per part of dw: the same for the same m, whatever the device. */
static int64_t chunk_of(int64_t m) { return max64(LEAST_CHUNK, ceil_div(m, MOST_CHUNKS)); }

size_t pylora_cuda_rms_norm_workspace(pylora_cuda *g, int64_t m, int64_t k) {
  (void)g;
  if (m < 0 || k < 0 || (uint64_t)k > SIZE_MAX / (MOST_CHUNKS * sizeof(float)) / 2) return 0;
  const int64_t chunks = ceil_div(m, chunk_of(m));
  return 256 + arena_size((size_t)(chunks * k) * sizeof(float));
}

static int weight_gradient(void *stream, const View &dy, const View &x, const float *rstd,
                           float *dw, void *ws, size_t ws_bytes) {
  const int64_t k = x.cols, chunk = chunk_of(x.rows), chunks = ceil_div(x.rows, chunk);
  float *part = (float *)Arena(ws, ws_bytes).take((size_t)(chunks * k) * sizeof(float));
  if (chunks && !part) return PYLORA_E_WORKSPACE;
  const bool four = all_fit(4, dy, x);
  const dim3 grid((unsigned)ceil_div(k, four ? 4 * 128 : 128), (unsigned)chunks);
  if (four)
    LAUNCH(pylora_rms_norm_weight_4, grid, 128, 0, stream, dy, x, rstd, chunk, part);
  else
    LAUNCH(pylora_rms_norm_weight_1, grid, 128, 0, stream, dy, x, rstd, chunk, part);
  LAUNCH(pylora_rms_norm_weight_sum, (unsigned)ceil_div(k, 128), 128, 0, stream, part, chunks, k,
         dw);
  return PYLORA_OK;
}

int pylora_cuda_rms_norm_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                  const pylora_mat *x, const float *w, const float *rstd,
                                  const pylora_mat *dx, int32_t add_dx, float *dw, void *ws,
                                  size_t ws_bytes) {
  if (!g || !x || !dy || !dx) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_view(x, m, k, false));
  TRY(check_view(dy, m, k, false));
  TRY(check_view(dx, m, k, true));
  if (m && k == 0) return PYLORA_E_SHAPE;
  if (m && (!w || !rstd)) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View grad = view_of(dy), from = view_of(x), to = view_of(dx);
  if (dw) TRY(weight_gradient(stream, grad, from, rstd, dw, ws, ws_bytes)); /* dx may be dy */
  if (m == 0) return PYLORA_OK;
  const bool four = all_fit(4, grad, from, to, weight_view(w, k));
  const NormLaunch how(m, ceil_div(k, 4));
  LAUNCH_NORM(pylora_rms_norm_backward, how, four, grad, from, w, rstd, to, add_dx);
  return PYLORA_OK;
}
