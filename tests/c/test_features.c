/* What families have beside Llama's operations: LayerNorm, activations, soft caps, parts of heads that are
 * rotated, and the choice of experts. */
#include "check.h"
#include "runtime/internal.h"

/* Roundings of tanh and of the normal distribution's function: two exponentials and a quotient. */
enum { TANH = 2 * EXP, NORMAL = 2 * EXP + 8 };

static void layer_norm(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 3, 20), k = PICK(1, 2, 15, 16, 17, 63, 64, 65, 300);
    const pylora_mat x = matrix(m, k, 3), dy = matrix(m, k, 1), y = matrix(m, k, 0),
                     y0 = matrix(m, k, 0), mag = matrix(m, k, 0);
    const float *w = floats(k, 1), *b = below(2) ? floats(k, 1) : NULL, eps = 1e-2f;
    float *rstd = floats(m, 0), *rstd0 = floats(m, 0);
    OK(pylora_layer_norm_forward(&x, w, b, eps, &y, rstd));
    pylora_ref_layer_norm_forward(&x, w, b, eps, &y0, rstd0);
    /* The mean is off by gamma_k of mean |x|, and so is each x - mean; rstd by what that does to the variance. */
    const pylora_mat dx = matrix(m, k, 1), dx0 = copy_of(&dx), back = abs_of(&dx);
    for (int64_t i = 0; i < m; i++) {
      double size = 0, most = 0, along = 0, r = rstd0[i];
      for (int64_t j = 0; j < k; j++) {
        size += fabs((double)*el(&x, i, j)) / (double)k;
        most = fmax(most, fabs((double)*el(&dy, i, j) * w[j]));
      }
      for (int64_t j = 0; j < k; j++) along = fmax(along, r * (fabs((double)*el(&x, i, j)) + size));
      EXPECT(fabs(rstd[i] - r) <= 4 * gamma_n((double)k + 8) * r * (1 + along * r * size), "rstd");
      for (int64_t j = 0; j < k; j++) {
        const double n = r * (fabs((double)*el(&x, i, j)) + size);
        *el(&mag, i, j) = (float)(fabs(w[j]) * n * (2 + along * r * size) + (b ? fabs(b[j]) : 0));
        *el(&back, i, j) += (float)(r * most * (2 + 4 * n * along) * (1 + along));
      }
    }
    expect_near("y", &y, &y0, &mag, 4 * (double)k + 30);
    for (int64_t i = 0; i < m; i++) {
      const pylora_mat x1 = row_of(&x, i), y1 = matrix(1, k, 0), yi = row_of(&y, i);
      float one;
      OK(pylora_layer_norm_forward(&x1, w, b, eps, &y1, &one));
      expect_same("row of y alone", &y1, &yi);
      EXPECT(one == rstd[i]);
    }
    const pylora_mat inplace = copy_of(&x);
    OK(pylora_layer_norm_forward(&inplace, w, b, eps, &inplace, rstd));
    expect_same("y in x", &inplace, &y);
    const int add = (int)below(2);
    OK(pylora_layer_norm_backward(&dy, &x, w, rstd0, &dx, add));
    pylora_ref_layer_norm_backward(&dy, &x, w, rstd0, &dx0, add);
    expect_near("dx", &dx, &dx0, &back, 4 * (double)k + 40);
    const pylora_mat same = copy_of(&dy), plain = matrix(m, k, 0);
    OK(pylora_layer_norm_backward(&dy, &x, w, rstd0, &plain, 0));
    OK(pylora_layer_norm_backward(&same, &x, w, rstd0, &same, 0));
    expect_same("dx in dy", &same, &plain);
    release();
  }
}

