/* LoRA linears on the device: n projections of one x, segments, ranks above min(d, k), few and many rows, every type,
 * dropout, awkward strides, beside csrc/reference.c; and what has to be equal bit for bit. */
#include "check_cuda.h"

#include <algorithm>

#include "host.h"

static pylora_packed packed(const Matrix &W, std::vector<char> *buffer) {
  pylora_packed P = {};
  buffer->resize(pylora_cuda_pack_bytes(W.dtype, W.rows, W.cols) + 256);
  char *at = (char *)(((uintptr_t)buffer->data() + 255) & ~(uintptr_t)255);
  OK(pylora_cuda_pack(device_0(), NULL, W.dtype, &W, at, &P));
  return P;
}
static Matrix magnitudes(const Matrix &a) {
  Matrix b = wide_zeros(a.rows, a.cols);
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < a.cols; j++) b.put(i, j, fabsf(a.get(i, j)));
  return b;
}
/* |got - want| <= share of the magnitudes of what is summed, and got's own rounding. */
static void expect_within(const char *what, const Matrix &got, const Matrix &want,
                          const Matrix &size, double share) {
  for (int64_t i = 0; i < got.rows; i++)
    for (int64_t j = 0; j < got.cols; j++) {
      const double g = got.get(i, j), w = want.get(i, j);
      const double error = share * size.get(i, j) + 1e-30;
      const double bound =
          error + roundoff(got.dtype) * 1.001 * (fabs(w) + error) + least(got.dtype);
      EXPECT(fabs(g - w) <= bound, "%s[%d,%d] %.9g, not %.9g: off %.3g, allowed %.3g", what, (int)i,
             (int)j, g, w, fabs(g - w), bound);
    }
}

struct Workspace {
  std::vector<char> memory;
  size_t bytes;
  Workspace(int64_t m, int64_t n, int64_t d, int64_t k, int64_t r, int64_t segments) {
    bytes = pylora_cuda_linear_workspace(device_0(), m, n, d, k, r, segments);
    EXPECT(bytes > 0, "no size for the workspace");
    memory.resize(bytes);
  }
  void *at() { return memory.data(); }
};

/* One projection with an adapter for each segment. */
struct Projection {
  int64_t d, k, r;
  Matrix W, y, residual;
  std::vector<char> buffer;
  pylora_packed P;
  std::vector<float> bias;
  std::vector<Matrix> A, B;
  std::vector<pylora_lora> lora;
  std::vector<const pylora_lora *> at;
  Matrix h;
  bool has_bias, has_residual, in_place;
  pylora_drop drop;

  Projection(int T, int ytype, int64_t m, int64_t d_, int64_t k_, const std::vector<int64_t> &ranks,
             bool dropout)
      : d(d_), k(k_), r(*std::max_element(ranks.begin(), ranks.end())), W(T, d_, k_, 1),
        y(ytype, m, d_, 1), residual(PYLORA_F32, m, d_, 1), bias(floats(d_, 1)),
        h(PYLORA_F32, m, ranks.size() == 1 && below(2) ? r : 0, 1) {
    P = packed(W, &buffer);
    has_bias = below(2), has_residual = below(2);
    in_place = has_residual && ytype == PYLORA_F32 && below(2);
    drop = {dropout ? 0.3f : 0.0f, bits64(), bits64(), below(1000)};
    A.reserve(ranks.size()), B.reserve(ranks.size()), lora.reserve(ranks.size());
    for (int64_t q : ranks) {
      A.emplace_back(PYLORA_F32, q, k, 1.0f);
      B.emplace_back(PYLORA_F32, d, q, 1.0f);
    }
    for (size_t s = 0; s < ranks.size(); s++) {
      lora.push_back(
          {ranks[s], A[s].mat.p, A[s].ld, B[s].mat.p, B[s].ld, 0.5f, dropout ? &drop : NULL, NULL});
      at.push_back(ranks[s] || below(2) ? &lora[s] : NULL);
    }
  }
  pylora_linear linear(void) {
    if (in_place) y.copy_from(residual);
    return {&P,
            has_bias ? bias.data() : NULL,
            r || below(2) ? at.data() : NULL,
            has_residual ? (in_place ? &y.mat : &residual.mat) : NULL,
            &y.mat,
            h.cols ? &h.mat : NULL,
            NULL};
  }
};

