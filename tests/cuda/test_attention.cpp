/* Attention on the (emulated) GPU against the reference in C: ragged sequences, caches, windows, all types, awkward
 * layouts, and what no row may see.
 *
 * Bounds are those of tests/c/test_attention.c at the inputs' exact values, and what the tensor cores' kernels
 * round beside: P, dS and do to the 16-bit type, u of it each (Higham, thm 2.2). */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "device.cuh"
#include "pylora_cuda.h"
extern "C" {
#include "reference.h"
}

static int failures;
static char context[300];
#define EXPECT(condition, ...)                                            \
  do {                                                                    \
    if (!(condition) && failures++ < 20) {                                \
      printf("%s:%d: %s [%s] ", __FILE__, __LINE__, #condition, context); \
      printf(" " __VA_ARGS__);                                            \
      printf("\n");                                                       \
    }                                                                     \
  } while (0)
#define EXPECT_STATUS(wanted, call)                                                         \
  do {                                                                                      \
    const int got_ = (call);                                                                \
    EXPECT(got_ == (wanted), "gave %s: %s", pylora_status_text(got_), pylora_cuda_error()); \
  } while (0)
#define OK(call) EXPECT_STATUS(PYLORA_OK, call)

static pylora_cuda *g;

/* ---- random numbers and matrices ---- */

static uint64_t state = 20210617;
static uint64_t bits64() {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
static int64_t below(int64_t n) { return (int64_t)(bits64() % (uint64_t)n); }
static float uniform() { return (float)((int64_t)(bits64() >> 40) - (1 << 23)) / (1 << 23); }
static int64_t pick(std::vector<int64_t> of) { return of[below((int64_t)of.size())]; }

static float in_type(float f, int dtype) {
  if (dtype == PYLORA_F32) return f;
  return dtype == PYLORA_BF16 ? widen_bf16(round_bf16(f)) : widen_f16(round_f16(f));
}
static double unit(int dtype) {
  return dtype == PYLORA_F32 ? 0x1p-24 : dtype == PYLORA_BF16 ? 0x1p-8 : 0x1p-11;
}

/* A matrix of the device and its values in float32; gaps between rows are poisoned, and looked at again. */
struct Matrix {
  int dtype;
  int64_t rows, cols, ld, offset;
  std::vector<uint8_t> bytes;
  std::vector<float> wide;
  bool down;
  /* fits: rows start at multiples of 16 bytes, as tensor cores need it. */
  Matrix(int dtype_, int64_t rows_, int64_t cols_, float size, bool fits = true)
      : dtype(dtype_), rows(rows_), cols(cols_), wide((size_t)(rows_ * cols_)) {
    ld = cols + (fits ? pick({0, 8, 16}) : pick({1, 3}));
    offset = fits ? 8 : 1;
    down = below(3) == 0;
    bytes.assign((size_t)(offset + rows * ld + 8) * step(), 0xff); /* NaN in each type */
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) set(i, j, size * uniform());
  }
  size_t step() const { return dtype == PYLORA_F32 ? 4 : 2; }
  int64_t at(int64_t i, int64_t j) const { return offset + (down ? rows - 1 - i : i) * ld + j; }
  void set(int64_t i, int64_t j, float f) {
    store(bytes.data(), dtype, at(i, j), f);
    wide[(size_t)(i * cols + j)] = in_type(f, dtype);
  }
  float get(int64_t i, int64_t j) const { return load(bytes.data(), dtype, at(i, j)); }
  float value(int64_t i, int64_t j) const { return wide[(size_t)(i * cols + j)]; }
  const float *row(int64_t i, int64_t j) const { return wide.data() + i * cols + j; }
  pylora_mat part(int64_t first, int64_t n) {
    pylora_mat a = {NULL, n, cols, down ? -ld : ld, NULL, NULL};
    uint8_t *p = bytes.data() + at(first, 0) * (int64_t)step();
    if (rows == 0) return a;
    if (dtype == PYLORA_F32)
      a.p = (float *)(void *)p;
    else if (dtype == PYLORA_BF16)
      a.b = (uint16_t *)(void *)p;
    else
      a.h = (uint16_t *)(void *)p;
    return a;
  }
  pylora_mat mat() { return part(0, rows); }
  pylora_mat reference() { return {wide.data(), rows, cols, cols, NULL, NULL}; }
  /* Gaps are as they were? */
  void whole(const char *what) const {
    for (int64_t e = 0; e < (int64_t)(bytes.size() / step()); e++) {
      const int64_t in = e - offset;
      if (in >= 0 && in < rows * ld && in % ld < cols) continue;
      for (size_t b = 0; b < step(); b++)
        EXPECT(bytes[(size_t)e * step() + b] == 0xff, "%s: a gap was written", what);
    }
  }
};

struct Workspace { /* to the byte, and poisoned */
  std::vector<uint8_t> bytes;
  explicit Workspace(size_t n) : bytes(n, 0xff) {}
};

/* ---- settings ---- */

struct Setting {
  pylora_attn a;
  std::vector<int64_t> q_start, k_start, k_len;
  int64_t m = 0, n = 0, max_q = 0, max_k = 0;
  bool cached = false, fits = true;
  int dtype = 0;
  pylora_seqs host() const {
    return {(int64_t)k_len.size(), q_start.data(), cached ? k_start.data() : NULL,
            cached ? k_len.data() : NULL};
  }
  pylora_cuda_seqs seqs() const {
    return {(int64_t)k_len.size(),        q_start.data(), cached ? k_start.data() : NULL,
            cached ? k_len.data() : NULL, max_q,          max_k};
  }
  bool tensor() const {
    return dtype != PYLORA_F32 && fits && a.head_dim % 8 == 0 && a.softcap == 0;
  }
  int64_t width() const { return (int64_t)a.heads * a.head_dim; }
  int64_t kv_width() const { return (int64_t)a.kv_heads * a.head_dim; }
  int other() const { return below(2) ? dtype : (int)below(3); } /* of o, do, dq, dk, dv */
  size_t workspace() const {
    const pylora_cuda_seqs s = seqs();
    const size_t bytes = pylora_cuda_attention_workspace(g, &s, &a, m, n);
    EXPECT(bytes > 0);
    return bytes;
  }
};

/* `keys`: of a cache, before the queries'. */
static Setting setting(int dtype, int D, int kv, int group, std::vector<int64_t> queries,
                       std::vector<int64_t> keys, int window, bool fits = true) {
  Setting t;
  t.dtype = dtype, t.fits = fits, t.cached = !keys.empty();
  t.a = {kv * group, kv, D, window, 1 / sqrtf((float)D), 0};
  t.q_start.push_back(0);
  for (size_t i = 0; i < queries.size(); i++) {
    const int64_t start = t.n + (t.cached ? below(3) : 0);
    t.k_start.push_back(start);
    t.k_len.push_back(queries[i] + (t.cached ? keys[i] : 0));
    t.q_start.push_back(t.m += queries[i]);
    t.n = start + t.k_len[i];
    t.max_q = std::max(t.max_q, queries[i]), t.max_k = std::max(t.max_k, t.k_len[i]);
  }
  t.n += t.cached ? 2 : 0;
  t.max_q += pick({0, 0, 3, 100}), t.max_k += pick({0, 0, 5, 100}); /* larger is fine */
  snprintf(context, sizeof context,
           "type %d, D %d, %d x %d heads, window %d%s%s, %d sequences, m %d", dtype, D, kv, group,
           window, t.cached ? ", cache" : "", fits ? "" : ", unaligned", (int)queries.size(),
           (int)t.m);
  return t;
}

static Setting random_setting() {
  const int dtype = (int)pick({PYLORA_F32, PYLORA_BF16, PYLORA_BF16, PYLORA_F16});
  const int D = (int)pick({8, 16, 40, 64, 64, 96, 128, 7, 33});
  std::vector<int64_t> queries, keys;
  const bool cached = below(2);
  for (int64_t i = pick({1, 2, 4}); i > 0; i--) {
    queries.push_back(pick({0, 1, 1, 2, 5, 31, 33, 70}));
    if (cached) keys.push_back(pick({0, 1, 17, 90, 300}));
  }
  Setting t = setting(dtype, D, (int)pick({1, 2}), (int)pick({1, 2, 3, 4}), queries, keys,
                      (int)pick({0, 0, 1, 5, 40, 100}), below(4) != 0);
  t.a.softcap = (float)pick({0, 0, 1, 30});
  return t;
}

/* ---- bounds ---- */

static double gamma_n(double n) { return n * 0x1p-24 / (1 - n * 0x1p-24); }
enum { EXP = 8 };

static double abs_dot(int64_t n, const float *a, const float *b) {
  double sum = 0;
  for (int64_t j = 0; j < n; j++) sum += fabs((double)a[j] * b[j]);
  return sum;
}
static double dot(int64_t n, const float *a, const float *b) {
  double sum = 0;
  for (int64_t j = 0; j < n; j++) sum += (double)a[j] * b[j];
  return sum;
}

struct Bounds {
  std::vector<double> o, lse, dq, dk, dv;
};

/* As in tests/c/test_attention.c: scores are off by gamma_{D+2} of scale |q| |k| and what taking logarithms to base 2
 * rounds, which moves P by twice that; a cap's tanh is off by a few roundings more, and its slope by twice as much.
 * `d_o` NULL: forward alone. */
static Bounds bounds_of(const Setting &t, const Matrix &q, const Matrix &k, const Matrix &v,
                        const Matrix *d_o, const std::vector<float> &o,
                        const std::vector<float> &lse) {
  const int64_t D = t.a.head_dim, group = t.a.heads / t.a.kv_heads, w = t.width();
  Bounds b;
  b.o.resize((size_t)(t.m * w)), b.lse.resize((size_t)(t.m * t.a.heads));
  b.dq.resize((size_t)(t.m * w));
  b.dk.resize((size_t)(t.n * t.kv_width())), b.dv = b.dk;
  const double u = t.tensor() ? unit(t.dtype) : 0;
  /* What float16 loses below its normal numbers: of P beside 1, of do and dS beside the largest |do|. */
  const double low = t.tensor() && t.dtype == PYLORA_F16 ? 0x1p-24 : 0;
  double most_do = 0;
  if (d_o)
    for (float f : d_o->wide) most_do = fmax(most_do, fabs(f));
  for (size_t i = 0; i < t.k_len.size(); i++)
    for (int64_t row = t.q_start[i]; row < t.q_start[i + 1]; row++)
      for (int64_t head = 0; head < t.a.heads; head++) {
        const int64_t start = t.cached ? t.k_start[i] : t.q_start[i], kv = head / group * D;
        const int64_t end = start + t.k_len[i] - (t.q_start[i + 1] - 1 - row);
        const int64_t first = t.a.window && end - t.a.window > start ? end - t.a.window : start;
        const float *qr = q.row(row, head * D);
        const double L = lse[(size_t)(row * t.a.heads + head)], n = (double)(end - first);
        const double cap = t.a.softcap;
        double worst = 0;
        for (int64_t j = first; j < end; j++) {
          const double most = t.a.scale * abs_dot(D, qr, k.row(j, kv));
          const double capped = cap > 0 ? gamma_n(2 * EXP + 10) * fmin(cap, most) : 0;
          worst =
              fmax(worst, gamma_n((double)D + 4) * most + 2 * 0x1p-24 * (fabs(L) + most) + capped);
        }
        const double slope_off = cap > 0 ? 2 * worst / cap + gamma_n(4 * EXP + 20) : 0;
        const double P_off = expm1(2 * worst) + gamma_n(3 * n + 2 * EXP + 3);
        b.lse[(size_t)(row * t.a.heads + head)] =
            1.01 * worst + gamma_n(2 * n + EXP + 3) * (1 + fabs(L) + log(n));
        for (int64_t j = first; j < end; j++) {
          double score = t.a.scale * dot(D, qr, k.row(j, kv));
          if (cap > 0) score = cap * tanh(score / cap);
          const double P = exp(score - L);
          for (int64_t c = 0; c < D; c++)
            b.o[(size_t)(row * w + head * D + c)] +=
                1.01 * (P * (P_off + u) + low) * fabs(v.value(j, kv + c));
          if (!d_o) continue;
          const float *gr = d_o->row(row, head * D);
          const double size =
              abs_dot(D, gr, v.row(j, kv)) + abs_dot(D, gr, o.data() + row * w + head * D);
          double lost = 0; /* of dP and delta, where do is tiny beside the largest */
          for (int64_t c = 0; c < D; c++)
            lost += low * most_do *
                    (fabs(v.value(j, kv + c)) + fabs(o[(size_t)(row * w + head * D + c)]));
          const double sums = gamma_n((double)(D + t.m * group) + n + 2 * EXP);
          const double dS =
              t.a.scale *
              (P * (size * (P_off + sums + slope_off + 2 * u + u * u) + lost) + low * most_do);
          for (int64_t c = 0; c < D; c++) {
            b.dq[(size_t)(row * w + head * D + c)] += 1.01 * dS * fabs(k.value(j, kv + c));
            b.dk[(size_t)(j * t.kv_width() + kv + c)] += 1.01 * dS * fabs(qr[c]);
            b.dv[(size_t)(j * t.kv_width() + kv + c)] +=
                1.01 *
                ((P * (P_off + sums + 2 * u + u * u) + low) * fabs(gr[c]) + P * low * most_do);
          }
        }
      }
  return b;
}

static void near(const char *what, const Matrix &got, const std::vector<float> &want,
                 const std::vector<double> &bound) {
  got.whole(what);
  for (int64_t i = 0; i < got.rows; i++)
    for (int64_t j = 0; j < got.cols; j++) {
      const double x = got.get(i, j), y = want[(size_t)(i * got.cols + j)];
      double allowed = bound[(size_t)(i * got.cols + j)] + 0x1p-24 * fabs(y) + FLT_MIN;
      if (got.dtype != PYLORA_F32) allowed += unit(got.dtype) * (fabs(y) + allowed);
      if (got.dtype == PYLORA_F16) allowed += 0x1p-25;
      EXPECT(x == y || fabs(x - y) <= allowed,
             "%s[%d,%d] is %.9g, not %.9g: off %.3g, allowed %.3g", what, (int)i, (int)j, x, y,
             fabs(x - y), allowed);
    }
}

static void same(const char *what, const Matrix &a, int64_t i, const Matrix &b, int64_t j) {
  for (int64_t c = 0; c < a.cols; c++) {
    const float x = a.get(i, c), y = b.get(j, c);
    EXPECT(memcmp(&x, &y, sizeof x) == 0, "%s: row %d, column %d is %g, and %g", what, (int)i,
           (int)c, (double)x, (double)y);
  }
}

/* ---- forward ---- */

static int forward(const Setting &t, Matrix &q, Matrix &k, Matrix &v, Matrix &o, Matrix &lse) {
  Workspace ws(t.workspace());
  const pylora_cuda_seqs s = t.seqs();
  const pylora_mat Q = q.mat(), K = k.mat(), V = v.mat(), O = o.mat(), L = lse.mat();
  return pylora_cuda_attention_forward(g, NULL, &Q, &K, &V, &s, &t.a, &O, &L, ws.bytes.data(),
                                       ws.bytes.size());
}

static void one_forward(const Setting &t) {
  Matrix q(t.dtype, t.m, t.width(), 2, t.fits), k(t.dtype, t.n, t.kv_width(), 2, t.fits);
  Matrix v(t.dtype, t.n, t.kv_width(), 1, t.fits);
  Matrix o(t.other(), t.m, t.width(), 0, below(2)), lse(PYLORA_F32, t.m, t.a.heads, 0, below(2));
  OK(forward(t, q, k, v, o, lse));
  const pylora_seqs s = t.host();
  pylora_mat Q = q.reference(), K = k.reference(), V = v.reference();
  pylora_mat O = o.reference(), L = lse.reference();
  pylora_ref_attention_forward(&Q, &K, &V, &s, &t.a, &O, &L);
  const Bounds b = bounds_of(t, q, k, v, NULL, o.wide, lse.wide);
  near("o", o, o.wide, b.o);
  near("lse", lse, lse.wide, b.lse);
  OK(pylora_cuda_check(g, NULL));
}

static void test_forward() {
  for (int i = 0; i < 30; i++) one_forward(random_setting());
  for (int dtype : {PYLORA_BF16, PYLORA_F16}) { /* every kernel */
    one_forward(setting(dtype, 64, 1, 2, {90}, {}, 0));
    one_forward(setting(dtype, 128, 1, 4, {40, 2}, {100, 0}, 30));
    one_forward(setting(dtype, 256, 1, 1, {70}, {}, 0));
    one_forward(setting(dtype, 200, 1, 2, {3}, {200}, 0));
  }
  one_forward(setting(PYLORA_F32, 128, 1, 2, {40}, {}, 0));
  one_forward(setting(PYLORA_F32, 250, 1, 1, {33}, {20}, 9));
}

/* Few queries and many keys: pieces, and windows that begin inside of one. */
static void test_decoding() {
  for (int dtype : {PYLORA_F32, PYLORA_BF16, PYLORA_F16})
    for (int window : {0, 7, 130, 300}) {
      one_forward(setting(dtype, 64, 2, 4, {1, 1, 1}, {700, 0, 129}, window));
      one_forward(setting(dtype, 24, 1, 1, {8, 1}, {400, 300}, window));
    }
  one_forward(setting(PYLORA_BF16, 16, 1, 1, {1}, {9000}, 0)); /* larger pieces */
  one_forward(setting(PYLORA_BF16, 16, 1, 4, {8}, {1200}, 0)); /* of the kernel for many rows */
}

/* ---- backward ---- */

struct Grads {
  Matrix dq, dk, dv;
  Grads(const Setting &t, bool alike = false)
      : dq(alike ? PYLORA_F32 : t.other(), t.m, t.width(), 0, alike || below(2)),
        dk(alike ? PYLORA_F32 : t.other(), t.n, t.kv_width(), 1, alike || below(2)),
        dv(alike ? PYLORA_F32 : t.other(), t.n, t.kv_width(), 1, alike || below(2)) {}
};

static int backward(const Setting &t, Matrix &d_o, Matrix &q, Matrix &k, Matrix &v, Matrix &o,
                    Matrix &lse, Grads &r) {
  Workspace ws(t.workspace());
  const pylora_cuda_seqs s = t.seqs();
  const pylora_mat G = d_o.mat(), Q = q.mat(), K = k.mat(), V = v.mat(), O = o.mat(), L = lse.mat();
  const pylora_mat dQ = r.dq.mat(), dK = r.dk.mat(), dV = r.dv.mat();
  return pylora_cuda_attention_backward(g, NULL, &G, &Q, &K, &V, &O, &L, &s, &t.a, &dQ, &dK, &dV,
                                        ws.bytes.data(), ws.bytes.size());
}

/* `size`: of do. Rows of dk and dv that no sequence uses hold what they held. */
static void one_backward(const Setting &t, float size = 1) {
  Matrix q(t.dtype, t.m, t.width(), 2, t.fits), k(t.dtype, t.n, t.kv_width(), 2, t.fits);
  Matrix v(t.dtype, t.n, t.kv_width(), 1, t.fits);
  Matrix d_o(t.other(), t.m, t.width(), size, below(2)), o(t.other(), t.m, t.width(), 0, below(2));
  Matrix lse(PYLORA_F32, t.m, t.a.heads, 0, below(2));
  Grads got(t);
  const pylora_seqs s = t.host();
  pylora_mat G = d_o.reference(), Q = q.reference(), K = k.reference(), V = v.reference();
  pylora_mat O = o.reference(), L = lse.reference();
  pylora_ref_attention_forward(&Q, &K, &V, &s, &t.a, &O, &L);
  for (int64_t i = 0; i < t.m; i++) { /* as they are stored, for both */
    for (int64_t j = 0; j < t.width(); j++) o.set(i, j, o.value(i, j));
    for (int64_t j = 0; j < t.a.heads; j++) lse.set(i, j, lse.value(i, j));
  }
  OK(backward(t, d_o, q, k, v, o, lse, got));
  std::vector<float> wide[3] = {got.dq.wide, got.dk.wide, got.dv.wide};
  pylora_mat dQ = {wide[0].data(), t.m, t.width(), t.width(), NULL, NULL};
  pylora_mat dK = {wide[1].data(), t.n, t.kv_width(), t.kv_width(), NULL, NULL};
  pylora_mat dV = {wide[2].data(), t.n, t.kv_width(), t.kv_width(), NULL, NULL};
  pylora_ref_attention_backward(&G, &Q, &K, &V, &O, &L, &s, &t.a, &dQ, &dK, &dV);
  Bounds b = bounds_of(t, q, k, v, &d_o, o.wide, lse.wide);
  near("dq", got.dq, wide[0], b.dq);
  near("dk", got.dk, wide[1], b.dk);
  near("dv", got.dv, wide[2], b.dv);
  for (int64_t i = 0; i < t.n; i++) {
    bool used = false;
    for (size_t n = 0; n < t.k_len.size(); n++) {
      const int64_t start = t.cached ? t.k_start[n] : t.q_start[n];
      used |= t.q_start[n + 1] > t.q_start[n] && i >= start && i < start + t.k_len[n];
    }
    for (int64_t j = 0; j < t.kv_width() && !used; j++)
      EXPECT(got.dk.get(i, j) == got.dk.value(i, j) && got.dv.get(i, j) == got.dv.value(i, j),
             "row %d, which nobody uses, was written", (int)i);
  }
  OK(pylora_cuda_check(g, NULL));
}

static void test_backward() {
  for (int i = 0; i < 30; i++) one_backward(random_setting());
  for (int dtype : {PYLORA_BF16, PYLORA_F16}) { /* every kernel */
    one_backward(setting(dtype, 64, 1, 2, {90}, {}, 0));
    one_backward(setting(dtype, 128, 1, 4, {40, 2}, {100, 0}, 30));
    one_backward(setting(dtype, 256, 1, 1, {70}, {}, 0));
    one_backward(setting(dtype, 200, 1, 2, {3}, {100}, 0));
  }
  one_backward(setting(PYLORA_F32, 128, 1, 2, {40}, {}, 0));
  one_backward(setting(PYLORA_F32, 250, 1, 1, {33}, {20}, 9));
  /* Gradients that float16 has no numbers for, and large ones. */
  for (float size : {1e-6f, 1e-9f, 1e4f})
    one_backward(setting(PYLORA_F16, 64, 1, 2, {40}, {}, 0), size);
}

/* ---- what no row may see ---- */

struct Problem {
  Matrix q, k, v, d_o;
  explicit Problem(const Setting &t)
      : q(t.dtype, t.m, t.width(), 2, t.fits), k(t.dtype, t.n, t.kv_width(), 2, t.fits),
        v(t.dtype, t.n, t.kv_width(), 1, t.fits), d_o(t.dtype, t.m, t.width(), 1, t.fits) {}
};
struct Results {
  Matrix o, lse;
  Grads d;
  explicit Results(const Setting &t)
      : o(PYLORA_F32, t.m, t.width(), 0), lse(PYLORA_F32, t.m, t.a.heads, 0), d(t, true) {}
};
static void run(const Setting &t, Problem &p, Results &r) {
  OK(forward(t, p.q, p.k, p.v, r.o, r.lse));
  OK(backward(t, p.d_o, p.q, p.k, p.v, r.o, r.lse, r.d));
}
static void poison(Matrix &x, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i++)
    for (int64_t j = 0; j < x.cols; j++) x.set(i, j, below(3) ? NAN : INFINITY);
}

