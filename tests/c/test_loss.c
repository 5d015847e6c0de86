/* Cross-entropy, AdamW, sum of squares, Philox and dropout. */
#include "check.h"

static void cross_entropy(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 9), n = PICK(1, 2, 15, 16, 63, 64, 65, 1000);
    const float size = (float)PICK(1, 20, 200);
    const pylora_mat x = matrix(m, n, size), d = matrix(m, n, 0), d0 = matrix(m, n, 0),
                     mag = matrix(m, n, 0);
    int64_t *labels = ids_below(m, n);
    for (int64_t i = 0; i < m; i++)
      if (below(4) == 0) labels[i] = PYLORA_IGNORE;
    float *nll = floats(m, 0), *lse = floats(m, 0), *nll0 = floats(m, 0), *lse0 = floats(m, 0);
    float *weight = floats(m, 1), *most = floats(m, 0);
    OK(pylora_cross_entropy_forward(&x, labels, nll, lse));
    pylora_ref_cross_entropy_forward(&x, labels, nll0, lse0);
    /* u |x - top| of each term's exponent, weighted by its share; the sum; the log; the last sums */
    for (int64_t i = 0; i < m; i++) {
      double shift = 0;
      for (int64_t j = 0; j < n; j++)
        shift += exp((double)*el(&x, i, j) - lse0[i]) * fabs((double)*el(&x, i, j) - lse0[i]);
      most[i] =
          (float)(1.01 * U * shift + gamma_n((double)n + EXP) + gamma_n(EXP) * log((double)n) +
                  gamma_n(3) * (fabs(lse0[i]) + fabs(nll0[i])) + U);
    }
    const pylora_mat N = column(nll, m), N0 = column(nll0, m), L = column(lse, m),
                     L0 = column(lse0, m);
    const pylora_mat B = column(most, m);
    expect_near("nll", &N, &N0, &B, 1 / U / 2);
    expect_near("lse", &L, &L0, &B, 1 / U / 2);
    OK(pylora_cross_entropy_backward(&x, labels, lse0, weight, &d));
    pylora_ref_cross_entropy_backward(&x, labels, lse0, weight, &d0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        const double away = (double)*el(&x, i, j) - lse0[i], p = exp(away);
        *el(&mag, i, j) =
            (float)(1.01 * fabs(weight[i]) *
                    (p * (expm1(U * fabs(away)) + gamma_n(EXP + 2)) + (j == labels[i]) * 3 * U));
      }
    expect_near("dlogits", &d, &d0, &mag, 1 / U / 2);
    const pylora_mat same = copy_of(&x);
    OK(pylora_cross_entropy_backward(&same, labels, lse0, weight, &same));
    expect_same("dlogits in logits", &same, &d);
    /* Both at once are the two, bit for bit; in bfloat16 rounded once. */
    const pylora_mat two = matrix(m, n, 0), both = either(m, n), late = matrix16(m, n);
    float *nll1 = floats(m, 0), *lse1 = floats(m, 0);
    OK(pylora_cross_entropy_backward(&x, labels, lse, weight, &two));
    OK(pylora_cross_entropy_backward(&x, labels, lse, weight, &late));
    expect_rounded("dlogits in bfloat16", &late, &two);
    OK(pylora_cross_entropy(&x, labels, weight, nll1, lse1, &both));
    expect_stored("dlogits of both", &both, &two);
    pylora_ref_cross_entropy(&x, labels, weight, nll0, lse0, &d0);
    const pylora_mat N1 = column(nll1, m), L1 = column(lse1, m);
    expect_near("nll of both", &N1, &N0, &B, 1 / U / 2);
    expect_near("lse of both", &L1, &L0, &B, 1 / U / 2);
    const pylora_mat inside = copy_of(&x);
    OK(pylora_cross_entropy(&inside, labels, weight, nll1, lse1, &inside));
    expect_same("dlogits of both in logits", &inside, &two);
    EXPECT(memcmp(nll1, nll, (size_t)m * sizeof(float)) == 0);
    EXPECT(memcmp(lse1, lse, (size_t)m * sizeof(float)) == 0);
    for (int64_t i = 0; i < m; i++) {
      const pylora_mat x1 = row_of(&x, i);
      float a, b;
      OK(pylora_cross_entropy_forward(&x1, labels + i, &a, &b));
      EXPECT(a == nll[i] && b == lse[i], "a row alone has other bits");
      EXPECT(labels[i] != PYLORA_IGNORE || (nll[i] == 0 && *el(&d, i, 0) == 0));
    }
    release();
  }
}