/* What rounding the factors to T moves a product of two of them by, beside float32 sums of `terms`. */
static double share(int T, double terms) {
  return (T == PYLORA_F32 ? 0 : 2.02 * roundoff(T)) + 4 * (terms + 8) * 0x1p-24;
}

static int other_than(int type) { return type == PYLORA_BF16 ? (int)PYLORA_F16 : (int)PYLORA_BF16; }
static bool wide_outputs;
static int64_t outputs(void) { return wide_outputs ? 290 : pick({1, 3, 16, 40, 130}); }

static void forward_case(int T, int xtype, int64_t m, int64_t n, int64_t k, int64_t segments,
                         bool dropout) {
  std::vector<int64_t> start(1, 0);
  for (int64_t s = 1; s < segments; s++) start.push_back(below(m + 1));
  start.push_back(m);
  std::sort(start.begin(), start.end());
  Matrix x(xtype, m, k, 1);
  std::vector<Projection> p;
  p.reserve((size_t)n);
  std::vector<pylora_linear> l;
  int64_t all = 0, ranks = 0;
  for (int64_t i = 0; i < n; i++) {
    std::vector<int64_t> r;
    for (int64_t s = 0; s < segments; s++) r.push_back(pick({0, 1, 4, 7, 8, 16, 30, 70}));
    p.emplace_back(T, below(2) ? (int)PYLORA_F32 : any_type(), m, outputs(), k, r, dropout);
    l.push_back(p.back().linear());
    all += p.back().d, ranks += p.back().r;
  }
  Workspace ws(m, n, all, k, ranks, segments);
  OK(pylora_cuda_linear_forward(device_0(), NULL, &x, n, l.data(), segments,
                                segments > 1 ? start.data() : NULL, ws.at(), ws.bytes));
  const Matrix wide = x.wide(), big = magnitudes(wide);
  for (Projection &q : p) {
    const Matrix W = q.W.wide(), bigW = magnitudes(W);
    std::vector<float> big_bias = q.bias;
    for (float &f : big_bias) f = fabsf(f);
    const Matrix big_residual = magnitudes(q.residual);
    Matrix want = wide_zeros(m, q.d), size = wide_zeros(m, q.d), h = wide_zeros(m, q.r),
           size_h = wide_zeros(m, q.r);
    for (int64_t s = 0; s < segments; s++) {
      const int64_t a = start[(size_t)s], rows = start[(size_t)s + 1] - a, r = q.lora[(size_t)s].r;
      const auto piece = [&](const Matrix &M, int64_t cols) {
        pylora_mat v = M.mat;
        v.rows = rows, v.cols = cols;
        if (v.p) v.p += a * v.ld;
        return v;
      };
      pylora_lora lora = q.lora[(size_t)s], bigs = lora;
      const Matrix A = magnitudes(q.A[(size_t)s]), B = magnitudes(q.B[(size_t)s]);
      bigs.A = A.mat.p, bigs.lda = A.ld, bigs.B = B.mat.p, bigs.ldb = B.ld;
      const pylora_mat xs = piece(wide, k), bs = piece(big, k), ys = piece(want, q.d),
                       ss = piece(size, q.d), hs = piece(h, r), shs = piece(size_h, r),
                       res = piece(q.residual, q.d), bres = piece(big_residual, q.d);
      pylora_ref_lora_forward(&xs, &W, q.has_bias ? q.bias.data() : NULL, r ? &lora : NULL,
                              q.has_residual ? &res : NULL, &ys, &hs);
      pylora_ref_lora_forward(&bs, &bigW, q.has_bias ? big_bias.data() : NULL, r ? &bigs : NULL,
                              q.has_residual ? &bres : NULL, &ss, &shs);
    }
    expect_within("y", q.y, want, size, share(T, (double)(k + q.r)));
    if (q.h.cols) expect_within("h", q.h, h, size_h, share(T, (double)k));
  }
}

