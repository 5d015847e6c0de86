/* LoRA linear over float32 weights in two bfloat16 halves: near float32, by the bound of format_x3.c;
 * the same bits for a row alone, and for x and dy in bfloat16 as for the same numbers in float32. */
#include "check.h"

/* (3 + 2^-6) 2^-16 of each product, in units of U: what the halves leave out. */
enum { HALVES = 3 * 256 + 4 };

static void one_case(void) {
  const int64_t m = PICK(0, 1, 13, 35), k = PICK(1, 31, 97, 1030), d = PICK(1, 32, 65, 600),
                r = PICK(1, 8, 35);
  char shape[64];
  snprintf(shape, sizeof shape, " m%d k%d d%d r%d", (int)m, (int)k, (int)d, (int)r);
  strcat(context, shape);
  const pylora_mat x = matrix(m, k, 1), W = matrix(d, k, 1), dy = matrix(m, d, 1);
  const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, 1), res = matrix(m, d, 2);
  const pylora_mat ax = abs_of(&x), aW = abs_of(&W), ady = abs_of(&dy), aA = abs_of(&A),
                   aB = abs_of(&B), ares = abs_of(&res);
  const pylora_lora l = {r, A.p, A.ld, B.p, B.ld, 0.5f, NULL, NULL},
                    al = {r, aA.p, aA.ld, aB.p, aB.ld, 0.5f, NULL, NULL};
  pylora_packed P;
  OK(pylora_pack(PYLORA_F32X3, &W, bytes_of(pylora_pack_bytes(PYLORA_F32X3, d, k)), &P));
  const pylora_mat back = matrix(d, k, 0);
  OK(pylora_unpack(&P, &back));
  for (int64_t i = 0; i < d; i++)
    for (int64_t j = 0; j < k; j++) {
      const float w = *el(&W, i, j), high = from_bf16(bf16(w)),
                  want = high + from_bf16(bf16(w - high));
      EXPECT(*el(&back, i, j) == want, "unpacked %.9g of %.9g", (double)*el(&back, i, j),
             (double)w);
      EXPECT(fabs((double)want - w) <= 0x1p-16 * fabs((double)w), "halves of %.9g", (double)w);
    }
  const size_t bytes = pylora_lora_workspace(m, d, k, r);
  void *ws = bytes_of(bytes);

  const pylora_mat y = matrix(m, d, 0), y0 = matrix(m, d, 0), ymag = matrix(m, d, 0);
  const pylora_mat h = matrix(m, r, 0), h0 = matrix(m, r, 0), hmag = matrix(m, r, 0);
  pylora_ref_lora_forward(&x, &W, NULL, NULL, NULL, &y0, NULL);
  pylora_ref_lora_forward(&ax, &aW, NULL, NULL, NULL, &ymag, NULL);
  OK(pylora_lora_forward(&x, &P, NULL, NULL, NULL, &y, NULL, ws, bytes));
  expect_near("y of W alone", &y, &y0, &ymag, (double)(3 * k) + 8 + HALVES);
  pylora_ref_lora_forward(&x, &W, NULL, &l, &res, &y0, &h0);
  pylora_ref_lora_forward(&ax, &aW, NULL, &al, &ares, &ymag, &hmag);
  OK(pylora_lora_forward(&x, &P, NULL, &l, &res, &y, &h, ws, bytes));
  expect_near("h", &h, &h0, &hmag, (double)k + 4); /* float32, as the adapter is */
  expect_near("y", &y, &y0, &ymag, (double)(3 * k + r) + 12 + HALVES);
  for (int64_t i = 0; i < m; i++) {
    const pylora_mat xi = row_of(&x, i), yi = row_of(&y, i), ri = row_of(&res, i);
    const pylora_mat one = matrix(1, d, 0), h1 = matrix(1, r, 0);
    OK(pylora_lora_forward(&xi, &P, NULL, &l, &ri, &one, &h1, ws, bytes));
    expect_same("a row of y alone", &one, &yi);
  }

  const pylora_mat dx = matrix(m, k, 0), dx0 = matrix(m, k, 0), dxmag = matrix(m, k, 0);
  const pylora_mat dA = matrix(r, k, 0), dA0 = matrix(r, k, 0), dAmag = matrix(r, k, 0);
  const pylora_mat dB = matrix(d, r, 0), dB0 = matrix(d, r, 0), dBmag = matrix(d, r, 0);
  const pylora_mat ah = abs_of(&h);
  pylora_ref_lora_backward(&dy, &x, &h, &W, NULL, &dx0, 0, NULL, NULL);
  pylora_ref_lora_backward(&ady, &ax, &ah, &aW, NULL, &dxmag, 0, NULL, NULL);
  OK(pylora_lora_backward(&dy, &x, NULL, &P, NULL, &dx, 0, NULL, NULL, ws, bytes));
  expect_near("dx of W alone", &dx, &dx0, &dxmag, (double)(3 * d) + 8 + HALVES);
  pylora_ref_lora_backward(&dy, &x, &h, &W, &l, &dx0, 0, &dA0, &dB0);
  pylora_ref_lora_backward(&ady, &ax, &ah, &aW, &al, &dxmag, 0, &dAmag, &dBmag);
  OK(pylora_lora_backward(&dy, &x, &h, &P, &l, &dx, 0, &dA, &dB, ws, bytes));
  expect_near("dx", &dx, &dx0, &dxmag, (double)(4 * d + r) + 12 + HALVES);
  expect_near("dA", &dA, &dA0, &dAmag, (double)(d + m) + 12);
  expect_near("dB", &dB, &dB0, &dBmag, (double)m + 4);
  for (int64_t i = 0; i < m; i++) {
    const pylora_mat dyi = row_of(&dy, i), dxi = row_of(&dx, i), one = matrix(1, k, 0);
    OK(pylora_lora_backward(&dyi, NULL, NULL, &P, &l, &one, 0, NULL, NULL, ws, bytes));
    expect_same("a row of dx alone", &one, &dxi);
  }

  const pylora_mat x16 = rounded(&x), dy16 = rounded(&dy), xw = widened(&x16), dyw = widened(&dy16);
  const pylora_mat y2 = matrix(m, d, 0), dx2 = matrix(m, k, 0), dA2 = matrix(r, k, 0),
                   dB2 = matrix(d, r, 0), h2 = matrix(m, r, 0);
  OK(pylora_lora_forward(&xw, &P, NULL, &l, &res, &y, &h, ws, bytes));
  OK(pylora_lora_forward(&x16, &P, NULL, &l, &res, &y2, &h2, ws, bytes));
  OK(pylora_lora_backward(&dyw, &xw, &h, &P, &l, &dx, 0, &dA, &dB, ws, bytes));
  OK(pylora_lora_backward(&dy16, &x16, &h, &P, &l, &dx2, 0, &dA2, &dB2, ws, bytes));
  expect_same("y by storage", &y, &y2);
  expect_same("h by storage", &h, &h2);
  expect_same("dx by storage", &dx, &dx2);
  expect_same("dA by storage", &dA, &dA2);
  expect_same("dB by storage", &dB, &dB2);
}

