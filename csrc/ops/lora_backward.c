/* lora_backward.c - gradients of projections that share x: dA, dB and dx.
 *
 * One task of dx = some strips of 32 inputs of a block of rows: W's panels are transposed on the way, which for many
 * rows costs a percent and saves a second copy of the weights in memory; the projections are summed in
 * the tile, in their order, and dx is stored once.
 *
 * dA and dB are sums over the rows in float32, also where x and dy are stored in bfloat16. */
#include "ops/low_rank.h"

enum {
  PANEL = PYLORA_PANEL,
  ROWS = 64,       /* rows per task of g */
  TILE_ROWS = 512, /* rows of dx per task: see share_out */
  FLOAT_ROWS = 256,
};

typedef struct part {
  const pylora_linear_grad *l;
  const pylora_drop *drop;
  int64_t d, r;
  int low;        /* g is needed and not zero */
  const void *dy; /* prepared rows, `stride` bytes apart */
  size_t stride;
  float *g;             /* [m,r]: s dy B */
  float *dBt;           /* [r,d] */
  const uint16_t *B;    /* in pairs along d, for bfloat16 */
  const pylora_mat *xa; /* drop(x) */
} part;

typedef struct bwd {
  const pylora_kernels *K;
  const pylora_format *F;    /* of W; NULL without dx: then g is by the type of dy */
  const pylora_format *back; /* of the rows of dy */
  const pylora_mat *dx;
  int64_t m, k, n;
  const part *p;
  int64_t rows, strips, per_group; /* of a task; strips: in all */
  int add;
  void *out;
  float *tiles;
} bwd;

static void prepare_dy(void *ctx, int64_t task, int thread) {
  (void)thread;
  const bwd *w = ctx;
  const int64_t i = task * ROWS;
  w->back->prepare(w->K, w->p->l->dy, i, min64(ROWS, w->m - i),
                   (char *)w->out + (size_t)i * w->p->stride);
}

/* c [n, wide] = dy B in float32 from dy as the caller gave it, columns j .. j + wide - 1 of B.  Scratch
 * holds the rows of a bfloat16 dy, widened. */
static void float_g(const bwd *w, int64_t i, int64_t n, int64_t j, int64_t wide, float *scratch) {
  enum { AT_ONCE = 32 }; /* of a piece of up to 1024 terms */
  const part *p = w->p;
  const pylora_mat *dy = p->l->dy;
  const pylora_lora *l = p->l->lora;
  if (!dy->b) {
    pylora_product(w->K, n, wide, p->d, dy->p + i * dy->ld, dy->ld, 1, l->B + j, l->ldb,
                   p->g + i * p->r + j, p->r);
    return;
  }
  const int64_t step = max64(1, pylora_piece(p->d));
  for (int64_t q = i; q < i + n; q += AT_ONCE) {
    const int64_t rows = min64(AT_ONCE, i + n - q);
    int64_t t = 0;
    do {
      const int64_t some = min64(step, p->d - t);
      for (int64_t a = 0; a < rows; a++)
        w->K->from_bf16(some, dy->b + (q + a) * dy->ld + t, scratch + a * some);
      w->K->gemm(rows, (int)wide, some, scratch, some, 1, l->B + t * l->ldb + j, l->ldb,
                 p->g + q * p->r + j, p->r, t ? GEMM_ADD : GEMM_SET);
      t += step;
    } while (t < p->d);
  }
}

/* g = s dy B for a block of rows */
static void g_block(void *ctx, int64_t task, int thread) {
  const bwd *w = ctx;
  const part *p = w->p;
  const pylora_lora *l = p->l->lora;
  const int64_t i = task * ROWS, n = min64(ROWS, w->m - i);
  const char *rows = (const char *)p->dy + (int64_t)p->stride * i;
  for (int64_t j = 0; j < p->r; j += PANEL) {
    const int64_t wide = min64(PANEL, p->r - j);
    if (w->back->dtype == PYLORA_F32X3)
      float_g(w, i, n, j, wide, w->tiles + (int64_t)thread * PYLORA_TILE);
    else if (p->B)
      pylora_product_bf16(w->K, n, wide, p->d, (const uint16_t *)(const void *)rows,
                          (int64_t)p->stride / 2, p->B + j * ceil_div(p->d, 2) * 2, 2 * wide,
                          p->g + i * p->r + j, p->r);
    else
      pylora_product(w->K, n, wide, p->d, (const float *)(const void *)rows, (int64_t)p->stride / 4,
                     1, l->B + j, l->ldb, p->g + i * p->r + j, p->r);
  }
  for (int64_t t = i * p->r; t < (i + n) * p->r; t++) p->g[t] *= l->s;
}

