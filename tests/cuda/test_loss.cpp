/* Cross-entropy over the vocabulary: each type, against the reference; both directions at once with the bits of one after
 * the other; in place; ignored rows and labels out of range. */
#include "check_cuda.h"

static pylora_cuda *g;

static void cross_entropy(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = pick({0, 1, 2, 5}), n = pick({1, 3, 4, 33, 256, 1000, 4099, 60004});
    const float size = (float)pick({1, 30, 1000});
    Matrix x(any_type(), m, n, size), d(any_type(), m, n, 1), both(d.dtype, m, n, 1);
    const Matrix xw = x.wide();
    Matrix d0 = wide_zeros(m, n), magnitude = wide_zeros(m, n);
    std::vector<int64_t> labels = ids_below(m, n);
    for (int64_t &l : labels)
      if (below(4) == 0) l = PYLORA_IGNORE;
    const std::vector<float> weight = floats(m, 1);
    std::vector<float> nll((size_t)m, 7), lse((size_t)m, 7), nll0((size_t)m), lse0((size_t)m),
        nll2((size_t)m), lse2((size_t)m), sizes((size_t)m);
    context = "cross_entropy " + std::to_string(m) + " x " + std::to_string(n) + ", type " +
              std::to_string(x.dtype);
    OK(pylora_cuda_cross_entropy_forward(g, NULL, &x, labels.data(), nll.data(), lse.data()));
    pylora_ref_cross_entropy_forward(&xw, labels.data(), nll0.data(), lse0.data());
    for (int64_t i = 0; i < m; i++) {
      const int64_t l = labels[(size_t)i];
      sizes[(size_t)i] =
          fabsf(lse0[(size_t)i]) + size * 4 + (l == PYLORA_IGNORE ? 0 : fabsf(x.get(i, l))) + 1;
    }
    /* a logarithm of a sum of n exponentials whose arguments are rounded differences */
    expect_near("lse", lse, lse0, sizes, (double)n / 128 + 40);
    expect_near("nll", nll, nll0, sizes, (double)n / 128 + 42);
    OK(pylora_cuda_cross_entropy_backward(g, NULL, &x, labels.data(), lse0.data(), weight.data(),
                                          &d));
    pylora_ref_cross_entropy_backward(&xw, labels.data(), lse0.data(), weight.data(), &d0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        const double z = fabs((double)x.get(i, j)) + fabs((double)lse0[(size_t)i]);
        const double p = exp((double)x.get(i, j) - lse0[(size_t)i]);
        magnitude.put(
            i, j,
            labels[(size_t)i] == PYLORA_IGNORE
                ? 0
                : (float)(fabs(weight[(size_t)i]) * (p * (1 + z) + (j == labels[(size_t)i]))));
      }
    expect_near("dlogits", d, d0, magnitude, EXP + 6);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n && labels[(size_t)i] == PYLORA_IGNORE; j++)
        EXPECT(d.get(i, j) == 0 && nll[(size_t)i] == 0, "an ignored row");

    OK(pylora_cuda_cross_entropy(g, NULL, &x, labels.data(), weight.data(), nll2.data(),
                                 lse2.data(), &both));
    OK(pylora_cuda_cross_entropy_backward(g, NULL, &x, labels.data(), lse.data(), weight.data(),
                                          &d));
    EXPECT(nll == nll2 && lse == lse2, "both at once: other losses");
    expect_same("both at once", both, d);
    expect_bad_index(false);
    if (x.dtype == d.dtype) { /* in place */
      Matrix same = x.copy(), same2 = x.copy();
      OK(pylora_cuda_cross_entropy(g, NULL, &same, labels.data(), weight.data(), nll2.data(),
                                   lse2.data(), &same));
      OK(pylora_cuda_cross_entropy_backward(g, NULL, &same2, labels.data(), lse.data(),
                                            weight.data(), &same2));
      EXPECT(nll == nll2, "in place: other losses");
      expect_same("dlogits in logits", same, d);
      expect_same("dlogits in logits, backward", same2, d);
    }
    if (!m) continue;
    const int64_t broken = below(m);
    labels[(size_t)broken] = pick({-1, n, INT64_MIN, INT64_MAX});
    OK(pylora_cuda_cross_entropy(g, NULL, &x, labels.data(), weight.data(), nll2.data(),
                                 lse2.data(), &both));
    expect_bad_index(true);
    EXPECT(isnan(nll2[(size_t)broken]) && lse2 == lse, "a label out of range");
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++)
        EXPECT(i == broken ? isnan(both.get(i, j)) : both.get(i, j) == d.get(i, j),
               "[%d,%d] beside a label out of range", (int)i, (int)j);
    OK(pylora_cuda_cross_entropy_backward(g, NULL, &x, labels.data(), lse.data(), weight.data(),
                                          &both));
    expect_bad_index(true);
    OK(pylora_cuda_cross_entropy_forward(g, NULL, &x, labels.data(), nll2.data(), lse2.data()));
    expect_bad_index(true);
    EXPECT(isnan(nll2[(size_t)broken]));
  }
}

/* -inf is a logit like any other, as long as one is finite. */
static void masked(void) {
  context = "masked";
  Matrix x(PYLORA_F32, 2, 4000, 3);
  for (int64_t j = 0; j < 4000; j++)
    if (j % 1000 != 7) x.put(0, j, -INFINITY);
  const int64_t labels[2] = {7, 3};
  std::vector<float> nll(2), lse(2), nll0(2), lse0(2);
  OK(pylora_cuda_cross_entropy_forward(g, NULL, &x, labels, nll.data(), lse.data()));
  pylora_ref_cross_entropy_forward(&x, labels, nll0.data(), lse0.data());
  expect_near("lse", lse, lse0, std::vector<float>{10, 20}, 60);
  expect_near("nll", nll, nll0, std::vector<float>{10, 20}, 60);
}

static void errors(void) {
  context = "errors";
  Matrix x(PYLORA_F32, 2, 8, 1), d(PYLORA_F32, 2, 7, 1), none(PYLORA_F32, 2, 0, 1);
  const int64_t labels[2] = {0, 1};
  float nll[2], lse[2];
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_cross_entropy_forward(NULL, NULL, &x, labels, nll, lse));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_cross_entropy_forward(g, NULL, &x, NULL, nll, lse));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_cross_entropy_forward(g, NULL, &x, labels, nll, NULL));
  EXPECT_STATUS(PYLORA_E_SHAPE,
                pylora_cuda_cross_entropy_forward(g, NULL, &none, labels, nll, lse));
  EXPECT_STATUS(PYLORA_E_SHAPE,
                pylora_cuda_cross_entropy_backward(g, NULL, &x, labels, lse, nll, &d));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_cross_entropy(g, NULL, &x, labels, NULL, nll, lse, &x));
}

int main(void) {
  g = device_0();
  cross_entropy();
  masked();
  errors();
  return finish("test_loss");
}
