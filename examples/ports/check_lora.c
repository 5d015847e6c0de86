/* check_lora.c - the cases of one layer: forward and backward, merge, random streams, AdamW, and an
 * adapter file in use. */
#include "vectors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* The dropout of a case, its stream by its name (D-7). */
static pylora_drop dropout(const testcase *c) {
  char name[256];
  snprintf(name, sizeof name, "dropout/%s/%.0f", string(c, "path"), number(c, "step"));
  return (pylora_drop){(float)number(c, "p"), word64(c, "seed"), stream(name),
                       (int64_t)number(c, "row0")};
}

/* One layer forward and backward on the inputs x, W and dy. */
static void layer(testcase *c, const pylora_lora *lora, const float *bias, pylora_mat *dA,
                  pylora_mat *dB) {
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), dx = zeros(x.rows, x.cols);
  const pylora_packed W = pack(in(c, "W"));
  pylora_mat h;
  const pylora_mat y = lora_forward(x, &W, bias, lora, NULL, &h);
  *dA = zeros(lora->r, x.cols), *dB = zeros(W.d, lora->r);
  lora_backward(dy, &x, &h, &W, lora, &dx, dA, dB);
  check(c, "h", h), check(c, "y", y), check(c, "dx", dx), check(c, "dA", *dA), check(c, "dB", *dB);
}

void lora_case(testcase *c) {
  const pylora_mat A = in(c, "A"), B = in(c, "B"), dy = in(c, "dy"), g = zeros(dy.rows, A.rows);
  const double alpha = number(c, "alpha"), r = (double)A.rows;
  const int rslora = truth(c, "use_rslora");
  const pylora_drop drop = has(c, "p") ? dropout(c) : (pylora_drop){0};
  const float s = (float)(alpha / (rslora ? sqrt(r) : r)); /* S-1 */
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, s, has(c, "p") ? &drop : NULL, NULL};
  pylora_mat dA, dB;
  layer(c, &lora, input(c, "bias").p, &dA, &dB);
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

void merge_case(testcase *c) {
  const char *dtype = string(c, "dtype");
  const int number_of = dtype[0] == 'b' ? PYLORA_BF16 : dtype[1] == '1' ? PYLORA_F16 : PYLORA_F32;
  const array W = input(c, "W"); /* bits */
  const pylora_mat A = in(c, "A"), B = in(c, "B");
  const pylora_lora lora = {A.rows, A.p, A.ld, B.p, B.ld, (float)number(c, "scale"), NULL, NULL};
  const merged m = merge(number_of, W, &lora);
  check_array(c, "merged", W.dtype, m.W, W.rows * W.cols);
  check_array(c, "position", "i64", m.position, m.n);
  check_array(c, "bits", "u32", m.bits, m.n);
}

/* ---- random streams ---------------------------------------------------------------------- */

void philox_case(testcase *c) {
  uint32_t words[11];
  must(pylora_philox(word64(c, "seed"), word64(c, "stream"), (int64_t)word64(c, "first"), 11,
                     words));
  check_array(c, "words", "u32", words, 11);
}

void unit_case(testcase *c) {
  double u[8];
  units(u, 8, word64(c, "seed"), stream(string(c, "name")));
  check_array(c, "u", "f64", u, 8);
}

void init_case(testcase *c) { /* the shape of A gives r and k (I-1 ... I-3, R-5) */
  const array shape = output(c, "A"), up = output(c, "B");
  const pylora_mat A = zeros(shape.rows, shape.cols);
  char name[256];
  snprintf(name, sizeof name, "init/%s", string(c, "path"));
  if (!strcmp(string(c, "method"), "gaussian"))
    normal(A, 1 / (double)A.rows, word64(c, "seed"), name);
  else
    uniform(A, 1 / sqrt((double)A.cols), word64(c, "seed"), name);
  check(c, "A", A), check(c, "B", zeros(up.rows, A.rows));
}

void dropout_case(testcase *c) {
  const pylora_mat x = in(c, "x"), y = zeros(x.rows, x.cols);
  const pylora_drop drop = dropout(c);
  const int64_t n = x.rows * x.cols;
  unsigned char *kept = take((size_t)n);
  must(pylora_dropout(&x, &drop, &y));
  for (int64_t i = 0; i < n; i++) kept[i] = y.p[i] != 0;
  check(c, "y", y), check_array(c, "kept", "u8", kept, n);
}

/* ---- optimizer, and a file in use -------------------------------------------------------- */

void adamw_case(testcase *c) {
  const pylora_mat p = in(c, "param"), g = in(c, "grad"), m = in(c, "m"), v = in(c, "v");
  const pylora_adamw o = {number(c, "lr"),           number(c, "beta1"),
                          number(c, "beta2"),        number(c, "eps"),
                          number(c, "weight_decay"), number(c, "grad_scale"),
                          (int64_t)number(c, "step")};
  must(pylora_adamw_step(p.cols, p.p, g.p, m.p, v.p, &o));
  check(c, "new_param", p), check(c, "new_m", m), check(c, "new_v", v);
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
  layer(c, &lora, NULL, &dA, &dB);
  check_array(c, "merged", "f32", merge(PYLORA_F32, input(c, "W"), &lora).W, W.rows * W.cols);
  adamw(a.A, dA, &mA, &vA, &o), adamw(a.B, dB, &mB, &vB, &o);
  check(c, "new_A", a.A), check(c, "new_B", a.B);
}