/* c [r, n] = aᵀ b for columns j .. j + n - 1 of b [m, .], n <= 32, summed over the rows in order */
static void strip_product(const bwd *w, int64_t r, int64_t n, const float *a, int64_t lda,
                          const pylora_mat *b, int64_t j, float *scratch, float *c, int64_t ldc) {
  if (!b->b) {
    pylora_product(w->K, r, n, w->m, a, 1, lda, b->p + j, b->ld, c, ldc);
    return;
  }
  const int64_t step = max64(1, pylora_piece(w->m)); /* at most PYLORA_CHUNK rows are widened */
  int64_t t = 0;
  do {
    const int64_t some = min64(step, w->m - t);
    for (int64_t q = 0; q < some; q++)
      w->K->from_bf16(n, b->b + (t + q) * b->ld + j, scratch + q * PANEL);
    w->K->gemm(r, (int)n, some, a + t * lda, 1, lda, scratch, PANEL, c, ldc,
               t ? GEMM_ADD : GEMM_SET);
    t += step;
  } while (t < w->m);
}

/* 32 columns of (s dyᵀ h)ᵀ = s hᵀ dy: dy is read along its rows */
static void dB_strip(void *ctx, int64_t task, int thread) {
  const bwd *w = ctx;
  const part *p = w->p;
  const pylora_linear_grad *l = p->l;
  const int64_t j = task * PANEL, d = p->d, n = min64(PANEL, d - j);
  strip_product(w, p->r, n, l->h->p, l->h->ld, l->dy, j, w->tiles + (int64_t)thread * PYLORA_TILE,
                p->dBt + j, d);
  for (int64_t i = 0; i < n; i++)
    for (int64_t t = 0; t < p->r; t++)
      l->dB->p[(j + i) * l->dB->ld + t] = l->lora->s * p->dBt[t * d + j + i];
}

/* 32 columns of dA = (s g)ᵀ x */
static void dA_strip(void *ctx, int64_t task, int thread) {
  const bwd *w = ctx;
  const part *p = w->p;
  const int64_t j = task * PANEL;
  strip_product(w, p->r, min64(PANEL, w->k - j), p->g, p->r, p->xa, j,
                w->tiles + (int64_t)thread * PYLORA_TILE, p->l->dA->p + j, p->l->dA->ld);
}

/* The adapter's share of a tile of dx: s drop'(g A) */
static void add_low(const bwd *w, const part *p, int64_t i, int64_t n, int64_t j, int64_t cols,
                    float *tile, float *scratch) {
  const pylora_lora *l = p->l->lora;
  if (!p->drop) {
    w->K->gemm(n, (int)cols, p->r, p->g + i * p->r, p->r, 1, l->A + j, l->lda, tile, PANEL,
               GEMM_ADD);
    return;
  }
  for (int64_t q = 0; q < n; q++) { /* the same mask as forward's, from the same words */
    float *c = tile + q * PANEL;
    w->K->gemm(1, (int)cols, p->r, p->g + (i + q) * p->r, p->r, 1, l->A + j, l->lda, scratch, PANEL,
               GEMM_SET);
    pylora_mat one = {scratch, 1, cols, cols, NULL, NULL};
    pylora_dropout_at(&one, p->drop, i + q, j, w->k, &one);
    for (int64_t b = 0; b < cols; b++) c[b] += scratch[b];
  }
}

/* For strip number s of 32 columns of dx: rows t .. t + rows - 1 of dy's columns times W's, transposed in `chunk`. */
typedef struct piece {
  const part *p;
  int64_t i, n, t, rows, s; /* rows of dx from i on */
  const float *chunk;
  int last; /* of the sum */
} piece;

/* tile [n][32] += the product.  What is needed next is asked for meanwhile: W's part of the next strip, and
 * where the tile will be stored. */
