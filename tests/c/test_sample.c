/* The next token of a row, against the rule spelled out with every token ranked; the likeliest ones. */
#include "check.h"

#include <stdlib.h>

static const float *row; /* that is being ranked */

static int rank(const void *a, const void *b) {
  const int64_t i = *(const int64_t *)a, j = *(const int64_t *)b;
  if (row[i] != row[j]) return row[i] > row[j] ? -1 : 1;
  return i < j ? -1 : 1;
}

static int may(const pylora_sampling *s, int64_t i) {
  return !s->allowed || (i / 32 < s->words && s->allowed[i / 32] >> i % 32 & 1);
}

/* The tokens that may come, by rank. */
static int64_t ranked(const pylora_sampling *s, int64_t n, const float *x, int64_t *order) {
  int64_t some = 0;
  for (int64_t i = 0; i < n; i++)
    if (may(s, i)) order[some++] = i;
  row = x;
  qsort(order, (size_t)some, sizeof *order, rank);
  return some;
}

static int64_t spelled_out(const pylora_sampling *s, int64_t n, const float *x) {
  int64_t *order = bytes_of((size_t)n * sizeof(int64_t)), kept = ranked(s, n, x, order);
  double *p = bytes_of((size_t)n * sizeof(double)), mass = 0, sum = 0;
  if (kept == 0) return -2;
  if (s->temperature == 0) return order[0];
  if (s->top_k && s->top_k < kept) kept = s->top_k;
  for (int64_t t = 0; t < kept; t++)
    mass += p[t] = exp(((double)x[order[t]] - x[order[0]]) / s->temperature);
  for (int64_t t = 0; t < kept; t++) {
    sum += p[t];
    if (s->top_p < 1 && sum >= s->top_p * mass) kept = t + 1;
  }
  while (p[kept - 1] < s->min_p) kept--;
  mass = sum = 0;
  for (int64_t t = 0; t < kept; t++) mass += p[t];
  for (int64_t t = 0; t < kept; t++)
    if ((sum += p[t]) > s->u * mass) return order[t];
  return order[kept - 1];
}

/* Whether the token is right but for what rounding may do to a sum. */
static int right(const pylora_sampling *s, int64_t n, const float *x, int64_t token) {
  const double off[] = {0, -1e-6, 1e-6};
  for (int a = 0; a < 3; a++)
    for (int b = 0; b < 3; b++) {
      pylora_sampling t = *s;
      t.u *= 1 + off[a];
      if (t.top_p < 1) t.top_p *= 1 + off[b];
      if (spelled_out(&t, n, x) == token) return 1;
    }
  return 0;
}

static pylora_sampling any_setting(int64_t n) {
  const double temperature[] = {0, 0.3, 1, 5, 1e-300, 1e300}, top_p[] = {1, 0.3, 0.9, 0.99999},
               min_p[] = {0, 1e-7, 0.05, 1}, u[] = {1e-6, 0.2, 0.77, 0.9999};
  pylora_sampling s = {temperature[below(6)],
                       top_p[below(4)],
                       min_p[below(4)],
                       u[below(4)],
                       PICK(0, 0, 1, 40, n - 1, n, n + 1),
                       NULL,
                       0};
  if (below(3) == 0) {
    s.words = PICK(0, 1, (n + 31) / 32, (n + 31) / 32, 2 + n / 32);
    uint32_t *bits = bytes_of((size_t)s.words * sizeof *bits);
    const int64_t full = below(3);
    for (int64_t w = 0; w < s.words; w++)
      bits[w] = full == 0 ? UINT32_MAX : (uint32_t)(bits64() & bits64());
    s.allowed = bits;
  }
  return s;
}

