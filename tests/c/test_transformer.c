/* RMSNorm, rotary embedding, SwiGLU, embedding, and the exponential beneath them. */
#include "check.h"
#include "runtime/internal.h"

static void rms_norm(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 3, 20), k = PICK(1, 2, 15, 16, 17, 63, 64, 65, 300);
    const float size = PICK(1, 1000) == 1 ? 1e-3f : 30.0f;
    const pylora_mat x = matrix(m, k, size), dy = matrix(m, k, 1), y = matrix(m, k, 0),
                     y0 = matrix(m, k, 0);
    const float *w = floats(k, 1), eps = 1e-5f;
    float *rstd = floats(m, 0), *rstd0 = floats(m, 0), *dw = floats(k, 1), *dw0 = floats(k, 1);
    OK(pylora_rms_norm_forward(&x, w, eps, &y, rstd));
    pylora_ref_rms_norm_forward(&x, w, eps, &y0, rstd0);
    const pylora_mat ay = abs_of(&y0), r = column(rstd, m), r0 = column(rstd0, m);
    expect_near("y", &y, &y0, &ay, (double)k / 2 + 7);
    expect_near("rstd", &r, &r0, &r0, (double)k / 2 + 5);
    for (int64_t i = 0; i < m; i++) {
      const pylora_mat x1 = row_of(&x, i), y1 = matrix(1, k, 0), yi = row_of(&y, i);
      float one;
      OK(pylora_rms_norm_forward(&x1, w, eps, &y1, &one));
      expect_same("row of y alone", &y1, &yi);
      EXPECT(one == rstd[i]);
    }
    const pylora_mat inplace = copy_of(&x);
    OK(pylora_rms_norm_forward(&inplace, w, eps, &inplace, rstd));
    expect_same("y in x", &inplace, &y);

    const int add = (int)below(2);
    const pylora_mat dx = matrix(m, k, 1), dx0 = copy_of(&dx), mag = abs_of(&dx),
                     dwmag = matrix(1, k, 0);
    fill(&dwmag, 0);
    for (int64_t i = 0; i < m; i++) {
      double mean = 0, R = rstd0[i];
      for (int64_t j = 0; j < k; j++)
        mean += fabs((double)*el(&dy, i, j) * w[j] * (double)*el(&x, i, j)) / (double)k;
      for (int64_t j = 0; j < k; j++) {
        const double a = fabs(*el(&x, i, j)), g = fabs(*el(&dy, i, j));
        *el(&mag, i, j) += (float)(1.01 * R * (g * fabs(w[j]) + a * R * R * mean));
        *el(&dwmag, 0, j) += (float)(1.01 * g * a * R);
      }
    }
    OK(pylora_rms_norm_backward(&dy, &x, w, rstd0, &dx, add, dw));
    pylora_ref_rms_norm_backward(&dy, &x, w, rstd0, &dx0, add, dw0);
    const pylora_mat dwm = {dw, 1, k, k, NULL, NULL}, dwm0 = {dw0, 1, k, k, NULL, NULL};
    expect_near("dx", &dx, &dx0, &mag, (double)k + 9);
    expect_near("dw", &dwm, &dwm0, &dwmag, (double)m + 3);
    const pylora_mat same = copy_of(&dy),
                     plain = matrix(m, k, 0); /* dx may be dy; dw is not disturbed */
    float *dw2 = floats(k, 0);
    OK(pylora_rms_norm_backward(&dy, &x, w, rstd0, &plain, 0, NULL));
    OK(pylora_rms_norm_backward(&same, &x, w, rstd0, &same, 0, dw2));
    expect_same("dx in dy", &same, &plain);
    EXPECT(memcmp(dw, dw2, (size_t)k * sizeof(float)) == 0);
    release();
  }
}