static void adamw(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t n = PICK(0, 1, 15, 100, 40000);
    float *p[2], *m[2], *v[2];
    const float *g = floats(n, c % 2 ? 1e-6f : 1);
    const pylora_adamw o = {1e-3, 0.9, 0.999, 1e-8, 0.1, 0.5, 1 + below(3000)};
    p[0] = floats(n, 1), m[0] = floats(n, 0.1f), v[0] = abs_floats(n, floats(n, 0.01f));
    p[1] = floats(n, 0), m[1] = floats(n, 0), v[1] = floats(n, 0);
    const size_t bytes = (size_t)n * sizeof(float);
    memcpy(p[1], p[0], bytes), memcpy(m[1], m[0], bytes), memcpy(v[1], v[0], bytes);
    float *pm = floats(n, 0), *mm = floats(n, 0);
    for (int64_t i = 0; i < n; i++) {
      const double G = fabs(g[i] * o.grad_scale),
                   m_size = o.beta1 * fabs(m[0][i]) + (1 - o.beta1) * G;
      const double v_hat =
          (o.beta2 * v[0][i] + (1 - o.beta2) * G * G) / (1 - pow(o.beta2, (double)o.step));
      const double step =
          o.lr * m_size / (1 - pow(o.beta1, (double)o.step)) / (sqrt(v_hat) + o.eps);
      mm[i] = (float)(1.01 * m_size);
      pm[i] = (float)(1.01 * (gamma_n(4) * fabs(p[0][i]) + gamma_n(20) * step));
    }
    OK(pylora_adamw_step(n, p[0], g, m[0], v[0], &o));
    pylora_ref_adamw_step(n, p[1], g, m[1], v[1], &o);
    const pylora_mat P = column(p[0], n), P1 = column(p[1], n), M = column(m[0], n),
                     M1 = column(m[1], n);
    const pylora_mat V = column(v[0], n), V1 = column(v[1], n), PM = column(pm, n),
                     MM = column(mm, n);
    expect_near("param", &P, &P1, &PM, 1 / U / 2);
    expect_near("m", &M, &M1, &MM, 5);
    expect_near("v", &V, &V1, &V1, 9);
    release();
  }
}

static void sum_squares(void) {
  const int64_t n = PICK(0, 1, 7, 8, 1000, 100000);
  const float *x = floats(n, 3);
  double sum, again;
  OK(pylora_sum_squares(n, x, &sum));
  const double want = pylora_ref_sum_squares(n, x);
  EXPECT(fabs(sum - want) <= 2 * (double)n * DBL_EPSILON * want, "%.17g, not %.17g", sum, want);
  OK(pylora_set_num_threads(4));
  OK(pylora_sum_squares(n, x, &again));
  EXPECT(sum == again, "threads change the sum");
}

/* The known answers of the Random123 library (kat_vectors), which any port must reproduce. */
static void philox(void) {
  uint32_t w[4];
  OK(pylora_philox(0, 0, 0, 4, w));
  EXPECT(w[0] == 0x6627e8d5 && w[1] == 0xe169c58d && w[2] == 0xbc57ac4c && w[3] == 0x9b00dbd8);
  for (int c = 0; c < 20; c++) {
    const int64_t n = PICK(0, 1, 3, 64, 65, 5000), first = PICK(0, 1, 2, 3, 77, (int64_t)1 << 40);
    uint32_t *a = bytes_of((size_t)n * 4), *b = bytes_of((size_t)n * 4);
    const uint64_t seed = bits64(), stream = bits64();
    OK(pylora_philox(seed, stream, first, n, a));
    pylora_ref_philox(seed, stream, first, n, b);
    EXPECT(memcmp(a, b, (size_t)n * 4) == 0);
    release();
  }
}

static void dropout(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 6), k = PICK(1, 5, 64, 130);
    const pylora_mat x = matrix(m, k, 1), y = matrix(m, k, 0), y0 = matrix(m, k, 0);
    const pylora_drop drop = {(float)PICK(0, 1, 5, 9) / 10, bits64(), bits64(), below(1000)};
    OK(pylora_dropout(&x, &drop, &y));
    pylora_ref_dropout(&x, &drop, &y0);
    expect_same("y", &y, &y0);
    const pylora_mat same = copy_of(&x);
    OK(pylora_dropout(&same, &drop, &same));
    expect_same("y in x", &same, &y);
    release();
  }
  const pylora_mat x = matrix(100, 1000, 0), y = matrix(100, 1000, 0); /* the share that is kept */
  fill(&x, 1);
  const pylora_drop drop = {0.3f, 1, 2, 0};
  OK(pylora_dropout(&x, &drop, &y));
  int64_t zeros = 0;
  for (int64_t i = 0; i < 100; i++)
    for (int64_t j = 0; j < 1000; j++) zeros += *el(&y, i, j) == 0;
  EXPECT(fabs((double)zeros - 30000) < 6 * sqrt(100000 * 0.3 * 0.7), "%d zeros",
         (int)zeros); /* 6 sigma */
}

int main(void) {
  each_setup(cross_entropy);
  each_setup(adamw);
  each_setup(sum_squares);
  each_setup(philox);
  each_setup(dropout);
  return finish("test_loss");
}
