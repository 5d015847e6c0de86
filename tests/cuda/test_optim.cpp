/* The optimizer's step on many arrays, sums of squares, Philox and dropout: the latter two bit for bit the CPU core's. */
#include "check_cuda.h"

static pylora_cuda *g;

/* `n` arrays of floats that begin anywhere. */
struct Arrays {
  std::vector<std::vector<float>> memory;
  std::vector<float *> p;
  Arrays(const std::vector<int64_t> &n, float size) {
    for (int64_t k : n) {
      memory.push_back(floats(k + 4, size));
      p.push_back(memory.back().data() + pick({0, 0, 1, 3}));
    }
  }
};

static void adamw(void) {
  for (int64_t count : {0, 1, 3, 57, 130}) {
    std::vector<int64_t> n;
    for (int64_t i = 0; i < count; i++)
      n.push_back(i == 1 ? 9001 : pick({0, 1, 3, 64, 255, 4096, 4100}));
    Arrays param(n, 1), grad(n, 1), m(n, 1e-2f), v(n, 1e-3f);
    for (int64_t i = 0; i < count; i++)
      for (int64_t j = 0; j < n[(size_t)i]; j++) v.p[(size_t)i][j] = fabsf(v.p[(size_t)i][j]);
    Arrays param0 = param, m0 = m, v0 = v;
    std::vector<pylora_cuda_parameter> table;
    pylora_adamw o = {9, 0.9, 0.999, 1e-8, 9, 0.5, pick({1, 7, 100000})};
    context = "adamw, " + std::to_string(count) + " arrays";
    for (int64_t i = 0; i < count; i++) {
      const size_t a = (size_t)i;
      table.push_back({n[a], param.p[a], grad.p[a], m.p[a], v.p[a], 1e-3 * (double)(1 + i % 3),
                       0.1 * (double)(i % 2)});
    }
    OK(pylora_cuda_adamw_step(g, NULL, count, table.data(), &o));
    for (int64_t i = 0; i < count; i++) {
      const size_t a = (size_t)i, k = (size_t)n[a];
      const int64_t shift = param.p[a] - param.memory[a].data(),
                    shift_m = m.p[a] - m.memory[a].data(), shift_v = v.p[a] - v.memory[a].data();
      float *p0 = param0.memory[a].data() + shift, *q0 = m0.memory[a].data() + shift_m,
            *r0 = v0.memory[a].data() + shift_v;
      o.lr = table[a].lr, o.weight_decay = table[a].weight_decay;
      const std::vector<float> before(p0, p0 + k);
      pylora_ref_adamw_step(n[a], p0, grad.p[a], q0, r0, &o);
      std::vector<float> size(k), size_m(k);
      for (size_t j = 0; j < k; j++) {
        const double step = (double)before[j] * (1 - o.lr * o.weight_decay) - p0[j];
        size[j] = (float)(fabs(before[j]) + 2 * fabs(step) + 0.1 * o.lr);
        size_m[j] = fabsf(q0[j]) + 1;
      }
      const std::vector<float> p(param.p[a], param.p[a] + k), q(m.p[a], m.p[a] + k),
          r(v.p[a], v.p[a] + k);
      expect_near("param", p, std::vector<float>(p0, p0 + k), size, 40);
      expect_near("m", q, std::vector<float>(q0, q0 + k), size_m, 5);
      expect_near("v", r, std::vector<float>(r0, r0 + k), size_m, 6);
      /* nothing around it */
      for (size_t j = 0; j < param.memory[a].size(); j++)
        if ((int64_t)j < shift || j >= (size_t)shift + k)
          EXPECT(param.memory[a][j] == param0.memory[a][j], "beside an array");
    }
    pylora_cuda_parameter bad = {1, NULL, NULL, NULL, NULL, 1, 0};
    EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_adamw_step(g, NULL, 1, &bad, &o));
    bad.n = -1;
    EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_adamw_step(g, NULL, 1, &bad, &o));
    bad.n = 0, bad.lr = NAN;
    EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_adamw_step(g, NULL, 1, &bad, &o));
    o.step = 0;
    EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_adamw_step(g, NULL, count, table.data(), &o));
  }
}

