/* check_lora.c - the cases of one layer: forward and backward, several adapters, merge, and an
 * adapter file in use. */
#include "vectors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* One layer forward and backward on the inputs x, W and dy. */
static void layer(testcase *c, const pylora_lora *lora, const float *bias, const float *bias_B,
                  pylora_mat *dA, pylora_mat *dB) {
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), dx = zeros(x.rows, x.cols);
  const pylora_packed W = pack(in(c, "W"));
  pylora_mat h;
  const pylora_mat y = lora_forward(x, &W, bias, lora, NULL, &h), sums = zeros(1, dy.cols);
  for (int64_t i = 0; bias_B && i < dy.rows; i++)
    for (int64_t j = 0; j < dy.cols; j++) {
      y.p[i * y.ld + j] += lora->s * bias_B[j];   /* F-4 */
      sums.p[j] += lora->s * dy.p[i * dy.ld + j]; /* B-5 */
    }
  if (bias_B) check(c, "dbias_B", sums);
  *dA = zeros(lora->r, x.cols), *dB = zeros(W.d, lora->r);
  lora_backward(dy, &x, &h, &W, lora, &dx, dA, dB);
  check(c, "h", h), check(c, "y", y), check(c, "dx", dx), check(c, "dA", *dA), check(c, "dB", *dB);
}

void lora_case(testcase *c) {
  const pylora_mat A = in(c, "A"), B = in(c, "B"), dy = in(c, "dy"), g = zeros(dy.rows, A.rows);
  const double alpha = number(c, "alpha"), r = (double)A.rows;
  const int rslora = truth(c, "use_rslora");
  const pylora_drop drop = has(c, "p") ? drop_of(c) : (pylora_drop){0};
  const float s = (float)(alpha / (rslora ? sqrt(r) : r)); /* S-1 */
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, s, has(c, "p") ? &drop : NULL, NULL};
  pylora_mat dA, dB;
  layer(c, &lora, input(c, "bias").p, input(c, "bias_B").p, &dA, &dB);
  const pylora_packed up = pack(B); /* g stays inside pylora_lora_backward: dy B once more */
  lora_backward(dy, NULL, NULL, &up, NULL, &g, NULL, NULL);
  check(c, "g", g);
}

void embedding_case(testcase *c) {
  const array ids = typed(c, "ids", "i64");
  const pylora_mat A = in(c, "A"), B = in(c, "B");
  const float s = (float)number(c, "scale");
  pylora_mat h, dA, dB;
  check(c, "y", embedding_forward(ids.p, ids.cols, in(c, "W"), A, B, s, &h));
  embedding_backward(ids.p, in(c, "dy"), h, A, B, s, &dA, &dB);
  check(c, "dA", dA), check(c, "dB", dB);
}

/* All rows are computed, some are shown. */
void rows_case(testcase *c) {
  const pylora_mat A = in(c, "A"), B = in(c, "B"), x = in(c, "x"), dy = in(c, "dy");
  const pylora_mat dx = zeros(x.rows, x.cols);
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, (float)number(c, "scale"), NULL, NULL};
  const pylora_packed W = pack(in(c, "W"));
  pylora_mat h;
  const pylora_mat y = lora_forward(x, &W, NULL, &lora, NULL, &h);
  lora_backward(dy, NULL, NULL, &W, &lora, &dx, NULL, NULL);
  unsigned char *finite = take((size_t)y.rows);
  for (int64_t i = 0; i < y.rows; i++) {
    finite[i] = 1;
    for (int64_t j = 0; j < y.cols; j++) finite[i] &= isfinite(y.p[i * y.ld + j]) != 0;
  }
  check_array(c, "finite", "u8", finite, y.rows);
  int64_t n;
  const int64_t *some = integers(c, "rows", &n);
  const pylora_mat y_some = zeros(n, y.cols), dx_some = zeros(n, dx.cols);
  for (int64_t i = 0; i < n; i++) {
    memcpy(y_some.p + i * y.cols, y.p + some[i] * y.ld, (size_t)y.cols * sizeof(float));
    memcpy(dx_some.p + i * dx.cols, dx.p + some[i] * dx.ld, (size_t)dx.cols * sizeof(float));
  }
  check(c, "y", y_some), check(c, "dx", dx_some);
}

/* ---- several adapters -------------------------------------------------------------------- */

static void several_case(testcase *c, const int64_t *rows) {
  int64_t n;
  const double *scales = numbers(c, "scales", &n);
  pylora_lora loras[8];
  char name[16];
  if (n > 8) stop(c->name, "has more adapters than this program takes");
  for (int i = 0; i < n; i++) {
    snprintf(name, sizeof name, "A.%d", i);
    const pylora_mat A = in(c, name);
    *name = 'B';
    const pylora_mat B = in(c, name);
    loras[i] = (pylora_lora){A.rows, A.p, A.ld, B.p, B.ld, (float)scales[i], NULL, NULL};
  }
  const layer_out out = several(in(c, "x"), in(c, "W"), (int)n, loras, rows, in(c, "dy"));
  check(c, "y", out.y), check(c, "dx", out.dx);
  for (int i = 0; i < n; i++) {
    snprintf(name, sizeof name, "dA.%d", i);
    check(c, name, out.dA[i]);
    name[1] = 'B';
    check(c, name, out.dB[i]);
  }
}