/* NaN in a sequence's rows from `cut` on changes no bit of earlier rows, nor of other sequences; NaN in the gradients
 * before it none of later keys. */
static void test_isolation() {
  for (int dtype : {PYLORA_F32, PYLORA_BF16}) {
    for (int round = 0; round < 4; round++) {
      const int64_t m = 70 + below(60);
      Setting t = setting(dtype, (int)pick({16, 64, 128}), 1, (int)pick({1, 3}), {33, m, 7}, {},
                          (int)pick({0, 0, 50}), round != 3);
      const int64_t cut = 33 + 1 + below(m - 1), end = 33 + m;
      Problem p(t);
      Results clean(t), other(t), early(t);
      run(t, p, clean);
      Problem late = p;
      poison(late.q, cut, end), poison(late.k, cut, end), poison(late.v, cut, end);
      run(t, late, other);
      Problem before = p;
      poison(before.d_o, 33, cut);
      run(t, before, early);
      for (int64_t i = 0; i < t.m; i++) {
        if (i < cut || i >= end) {
          same("o with NaN after it", clean.o, i, other.o, i);
          same("lse with NaN after it", clean.lse, i, other.lse, i);
          same("dq with NaN after it", clean.d.dq, i, other.d.dq, i);
        } else {
          EXPECT(isnan(other.o.get(i, 0)) && isnan(other.d.dq.get(i, 0)), "row %d sees NaN",
                 (int)i);
        }
        if (i < 33 || i >= cut) {
          same("dk with NaN before it", clean.d.dk, i, early.d.dk, i);
          same("dv with NaN before it", clean.d.dv, i, early.d.dv, i);
        } else if (t.a.window == 0) {
          EXPECT(!isfinite(early.d.dk.get(i, 0)) && !isfinite(early.d.dv.get(i, 0)), "key %d",
                 (int)i);
        }
      }
    }
  }
}