/* Magnitudes: act(x) to a few roundings of itself, its slope to those of its parts. */
static void activations(void) {
  for (int c = 0; c < 40; c++) {
    const int64_t m = PICK(0, 1, 7), n = PICK(1, 15, 16, 33, 200);
    const int kind = c % 4, gated = (int)below(2);
    const pylora_mat x = matrix(m, n, (float)PICK(1, 4, 20, 200)), up = matrix(m, n, 1),
                     dy = matrix(m, n, 1), y = matrix(m, n, 0), y0 = matrix(m, n, 0),
                     dx = matrix(m, n, 0), dx0 = matrix(m, n, 0), dup = matrix(m, n, 0),
                     dup0 = matrix(m, n, 0), mag = matrix(m, n, 0);
    const pylora_mat *u = gated ? &up : NULL;
    OK(pylora_activation_forward(kind, &x, u, &y));
    OK(pylora_activation_backward(kind, &dy, &x, u, &dx, gated ? &dup : NULL));
    pylora_ref_activation_forward(kind, &x, u, &y0);
    pylora_ref_activation_backward(kind, &dy, &x, u, &dx0, &dup0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        const double v = *el(&x, i, j),
                     d = fabs(*el(&dy, i, j)) * (gated ? fabs(*el(&up, i, j)) : 1);
        const double reach = fmin(fabs(v), 15); /* beyond it one of the sigmoids is 0 */
        *el(&mag, i, j) = (float)(d * (kind == PYLORA_RELU2 ? 2 * fabs(v) : 2 + 4 * reach * reach));
      }
    const pylora_mat ay = abs_of(&y0), au = abs_of(&dup0);
    for (int64_t i = 0; i < m;
         i++) /* u of GELU's tanh is up to 300: a rounding of it is many of exp u */
      for (int64_t j = 0; j < n; j++) *el(&ay, i, j) += FLT_MIN, *el(&au, i, j) += FLT_MIN;
    const double off = kind == PYLORA_GELU_TANH ? 800 : NORMAL;
    expect_near("y", &y, &y0, &ay, off);
    expect_near("dx", &dx, &dx0, &mag, off);
    if (gated) expect_near("dup", &dup, &dup0, &au, off);
    if (gated && kind == PYLORA_SILU) {
      const pylora_mat z = matrix(m, n, 0);
      OK(pylora_swiglu_forward(&x, &up, &z));
      expect_same("SwiGLU", &z, &y);
    }
    const pylora_mat z = copy_of(&x), g = copy_of(&x), p = copy_of(&up);
    OK(pylora_activation_forward(kind, &z, u, &z));
    expect_same("y in x", &z, &y);
    OK(pylora_activation_backward(kind, &dy, &g, gated ? &p : NULL, &g, gated ? &p : NULL));
    expect_same("dx in x", &g, &dx);
    if (gated) expect_same("dup in up", &p, &dup);
    for (int64_t i = 0; i < n && m; i++) { /* an element has the same bits wherever it lies */
      pylora_mat one = x, to = matrix(1, 1, 0), at = y;
      one.p += i, one.rows = one.cols = 1, at.p += i, at.rows = at.cols = 1;
      pylora_mat up1 = up;
      up1.p += i, up1.rows = up1.cols = 1;
      OK(pylora_activation_forward(kind, &one, gated ? &up1 : NULL, &to));
      expect_same("an element alone", &to, &at);
    }
    release();
  }
}

/* Numbers at the ends, as in C's own functions: no slope is NaN where x is finite. */
static void ends(void) {
  float x[] = {0, -0.0f, 1e-30f, 30, -30, 1e20f, -1e20f, FLT_MAX, -FLT_MAX, -14, INFINITY, NAN};
  enum { N = sizeof x / sizeof *x };
  float y[N], dx[N], one[N];
  for (int i = 0; i < N; i++) one[i] = 1;
  const pylora_mat X = {x, 1, N, N, NULL, NULL}, Y = {y, 1, N, N, NULL, NULL},
                   DX = {dx, 1, N, N, NULL, NULL}, O = {one, 1, N, N, NULL, NULL};
  for (int kind = 0; kind < 4; kind++) {
    OK(pylora_activation_forward(kind, &X, NULL, &Y));
    OK(pylora_activation_backward(kind, &O, &X, NULL, &DX, NULL));
    for (int i = 0; i < N - 2; i++) {
      EXPECT(!isnan(y[i]) && !isnan(dx[i]), "%d at %g: %g, %g", kind, x[i], y[i], dx[i]);
      if (kind != PYLORA_RELU2 && x[i] >= 30) EXPECT(y[i] == x[i] && dx[i] == 1);
      if (x[i] <= (kind == PYLORA_SILU ? -200 : -30))
        EXPECT(y[i] == 0 && dx[i] == 0, "%d at %g: %g, %g", kind, x[i], y[i], dx[i]);
    }
    EXPECT(y[N - 2] == INFINITY && isnan(y[N - 1]) && isnan(dx[N - 1]));
  }
  OK(pylora_soft_cap_forward(&X, 1, 5, &Y));
  for (int i = 0; i < N - 1; i++) {
    const float want = (float)(5 * tanh((double)x[i] / 5));
    EXPECT(fabsf(y[i] - want) <= 16 * U * fabsf(want), "cap of %g", x[i]);
  }
  EXPECT(isnan(y[N - 1]));
}

