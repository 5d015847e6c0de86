/* Operations on rows: cast, gather, scatter, embedding, RMSNorm, rotary embedding, SwiGLU; each type for each matrix,
 * against the reference, in place where that is allowed, with indices out of range. */
#include "check_cuda.h"

static pylora_cuda *g;

/* Is `got` the value x rounded to its type? */
static bool is_rounded(const Matrix &got, int64_t i, int64_t j, float x) {
  uint32_t word = 0;
  put_value(got.dtype, &word, 0, x);
  return memcmp(got.at(i, j), &word, got.size()) == 0;
}
static bool is_nan_row(const Matrix &a, int64_t i) {
  for (int64_t j = 0; j < a.cols; j++)
    if (!isnan(a.get(i, j))) return false;
  return true;
}

static void copies(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = pick({0, 1, 3, 40}), n = pick({1, 5, 33}), k = pick({1, 4, 7, 64, 200, 1028});
    Matrix x(any_type(), n, k, 2), y(any_type(), m, k, 1), z(any_type(), n, k, 1);
    OK(pylora_cuda_cast(g, NULL, &x, &z));
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k; j++) EXPECT(is_rounded(z, i, j, x.get(i, j)), "cast");

    std::vector<int64_t> row = ids_below(m, n);
    const bool broken = m && below(3) == 0;
    if (broken) row[(size_t)below(m)] = pick({-1, n, INT64_MIN, INT64_MAX});
    OK(pylora_cuda_gather_rows(g, NULL, &x, row.data(), &y));
    expect_bad_index(broken);
    for (int64_t i = 0; i < m; i++) {
      const int64_t from = row[(size_t)i];
      if (from < 0 || from >= n)
        EXPECT(is_nan_row(y, i));
      else
        for (int64_t j = 0; j < k; j++) EXPECT(is_rounded(y, i, j, x.get(from, j)), "gather");
    }
    /* scatter m rows into n: each to a row of its own */
    const int64_t some = m < n ? m : n;
    std::vector<int64_t> to((size_t)some);
    for (int64_t i = 0; i < some; i++) to[(size_t)i] = (i + 1) % n;
    if (some) to[0] = broken ? pick({-1, n}) : to[0];
    Matrix part(any_type(), some, k, 1), cache(any_type(), n, k, 1);
    const Matrix before = cache.copy();
    OK(pylora_cuda_scatter_rows(g, NULL, &part, to.data(), &cache));
    expect_bad_index(broken && some);
    std::vector<bool> written((size_t)n);
    for (int64_t i = 0; i < some; i++) {
      if (to[(size_t)i] < 0 || to[(size_t)i] >= n) continue;
      written[(size_t)to[(size_t)i]] = true;
      for (int64_t j = 0; j < k; j++)
        EXPECT(is_rounded(cache, to[(size_t)i], j, part.get(i, j)), "scatter");
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < k && !written[(size_t)i]; j++)
        EXPECT(is_rounded(cache, i, j, before.get(i, j)), "a row that no index names");
  }
}

