/* features.cu - pylora_cuda_layer_norm_*, _activation_*, _soft_cap_*: checks and launches. */
#include "features.cuh"
#include "cover.h"
#include "host.h"
#include "norm_launch.h"

static_assert((int)ACT_SILU == (int)PYLORA_SILU && (int)ACT_GELU_TANH == (int)PYLORA_GELU_TANH &&
                  (int)ACT_GELU_ERF == (int)PYLORA_GELU_ERF && (int)ACT_RELU2 == (int)PYLORA_RELU2,
              "pylora.h's numbers");

int pylora_cuda_layer_norm_forward(pylora_cuda *g, void *stream, const pylora_mat *x,
                                   const float *w, const float *b, float eps, const pylora_mat *y,
                                   float *rstd) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_view(x, m, k, false));
  TRY(check_view(y, m, k, true));
  if (m == 0) return PYLORA_OK;
  if (k == 0) return PYLORA_E_SHAPE; /* the mean of nothing */
  if (!w || !rstd) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View from = view_of(x), to = view_of(y);
  const bool four = all_fit(4, from, to, weight_view(w, k), weight_view(b ? b : w, k));
  const NormLaunch how(m, ceil_div(k, 4));
  LAUNCH_NORM(pylora_layer_norm_forward, how, four, from, w, b, eps, to, rstd);
  return PYLORA_OK;
}

int pylora_cuda_layer_norm_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                    const pylora_mat *x, const float *w, const float *rstd,
                                    const pylora_mat *dx, int32_t add_dx) {
  if (!g || !x || !dy || !dx) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_view(x, m, k, false));
  TRY(check_view(dy, m, k, false));
  TRY(check_view(dx, m, k, true));
  if (m == 0) return PYLORA_OK;
  if (k == 0) return PYLORA_E_SHAPE;
  if (!w || !rstd) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View grad = view_of(dy), from = view_of(x), to = view_of(dx);
  const bool four = all_fit(4, grad, from, to, weight_view(w, k));
  const NormLaunch how(m, ceil_div(k, 4));
  LAUNCH_NORM(pylora_layer_norm_backward, how, four, grad, from, w, rstd, to, add_dx);
  return PYLORA_OK;
}

/* ---- elements that have nothing to say to each other ---- */

#define LAUNCH_ROWS(kernel, four, shape, ...)                                           \
  do {                                                                                  \
    const Covering over(shape.rows, four ? shape.cols / 4 : shape.cols, 1);             \
    if (four)                                                                           \
      LAUNCH(kernel##_4, over.grid, COVER_THREADS, 0, stream, __VA_ARGS__, over.lanes); \
    else                                                                                \
      LAUNCH(kernel##_1, over.grid, COVER_THREADS, 0, stream, __VA_ARGS__, over.lanes); \
  } while (0)

int pylora_cuda_activation_forward(pylora_cuda *g, void *stream, int32_t kind, const pylora_mat *x,
                                   const pylora_mat *up, const pylora_mat *y) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  if (kind < PYLORA_SILU || kind > PYLORA_RELU2) return PYLORA_E_VALUE;
  const int64_t m = x->rows, n = x->cols;
  TRY(check_view(x, m, n, false));
  if (up) TRY(check_view(up, m, n, false));
  TRY(check_view(y, m, n, true));
  if (m == 0 || n == 0) return PYLORA_OK;
  const OnDevice device(g);
  View a = view_of(x), b = view_of(up ? up : x), to = view_of(y);
  flatten(a, b, to);
  const bool four = all_fit(4, a, b, to);
  if (!up) b.p = NULL;
  LAUNCH_ROWS(pylora_activation_forward, four, a, kind, a, b, to);
  return PYLORA_OK;
}

int pylora_cuda_activation_backward(pylora_cuda *g, void *stream, int32_t kind,
                                    const pylora_mat *dy, const pylora_mat *x, const pylora_mat *up,
                                    const pylora_mat *dx, const pylora_mat *dup) {
  if (!g || !dy || !x || !dx || !up != !dup) return PYLORA_E_NULL;
  if (kind < PYLORA_SILU || kind > PYLORA_RELU2) return PYLORA_E_VALUE;
  const int64_t m = x->rows, n = x->cols;
  TRY(check_view(x, m, n, false));
  TRY(check_view(dy, m, n, false));
  TRY(check_view(dx, m, n, true));
  if (up) TRY(check_view(up, m, n, false));
  if (dup) TRY(check_view(dup, m, n, true));
  if (m == 0 || n == 0) return PYLORA_OK;
  const OnDevice device(g);
  View d = view_of(dy), a = view_of(x), b = view_of(up ? up : x), da = view_of(dx),
       db = view_of(dup ? dup : dx);
  flatten(d, a, b, da, db);
  const bool four = all_fit(4, d, a, b, da, db);
  if (!up) b.p = NULL;
  LAUNCH_ROWS(pylora_activation_backward, four, a, kind, d, a, b, da, db);
  return PYLORA_OK;
}

int pylora_cuda_soft_cap_forward(pylora_cuda *g, void *stream, const pylora_mat *x,
                                 float multiplier, float cap, const pylora_mat *y) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  if (!(cap >= 0)) return PYLORA_E_VALUE;
  TRY(check_view(x, x->rows, x->cols, false));
  TRY(check_view(y, x->rows, x->cols, true));
  if (x->rows == 0 || x->cols == 0) return PYLORA_OK;
  const OnDevice device(g);
  View a = view_of(x), to = view_of(y);
  flatten(a, to);
  LAUNCH_ROWS(pylora_soft_cap_forward, all_fit(4, a, to), a, a, multiplier, cap, to);
  return PYLORA_OK;
}

int pylora_cuda_soft_cap_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                  const pylora_mat *y, float multiplier, float cap,
                                  const pylora_mat *dx) {
  if (!g || !dy || !y || !dx) return PYLORA_E_NULL;
  if (!(cap >= 0)) return PYLORA_E_VALUE;
  TRY(check_view(dy, dy->rows, dy->cols, false));
  TRY(check_view(y, dy->rows, dy->cols, false));
  TRY(check_view(dx, dy->rows, dy->cols, true));
  if (dy->rows == 0 || dy->cols == 0) return PYLORA_OK;
  const OnDevice device(g);
  View d = view_of(dy), a = view_of(y), to = view_of(dx);
  flatten(d, a, to);
  LAUNCH_ROWS(pylora_soft_cap_backward, all_fit(4, d, a, to), d, d, a, multiplier, cap, to);
  return PYLORA_OK;
}
