/* format_f32.c - weights in float32: a panel is [k][32]. */
#include "formats/format.h"

enum { PANEL = PYLORA_PANEL };

void pylora_product(const pylora_kernels *K, int64_t m, int64_t n, int64_t kk, const float *a,
                    int64_t ars, int64_t acs, const float *b, int64_t ldb, float *c, int64_t ldc) {
  const int64_t step = pylora_piece(kk);
  K->gemm(m, (int)n, step, a, ars, acs, b, ldb, c, ldc, GEMM_SET);
  for (int64_t t = step; t < kk; t += step)
    K->gemm(m, (int)n, min64(step, kk - t), a + t * acs, ars, acs, b + t * ldb, ldb, c, ldc,
            GEMM_ADD);
}

static size_t panel_bytes(int64_t k) { return (size_t)k * PANEL * sizeof(float); }

static void pack(const pylora_kernels *K, const pylora_mat *W, int64_t first, void *panel) {
  (void)K;
  const int64_t k = W->cols, n = min64(PANEL, W->rows - first);
  float *out = panel;
  if (n < PANEL) memset(out, 0, panel_bytes(k));
  for (int64_t t0 = 0; t0 < k; t0 += 32) /* in blocks, so that both sides stay in L1 */
    for (int64_t i = 0; i < n; i++)
      for (int64_t t = t0; t < min64(k, t0 + 32); t++)
        out[t * PANEL + i] = W->p[(first + i) * W->ld + t];
}

static void unpack(const void *panel, int64_t k, int row, float *out) {
  const float *p = (const float *)panel + row;
  for (int64_t t = 0; t < k; t++) out[t] = p[t * PANEL];
}

/* Rows a multiple of 2048 bytes apart fall into the same few sets of an L1 cache. */
static size_t row_bytes(int64_t k) {
  size_t n = round_up((size_t)k * sizeof(float));
  return n % 2048 ? n : n + PYLORA_ALIGN;
}

static void prepare(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n,
                    void *out) {
  const int64_t k = x->cols;
  const size_t stride = row_bytes(k);
  for (int64_t i = 0; i < n; i++) {
    float *to = (float *)(void *)((char *)out + (size_t)i * stride);
    const float *from = pylora_row(K, x, first + i, 0, k, to);
    if (from != to) memcpy(to, from, (size_t)k * sizeof(float));
  }
}

static void product(const pylora_kernels *K, int64_t n, int64_t k, const void *rows, size_t stride,
                    const void *panel, float *tile) {
  pylora_product(K, n, PANEL, k, rows, (int64_t)(stride / sizeof(float)), 1, panel, PANEL, tile,
                 PANEL);
}

static void products(const pylora_kernels *K, int64_t n, int64_t w, int64_t k, const void *rows,
                     size_t stride, const void *panels, float *tiles, const pylora_put *put) {
  const int64_t step = max64(1, pylora_piece(k)), panel = k * PANEL;
  rows_job j = {
      .m = n, .lda = (int64_t)(stride / sizeof(float)), .mode = GEMM_SET, .put = *put, .pieces = 1};
  for (int64_t t = 0; t == 0 || t < k; t += step, j.mode = GEMM_ADD)
    for (int64_t u = 0; u < w; u++) {
      const int last = u + 1 == w;
      j.kk = min64(step, k - t);
      j.a = (const float *)rows + t;
      j.b = (const float *)panels + u * panel + t * PANEL;
      j.c = tiles + u * n * PANEL;
      j.put.p = put->p && t + step >= k ? put->p + u * put->bytes : NULL;
      j.next = (const char *)(last ? (const float *)panels + (t + step) * PANEL : j.b + panel);
      j.piece_bytes =
          (last ? max64(0, min64(step, k - t - step)) : j.kk) * PANEL * (int64_t)sizeof(float);
      K->rows_f32(&j);
    }
}

static void few(const pylora_kernels *K, int n, int w, int64_t k, const void *const *rows,
                const void *const *panels, float *const *tiles) {
  const int64_t step = max64(1, pylora_piece(k));
  for (int64_t t = 0; t == 0 || t < k; t += step) {
    const float *x[PYLORA_FEW], *b[PYLORA_FEW];
    for (int i = 0; i < n; i++)
      x[i] = (const float *)rows[i] + t, b[i] = (const float *)panels[i] + t * w;
    K->few_rows(n, w, min64(step, k - t), x, b, tiles, t ? GEMM_ADD : GEMM_SET);
  }
}

static void transpose(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0,
                      int64_t rows, int64_t j, void *chunk) {
  float *out = chunk;
  const int64_t cols = min64(PANEL, k - j);
  for (int64_t q = 0; q < rows; q += PANEL) {
    const float *tile = (const float *)panels + (d0 + q) * k + j * PANEL;
    if (cols == PANEL) {
      K->transpose(PANEL, PANEL, tile, PANEL, out + q * PANEL, PANEL);
    } else {
      for (int64_t a = 0; a < PANEL; a++)
        for (int64_t b = 0; b < PANEL; b++)
          out[(q + a) * PANEL + b] = b < cols ? tile[b * PANEL + a] : 0;
    }
  }
}

const pylora_format pylora_format_f32 = {
    .dtype = PYLORA_F32,
    .multiple = 1,
    .panel_bytes = panel_bytes,
    .pack = pack,
    .unpack = unpack,
    .row_bytes = row_bytes,
    .prepare = prepare,
    .product = product,
    .products = products,
    .many = 48,
    .few = few,
    .back = PYLORA_F32,
    .transpose = transpose,
};