static void forward(void) {
  for (int i = 0; i < 60; i++) {
    const int T = any_type(), xtype = below(2) ? T : any_type();
    const int64_t m = pick({1, 2, 9, 16, 17, 33, 140}), k = pick({0, 1, 5, 8, 64, 96, 300});
    const int64_t segments = below(2) ? 1 : pick({2, 5, 12});
    const bool dropout = segments == 1 && below(3) == 0;
    context = "forward, type " + std::to_string(T) + " x " + std::to_string(xtype) + ", m " +
              std::to_string(m) + ", k " + std::to_string(k) + ", segments " +
              std::to_string(segments) + (dropout ? ", dropout" : "");
    forward_case(T, xtype, m, 1 + below(3), k, segments, dropout);
  }
}

/* ---- backward ---- */

static void backward_case(int T, int64_t m, int64_t n, int64_t k, bool dropout) {
  const int xtype = below(2) ? T : any_type();
  Matrix x(xtype, m, k, 1);
  std::vector<Projection> p;
  std::vector<Matrix> dy, h, dA, dB;
  p.reserve((size_t)n), dy.reserve((size_t)n), h.reserve((size_t)n), dA.reserve((size_t)n),
      dB.reserve((size_t)n);
  std::vector<pylora_linear_grad> l;
  int64_t all = 0, ranks = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t r = pick({0, 1, 5, 8, 16, 36, 70});
    p.emplace_back(T, (int)PYLORA_F32, m, wide_outputs || below(8) ? outputs() : 0, k,
                   std::vector<int64_t>{r}, dropout);
    const Projection &q = p.back();
    dy.emplace_back(wide_outputs && i == 0 ? other_than(T)
                    : below(2)             ? T
                                           : any_type(),
                    m, q.d, 1.0f);
    h.emplace_back(PYLORA_F32, m, r, 1.0f);
    dA.emplace_back(PYLORA_F32, r, k, 1.0f);
    dB.emplace_back(PYLORA_F32, q.d, r, 1.0f);
    l.push_back({&q.P, &q.lora[0], &dy.back().mat, &h.back().mat, below(4) ? &dA.back().mat : NULL,
                 below(4) ? &dB.back().mat : NULL});
    all += q.d, ranks += r;
  }
  const bool add = below(2), with_dx = wide_outputs || below(4);
  Matrix dx(add ? (int)PYLORA_F32 : any_type(), m, k, 1);
  const Matrix before = dx.wide();
  Workspace ws(m, n, all, k, ranks, 1);
  OK(pylora_cuda_linear_backward(device_0(), NULL, &x, n, l.data(), with_dx ? &dx.mat : NULL, add,
                                 ws.at(), ws.bytes));
  const Matrix wide = x.wide(), big = magnitudes(wide);
  Matrix want = wide_zeros(m, k), size = wide_zeros(m, k);
  if (add) want.copy_from(before), size.copy_from(magnitudes(before));
  for (int64_t i = 0; i < n; i++) {
    Projection &q = p[(size_t)i];
    const int64_t r = q.r;
    const Matrix W = q.W.wide(), bigW = magnitudes(W), D = dy[(size_t)i].wide(),
                 bigD = magnitudes(D), H = magnitudes(h[(size_t)i]), A = magnitudes(q.A[0]),
                 B = magnitudes(q.B[0]);
    pylora_lora bigs = q.lora[0];
    bigs.A = A.mat.p, bigs.lda = A.ld, bigs.B = B.mat.p, bigs.ldb = B.ld;
    const Matrix wantA = wide_zeros(r, k), sizeA = wide_zeros(r, k), wantB = wide_zeros(q.d, r),
                 sizeB = wide_zeros(q.d, r);
    pylora_ref_lora_backward(&D, &wide, &h[(size_t)i], &W, r ? &q.lora[0] : NULL,
                             with_dx ? &want : NULL, 1, l[(size_t)i].dA ? &wantA : NULL,
                             l[(size_t)i].dB ? &wantB : NULL);
    pylora_ref_lora_backward(&bigD, &big, &H, &bigW, r ? &bigs : NULL, with_dx ? &size : NULL, 1,
                             &sizeA, &sizeB);
    /* Without dx it is dy's type that says what B is rounded to. */
    const int G = with_dx ? T : dy[(size_t)i].dtype;
    if (l[(size_t)i].dA)
      expect_within("dA", dA[(size_t)i], wantA, sizeA, share(G, (double)(m + q.d)));
    if (l[(size_t)i].dB)
      expect_within("dB", dB[(size_t)i], wantB, sizeB, share(PYLORA_F32, (double)m));
  }
  if (with_dx) expect_within("dx", dx, want, size, share(T, (double)(all + ranks)));
}

