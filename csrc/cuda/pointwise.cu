/* pointwise.cu - pylora_cuda_rope, _swiglu_forward, _swiglu_backward: checks and launches. */
#include "pointwise.cuh"
#include "cover.h"
#include "host.h"

static_assert((int)ROPE_HALF == (int)PYLORA_ROPE_HALF &&
                  (int)ROPE_INTERLEAVED == (int)PYLORA_ROPE_INTERLEAVED,
              "pylora.h's numbers");

int pylora_cuda_rope(pylora_cuda *g, void *stream, const pylora_mat *x, const pylora_mat *cosines,
                     const pylora_mat *sines, const int64_t *position, int32_t head_dim,
                     int32_t layout, int32_t inverse, const pylora_mat *y) {
  if (!g || !x || !cosines || !sines || !y) return PYLORA_E_NULL;
  if (head_dim < 2 || x->cols % head_dim) return PYLORA_E_SHAPE;
  if (layout != PYLORA_ROPE_HALF && layout != PYLORA_ROPE_INTERLEAVED) return PYLORA_E_VALUE;
  if (cosines->cols < 1 || 2 * cosines->cols > head_dim) return PYLORA_E_SHAPE;
  const int32_t half = (int32_t)cosines->cols;
  TRY(check_view(x, x->rows, x->cols, false));
  TRY(check_view(y, x->rows, x->cols, true));
  TRY(check_view(cosines, cosines->rows, half, false));
  TRY(check_view(sines, cosines->rows, half, false));
  if (x->rows && !position) return PYLORA_E_NULL;
  if (x->rows == 0 || x->cols == 0) return PYLORA_OK;
  const OnDevice device(g);
  const View from = view_of(x), to = view_of(y), c = view_of(cosines), s = view_of(sines);
  const float sign = inverse ? -1.0f : 1.0f;
  if (2 * half != head_dim) {
    const Covering over(from.rows, from.cols / head_dim * (head_dim - half), 1);
    LAUNCH(pylora_rope_part, over.grid, COVER_THREADS, 0, stream, from, c, s, position, head_dim,
           half, layout, sign, to, over.lanes, g->bad);
    return PYLORA_OK;
  }
  if (layout == PYLORA_ROPE_HALF) {
    const bool four = half % 4 == 0 && all_fit(4, from, to, c, s);
    const Covering over(from.rows, from.cols / (four ? 8 : 2), 1);
    if (four)
      LAUNCH(pylora_rope_half_4, over.grid, COVER_THREADS, 0, stream, from, c, s, position, half,
             sign, to, over.lanes, g->bad);
    else
      LAUNCH(pylora_rope_half_1, over.grid, COVER_THREADS, 0, stream, from, c, s, position, half,
             sign, to, over.lanes, g->bad);
    return PYLORA_OK;
  }
  const bool four = head_dim % 4 == 0 && all_fit(4, from, to);
  const Covering over(from.rows, from.cols / (four ? 4 : 2), 1);
  if (four)
    LAUNCH(pylora_rope_interleaved_4, over.grid, COVER_THREADS, 0, stream, from, c, s, position,
           half, sign, to, over.lanes, g->bad);
  else
    LAUNCH(pylora_rope_interleaved_1, over.grid, COVER_THREADS, 0, stream, from, c, s, position,
           half, sign, to, over.lanes, g->bad);
  return PYLORA_OK;
}

int pylora_cuda_swiglu_forward(pylora_cuda *g, void *stream, const pylora_mat *gate,
                               const pylora_mat *up, const pylora_mat *y) {
  if (!g || !gate || !up || !y) return PYLORA_E_NULL;
  const int64_t m = gate->rows, n = gate->cols;
  TRY(check_view(gate, m, n, false));
  TRY(check_view(up, m, n, false));
  TRY(check_view(y, m, n, true));
  if (m == 0 || n == 0) return PYLORA_OK;
  const OnDevice device(g);
  View a = view_of(gate), b = view_of(up), to = view_of(y);
  flatten(a, b, to);
  const bool four = all_fit(4, a, b, to);
  const Covering over(a.rows, four ? a.cols / 4 : a.cols, 1);
  if (four)
    LAUNCH(pylora_swiglu_forward_4, over.grid, COVER_THREADS, 0, stream, a, b, to, over.lanes);
  else
    LAUNCH(pylora_swiglu_forward_1, over.grid, COVER_THREADS, 0, stream, a, b, to, over.lanes);
  return PYLORA_OK;
}

int pylora_cuda_swiglu_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                const pylora_mat *gate, const pylora_mat *up,
                                const pylora_mat *dgate, const pylora_mat *dup) {
  if (!g || !dy || !gate || !up || !dgate || !dup) return PYLORA_E_NULL;
  const int64_t m = gate->rows, n = gate->cols;
  TRY(check_view(gate, m, n, false));
  TRY(check_view(up, m, n, false));
  TRY(check_view(dy, m, n, false));
  TRY(check_view(dgate, m, n, true));
  TRY(check_view(dup, m, n, true));
  if (m == 0 || n == 0) return PYLORA_OK;
  const OnDevice device(g);
  View d = view_of(dy), a = view_of(gate), b = view_of(up), da = view_of(dgate), db = view_of(dup);
  flatten(d, a, b, da, db);
  const bool four = all_fit(4, d, a, b, da, db);
  const Covering over(a.rows, four ? a.cols / 4 : a.cols, 1);
  if (four)
    LAUNCH(pylora_swiglu_backward_4, over.grid, COVER_THREADS, 0, stream, d, a, b, da, db,
           over.lanes);
  else
    LAUNCH(pylora_swiglu_backward_1, over.grid, COVER_THREADS, 0, stream, d, a, b, da, db,
           over.lanes);
  return PYLORA_OK;
}