/* A sequence has the bits that it has alone; twice the same call has the same bits; what lies behind k_len in a cache,
 * and a window of everything, change none. */
static void test_alone() {
  for (int dtype : {PYLORA_F32, PYLORA_BF16}) {
    const std::vector<int64_t> queries = {40, 3, 70};
    Setting t = setting(dtype, 64, 2, 2, queries, {}, (int)pick({0, 30}));
    Problem p(t);
    Results all(t), again(t);
    run(t, p, all), run(t, p, again);
    for (int64_t i = 0; i < t.m; i++) {
      same("o again", all.o, i, again.o, i);
      same("dk again", all.d.dk, i, again.d.dk, i);
    }
    for (size_t i = 0; i < queries.size(); i++) {
      Setting one = setting(dtype, 64, 2, 2, {queries[i]}, {}, t.a.window);
      Problem part(one);
      for (int64_t r = 0; r < one.m; r++) {
        for (int64_t j = 0; j < t.width(); j++)
          part.q.set(r, j, p.q.value(t.q_start[i] + r, j)),
              part.d_o.set(r, j, p.d_o.value(t.q_start[i] + r, j));
        for (int64_t j = 0; j < t.kv_width(); j++)
          part.k.set(r, j, p.k.value(t.q_start[i] + r, j)),
              part.v.set(r, j, p.v.value(t.q_start[i] + r, j));
      }
      Results own(one);
      run(one, part, own);
      for (int64_t r = 0; r < one.m; r++) {
        same("o alone", own.o, r, all.o, t.q_start[i] + r);
        same("lse alone", own.lse, r, all.lse, t.q_start[i] + r);
        same("dq alone", own.d.dq, r, all.d.dq, t.q_start[i] + r);
        same("dk alone", own.d.dk, r, all.d.dk, t.q_start[i] + r);
        same("dv alone", own.d.dv, r, all.d.dv, t.q_start[i] + r);
      }
    }
  }
}