/* With next to no L2 products are cut into many tiles, and a factor is cast some rows at a time. */
static void tiles(void) {
  const int64_t l2 = device_0()->l2_bytes;
  device_0()->l2_bytes = 1;
  for (int i = 0; i < 3; i++) {
    const int T = i < 2 ? (int)PYLORA_F32 : any_type();
    const int64_t m = i == 0 ? 700 : 200, k = 270;
    context = "tiles, type " + std::to_string(T);
    wide_outputs = true;
    forward_case(T, T == PYLORA_F32 ? (int)PYLORA_BF16 : any_type(), m, 2, k, i % 2 ? 3 : 1, false);
    backward_case(T, m, 2, k, i % 2);
    wide_outputs = false;
  }
  device_0()->l2_bytes = l2;
}

/* More adapters than fit the arguments of one kernel. */
static void many_adapters(void) {
  context = "many adapters";
  forward_case(PYLORA_BF16, PYLORA_BF16, 150, 3, 40, 50, false);
  forward_case(PYLORA_F32, PYLORA_F32, 150, 10, 9, 1, false);
  forward_case(PYLORA_F32, PYLORA_F32, 3, 10, 9, 1, false);
  backward_case(PYLORA_BF16, 70, 7, 40, false);
}

static void backward(void) {
  for (int i = 0; i < 60; i++) {
    const int T = any_type();
    const int64_t m = pick({0, 1, 2, 16, 17, 33, 200}), k = pick({0, 1, 5, 8, 64, 96, 300});
    const bool dropout = below(3) == 0;
    context = "backward, type " + std::to_string(T) + ", m " + std::to_string(m) + ", k " +
              std::to_string(k) + (dropout ? ", dropout" : "");
    backward_case(T, m, 1 + below(3), k, dropout);
  }
}

/* ---- the same bits ---- */

/* B = 0 is the base model, also where h is not finite; and dx is that of the base. */
static void zero_adapter(void) {
  for (int i = 0; i < 24; i++) {
    const int T = any_type(), ytype = below(2) ? (int)PYLORA_F32 : any_type();
    const int64_t m = pick({1, 16, 17, 150}), k = pick({8, 33, 256}), d = pick({5, 64, 70});
    context = "zero adapter, type " + std::to_string(T) + ", m " + std::to_string(m);
    Matrix x(T, m, k, 1), A(PYLORA_F32, 9, k, 1), B(PYLORA_F32, d, 9, 0), W(T, d, k, 1);
    if (below(2)) A.put(3, 2, INFINITY), A.put(4, k - 1, NAN);
    Matrix y(ytype, m, d, 0), base = y.copy(), dy(T, m, d, 1),
                              dx(below(2) ? T : (int)PYLORA_F32, m, k, 0), dx0 = dx.copy();
    B.fill(below(2) ? 0.0f : -0.0f);
    std::vector<char> buffer;
    const pylora_packed P = packed(W, &buffer);
    const std::vector<float> bias = floats(d, 1);
    const pylora_lora lora = {9, A.mat.p, A.ld, B.mat.p, B.ld, 2, NULL, NULL}, *at = &lora;
    const float *some = below(2) ? bias.data() : NULL;
    const pylora_linear with = {&P, some, &at, NULL, &y.mat, NULL, NULL},
                        without = {&P, some, NULL, NULL, &base.mat, NULL, NULL};
    Workspace ws(m, 1, d, k, 9, 1);
    OK(pylora_cuda_linear_forward(device_0(), NULL, &x, 1, &with, 1, NULL, ws.at(), ws.bytes));
    OK(pylora_cuda_linear_forward(device_0(), NULL, &x, 1, &without, 1, NULL, ws.at(), ws.bytes));
    for (int64_t r = 0; r < m; r++)
      for (int64_t c = 0; c < d; c++)
        EXPECT(memcmp(y.at(r, c), base.at(r, c), y.size()) == 0, "y[%d,%d] is not the base's",
               (int)r, (int)c);
    const pylora_linear_grad g = {&P, &lora, &dy.mat, NULL, NULL, NULL},
                             g0 = {&P, NULL, &dy.mat, NULL, NULL, NULL};
    OK(pylora_cuda_linear_backward(device_0(), NULL, NULL, 1, &g, &dx, 0, ws.at(), ws.bytes));
    OK(pylora_cuda_linear_backward(device_0(), NULL, NULL, 1, &g0, &dx0, 0, ws.at(), ws.bytes));
    expect_same("dx of a zero adapter", dx, dx0);
  }
}

