/* What families have that Llama has not: LayerNorm, activations, caps, and heads that are rotated in part. */
#include "check.h"
#include "runtime/internal.h"

static void layer_norm(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 7), k = PICK(1, 2, 15, 16, 33, 200);
    const pylora_mat x = matrix(m, k, 3), dy = matrix(m, k, 1), y = matrix(m, k, 0),
                     y0 = matrix(m, k, 0), mag = matrix(m, k, 0);
    const float *w = floats(k, 1), *b = below(2) ? floats(k, 1) : NULL, eps = 1e-3f;
    float *rstd = floats(m, 0), *rstd0 = floats(m, 0);
    OK(pylora_layer_norm_forward(&x, w, b, eps, &y, rstd));
    pylora_ref_layer_norm_forward(&x, w, b, eps, &y0, rstd0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < k; j++) /* what is centred and what is added, before they cancel */
        *el(&mag, i, j) = fabsf(*el(&y0, i, j)) + 2 * (b ? fabsf(b[j]) : 0) + 1e-3f;
    const pylora_mat r = column(rstd, m), r0 = column(rstd0, m);
    expect_near("y", &y, &y0, &mag, 8);
    expect_near("rstd", &r, &r0, &r0, 4);
    const pylora_mat inplace = copy_of(&x);
    OK(pylora_layer_norm_forward(&inplace, w, b, eps, &inplace, rstd));
    expect_same("y in x", &inplace, &y);

    const int add = (int)below(2);
    const pylora_mat dx = matrix(m, k, 1), dx0 = copy_of(&dx), dmag = abs_of(&dx);
    for (int64_t i = 0; i < m; i++) {
      double most = 0;
      for (int64_t j = 0; j < k; j++) most += fabs((double)*el(&dy, i, j) * w[j]);
      for (int64_t j = 0; j < k; j++)
        *el(&dmag, i, j) += (float)(rstd0[i] * most * (double)(2 + k) + 1e-3);
    }
    OK(pylora_layer_norm_backward(&dy, &x, w, rstd0, &dx, add));
    pylora_ref_layer_norm_backward(&dy, &x, w, rstd0, &dx0, add);
    expect_near("dx", &dx, &dx0, &dmag, 8);
    release();
  }
}

static void activations(void) {
  for (int c = 0; c < 40; c++) {
    const int64_t m = PICK(0, 1, 7), n = PICK(1, 15, 16, 33, 200);
    const int kind = c % 4, gated = (int)below(2);
    const float size = (float)PICK(1, 3);
    const pylora_mat x = matrix(m, n, size), up = matrix(m, n, 1), dy = matrix(m, n, 1);
    const pylora_mat y = matrix(m, n, 0), y0 = matrix(m, n, 0), dx = matrix(m, n, 0),
                     dx0 = matrix(m, n, 0), du = matrix(m, n, 0), du0 = matrix(m, n, 0);
    const pylora_mat *u = gated ? &up : NULL;
    OK(pylora_activation_forward(kind, &x, u, &y));
    OK(pylora_activation_backward(kind, &dy, &x, u, &dx, gated ? &du : NULL));
    pylora_ref_activation_forward(kind, &x, u, &y0);
    pylora_ref_activation_backward(kind, &dy, &x, u, &dx0, gated ? &du0 : NULL);
    const pylora_mat mag = matrix(m, n, 0), dmag = matrix(m, n, 0), umag = matrix(m, n, 0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) { /* the argument of exp is off by some roundings of itself */
        const double v = fabs(*el(&x, i, j)), more = 1 + v * v * v;
        const double g = gated ? fabs(*el(&up, i, j)) : 1;
        *el(&mag, i, j) = (float)(fabs(*el(&y0, i, j)) * more + 1e-30);
        *el(&dmag, i, j) = (float)(fabs(*el(&dy, i, j)) * g * (1 + v) * more);
        *el(&umag, i, j) = (float)(fabs(*el(&dy, i, j)) * v * more);
      }
    expect_near("y", &y, &y0, &mag, 24);
    expect_near("dx", &dx, &dx0, &dmag, 48);
    if (gated) expect_near("dup", &du, &du0, &umag, 24);
    const pylora_mat z = copy_of(&x);
    OK(pylora_activation_forward(kind, &z, u, &z));
    expect_same("y in x", &z, &y);
    const pylora_mat px = copy_of(&x), pu = copy_of(&up);
    OK(pylora_activation_backward(kind, &dy, &px, gated ? &pu : NULL, &px, gated ? &pu : NULL));
    expect_same("dx in x", &px, &dx);
    if (gated) expect_same("dup in up", &pu, &du);
    release();
  }
  const pylora_mat x = matrix(1, 3, 1);
  EXPECT(pylora_activation_forward(4, &x, NULL, &x) == PYLORA_E_VALUE);
  EXPECT(pylora_activation_forward(-1, &x, NULL, &x) == PYLORA_E_VALUE);
  EXPECT(pylora_activation_backward(0, &x, &x, &x, &x, NULL) == PYLORA_E_NULL);
  release();
}

