/* linear_forward.cu - pylora_cuda_linear_forward: projections of one x with their adapters.
 *
 * First h = drop(x) Aᵀ of all projections and segments in one launch (low_down.cuh).  Then, for at most 16 rows, all
 * projections in one launch that streams W (few_rows.cuh).  Else tile by tile: x Wᵀ by cuBLAS in float32, which goes
 * to y itself or to a piece of the workspace that stays in L2, and one pass that adds the rest (low_up.cuh) and rounds
 * once.  PEFT writes h Bᵀ, scales it, adds it and adds the residual in passes of their own.
 *
 * How a product is cut and which algorithm it gets depends on shapes and types alone: without an adapter the sums of
 * x Wᵀ are those with one, bit for bit. */
#include "few_rows.cuh"
#include "low_rank.h"
#include "products.h"

namespace {

struct Forward {
  pylora_cuda *g;
  void *stream;
  const pylora_mat *x;
  View xv;
  int64_t m, k, n;
  const pylora_linear *linear;
  int64_t segments;
  const int64_t *start; /* [segments + 1] */
  int dtype;            /* of the weights */
  int64_t runs;         /* segments that have rows */
};

int check_linear(const Forward &f, const pylora_linear *l) {
  TRY(check_weight(l->W));
  const int64_t m = f.m, d = l->W->d, k = f.k;
  if (l->W->dtype != f.dtype) return PYLORA_E_UNSUPPORTED;
  TRY(check_view(f.x, m, l->W->k, false));
  TRY(check_view(l->y, m, d, true));
  if (l->residual) {
    TRY(check_view(l->residual, m, d, false));
    if (l->residual->b || l->residual->h) return PYLORA_E_UNSUPPORTED;
  }
  for (int64_t s = 0; l->factor && s < f.segments; s++)
    if (l->factor[s]) return PYLORA_E_UNSUPPORTED;
  int64_t r = 0;
  for (int64_t s = 0; l->lora && s < f.segments; s++) {
    const pylora_lora *a = l->lora[s];
    if (!a) continue;
    TRY(check_low(a, m, d, k));
    if (f.segments > 1 && a->r && a->drop && a->drop->p > 0) return PYLORA_E_VALUE;
    r = max64(r, a->r);
  }
  if (!r || !l->h) return PYLORA_OK;
  if (f.segments > 1) return PYLORA_E_VALUE;
  TRY(check_view(l->h, m, r, true));
  return l->h->b || l->h->h ? PYLORA_E_UNSUPPORTED : PYLORA_OK;
}

/* The adapters of projection i on the segment's rows; r = 0: none. */
LowJob job_for(const Forward &f, int64_t i, int64_t segment, float *h, int64_t ldh) {
  const pylora_linear *l = f.linear + i;
  const pylora_lora *a = l->lora ? l->lora[segment] : NULL;
  LowJob job;
  memset((void *)&job, 0, sizeof job);
  job.row0 = f.start[segment], job.rows = f.start[segment + 1] - f.start[segment];
  job.drop = drop_of(NULL);
  if (!a || a->r == 0) return job;
  job.A = a->A, job.lda = a->lda, job.B = a->B, job.ldb = a->ldb;
  job.r = (int32_t)a->r, job.s = a->s, job.drop = drop_of(a->drop);
  job.h = h, job.ldh = ldh;
  job.vec_A = aligned16(a->A, a->r > 1 ? a->lda : 0, 4);
  job.vec_B = aligned16(a->B, a->ldb, 4), job.vec_h = aligned16(h, ldh, 4);
  return job;
}

/* Fills the tables: jobs of a projection side by side in the order of the rows, groups by segment. */
int fill(const Forward &f, float *wide, int64_t wide_ld, Table<LowJob> *jobs, Groups *groups) {
  int64_t column = 0;
  for (int64_t i = 0; i < f.n; i++) {
    const pylora_linear *l = f.linear + i;
    int64_t most = 0;
    for (int64_t s = 0; l->lora && s < f.segments; s++)
      if (l->lora[s]) most = max64(most, l->lora[s]->r);
    float *h = l->h && most ? l->h->p : wide ? wide + column : NULL;
    const int64_t ld = l->h && most ? l->h->ld : wide_ld;
    if (!l->h) column += most;
    for (int64_t s = 0; s < f.segments; s++)
      if (f.start[s] < f.start[s + 1]) TRY(jobs->push(f.stream, job_for(f, i, s, h, ld)));
  }
  TRY(jobs->flush(f.stream));
  int64_t run = 0;
  for (int64_t s = 0; s < f.segments; s++) {
    const int64_t rows = f.start[s + 1] - f.start[s];
    if (rows == 0) continue;
    for (int64_t i = 0; i < f.n; i++) {
      const pylora_lora *a = f.linear[i].lora ? f.linear[i].lora[s] : NULL;
      if (a && a->r)
        TRY(groups->add(f.stream, f.xv, f.start[s], rows, (int32_t)(i * f.runs + run), a->r,
                        drop_of(a->drop).threshold != 0));
    }
    TRY(groups->close(f.stream));
    run++;
  }
  return groups->table.flush(f.stream);
}

int few(const Forward &f, const LowJobs &jobs, bool low) {
  for (int64_t i = 0; i < f.n;) {
    FewRows r;
    memset((void *)&r, 0, sizeof r);
    r.x = f.xv, r.vec_x = eights_fit(f.xv), r.vec_W = 1;
    r.jobs = low ? f.runs : 0;
    int64_t blocks = 0;
    for (; i < f.n && r.n < FEW_PROJECTIONS; i++) {
      const pylora_linear *l = f.linear + i;
      const int64_t here = ceil_div(l->W->d, 16);
      if (blocks + here > INT32_MAX) {
        if (r.n) break;
        return PYLORA_E_SHAPE;
      }
      FewProjection &p = r.p[r.n++];
      p.W = l->W->data, p.d = l->W->d, p.first = blocks, p.bias = l->bias;
      p.residual = view_of(l->residual), p.y = view_of(l->y), p.first_job = i * f.runs;
      if (f.k % 8 || !aligned16(p.W, f.k, bytes_of(f.dtype))) r.vec_W = 0;
      blocks += here;
    }
    const dim3 grid((unsigned)blocks);
    if (f.dtype == PYLORA_F32)
      LAUNCH(pylora_few_rows_f32, grid, FEW_THREADS, 0, f.stream, r, jobs);
    else if (f.dtype == PYLORA_BF16)
      LAUNCH(pylora_few_rows_bf16, grid, FEW_THREADS, 0, f.stream, r, jobs);
    else
      LAUNCH(pylora_few_rows_f16, grid, FEW_THREADS, 0, f.stream, r, jobs);
  }
  return PYLORA_OK;
}

/* x as cuBLAS takes it: itself, or some of its rows in a buffer. */
struct Casts {
  void *buffer; /* NULL: x lies as it should */
  int64_t from, rows, most;
  View v;
};

int rows_for(const Forward &f, Casts *c, int64_t i, int64_t rows, View *out) {
  if (!c->buffer) {
    *out = part_of(f.xv, i, rows, 0, f.k);
    return PYLORA_OK;
  }
  if (i < c->from || i + rows > c->from + c->rows) {
    c->from = i, c->rows = min64(c->most, f.m - i);
    const View to = {c->buffer, c->rows, f.k, f.k, f.dtype};
    const pylora_mat a = mat_of(part_of(f.xv, i, c->rows, 0, f.k)), b = mat_of(to);
    TRY(pylora_cuda_cast(f.g, f.stream, &a, &b));
    c->v = to;
  }
  *out = part_of(c->v, i - c->from, rows, 0, f.k);
  return PYLORA_OK;
}

int many(const Forward &f, const LowJobs &jobs, bool low, Arena ws) {
  const size_t lt = products_workspace(f.g);
  void *lt_ws = ws.take(lt);
  Casts casts = {NULL, 0, 0, 0, f.xv};
  const int64_t row_bytes = f.k * (int64_t)bytes_of(f.dtype);
  const bool cast = f.xv.dtype != f.dtype || !lies_well(f.xv);
  if (cast && f.k) {
    casts.most = cast_rows(f.g, f.m, row_bytes);
    casts.buffer = ws.take((size_t)(casts.most * row_bytes));
    if (!casts.buffer) return PYLORA_E_WORKSPACE;
  }
  if (!lt_ws) return PYLORA_E_WORKSPACE;
  for (int64_t i = 0; i < f.n; i++) {
    const pylora_linear *l = f.linear + i;
    const int64_t d = l->W->d;
    if (d == 0) continue;
    const View y = view_of(l->y), residual = view_of(l->residual);
    bool adapters = false;
    for (int64_t s = 0; low && l->lora && s < f.segments; s++)
      adapters = adapters || (l->lora[s] && l->lora[s]->r);
    const bool direct = y.dtype == PYLORA_F32 && lies_well(y) && y.p != residual.p;
    const Tiling t = tiling(f.g, f.m, d, cast ? row_bytes : 0);
    Arena here = ws;
    float *sums = NULL;
    if (!direct && f.k) {
      sums = (float *)here.take((size_t)(t.rows * t.cols) * sizeof(float));
      if (!sums) return PYLORA_E_WORKSPACE;
    }
    for (int64_t a = 0; a < f.m; a += t.rows)
      for (int64_t b = 0; b < d; b += t.cols) {
        const int64_t rows = min64(t.rows, f.m - a), cols = min64(t.cols, d - b);
        LowUp up;
        memset((void *)&up, 0, sizeof up);
        up.out = part_of(y, a, rows, b, cols);
        if (f.k) {
          View x;
          TRY(rows_for(f, &casts, a, rows, &x));
          Product p = {f.dtype,          false, false, rows, cols, f.k, x.p, NULL,
                       max64(x.ld, f.k), f.k,   NULL,  0};
          p.W = (const char *)l->W->data + b * row_bytes;
          p.out = direct ? (float *)up.out.p : sums;
          p.ldo = direct ? max64(y.ld, d) : cols;
          if (rows == 1) p.lda = f.k, p.ldo = cols;
          TRY(product(f.g, f.stream, p, lt_ws, lt));
          if (direct && !adapters && !l->bias && !l->residual) continue;
          up.base = p.out, up.ldb = p.ldo;
        }
        if (residual.p) up.prior = part_of(residual, a, rows, b, cols);
        up.bias = l->bias ? l->bias + b : NULL;
        up.row0 = a, up.col0 = b, up.k = d;
        up.first_job = i * f.runs, up.jobs = adapters ? f.runs : 0;
        TRY(low_up(f.stream, f.dtype == PYLORA_F32, false, up, jobs));
      }
  }
  return PYLORA_OK;
}

} // namespace

