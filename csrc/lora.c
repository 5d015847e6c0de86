/* lora.c - the LoRA linear layer on the kernel table: y = residual + x Wᵀ + bias + s h Bᵀ, and back.
 *
 * Forward, one task = 32 outputs (a panel) of a block of rows: the tile of y is summed over k, then
 * over the rank, in scratch that stays in L1, and is stored once with bias and residual.
 *
 * Backward, one task = 32 inputs: W's panels are transposed 32 x 32 on the way, which for many rows
 * costs a percent and saves a second copy of the weights in memory.
 *
 * Every sum runs in one order (see cpu/kernels.h), whatever the blocks and threads.  Sums of more than
 * a thousand terms are added up in pieces: at the head, dx sums over the vocabulary, and one chain of
 * 49,152 terms would lose the small ones. */
#include "internal.h"

enum {
  PANEL = PYLORA_PANEL,
  BLOCK_BYTES = 384 * 1024, /* rows of x per block: half of a usual L2 */
  MAX_ROWS = 1024,          /* rows per block at most; sizes the scratch tile */
  CHUNK = 1024,             /* terms of a sum that are added up in one chain */
  CHUNK_D = 512,            /* backward: rows of W transposed at a time (64 KiB) */
  GROUP = 4,                /* panels per task while there are many */
};

/* ---- checks and workspace ---- */

static int check_lora(const pylora_lora *l, int64_t d, int64_t k) {
  if (l->r < 0) return PYLORA_E_SHAPE;
  if (l->r && ((!l->A && k) || (!l->B && d))) return PYLORA_E_NULL;
  if (l->drop && !(l->drop->p >= 0 && l->drop->p < 1)) return PYLORA_E_VALUE;
  return PYLORA_OK;
}

size_t pylora_lora_workspace(int64_t m, int64_t d, int64_t k, int64_t r) {
  const int64_t most = (int64_t)1 << 40;
  if (m < 0 || d < 0 || k < 0 || r < 0 || m > most || d > most || k > most || r > most) return 0;
  const int64_t sides[][2] = {
      {m, k}, {pad_panel(r), pad_panel(k)}, {pad_panel(d), pad_panel(r)}, {m, r}};
  double total = (double)pylora_num_threads() * (MAX_ROWS + CHUNK_D) * PANEL;
  for (int i = 0; i < 4; i++) total += 2.0 * (double)sides[i][0] * (double)sides[i][1] + 64;
  if (total > 1e15) return 0;
  return (size_t)total * sizeof(float) + 64 * PYLORA_ALIGN;
}

static int any_nonzero(const float *B, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++)
      if (B[i * ld + j] != 0) return 1; /* also NaN */
  return 0;
}

/* The kernel's product, with the kk terms in pieces of equal length of at most CHUNK. */
static int64_t piece(int64_t kk) { return ceil_div(kk, max64(1, ceil_div(kk, CHUNK))); }
static void product(const pylora_kernels *K, int64_t m, int64_t n, int64_t kk, const float *a,
                    int64_t ars, int64_t acs, const float *b, int64_t ldb, float *c, int64_t ldc) {
  const int64_t step = piece(kk);
  K->gemm(m, (int)n, step, a, ars, acs, b, ldb, c, ldc, GEMM_SET);
  for (int64_t t = step; t < kk; t += step)
    K->gemm(m, (int)n, min64(step, kk - t), a + t * acs, ars, acs, b + t * ldb, ldb, c, ldc,
            GEMM_ADD);
}

/* ---- forward ---- */

typedef struct fwd {
  const pylora_kernels *K;
  const pylora_mat *x, *y, *residual;
  const pylora_packed *W;
  const float *bias;
  const float *At; /* [ceil(r/32)][k][32]: A transposed in panels */
  const float *Bt; /* [ceil(d/32)][r][32]: s B transposed in panels */
  const pylora_mat *xa, *h;
  int64_t r, low; /* low: r, or 0 when B is all zeros */
  int64_t rows, groups, per_group;
  float *tiles; /* a tile per thread */
} fwd;

static void pack_low(const float *M, int64_t rows, int64_t cols, int64_t ld, float scale,
                     float *out) {
  for (int64_t p = 0; p < ceil_div(rows, PANEL); p++, out += cols * PANEL) {
    int64_t n = min64(PANEL, rows - p * PANEL);
    if (n < PANEL) memset(out, 0, (size_t)(cols * PANEL) * sizeof(float));
    for (int64_t j = 0; j < n; j++)
      for (int64_t t = 0; t < cols; t++) out[t * PANEL + j] = scale * M[(p * PANEL + j) * ld + t];
  }
}

