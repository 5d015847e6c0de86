/* forward_tiles.c - tiles of y = residual + f (x Wᵀ + s h Bᵀ) + bias, and what a block does with them next.
 *
 * A tile is summed over k, then over the rank, in scratch that stays in the cache, and is stored once
 * with the residual: rotated where it is a query or a key, and multiplied where it is gate and up. */
#include "ops/forward.h"

enum { PANEL = PYLORA_PANEL };

/* One row and some panels at once, so that no sum waits for itself alone. */
static void one_row(const forward *f, const void *row, const char *panels, int n, float *tiles) {
  const void *rows[PYLORA_FEW], *b[PYLORA_FEW];
  float *out[PYLORA_FEW];
  for (int u = 0; u < n; u++) {
    rows[u] = row;
    b[u] = panels + (size_t)u * f->F->panel_bytes(f->k);
    out[u] = tiles + u * PANEL;
  }
  f->F->few(f->K, n, PANEL, f->k, rows, b, out);
}

/* s h Bᵀ of rows that are alone in their segment, for w panels. */
typedef struct few {
  int n;
  int64_t r;
  const float *h[PYLORA_FEW], *bt[PYLORA_FEW];
  float *tile[PYLORA_FEW]; /* of the first panel; the next one's is rows * 32 floats on */
} few;

static void add_few(const forward *f, few *one, int64_t rows, int64_t w) {
  for (int64_t u = 0; u < w; u++) {
    f->K->few_rows(one->n, PANEL, one->r, one->h, one->bt, one->tile, GEMM_ADD);
    for (int i = 0; i < one->n; i++) one->bt[i] += one->r * PANEL, one->tile[i] += rows * PANEL;
  }
  one->n = 0;
}

/* Rows first .. end - 1 of tiles [n][32] of panels q .. q + w - 1: times f (or as they are), plus the bias. */
static void finish_sums(const pylora_linear *l, const float *f, int64_t n, int64_t first,
                        int64_t end, int64_t q, int64_t w, float *tiles) {
  if (!f && !l->bias) return;
  for (int64_t u = 0; u < w; u++) {
    const int64_t j = (q + u) * PANEL, cols = min64(PANEL, l->W->d - j);
    const float *factor = f ? f + j : NULL, *bias = l->bias ? l->bias + j : NULL;
    for (int64_t t = first; t < end; t++) {
      float *row = tiles + (u * n + t) * PANEL;
      if (factor)
        for (int64_t c = 0; c < cols; c++) row[c] *= factor[c];
      if (bias)
        for (int64_t c = 0; c < cols; c++) row[c] += bias[c];
    }
  }
}

/* The same by segments, of rows i .. i + n - 1: of those with a factor, or of those without. */
static void finish_segments(const forward *f, const projection *p, int with, int64_t i, int64_t n,
                            int64_t q, int64_t w, float *tiles) {
  for (int64_t s = segment_of(f, i); s < f->segments && f->start[s] < i + n; s++) {
    const int64_t a = max64(i, f->start[s]), b = min64(i + n, f->start[s + 1]);
    const float *factor = factor_in(p, s);
    if (a < b && with == (factor != NULL)) finish_sums(p->l, factor, n, a - i, b - i, q, w, tiles);
  }
}

/* s h Bᵀ of every segment that has an adapter, added to the tiles. */
static void add_low(const forward *f, const projection *p, int64_t i, int64_t n, int64_t q,
                    int64_t w, float *tiles, float *up) {
  const pylora_linear *l = p->l;
  few one = {0};
  for (int64_t s = segment_of(f, i); s < f->segments && f->start[s] < i + n; s++) {
    const int64_t a = max64(i, f->start[s]), rows = min64(i + n, f->start[s + 1]) - a;
    const low_pack *P = rows > 0 ? adapter_in(p, s) : NULL;
    if (!P || !P->active) continue;
    if (rows == 1 && !p->up_later) {
      if (one.n == PYLORA_FEW || (one.n && one.r != P->r)) add_few(f, &one, n, w);
      one.h[one.n] = p->h + a * p->ldh, one.bt[one.n] = low_bt(P, q);
      one.tile[one.n++] = tiles + (a - i) * PANEL, one.r = P->r;
      continue;
    }
    for (int64_t u = 0; u < w; u++) {
      const float *bt = low_bt(P, q + u);
      if (p->up_later) {
        pylora_pack_up(f->K, l->lora[0], l->W->d, q + u, up);
        bt = up;
      }
      f->K->gemm(rows, PANEL, P->r, p->h + a * p->ldh, p->ldh, 1, bt, PANEL,
                 tiles + (u * n + a - i) * PANEL, PANEL, GEMM_ADD);
    }
  }
  if (one.n) add_few(f, &one, n, w);
}