int pylora_cuda_linear_forward(pylora_cuda *g, void *stream, const pylora_mat *x, int64_t n,
                               const pylora_linear *linear, int64_t segments,
                               const int64_t *seg_start, void *ws, size_t ws_bytes) {
  if (!g || !x || (n > 0 && !linear)) return PYLORA_E_NULL;
  if (n < 0 || (seg_start ? segments < 0 : segments != 1)) return PYLORA_E_SHAPE;
  if (n == 0) return PYLORA_OK;
  TRY(check_weight(linear[0].W));
  const int64_t m = x->rows, k = x->cols, whole[2] = {0, m};
  Forward f = {g,
               stream,
               x,
               view_of(x),
               m,
               k,
               n,
               linear,
               segments,
               seg_start ? seg_start : whole,
               linear[0].W->dtype,
               0};
  for (int64_t i = 0; i < n; i++) TRY(check_linear(f, linear + i));
  for (int64_t s = 0; s < segments; s++) {
    if (f.start[s] < 0 || f.start[s] > f.start[s + 1]) return PYLORA_E_SHAPE;
    f.runs += f.start[s] < f.start[s + 1];
  }
  if (segments ? f.start[0] != 0 || f.start[segments] != m : m != 0) return PYLORA_E_SHAPE;
  if (m == 0) return PYLORA_OK;

  const OnDevice device(g);
  Arena arena(ws, ws_bytes);
  int64_t wide_ld = 0; /* columns of h that the caller does not keep */
  bool low = false;
  for (int64_t i = 0; i < n; i++) {
    int64_t most = 0;
    for (int64_t s = 0; linear[i].lora && s < segments; s++)
      if (linear[i].lora[s]) most = max64(most, linear[i].lora[s]->r);
    if (!linear[i].h) wide_ld += most;
    low = low || most;
  }
  Table<LowJob> jobs;
  Groups groups;
  LowCall call;
  memset((void *)&call, 0, sizeof call);
  if (low) {
    float *wide = NULL;
    if (wide_ld) {
      wide = (float *)arena.take((size_t)(m * wide_ld) * sizeof(float));
      if (!wide) return PYLORA_E_WORKSPACE;
    }
    groups.start(low_units(f.dtype), false);
    TRY(fill(f, wide, wide_ld, &jobs, &groups));
    const int64_t splits = low_down_splits(g, m, k, groups.blocks);
    float *partial = NULL;
    if (splits > 1) {
      partial = (float *)arena.take((size_t)(splits * groups.floats) * sizeof(float));
      if (!partial) return PYLORA_E_WORKSPACE;
    }
    TRY(jobs.begin(&arena));
    TRY(groups.table.begin(&arena));
    groups.start(low_units(f.dtype), false);
    TRY(fill(f, wide, wide_ld, &jobs, &groups));
    call = low_call(jobs, groups, splits, partial);
    TRY(low_down(stream, f.dtype, false, call));
  }
  return m <= FEW_ROWS ? few(f, call.jobs, low) : many(f, call.jobs, low, arena);
}
