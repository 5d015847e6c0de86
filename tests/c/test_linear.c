/* Projections that share x, and segments of rows with adapters of their own. */
#include "check.h"

enum { N = 3 };

static pylora_lora packed_lora(int dtype, const pylora_packed *W, pylora_lora l) {
  void *buffer = bytes_of(pylora_lora_pack_bytes(dtype, W->d, W->k, l.r));
  OK(pylora_lora_pack(dtype, W->d, W->k, &l, buffer));
  l.packed = buffer;
  return l;
}

/* Several at once are, bit for bit, one after the other; dx is their sum. */
static void several_once(void) {
  const int64_t m = PICK(0, 1, 5, 70), k = PICK(1, 33, 96), r = PICK(1, 8, 33);
  const pylora_mat x = matrix(m, k, 1);
  pylora_linear l[N];
  pylora_linear_grad g[N];
  pylora_mat y[N], h[N], want = matrix(m, k, 0), dx = matrix(m, k, 0), part = matrix(m, k, 0);
  pylora_mat dA[N], dB[N], dy[N], dA1, dB1;
  pylora_packed P[N];
  pylora_lora lora[N];
  const pylora_lora *at[N];
  int64_t all = 0;
  for (int i = 0; i < N; i++) {
    const int64_t d = PICK(1, 32, 50);
    all += d;
    const pylora_mat W = matrix(d, k, 1), A = matrix(r, k, 1), B = matrix(d, r, 1);
    P[i] = packed(&W);
    y[i] = matrix(m, d, 0), h[i] = matrix(m, r, 0), dy[i] = matrix(m, d, 1);
    dA[i] = matrix(r, k, 0), dB[i] = matrix(d, r, 0);
    lora[i] = (pylora_lora){r, A.p, A.ld, B.p, B.ld, 0.5f, NULL, NULL};
    at[i] = &lora[i];
    l[i] = (pylora_linear){&P[i], floats(d, 1), i == 1 ? NULL : &at[i], NULL, &y[i], &h[i], NULL};
    g[i] = (pylora_linear_grad){&P[i], i == 1 ? NULL : &lora[i], &dy[i],
                                &h[i], i == 1 ? NULL : &dA[i],   i == 1 ? NULL : &dB[i]};
  }
  const size_t bytes = pylora_linear_workspace(m, N, all, k, N * r);
  void *ws = bytes_of(bytes);
  OK(pylora_linear_forward(&x, N, l, 1, NULL, ws, bytes));
  OK(pylora_linear_backward(&x, N, g, &dx, 0, ws, bytes));
  for (int i = 0; i < N; i++) {
    const pylora_mat y1 = matrix(m, P[i].d, 0), h1 = matrix(m, r, 0);
    OK(pylora_lora_forward(&x, &P[i], l[i].bias, i == 1 ? NULL : &lora[i], NULL, &y1, &h1, ws,
                           bytes));
    expect_same("y of several", &y[i], &y1);
    if (i != 1) expect_same("h of several", &h[i], &h1);
    dA1 = matrix(r, k, 0), dB1 = matrix(P[i].d, r, 0);
    OK(pylora_lora_backward(&dy[i], &x, &h[i], &P[i], i == 1 ? NULL : &lora[i], &part, 0,
                            i == 1 ? NULL : &dA1, i == 1 ? NULL : &dB1, ws, bytes));
    if (i != 1) expect_same("dA of several", &dA[i], &dA1);
    if (i != 1) expect_same("dB of several", &dB[i], &dB1);
    for (int64_t a = 0; a < m; a++)
      for (int64_t b = 0; b < k; b++)
        *el(&want, a, b) = (i ? *el(&want, a, b) : 0) + *el(&part, a, b);
  }
  for (int64_t a = 0; a < m; a++)
    for (int64_t b = 0; b < k; b++) {
      const float e = *el(&dx, a, b) - *el(&want, a, b);
      /* a few roundings of sums of at most 150 + 3 r products of numbers below 6 */
      EXPECT(e < 2e-3f && e > -2e-3f, "dx is not the sum: %g", (double)e);
    }
}