/* Tiles [n][32] of panels q .. q + w - 1, n rows from i on. */
static void sums(const forward *f, const projection *p, int64_t i, int64_t n, int64_t q, int64_t w,
                 float *tiles, float *up) {
  const pylora_linear *l = p->l;
  const size_t bytes = f->F->panel_bytes(f->k);
  const char *rows = (const char *)f->rows + (size_t)i * f->stride,
             *panels = (const char *)l->W->data + (size_t)q * bytes;
  const int products = pylora_in_panels(f, n), together = !products && n == 1 && f->F->few;
  if (products) {
    const pylora_put put = pylora_put_at(l->y, i, q * PANEL);
    f->F->products(f->K, n, w, f->k, rows, f->stride, panels, tiles, &put);
  }
  for (int64_t u = 0; together && u < w; u += PYLORA_FEW)
    one_row(f, rows, panels + (size_t)u * bytes, (int)min64(PYLORA_FEW, w - u), tiles + u * PANEL);
  for (int64_t u = 0; u < w; u++) {
    float *tile = tiles + u * n * PANEL;
    if (!together && !products)
      f->F->product(f->K, n, f->k, rows, f->stride, panels + (size_t)u * bytes, tile);
  }
  if (!p->scaled)
    finish_sums(l, NULL, n, 0, n, q, w, tiles);
  else
    finish_segments(f, p, 0, i, n, q, w, tiles);
  if (p->h) add_low(f, p, i, n, q, w, tiles, up);
  if (p->scaled) finish_segments(f, p, 1, i, n, q, w, tiles);
}

static void put(const forward *f, const pylora_linear *l, int64_t i, int64_t n, int64_t j,
                const float *tile) {
  const pylora_mat *r = l->residual;
  f->K->put_tile(n, (int)min64(PANEL, l->W->d - j), tile, r ? r->p + i * r->ld + j : NULL,
                 r ? r->ld : 0, row_at(l->y, i, j), l->y->ld);
}

/* Whole heads, one row after the other: its pieces side by side, then rotated into y. */
static void put_rotated(const forward *f, const projection *p, int64_t i, int64_t n, int64_t q,
                        int64_t w, const float *tiles, float *row) {
  const pylora_linear *l = p->l;
  const pylora_rotation *r = p->finish->rotation;
  const int64_t j = q * PANEL, cols = min64(w * PANEL, l->W->d - j);
  for (int64_t t = 0; t < n; t++) {
    for (int64_t u = 0; u < w; u++)
      memcpy(row + u * PANEL, tiles + (u * n + t) * PANEL, PANEL * sizeof(float));
    if (l->residual) {
      const float *more = l->residual->p + (i + t) * l->residual->ld + j;
      for (int64_t c = 0; c < cols; c++) row[c] = more[c] + row[c];
    }
    const int64_t at = r->position[i + t];
    const pylora_vec from = {row, NULL};
    pylora_rope_row(f->K, from, cols, r->head_dim, r->cosines.cols, r->layout, 0,
                    r->cosines.p + at * r->cosines.ld, r->sines.p + at * r->sines.ld,
                    row_at(l->y, i + t, j));
  }
}

void pylora_tiles_task(void *ctx, int64_t task, int thread) {
  const forward *f = ctx;
  const int64_t i = task / f->all_groups * f->block, n = min64(f->block, f->m - i);
  int64_t g = task % f->all_groups;
  const projection *p = f->p;
  while (g >= p->groups) g -= (p++)->groups;
  float *tiles = f->tiles + (int64_t)thread * PYLORA_TILE, *more = tiles + PYLORA_MAX_ROWS * PANEL;
  const int64_t first = g * p->per_group, end = min64(p->panels, first + p->per_group);
  /* With few rows all panels of the task together: each adapter's B is then read in one piece. */
  const int64_t step = n * p->per_group <= PYLORA_MAX_ROWS ? p->per_group : p->unit;
  for (const projection *one = p; one < p + p->pair; one++) {
    for (int64_t q = first, w; q < end; q += w) {
      w = min64(step, end - q);
      sums(f, one, i, n, q, w, tiles, more);
      if (one->finish && one->finish->rotation)
        put_rotated(f, one, i, n, q, w, tiles, more);
      else
        for (int64_t u = 0; u < w; u++)
          put(f, one->l, i, n, (q + u) * PANEL, tiles + u * n * PANEL);
    }
  }
  if (p->pair == 1) return;
  const pylora_mat *gate = p[0].l->y, *up = p[1].l->y, *y = p[1].finish->product;
  const int64_t c = first * PANEL, cols = min64(end * PANEL, y->cols) - c;
  const int kind = p[1].finish->activation;
  for (int64_t t = i; t < i + n; t++)
    pylora_gate(f->K, kind, cols, row_at(gate, t, c), row_at(up, t, c), row_at(y, t, c));
}
