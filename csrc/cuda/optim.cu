/* optim.cu - pylora_cuda_adamw_step and _sum_squares: checks, tables of arrays, launches. */
#include "host.h"
#include "optim.cuh"

static bool aligned16(const void *p) { return (uintptr_t)p % 16 == 0; }

static int check_adamw(const pylora_adamw *o) {
  const bool fine = o->step >= 1 && o->beta1 >= 0 && o->beta1 < 1 && o->beta2 >= 0 &&
                    o->beta2 < 1 && o->eps >= 0 && isfinite(o->eps);
  return fine ? PYLORA_OK : PYLORA_E_VALUE;
}
static int check_parameter(const pylora_cuda_parameter *p) {
  if (p->n < 0) return PYLORA_E_SHAPE;
  if (p->n && (!p->param || !p->grad || !p->m || !p->v)) return PYLORA_E_NULL;
  if (!isfinite(p->lr) || !isfinite(p->weight_decay)) return PYLORA_E_VALUE;
  return PYLORA_OK;
}

int pylora_cuda_adamw_step(pylora_cuda *g, void *stream, int64_t count,
                           const pylora_cuda_parameter *parameters, const pylora_adamw *o) {
  if (!g || !o || (count > 0 && !parameters)) return PYLORA_E_NULL;
  if (count < 0) return PYLORA_E_SHAPE;
  TRY(check_adamw(o));
  for (int64_t i = 0; i < count; i++) TRY(check_parameter(parameters + i));
  const OnDevice device(g);
  /* In double: 1 - beta^step loses what float has left when beta is near 1. */
  const double unbias1 = 1 - pow(o->beta1, (double)o->step),
               unbias2 = 1 - pow(o->beta2, (double)o->step);
  AdamwTable t = {};
  t.grad_scale = (float)o->grad_scale;
  t.beta1 = (float)o->beta1, t.rest1 = (float)(1 - o->beta1);
  t.beta2 = (float)o->beta2, t.rest2 = (float)(1 - o->beta2);
  t.unbias2 = (float)(1 / unbias2), t.eps = (float)o->eps;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; i++) {
    const pylora_cuda_parameter &p = parameters[i];
    if (p.n) {
      AdamwArray &a = t.array[t.count++];
      a.param = p.param, a.m = p.m, a.v = p.v, a.grad = p.grad, a.n = p.n, a.block = blocks;
      a.decay = (float)(1 - p.lr * p.weight_decay), a.rate = (float)(p.lr / unbias1);
      a.aligned = aligned16(p.param) && aligned16(p.grad) && aligned16(p.m) && aligned16(p.v);
      blocks += ceil_div(p.n, ADAMW_PIECE);
    }
    if (blocks > INT32_MAX) return PYLORA_E_SHAPE;
    if (t.count == ADAMW_ARRAYS || (i == count - 1 && t.count)) {
      LAUNCH(pylora_adamw_arrays, dim3((unsigned)blocks), OPTIM_THREADS, 0, stream, t);
      t.count = 0, blocks = 0;
    }
  }
  return PYLORA_OK;
}

/* Parts of the sum of all arrays, or -1. */
static int64_t parts_of(int64_t count, const int64_t *n) {
  int64_t parts = 0;
  for (int64_t i = 0; i < count; i++) {
    if (n[i] < 0) return -1;
    parts += ceil_div(n[i], SQUARES_PIECE);
    if (parts > INT32_MAX) return -1;
  }
  return parts;
}

size_t pylora_cuda_sum_squares_workspace(pylora_cuda *g, int64_t count, const int64_t *n) {
  (void)g;
  if (count < 0 || (count && !n)) return 0;
  const int64_t parts = parts_of(count, n);
  return parts < 0 ? 0 : 256 + arena_size((size_t)parts * sizeof(double));
}

int pylora_cuda_sum_squares(pylora_cuda *g, void *stream, int64_t count, const int64_t *n,
                            const float *const *x, double *out, void *ws, size_t ws_bytes) {
  if (!g || !out || (count > 0 && (!n || !x))) return PYLORA_E_NULL;
  if (count < 0) return PYLORA_E_SHAPE;
  const int64_t parts = parts_of(count, n);
  if (parts < 0) return PYLORA_E_SHAPE;
  for (int64_t i = 0; i < count; i++)
    if (n[i] && !x[i]) return PYLORA_E_NULL;
  const OnDevice device(g);
  double *part = (double *)Arena(ws, ws_bytes).take((size_t)parts * sizeof(double));
  if (parts && !part) return PYLORA_E_WORKSPACE;
  SquaresTable t = {};
  double *to = part;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; i++) {
    if (n[i]) {
      const SquaresArray a = {x[i], n[i], blocks};
      t.array[t.count++] = a;
      blocks += ceil_div(n[i], SQUARES_PIECE);
    }
    if (t.count == SQUARES_ARRAYS || (i == count - 1 && t.count)) {
      LAUNCH(pylora_squares, dim3((unsigned)blocks), OPTIM_THREADS, 0, stream, t, to);
      to += blocks;
      t.count = 0, blocks = 0;
    }
  }
  LAUNCH(pylora_squares_sum, 1, (unsigned)(parts > 4096 ? 1024 : 128), 0, stream, part, parts, out);
  return PYLORA_OK;
}