/* Up to 16 rows: a row of a mixed batch has the bits that it has alone. */
static void mixed_rows(void) {
  for (int i = 0; i < 12; i++) {
    const int T = any_type();
    const int64_t m = 2 + below(15), k = pick({40, 128, 700}), d = pick({16, 50});
    context = "mixed rows, type " + std::to_string(T);
    Matrix x(below(2) ? T : (int)PYLORA_F32, m, k, 1), W(T, d, k, 1), y(PYLORA_F32, m, d, 0);
    std::vector<char> buffer;
    const pylora_packed P = packed(W, &buffer);
    std::vector<Matrix> A, B;
    A.reserve((size_t)m), B.reserve((size_t)m);
    std::vector<pylora_lora> lora((size_t)m);
    std::vector<const pylora_lora *> at((size_t)m);
    std::vector<int64_t> start;
    for (int64_t s = 0; s < m; s++) {
      const int64_t r = pick({1, 8, 40});
      A.emplace_back(PYLORA_F32, r, k, 1.0f), B.emplace_back(PYLORA_F32, d, r, 1.0f);
      lora[(size_t)s] = {r, A.back().mat.p, A.back().ld, B.back().mat.p, B.back().ld,
                         2, NULL,           NULL};
      at[(size_t)s] = below(4) ? &lora[(size_t)s] : NULL;
      start.push_back(s);
    }
    start.push_back(m);
    Workspace ws(m, 1, d, k, 40, m);
    const pylora_linear all = {&P, NULL, at.data(), NULL, &y.mat, NULL, NULL};
    OK(pylora_cuda_linear_forward(device_0(), NULL, &x, 1, &all, m, start.data(), ws.at(),
                                  ws.bytes));
    for (int64_t s = 0; s < m; s++) {
      Matrix alone(PYLORA_F32, 1, d, 0);
      pylora_mat row = x.mat;
      row.rows = 1;
      if (row.p) row.p += s * row.ld;
      if (row.b) row.b += s * row.ld;
      if (row.h) row.h += s * row.ld;
      const pylora_linear one = {&P, NULL, &at[(size_t)s], NULL, &alone.mat, NULL, NULL};
      OK(pylora_cuda_linear_forward(device_0(), NULL, &row, 1, &one, 1, NULL, ws.at(), ws.bytes));
      EXPECT(memcmp(alone.at(0, 0), y.at(s, 0), (size_t)d * sizeof(float)) == 0,
             "row %d has other bits alone", (int)s);
    }
  }
}

/* ---- bad input ---- */

