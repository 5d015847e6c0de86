/* lora_forward.c - projections of one x with their adapters: y = residual + x Wᵀ + bias + s h Bᵀ.
 *
 * Looks at what the caller said, lays out the workspace, and runs the tasks of forward.h. */
#include "ops/forward.h"

enum {
  PANEL = PYLORA_PANEL,
  BLOCK_BYTES = 384 * 1024, /* prepared rows per block: half of a usual L2 */
  GROUP = 4,                /* panels per task while there are many */
  TILE_GROUP = 8,           /* the same where products run on tiles: long rows come from memory */
  ROWS = 64,                /* rows of x per task while there are many */
  TILE_ROWS = 256,          /* rows per block, where products run on tiles */
};

size_t pylora_linear_workspace(int64_t m, int64_t n, int64_t d, int64_t k, int64_t r) {
  const int64_t most = (int64_t)1 << 40;
  if (m < 0 || n < 0 || d < 0 || k < 0 || r < 0 || m > most || n > most || d > most || k > most ||
      r > most)
    return 0;
  const double M = (double)m, N = (double)n, D = (double)d + 32 * N, k_ = (double)k + 64,
               R = (double)r + 32 * N;
  /* In floats: x normed, prepared, dropped and prepared again, or widened; dy; h and g; A, B and dB; scratch. */
  double total = 4 * M * k_ + M * (D + 32 * N) + 3 * M * R + R * (2 * k_ + 3 * D) +
                 (double)pylora_num_threads() * PYLORA_TILE + 4096 * (N + 1) + M;
  return total > 1e15 ? 0 : (size_t)total * sizeof(float);
}

size_t pylora_lora_workspace(int64_t m, int64_t d, int64_t k, int64_t r) {
  return pylora_linear_workspace(m, 1, d, k, r);
}

static int check_linear(const pylora_linear *l, const pylora_mat *x, int64_t segments, int dtype) {
  TRY(pylora_check_packed(l->W));
  const int64_t m = x->rows, d = l->W->d, k = l->W->k;
  if (l->W->dtype != dtype) return PYLORA_E_UNSUPPORTED;
  TRY(check_mat16(x, m, k, 0));
  TRY(check_mat16(l->y, m, d, 1));
  if (l->residual) TRY(check_mat(l->residual, m, d, 0));
  int64_t r = 0;
  for (int64_t s = 0; l->lora && s < segments; s++) {
    const pylora_lora *a = l->lora[s];
    if (!a) continue;
    TRY(pylora_check_lora(a, d, k));
    if (a->packed && ((const low_pack *)a->packed)->dtype != dtype) return PYLORA_E_PACKED;
    if (l->factor && l->factor[s] && a->drop && a->drop->p > 0) return PYLORA_E_UNSUPPORTED;
    if (segments > 1 && a->r && (!a->packed || (a->drop && a->drop->p > 0))) return PYLORA_E_VALUE;
    r = max64(r, a->r);
  }
  if (r && l->h) {
    if (segments > 1) return PYLORA_E_VALUE;
    TRY(check_mat(l->h, m, r, 1));
  }
  return PYLORA_OK;
}

/* Whether rows of x can be multiplied as they lie: the format's type, and a stride that is not one of
 * those that share the sets of an L1 cache. */
static int direct(const pylora_format *F, const pylora_mat *x) {
  const int64_t size = x->b ? 2 : 4;
  if (F->dtype != (x->b ? PYLORA_BF16 : PYLORA_F32) || (x->b && x->cols % 2)) return 0;
  return x->rows < 2 || (x->ld > 0 && (x->rows < 4 || x->ld * size % 2048 != 0));
}

/* Panels that make whole heads. */
static int64_t unit_of(const pylora_finish *e) {
  if (!e || !e->rotation) return 1;
  int64_t a = e->rotation->head_dim, b = PANEL;
  while (b) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return e->rotation->head_dim / a;
}

