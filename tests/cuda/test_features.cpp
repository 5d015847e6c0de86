/* What families have beside Llama's operations: LayerNorm, activations, soft caps, parts of heads that are rotated;
 * each type for each matrix, against the reference, in place where that is allowed. */
#include "check_cuda.h"

static pylora_cuda *g;

static void layer_norm(void) {
  for (int c = 0; c < 50; c++) {
    const int64_t m = pick({0, 1, 3, 40}), k = pick({1, 2, 15, 64, 128, 300, 516, 2052, 4100});
    const float eps = 1e-2f;
    Matrix x(any_type(), m, k, 3), dy(any_type(), m, k, 1), y(any_type(), m, k, 0);
    const Matrix xw = x.wide(), dyw = dy.wide();
    Matrix want = wide_zeros(m, k), size = wide_zeros(m, k);
    const std::vector<float> w = floats(k, 1), b = floats(k, 1);
    const float *more = below(2) ? b.data() : NULL;
    std::vector<float> rstd((size_t)m), rstd0((size_t)m);
    context = "layer_norm " + std::to_string(m) + " x " + std::to_string(k);
    OK(pylora_cuda_layer_norm_forward(g, NULL, &x, w.data(), more, eps, &y, rstd.data()));
    pylora_ref_layer_norm_forward(&xw, w.data(), more, eps, &want, rstd0.data());
    const int add = (int)below(2);
    Matrix dx(any_type(), m, k, 1), want_dx = dx.wide(), back = dx.wide();
    /* The mean is off by gamma_k of mean |x|, and so is each x - mean; rstd by what that does to the variance. */
    for (int64_t i = 0; i < m; i++) {
      double mean = 0, most = 0, along = 0;
      const double r = rstd0[(size_t)i];
      for (int64_t j = 0; j < k; j++) {
        mean += fabs(x.get(i, j)) / (double)k;
        most = fmax(most, fabs((double)dy.get(i, j) * w[(size_t)j]));
      }
      for (int64_t j = 0; j < k; j++) along = fmax(along, r * (fabs(x.get(i, j)) + mean));
      EXPECT(fabs(rstd[(size_t)i] - r) <=
                 4 * (double)(k + 8) * 0x1p-24 * r * (1 + along * r * mean),
             "rstd");
      for (int64_t j = 0; j < k; j++) {
        const double n = r * (fabs(x.get(i, j)) + mean);
        size.put(i, j,
                 (float)(fabs(w[(size_t)j]) * n * (2 + along * r * mean) +
                         (more ? fabs(b[(size_t)j]) : 0)));
        back.put(i, j,
                 (float)(fabs(back.get(i, j)) + r * most * (2 + 4 * n * along) * (1 + along)));
      }
    }
    expect_near("y", y, want, size, 4 * (double)k + 30);
    if (x.dtype == y.dtype) {
      Matrix same = x.copy();
      OK(pylora_cuda_layer_norm_forward(g, NULL, &same, w.data(), more, eps, &same, rstd.data()));
      expect_same("y in x", same, y);
    }
    OK(pylora_cuda_layer_norm_backward(g, NULL, &dy, &x, w.data(), rstd0.data(), &dx, add));
    pylora_ref_layer_norm_backward(&dyw, &xw, w.data(), rstd0.data(), &want_dx, add);
    expect_near("dx", dx, want_dx, back, 4 * (double)k + 40);
    Matrix plain(dy.dtype, m, k, 0), same = dy.copy();
    OK(pylora_cuda_layer_norm_backward(g, NULL, &dy, &x, w.data(), rstd0.data(), &plain, 0));
    OK(pylora_cuda_layer_norm_backward(g, NULL, &same, &x, w.data(), rstd0.data(), &same, 0));
    expect_same("dx in dy", same, plain);
  }
}