/* h = xa Aᵀ for a block of rows */
static void h_block(void *ctx, int64_t task, int thread) {
  (void)thread;
  const fwd *f = ctx;
  int64_t i = task * 64, n = min64(64, f->xa->rows - i), k = f->xa->cols;
  for (int64_t j = 0; j < f->r; j += PANEL)
    product(f->K, n, min64(PANEL, f->r - j), k, f->xa->p + i * f->xa->ld, f->xa->ld, 1,
            f->At + j * k, PANEL, f->h->p + i * f->h->ld + j, f->h->ld);
}

static void store_tile(const fwd *f, int64_t i, int64_t n, int64_t j, const float *tile) {
  int64_t cols = min64(PANEL, f->W->d - j);
  for (int64_t t = 0; t < n; t++) {
    float *y = f->y->p + (i + t) * f->y->ld + j;
    const float *c = tile + t * PANEL;
    if (f->residual) {
      const float *res = f->residual->p + (i + t) * f->residual->ld + j;
      for (int64_t q = 0; q < cols; q++) y[q] = res[q] + c[q];
    } else {
      memcpy(y, c, (size_t)cols * sizeof(float));
    }
  }
}

static void y_block(void *ctx, int64_t task, int thread) {
  const fwd *f = ctx;
  const pylora_mat *x = f->x;
  int64_t k = f->W->k, panels = ceil_div(f->W->d, PANEL);
  int64_t i = task / f->groups * f->rows, n = min64(f->rows, x->rows - i);
  int64_t p0 = task % f->groups * f->per_group, p1 = min64(panels, p0 + f->per_group);
  float *tile = f->tiles + (int64_t)thread * (MAX_ROWS + CHUNK_D) * PANEL;
  for (int64_t p = p0; p < p1; p++) {
    const float *panel = (const float *)f->W->data + p * k * PANEL;
    product(f->K, n, PANEL, k, x->p + i * x->ld, x->ld, 1, panel, PANEL, tile, PANEL);
    if (f->bias) {
      int64_t cols = min64(PANEL, f->W->d - p * PANEL);
      for (int64_t t = 0; t < n; t++)
        for (int64_t q = 0; q < cols; q++) tile[t * PANEL + q] += f->bias[p * PANEL + q];
    }
    if (f->low)
      f->K->gemm(n, PANEL, f->low, f->h->p + i * f->h->ld, f->h->ld, 1, f->Bt + p * f->low * PANEL,
                 PANEL, tile, PANEL, GEMM_ADD);
    store_tile(f, i, n, p * PANEL, tile);
  }
}

int pylora_lora_forward(const pylora_mat *x, const pylora_packed *W, const float *bias,
                        const pylora_lora *lora, const pylora_mat *residual, const pylora_mat *y,
                        const pylora_mat *h, void *ws, size_t ws_bytes) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_packed(W));
  int64_t m = x->rows, d = W->d, k = W->k, r = lora ? lora->r : 0;
  TRY(check_mat(x, m, k, 0));
  TRY(check_mat(y, m, d, 1));
  if (residual) TRY(check_mat(residual, m, d, 0));
  if (lora) TRY(check_lora(lora, d, k));
  if (r) TRY(check_mat(h, m, r, 1));
  int threads = pylora_num_threads();
  arena a = arena_of(ws, ws_bytes);
  fwd f = {.K = pylora_table(),
           .x = x,
           .y = y,
           .residual = residual,
           .W = W,
           .bias = bias,
           .h = h,
           .r = r};
  pylora_mat dropped;
  if (!(f.tiles = arena_floats(&a, (int64_t)threads * (MAX_ROWS + CHUNK_D) * PANEL)))
    return PYLORA_E_WORKSPACE;
  if (r) {
    float *At = arena_floats(&a, pad_panel(r) * k), *Bt = arena_floats(&a, pad_panel(d) * r);
    int drops = lora->drop && lora->drop->p > 0;
    float *xa = drops ? arena_floats(&a, m * k) : NULL;
    if (!At || !Bt || (drops && !xa)) return PYLORA_E_WORKSPACE;
    if (m == 0 || d == 0) return PYLORA_OK;
    f.xa = x;
    if (drops) {
      dropped = (pylora_mat){xa, m, k, k};
      TRY(pylora_dropout(x, lora->drop, &dropped));
      f.xa = &dropped;
    }
    pack_low(lora->A, r, k, lora->lda, 1, At);
    f.At = At;
    pylora_parallel(h_block, &f, ceil_div(m, 64), threads);
    if (any_nonzero(lora->B, d, r, lora->ldb)) {
      pack_low(lora->B, d, r, lora->ldb, lora->s, Bt);
      f.Bt = Bt;
      f.low = r;
    }
  }
  if (m == 0 || d == 0) return PYLORA_OK;
  int64_t panels = ceil_div(d, PANEL);
  f.rows = min64(MAX_ROWS, max64(48, BLOCK_BYTES / (int64_t)sizeof(float) / max64(k, 1) / 12 * 12));
  int64_t blocks = ceil_div(m, f.rows);
  f.per_group = min64(GROUP, max64(1, panels * blocks / (4 * threads)));
  f.groups = ceil_div(panels, f.per_group);
  pylora_parallel(y_block, &f, blocks * f.groups, threads);
  return PYLORA_OK;
}