static int check_finish(const pylora_linear *l, const pylora_finish *e, int64_t i) {
  const int64_t m = l->y->rows, d = l->W->d;
  if (e->rotation) {
    const pylora_rotation *r = e->rotation;
    TRY(pylora_check_rope(&r->cosines, &r->sines, r->position, m, d, r->head_dim, r->layout));
    if (unit_of(e) > PYLORA_CHUNK_D) return PYLORA_E_UNSUPPORTED;
  }
  if (e->product) {
    if (i == 0 || e->rotation || e[-1].rotation || e[-1].product) return PYLORA_E_VALUE;
    if (l[-1].W->d != d) return PYLORA_E_SHAPE;
    if (e->activation < PYLORA_SILU || e->activation > PYLORA_RELU2) return PYLORA_E_VALUE;
    TRY(check_mat16(e->product, m, d, 1));
  }
  return PYLORA_OK;
}

static int check_norm(const pylora_norm *norm, int64_t k) {
  if (k == 0) return PYLORA_E_SHAPE; /* the mean of nothing */
  if (norm->dtype != PYLORA_F32 && norm->dtype != PYLORA_BF16) return PYLORA_E_UNSUPPORTED;
  if (norm->kind != PYLORA_RMS && norm->kind != PYLORA_LAYER) return PYLORA_E_VALUE;
  return norm->w ? PYLORA_OK : PYLORA_E_NULL;
}

/* Where the norm of x goes: rows that W's format multiplies as they lie, if they are of its type. */
static int normed(forward *f, arena *a, pylora_mat *x) {
  const int half = f->norm->dtype == PYLORA_BF16, own = f->F->dtype == f->norm->dtype;
  const size_t size = half ? sizeof(uint16_t) : sizeof(float),
               bytes = own ? f->F->row_bytes(f->k) : round_up((size_t)f->k * size);
  void *p = arena_bytes(a, (size_t)f->m * bytes);
  f->rstd = f->norm->rstd ? f->norm->rstd : arena_floats(a, f->m);
  if (!p || !f->rstd) return PYLORA_E_WORKSPACE;
  *x = (pylora_mat){half ? NULL : p, f->m, f->k, (int64_t)(bytes / size), half ? p : NULL, NULL};
  return PYLORA_OK;
}

/* Rows per task, on one thread where the work is too small to be handed to another. */
static void rows_of_task(forward *f, int64_t ranks, int *threads) {
  const double each = 2.0 * (double)ranks + (f->raw ? 8 : 0) + (f->prepared || f->wide ? 4 : 0);
  *threads = pylora_threads_for(each * (double)f->m * (double)f->k, *threads);
  f->per_rows = *threads == 1 ? ROWS : max64(1, min64(ROWS, ceil_div(f->m, 2 * *threads)));
}

/* With dropout a projection has rows of its own, used for h and let go. */
static int dropped_h(const forward *all, projection *p, arena a, int threads) {
  const pylora_drop *drop = p->l->lora[0]->drop;
  const pylora_mat *x = all->x;
  const int64_t m = all->m, k = all->k;
  const int pairs = all->F->dtype == PYLORA_BF16;
  forward f = *all;
  float *xa = arena_floats(&a, m * k);
  if (!xa) return PYLORA_E_WORKSPACE;
  const pylora_mat dropped = {xa, m, k, k, NULL, NULL};
  pylora_mat wide = {(float *)(uintptr_t)f.low_rows, m, k, f.low_stride, NULL, NULL};
  if (pairs) { /* the mask keeps or scales numbers of x, which are rounded after that */
    if (x->b) TRY(pylora_cast(x, &dropped));
    wide = x->b ? dropped : *x;
  }
  TRY(pylora_dropout(&wide, drop, &dropped));
  p->apart = 0;
  f.n = 1, f.p = p, f.down = 1;
  f.raw = NULL, f.wide = NULL, f.prepared = NULL;
  f.low_rows = xa, f.low_stride = k;
  if (pairs) {
    f.x = &dropped;
    f.stride = f.F->row_bytes(k);
    f.low_rows = f.prepared = arena_bytes(&a, (size_t)m * f.stride);
    if (!f.prepared) return PYLORA_E_WORKSPACE;
    f.low_stride = (int64_t)f.stride / 2;
  }
  rows_of_task(&f, p->l->lora[0]->r, &threads);
  pylora_parallel(pylora_rows_task, &f, ceil_div(m, f.per_rows), threads);
  return PYLORA_OK;
}