static void rope(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 9), D = PICK(2, 6, 32, 34, 64), heads = PICK(1, 3), n = 12;
    const pylora_mat x = matrix(m, heads * D, 1), cosines = matrix(n, D / 2, 0),
                     sines = matrix(n, D / 2, 0);
    const pylora_mat y = matrix(m, heads * D, 0), y0 = matrix(m, heads * D, 0),
                     mag = matrix(m, heads * D, 0);
    const int64_t *position = ids_below(m, n);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < D / 2; j++) {
        const double angle = 100 * (double)uniform();
        *el(&cosines, i, j) = (float)cos(angle), *el(&sines, i, j) = (float)sin(angle);
      }
    fill(&mag, 2);
    for (int layout = 0; layout < 2; layout++)
      for (int inverse = 0; inverse < 2; inverse++) {
        OK(pylora_rope(&x, &cosines, &sines, position, (int32_t)D, layout, inverse, &y));
        pylora_ref_rope(&x, &cosines, &sines, position, (int32_t)D, layout, inverse, &y0);
        expect_near("y", &y, &y0, &mag, 2);
        const pylora_mat same = copy_of(&x);
        OK(pylora_rope(&same, &cosines, &sines, position, (int32_t)D, layout, inverse, &same));
        expect_same("y in x", &same, &y);
        OK(pylora_rope(&same, &cosines, &sines, position, (int32_t)D, layout, !inverse, &same));
        expect_near("there and back", &same, &x, &mag, 8);
      }
    release();
  }
}

static void swiglu(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 7), n = PICK(1, 15, 16, 33, 200);
    const float size = (float)PICK(1, 10, 95, 200);
    const pylora_mat gate = matrix(m, n, size), up = matrix(m, n, 1), dy = matrix(m, n, 1);
    const pylora_mat y = matrix(m, n, 0), y0 = matrix(m, n, 0), dg = matrix(m, n, 0),
                     dg0 = matrix(m, n, 0);
    const pylora_mat du = matrix(m, n, 0), du0 = matrix(m, n, 0), mag = matrix(m, n, 0);
    OK(pylora_swiglu_forward(&gate, &up, &y));
    OK(pylora_swiglu_backward(&dy, &gate, &up, &dg, &du));
    pylora_ref_swiglu_forward(&gate, &up, &y0);
    pylora_ref_swiglu_backward(&dy, &gate, &up, &dg0, &du0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) { /* 1 + gate (1 - σ) cancels */
        const double g = *el(&gate, i, j), s = 1 / (1 + exp(-g));
        *el(&mag, i, j) =
            (float)(fabs(*el(&dy, i, j) * *el(&up, i, j)) * s * (1 + fabs(g) / (1 + exp(g))));
      }
    const pylora_mat ay = abs_of(&y0), adu = abs_of(&du0);
    expect_near("y", &y, &y0, &ay, EXP + 4);
    expect_near("dgate", &dg, &dg0, &mag, 2 * EXP + 10);
    expect_near("dup", &du, &du0, &adu, EXP + 4);
    const pylora_mat g = copy_of(&gate), u = copy_of(&up);
    OK(pylora_swiglu_backward(&dy, &g, &u, &g, &u));
    expect_same("dgate in gate", &g, &dg);
    expect_same("dup in up", &u, &du);
    const pylora_mat z = copy_of(&gate);
    OK(pylora_swiglu_forward(&z, &up, &z));
    expect_same("y in gate", &z, &y);
    release();
  }
}

static void embedding(void) {
  const int64_t m = PICK(0, 1, 40), vocab = PICK(1, 31, 32, 33, 70), k = PICK(1, 8, 65, 130);
  const pylora_mat W = matrix(vocab, k, 1), y = matrix(m, k, 0), y0 = matrix(m, k, 0),
                   dy = matrix(m, k, 1);
  const pylora_mat dW = matrix(vocab, k, 1), dW0 = matrix(vocab, k, 1);
  const int64_t *ids = ids_below(m, vocab);
  const pylora_packed P = packed(&W);
  OK(pylora_embedding_forward(ids, m, &P, &y));
  pylora_ref_embedding_forward(ids, m, &W, &y0);
  expect_same("y", &y, &y0);
  OK(pylora_embedding_backward(ids, &dy, &dW));
  pylora_ref_embedding_backward(ids, &dy, &dW0);
  expect_same("dW", &dW, &dW0);
}

