/* format_x3.c - float32 weights as two bfloat16 halves: a panel is one of W1 and one of W2, each as in
 * format_bf16.c, and x W = x1 W1 + x1 W2 + x2 W1.
 *
 * v1 is v rounded to bfloat16 and v2 what is left, rounded: |v - v1 - v2| <= 2^-16 |v|.  With x2 W2, which
 * is left out, a product is off by at most (3 + 2^-6) 2^-16 |x W|: 14 bits surely, and 17 in the mean of a
 * long sum, in place of float32's 24.
 * That pays where a bfloat16 product is more than three times as fast as one of float32: with AMX. */
#include "formats/format.h"

enum { PANEL = PYLORA_PANEL, SOME = 64 };

static int64_t low_panel(int64_t k) { return ceil_div(k, 2) * PANEL * 2; }

static size_t panel_bytes(int64_t k) { return (size_t)low_panel(k) * 2 * sizeof(uint16_t); }

static void pack(const pylora_kernels *K, const pylora_mat *W, int64_t first, void *panel) {
  const int64_t k = W->cols, n = min64(PANEL, W->rows - first), behind = low_panel(k);
  uint16_t *out = panel, high[SOME], low[SOME];
  if (n < PANEL || k % 2) memset(out, 0, panel_bytes(k));
  for (int64_t t0 = 0; t0 < k; t0 += SOME)
    for (int64_t i = 0; i < n; i++) {
      const int64_t some = min64(SOME, k - t0);
      K->halves(some, W->p + (first + i) * W->ld + t0, high, low);
      for (int64_t t = 0; t < some; t++) {
        uint16_t *to = out + (t0 + t) / 2 * (PANEL * 2) + i * 2 + t % 2;
        to[0] = high[t];
        to[behind] = low[t];
      }
    }
}

static void unpack(const void *panel, int64_t k, int row, float *out) {
  const uint16_t *p = (const uint16_t *)panel + 2 * row;
  for (int64_t t = 0; t < k; t++) {
    const uint16_t *at = p + t / 2 * (PANEL * 2) + t % 2;
    out[t] = bf16_widen(at[0]) + bf16_widen(at[low_panel(k)]); /* exact */
  }
}

static size_t row_bytes(int64_t k) {
  return (size_t)pylora_x3_low(k) * 2 * sizeof(uint16_t) + PYLORA_ALIGN; /* see format_bf16.c */
}

static void prepare(const pylora_kernels *K, const pylora_mat *x, int64_t first, int64_t n,
                    void *out) {
  const int64_t k = x->cols, behind = pylora_x3_low(k);
  const size_t stride = row_bytes(k);
  for (int64_t i = 0; i < n; i++) {
    uint16_t *to = (uint16_t *)(void *)((char *)out + (size_t)i * stride);
    const int64_t at = (first + i) * x->ld;
    if (x->b) {
      memcpy(to, x->b + at, (size_t)k * sizeof(uint16_t));
      memset(to + behind, 0, (size_t)k * sizeof(uint16_t));
    } else {
      K->halves(k, x->p + at, to, to + behind);
    }
    if (k % 2) to[k] = to[behind + k] = 0;
  }
}

static void products(const pylora_kernels *K, int64_t n, int64_t w, int64_t k, const void *rows,
                     size_t stride, const void *panels, float *tiles, const pylora_put *put) {
  (void)put; /* asking for it early won nothing beside tiles */
  const panels_job j = {.m = n,
                        .n = (int)w,
                        .a = rows,
                        .lda = (int64_t)(stride / sizeof(uint16_t)),
                        .low_a = pylora_x3_low(k),
                        .b = panels,
                        .step = 2 * low_panel(k),
                        .low_b = low_panel(k),
                        .c = tiles,
                        .step_c = n * PANEL};
  pylora_panels_bf16(K, j, k);
}

static void product(const pylora_kernels *K, int64_t n, int64_t k, const void *rows, size_t stride,
                    const void *panel, float *tile) {
  products(K, n, 1, k, rows, stride, panel, tile, NULL);
}

static void transpose(const pylora_kernels *K, const void *panels, int64_t k, int64_t d0,
                      int64_t rows, int64_t j, void *chunk) {
  const int64_t cols = min64(PANEL, k - j), panel = 2 * low_panel(k);
  for (int half = 0; half < 2; half++) {
    uint16_t *out = (uint16_t *)chunk + half * rows * PANEL;
    for (int64_t q = 0; q < rows; q += PANEL) {
      const uint16_t *tile =
          (const uint16_t *)panels + (d0 + q) / PANEL * panel + half * low_panel(k) + j * PANEL;
      uint16_t edge[PANEL * PANEL];
      if (cols < PANEL) { /* a whole tile would reach beyond the panel */
        memset(edge, 0, sizeof edge);
        memcpy(edge, tile, (size_t)ceil_div(cols, 2) * PANEL * 2 * sizeof(uint16_t));
        tile = edge;
      }
      if (K->tiles) pylora_prefetch(tile + PANEL * PANEL, PANEL * PANEL * sizeof(uint16_t));
      K->transpose32_bf16(tile, out + q * PANEL);
    }
  }
}

const pylora_format pylora_format_f32x3 = {
    .dtype = PYLORA_F32X3,
    .multiple = 1,
    .panel_bytes = panel_bytes,
    .pack = pack,
    .unpack = unpack,
    .row_bytes = row_bytes,
    .prepare = prepare,
    .product = product,
    .products = products,
    .back = PYLORA_F32X3,
    .transpose = transpose,
};
