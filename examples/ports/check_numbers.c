/* check_numbers.c - the cases without a layer: random streams, initial values, dropout, a
 * training step. */
#include "vectors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- random streams ---------------------------------------------------------------------- */

void philox_case(testcase *c) {
  const int64_t n = output(c, "words").cols;
  uint32_t *words = take((size_t)n * sizeof *words);
  must(
      pylora_philox(word64(c, "seed"), word64(c, "stream"), (int64_t)word64(c, "first"), n, words));
  check_array(c, "words", "u32", words, n);
}

void unit_case(testcase *c) {
  double u[8];
  units(u, 8, word64(c, "seed"), stream(string(c, "name")));
  check_array(c, "u", "f64", u, 8);
}

void quantile_case(testcase *c) {
  const array u = typed(c, "u", "f64");
  double *z = take((size_t)u.cols * sizeof *z);
  for (int64_t i = 0; i < u.cols; i++) z[i] = quantile(((const double *)u.p)[i]);
  check_array(c, "z", "f64", z, u.cols);
}

/* Fills `a` and compares it: `deviation` or else `bound`, or zeros where both are 0 (I, R-5). */
static void initial(testcase *c, const char *what, const char *suffix, double deviation,
                    double bound) {
  const array shape = output(c, what);
  const pylora_mat a = zeros(shape.rows, shape.cols);
  char name[256];
  snprintf(name, sizeof name, "init/%s%s", string(c, "path"), suffix);
  if (deviation != 0) normal(a, deviation, word64(c, "seed"), name);
  if (bound != 0) uniform(a, bound, word64(c, "seed"), name);
  check(c, what, a);
}

void init_case(testcase *c) { /* the shape of A gives r and k (I-1 ... I-5) */
  const double r = (double)output(c, "A").rows, k = (double)output(c, "A").cols;
  const int all = !strcmp(string(c, "method"), "false"), embedding = *string(c, "kind") == 'e';
  const int gaussian = !strcmp(string(c, "method"), "gaussian");
  if (embedding) {
    initial(c, "A", "", all, 0), initial(c, "B", "/B", 1, 0);
    return;
  }
  initial(c, "A", "", gaussian ? 1 / r : 0, gaussian ? 0 : 1 / sqrt(k));
  initial(c, "B", "/B", 0, all ? 1 / sqrt(r) : 0);
  if (listed(c, "bias")) initial(c, "bias", "/bias", 0, all ? 1 / sqrt(r) : 0);
}

/* The dropout of a case, its stream by its name (D-7). */
pylora_drop drop_of(const testcase *c) {
  char name[256];
  snprintf(name, sizeof name, "dropout/%s/%.0f", string(c, "path"), number(c, "step"));
  return (pylora_drop){(float)number(c, "p"), word64(c, "seed"), stream(name),
                       (int64_t)number(c, "row0")};
}

void dropout_case(testcase *c) {
  const pylora_mat x = in(c, "x"), y = zeros(x.rows, x.cols);
  const pylora_drop drop = drop_of(c);
  const int64_t n = x.rows * x.cols;
  unsigned char *kept = take((size_t)n);
  must(pylora_dropout(&x, &drop, &y));
  for (int64_t i = 0; i < n; i++) kept[i] = y.p[i] != 0;
  check(c, "y", y), check_array(c, "kept", "u8", kept, n);
}

/* ---- optimizer --------------------------------------------------------------------------- */

void adamw_case(testcase *c) {
  const pylora_mat p = in(c, "param"), g = in(c, "grad"), m = in(c, "m"), v = in(c, "v");
  const pylora_adamw o = {number(c, "lr"),           number(c, "beta1"),
                          number(c, "beta2"),        number(c, "eps"),
                          number(c, "weight_decay"), number(c, "grad_scale"),
                          (int64_t)number(c, "step")};
  must(pylora_adamw_step(p.cols, p.p, g.p, m.p, v.p, &o));
  check(c, "new_param", p), check(c, "new_m", m), check(c, "new_v", v);
}

void update_case(testcase *c) { /* the first step; B at its own rate, no decay of the bias */
  const char *const names[] = {"A", "B", "bias"};
  for (int i = 0; i < 3; i++) {
    char grad[16], updated[16];
    snprintf(grad, sizeof grad, "d%s", names[i]);
    snprintf(updated, sizeof updated, "new_%s", names[i]);
    const pylora_mat p = in(c, names[i]);
    pylora_mat m = {0}, v = {0};
    const pylora_adamw o = {number(c, "lr") * (i == 1 ? number(c, "lora_plus_ratio") : 1),
                            number(c, "beta1"),
                            number(c, "beta2"),
                            number(c, "eps"),
                            i == 2 ? 0 : number(c, "weight_decay"),
                            1,
                            1};
    adamw(p, in(c, grad), &m, &v, &o);
    check(c, updated, p);
  }
}

void clip_case(testcase *c) {
  const pylora_mat grads[] = {in(c, "g.0"), in(c, "g.1"), in(c, "g.2")};
  const double norm = clip(3, grads, number(c, "limit"));
  check_array(c, "norm", "f64", &norm, 1);
  check(c, "new_g.0", grads[0]), check(c, "new_g.1", grads[1]), check(c, "new_g.2", grads[2]);
}

/* O-1: each part with its own softmax, every row with one weight. */
void micro_batches_case(testcase *c) {
  const pylora_mat logits = in(c, "logits"), d = copy(logits);
  const int64_t *labels = typed(c, "labels", "i64").p;
  int64_t n, *parts = integers(c, "parts", &n), counted = 0, start = 0;
  float *nll = zeros(1, d.rows).p, *lse = zeros(1, d.rows).p, *weight = zeros(1, d.rows).p;
  for (int64_t i = 0; i < d.rows; i++) counted += labels[i] != PYLORA_IGNORE;
  for (int64_t i = 0; i < d.rows; i++) weight[i] = 1 / (float)counted;
  double loss = 0;
  for (int64_t i = 0; i < n; start += parts[i++]) {
    const pylora_mat part = {d.p + start * d.ld, parts[i], d.cols, d.ld, NULL, NULL};
    must(pylora_cross_entropy_forward(&part, labels + start, nll + start, lse + start));
    must(pylora_cross_entropy_backward(&part, labels + start, lse + start, weight, &part));
  }
  for (int64_t i = 0; i < d.rows; i++) loss += nll[i] / (double)counted;
  check_array(c, "loss", "f64", &loss, 1);
  check(c, "dlogits", d);
}
