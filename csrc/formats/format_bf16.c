/* format_bf16.c - weights in bfloat16: a panel is [ceil(k / 2)][32][2], pairs of inputs side by side. */
#include "formats/format.h"

enum { PANEL = PYLORA_PANEL };

void pylora_product_bf16(const pylora_kernels *K, int64_t m, int64_t n, int64_t kk,
                         const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                         int64_t ldc) {
  const int64_t pairs = ceil_div(kk, 2), step = ceil_div(pylora_piece(kk), 2);
  K->gemm_bf16(m, (int)n, min64(step, pairs), a, lda, b, ldb, c, ldc, GEMM_SET);
  for (int64_t t = step; t < pairs; t += step)
    K->gemm_bf16(m, (int)n, min64(step, pairs - t), a + 2 * t, lda, b + t * ldb, ldb, c, ldc,
                 GEMM_ADD);
}

static size_t panel_bytes(int64_t k) {
  return (size_t)ceil_div(k, 2) * PANEL * 2 * sizeof(uint16_t);
}

static void pack(const pylora_kernels *K, const pylora_mat *W, int64_t first, void *panel) {
  const int64_t k = W->cols, n = min64(PANEL, W->rows - first);
  uint16_t *out = panel, row[64];
  if (n < PANEL || k % 2) memset(out, 0, panel_bytes(k));
  for (int64_t t0 = 0; t0 < k; t0 += 64)
    for (int64_t i = 0; i < n; i++) {
      const int64_t some = min64(64, k - t0), at = (first + i) * W->ld + t0;
      const uint16_t *from = row;
      if (W->b)
        from = W->b + at;
      else
        K->to_bf16(some, W->p + at, row);
      for (int64_t t = 0; t < some; t++) out[(t0 + t) / 2 * (PANEL * 2) + i * 2 + t % 2] = from[t];
    }
}

static void unpack(const void *panel, int64_t k, int row, float *out) {
  const uint16_t *p = (const uint16_t *)panel + 2 * row;
  for (int64_t t = 0; t < k; t++) out[t] = bf16_widen(p[t / 2 * (PANEL * 2) + t % 2]);
}

/* An odd number of lines, so that the rows of a tile fall into different sets of an L1 cache. */
static size_t row_bytes(int64_t k) {
  const size_t n = round_up((size_t)k * sizeof(uint16_t));
  return n / PYLORA_ALIGN % 2 ? n : n + PYLORA_ALIGN;
}

static void prepare(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n,
                    void *out) {
  const int64_t k = x->cols;
  const size_t stride = row_bytes(k);
  for (int64_t i = 0; i < n; i++) {
    uint16_t *to = (uint16_t *)(void *)((char *)out + (size_t)i * stride);
    const int64_t at = (first + i) * x->ld;
    if (x->b)
      memcpy(to, x->b + at, (size_t)k * sizeof(uint16_t));
    else
      K->to_bf16(k, x->p + at, to);
    if (k % 2) to[k] = 0;
  }
}

static void product(const pylora_kernels *K, int64_t n, int64_t k, const void *rows, size_t stride,
                    const void *panel, float *tile) {
  pylora_product_bf16(K, n, PANEL, k, rows, (int64_t)(stride / sizeof(uint16_t)), panel, 2 * PANEL,
                      tile, PANEL);
}

void pylora_panels_bf16(const pylora_kernels *K, panels_job j, int64_t kk) {
  const int64_t pairs = ceil_div(kk, 2), step = max64(1, ceil_div(pylora_piece(kk), 2));
  j.mode = GEMM_SET;
  for (int64_t t = 0; t == 0 || t < pairs; t += step) {
    j.pairs = min64(step, pairs - t);
    K->panels_bf16(&j);
    j.a += 2 * j.pairs, j.b += 2 * PANEL * j.pairs;
    j.mode = GEMM_ADD;
  }
}

static void products(const pylora_kernels *K, int64_t n, int64_t w, int64_t k, const void *rows,
                     size_t stride, const void *panels, float *tiles, const pylora_put *put) {
  (void)put; /* asking for it early won nothing beside tiles */
  const panels_job j = {.m = n,
                        .n = (int)w,
                        .a = rows,
                        .lda = (int64_t)(stride / sizeof(uint16_t)),
                        .b = panels,
                        .step = (int64_t)(panel_bytes(k) / sizeof(uint16_t)),
                        .c = tiles,
                        .step_c = n * PANEL};
  pylora_panels_bf16(K, j, k);
}

static void few(const pylora_kernels *K, int n, int w, int64_t k, const void *const *rows,
                const void *const *panels, float *const *tiles) {
  const int64_t pairs = ceil_div(k, 2), step = max64(1, ceil_div(pylora_piece(k), 2));
  for (int64_t t = 0; t == 0 || t < pairs; t += step) {
    const uint16_t *x[PYLORA_FEW], *b[PYLORA_FEW];
    for (int i = 0; i < n; i++)
      x[i] = (const uint16_t *)rows[i] + 2 * t, b[i] = (const uint16_t *)panels[i] + 2 * t * w;
    K->few_rows_bf16(n, w, min64(step, pairs - t), x, b, tiles, t ? GEMM_ADD : GEMM_SET);
  }
}

static void transpose(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0,
                      int64_t rows, int64_t j, void *chunk) {
  uint16_t *out = chunk;
  const int64_t cols = min64(PANEL, k - j), panel = (int64_t)(panel_bytes(k) / sizeof(uint16_t));
  for (int64_t q = 0; q < rows; q += PANEL) {
    const uint16_t *tile = (const uint16_t *)panels + (d0 + q) / PANEL * panel + j * PANEL;
    uint16_t *to = out + q * PANEL, edge[PANEL * PANEL];
    if (cols < PANEL) { /* a whole tile would reach beyond the panel */
      memset(edge, 0, sizeof edge);
      memcpy(edge, tile, (size_t)ceil_div(cols, 2) * PANEL * 2 * sizeof(uint16_t));
      tile = edge;
    }
    if (K->tiles) pylora_prefetch(tile + PANEL * PANEL, PANEL * PANEL * sizeof(uint16_t));
    K->transpose32_bf16(tile, to);
  }
}

const pylora_format pylora_format_bf16 = {
    .dtype = PYLORA_BF16,
    .multiple = 1,
    .panel_bytes = panel_bytes,
    .pack = pack,
    .unpack = unpack,
    .row_bytes = row_bytes,
    .prepare = prepare,
    .product = product,
    .products = products,
    .few = few,
    .back = PYLORA_BF16,
    .transpose = transpose,
};