static void embedding(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = pick({0, 1, 40, 600}), vocab = pick({1, 5, 70}),
                  k = pick({1, 8, 65, 600, 2052});
    const int type = any_type();
    Matrix table(type, vocab, k, 1), y(any_type(), m, k, 1);
    std::vector<char> data((size_t)(vocab * k) * 4 + 16);
    for (int64_t i = 0; i < vocab; i++)
      for (int64_t j = 0; j < k; j++) put_value(type, data.data(), i * k + j, table.get(i, j));
    const pylora_packed W = {0x504c4731u, type, vocab, k,
                             data.data()}; /* as pylora_cuda_pack makes it */
    std::vector<int64_t> ids = ids_below(m, vocab);
    const bool broken = m && below(3) == 0;
    if (broken) ids[(size_t)below(m)] = pick({-1, vocab});
    OK(pylora_cuda_embedding_forward(g, NULL, ids.data(), m, &W, &y));
    expect_bad_index(broken);
    for (int64_t i = 0; i < m; i++) {
      const int64_t id = ids[(size_t)i];
      if (id < 0 || id >= vocab)
        EXPECT(is_nan_row(y, i));
      else
        for (int64_t j = 0; j < k; j++) EXPECT(is_rounded(y, i, j, table.get(id, j)));
    }
    /* backward: float32 sums in the order of i, so to the bit */
    Matrix dy(any_type(), m, k, 1), dW(PYLORA_F32, vocab, k, 1);
    OK(pylora_cuda_embedding_backward(g, NULL, ids.data(), &dy, &dW));
    expect_bad_index(broken);
    std::vector<int64_t> fine;
    Matrix wide(PYLORA_F32, m, k, 0), want(PYLORA_F32, vocab, k, 0);
    for (int64_t i = 0; i < m; i++) {
      const int64_t id = ids[(size_t)i];
      fine.push_back(id < 0 || id >= vocab ? 0 : id);
      for (int64_t j = 0; j < k; j++) wide.put(i, j, fine.back() == id ? dy.get(i, j) : 0);
    }
    pylora_ref_embedding_backward(fine.data(), &wide, &want);
    expect_same("dW", dW, want);
  }
  pylora_packed cpu = {};
  Matrix y(PYLORA_F32, 1, 4, 1);
  const int64_t id = 0;
  cpu.magic = 0x504c3031u, cpu.d = 1, cpu.k = 4;
  EXPECT_STATUS(PYLORA_E_PACKED, pylora_cuda_embedding_forward(g, NULL, &id, 1, &cpu, &y));
}

static void rms_norm(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = pick({0, 1, 3, 70}), k = pick({1, 2, 15, 64, 128, 300, 516, 2052, 4100});
    const float eps = 1e-5f;
    Matrix x(any_type(), m, k, (float)pick({1, 30})), dy(any_type(), m, k, 1),
        y(any_type(), m, k, 0);
    const Matrix xw = x.wide(), dyw = dy.wide();
    Matrix want = wide_zeros(m, k);
    const std::vector<float> w = floats(k, 1);
    std::vector<float> rstd((size_t)m), rstd0((size_t)m);
    context = "rms_norm " + std::to_string(m) + " x " + std::to_string(k);
    OK(pylora_cuda_rms_norm_forward(g, NULL, &x, w.data(), eps, &y, rstd.data()));
    pylora_ref_rms_norm_forward(&xw, w.data(), eps, &want, rstd0.data());
    expect_near("y", y, want, want, (double)k / 2 + 7);
    expect_near("rstd", rstd, rstd0, rstd0, (double)k / 2 + 5);
    if (x.dtype == y.dtype) {
      OK(pylora_cuda_rms_norm_forward(g, NULL, &x, w.data(), eps, &x, rstd.data()));
      expect_same("y in x", x, y);
      x.copy_from(xw);
    }
    /* backward */
    const int add = (int)below(2);
    Matrix dx(any_type(), m, k, 1), want_dx = dx.wide(), magnitude = dx.wide();
    std::vector<float> dw((size_t)k, 7), dw0((size_t)k), dw_size((size_t)k);
    for (int64_t i = 0; i < m; i++) {
      double mean = 0, r = rstd0[(size_t)i];
      for (int64_t j = 0; j < k; j++)
        mean += fabs((double)dy.get(i, j) * w[(size_t)j] * x.get(i, j)) / (double)k;
      for (int64_t j = 0; j < k; j++) {
        const double a = fabs(x.get(i, j)), d = fabs(dy.get(i, j));
        magnitude.put(i, j,
                      (float)(fabs(magnitude.get(i, j)) +
                              1.01 * r * (d * fabs(w[(size_t)j]) + a * r * r * mean)));
        dw_size[(size_t)j] += (float)(1.01 * d * a * r);
      }
    }
    const size_t bytes = pylora_cuda_rms_norm_workspace(g, m, k);
    std::vector<char> ws(bytes);
    OK(pylora_cuda_rms_norm_backward(g, NULL, &dy, &x, w.data(), rstd0.data(), &dx, add, dw.data(),
                                     ws.data(), bytes));
    pylora_ref_rms_norm_backward(&dyw, &xw, w.data(), rstd0.data(), &want_dx, add, dw0.data());
    expect_near("dx", dx, want_dx, magnitude, (double)k + 9);
    expect_near("dw", dw, dw0, dw_size, (double)m + 4);
    Matrix plain(dy.dtype, m, k, 0), same = dy.copy();
    OK(pylora_cuda_rms_norm_backward(g, NULL, &dy, &x, w.data(), rstd0.data(), &plain, 0, NULL,
                                     NULL, 0));
    std::vector<float> dw2((size_t)k);
    OK(pylora_cuda_rms_norm_backward(g, NULL, &same, &x, w.data(), rstd0.data(), &same, 0,
                                     dw2.data(), ws.data(), bytes));
    expect_same("dx in dy", same, plain);
    EXPECT(dw == dw2, "dw is disturbed by dx in dy");
    if (m)
      EXPECT_STATUS(PYLORA_E_WORKSPACE,
                    pylora_cuda_rms_norm_backward(g, NULL, &dy, &x, w.data(), rstd0.data(), &dx, 0,
                                                  dw.data(), ws.data(), 255));
  }
}