static void caps(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 7), n = PICK(1, 15, 16, 33, 200);
    const float size = (float)PICK(1, 10, 100), by = (float)PICK(1, 3) / 2,
                cap = (float)PICK(0, 1, 30);
    const pylora_mat x = matrix(m, n, size), dy = matrix(m, n, 1), y = matrix(m, n, 0),
                     y0 = matrix(m, n, 0), dx = matrix(m, n, 0), dx0 = matrix(m, n, 0);
    OK(pylora_soft_cap_forward(&x, by, cap, &y));
    pylora_ref_soft_cap_forward(&x, by, cap, &y0);
    const pylora_mat ay = abs_of(&y0), ad = abs_of(&dy);
    expect_near("capped", &y, &y0, &ay, TANH);
    OK(pylora_soft_cap_backward(&dy, &y0, by, cap, &dx));
    pylora_ref_soft_cap_backward(&dy, &y0, by, cap, &dx0);
    expect_near("dx of cap", &dx, &dx0, &ad, 12);
    const pylora_mat z = copy_of(&x), g = copy_of(&dy);
    OK(pylora_soft_cap_forward(&z, by, cap, &z));
    expect_same("y in x", &z, &y);
    OK(pylora_soft_cap_backward(&g, &y0, by, cap, &g));
    expect_same("dx in dy", &g, &dx);
    release();
  }
}

/* Parts of heads: in float32 the reference's numbers, in bfloat16 those rounded once; and back again. */
static void parts(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 9), D = PICK(2, 7, 32, 34, 64), heads = PICK(1, 3), n = 12;
    const int64_t half = 1 + below(D / 2);
    const pylora_mat cosines = matrix(n, half, 1), sines = matrix(n, half, 1);
    const input x = input_of(m, heads * D, 1);
    const pylora_mat y = either(m, heads * D), y0 = matrix(m, heads * D, 0),
                     mag = matrix(m, heads * D, 0);
    const int64_t *position = ids_below(m, n);
    const int layout = (int)below(2), inverse = (int)below(2);
    fill(&mag, 2);
    OK(pylora_rope(&x.wide, &cosines, &sines, position, (int32_t)D, layout, inverse, &y0));
    const pylora_mat want = matrix(m, heads * D, 0);
    pylora_ref_rope(&x.wide, &cosines, &sines, position, (int32_t)D, layout, inverse, &want);
    expect_near("part", &y0, &want, &mag, 2);
    OK(pylora_rope(&x.x, &cosines, &sines, position, (int32_t)D, layout, inverse, &y));
    expect_stored("part, stored", &y, &y0);
    OK(pylora_rope(&x.x, &cosines, &sines, position, (int32_t)D, layout, inverse, &x.x));
    expect_stored("part, in place", &x.x, &y0);
    release();
  }
}