static void caps(void) {
  for (int c = 0; c < 20; c++) {
    const int64_t m = PICK(0, 1, 7), n = PICK(1, 15, 16, 33, 200);
    const float cap = (float)PICK(0, 1, 30), times = 0.7f;
    const pylora_mat x = matrix(m, n, 20), y = matrix(m, n, 0), y0 = matrix(m, n, 0);
    const pylora_mat dy = matrix(m, n, 1), dx = matrix(m, n, 0), dx0 = matrix(m, n, 0);
    OK(pylora_soft_cap_forward(&x, times, cap, &y));
    pylora_ref_soft_cap_forward(&x, times, cap, &y0);
    const pylora_mat mag = abs_of(&y0), dmag = abs_of(&dy);
    expect_near("y", &y, &y0, &mag, 40);
    OK(pylora_soft_cap_backward(&dy, &y0, times, cap, &dx));
    pylora_ref_soft_cap_backward(&dy, &y0, times, cap, &dx0);
    expect_near("dx", &dx, &dx0, &dmag, 8);
    release();
  }
  const pylora_mat x = matrix(1, 3, 1);
  EXPECT(pylora_soft_cap_forward(&x, 1, -1, &x) == PYLORA_E_VALUE);
  EXPECT(pylora_soft_cap_forward(&x, 1, NAN, &x) == PYLORA_E_VALUE);
  release();
}

static void part_of_a_head(void) {
  for (int c = 0; c < 10; c++) {
    const int64_t m = PICK(1, 9), D = PICK(6, 32, 64), half = 1 + below(D / 2), n = 12;
    const pylora_mat x = matrix(m, 2 * D, 1), cosines = matrix(n, half, 1),
                     sines = matrix(n, half, 1);
    const pylora_mat y = matrix(m, 2 * D, 0), y0 = matrix(m, 2 * D, 0), mag = matrix(m, 2 * D, 0);
    const int64_t *position = ids_below(m, n);
    fill(&mag, 2);
    for (int layout = 0; layout < 2; layout++) {
      OK(pylora_rope(&x, &cosines, &sines, position, (int32_t)D, layout, 0, &y));
      pylora_ref_rope(&x, &cosines, &sines, position, (int32_t)D, layout, 0, &y0);
      expect_near("y", &y, &y0, &mag, 2);
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 2 * half; j < D; j++) EXPECT(*el(&y, i, D + j) == *el(&x, i, D + j));
      const pylora_mat same = copy_of(&x);
      OK(pylora_rope(&same, &cosines, &sines, position, (int32_t)D, layout, 0, &same));
      expect_same("y in x", &same, &y);
    }
    const pylora_mat wide = matrix(n, D / 2 + 1, 1);
    EXPECT(pylora_rope(&x, &wide, &wide, position, (int32_t)D, 0, 0, &y) == PYLORA_E_SHAPE);
    release();
  }
}

int main(void) {
  each_setup(layer_norm);
  each_setup(activations);
  each_setup(caps);
  each_setup(part_of_a_head);
  return finish("test_features");
}
