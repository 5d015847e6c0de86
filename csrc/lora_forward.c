/* lora_forward.c - projections of one x with their adapters: y = residual + x Wᵀ + bias + s h Bᵀ.
 *
 * x is put into the form that W's format multiplies (once for all projections), then h = x Aᵀ, then y.
 * One task of y = some panels of 32 outputs of a block of rows: the tile is summed over k, then over
 * the rank, in scratch that stays in L1, and is stored once with bias and residual.
 *
 * Every sum runs in one order (see cpu/kernels.h), whatever the blocks, segments and threads. */
#include "low_rank.h"

enum {
  PANEL = PYLORA_PANEL,
  BLOCK_BYTES = 384 * 1024, /* prepared rows per block: half of a usual L2 */
  GROUP = 4,                /* panels per task while there are many */
  H_ROWS = 64,              /* rows of h per task */
};

size_t pylora_linear_workspace(int64_t m, int64_t n, int64_t d, int64_t k, int64_t r) {
  const int64_t most = (int64_t)1 << 40;
  if (m < 0 || n < 0 || d < 0 || k < 0 || r < 0 || m > most || n > most || d > most || k > most ||
      r > most)
    return 0;
  const double M = (double)m, N = (double)n, D = (double)d + 32 * N, k_ = (double)k + 64,
               R = (double)r + 32 * N;
  /* In floats: x prepared, dropped and widened, twice over; dy; h and g; A, B and dB; scratch. */
  double total = 4 * M * k_ + M * (D + 32 * N) + 3 * M * R + R * (2 * k_ + 3 * D) +
                 (double)pylora_num_threads() * PYLORA_TILE + 4096 * (N + 1) + M;
  return total > 1e15 ? 0 : (size_t)total * sizeof(float);
}

size_t pylora_lora_workspace(int64_t m, int64_t d, int64_t k, int64_t r) {
  return pylora_linear_workspace(m, 1, d, k, r);
}

/* One projection, looked at once before any work. */
typedef struct projection {
  const pylora_linear *l;
  const low_pack *own; /* packed here (one segment), or NULL */
  int up_later;        /* own has no Bt: each task packs the panel that it alone needs */
  float *h;            /* [m, ldh]; NULL: no adapters */
  int64_t ldh;
  int64_t panels, groups; /* of y */
  int done;               /* h is there already */
} projection;

typedef struct fwd {
  const pylora_kernels *K;
  const pylora_format *F;
  const pylora_mat *x;
  int64_t m, k, n;
  const projection *p;
  int64_t segments;
  const int64_t *start;   /* [segments + 1] */
  const int64_t *h_block; /* [segments + 1]: tasks of h before each segment */
  const void *rows;       /* prepared x */
  size_t stride;
  const void *low_rows; /* what A is multiplied with: float32 or bfloat16 */
  int64_t low_stride;   /* in elements */
  void *out;            /* where prepare_rows writes */
  const pylora_mat *from;
  int64_t block, all_groups, per_group;
  float *tiles;
} fwd;

static const low_pack *adapter(const projection *p, int64_t segment) {
  if (p->own) return p->own;
  const pylora_lora *l = p->l->lora ? p->l->lora[segment] : NULL;
  return l && l->r ? l->packed : NULL;
}

static void prepare_rows(void *ctx, int64_t task, int thread) {
  (void)thread;
  const fwd *f = ctx;
  const int64_t i = task * H_ROWS;
  f->F->prepare(f->K, f->from, i, min64(H_ROWS, f->m - i), (char *)f->out + (size_t)i * f->stride);
}

static void widen_rows(void *ctx, int64_t task, int thread) {
  (void)thread;
  const fwd *f = ctx;
  for (int64_t i = task * H_ROWS; i < min64(f->m, (task + 1) * H_ROWS); i++)
    f->K->from_bf16(f->k, f->x->b + i * f->x->ld, (float *)f->out + i * f->k);
}