/* bfloat16 changes how numbers are stored and nothing else. */
static void storage(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 5, 20), k = PICK(1, 2, 15, 16, 17, 63, 64, 65, 300, 700);
    const float *w = floats(k, 1), *b = floats(k, 1);
    float *rstd = floats(m, 0), *rstd0 = floats(m, 0);
    const int kind = (int)below(4), add = (int)below(2);
    const input x = input_of(m, k, 3), dy = input_of(m, k, 1), up = input_of(m, k, 2);
    const pylora_mat y = either(m, k), z = either(m, k), y0 = matrix(m, k, 0), z0 = matrix(m, k, 0);
    OK(pylora_layer_norm_forward(&x.x, w, b, 1e-5f, &y, rstd));
    OK(pylora_layer_norm_forward(&x.wide, w, b, 1e-5f, &y0, rstd0));
    expect_stored("normed", &y, &y0);
    EXPECT(memcmp(rstd, rstd0, (size_t)m * sizeof(float)) == 0);
    const pylora_mat dx = matrix(m, k, 1), dx0 = copy_of(&dx);
    OK(pylora_layer_norm_backward(&dy.x, &x.x, w, rstd, &dx, add));
    OK(pylora_layer_norm_backward(&dy.wide, &x.wide, w, rstd, &dx0, add));
    expect_same("dx of norm", &dx, &dx0);
    OK(pylora_activation_forward(kind, &x.x, NULL, &y));
    OK(pylora_activation_forward(kind, &x.wide, NULL, &y0));
    expect_stored("act", &y, &y0);
    OK(pylora_activation_backward(kind, &dy.x, &x.x, &up.x, &y, &z));
    OK(pylora_activation_backward(kind, &dy.wide, &x.wide, &up.wide, &y0, &z0));
    expect_stored("dx", &y, &y0);
    expect_stored("dup", &z, &z0);
    OK(pylora_activation_forward(kind, &x.wide, &up.wide, &y0));
    OK(pylora_activation_forward(kind, &x.x, &up.x, &up.x)); /* in place */
    expect_stored("product in up", &up.x, &y0);
    release();
  }
}

static void experts(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 9), n = PICK(1, 2, 8, 17, 128), k = 1 + below(n < 8 ? n : 8);
    const int normalize = (int)below(2);
    const pylora_mat x = matrix(m, n, 3), p = matrix(m, n, 0), p0 = matrix(m, n, 0),
                     w = matrix(m, k, 0), w0 = matrix(m, k, 0);
    for (int64_t i = 0; i < m; i++) /* ties */
      for (int64_t j = 0; j < n; j++) *el(&x, i, j) = floorf(*el(&x, i, j) * 4) / 4;
    int64_t *chosen = ids_below(m * k, 1), *chosen0 = ids_below(m * k, 1);
    OK(pylora_choose(&x, k, normalize, &p, chosen, &w));
    pylora_ref_choose(&x, k, normalize, &p0, chosen0, &w0);
    const pylora_mat ap = abs_of(&p0), aw = abs_of(&w0);
    expect_near("p", &p, &p0, &ap, (double)n + 2 * EXP + 8);
    expect_near("weights", &w, &w0, &aw, 2 * (double)n + 4 * EXP + 30);
    EXPECT(memcmp(chosen, chosen0, (size_t)(m * k) * sizeof *chosen) == 0, "chosen");
    const pylora_mat same = copy_of(&x);
    OK(pylora_choose(&same, k, normalize, &same, chosen0, &w0));
    expect_same("p in logits", &same, &p);
    expect_same("weights again", &w0, &w);
    release();
  }
  float x[4] = {1, NAN, 3, 2}, p[4], w[2];
  int64_t chosen[2];
  const pylora_mat X = {x, 1, 4, 4, NULL, NULL}, P = {p, 1, 4, 4, NULL, NULL},
                   W = {w, 1, 2, 2, NULL, NULL};
  OK(pylora_choose(&X, 2, 1, &P, chosen, &W)); /* no number, but experts that there are */
  EXPECT(chosen[0] == 0 && chosen[1] == 1 && isnan(w[0]) && isnan(w[1]));
}

int main(void) {
  each_setup(layer_norm);
  each_setup(activations);
  each_setup(ends);
  each_setup(caps);
  each_setup(parts);
  each_setup(storage);
  each_setup(experts);
  return finish("test_features");
}
