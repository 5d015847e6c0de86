/* copy.cu - pylora_cuda_cast, _gather_rows, _scatter_rows, _embedding_forward, _embedding_backward: checks and
 * launches. */
#include "copy.cuh"
#include "cover.h"
#include "host.h"

/* See copy_rows; nothing is done for empty matrices. */
static int copy(pylora_cuda *g, void *stream, const View &x, const View &y, const int64_t *index,
                bool scatter) {
  const int64_t m = scatter ? x.rows : y.rows;
  if (m == 0 || y.cols == 0) return PYLORA_OK;
  const OnDevice device(g);
  if (all_fit(4, x, y)) {
    const Covering c(m, x.cols / 4, 4);
    LAUNCH(pylora_copy_rows_4, c.grid, COVER_THREADS, 0, stream, x, y, index, scatter, m, c.lanes,
           g->bad);
  } else {
    const Covering c(m, x.cols, 4);
    LAUNCH(pylora_copy_rows_1, c.grid, COVER_THREADS, 0, stream, x, y, index, scatter, m, c.lanes,
           g->bad);
  }
  return PYLORA_OK;
}

int pylora_cuda_cast(pylora_cuda *g, void *stream, const pylora_mat *x, const pylora_mat *y) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  TRY(check_view(x, x->rows, x->cols, false));
  TRY(check_view(y, x->rows, x->cols, true));
  View from = view_of(x), to = view_of(y);
  flatten(from, to);
  return copy(g, stream, from, to, NULL, false);
}

int pylora_cuda_gather_rows(pylora_cuda *g, void *stream, const pylora_mat *x, const int64_t *row,
                            const pylora_mat *y) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  TRY(check_view(x, x->rows, x->cols, false));
  TRY(check_view(y, y->rows, x->cols, true));
  if (y->rows && !row) return PYLORA_E_NULL;
  return copy(g, stream, view_of(x), view_of(y), row, false);
}

int pylora_cuda_scatter_rows(pylora_cuda *g, void *stream, const pylora_mat *x, const int64_t *row,
                             const pylora_mat *y) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  TRY(check_view(x, x->rows, x->cols, false));
  TRY(check_view(y, y->rows, x->cols, true));
  if (x->rows && !row) return PYLORA_E_NULL;
  return copy(g, stream, view_of(x), view_of(y), row, true);
}

int pylora_cuda_embedding_forward(pylora_cuda *g, void *stream, const int64_t *ids, int64_t m,
                                  const pylora_packed *W, const pylora_mat *y) {
  if (!g || !W || !y) return PYLORA_E_NULL;
  if (W->magic != PYLORA_MAGIC_CUDA || W->d < 0 || W->k < 0) return PYLORA_E_PACKED;
  if (W->d && W->k && !W->data) return PYLORA_E_PACKED;
  TRY(check_view(y, m, W->k, true));
  if (m && !ids) return PYLORA_E_NULL;
  const View table = {(void *)(uintptr_t)W->data, W->d, W->k, W->k, W->dtype};
  return copy(g, stream, table, view_of(y), ids, false);
}

int pylora_cuda_embedding_backward(pylora_cuda *g, void *stream, const int64_t *ids,
                                   const pylora_mat *dy, const pylora_mat *dW) {
  if (!g || !dy || !dW) return PYLORA_E_NULL;
  TRY(check_view(dy, dy->rows, dy->cols, false));
  TRY(check_view(dW, dW->rows, dy->cols, true));
  if (dy->rows && !ids) return PYLORA_E_NULL;
  const int64_t m = dy->rows, k = dy->cols;
  if (k == 0) return PYLORA_OK;
  const OnDevice device(g);
  const View from = view_of(dy), to = view_of(dW);
  View flat = to;
  flatten(flat);
  const bool four = vectors_fit(flat, 4);
  const Covering c(flat.rows, four ? flat.cols / 4 : flat.cols, 4);
  if (four)
    LAUNCH(pylora_zero_4, c.grid, COVER_THREADS, 0, stream, flat, c.lanes);
  else
    LAUNCH(pylora_zero_1, c.grid, COVER_THREADS, 0, stream, flat, c.lanes);
  enum { TILE = 512 }; /* vectors: embedding_backward */
  const unsigned blocks = (unsigned)min64(m, INT32_MAX);
  if (all_fit(4, from, to))
    LAUNCH(pylora_embedding_backward_4, dim3(blocks, (unsigned)ceil_div(k / 4, TILE)), 256, 0,
           stream, ids, from, to, g->bad);
  else
    LAUNCH(pylora_embedding_backward_1, dim3(blocks, (unsigned)ceil_div(k, TILE)), 256, 0, stream,
           ids, from, to, g->bad);
  return PYLORA_OK;
}
