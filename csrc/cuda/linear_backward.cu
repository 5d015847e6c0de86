/* linear_backward.cu - pylora_cuda_linear_backward: dA, dB and dx of projections that share x.
 *
 * g = dy B of all projections in one launch; dA = s gᵀ drop(x) and dB = s dyᵀ h of all in one; then, tile by tile, the
 * sum of dy W by cuBLAS in float32, and one pass that adds s drop'(g A) of all projections and rounds once.  So dy is
 * read three times (g, dB, dy W) and x once, whatever the number of projections; with dropout x once for each.  PEFT's
 * graph reads and writes arrays of the size of dy and dx six times more.
 *
 * Sums over the rows take x, dy, h and g as they are, without rounding (low_outer.cuh). */
#include "low_rank.h"
#include "products.h"

namespace {

struct Backward {
  pylora_cuda *g;
  void *stream;
  const pylora_mat *x;
  View xv, dx;
  bool has_dx, add;
  int64_t m, k, n;
  const pylora_linear_grad *linear;
  int dtype; /* of the weights, with dx */
};

int64_t rank_of(const pylora_linear_grad *l) { return l->lora ? l->lora->r : 0; }
bool needs_g(const Backward &b, const pylora_linear_grad *l) {
  return rank_of(l) && (l->dA || b.has_dx);
}
/* What dy and B are rounded to in g: W's type; without dx no weight says it, and dy's does. */
int type_of_g(const Backward &b, const pylora_linear_grad *l) {
  return b.has_dx ? b.dtype : view_of(l->dy).dtype;
}

int check_float(const pylora_mat *a, int64_t rows, int64_t cols, bool out) {
  TRY(check_view(a, rows, cols, out));
  return a->b || a->h ? PYLORA_E_UNSUPPORTED : PYLORA_OK;
}

int check_grad(const Backward &b, const pylora_linear_grad *l) {
  if (!l->dy || ((l->dA || l->dB) && !l->lora)) return PYLORA_E_NULL;
  const int64_t d = l->dy->cols, r = rank_of(l);
  TRY(check_view(l->dy, b.m, d, false));
  if (b.has_dx) {
    TRY(check_weight(l->W));
    if (l->W->dtype != b.dtype) return PYLORA_E_UNSUPPORTED;
    if (l->W->d != d || l->W->k != b.k) return PYLORA_E_SHAPE;
  }
  if (l->lora) TRY(check_low(l->lora, b.m, d, b.k));
  if (l->dA) {
    TRY(check_float(l->dA, r, b.k, true));
    TRY(check_view(b.x, b.m, b.k, false));
  }
  if (l->dB) {
    TRY(check_float(l->dB, d, r, true));
    TRY(check_float(l->h, b.m, r, false));
  }
  return PYLORA_OK;
}

/* Jobs 0 .. n-1 are g's and dA's, n .. 2n-1 are dB's. */
LowJob job_for(const Backward &b, const pylora_linear_grad *l, float *g, int64_t ldg, bool of_B) {
  LowJob job;
  memset((void *)&job, 0, sizeof job);
  job.rows = b.m, job.drop = drop_of(NULL);
  const pylora_lora *a = l->lora;
  if (!a || a->r == 0) return job;
  job.A = a->A, job.lda = a->lda, job.B = a->B, job.ldb = a->ldb;
  job.r = (int32_t)a->r, job.s = a->s;
  job.vec_A = aligned16(a->A, a->r > 1 ? a->lda : 0, 4), job.vec_B = aligned16(a->B, a->ldb, 4);
  job.h = g, job.ldh = ldg, job.by_rank = !of_B;
  if (of_B && l->dB) {
    job.h = l->h->p, job.ldh = l->h->ld, job.out = l->dB->p, job.ldo = l->dB->ld;
  } else if (!of_B) {
    job.drop = drop_of(a->drop);
    if (l->dA) job.out = l->dA->p, job.ldo = l->dA->ld;
  }
  job.vec_h = aligned16(job.h, job.ldh, 4);
  return job;
}

int fill_jobs(const Backward &b, float *g, int64_t ldg, Table<LowJob> *jobs) {
  for (int of_B = 0; of_B < 2; of_B++) {
    int64_t column = 0;
    for (int64_t i = 0; i < b.n; i++) {
      const pylora_linear_grad *l = b.linear + i;
      TRY(jobs->push(b.stream, job_for(b, l, g ? g + column : NULL, ldg, of_B)));
      if (needs_g(b, l)) column += rank_of(l);
    }
  }
  return jobs->flush(b.stream);
}

/* Groups of g, for projections whose B is rounded to `dtype`. */
int fill_g(const Backward &b, int dtype, Groups *groups) {
  groups->start(low_units(dtype), false);
  for (int64_t i = 0; i < b.n; i++) {
    const pylora_linear_grad *l = b.linear + i;
    if (!needs_g(b, l) || type_of_g(b, l) != dtype || b.m == 0) continue;
    TRY(groups->add(b.stream, view_of(l->dy), 0, b.m, (int32_t)i, l->lora->r, true));
  }
  return groups->table.flush(b.stream);
}

/* Groups of dA and dB, for those whose x or dy has type `dtype`. */
int fill_outer(const Backward &b, int dtype, Groups *groups) {
  groups->start(LOW_UNITS, true);
  for (int64_t i = 0; i < b.n; i++) {
    const pylora_linear_grad *l = b.linear + i;
    if (l->dA && rank_of(l) && b.k && b.xv.dtype == dtype)
      TRY(groups->add(b.stream, b.xv, 0, b.m, (int32_t)i, l->lora->r,
                      drop_of(l->lora->drop).threshold != 0));
  }
  TRY(groups->close(b.stream));
  for (int64_t i = 0; i < b.n; i++) {
    const pylora_linear_grad *l = b.linear + i;
    const View dy = view_of(l->dy);
    if (l->dB && rank_of(l) && dy.cols && dy.dtype == dtype)
      TRY(groups->add(b.stream, dy, 0, b.m, (int32_t)(b.n + i), l->lora->r, true));
  }
  return groups->table.flush(b.stream);
}

/* One launch of g, or of dA and dB, for each type that occurs. */
template <typename Fill>
int launch_groups(const Backward &b, const Table<LowJob> &jobs, Arena ws, bool outer, Fill fill) {
  for (int dtype : {(int)PYLORA_F32, (int)PYLORA_BF16, (int)PYLORA_F16}) {
    Arena here = ws;
    Groups groups;
    TRY(fill(b, dtype, &groups));
    if (groups.table.n == 0) continue;
    const int64_t splits = outer ? low_outer_splits(b.g, b.m, groups.blocks)
                                 : low_down_splits(b.g, b.m, groups.most_cols, groups.blocks);
    float *partial = NULL;
    if (splits > 1) {
      partial = (float *)here.take((size_t)(splits * groups.floats) * sizeof(float));
      if (!partial) return PYLORA_E_WORKSPACE;
    }
    TRY(groups.table.begin(&here));
    TRY(fill(b, dtype, &groups));
    const LowCall call = low_call(jobs, groups, splits, partial);
    if (outer)
      TRY(low_outer(b.stream, dtype, call));
    else
      TRY(low_down(b.stream, dtype, true, call));
  }
  return PYLORA_OK;
}

/* Whether the rows of dy have to be cast or copied for cuBLAS. */
bool casts(const Backward &b, const View &dy) {
  return dy.cols && (dy.dtype != b.dtype || !lies_well(dy));
}

int input_gradient(const Backward &b, const LowJobs &jobs, bool low, Arena ws) {
  const size_t lt = products_workspace(b.g);
  void *lt_ws = ws.take(lt);
  if (!lt_ws) return PYLORA_E_WORKSPACE;
  const int64_t size = (int64_t)bytes_of(b.dtype);
  int64_t row_bytes = 0; /* of all dy's that are cast */
  for (int64_t i = 0; i < b.n; i++) {
    const View dy = view_of(b.linear[i].dy);
    if (casts(b, dy)) row_bytes += (dy.cols * size + 255) / 256 * 256;
  }
  char *buffer = NULL;
  const int64_t most = cast_rows(b.g, b.m, row_bytes);
  if (row_bytes && !(buffer = (char *)ws.take((size_t)(most * row_bytes))))
    return PYLORA_E_WORKSPACE;
  const Tiling t = tiling(b.g, b.m, b.k, row_bytes);
  const bool direct = b.dx.dtype == PYLORA_F32 && lies_well(b.dx);
  float *sums = NULL;
  if (!direct) {
    sums = (float *)ws.take((size_t)(t.rows * t.cols) * sizeof(float));
    if (!sums) return PYLORA_E_WORKSPACE;
  }
  int64_t from = 0, there = 0; /* the rows in the buffer */
  for (int64_t a = 0; a < b.m; a += t.rows) {
    const int64_t rows = min64(t.rows, b.m - a);
    if (buffer && (there == 0 || a + rows > from + there)) {
      from = a, there = min64(most, b.m - a);
      char *to = buffer;
      for (int64_t i = 0; i < b.n; i++) {
        const View dy = view_of(b.linear[i].dy);
        if (!casts(b, dy)) continue;
        const pylora_mat x = mat_of(part_of(dy, a, there, 0, dy.cols)),
                         y = mat_of({to, there, dy.cols, dy.cols, b.dtype});
        TRY(pylora_cuda_cast(b.g, b.stream, &x, &y));
        to += most * ((dy.cols * size + 255) / 256 * 256);
      }
    }
    for (int64_t c = 0; c < b.k; c += t.cols) {
      const int64_t cols = min64(t.cols, b.k - c);
      LowUp up;
      memset((void *)&up, 0, sizeof up);
      up.out = part_of(b.dx, a, rows, c, cols);
      bool any = direct && b.add;
      const char *at = buffer;
      for (int64_t i = 0; i < b.n; i++) {
        const View dy = view_of(b.linear[i].dy);
        if (dy.cols == 0) continue;
        Product p = {b.dtype, true, any, rows, cols, dy.cols, NULL, NULL, dy.cols, b.k, NULL, 0};
        if (casts(b, dy)) {
          p.a = at + (a - from) * dy.cols * size;
          at += most * ((dy.cols * size + 255) / 256 * 256);
        } else {
          p.a = part_of(dy, a, rows, 0, dy.cols).p;
          if (rows > 1) p.lda = dy.ld;
        }
        p.W = (const char *)b.linear[i].W->data + c * size;
        p.out = direct ? (float *)up.out.p : sums;
        p.ldo = direct && b.m > 1 ? b.dx.ld : cols;
        TRY(product(b.g, b.stream, p, lt_ws, lt));
        any = true;
      }
      if (direct && any && !low) continue;
      if (any) {
        up.base = direct ? (const float *)up.out.p : sums;
        up.ldb = direct && b.m > 1 ? b.dx.ld : cols;
      }
      if (b.add && !direct) up.prior = up.out;
      up.row0 = a, up.col0 = c, up.k = b.k;
      up.jobs = low ? b.n : 0;
      TRY(low_up(b.stream, b.dtype == PYLORA_F32, true, up, jobs));
    }
  }
  return PYLORA_OK;
}

} // namespace