static void errors(void) {
  context = "errors";
  pylora_cuda *g = device_0();
  const int64_t m = 20, k = 8, d = 4, r = 2;
  Matrix x(PYLORA_F32, m, k, 1), W(PYLORA_F32, d, k, 1), A(PYLORA_F32, r, k, 1),
      B(PYLORA_F32, d, r, 1), y(PYLORA_F32, m, d, 0), h(PYLORA_F32, m, r, 0),
      dx(PYLORA_BF16, m, k, 0);
  std::vector<char> buffer;
  pylora_packed P = packed(W, &buffer);
  pylora_drop drop = {0.5f, 1, 2, 0};
  pylora_lora lora = {r, A.mat.p, A.ld, B.mat.p, B.ld, 1, NULL, NULL};
  const pylora_lora *at[2] = {&lora, &lora};
  pylora_linear l = {&P, NULL, at, NULL, &y.mat, NULL, NULL};
  Workspace ws(m, 1, d, k, r, 2);
  int64_t start[3] = {0, 5, m};
  const auto forward_is = [&](int wanted, int64_t segments, const int64_t *starts) {
    EXPECT_STATUS(wanted, pylora_cuda_linear_forward(g, NULL, &x, 1, &l, segments, starts, ws.at(),
                                                     ws.bytes));
  };
  forward_is(PYLORA_OK, 1, NULL);
  forward_is(PYLORA_OK, 2, start);
  forward_is(PYLORA_E_SHAPE, 2, NULL);
  start[1] = m + 1;
  forward_is(PYLORA_E_SHAPE, 2, start);
  start[1] = -1;
  forward_is(PYLORA_E_SHAPE, 2, start);
  start[1] = 5;
  lora.drop = &drop;
  forward_is(PYLORA_OK, 1, NULL);
  forward_is(PYLORA_E_VALUE, 2, start);
  drop.p = 1;
  forward_is(PYLORA_E_VALUE, 1, NULL);
  lora.drop = NULL;
  lora.A = NULL;
  forward_is(PYLORA_E_NULL, 1, NULL);
  lora.A = A.mat.p;
  lora.r = -1;
  forward_is(PYLORA_E_SHAPE, 1, NULL);
  lora.r = r;
  l.h = &h.mat;
  forward_is(PYLORA_OK, 1, NULL);
  forward_is(PYLORA_E_VALUE, 2, start);
  l.h = NULL;
  P.magic = 0;
  forward_is(PYLORA_E_PACKED, 1, NULL);
  P = packed(W, &buffer);
  P.k = k + 1;
  forward_is(PYLORA_E_SHAPE, 1, NULL);
  P.k = k;
  l.y = NULL;
  forward_is(PYLORA_E_NULL, 1, NULL);
  l.y = &y.mat;
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_cuda_linear_forward(g, NULL, &x, 1, &l, 1, NULL, NULL, 0));
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_cuda_linear_forward(g, NULL, &x, 1, &l, 1, NULL, ws.at(), 5000));
  pylora_linear_grad b = {&P, &lora, &y.mat, NULL, NULL, NULL};
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED,
                pylora_cuda_linear_backward(g, NULL, NULL, 1, &b, &dx, 1, ws.at(), ws.bytes));
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_cuda_linear_backward(g, NULL, NULL, 1, &b, &dx, 0, NULL, 0));
  b.dB = &B.mat;
  EXPECT_STATUS(PYLORA_E_NULL,
                pylora_cuda_linear_backward(g, NULL, NULL, 1, &b, &dx, 0, ws.at(), ws.bytes));
  b.dB = NULL, b.dA = &A.mat;
  EXPECT_STATUS(PYLORA_E_NULL,
                pylora_cuda_linear_backward(g, NULL, NULL, 1, &b, &dx, 0, ws.at(), ws.bytes));
  b.dA = NULL, b.W = NULL;
  EXPECT_STATUS(PYLORA_E_NULL,
                pylora_cuda_linear_backward(g, NULL, NULL, 1, &b, &dx, 0, ws.at(), ws.bytes));
  EXPECT(pylora_cuda_linear_workspace(g, -1, 1, 1, 1, 1, 1) == 0, "a negative size");
  EXPECT(pylora_cuda_linear_workspace(g, INT64_MAX, 1, 1, 1, 1, 1) == 0, "a size too large");
  EXPECT(pylora_cuda_pack_bytes(PYLORA_Q8_0, 32, 32) == 0, "a type without products");
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_cuda_pack(g, NULL, PYLORA_BF16, &W, buffer.data() + 2, &P));
}

int main(void) {
  forward();
  backward();
  tiles();
  many_adapters();
  zero_adapter();
  mixed_rows();
  errors();
  return finish("test_linear");
}
