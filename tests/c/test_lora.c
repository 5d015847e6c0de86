/* LoRA linear: forward and backward against the reference, in every combination of what is optional. */
#include "check.h"
#include "ops/low_rank.h"

static void *ws;
static size_t ws_bytes;
static void workspace(int64_t m, int64_t d, int64_t k, int64_t r) {
  ws_bytes = pylora_lora_workspace(m, d, k, r);
  EXPECT(ws_bytes > 0);
  ws = bytes_of(ws_bytes);
}

static void one_case(void) {
  const int64_t m = PICK(0, 1, 2, 7, 13, 40), r = PICK(0, 1, 3, 8, 33);
  const int64_t k = PICK(1, 3, 31, 32, 33, 65), d = PICK(1, 2, 16, 32, 33, 70);
  char shape[64];
  snprintf(shape, sizeof shape, " m%d k%d d%d r%d", (int)m, (int)k, (int)d, (int)r);
  strcat(context, shape);
  const pylora_mat x = matrix(m, k, 1), W = matrix(d, k, 1), dy = matrix(m, d, 1),
                   res = matrix(m, d, 2);
  const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, 1);
  const pylora_mat aA = abs_of(&A), aB = abs_of(&B), ax = abs_of(&x), aW = abs_of(&W);
  const pylora_mat ady = abs_of(&dy), ares = abs_of(&res);
  const float *bias = below(2) ? floats(d, 1) : NULL;
  const pylora_drop drop = {0.3f, 7, 11, below(100)};
  const pylora_lora lora = {r, A.p, A.ld, B.p, B.ld, 1.7f, below(3) ? NULL : &drop, NULL};
  const pylora_lora alora = {r, aA.p, aA.ld, aB.p, aB.ld, 1.7f, lora.drop, NULL};
  const pylora_lora *l = below(5) ? &lora : NULL, *al = l ? &alora : NULL;
  const pylora_mat *residual = below(2) ? &res : NULL;
  const pylora_packed P = packed(&W);
  workspace(m, d, k, l ? r : 0);

  /* forward */
  const pylora_mat y = matrix(m, d, 0), h = matrix(m, r, 0), y0 = matrix(m, d, 0),
                   h0 = matrix(m, r, 0);
  const pylora_mat ymag = matrix(m, d, 0), hmag = matrix(m, r, 0);
  pylora_ref_lora_forward(&x, &W, bias, l, residual, &y0, &h0);
  pylora_ref_lora_forward(&ax, &aW, bias ? abs_floats(d, bias) : NULL, al, residual ? &ares : NULL,
                          &ymag, &hmag);
  OK(pylora_lora_forward(&x, &P, bias, l, residual, &y, l ? &h : NULL, ws, ws_bytes));
  if (l) expect_near("h", &h, &h0, &hmag, (double)k + 4);
  expect_near("y", &y, &y0, &ymag, (double)(k + r) + 12);
  for (int64_t i = 0; i < m; i++) { /* a row alone has the same bits */
    const pylora_mat x1 = row_of(&x, i), y1 = matrix(1, d, 0), h1 = matrix(1, r, 0),
                     yi = row_of(&y, i);
    const pylora_mat r1 = row_of(&res, i);
    pylora_drop drop1 = drop;
    drop1.row0 += i;
    pylora_lora lora1 = lora;
    if (lora.drop) lora1.drop = &drop1;
    OK(pylora_lora_forward(&x1, &P, bias, l ? &lora1 : NULL, residual ? &r1 : NULL, &y1,
                           l ? &h1 : NULL, ws, ws_bytes));
    expect_same("row of y alone", &y1, &yi);
  }
  const pylora_mat inplace = copy_of(&res); /* y may be residual */
  OK(pylora_lora_forward(&x, &P, bias, l, &inplace, &inplace, l ? &h : NULL, ws, ws_bytes));
  OK(pylora_lora_forward(&x, &P, bias, l, &res, &y, l ? &h : NULL, ws, ws_bytes));
  expect_same("y in the residual", &inplace, &y);

  /* backward */
  const int add = (int)below(2), want_dx = below(4) != 0, want_dA = l && below(4),
            want_dB = l && below(4);
  const pylora_mat dx0 = matrix(m, k, 1), dx = copy_of(&dx0), dxmag = abs_of(&dx0);
  const pylora_mat dA = matrix(r, k, 1), dB = matrix(d, r, 1), dA0 = matrix(r, k, 0),
                   dB0 = matrix(d, r, 0);
  const pylora_mat dAmag = matrix(r, k, 0), dBmag = matrix(d, r, 0), ah = abs_of(&h);
  pylora_ref_lora_backward(&dy, &x, &h, &W, l, &dx0, add, l ? &dA0 : NULL, l ? &dB0 : NULL);
  pylora_ref_lora_backward(&ady, &ax, &ah, &aW, al, &dxmag, add, l ? &dAmag : NULL,
                           l ? &dBmag : NULL);
  OK(pylora_lora_backward(&dy, want_dA ? &x : NULL, want_dB ? &h : NULL, want_dx ? &P : NULL, l,
                          want_dx ? &dx : NULL, add, want_dA ? &dA : NULL, want_dB ? &dB : NULL, ws,
                          ws_bytes));
  if (want_dx) expect_near("dx", &dx, &dx0, &dxmag, (double)(d + d + r) + 12);
  if (want_dA) expect_near("dA", &dA, &dA0, &dAmag, (double)(d + m) + 12);
  if (want_dB) expect_near("dB", &dB, &dB0, &dBmag, (double)m + 4);
  for (int64_t i = 0; i < m && want_dx && !add; i++) {
    const pylora_mat dy1 = row_of(&dy, i), dx1 = matrix(1, k, 0), dxi = row_of(&dx, i);
    pylora_drop drop1 = drop;
    drop1.row0 += i;
    pylora_lora lora1 = lora;
    if (lora.drop) lora1.drop = &drop1;
    OK(pylora_lora_backward(&dy1, NULL, NULL, &P, l ? &lora1 : NULL, &dx1, 0, NULL, NULL, ws,
                            ws_bytes));
    expect_same("row of dx alone", &dx1, &dxi);
  }
}