/* exp within 2 ulp from where it underflows to where it overflows, and what it does at the ends. */
static void exponential(void) {
  enum { N = 4099 };
  static float x[N], y[N];
  const pylora_kernels *K = pylora_table();
  double worst = 0;
  for (int c = 0; c < 100; c++) {
    for (int i = 0; i < N; i++) x[i] = c % 2 ? 100 * uniform() - 6 : uniform();
    K->exp_scaled(N, x, 0, 1, (pylora_vec){y, NULL});
    for (int i = 0; i < N; i++) {
      const double want = exp((double)x[i]);
      if (want > FLT_MAX) {
        EXPECT(y[i] == INFINITY || y[i] == FLT_MAX, "exp(%g) = %g", x[i], y[i]);
        continue;
      }
      int e;
      frexp(fmax(want, FLT_MIN), &e);
      worst = fmax(worst, fabs(y[i] - want) / ldexp(1, e - 24));
    }
  }
  EXPECT(worst <= 2, "%g ulp", worst);
  float ends[6] = {-INFINITY, -200, INFINITY, 89, NAN, 0}, out[6];
  K->exp_scaled(6, ends, 0, 1, (pylora_vec){out, NULL});
  EXPECT(out[0] == 0 && out[1] == 0 && out[2] == INFINITY && out[3] == INFINITY && isnan(out[4]) &&
         out[5] == 1);
  for (int64_t i = 0; i < 40; i++) { /* an element has the same bits in a vector and in the tail */
    K->exp_scaled(40 - i, x + i, 0, 1, (pylora_vec){y, NULL});
    float one;
    K->exp_scaled(1, x + 39, 0, 1, (pylora_vec){&one, NULL});
    EXPECT(memcmp(&one, &y[39 - i], sizeof one) == 0);
  }
}

/* bfloat16 in or out changes nothing but how numbers are stored: the bits are those of the float32
 * operation on the widened inputs, each result rounded once. */