static void dx_chunk(const bwd *w, const piece *c, float *tile) {
  const part *p = c->p;
  const char *dy = (const char *)p->dy + (int64_t)p->stride * c->i;
  if (w->back->dtype == PYLORA_F32) {
    const int whole = c->last && w->k - c->s * PANEL >= PANEL;
    const int64_t panel = (int64_t)w->F->panel_bytes(w->k), strip = panel / w->strips;
    const rows_job job = {
        .m = c->n,
        .kk = c->rows,
        .a = (const float *)(const void *)dy + c->t,
        .lda = (int64_t)p->stride / 4,
        .b = c->chunk,
        .c = tile,
        .mode = GEMM_ADD,
        .put = whole ? pylora_put_at(w->dx, c->i, c->s * PANEL) : (pylora_put){NULL, 0, 0},
        .next = (const char *)p->l->W->data + c->t / PANEL * panel + (c->s + 1) * strip,
        .pieces = c->s + 1 < w->strips ? c->rows / PANEL : 0,
        .piece_step = panel,
        .piece_bytes = strip};
    w->K->rows_f32(&job);
    return;
  }
  const int three = w->back->dtype == PYLORA_F32X3;
  const panels_job job = {.m = c->n,
                          .n = 1,
                          .pairs = ceil_div(c->rows, 2),
                          .a = (const uint16_t *)(const void *)dy + c->t,
                          .lda = (int64_t)p->stride / 2,
                          .low_a = three ? pylora_x3_low(p->d) : 0,
                          .b = (const uint16_t *)(const void *)c->chunk,
                          .low_b = three ? pad_panel(c->rows) * PANEL : 0,
                          .c = tile,
                          .mode = GEMM_ADD};
  w->K->panels_bf16(&job);
}

static void put_dx(const bwd *w, int64_t i, int64_t n, int64_t j, int64_t cols, const float *tile) {
  const float *more = w->add ? w->dx->p + i * w->dx->ld + j : NULL;
  w->K->put_tile(n, (int)cols, tile, more, w->dx->ld, row_at(w->dx, i, j), w->dx->ld);
}

/* Some strips of 32 columns of dx for a block of rows: a chunk of dy goes through all of them while it is
 * in the cache. */
static void dx_block(void *ctx, int64_t task, int thread) {
  const bwd *w = ctx;
  const int64_t groups = ceil_div(w->strips, w->per_group);
  const int64_t i = task / groups * w->rows, n = min64(w->rows, w->m - i);
  const int64_t first = task % groups * w->per_group, end = min64(w->strips, first + w->per_group);
  float *tiles = w->tiles + (int64_t)thread * PYLORA_TILE, *chunk = tiles + PYLORA_MAX_ROWS * PANEL;
  memset(tiles, 0, (size_t)((end - first) * n * PANEL) * sizeof(float));
  for (int64_t q = 0; q < w->n; q++) {
    const part *p = w->p + q;
    const int64_t most = pylora_chunk_d(w->K, w->F->dtype, p->d);
    for (int64_t t = 0; t < p->d; t += most) {
      const int64_t rows = min64(most, p->d - t);
      for (int64_t s = first; s < end; s++) {
        w->F->transpose(w->K, p->l->W->data, w->k, t, pad_panel(rows), s * PANEL, chunk);
        const piece one = {p, i, n, t, rows, s, chunk, q + 1 == w->n && t + most >= p->d};
        dx_chunk(w, &one, tiles + (s - first) * n * PANEL);
      }
    }
    for (int64_t s = first; p->low && s < end; s++)
      add_low(w, p, i, n, s * PANEL, min64(PANEL, w->k - s * PANEL),
              tiles + (s - first) * n * PANEL, chunk);
  }
  for (int64_t s = first; s < end; s++)
    put_dx(w, i, n, s * PANEL, min64(PANEL, w->k - s * PANEL), tiles + (s - first) * n * PANEL);
}