static void activations(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = pick({0, 1, 7}), n = pick({1, 4, 15, 64, 200, 1300});
    const int kind = c % 4;
    const bool gated = below(2);
    Matrix x(any_type(), m, n, (float)pick({1, 4, 20})), up(any_type(), m, n, 1),
        dy(any_type(), m, n, 1), y(any_type(), m, n, 0), dx(x.dtype, m, n, 0),
        du(up.dtype, m, n, 0);
    const Matrix xw = x.wide(), uw = up.wide(), dyw = dy.wide();
    Matrix y0 = wide_zeros(m, n), dx0 = wide_zeros(m, n), du0 = wide_zeros(m, n),
           size = wide_zeros(m, n);
    const pylora_mat *u = gated ? &up : NULL, *ur = gated ? &uw : NULL;
    context = "activation " + std::to_string(kind) + (gated ? " gated" : "");
    OK(pylora_cuda_activation_forward(g, NULL, kind, &x, u, &y));
    OK(pylora_cuda_activation_backward(g, NULL, kind, &dy, &x, u, &dx, gated ? &du : NULL));
    pylora_ref_activation_forward(kind, &xw, ur, &y0);
    pylora_ref_activation_backward(kind, &dyw, &xw, ur, &dx0, &du0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        const double v = fabs(x.get(i, j)),
                     d = fabs(dy.get(i, j)) * (gated ? fabs(up.get(i, j)) : 1), reach = fmin(v, 15);
        size.put(i, j, (float)(d * (kind == PYLORA_RELU2 ? 2 * v : 2 + 4 * reach * reach)));
      }
    /* u of GELU's tanh is up to 300, and -x² / 2 up to 200: a rounding of it is as many of its exponential. */
    const double off = kind == PYLORA_GELU_TANH ? 800 : kind == PYLORA_GELU_ERF ? 900 : EXP + 6;
    expect_near("y", y, y0, y0, off);
    expect_near("dx", dx, dx0, size, off);
    if (gated) expect_near("dup", du, du0, du0, off);
    Matrix a = x.copy(), b = up.copy();
    OK(pylora_cuda_activation_backward(g, NULL, kind, &dy, &a, gated ? &b : NULL, &a,
                                       gated ? &b : NULL));
    expect_same("dx in x", a, dx);
    if (gated) expect_same("dup in up", b, du);
    if (y.dtype != x.dtype) continue;
    Matrix in_x = x.copy();
    OK(pylora_cuda_activation_forward(g, NULL, kind, &in_x, u, &in_x));
    expect_same("y in x", in_x, y);
  }
  float ends[] = {30, -30, 1e20f, -1e20f, FLT_MAX, -FLT_MAX, 0};
  enum { N = sizeof ends / sizeof *ends };
  Matrix x(PYLORA_F32, 1, N, 0), one(PYLORA_F32, 1, N, 0), dx(PYLORA_F32, 1, N, 0);
  one.fill(1);
  for (int i = 0; i < N; i++) x.put(0, i, ends[i]);
  for (int kind = 0; kind < 4; kind++) { /* no slope is NaN where x is finite */
    OK(pylora_cuda_activation_backward(g, NULL, kind, &one, &x, NULL, &dx, NULL));
    for (int i = 0; i < N; i++) EXPECT(!isnan(dx.get(0, i)), "kind %d at %g", kind, ends[i]);
  }
}