static void storage(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 5, 20), k = PICK(1, 2, 15, 16, 17, 63, 64, 65, 300);
    const float *w = floats(k, 1), size = (float)PICK(1, 30);
    float *rstd = floats(m, 0), *rstd0 = floats(m, 0), *dw = floats(k, 0), *dw0 = floats(k, 0);
    const input x = input_of(m, k, size), dy = input_of(m, k, 1), up = input_of(m, k, 2);
    pylora_mat y = either(m, k), z = either(m, k), y0 = matrix(m, k, 0), z0 = matrix(m, k, 0);
    OK(pylora_rms_norm_forward(&x.wide, w, 1e-5f, &y, rstd));
    OK(pylora_rms_norm_forward(&x.wide, w, 1e-5f, &y0, rstd0));
    expect_stored("normed", &y, &y0);
    EXPECT(memcmp(rstd, rstd0, (size_t)m * sizeof(float)) == 0);
    const pylora_mat dx = matrix(m, k, 1), dx0 = copy_of(&dx);
    const int add = (int)below(2);
    OK(pylora_rms_norm_backward(&dy.x, &x.x, w, rstd, &dx, add, dw));
    OK(pylora_rms_norm_backward(&dy.wide, &x.wide, w, rstd, &dx0, add, dw0));
    expect_same("dx of norm", &dx, &dx0);
    EXPECT(memcmp(dw, dw0, (size_t)k * sizeof(float)) == 0);

    OK(pylora_swiglu_forward(&x.x, &up.x, &y));
    OK(pylora_swiglu_forward(&x.wide, &up.wide, &y0));
    expect_stored("swiglu", &y, &y0);
    OK(pylora_swiglu_backward(&dy.x, &x.x, &up.x, &y, &z));
    OK(pylora_swiglu_backward(&dy.wide, &x.wide, &up.wide, &y0, &z0));
    expect_stored("dgate", &y, &y0);
    expect_stored("dup", &z, &z0);
    OK(pylora_swiglu_backward(&dy.x, &x.x, &up.x, &x.x, &up.x)); /* in place */
    if (x.x.b) expect_stored("dgate in gate", &x.x, &y0);
    if (up.x.b) expect_stored("dup in up", &up.x, &z0);
    for (int64_t i = 0; i < m && dy.x.b; i++) { /* a row alone, and y in gate */
      pylora_mat a = dy.x, b = widened(&dy.x);
      a.b += i * a.ld, a.rows = 1;
      b.p += i * b.ld, b.rows = 1;
      pylora_mat one = matrix(1, k, 0);
      OK(pylora_swiglu_forward(&b, &b, &one));
      OK(pylora_swiglu_forward(&a, &a, &a));
      expect_stored("a row alone", &a, &one);
    }

    const int64_t D = PICK(2, 6, 32, 34, 64), heads = PICK(1, 3), n = 12;
    const input q = input_of(m, heads * D, 1);
    const pylora_mat cosines = matrix(n, D / 2, 1), sines = matrix(n, D / 2, 1);
    const pylora_mat r = either(m, heads * D), r0 = matrix(m, heads * D, 0);
    const int64_t *position = ids_below(m, n);
    const int layout = (int)below(2), inverse = (int)below(2);
    OK(pylora_rope(&q.x, &cosines, &sines, position, (int32_t)D, layout, inverse, &r));
    OK(pylora_rope(&q.wide, &cosines, &sines, position, (int32_t)D, layout, inverse, &r0));
    expect_stored("rope", &r, &r0);
    OK(pylora_rope(&q.x, &cosines, &sines, position, (int32_t)D, layout, inverse, &q.x));
    expect_stored("rope in place", &q.x, &r0);
    release();
  }
  /* Operations that take float32 only say so. */
  const pylora_mat x = matrix(2, 4, 1), b = rounded(&x);
  float w[4] = {0}, rstd[2];
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_rms_norm_backward(&x, &x, w, rstd, &b, 0, NULL));
}

/* Rounding at the edges: ties, subnormal numbers, the largest one, infinity, NaN; in vectors and tails. */
static void rounding(void) {
  enum { N = 37 };
  const uint32_t edge[] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x00000001, 0x00007fff,
                           0x00008000, 0x00018000, 0x007fffff, 0x807fffff, 0x80000000, 0x7f7fffff,
                           0xff7fffff, 0x7f800000, 0xff800000, 0x7f800001, 0xffffffff, 0x7fc00000};
  const pylora_kernels *K = pylora_table();
  float x[N], one[N];
  uint16_t y[N + 1];
  for (int64_t n = 1; n <= N; n++) {
    for (int64_t i = 0; i < N; i++) {
      const uint32_t u = edge[below(sizeof edge / sizeof *edge)];
      memcpy(&x[i], &u, 4);
      one[i] = 1;
    }
    y[n] = 0x1234;
    K->rms_forward(n, x, one, 1, (pylora_vec){NULL, y});
    for (int64_t i = 0; i < n; i++)
      EXPECT(isnan(x[i]) ? isnan(from_bf16(y[i])) : y[i] == bf16(x[i]), "%a is %04x", (double)x[i],
             y[i]);
    EXPECT(y[n] == 0x1234);
  }
}

int main(void) {
  each_setup(rms_norm);
  each_setup(rope);
  each_setup(swiglu);
  each_setup(storage);
  each_setup(rounding);
  each_setup(embedding);
  each_setup(exponential);
  return finish("test_transformer");
}