/* h for a block of rows of one segment, for one projection */
static void h_block(void *ctx, int64_t task, int thread) {
  (void)thread;
  const fwd *f = ctx;
  const int64_t blocks = f->h_block[f->segments], b = task % blocks;
  const projection *p = f->p + task / blocks;
  int64_t s = 0, top = f->segments - 1; /* the last segment with h_block[s] <= b */
  while (s < top) {
    const int64_t mid = (s + top + 1) / 2;
    if (f->h_block[mid] <= b)
      s = mid;
    else
      top = mid - 1;
  }
  const low_pack *P = p->h && !p->done ? adapter(p, s) : NULL;
  if (!P) return;
  const int64_t i = f->start[s] + (b - f->h_block[s]) * H_ROWS,
                n = min64(H_ROWS, f->start[s + 1] - i);
  const size_t size = P->dtype == PYLORA_BF16 ? sizeof(uint16_t) : sizeof(float);
  pylora_down(f->K, P, n, (const char *)f->low_rows + i * f->low_stride * (int64_t)size,
              f->low_stride, p->h + i * p->ldh, p->ldh);
}

static void store_tile(const fwd *f, const pylora_linear *l, int64_t i, int64_t n, int64_t j,
                       float *tile) {
  const int64_t cols = min64(PANEL, l->W->d - j);
  for (int64_t t = 0; t < n; t++) {
    float *c = tile + t * PANEL;
    if (l->residual) {
      const float *res = l->residual->p + (i + t) * l->residual->ld + j;
      for (int64_t q = 0; q < cols; q++) c[q] = res[q] + c[q];
    }
    if (l->y->b)
      f->K->to_bf16(cols, c, l->y->b + (i + t) * l->y->ld + j);
    else
      memcpy(l->y->p + (i + t) * l->y->ld + j, c, (size_t)cols * sizeof(float));
  }
}