static void caps(void) {
  for (int c = 0; c < 40; c++) {
    const int64_t m = pick({0, 1, 7}), n = pick({1, 4, 15, 200});
    const float by = (float)pick({1, 3}) / 2, cap = (float)pick({0, 1, 30});
    Matrix x(any_type(), m, n, (float)pick({1, 100})), dy(any_type(), m, n, 1),
        y(PYLORA_F32, m, n, 0), dx(any_type(), m, n, 0);
    const Matrix xw = x.wide(), dyw = dy.wide();
    Matrix y0 = wide_zeros(m, n), dx0 = wide_zeros(m, n);
    context = "soft_cap";
    OK(pylora_cuda_soft_cap_forward(g, NULL, &x, by, cap, &y));
    pylora_ref_soft_cap_forward(&xw, by, cap, &y0);
    expect_near("y", y, y0, y0, 2 * EXP);
    OK(pylora_cuda_soft_cap_backward(g, NULL, &dy, &y0, by, cap, &dx));
    pylora_ref_soft_cap_backward(&dyw, &y0, by, cap, &dx0);
    expect_near("dx", dx, dx0, dyw, 12);
    Matrix same = dy.copy();
    if (dx.dtype != dy.dtype) continue;
    OK(pylora_cuda_soft_cap_backward(g, NULL, &same, &y0, by, cap, &same));
    expect_same("dx in dy", same, dx);
  }
}

static void parts(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = pick({0, 1, 9}), D = pick({3, 4, 7, 32, 34, 64}), heads = pick({1, 3, 40}),
                  n = 12, half = 1 + below((D - 1) / 2);
    Matrix x(any_type(), m, heads * D, 1), y(any_type(), m, heads * D, 0),
        size = wide_zeros(m, heads * D), want = wide_zeros(m, heads * D),
        cosines(PYLORA_F32, n, half, 1), sines(PYLORA_F32, n, half, 1);
    const Matrix xw = x.wide();
    size.fill(2);
    std::vector<int64_t> position = ids_below(m, n);
    const int layout = (int)below(2), inverse = (int)below(2);
    context = "rope of " + std::to_string(2 * half) + " of " + std::to_string(D);
    OK(pylora_cuda_rope(g, NULL, &x, &cosines, &sines, position.data(), (int32_t)D, layout, inverse,
                        &y));
    pylora_ref_rope(&xw, &cosines, &sines, position.data(), (int32_t)D, layout, inverse, &want);
    expect_near("y", y, want, size, 2);
    if (x.dtype == y.dtype) {
      Matrix same = x.copy();
      OK(pylora_cuda_rope(g, NULL, &same, &cosines, &sines, position.data(), (int32_t)D, layout,
                          inverse, &same));
      expect_same("y in x", same, y);
    }
    expect_bad_index(false);
    if (!m) continue;
    const int64_t broken = below(m);
    position[(size_t)broken] = pick({-1, n, INT64_MIN});
    OK(pylora_cuda_rope(g, NULL, &x, &cosines, &sines, position.data(), (int32_t)D, layout, inverse,
                        &y));
    expect_bad_index(true);
    for (int64_t i = 0; i < m; i++) EXPECT(isnan(y.get(i, 0)) == (i == broken));
  }
}

static void errors(void) {
  context = "errors";
  Matrix a(PYLORA_F32, 2, 8, 1), b(PYLORA_F32, 2, 7, 1);
  float w[8] = {0}, rstd[2];
  EXPECT_STATUS(PYLORA_E_NULL,
                pylora_cuda_layer_norm_forward(g, NULL, &a, NULL, NULL, 0, &a, rstd));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_layer_norm_forward(g, NULL, &a, w, NULL, 0, &b, rstd));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_layer_norm_backward(g, NULL, &a, &a, w, NULL, &a, 0));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_activation_forward(g, NULL, 4, &a, NULL, &a));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_activation_forward(g, NULL, -1, &a, NULL, &a));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_activation_forward(g, NULL, 1, &a, &b, &a));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_activation_backward(g, NULL, 1, &a, &a, &a, &a, NULL));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_soft_cap_forward(g, NULL, &a, 1, -1, &a));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_soft_cap_forward(g, NULL, &a, 1, NAN, &a));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_soft_cap_backward(g, NULL, &a, &b, 1, 1, &a));
}

int main(void) {
  g = device_0();
  layer_norm();
  activations();
  caps();
  parts();
  errors();
  return finish("test_features");
}