static void sample(void) {
  for (int c = 0; c < 60; c++) {
    const int64_t m = PICK(0, 1, 5), n = PICK(1, 2, 31, 64, 65, 700, 5000);
    const pylora_mat x = matrix(m, n, (float)PICK(0, 1, 20));
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j += 7) *el(&x, i, j) = *el(&x, i, 0); /* equals */
    pylora_sampling *how = bytes_of((size_t)m * sizeof *how);
    for (int64_t i = 0; i < m; i++) how[i] = any_setting(n);
    int64_t *token = bytes_of((size_t)m * sizeof *token);
    const size_t need = pylora_sample_workspace(m, n);
    EXPECT_STATUS(m ? PYLORA_E_WORKSPACE : PYLORA_OK,
                  pylora_sample(&x, how, token, bytes_of(64), 64));
    void *ws = bytes_of(need);
    OK(pylora_sample(&x, how, token, ws, need));
    for (int64_t i = 0; i < m; i++) {
      EXPECT(right(&how[i], n, el(&x, i, 0), token[i]), "row %d of %d: token %d", (int)i, (int)n,
             (int)token[i]);
      const pylora_mat one = row_of(&x, i); /* alone it is the same */
      int64_t alone;
      OK(pylora_sample(&one, &how[i], &alone, ws, need));
      EXPECT(alone == token[i]);
    }
    release();
  }
}

static void not_finite(void) {
  const pylora_mat x = matrix(3, 300, 1);
  *el(&x, 0, 299) = NAN;
  *el(&x, 2, 5) = -INFINITY;
  pylora_sampling how[3] = {
      {1, 1, 0, 0.5, 0, NULL, 0}, {1, 1, 0, 0.5, 0, NULL, 0}, {0, 1, 0, 0.5, 0, NULL, 0}};
  int64_t token[3], count[3] = {1, -1, 0}, best[3] = {7, 7, 7};
  double lse[3] = {1, 1, 1};
  const size_t need = pylora_sample_workspace(3, 300);
  void *ws = bytes_of(need);
  OK(pylora_sample(&x, how, token, ws, need));
  EXPECT(token[0] == -1 && token[1] >= 0 && token[2] == -1);
  OK(pylora_likeliest(&x, count, 1, lse, best, ws, need));
  EXPECT(isnan(lse[0]) && lse[1] == 1 && isnan(lse[2]) && best[1] == 7);
  release();
  const pylora_mat wide = matrix(1, 40, 0); /* finite, and their sum is not */
  fill(&wide, -FLT_MAX);
  *el(&wide, 0, 3) = FLT_MAX;
  OK(pylora_sample(&wide, how, token, bytes_of(need), need));
  EXPECT(token[0] == 3);
  release();
}

static void likeliest(void) {
  for (int c = 0; c < 30; c++) {
    const int64_t m = PICK(0, 1, 5), n = PICK(1, 2, 31, 64, 700, 5000), most = PICK(0, 1, 20);
    const pylora_mat x = matrix(m, n, (float)PICK(0, 1, 20));
    int64_t *count = ids_below(m, most + 1), *best = ids_below(m * most, 1),
            *order = ids_below(n, 1);
    double *lse = bytes_of((size_t)m * sizeof *lse);
    const size_t need = pylora_sample_workspace(m, n);
    void *ws = bytes_of(need + 64);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j += 5) *el(&x, i, j) = *el(&x, i, 0);
    OK(pylora_likeliest(&x, count, most, lse, best, ws, need + 64));
    const pylora_sampling all = {1, 1, 0, 0.5, 0, NULL, 0};
    for (int64_t i = 0; i < m; i++) {
      ranked(&all, n, el(&x, i, 0), order);
      for (int64_t t = 0; t < count[i] && t < n; t++) EXPECT(best[i * most + t] == order[t]);
      double sum = 0;
      const double top = *el(&x, i, order[0]);
      for (int64_t j = 0; j < n; j++) sum += exp((double)*el(&x, i, j) - top);
      EXPECT(fabs(lse[i] - (top + log(sum))) < 1e-6, "%.9g, not %.9g", lse[i], top + log(sum));
    }
    release();
  }
}

int main(void) {
  each_setup(sample);
  each_setup(not_finite);
  each_setup(likeliest);
  return finish("test_sample");
}