/* The adapters of a projection: where h goes, and an unpacked one packed. */
static int low_rank_of(const forward *f, projection *p, int64_t blocks, arena *a, int64_t *rank) {
  const pylora_linear *l = p->l;
  int64_t r = 0;
  for (int64_t s = 0; l->lora && s < f->segments; s++)
    if (l->lora[s]) r = max64(r, l->lora[s]->r);
  *rank = r;
  if (!r) return PYLORA_OK;
  p->h = l->h ? l->h->p : arena_floats(a, f->m * r);
  p->ldh = l->h ? l->h->ld : r;
  if (!p->h) return PYLORA_E_WORKSPACE;
  const pylora_lora *one = f->segments == 1 ? l->lora[0] : NULL;
  if (!one) return PYLORA_OK;
  p->own = one->packed;
  if (p->own) return PYLORA_OK;
  void *buffer = arena_bytes(a, pylora_lora_pack_bytes(f->F->dtype, l->W->d, f->k, r));
  if (!buffer) return PYLORA_E_WORKSPACE;
  /* One block of rows: a panel of Bt is read once, in the cache of the thread that packed it. */
  p->up_later = blocks == 1 && r <= PYLORA_CHUNK_D;
  TRY((p->up_later ? pylora_pack_down : pylora_lora_pack)(f->F->dtype, l->W->d, f->k, one, buffer));
  p->own = buffer;
  return PYLORA_OK;
}