/* Numbers at the ends of the range, and those that are none. */
static void ends(void) {
  const float v[] = {FLT_MAX, -FLT_MAX, 3.3961775e38f, 0, -0.0f, 0x1p-100f, INFINITY, NAN};
  enum { N = sizeof v / sizeof *v };
  pylora_mat W = matrix(1, N, 0), back = matrix(1, N, 0);
  for (int i = 0; i < N; i++) *el(&W, 0, i) = v[i];
  pylora_packed P;
  OK(pylora_pack(PYLORA_F32X3, &W, bytes_of(pylora_pack_bytes(PYLORA_F32X3, 1, N)), &P));
  OK(pylora_unpack(&P, &back));
  for (int i = 0; i < N; i++) {
    const float got = *el(&back, 0, i);
    EXPECT(isfinite(v[i]) ? fabs((double)got - v[i]) <= 0x1p-15 * fabs((double)v[i])
           : isnan(v[i])  ? isnan(got)
                          : got == v[i],
           "%.9g came back as %.9g", (double)v[i], (double)got);
  }
}

static void cases(void) {
  char setup[sizeof context];
  strcpy(setup, context);
  for (int i = 0; i < 5; i++) {
    strcpy(context, setup);
    one_case();
    release();
  }
  strcpy(context, setup);
  ends();
}

int main(void) {
  each_setup(cases);
  return finish("test_x3");
}