/* Sequences that have keys in common: their gradients add up. */
static void test_shared_keys() {
  for (int dtype : {PYLORA_F32, PYLORA_BF16}) {
    Setting t = setting(dtype, 16, 1, 2, {20, 30}, {0, 0}, 0);
    t.k_start = {5, 10}, t.k_len = {25, 80}, t.n = 92, t.max_k = 80;
    Problem p(t);
    Results both(t);
    run(t, p, both);
    std::vector<double> dk((size_t)(t.n * 16)), dv(dk), size(dk);
    for (size_t i = 0; i < 2; i++) {
      Setting one = t;
      one.m = t.q_start[i + 1] - t.q_start[i], one.q_start = {0, one.m};
      one.k_start = {t.k_start[i]}, one.k_len = {t.k_len[i]};
      Problem part(one);
      part.k = p.k, part.v = p.v;
      for (int64_t r = 0; r < one.m; r++)
        for (int64_t j = 0; j < t.width(); j++)
          part.q.set(r, j, p.q.value(t.q_start[i] + r, j)),
              part.d_o.set(r, j, p.d_o.value(t.q_start[i] + r, j));
      Results own(one);
      run(one, part, own);
      for (int64_t r = t.k_start[i]; r < t.k_start[i] + t.k_len[i]; r++)
        for (int64_t j = 0; j < 16; j++) {
          dk[(size_t)(r * 16 + j)] += own.d.dk.get(r, j);
          dv[(size_t)(r * 16 + j)] += own.d.dv.get(r, j);
        }
    }
    for (int64_t r = 5; r < 90; r++)
      for (int64_t j = 0; j < 16; j++) {
        EXPECT(fabs(both.d.dk.get(r, j) - dk[(size_t)(r * 16 + j)]) < 1e-4, "dk[%d,%d]", (int)r,
               (int)j);
        EXPECT(fabs(both.d.dv.get(r, j) - dv[(size_t)(r * 16 + j)]) < 1e-4, "dv[%d,%d]", (int)r,
               (int)j);
      }
  }
}