/* Some panels of one projection for a block of rows */
static void y_block(void *ctx, int64_t task, int thread) {
  const fwd *f = ctx;
  const int64_t i = task / f->all_groups * f->block, n = min64(f->block, f->m - i);
  int64_t g = task % f->all_groups;
  const projection *p = f->p;
  while (g >= p->groups) g -= (p++)->groups;
  const pylora_linear *l = p->l;
  float *tile = f->tiles + (int64_t)thread * PYLORA_TILE, *up = tile + PYLORA_MAX_ROWS * PANEL;
  const size_t panel_bytes = f->F->panel_bytes(f->k);
  for (int64_t q = g * f->per_group; q < min64(p->panels, (g + 1) * f->per_group); q++) {
    f->F->product(f->K, n, f->k, (const char *)f->rows + (size_t)i * f->stride, f->stride,
                  (const char *)l->W->data + (size_t)q * panel_bytes, tile);
    if (l->bias) {
      const int64_t cols = min64(PANEL, l->W->d - q * PANEL);
      for (int64_t t = 0; t < n; t++)
        for (int64_t c = 0; c < cols; c++) tile[t * PANEL + c] += l->bias[q * PANEL + c];
    }
    for (int64_t s = 0; p->h && s < f->segments; s++) {
      const int64_t a = max64(i, f->start[s]), b = min64(i + n, f->start[s + 1]);
      const low_pack *P = a < b ? adapter(p, s) : NULL;
      if (!P || !P->active) continue;
      const float *bt = low_bt(P, q);
      if (p->up_later) {
        pylora_pack_up(f->K, l->lora[0], l->W->d, q, up);
        bt = up;
      }
      f->K->gemm(b - a, PANEL, P->r, p->h + a * p->ldh, p->ldh, 1, bt, PANEL,
                 tile + (a - i) * PANEL, PANEL, GEMM_ADD);
    }
    store_tile(f, l, i, n, q * PANEL, tile);
  }
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

int pylora_linear_forward(const pylora_mat *x, int64_t n, const pylora_linear *linear,
                          int64_t segments, const int64_t *seg_start, void *ws, size_t ws_bytes) {
  if (!x || (n > 0 && !linear)) return PYLORA_E_NULL;
  if (n < 0 || (seg_start ? segments < 0 : segments != 1)) return PYLORA_E_SHAPE;
  if (n == 0) return PYLORA_OK;
  TRY(pylora_check_packed(linear[0].W));
  const int dtype = linear[0].W->dtype, threads = pylora_num_threads();
  const int64_t m = x->rows, k = x->cols;
  for (int64_t i = 0; i < n; i++) TRY(check_linear(linear + i, x, segments, dtype));
  const int64_t whole[2] = {0, m};
  const int64_t *start = seg_start ? seg_start : whole;
  for (int64_t s = 0; s < segments; s++)
    if (start[s] < 0 || start[s] > start[s + 1]) return PYLORA_E_SHAPE;
  if (segments ? start[0] != 0 || start[segments] != m : m != 0) return PYLORA_E_SHAPE;

  arena a = arena_of(ws, ws_bytes);
  fwd f = {.K = pylora_table(), .F = pylora_format_of(dtype), .x = x, .m = m, .k = k, .n = n};
  f.segments = segments;
  f.start = start;
  projection *p = (projection *)(void *)arena_bytes(&a, (size_t)n * sizeof *p);
  int64_t *h_start = (int64_t *)(void *)arena_bytes(&a, ((size_t)segments + 1) * sizeof *h_start);
  f.tiles = arena_floats(&a, (int64_t)threads * PYLORA_TILE);
  if (!p || !h_start || !f.tiles) return PYLORA_E_WORKSPACE;
  h_start[0] = 0;
  for (int64_t s = 0; s < segments; s++)
    h_start[s + 1] = h_start[s] + ceil_div(start[s + 1] - start[s], H_ROWS);
  f.h_block = h_start;
  f.p = p;
  if (m == 0) return PYLORA_OK;

  f.rows = x->b ? (const void *)x->b : (const void *)x->p;
  f.stride = m > 1 ? (size_t)x->ld * (x->b ? 2 : 4) : 0;
  const int as_is = direct(f.F, x);
  if (!as_is) {
    f.stride = f.F->row_bytes(k);
    f.from = x;
    f.rows = f.out = arena_bytes(&a, (size_t)m * f.stride);
    if (!f.out) return PYLORA_E_WORKSPACE;
    pylora_parallel(prepare_rows, &f, ceil_div(m, H_ROWS), threads);
  }

  const int64_t bytes = max64(1, (int64_t)f.F->row_bytes(k));
  f.block = min64(PYLORA_MAX_ROWS, max64(48, BLOCK_BYTES / bytes / 12 * 12));
  const int64_t blocks = ceil_div(m, f.block);
  int64_t outputs = 0, ranks = 0;
  int late = 0; /* adapters whose h is still to be computed, all at once */
  const int pairs = dtype == PYLORA_BF16;
  /* What A is multiplied with: the rows of W's product where these are bfloat16 or float32, else x in
   * float32. */
  f.low_rows = pairs || dtype == PYLORA_F32 ? f.rows : (const void *)x->p;
  f.low_stride = pairs                 ? (int64_t)f.stride / 2
                 : dtype == PYLORA_F32 ? (int64_t)f.stride / 4
                                       : x->ld;
  for (int64_t i = 0; i < n; i++) {
    const pylora_linear *l = linear + i;
    int64_t r = 0;
    for (int64_t s = 0; l->lora && s < segments; s++)
      if (l->lora[s]) r = max64(r, l->lora[s]->r);
    p[i] = (projection){.l = l, .panels = ceil_div(l->W->d, PANEL)};
    outputs += p[i].panels;
    if (!r) continue;
    ranks += r;
    if (l->h) {
      p[i].h = l->h->p;
      p[i].ldh = l->h->ld;
    } else {
      p[i].ldh = r;
      if (!(p[i].h = arena_floats(&a, m * r))) return PYLORA_E_WORKSPACE;
    }
    const pylora_lora *one = segments == 1 ? l->lora[0] : NULL;
    if (one && !one->packed) {
      void *buffer = arena_bytes(&a, pylora_lora_pack_bytes(dtype, l->W->d, k, r));
      if (!buffer) return PYLORA_E_WORKSPACE;
      /* One block of rows: a panel of Bt is read once, in the cache of the thread that packed it. */
      p[i].up_later = blocks == 1 && r <= PYLORA_CHUNK_D;
      TRY((p[i].up_later ? pylora_pack_down : pylora_lora_pack)(dtype, l->W->d, k, one, buffer));
      p[i].own = buffer;
    } else if (one) {
      p[i].own = one->packed;
    }
    if (!f.low_rows && k) { /* a quantized W and a bfloat16 x */
      f.low_rows = f.out = arena_bytes(&a, (size_t)m * (size_t)k * sizeof(float));
      if (!f.out) return PYLORA_E_WORKSPACE;
      f.low_stride = k;
      pylora_parallel(widen_rows, &f, ceil_div(m, H_ROWS), threads);
    }
    if (!one || !one->drop || one->drop->p == 0) {
      late = 1;
      continue;
    }
    /* With dropout each projection has rows of its own, used for h and let go. */
    const arena mark = a;
    fwd own = f;
    own.n = 1;
    own.p = p + i;
    float *xa = arena_floats(&a, m * k);
    if (!xa) return PYLORA_E_WORKSPACE;
    pylora_mat dropped = {xa, m, k, k, NULL, NULL},
               wide = {(float *)f.low_rows, m, k, f.low_stride, NULL, NULL};
    if (pairs) { /* the mask keeps or scales numbers of x, which are rounded after that */
      if (x->b) {
        own.out = xa;
        pylora_parallel(widen_rows, &own, ceil_div(m, H_ROWS), threads);
        wide = dropped;
      } else {
        wide = *x;
      }
    }
    TRY(pylora_dropout(&wide, one->drop, &dropped));
    own.low_rows = xa;
    own.low_stride = k;
    if (pairs) {
      own.from = &dropped;
      own.stride = f.F->row_bytes(k);
      own.low_rows = own.out = arena_bytes(&a, (size_t)m * own.stride);
      if (!own.out) return PYLORA_E_WORKSPACE;
      own.low_stride = (int64_t)own.stride / 2;
      pylora_parallel(prepare_rows, &own, ceil_div(m, H_ROWS), threads);
    }
    pylora_parallel(h_block, &own, h_start[segments], threads);
    p[i].done = 1;
    a = mark;
  }
  if (late)
    pylora_parallel(h_block, &f, n * h_start[segments],
                    pylora_threads_for(2.0 * (double)m * (double)k * (double)ranks, threads));
  if (!outputs) return PYLORA_OK;

  f.per_group = min64(GROUP, max64(1, outputs * blocks / (8 * threads)));
  for (int64_t i = 0; i < n; i++) f.all_groups += p[i].groups = ceil_div(p[i].panels, f.per_group);
  pylora_parallel(y_block, &f, blocks * f.all_groups, threads);
  return PYLORA_OK;
}

int pylora_lora_forward(const pylora_mat *x, const pylora_packed *W, const float *bias,
                        const pylora_lora *lora, const pylora_mat *residual, const pylora_mat *y,
                        const pylora_mat *h, void *ws, size_t ws_bytes) {
  if (lora && lora->r && !h) return PYLORA_E_NULL;
  const pylora_linear l = {W, bias, lora ? &lora : NULL, residual, y, h};
  return pylora_linear_forward(x, 1, &l, 1, NULL, ws, ws_bytes);
}