static void rope(void) {
  for (int c = 0; c < 40; c++) {
    const int64_t m = pick({0, 1, 9}), D = pick({2, 4, 6, 32, 34, 64}), heads = pick({1, 3, 40}),
                  n = 12;
    Matrix x(any_type(), m, heads * D, 1), y(x.dtype, m, heads * D, 0),
        other(any_type(), m, heads * D, 0), magnitude(PYLORA_F32, m, heads * D, 0),
        want = wide_zeros(m, heads * D), cosines(PYLORA_F32, n, D / 2, 0),
        sines(PYLORA_F32, n, D / 2, 0);
    const Matrix xw = x.wide();
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < D / 2; j++) {
        const double angle = 100 * (double)uniform();
        cosines.put(i, j, (float)cos(angle)), sines.put(i, j, (float)sin(angle));
      }
    magnitude.fill(2);
    std::vector<int64_t> position = ids_below(m, n);
    context = "rope " + std::to_string(heads) + " x " + std::to_string(D);
    for (int layout = 0; layout < 2; layout++)
      for (int inverse = 0; inverse < 2; inverse++) {
        const int32_t dim = (int32_t)D;
        OK(pylora_cuda_rope(g, NULL, &x, &cosines, &sines, position.data(), dim, layout, inverse,
                            &y));
        OK(pylora_cuda_rope(g, NULL, &x, &cosines, &sines, position.data(), dim, layout, inverse,
                            &other));
        pylora_ref_rope(&xw, &cosines, &sines, position.data(), dim, layout, inverse, &want);
        expect_near("y", y, want, magnitude, 2);
        expect_near("y of another type", other, want, magnitude, 2);
        Matrix same = x.copy();
        OK(pylora_cuda_rope(g, NULL, &same, &cosines, &sines, position.data(), dim, layout, inverse,
                            &same));
        expect_same("y in x", same, y);
      }
    expect_bad_index(false);
    if (!m) continue;
    const int64_t broken = below(m);
    position[(size_t)broken] = pick({-1, n, INT64_MIN});
    for (int layout = 0; layout < 2; layout++) {
      OK(pylora_cuda_rope(g, NULL, &x, &cosines, &sines, position.data(), (int32_t)D, layout, 0,
                          &y));
      expect_bad_index(true);
      for (int64_t i = 0; i < m; i++) EXPECT(is_nan_row(y, i) == (i == broken));
    }
  }
  Matrix x(PYLORA_F32, 1, 6, 1), table(PYLORA_F32, 1, 2, 1);
  const int64_t position = 0;
  EXPECT_STATUS(PYLORA_E_SHAPE,
                pylora_cuda_rope(g, NULL, &x, &table, &table, &position, 4, 0, 0, &x));
  EXPECT_STATUS(PYLORA_E_SHAPE,
                pylora_cuda_rope(g, NULL, &x, &table, &table, &position, 3, 0, 0, &x));
  EXPECT_STATUS(PYLORA_E_SHAPE, /* narrower than the tables */
                pylora_cuda_rope(g, NULL, &x, &table, &table, &position, 2, 0, 0, &x));
  EXPECT_STATUS(PYLORA_E_VALUE,
                pylora_cuda_rope(g, NULL, &x, &table, &table, &position, 6, 2, 0, &x));
}