/* ---- backward ---- */

typedef struct bwd {
  const pylora_kernels *K;
  const pylora_mat *dy, *x, *h, *dx, *dA, *dB;
  const pylora_packed *W;
  const pylora_lora *lora;
  const pylora_drop *drop;
  int64_t r, rows, strips;
  int add, low;
  float *g;   /* [m,r]: dy B, then s dy B */
  float *dBt; /* [r,d] */
  float *tiles;
} bwd;

/* g = s dy B for a block of rows */
static void g_block(void *ctx, int64_t task, int thread) {
  (void)thread;
  const bwd *w = ctx;
  const pylora_lora *l = w->lora;
  int64_t i = task * 64, n = min64(64, w->dy->rows - i);
  for (int64_t j = 0; j < w->r; j += PANEL)
    product(w->K, n, min64(PANEL, w->r - j), w->dy->cols, w->dy->p + i * w->dy->ld, w->dy->ld, 1,
            l->B + j, l->ldb, w->g + i * w->r + j, w->r);
  for (int64_t t = i * w->r; t < (i + n) * w->r; t++) w->g[t] *= l->s;
}

/* 32 columns of (s dyᵀ h)ᵀ = s hᵀ dy: dy is read along its rows */
static void dB_strip(void *ctx, int64_t task, int thread) {
  (void)thread;
  const bwd *w = ctx;
  int64_t j = task * PANEL, d = w->dy->cols;
  int n = (int)min64(PANEL, d - j);
  product(w->K, w->r, n, w->dy->rows, w->h->p, 1, w->h->ld, w->dy->p + j, w->dy->ld, w->dBt + j, d);
  for (int64_t i = 0; i < n; i++)
    for (int64_t t = 0; t < w->r; t++)
      w->dB->p[(j + i) * w->dB->ld + t] = w->lora->s * w->dBt[t * d + j + i];
}

/* 32 columns of dA = (s g)ᵀ x */
static void dA_strip(void *ctx, int64_t task, int thread) {
  (void)thread;
  const bwd *w = ctx;
  int64_t j = task * PANEL;
  product(w->K, w->r, min64(PANEL, w->x->cols - j), w->x->rows, w->g, 1, w->r, w->x->p + j,
          w->x->ld, w->dA->p + j, w->dA->ld);
}