static int check_grad(const pylora_linear_grad *l, const pylora_mat *x, const pylora_mat *dx,
                      int64_t m, int64_t k, int dtype) {
  if (!l->dy) return PYLORA_E_NULL;
  if ((l->dA || l->dB) && !l->lora) return PYLORA_E_NULL;
  const int64_t d = l->dy->cols, r = l->lora ? l->lora->r : 0;
  TRY(check_mat16(l->dy, m, d, 0));
  if (dx) {
    TRY(pylora_check_packed(l->W));
    if (l->W->dtype != dtype) return PYLORA_E_UNSUPPORTED;
    if (l->W->d != d || l->W->k != k) return PYLORA_E_SHAPE;
  }
  if (l->lora) {
    if (l->lora->packed) return PYLORA_E_VALUE; /* an adapter that is trained is not packed */
    TRY(pylora_check_lora(l->lora, d, k));
  }
  if (l->dA) {
    TRY(check_mat(l->dA, r, k, 1));
    TRY(check_mat16(x, m, k, 0));
  }
  if (l->dB) {
    TRY(check_mat(l->dB, d, r, 1));
    TRY(check_mat(l->h, m, r, 0));
  }
  return PYLORA_OK;
}

static int direct(const pylora_mat *dy, int back) {
  const int64_t size = dy->b ? 2 : 4;
  if (back != (dy->b ? PYLORA_BF16 : PYLORA_F32) || (dy->b && dy->cols % 2)) return 0;
  return dy->rows < 2 || (dy->ld > 0 && (dy->rows < 4 || dy->ld * size % 2048 != 0));
}

/* Everything of one projection but dx. */
static int one_part(const bwd *all, part *p, const pylora_mat *x, arena *a, int threads) {
  const pylora_linear_grad *l = p->l;
  const int64_t m = all->m, d = l->dy->cols, k = all->k;
  bwd w = *all;
  w.p = p;
  w.n = 1;
  p->d = d;
  p->r = l->lora ? l->lora->r : 0;
  if (p->r && l->lora->drop && l->lora->drop->p > 0) p->drop = l->lora->drop;
  p->dy = l->dy->b ? (const void *)l->dy->b : (const void *)l->dy->p;
  p->stride = m > 1 ? (size_t)l->dy->ld * (l->dy->b ? 2 : 4) : 0;
  p->low = p->r && (l->dA || all->dx) && pylora_any_nonzero(l->lora->B, d, p->r, l->lora->ldb);
  if ((all->dx || (p->r && (l->dA || p->low))) && m && !direct(l->dy, w.back->dtype)) {
    p->stride = w.back->row_bytes(d);
    p->dy = w.out = arena_bytes(a, (size_t)m * p->stride);
    if (!w.out) return PYLORA_E_WORKSPACE;
    pylora_parallel(prepare_dy, &w, ceil_div(m, ROWS), threads);
  }
  if (!p->r) return PYLORA_OK;
  if (!(p->g = arena_floats(a, m * p->r))) return PYLORA_E_WORKSPACE;
  if (l->dB) {
    const arena mark = *a;
    if (!(p->dBt = arena_floats(a, d * p->r))) return PYLORA_E_WORKSPACE;
    pylora_parallel(dB_strip, &w, ceil_div(d, PANEL), threads);
    *a = mark;
  }
  if (l->dA || p->low) {
    if (w.back->dtype == PYLORA_BF16) { /* B [d,r]: pairs along d are rows of Bᵀ */
      uint16_t *pairs = arena_bytes(a, (size_t)(d + 1) * (size_t)p->r * sizeof(uint16_t));
      if (!pairs) return PYLORA_E_WORKSPACE;
      for (int64_t j = 0; j < p->r; j += PANEL) {
        const int64_t wide = min64(PANEL, p->r - j);
        uint16_t *to = pairs + j * ceil_div(d, 2) * 2;
        for (int64_t t = 0; t < d + d % 2; t++)
          for (int64_t q = 0; q < wide; q++)
            to[t / 2 * (2 * wide) + 2 * q + t % 2] =
                t < d ? bf16_round(l->lora->B[t * l->lora->ldb + j + q]) : 0;
      }
      p->B = pairs;
    }
    pylora_parallel(g_block, &w, ceil_div(m, ROWS),
                    pylora_threads_for(2.0 * (double)(m * d) * (double)p->r, threads));
  }
  if (l->dA) {
    const arena mark = *a;
    pylora_mat dropped = {NULL, m, k, k, NULL, NULL}, wide = *x;
    p->xa = x;
    if (p->drop) {
      float *xa = arena_floats(a, m * k);
      if (!xa) return PYLORA_E_WORKSPACE;
      dropped.p = xa;
      if (x->b) {
        for (int64_t i = 0; i < m; i++) w.K->from_bf16(k, x->b + i * x->ld, xa + i * k);
        wide = dropped;
      }
      TRY(pylora_dropout(&wide, p->drop, &dropped));
      /* In forward the rows were rounded after the mask; here they are not, which is closer. */
      p->xa = &dropped;
    }
    pylora_parallel(dA_strip, &w, ceil_div(k, PANEL), threads);
    *a = mark;
  }
  return PYLORA_OK;
}

