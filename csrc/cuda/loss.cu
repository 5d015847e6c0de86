/* loss.cu - pylora_cuda_cross_entropy_forward, _backward and both at once: checks and launches. */
#include "loss.cuh"
#include "host.h"

static int check_labels(const pylora_mat *logits, const int64_t *labels) {
  TRY(check_view(logits, logits->rows, logits->cols, false));
  if (logits->rows == 0) return PYLORA_OK;
  if (logits->cols == 0) return PYLORA_E_SHAPE; /* the softmax of nothing */
  return labels ? PYLORA_OK : PYLORA_E_NULL;
}

/* A block per row, its threads by the row's width alone: so both at once have the forward's bits. */
struct LossLaunch {
  bool four;
  dim3 grid;
  unsigned threads;
  explicit LossLaunch(const View &x) : four(vectors_fit(x, 4)) {
    const int64_t vectors = ceil_div(x.cols, 4);
    threads = (unsigned)min64(1024, ceil_div(ceil_div(vectors, LOSS_AHEAD), WARP) * WARP);
    grid = dim3((unsigned)min64(x.rows, INT32_MAX));
  }
};

int pylora_cuda_cross_entropy_forward(pylora_cuda *g, void *stream, const pylora_mat *logits,
                                      const int64_t *labels, float *nll, float *lse) {
  if (!g || !logits) return PYLORA_E_NULL;
  TRY(check_labels(logits, labels));
  if (logits->rows == 0) return PYLORA_OK;
  if (!nll || !lse) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View x = view_of(logits);
  const LossLaunch how(x);
  if (how.four)
    LAUNCH(pylora_cross_entropy_forward_4, how.grid, how.threads, 0, stream, x, labels, nll, lse,
           g->bad);
  else
    LAUNCH(pylora_cross_entropy_forward_1, how.grid, how.threads, 0, stream, x, labels, nll, lse,
           g->bad);
  return PYLORA_OK;
}

int pylora_cuda_cross_entropy_backward(pylora_cuda *g, void *stream, const pylora_mat *logits,
                                       const int64_t *labels, const float *lse, const float *weight,
                                       const pylora_mat *dlogits) {
  if (!g || !logits || !dlogits) return PYLORA_E_NULL;
  TRY(check_labels(logits, labels));
  TRY(check_view(dlogits, logits->rows, logits->cols, true));
  if (logits->rows == 0) return PYLORA_OK;
  if (!lse || !weight) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View x = view_of(logits), d = view_of(dlogits);
  const LossLaunch how(x);
  const bool vectors = vectors_fit(d, 4);
  if (how.four)
    LAUNCH(pylora_cross_entropy_backward_4, how.grid, how.threads, 0, stream, x, labels, lse,
           weight, d, vectors, g->bad);
  else
    LAUNCH(pylora_cross_entropy_backward_1, how.grid, how.threads, 0, stream, x, labels, lse,
           weight, d, vectors, g->bad);
  return PYLORA_OK;
}

int pylora_cuda_cross_entropy(pylora_cuda *g, void *stream, const pylora_mat *logits,
                              const int64_t *labels, const float *weight, float *nll, float *lse,
                              const pylora_mat *dlogits) {
  if (!g || !logits || !dlogits) return PYLORA_E_NULL;
  TRY(check_labels(logits, labels));
  TRY(check_view(dlogits, logits->rows, logits->cols, true));
  if (logits->rows == 0) return PYLORA_OK;
  if (!nll || !lse || !weight) return PYLORA_E_NULL;
  const OnDevice device(g);
  const View x = view_of(logits), d = view_of(dlogits);
  const LossLaunch how(x);
  const bool vectors = vectors_fit(d, 4);
  /* 2 kB less: what the block shares besides, and what the system keeps of it */
  const int64_t room = max64(0, (int64_t)g->max_shared - 2048) / (int64_t)bytes_of(x.dtype) / 4 * 4,
                cached = min64(ceil_div(x.cols, 4) * 4, room);
  const size_t shared = (size_t)cached * bytes_of(x.dtype);
  if (how.four)
    LAUNCH(pylora_cross_entropy_4, how.grid, how.threads, shared, stream, x, labels, weight, nll,
           lse, d, vectors, cached, g->bad);
  else
    LAUNCH(pylora_cross_entropy_1, how.grid, how.threads, shared, stream, x, labels, weight, nll,
           lse, d, vectors, cached, g->bad);
  return PYLORA_OK;
}
