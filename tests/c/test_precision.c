/* LoRA linear over weights in bfloat16: numbers that bfloat16 holds give what float32 would, up to the
 * sums; other numbers give the same bits as their rounded selves. */
#include "check.h"

static pylora_mat widened_rounded(const pylora_mat *a) {
  const pylora_mat r = rounded(a);
  return widened(&r);
}

static void one_case(void) {
  const int64_t m = PICK(0, 1, 2, 3, 13, 70), k = PICK(1, 2, 31, 64, 97, 1030),
                d = PICK(1, 5, 32, 65, 600), r = PICK(1, 8, 35);
  char shape[64];
  snprintf(shape, sizeof shape, " m%d k%d d%d r%d", (int)m, (int)k, (int)d, (int)r);
  strcat(context, shape);
  const pylora_mat rawx = matrix(m, k, 1), rawW = matrix(d, k, 1), rawdy = matrix(m, d, 1);
  const pylora_mat rawA = matrix(r, k, 1), rawB = matrix(d, r, 1), res = matrix(m, d, 2);
  const pylora_mat x = widened_rounded(&rawx), W = widened_rounded(&rawW),
                   dy = widened_rounded(&rawdy), A = widened_rounded(&rawA),
                   B = widened_rounded(&rawB);
  const pylora_mat ax = abs_of(&x), aW = abs_of(&W), ady = abs_of(&dy), aA = abs_of(&A),
                   aB = abs_of(&B), ares = abs_of(&res);
  const pylora_mat x16 = rounded(&x), dy16 = rounded(&dy), W16 = rounded(&W);
  const pylora_lora l = {r, A.p, A.ld, B.p, B.ld, 0.5f, NULL, NULL},
                    al = {r, aA.p, aA.ld, aB.p, aB.ld, 0.5f, NULL, NULL};
  pylora_packed P, P16;
  const size_t size = pylora_pack_bytes(PYLORA_BF16, d, k);
  OK(pylora_pack(PYLORA_BF16, &rawW, bytes_of(size), &P));
  OK(pylora_pack(PYLORA_BF16, &W16, bytes_of(size), &P16));
  EXPECT(memcmp(P.data, P16.data, size) == 0, "packed from float32 and from bfloat16");
  const pylora_mat back = matrix(d, k, 0);
  OK(pylora_unpack(&P, &back));
  expect_same("unpacked", &back, &W);
  if (d > 1) {
    const int64_t ids[2] = {d - 1, 0};
    const pylora_mat rows = matrix(2, k, 0), last = row_of(&W, d - 1), got = row_of(&rows, 0);
    OK(pylora_embedding_forward(ids, 2, &P, &rows));
    expect_same("an embedding's row", &got, &last);
  }
  const size_t bytes = pylora_lora_workspace(m, d, k, r);
  void *ws = bytes_of(bytes);

  const pylora_mat y = matrix(m, d, 0), y0 = matrix(m, d, 0), ymag = matrix(m, d, 0);
  const pylora_mat h = matrix(m, r, 0), h0 = matrix(m, r, 0), hmag = matrix(m, r, 0);
  pylora_ref_lora_forward(&x, &W, NULL, &l, &res, &y0, &h0);
  pylora_ref_lora_forward(&ax, &aW, NULL, &al, &ares, &ymag, &hmag);
  OK(pylora_lora_forward(&x16, &P, NULL, &l, &res, &y, &h, ws, bytes));
  expect_near("h", &h, &h0, &hmag, (double)k + 4);
  expect_near("y", &y, &y0, &ymag, (double)(k + r) + 12);
  const pylora_mat again = matrix(m, d, 0), h2 = matrix(m, r, 0);
  OK(pylora_lora_forward(&rawx, &P, NULL, &l, &res, &again, &h2, ws, bytes));
  expect_same("y of numbers that are rounded on the way", &again, &y);
  pylora_mat y16 = rounded(&res);
  OK(pylora_lora_forward(&x16, &P, NULL, &l, &res, &y16, &h2, ws, bytes));
  expect_rounded("y in bfloat16", &y16, &y);
  for (int64_t i = 0; i < m; i++) {
    pylora_mat xi = x16, yi = row_of(&y, i);
    const pylora_mat one = matrix(1, d, 0), h1 = matrix(1, r, 0), ri = row_of(&res, i);
    xi.rows = 1, xi.b += i * xi.ld;
    OK(pylora_lora_forward(&xi, &P, NULL, &l, &ri, &one, &h1, ws, bytes));
    expect_same("a row of y alone", &one, &yi);
  }

  const pylora_mat dx = matrix(m, k, 0), dx0 = matrix(m, k, 0), dxmag = matrix(m, k, 0);
  const pylora_mat dA = matrix(r, k, 0), dA0 = matrix(r, k, 0), dAmag = matrix(r, k, 0);
  const pylora_mat dB = matrix(d, r, 0), dB0 = matrix(d, r, 0), dBmag = matrix(d, r, 0);
  const pylora_mat ah = abs_of(&h);
  pylora_ref_lora_backward(&dy, &x, &h, &W, &l, &dx0, 0, &dA0, &dB0);
  pylora_ref_lora_backward(&ady, &ax, &ah, &aW, &al, &dxmag, 0, &dAmag, &dBmag);
  OK(pylora_lora_backward(&dy16, &x16, &h, &P, &l, &dx, 0, &dA, &dB, ws, bytes));
  expect_near("dx", &dx, &dx0, &dxmag, (double)(d + d + r) + 12);
  expect_near("dA", &dA, &dA0, &dAmag, (double)(d + m) + 12);
  expect_near("dB", &dB, &dB0, &dBmag, (double)m + 4);
  const pylora_mat dx2 = matrix(m, k, 0), dA2 = matrix(r, k, 0), dB2 = matrix(d, r, 0);
  OK(pylora_lora_backward(&dy, &x, &h, &P, &l, &dx2, 0, &dA2, &dB2, ws, bytes));
  expect_same("dx by storage", &dx, &dx2);
  expect_same("dA by storage", &dA, &dA2);
  expect_same("dB by storage", &dB, &dB2);
  pylora_mat dx16 = rounded(&dx0);
  OK(pylora_lora_backward(&dy16, NULL, NULL, &P, &l, &dx16, 0, NULL, NULL, ws, bytes));
  expect_rounded("dx in bfloat16", &dx16, &dx);
  if (m)
    EXPECT_STATUS(PYLORA_E_UNSUPPORTED,
                  pylora_lora_backward(&dy16, NULL, NULL, &P, &l, &dx16, 1, NULL, NULL, ws, bytes));
}

static void cases(void) {
  char setup[sizeof context];
  strcpy(setup, context);
  for (int i = 0; i < 40; i++) {
    strcpy(context, setup);
    one_case();
    release();
  }
}

int main(void) {
  each_setup(cases);
  return finish("test_precision");
}