/* ---- errors ---- */

/* Numbers of the device that do not fit: NaN for their sequence alone, and PYLORA_E_INDEX afterwards. */
static void test_bad_numbers() {
  for (int dtype : {PYLORA_F32, PYLORA_BF16})
    for (int kind = 0; kind < 6; kind++) {
      Setting t = setting(dtype, 16, 1, 2, {5, 9}, {40, 50}, 0);
      Problem p(t);
      Results right(t), wrong(t);
      run(t, p, right);
      OK(pylora_cuda_check(g, NULL));
      Setting bad = t;
      if (kind == 0) bad.k_start[0] = -1;
      if (kind == 1) bad.k_start[0] = t.n;
      if (kind == 2) bad.k_len[0] = 4; /* fewer keys than queries */
      if (kind == 3) bad.k_len[0] = INT64_MAX;
      if (kind == 4) bad.k_start[0] = INT64_MAX;
      if (kind == 5) bad.k_len[0] = -7;
      run(bad, p, wrong);
      EXPECT_STATUS(PYLORA_E_INDEX, pylora_cuda_check(g, NULL));
      OK(pylora_cuda_check(g, NULL));
      for (int64_t i = 0; i < t.m; i++)
        if (i < 5) {
          for (int64_t j = 0; j < t.width(); j++)
            EXPECT(isnan(wrong.o.get(i, j)) && isnan(wrong.d.dq.get(i, j)), "row %d", (int)i);
          EXPECT(isnan(wrong.lse.get(i, 0)) && isnan(wrong.lse.get(i, 1)), "row %d", (int)i);
        } else {
          same("o beside a bad sequence", wrong.o, i, right.o, i);
          same("dq beside a bad sequence", wrong.d.dq, i, right.d.dq, i);
        }
      for (int64_t i = t.k_start[1]; i < t.k_start[1] + t.k_len[1]; i++)
        same("dk beside a bad sequence", wrong.d.dk, i, right.d.dk, i);
      wrong.o.whole("o"), wrong.lse.whole("lse");
    }
  /* Rows of queries that are not there. */
  Setting t = setting(PYLORA_BF16, 16, 1, 1, {5, 9}, {}, 0);
  Problem p(t);
  Results r(t);
  t.q_start[2] = 1000;
  run(t, p, r);
  EXPECT_STATUS(PYLORA_E_INDEX, pylora_cuda_check(g, NULL));
}