/* A row of a mixed batch has the bits it has alone. */
static void mixed_once(void) {
  enum { S = 4 };
  const int64_t k = PICK(2, 40), d = PICK(3, 64), rows[S] = {below(3), 1 + below(70), 1, below(4)};
  int64_t start[S + 1] = {0};
  for (int s = 0; s < S; s++) start[s + 1] = start[s] + rows[s];
  const int64_t m = start[S];
  const pylora_mat x = matrix(m, k, 1), W = matrix(d, k, 1), y = matrix(m, d, 0);
  const pylora_packed P = packed(&W);
  pylora_lora lora[S];
  const pylora_lora *at[S];
  for (int s = 0; s < S; s++) {
    const int64_t r = PICK(1, 8, 40);
    const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, 1);
    if (s == 2) fill(&B, 0);
    lora[s] = packed_lora(PYLORA_F32, &P, (pylora_lora){r, A.p, A.ld, B.p, B.ld, 2, NULL, NULL});
    at[s] = s == 1 ? NULL : &lora[s];
  }
  const pylora_linear l = {&P, NULL, at, NULL, &y, NULL, NULL};
  const size_t bytes = pylora_linear_workspace(m, 1, d, k, 40);
  void *ws = bytes_of(bytes);
  OK(pylora_linear_forward(&x, 1, &l, S, start, ws, bytes));
  for (int s = 0; s < S; s++)
    for (int64_t i = start[s]; i < start[s + 1]; i++) {
      const pylora_mat xi = row_of(&x, i), yi = row_of(&y, i), alone = matrix(1, d, 0);
      const pylora_linear one = {&P, NULL, &at[s], NULL, &alone, NULL, NULL};
      OK(pylora_linear_forward(&xi, 1, &one, 1, NULL, ws, bytes));
      expect_same("a row of a mixed batch", &yi, &alone);
    }
  start[1] = m + 1;
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_linear_forward(&x, 1, &l, S, start, ws, bytes));
  start[1] = rows[0];
  lora[3].packed = NULL; /* with several adapters each must be packed */
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_linear_forward(&x, 1, &l, S, start, ws, bytes));
}

/* No inputs: y is the residual and the bias, h is 0. */
static void no_inputs(void) {
  for (int64_t m = 1; m < 4; m++)
    for (int i = 0; i < 2; i++) {
      const int dtype = i ? PYLORA_BF16 : PYLORA_F32;
      const pylora_mat x = matrix(m, 0, 1), W = matrix(40, 0, 1), A = matrix(8, 0, 1),
                       B = matrix(40, 8, 1), y = matrix(m, 40, 1), h = matrix(m, 8, 1);
      pylora_packed P;
      OK(pylora_pack(dtype, &W, bytes_of(pylora_pack_bytes(dtype, 40, 0)), &P));
      const pylora_lora lora = {8, A.p, A.ld, B.p, B.ld, 1, NULL, NULL};
      const float *bias = floats(40, 1);
      const size_t bytes = pylora_lora_workspace(m, 40, 0, 8);
      OK(pylora_lora_forward(&x, &P, bias, &lora, NULL, &y, &h, bytes_of(bytes), bytes));
      for (int64_t t = 0; t < m; t++) {
        for (int64_t j = 0; j < 40; j++) EXPECT(*el(&y, t, j) == bias[j], "y without inputs");
        for (int64_t j = 0; j < 8; j++) EXPECT(*el(&h, t, j) == 0, "h without inputs");
      }
      release();
    }
}

static void several(void) {
  for (int i = 0; i < 20; i++) several_once(), release();
}
static void mixed(void) {
  for (int i = 0; i < 20; i++) mixed_once(), release();
}

int main(void) {
  each_setup(several);
  each_setup(mixed);
  each_setup(no_inputs);
  return finish("test_linear");
}