static void sum_squares(void) {
  for (int64_t count : {0, 1, 5, 129, 300}) {
    std::vector<int64_t> n;
    for (int64_t i = 0; i < count; i++) n.push_back(i == 1 ? 40000 : pick({0, 1, 255, 2049}));
    Arrays x(n, 1e4f);
    std::vector<const float *> p(x.p.begin(), x.p.end());
    context = "sum_squares, " + std::to_string(count) + " arrays";
    double want = 0, got = NAN;
    for (int64_t i = 0; i < count; i++) want += pylora_ref_sum_squares(n[(size_t)i], p[(size_t)i]);
    const size_t bytes = pylora_cuda_sum_squares_workspace(g, count, n.data());
    std::vector<char> ws(bytes);
    OK(pylora_cuda_sum_squares(g, NULL, count, n.data(), p.data(), &got, ws.data(), bytes));
    EXPECT(fabs(got - want) <= 1e-12 * want, "%.17g, not %.17g", got, want);
    if (count > 1)
      EXPECT_STATUS(PYLORA_E_WORKSPACE, pylora_cuda_sum_squares(g, NULL, count, n.data(), p.data(),
                                                                &got, ws.data(), 200));
  }
}

static void philox(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t n = pick({0, 1, 2, 5, 64, 1000, 5001}),
                  first = pick({0, 1, 2, 3, 4, 1000003, (int64_t)1 << 40});
    const int64_t shift = pick({0, 1, 4});
    const uint64_t seed = bits64(), number = bits64();
    std::vector<uint32_t> got((size_t)(n + shift + 1), 77), want((size_t)(n + 1));
    context = "philox";
    OK(pylora_cuda_philox(g, NULL, seed, number, first, n, got.data() + shift));
    OK(pylora_philox(seed, number, first, n, want.data()));
    EXPECT(memcmp(got.data() + shift, want.data(), (size_t)n * 4) == 0, "words differ");
    EXPECT(got[(size_t)(n + shift)] == 77 && (!shift || got[(size_t)shift - 1] == 77), "beside");
  }
  uint32_t word;
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_philox(g, NULL, 1, 1, -1, 1, &word));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_philox(g, NULL, 1, 1, INT64_MAX, 1, &word));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_philox(g, NULL, 1, 1, 0, -1, &word));
}

static void dropout(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = pick({0, 1, 3, 20}), k = pick({1, 2, 5, 64, 130, 1028});
    const pylora_drop drop = {(float)pick({0, 1, 5, 9}) * 0.1f, bits64(), bits64(),
                              pick({0, 1, 77, (int64_t)1 << 33})};
    Matrix x(any_type(), m, k, 1), y(any_type(), m, k, 1);
    const Matrix xw = x.wide();
    Matrix want = wide_zeros(m, k);
    context = "dropout " + std::to_string(m) + " x " + std::to_string(k);
    OK(pylora_cuda_dropout(g, NULL, &x, &drop, &y));
    OK(pylora_dropout(&xw, &drop, &want));
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < k; j++) {
        uint32_t word = 0;
        put_value(y.dtype, &word, 0, want.get(i, j));
        EXPECT(memcmp(&word, y.at(i, j), y.size()) == 0, "[%d,%d]", (int)i, (int)j);
      }
    if (x.dtype != y.dtype) continue;
    OK(pylora_cuda_dropout(g, NULL, &x, &drop, &x));
    expect_same("y in x", x, y);
  }
  Matrix x(PYLORA_F32, 2, 3, 1);
  for (float p : {-0.1f, 1.0f, NAN}) {
    const pylora_drop drop = {p, 0, 0, 0};
    EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_dropout(g, NULL, &x, &drop, &x));
  }
  const pylora_drop far = {0.5f, 0, 0, INT64_MAX / 3};
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_dropout(g, NULL, &x, &far, &x));
}

int main(void) {
  g = device_0();
  adamw();
  sum_squares();
  philox();
  dropout();
  return finish("test_optim");
}