int pylora_cuda_linear_backward(pylora_cuda *g, void *stream, const pylora_mat *x, int64_t n,
                                const pylora_linear_grad *linear, const pylora_mat *dx,
                                int32_t add_dx, void *ws, size_t ws_bytes) {
  if (!g || (n > 0 && !linear)) return PYLORA_E_NULL;
  if (n < 0) return PYLORA_E_SHAPE;
  if (dx && add_dx && (dx->b || dx->h)) return PYLORA_E_UNSUPPORTED;
  if (n == 0) return dx ? PYLORA_E_SHAPE : PYLORA_OK;
  if (n > INT32_MAX / 2) return PYLORA_E_SHAPE;
  if (!linear[0].dy) return PYLORA_E_NULL;
  Backward b = {g,           stream,     x,           view_of(x),
                view_of(dx), dx != NULL, add_dx != 0, linear[0].dy->rows,
                0,           n,          linear,      PYLORA_F32};
  if (dx) {
    TRY(check_weight(linear[0].W));
    b.k = linear[0].W->k, b.dtype = linear[0].W->dtype;
    TRY(check_view(dx, b.m, b.k, true));
  } else {
    for (int64_t i = 0; i < n; i++)
      if (linear[i].dA) b.k = linear[i].dA->cols;
  }
  int64_t ldg = 0;
  bool low = false;
  for (int64_t i = 0; i < n; i++) {
    TRY(check_grad(b, linear + i));
    if (needs_g(b, linear + i)) ldg += linear[i].lora->r;
    low = low || rank_of(linear + i);
  }
  const OnDevice device(g);
  Arena arena(ws, ws_bytes);
  Table<LowJob> jobs;
  LowJobs table;
  memset((void *)&table, 0, sizeof table);
  if (low) {
    float *gs = NULL;
    if (ldg && b.m) {
      gs = (float *)arena.take((size_t)(b.m * ldg) * sizeof(float));
      if (!gs) return PYLORA_E_WORKSPACE;
    }
    TRY(fill_jobs(b, gs, ldg, &jobs));
    TRY(jobs.begin(&arena));
    TRY(fill_jobs(b, gs, ldg, &jobs));
    TRY(launch_groups(b, jobs, arena, false, fill_g));
    TRY(launch_groups(b, jobs, arena, true, fill_outer));
    table.table = jobs.device;
    memcpy((void *)table.few, (const void *)jobs.few, sizeof jobs.few);
  }
  return dx && b.m && b.k ? input_gradient(b, table, low, arena) : PYLORA_OK;
}