void stacked_case(testcase *c) { several_case(c, NULL); }
void mixed_case(testcase *c) { several_case(c, typed(c, "rows", "i64").p); }

/* ---- merge and unmerge ------------------------------------------------------------------- */

typedef struct merged {
  void *W;
  int64_t n, *position; /* the residue */
  uint32_t *bits;
} merged;

static merged merge(int dtype, array W, const pylora_lora *lora) {
  const size_t bytes = (size_t)(W.rows * W.cols) * W.size;
  merged m = {.W = take(bytes)};
  int64_t *lossy = take((size_t)W.rows * sizeof *lossy);
  must(pylora_merge(dtype, W.rows, W.cols, W.p, W.cols, lora, m.W, W.cols, lossy));
  for (int64_t i = 0; i < W.rows; i++) m.n += lossy[i];
  m.position = take((size_t)m.n * sizeof *m.position);
  m.bits = take((size_t)m.n * sizeof *m.bits);
  must(pylora_merge_residue(dtype, W.rows, W.cols, W.p, W.cols, m.W, W.cols, lora, lossy,
                            m.position, m.bits));
  void *back = take(bytes);
  must(pylora_unmerge(dtype, W.rows, W.cols, m.W, W.cols, lora, m.n, m.position, m.bits, back,
                      W.cols));
  if (memcmp(back, W.p, bytes)) stop("merge", "unmerging is not exact"); /* M-3 */
  return m;
}

static int dtype_of(const testcase *c) {
  const char *dtype = string(c, "dtype");
  return dtype[0] == 'b' ? PYLORA_BF16 : dtype[1] == '1' ? PYLORA_F16 : PYLORA_F32;
}

void merge_case(testcase *c) {
  const array W = input(c, "W"); /* bits */
  const pylora_mat A = in(c, "A"), B = in(c, "B");
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, (float)number(c, "scale"), NULL, NULL};
  const merged m = merge(dtype_of(c), W, &lora);
  check_array(c, "merged", W.dtype, m.W, W.rows * W.cols);
  check_array(c, "position", "i64", m.position, m.n);
  check_array(c, "bits", "u32", m.bits, m.n);
}

void unmerge_case(testcase *c) {
  const array W = input(c, "merged"), position = typed(c, "position", "i64");
  const pylora_mat A = in(c, "A"), B = in(c, "B");
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, (float)number(c, "scale"), NULL, NULL};
  void *back = take((size_t)(W.rows * W.cols) * W.size);
  must(pylora_unmerge(dtype_of(c), W.rows, W.cols, W.p, W.cols, &lora, position.cols, position.p,
                      typed(c, "bits", "u32").p, back, W.cols));
  check_array(c, "W", W.dtype, back, W.rows * W.cols);
}

/* ---- sixteen bits, widened; a file in use ------------------------------------------------ */

static pylora_mat widened(const testcase *c, const char *name, int bf16) {
  const array a = typed(c, name, "u16");
  const pylora_mat out = zeros(a.rows, a.cols);
  for (int64_t i = 0; i < a.rows * a.cols; i++) {
    const uint16_t bits = ((const uint16_t *)a.p)[i];
    const int e = bf16 ? bits >> 7 & 255 : bits >> 10 & 31;
    const int digits = bf16 ? 7 : 10, fraction = bits & ((1 << digits) - 1);
    const int whole = e ? fraction + (1 << digits) : fraction, power = (e ? e : 1) - digits;
    out.p[i] = (float)ldexp(bits >> 15 ? -whole : whole, power - (bf16 ? 127 : 15));
  }
  return out;
}

void lora16_case(testcase *c) {
  const int bf16 = dtype_of(c) == PYLORA_BF16;
  const pylora_mat A = widened(c, "A", bf16), B = widened(c, "B", bf16);
  const float s = (float)(number(c, "alpha") / (double)A.rows);
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, s, NULL, NULL};
  const pylora_packed W = pack(widened(c, "W", bf16));
  pylora_mat h;
  check(c, "y", lora_forward(widened(c, "x", bf16), &W, NULL, &lora, NULL, &h));
  check(c, "h", h);
}

/* Loads the file, runs forward and backward, merges, unmerges, and makes one training step. */
void embed_case(testcase *c) {
  const pylora_mat W = in(c, "W");
  char inside[128];
  snprintf(inside, sizeof inside, "%s/adapter", c->name);
  adapter a = load_adapter(folder_of(inside), string(c, "path"), W.rows, W.cols);
  const pylora_lora lora = {a.A.rows, a.A.p, a.A.ld, a.B.p, a.B.ld, a.s, NULL, NULL};
  const pylora_adamw o = {number(c, "lr"), 0.9, 0.999, 1e-8, 0, 1, 1};
  pylora_mat dA, dB, mA = {0}, vA = {0}, mB = {0}, vB = {0};
  layer(c, &lora, NULL, NULL, &dA, &dB);
  check_array(c, "merged", "f32", merge(PYLORA_F32, input(c, "W"), &lora).W, W.rows * W.cols);
  adamw(a.A, dA, &mA, &vA, &o), adamw(a.B, dB, &mB, &vB, &o);
  check(c, "new_A", a.A), check(c, "new_B", a.B);
}