static void swiglu(void) {
  for (int c = 0; c < 40; c++) {
    const int64_t m = pick({0, 1, 7}), n = pick({1, 4, 15, 64, 200, 1300});
    const float size = (float)pick({1, 10, 95, 200});
    Matrix gate(any_type(), m, n, size), up(any_type(), m, n, 1), dy(any_type(), m, n, 1),
        y(any_type(), m, n, 0), dg(gate.dtype, m, n, 0), du(up.dtype, m, n, 0);
    const Matrix gw = gate.wide(), uw = up.wide(), dyw = dy.wide();
    Matrix y0 = wide_zeros(m, n), dg0 = wide_zeros(m, n), du0 = wide_zeros(m, n),
           magnitude = wide_zeros(m, n);
    context = "swiglu " + std::to_string(m) + " x " + std::to_string(n);
    OK(pylora_cuda_swiglu_forward(g, NULL, &gate, &up, &y));
    OK(pylora_cuda_swiglu_backward(g, NULL, &dy, &gate, &up, &dg, &du));
    pylora_ref_swiglu_forward(&gw, &uw, &y0);
    pylora_ref_swiglu_backward(&dyw, &gw, &uw, &dg0, &du0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) { /* 1 + gate (1 - σ) cancels */
        const double a = gate.get(i, j), s = 1 / (1 + exp(-a));
        magnitude.put(
            i, j, (float)(fabs(dy.get(i, j) * up.get(i, j)) * s * (1 + fabs(a) / (1 + exp(a)))));
      }
    expect_near("y", y, y0, y0, EXP + 5);
    expect_near("dgate", dg, dg0, magnitude, 2 * EXP + 11);
    expect_near("dup", du, du0, du0, EXP + 5);
    Matrix a = gate.copy(), b = up.copy();
    OK(pylora_cuda_swiglu_backward(g, NULL, &dy, &a, &b, &a, &b));
    expect_same("dgate in gate", a, dg);
    expect_same("dup in up", b, du);
    if (y.dtype != gate.dtype || y.dtype != up.dtype) continue;
    Matrix in_gate = gate.copy(), in_up = up.copy();
    OK(pylora_cuda_swiglu_forward(g, NULL, &in_gate, &up, &in_gate));
    OK(pylora_cuda_swiglu_forward(g, NULL, &gate, &in_up, &in_up));
    expect_same("y in gate", in_gate, y);
    expect_same("y in up", in_up, y);
  }
}

/* The same for every operation: matrices that are not there, or not of one shape. */
static void errors(void) {
  context = "errors";
  Matrix a(PYLORA_F32, 2, 8, 1), b(PYLORA_F32, 2, 7, 1);
  pylora_mat two = a.mat, overlapping = a.mat, nothing = a.mat;
  two.b = (uint16_t *)a.mat.p;
  overlapping.ld = 3;
  nothing.p = NULL;
  float rstd[2];
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_cast(NULL, NULL, &a, &a));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_cast(g, NULL, &nothing, &a));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_cast(g, NULL, &a, &b));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_cast(g, NULL, &two, &a));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_cast(g, NULL, &a, &overlapping));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_gather_rows(g, NULL, &a, NULL, &a));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_scatter_rows(g, NULL, &a, NULL, &a));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_rms_norm_forward(g, NULL, &a, NULL, 0, &a, rstd));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_swiglu_forward(g, NULL, &a, &b, &a));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_embedding_backward(g, NULL, NULL, &a, &b));
}

int main(void) {
  g = device_0();
  copies();
  embedding();
  rms_norm();
  rope();
  swiglu();
  errors();
  return finish("test_rows");
}