static void cases(void) {
  char setup[sizeof context];
  strcpy(setup, context);
  for (int i = 0; i < 60; i++) {
    strcpy(context, setup);
    one_case();
    release();
  }
}

/* B = 0 is the base, bit for bit, whatever A and x hold. */
static void zero_init(void) {
  const pylora_mat x = matrix(5, 40, 1), W = matrix(50, 40, 1), A = matrix(8, 40, 1),
                   B = matrix(50, 8, 0);
  const pylora_mat y = matrix(5, 50, 0), base = matrix(5, 50, 0), h = matrix(5, 8, 0);
  fill(&B, 0);
  *el(&A, 3, 5) = INFINITY;
  const pylora_lora l = {8, A.p, A.ld, B.p, B.ld, 2, NULL, NULL};
  const pylora_packed P = packed(&W);
  workspace(5, 50, 40, 8);
  OK(pylora_lora_forward(&x, &P, NULL, NULL, NULL, &base, NULL, ws, ws_bytes));
  OK(pylora_lora_forward(&x, &P, NULL, &l, NULL, &y, &h, ws, ws_bytes));
  expect_same("y with B = 0", &y, &base);
}

/* Rows, ranks and sizes beyond one block of the tiling; threads change no bits. */
static void large(void) {
  const int64_t m = 70, k = 1100, d = 600, r = 16;
  const pylora_mat x = matrix(m, k, 1), W = matrix(d, k, 1), dy = matrix(m, d, 1);
  const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, 1), h = matrix(m, r, 0);
  pylora_mat y[2], dx[2], dA[2], dB[2];
  const pylora_lora l = {r, A.p, A.ld, B.p, B.ld, 0.5f, NULL, NULL};
  const pylora_packed P = packed(&W);
  for (int i = 0; i < 2; i++) {
    OK(pylora_set_num_threads(i ? 4 : 1));
    y[i] = matrix(m, d, 0), dx[i] = matrix(m, k, 0), dA[i] = matrix(r, k, 0),
    dB[i] = matrix(d, r, 0);
    workspace(m, d, k, r);
    OK(pylora_lora_forward(&x, &P, NULL, &l, NULL, &y[i], &h, ws, ws_bytes));
    OK(pylora_lora_backward(&dy, &x, &h, &P, &l, &dx[i], 0, &dA[i], &dB[i], ws, ws_bytes));
  }
  expect_same("y by threads", &y[0], &y[1]);
  expect_same("dx by threads", &dx[0], &dx[1]);
  expect_same("dA by threads", &dA[0], &dA[1]);
  expect_same("dB by threads", &dB[0], &dB[1]);
  const pylora_mat y0 = matrix(m, d, 0), mag = matrix(m, d, 0), h0 = matrix(m, r, 0);
  const pylora_mat ax = abs_of(&x), aW = abs_of(&W), aA = abs_of(&A), aB = abs_of(&B);
  const pylora_lora al = {r, aA.p, aA.ld, aB.p, aB.ld, 0.5f, NULL, NULL};
  pylora_ref_lora_forward(&x, &W, NULL, &l, NULL, &y0, &h0);
  pylora_ref_lora_forward(&ax, &aW, NULL, &al, NULL, &mag, &h0);
  expect_near("y", &y[0], &y0, &mag, (double)(k + r) + 12);
}

