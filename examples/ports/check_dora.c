/* check_dora.c - the cases of DoRA, written out: pylora.h has no call for it, so this is what a
 * program adds (W-1 to W-6). Sums are double. */
#include "vectors.h"

#include <math.h>

static double at(pylora_mat a, int64_t i, int64_t j) { return a.p[i * a.ld + j]; }

/* c [a.rows, b.cols] = a b, or of a's transpose [a.cols, b.cols] */
static pylora_mat product(pylora_mat a, pylora_mat b, int turned) {
  const int64_t rows = turned ? a.cols : a.rows, n = turned ? a.rows : a.cols;
  const pylora_mat c = zeros(rows, b.cols);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < b.cols; j++) {
      double sum = 0;
      for (int64_t t = 0; t < n; t++) sum += (turned ? at(a, t, i) : at(a, i, t)) * at(b, t, j);
      c.p[i * c.ld + j] = (float)sum;
    }
  return c;
}

void dora_case(testcase *c) {
  const pylora_mat x = in(c, "x"), W = in(c, "W"), A = in(c, "A"), B = in(c, "B");
  const pylora_mat dy = in(c, "dy"), m = in(c, "magnitude");
  const float *bias = input(c, "bias").p;
  const double s = number(c, "scale");
  const int64_t d = W.rows, k = W.cols, r = A.rows;
  const pylora_mat V = zeros(d, k), n = zeros(1, d), f = zeros(1, d), merged = zeros(d, k);
  for (int64_t j = 0; j < d; j++) { /* W-6: the rows themselves, so that nothing cancels */
    double square = 0;
    for (int64_t i = 0; i < k; i++) {
      double sum = 0;
      for (int64_t t = 0; t < r; t++) sum += at(B, j, t) * at(A, t, i);
      const double v = at(W, j, i) + s * sum;
      square += v * v, V.p[j * k + i] = (float)v;
    }
    n.p[j] = (float)sqrt(square);
    f.p[j] = n.p[j] == 0 && m.p[j] == 0 ? 1 : m.p[j] / n.p[j]; /* W-4 */
    for (int64_t i = 0; i < k; i++) merged.p[j * k + i] = (float)((double)f.p[j] * V.p[j * k + i]);
  }
  const pylora_mat v = product(x, transposed(V), 0), y = copy(v), dv = copy(dy), dm = zeros(1, d);
  for (int64_t j = 0; j < d; j++) {
    double sum = 0;
    for (int64_t i = 0; i < x.rows; i++) {
      y.p[i * d + j] = f.p[j] * v.p[i * d + j] + (bias ? bias[j] : 0); /* W-1 */
      dv.p[i * d + j] *= f.p[j];
      sum += at(dy, i, j) * at(v, i, j);
    }
    dm.p[j] = n.p[j] == 0 ? 0 : (float)(sum / n.p[j]); /* W-3, W-4 */
  }
  const pylora_mat h = product(x, transposed(A), 0), g = product(dv, B, 0);
  const pylora_mat dA = product(g, x, 1), dB = product(dv, h, 1);
  for (int64_t i = 0; i < r * k; i++) dA.p[i] = (float)(s * dA.p[i]);
  for (int64_t i = 0; i < d * r; i++) dB.p[i] = (float)(s * dB.p[i]);
  check(c, "n", n), check(c, "y", y), check(c, "dx", product(dv, V, 0));
  check(c, "dA", dA), check(c, "dB", dB), check(c, "dm", dm), check(c, "merged", merged);
}
