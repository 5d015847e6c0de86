/* LoRA linears on the device: n projections of one x, segments, ranks above min(d, k), few and many rows, every type,
 * dropout, awkward strides, beside csrc/reference.c; and what has to be equal bit for bit. */
#include "check_cuda.h"

#include <algorithm>

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
            h.cols ? &h.mat : NULL};
  }
};

/* What rounding the factors to T moves a product of two of them by, beside float32 sums of `terms`. */
static double share(int T, double terms) {
  return (T == PYLORA_F32 ? 0 : 2.02 * roundoff(T)) + 4 * (terms + 8) * 0x1p-24;
}

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
    p.emplace_back(T, below(2) ? (int)PYLORA_F32 : any_type(), m, pick({1, 3, 16, 40, 130}), k, r,
                   dropout);
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

int main(void) {
  forward();
  return finish("test_linear");
}