static void packing(void) {
  const pylora_mat W = matrix(PICK(1, 31, 32, 33, 100), PICK(1, 5, 32, 77), 1);
  const pylora_packed P = packed(&W);
  const pylora_mat back = matrix(W.rows, W.cols, 0);
  OK(pylora_unpack(&P, &back));
  expect_same("unpacked W", &back, &W);
}

/* Every element of A and B lies where low_rank.h says. */
static void packed_adapter(int dtype, int64_t r) {
  const int64_t d = PICK(1, 31, 32, 33, 70), k = PICK(1, 2, 16, 31, 33, 77);
  const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, 1);
  const pylora_lora l = {r, A.p, A.ld, B.p, B.ld, 0.7f, NULL, NULL};
  const low_pack *P = bytes_of(pylora_lora_pack_bytes(dtype, d, k, r));
  OK(pylora_lora_pack(dtype, d, k, &l, (void *)P));
  const float *At = (const float *)(const void *)((const char *)P + P->at);
  const uint16_t *pairs = (const uint16_t *)(const void *)At;
  for (int64_t i = 0; i < r; i++) {
    const int64_t p = i / PYLORA_PANEL * PYLORA_PANEL, j = i - p, w = min64(PYLORA_PANEL, r - p);
    for (int64_t t = 0; t < k; t++) {
      const float a = *el(&A, i, t);
      if (dtype == PYLORA_BF16)
        EXPECT(pairs[p * ceil_div(k, 2) * 2 + t / 2 * 2 * w + 2 * j + t % 2] == bf16_round(a),
               "A[%d,%d] of rank %d", (int)i, (int)t, (int)r);
      else
        EXPECT(At[p * k + t * w + j] == a, "A[%d,%d] of rank %d", (int)i, (int)t, (int)r);
    }
    for (int64_t c = 0; c < pad_panel(d); c++) {
      const float b = low_bt(P, c / PYLORA_PANEL)[i * PYLORA_PANEL + c % PYLORA_PANEL];
      EXPECT(b == (c < d ? 0.7f * *el(&B, c, i) : 0), "B[%d,%d] of rank %d", (int)c, (int)i,
             (int)r);
    }
  }
  release();
}

static void packed_adapters(void) {
  for (int64_t r = 1; r <= 33; r++) {
    packed_adapter(PYLORA_F32, r);
    packed_adapter(PYLORA_BF16, r);
  }
}

int main(void) {
  each_setup(cases);
  each_setup(zero_init);
  each_setup(large);
  each_setup(packing);
  each_setup(packed_adapters);
  return finish("test_lora");
}