static void test_errors() {
  Setting t = setting(PYLORA_BF16, 64, 1, 2, {3}, {900}, 0);
  Problem p(t);
  Results r(t);
  const pylora_cuda_seqs s = t.seqs();
  pylora_mat Q = p.q.mat(), K = p.k.mat(), V = p.v.mat(), O = r.o.mat(), L = r.lse.mat();
  pylora_mat G = p.d_o.mat(), dQ = r.d.dq.mat(), dK = r.d.dk.mat(), dV = r.d.dv.mat();
  Workspace ws(t.workspace());
  pylora_attn a = t.a;
  const auto ahead = [&](const pylora_mat *q, const pylora_cuda_seqs *of, size_t bytes) {
    return pylora_cuda_attention_forward(g, NULL, q, &K, &V, of, &a, &O, &L, ws.bytes.data(),
                                         bytes);
  };
  const auto back = [&](size_t bytes) {
    return pylora_cuda_attention_backward(g, NULL, &G, &Q, &K, &V, &O, &L, &s, &a, &dQ, &dK, &dV,
                                          ws.bytes.data(), bytes);
  };
  OK(ahead(&Q, &s, ws.bytes.size()));
  OK(back(ws.bytes.size()));
  EXPECT_STATUS(PYLORA_E_WORKSPACE, ahead(&Q, &s, 1000));
  EXPECT_STATUS(PYLORA_E_WORKSPACE, back(10));
  EXPECT_STATUS(PYLORA_E_NULL, ahead(NULL, &s, ws.bytes.size()));
  EXPECT_STATUS(PYLORA_E_NULL, ahead(&Q, NULL, ws.bytes.size()));
  pylora_cuda_seqs half = s;
  half.k_len = NULL;
  EXPECT_STATUS(PYLORA_E_NULL, ahead(&Q, &half, ws.bytes.size()));
  pylora_mat narrow = Q;
  narrow.cols--;
  EXPECT_STATUS(PYLORA_E_SHAPE, ahead(&narrow, &s, ws.bytes.size()));
  Matrix other(PYLORA_F16, t.m, t.width(), 1);
  pylora_mat F = other.mat();
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, ahead(&F, &s, ws.bytes.size()));
  a.window = -1;
  EXPECT_STATUS(PYLORA_E_VALUE, ahead(&Q, &s, ws.bytes.size()));
  a.window = 0;
  for (float scale : {0.0f, -1.0f, NAN, INFINITY}) {
    a.scale = scale;
    EXPECT_STATUS(PYLORA_E_VALUE, ahead(&Q, &s, ws.bytes.size()));
  }
  a.scale = 1, a.kv_heads = 3;
  EXPECT_STATUS(PYLORA_E_SHAPE, ahead(&Q, &s, ws.bytes.size()));
  a = {1, 1, 264, 0, 1, 0};
  Matrix wide(PYLORA_BF16, 2, 264, 1), more(PYLORA_F32, 2, 1, 1);
  const std::vector<int64_t> start = {0, 2};
  const pylora_cuda_seqs two = {1, start.data(), NULL, NULL, 2, 2};
  const pylora_mat W = wide.mat(), l = more.mat();
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED,
                pylora_cuda_attention_forward(g, NULL, &W, &W, &W, &two, &a, &W, &l,
                                              ws.bytes.data(), ws.bytes.size()));
  EXPECT(pylora_cuda_attention_workspace(g, &two, &a, 2, 2) == 0);
  /* Nothing to do. */
  const pylora_cuda_seqs none = {0, NULL, NULL, NULL, 0, 0};
  pylora_mat q0 = Q, o0 = O, l0 = L, g0 = G, dq0 = dQ;
  q0.rows = o0.rows = l0.rows = g0.rows = dq0.rows = 0;
  OK(pylora_cuda_attention_forward(g, NULL, &q0, &K, &V, &none, &t.a, &o0, &l0, NULL, 0));
  OK(pylora_cuda_attention_backward(g, NULL, &g0, &q0, &K, &V, &o0, &l0, &none, &t.a, &dq0, &dK,
                                    &dV, NULL, 0));
}

int main() {
  OK(pylora_cuda_open(0, BUILD_DIR "/libcublasLt_emulated.so", &g));
  if (!g) return 1;
  test_forward();
  test_decoding();
  test_backward();
  test_isolation();
  test_alone();
  test_shared_keys();
  test_bad_numbers();
  test_errors();
  pylora_cuda_close(g);
  printf("test_attention: %s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