int pylora_fused_forward(const pylora_mat *x, const pylora_norm *norm, int64_t n,
                         const pylora_linear *linear, const pylora_finish *finish, int64_t segments,
                         const int64_t *seg_start, void *ws, size_t ws_bytes) {
  if (!x || (n > 0 && !linear)) return PYLORA_E_NULL;
  if (n < 0 || (seg_start ? segments < 0 : segments != 1)) return PYLORA_E_SHAPE;
  if (n == 0) return PYLORA_OK;
  TRY(pylora_check_packed(linear[0].W));
  const int dtype = linear[0].W->dtype, threads = pylora_num_threads();
  const int64_t m = x->rows, k = x->cols;
  for (int64_t i = 0; i < n; i++) TRY(check_linear(linear + i, x, segments, dtype));
  for (int64_t i = 0; finish && i < n; i++) TRY(check_finish(linear + i, finish + i, i));
  if (norm && m) TRY(check_norm(norm, k));
  const int64_t whole[2] = {0, m};
  const int64_t *start = seg_start ? seg_start : whole;
  for (int64_t s = 0; s < segments; s++)
    if (start[s] < 0 || start[s] > start[s + 1]) return PYLORA_E_SHAPE;
  if (segments ? start[0] != 0 || start[segments] != m : m != 0) return PYLORA_E_SHAPE;

  arena a = arena_of(ws, ws_bytes);
  forward f = {.K = pylora_table(), .F = pylora_format_of(dtype), .m = m, .k = k, .n = n};
  f.segments = segments;
  f.start = start;
  projection *p = (projection *)(void *)arena_bytes(&a, (size_t)n * sizeof *p);
  f.tiles = arena_floats(&a, (int64_t)threads * PYLORA_TILE);
  if (!p || !f.tiles) return PYLORA_E_WORKSPACE;
  f.p = p;
  if (m == 0) return PYLORA_OK;

  pylora_mat own;
  f.x = x;
  if (norm) {
    f.norm = norm;
    f.raw = x;
    TRY(normed(&f, &a, &own));
    f.x = x = &own;
  }
  f.rows = x->b ? (const void *)x->b : (const void *)x->p;
  f.stride = m > 1 ? (size_t)x->ld * (x->b ? 2 : 4) : 0;
  if (!(norm ? f.F->dtype == norm->dtype : direct(f.F, x))) {
    f.stride = f.F->row_bytes(k);
    f.rows = f.prepared = arena_bytes(&a, (size_t)m * f.stride);
    if (!f.prepared) return PYLORA_E_WORKSPACE;
  }

  const int64_t bytes = max64(1, (int64_t)f.F->row_bytes(k));
  f.block = min64(PYLORA_MAX_ROWS / 2, max64(48, BLOCK_BYTES / bytes / 12 * 12));
  if (f.K->tiles && f.F->products &&
      !f.F->many) /* equal blocks: long rows are multiplied in pieces */
    f.block = ceil_div(ceil_div(m, ceil_div(m, TILE_ROWS)), 32) * 32;
  for (int64_t i = 0; i < n; i++) {
    p[i] = (projection){.l = linear + i, .panels = ceil_div(linear[i].W->d, PANEL), .pair = 1};
    p[i].finish = finish ? finish + i : NULL;
    p[i].unit = unit_of(p[i].finish);
    for (int64_t s = 0; linear[i].factor && s < segments; s++)
      p[i].scaled |= linear[i].factor[s] != NULL;
    if (p[i].finish && p[i].finish->product) p[i - 1].pair = 2;
    f.block = min64(f.block, PYLORA_MAX_ROWS / p[i].unit);
  }
  const int64_t blocks = ceil_div(m, f.block);

  /* What A is multiplied with: the rows of W's product where these are bfloat16 or float32, else x in
   * float32. */
  const int pairs = dtype == PYLORA_BF16;
  f.low_rows = pairs || dtype == PYLORA_F32 ? f.rows : (const void *)x->p;
  f.low_stride = pairs                 ? (int64_t)f.stride / 2
                 : dtype == PYLORA_F32 ? (int64_t)f.stride / 4
                                       : x->ld;
  int64_t outputs = 0, ranks = 0;
  for (int64_t i = 0, r; i < n; i++) {
    outputs += p[i].panels;
    TRY(low_rank_of(&f, p + i, blocks, &a, &r));
    if (!r) continue;
    if (!f.low_rows && k) { /* a quantized W and a bfloat16 x */
      f.low_rows = f.wide = arena_floats(&a, m * k);
      if (!f.wide) return PYLORA_E_WORKSPACE;
      f.low_stride = k;
    }
    const pylora_lora *one = segments == 1 ? linear[i].lora[0] : NULL;
    p[i].apart = one && one->drop && one->drop->p > 0;
    if (!p[i].apart) ranks += r;
  }
  f.down = ranks > 0;
  if (f.raw || f.prepared || f.wide || f.down) {
    int some = threads;
    rows_of_task(&f, ranks, &some);
    pylora_parallel(pylora_rows_task, &f, ceil_div(m, f.per_rows), some);
  }
  for (int64_t i = 0; i < n; i++)
    if (p[i].apart) TRY(dropped_h(&f, p + i, a, threads));
  if (!outputs) return PYLORA_OK;

  /* Small tasks are shared out evenly; with many adapters each task better has a few panels of each. */
  const int64_t tasks = (segments > 1 ? 4 : 8) * threads;
  const int64_t least = m == 1 ? 2 : 1; /* sums of one row wait for each other less in two panels */
  const int64_t each =
      min64(f.K->tiles ? TILE_GROUP : GROUP, max64(least, outputs * blocks / tasks));
  for (int64_t i = 0; i < n; i++) {
    p[i].per_group = ceil_div(each, p[i].unit) * p[i].unit;
    if (!finish || !finish[i].product) p[i].groups = ceil_div(p[i].panels, p[i].per_group);
    f.all_groups += p[i].groups;
  }
  pylora_parallel(pylora_tiles_task, &f, blocks * f.all_groups, threads);
  return PYLORA_OK;
}

int pylora_linear_forward(const pylora_mat *x, int64_t n, const pylora_linear *linear,
                          int64_t segments, const int64_t *seg_start, void *ws, size_t ws_bytes) {
  return pylora_fused_forward(x, NULL, n, linear, NULL, segments, seg_start, ws, ws_bytes);
}

int pylora_lora_forward(const pylora_mat *x, const pylora_packed *W, const float *bias,
                        const pylora_lora *lora, const pylora_mat *residual, const pylora_mat *y,
                        const pylora_mat *h, void *ws, size_t ws_bytes) {
  if (lora && lora->r && !h) return PYLORA_E_NULL;
  const pylora_linear l = {W, bias, lora ? &lora : NULL, residual, y, h, NULL};
  return pylora_linear_forward(x, 1, &l, 1, NULL, ws, ws_bytes);
}