/* Rows and strips of a task.  A piece of dy's columns goes through several strips while it is in L2, and W,
 * transposed, through all rows while it is in L1: of fewer rows where that is cheap, as it is in float32.
 * bfloat16 without tiles takes so long for its products that one strip of many rows is as good. */
static void share_out(bwd *w, int threads) {
  const int cheap = w->F->dtype == PYLORA_F32;
  w->strips = ceil_div(w->k, PANEL);
  w->rows = min64(PYLORA_MAX_ROWS / 2, w->m);
  w->per_group = 1;
  if (w->back->dtype != PYLORA_F32 && !w->K->tiles) return;
  const int64_t blocks = ceil_div(w->m, cheap ? FLOAT_ROWS : TILE_ROWS),
                step = cheap ? 12 : 32; /* rows that the kernels take at once */
  w->rows = min64(w->rows, ceil_div(ceil_div(w->m, blocks), step) * step);
  w->per_group = max64(
      1, min64(PYLORA_MAX_ROWS / w->rows, w->strips * ceil_div(w->m, w->rows) / (2 * threads)));
}

int pylora_linear_backward(const pylora_mat *x, int64_t n, const pylora_linear_grad *linear,
                           const pylora_mat *dx, int add_dx, void *ws, size_t ws_bytes) {
  if (n > 0 && !linear) return PYLORA_E_NULL;
  if (n < 0) return PYLORA_E_SHAPE;
  if (dx && add_dx && dx->b) return PYLORA_E_UNSUPPORTED;
  if (n == 0) return dx ? PYLORA_E_SHAPE : PYLORA_OK;
  if (!linear[0].dy) return PYLORA_E_NULL;
  const int64_t m = linear[0].dy->rows;
  int64_t k = 0;
  int dtype = PYLORA_F32;
  if (dx) {
    TRY(pylora_check_packed(linear[0].W));
    k = linear[0].W->k;
    dtype = linear[0].W->dtype;
    TRY(check_mat16(dx, m, k, 1));
  } else {
    for (int64_t i = 0; i < n; i++)
      if (linear[i].dA) k = linear[i].dA->cols;
  }
  for (int64_t i = 0; i < n; i++) TRY(check_grad(linear + i, x, dx, m, k, dtype));
  const int threads = pylora_num_threads();
  arena a = arena_of(ws, ws_bytes);
  bwd w = {.K = pylora_table(), .dx = dx, .m = m, .k = k, .n = n, .add = add_dx};
  part *p = arena_bytes(&a, (size_t)n * sizeof *p);
  w.tiles = arena_floats(&a, (int64_t)threads * PYLORA_TILE);
  if (!p || !w.tiles) return PYLORA_E_WORKSPACE;
  w.p = p;
  w.F = pylora_format_of(dtype);
  for (int64_t i = 0; i < n; i++) {
    /* Without dx no weight says how B is rounded: dy's type does. */
    const int back = dx ? w.F->back : linear[i].dy->b ? PYLORA_BF16 : PYLORA_F32;
    w.back = pylora_format_of(back);
    p[i] = (part){.l = linear + i};
    TRY(one_part(&w, p + i, x, &a, threads));
  }
  if (dx && m && k) {
    share_out(&w, threads);
    pylora_parallel(dx_block, &w, ceil_div(m, w.rows) * ceil_div(w.strips, w.per_group), threads);
  }
  return PYLORA_OK;
}

int pylora_lora_backward(const pylora_mat *dy, const pylora_mat *x, const pylora_mat *h,
                         const pylora_packed *W, const pylora_lora *lora, const pylora_mat *dx,
                         int add_dx, const pylora_mat *dA, const pylora_mat *dB, void *ws,
                         size_t ws_bytes) {
  const pylora_linear_grad l = {W, lora, dy, h, dA, dB};
  return pylora_linear_backward(x, 1, &l, dx, add_dx, ws, ws_bytes);
}