/* 32 columns of dx for a block of rows: dy W, the 32 x 32 tiles of W transposed chunk by chunk */
static void dx_block(void *ctx, int64_t task, int thread) {
  const bwd *w = ctx;
  int64_t d = w->W->d, k = w->W->k, i = task / w->strips * w->rows,
          n = min64(w->rows, w->dy->rows - i);
  int64_t j = task % w->strips * PANEL, cols = min64(PANEL, k - j);
  float *tile = w->tiles + (int64_t)thread * (MAX_ROWS + CHUNK_D) * PANEL,
        *Wt = tile + MAX_ROWS * PANEL;
  memset(tile, 0, (size_t)(n * PANEL) * sizeof(float));
  for (int64_t t = 0; t < d; t += CHUNK_D) {
    int64_t rows = min64(CHUNK_D, d - t);
    for (int64_t q = 0; q < rows; q += PANEL) {
      const float *panel = (const float *)w->W->data + (t + q) / PANEL * k * PANEL + j * PANEL;
      if (cols == PANEL) {
        w->K->transpose32(panel, Wt + q * PANEL);
      } else {
        for (int64_t a = 0; a < PANEL; a++)
          for (int64_t b = 0; b < PANEL; b++)
            Wt[(q + a) * PANEL + b] = b < cols ? panel[b * PANEL + a] : 0;
      }
    }
    w->K->gemm(n, PANEL, rows, w->dy->p + i * w->dy->ld + t, w->dy->ld, 1, Wt, PANEL, tile, PANEL,
               GEMM_ADD);
  }
  if (w->low) {
    const pylora_lora *l = w->lora;
    if (!w->drop) {
      w->K->gemm(n, (int)cols, w->r, w->g + i * w->r, w->r, 1, l->A + j, l->lda, tile, PANEL,
                 GEMM_ADD);
    } else { /* the same mask as forward's, from the same words */
      for (int64_t q = 0; q < n; q++) {
        float *low = Wt, *c = tile + q * PANEL;
        w->K->gemm(1, (int)cols, w->r, w->g + (i + q) * w->r, w->r, 1, l->A + j, l->lda, low, PANEL,
                   GEMM_SET);
        pylora_mat one = {low, 1, cols, cols};
        pylora_dropout_at(&one, w->drop, i + q, j, k, &one);
        for (int64_t b = 0; b < cols; b++) c[b] += low[b];
      }
    }
  }
  for (int64_t q = 0; q < n; q++) {
    float *out = w->dx->p + (i + q) * w->dx->ld + j;
    const float *c = tile + q * PANEL;
    if (w->add)
      for (int64_t b = 0; b < cols; b++) out[b] += c[b];
    else
      memcpy(out, c, (size_t)cols * sizeof(float));
  }
}

int pylora_lora_backward(const pylora_mat *dy, const pylora_mat *x, const pylora_mat *h,
                         const pylora_packed *W, const pylora_lora *lora, const pylora_mat *dx,
                         int add_dx, const pylora_mat *dA, const pylora_mat *dB, void *ws,
                         size_t ws_bytes) {
  if (!dy) return PYLORA_E_NULL;
  int64_t m = dy->rows, d = dy->cols, r = lora ? lora->r : 0;
  if ((dA || dB) && !lora) return PYLORA_E_NULL;
  int64_t k = dx ? dx->cols : dA ? dA->cols : 0;
  TRY(check_mat(dy, m, d, 0));
  if (dx) {
    TRY(check_packed(W));
    k = W->k;
    if (W->d != d) return PYLORA_E_SHAPE;
    TRY(check_mat(dx, m, k, 1));
  }
  if (lora) TRY(check_lora(lora, d, k));
  if (dA) {
    TRY(check_mat(dA, r, k, 1));
    TRY(check_mat(x, m, k, 0));
  }
  if (dB) {
    TRY(check_mat(dB, d, r, 1));
    TRY(check_mat(h, m, r, 0));
  }
  int threads = pylora_num_threads();
  arena a = arena_of(ws, ws_bytes);
  bwd w = {.K = pylora_table(),
           .dy = dy,
           .x = x,
           .h = h,
           .dx = dx,
           .dA = dA,
           .dB = dB,
           .W = W,
           .lora = lora,
           .r = r,
           .add = add_dx};
  if (r && lora->drop && lora->drop->p > 0) w.drop = lora->drop;
  float *xa = NULL;
  pylora_mat dropped;
  if (!(w.tiles = arena_floats(&a, (int64_t)threads * (MAX_ROWS + CHUNK_D) * PANEL)) ||
      !(w.g = arena_floats(&a, m * r)) || !(w.dBt = arena_floats(&a, pad_panel(d) * r)))
    return PYLORA_E_WORKSPACE;
  if (dA && w.drop && !(xa = arena_floats(&a, m * k))) return PYLORA_E_WORKSPACE;
  if (r && dB) pylora_parallel(dB_strip, &w, ceil_div(d, PANEL), threads);
  w.low = r && (dA || dx) && any_nonzero(lora->B, d, r, lora->ldb);
  if (r && (dA || w.low)) pylora_parallel(g_block, &w, ceil_div(m, 64), threads);
  if (r && dA) {
    if (w.drop) {
      dropped = (pylora_mat){xa, m, k, k};
      TRY(pylora_dropout(x, w.drop, &dropped));
      w.x = &dropped;
    }
    pylora_parallel(dA_strip, &w, ceil_div(k, PANEL), threads);
  }
  if (dx && m && k) {
    w.rows = min64(MAX_ROWS, m);
    w.strips = ceil_div(k, PANEL);
    pylora_parallel(dx_block, &w, ceil_div(m, w.rows) * w.strips, threads);
  }
  return PYLORA_OK;
}
