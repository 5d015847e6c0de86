/* Attention, forward and backward: against the reference on ragged sequences, and what no row may see. */
#include "check.h"

typedef struct setting {
  pylora_attn a;
  pylora_seqs s;
  int64_t m, n; /* rows of q, rows of k */
  pylora_mat q, k, v, d_o;
  void *ws;
  size_t bytes;
} setting;

/* `cached`: keys from earlier steps lie before those of the queries, and gaps between sequences. */
static setting random_setting(int cached, int64_t longest) {
  setting t = {0};
  const int64_t D = PICK(1, 2, 7, 16, 32, 33, 64), kv = PICK(1, 2, 3), group = PICK(1, 2, 3, 5);
  t.a = (pylora_attn){(int32_t)(kv * group),
                      (int32_t)kv,
                      (int32_t)D,
                      (int32_t)PICK(0, 0, 1, 5, 40),
                      1.0f / sqrtf((float)D),
                      (float)PICK(0, 0, 1, 30)};
  const int64_t n = PICK(1, 2, 4);
  int64_t *q_start = bytes_of(sizeof(int64_t) * (size_t)(n + 1)), *k_start = ids_below(n, 1);
  int64_t *k_len = ids_below(n, 1);
  q_start[0] = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t queries = PICK(0, 1, 1, 2, 31, 32, 33, below(longest));
    k_start[i] = t.n + (cached ? below(3) : 0);
    k_len[i] = queries + (cached ? PICK(0, 1, 17, 40) : 0);
    q_start[i + 1] = q_start[i] + queries;
    t.n = k_start[i] + k_len[i];
  }
  t.m = q_start[n];
  t.n += cached ? 2 : 0;
  t.s = (pylora_seqs){n, q_start, cached ? k_start : NULL, cached ? k_len : NULL};
  t.q = matrix(t.m, kv * group * D, 2), t.d_o = matrix(t.m, kv * group * D, 1);
  t.k = matrix(t.n, kv * D, 2), t.v = matrix(t.n, kv * D, 1);
  t.bytes = pylora_attention_workspace(&t.s, &t.a);
  EXPECT(t.bytes > 0);
  t.ws = bytes_of(t.bytes);
  return t;
}

/* Bounds as in tests/support/bounds.py: scores are off by gamma_{D+2} of scale |q| |k|, which moves P by twice
 * that; dS by gamma_D of its magnitudes; then the sums.  A cap's tanh has a slope of at most 1 and is off by
 * a few roundings itself; 1 - tanh² is off by twice as much. Written with doubles and no cleverness. */
typedef struct bounds {
  pylora_mat o, lse, dq, dk, dv;
} bounds;

static double abs_dot(int64_t n, const float *a, const float *b) {
  double sum = 0;
  for (int64_t j = 0; j < n; j++) sum += fabs((double)a[j] * b[j]);
  return sum;
}

static bounds bounds_of(const setting *t, const pylora_mat *o, const pylora_mat *lse) {
  const int64_t D = t->a.head_dim, group = t->a.heads / t->a.kv_heads;
  bounds b = {matrix(t->m, t->q.cols, 0), matrix(t->m, t->a.heads, 0), matrix(t->m, t->q.cols, 0),
              matrix(t->n, t->k.cols, 0), matrix(t->n, t->k.cols, 0)};
  fill(&b.o, 0), fill(&b.lse, 0), fill(&b.dq, 0), fill(&b.dk, 0), fill(&b.dv, 0);
  for (int64_t i = 0; i < t->s.n; i++)
    for (int64_t row = t->s.q_start[i]; row < t->s.q_start[i + 1]; row++)
      for (int64_t head = 0; head < t->a.heads; head++) {
        const int64_t start = t->s.k_start ? t->s.k_start[i] : t->s.q_start[i],
                      kv = head / group * D;
        const int64_t keys = t->s.k_len ? t->s.k_len[i] : t->s.q_start[i + 1] - t->s.q_start[i];
        const int64_t end = start + keys - (t->s.q_start[i + 1] - 1 - row);
        const int64_t first = t->a.window && end - t->a.window > start ? end - t->a.window : start;
        const float *q = el(&t->q, row, head * D), *g = el(&t->d_o, row, head * D);
        const double L = *el(lse, row, head), n = (double)(end - first), cap = t->a.softcap;
        enum { CAP = 2 * EXP + 10 };
        double worst = 0;
        for (int64_t j = first; j < end; j++) {
          const double most = t->a.scale * abs_dot(D, q, el(&t->k, j, kv));
          const double capped = cap > 0 ? gamma_n(CAP) * fmin(cap, most) : 0;
          worst = fmax(worst, gamma_n((double)D + 2) * most + U * (fabs(L) + most) + capped);
        }
        const double slope_off = cap > 0 ? 2 * worst / cap + gamma_n(2 * CAP) : 0;
        const double P_off = expm1(2 * worst) + gamma_n(2 * n + EXP + 3);
        *el(&b.lse, row, head) =
            (float)(1.01 * worst + gamma_n(n + EXP + 3) * (1 + fabs(L) + log(n)));
        for (int64_t j = first; j < end; j++) {
          double score = 0;
          for (int64_t c = 0; c < D; c++) score += (double)q[c] * *el(&t->k, j, kv + c);
          score *= t->a.scale;
          if (cap > 0) score = cap * tanh(score / cap);
          const double P = exp(score - L);
          const double M = P * t->a.scale *
                           (abs_dot(D, g, el(&t->v, j, kv)) + abs_dot(D, g, el(o, row, head * D)));
          const double sums = gamma_n((double)(D + t->m * group) + n + 8);
          for (int64_t c = 0; c < D; c++) {
            *el(&b.o, row, head * D + c) +=
                (float)(1.01 * P * P_off * fabsf(*el(&t->v, j, kv + c)));
            *el(&b.dq, row, head * D + c) +=
                (float)(1.01 * M * (P_off + sums + slope_off) * fabsf(*el(&t->k, j, kv + c)));
            *el(&b.dk, j, kv + c) += (float)(1.01 * M * (P_off + sums + slope_off) * fabsf(q[c]));
            *el(&b.dv, j, kv + c) += (float)(1.01 * P * (P_off + sums) * fabsf(g[c]));
          }
        }
      }
  return b;
}

static void near(const char *what, const pylora_mat *got, const pylora_mat *want,
                 const pylora_mat *bound) {
  expect_near(what, got, want, bound, 1 / U / 2); /* gamma of that is 1: the bound itself */
}

static void one_case(void) {
  const setting t = random_setting((int)below(2), 80);
  const pylora_mat o = matrix(t.m, t.q.cols, 0), lse = matrix(t.m, t.a.heads, 0);
  const pylora_mat o0 = matrix(t.m, t.q.cols, 0), lse0 = matrix(t.m, t.a.heads, 0);
  const pylora_mat dq = matrix(t.m, t.q.cols, 0), dk = matrix(t.n, t.k.cols, 1),
                   dv = matrix(t.n, t.k.cols, 1);
  const pylora_mat dq0 = matrix(t.m, t.q.cols, 0), dk0 = copy_of(&dk), dv0 = copy_of(&dv);
  pylora_ref_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o0, &lse0);
  OK(pylora_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o, &lse, t.ws, t.bytes));
  const bounds b = bounds_of(&t, &o0, &lse0);
  near("o", &o, &o0, &b.o);
  near("lse", &lse, &lse0, &b.lse);
  pylora_ref_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o0, &lse0, &t.s, &t.a, &dq0, &dk0, &dv0);
  OK(pylora_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o0, &lse0, &t.s, &t.a, &dq, &dk, &dv,
                               t.ws, t.bytes));
  near("dq", &dq, &dq0, &b.dq);
  if (!t.s.k_start) { /* rows that no sequence uses are left as they are, which is not near */
    near("dk", &dk, &dk0, &b.dk);
    near("dv", &dv, &dv0, &b.dv);
  }
  for (int64_t i = 0; i < t.s.n && t.s.k_start; i++) {
    if (t.s.q_start[i + 1] == t.s.q_start[i]) continue;
    pylora_mat part[6] = {dk, dk0, b.dk, dv, dv0, b.dv};
    for (int p = 0; p < 6; p++)
      part[p].p += t.s.k_start[i] * part[p].ld, part[p].rows = t.s.k_len[i];
    near("dk", &part[0], &part[1], &part[2]);
    near("dv", &part[3], &part[4], &part[5]);
  }
}

static void cases(void) {
  for (int i = 0; i < 40; i++) {
    one_case();
    release();
  }
}

/* A query alone, with the keys it may see, gets the bits that it gets in the crowd: decoding step by
 * step is the same as reading a prompt at once, on any number of threads. */
static void decode_is_prefill(void) {
  for (int c = 0; c < 6; c++) {
    setting t = random_setting(0, 100);
    const pylora_mat o = matrix(t.m, t.q.cols, 0), lse = matrix(t.m, t.a.heads, 0);
    OK(pylora_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o, &lse, t.ws, t.bytes));
    for (int64_t i = 0; i < t.s.n; i++)
      for (int64_t row = t.s.q_start[i]; row < t.s.q_start[i + 1]; row += 1 + below(7)) {
        const int64_t one[2] = {0, 1}, start = t.s.q_start[i], len = row + 1 - start;
        const pylora_seqs s = {1, one, &start, &len};
        const pylora_mat q1 = row_of(&t.q, row), o1 = matrix(1, t.q.cols, 0),
                         l1 = matrix(1, t.a.heads, 0);
        const pylora_mat oi = row_of(&o, row), li = row_of(&lse, row);
        const size_t bytes =
            pylora_attention_workspace(&s, &t.a); /* may be more than the crowd's */
        OK(pylora_attention_forward(&q1, &t.k, &t.v, &s, &t.a, &o1, &l1, bytes_of(bytes), bytes));
        expect_same("o of a query alone", &o1, &oi);
        expect_same("lse of a query alone", &l1, &li);
      }
    release();
  }
}

static void poison(const pylora_mat *a, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; i++)
    for (int64_t j = 0; j < a->cols; j++) *el(a, i, j) = NAN;
}

/* NaN in a later key, query or gradient leaves the bits of earlier rows alone; in one sequence, those
 * of the others. In backward a key's gradient comes from later queries only. */
static void isolation(void) {
  for (int c = 0; c < 6; c++) {
    setting t = random_setting(0, 100);
    if (t.m < 2) continue;
    const pylora_mat o[2] = {matrix(t.m, t.q.cols, 0), matrix(t.m, t.q.cols, 0)};
    const pylora_mat lse[2] = {matrix(t.m, t.a.heads, 0), matrix(t.m, t.a.heads, 0)};
    pylora_mat dq[2], dk[2], dv[2];
    const int64_t cut =
        1 + below(t.m - 1); /* rows from here on of the same sequence are poisoned */
    int64_t owner = 0;
    while (t.s.q_start[owner + 1] <= cut) owner++;
    const int64_t end = t.s.q_start[owner + 1];
    for (int i = 0; i < 2; i++) {
      dq[i] = matrix(t.m, t.q.cols, 0), dk[i] = matrix(t.n, t.k.cols, 0),
      dv[i] = matrix(t.n, t.k.cols, 0);
      OK(pylora_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o[i], &lse[i], t.ws, t.bytes));
      OK(pylora_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o[i], &lse[i], &t.s, &t.a, &dq[i],
                                   &dk[i], &dv[i], t.ws, t.bytes));
      poison(&t.k, cut, end), poison(&t.v, cut, end), poison(&t.q, cut, end);
    }
    for (int64_t i = 0; i < t.m; i++) {
      if (i >= cut && i < end) continue;
      const pylora_mat a = row_of(&o[0], i), b = row_of(&o[1], i), x = row_of(&dq[0], i),
                       y = row_of(&dq[1], i);
      expect_same("o with NaN after it", &a, &b);
      expect_same("dq with NaN after it", &x, &y);
    }
    setting u =
        random_setting(0, 100); /* NaN in the first gradients: later keys are not seen by them */
    if (u.m < 2) continue;
    const pylora_mat p = matrix(u.m, u.q.cols, 0), l = matrix(u.m, u.a.heads, 0);
    OK(pylora_attention_forward(&u.q, &u.k, &u.v, &u.s, &u.a, &p, &l, u.ws, u.bytes));
    const int64_t early = below(u.m);
    for (owner = 0; u.s.q_start[owner + 1] <= early; owner++) {
    }
    for (int i = 0; i < 2; i++) {
      dq[i] = matrix(u.m, u.q.cols, 0), dk[i] = matrix(u.n, u.k.cols, 0),
      dv[i] = matrix(u.n, u.k.cols, 0);
      OK(pylora_attention_backward(&u.d_o, &u.q, &u.k, &u.v, &p, &l, &u.s, &u.a, &dq[i], &dk[i],
                                   &dv[i], u.ws, u.bytes));
      poison(&u.d_o, u.s.q_start[owner], early + 1);
    }
    for (int64_t i = 0; i < u.m; i++) {
      if (i >= u.s.q_start[owner] && i <= early) continue;
      const pylora_mat a = row_of(&dk[0], i), b = row_of(&dk[1], i), x = row_of(&dv[0], i),
                       y = row_of(&dv[1], i);
      expect_same("dk with NaN before it", &a, &b);
      expect_same("dv with NaN before it", &x, &y);
    }
    release();
  }
}

/* Threads change no bits, forward or backward. */
static void threads(void) {
  setting t = random_setting(1, 300);
  pylora_mat o[2], lse[2], dq[2], dk[2], dv[2];
  for (int i = 0; i < 2; i++) {
    OK(pylora_set_num_threads(i ? 4 : 1));
    o[i] = matrix(t.m, t.q.cols, 0), lse[i] = matrix(t.m, t.a.heads, 0),
    dq[i] = matrix(t.m, t.q.cols, 0);
    dk[i] = matrix(t.n, t.k.cols, 0), dv[i] = matrix(t.n, t.k.cols, 0);
    fill(&dk[i], 0), fill(&dv[i], 0);
    t.bytes = pylora_attention_workspace(&t.s, &t.a);
    t.ws = bytes_of(t.bytes);
    OK(pylora_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o[i], &lse[i], t.ws, t.bytes));
    OK(pylora_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o[i], &lse[i], &t.s, &t.a, &dq[i],
                                 &dk[i], &dv[i], t.ws, t.bytes));
  }
  expect_same("o by threads", &o[0], &o[1]);
  expect_same("lse by threads", &lse[0], &lse[1]);
  expect_same("dq by threads", &dq[0], &dq[1]);
  expect_same("dk by threads", &dk[0], &dk[1]);
  expect_same("dv by threads", &dv[0], &dv[1]);
}

/* Two sequences that share their keys: gradients add up. More heads per kv head than a panel is wide. */
static void shared_keys_and_many_heads(void) {
  const int64_t starts[3] = {0, 3, 6}, at[2] = {0, 0}, len[2] = {3, 3}, alone[2] = {0, 3};
  const pylora_attn a = {40, 1, 8, 0, 0.3f, 0};
  const pylora_seqs both = {2, starts, at, len}, single = {1, alone, NULL, NULL};
  const pylora_mat q = matrix(6, 320, 1), k = matrix(3, 8, 1), v = matrix(3, 8, 1),
                   o = matrix(6, 320, 0);
  const pylora_mat lse = matrix(6, 40, 0), dq = matrix(6, 320, 0), dk = matrix(3, 8, 0),
                   dv = matrix(3, 8, 0);
  const size_t bytes = pylora_attention_workspace(&both, &a);
  void *ws = bytes_of(bytes);
  OK(pylora_attention_forward(&q, &k, &v, &both, &a, &o, &lse, ws, bytes));
  OK(pylora_attention_backward(&o, &q, &k, &v, &o, &lse, &both, &a, &dq, &dk, &dv, ws, bytes));
  pylora_mat sum = matrix(3, 8, 0);
  fill(&sum, 0);
  double most = 0;
  for (int64_t i = 0; i < 2; i++) {
    pylora_mat part[4] = {q, o, lse, dq};
    for (int p = 0; p < 4; p++) part[p].p += 3 * i * part[p].ld, part[p].rows = 3;
    const pylora_mat dki = matrix(3, 8, 0), dvi = matrix(3, 8, 0);
    pylora_ref_attention_backward(&part[1], &part[0], &k, &v, &part[1], &part[2], &single, &a,
                                  &part[3], &dki, &dvi);
    for (int64_t r = 0; r < 3; r++)
      for (int64_t c = 0; c < 8; c++)
        *el(&sum, r, c) += *el(&dvi, r, c), most += fabsf(*el(&dvi, r, c));
  }
  const pylora_mat magnitude = matrix(3, 8, 0);
  fill(&magnitude, (float)most + 240);
  expect_near("dv of shared keys", &dv, &sum, &magnitude, 240 + 30);
}

/* Matrices of either type: what is stored in bfloat16 is widened exactly and rounded once, so the bits
 * are those of float32, except that scores of two bfloat16 sides are summed in pairs. Those are held
 * to the reference's bounds, and to themselves alone and on other numbers of threads. */
static void storage(void) {
  for (int c = 0; c < 8; c++) {
    const int pairs = c % 2; /* q and k both, do and v both; or never both */
    setting t = random_setting((int)below(2), 100);
    pylora_mat q = rounded(&t.q), k = rounded(&t.k), v = rounded(&t.v), g = rounded(&t.d_o);
    t.q = widened(&q), t.k = widened(&k), t.v = widened(&v), t.d_o = widened(&g);
    const int64_t width = t.q.cols, kv = t.k.cols;
    if (!pairs && below(2))
      q = t.q;
    else if (!pairs)
      k = t.k;
    if (!pairs && below(2))
      v = t.v;
    else if (!pairs)
      g = t.d_o;
    const pylora_mat o = either(t.m, width), o0 = matrix(t.m, width, 0), o1 = matrix(t.m, width, 0);
    const pylora_mat lse = matrix(t.m, t.a.heads, 0), lse0 = matrix(t.m, t.a.heads, 0);
    OK(pylora_attention_forward(&q, &k, &v, &t.s, &t.a, &o, &lse, t.ws, t.bytes));
    OK(pylora_attention_forward(&q, &k, &v, &t.s, &t.a, &o1, &lse, t.ws, t.bytes));
    expect_stored("o", &o, &o1);
    if (pairs) {
      pylora_ref_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o0, &lse0);
      const bounds b = bounds_of(&t, &o0, &lse0);
      near("o of pairs", &o1, &o0, &b.o);
      near("lse of pairs", &lse, &lse0, &b.lse);
    } else {
      OK(pylora_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o0, &lse0, t.ws, t.bytes));
      expect_same("o", &o1, &o0);
      expect_same("lse", &lse, &lse0);
    }
    const pylora_mat kept = rounded(&o0), wide = widened(&kept);
    pylora_mat dq = either(t.m, width), dk = either(t.n, kv), dv = either(t.n, kv);
    const pylora_mat dq1 = matrix(t.m, width, 0), dk1 = matrix(t.n, kv, 0),
                     dv1 = matrix(t.n, kv, 0);
    const pylora_mat dq0 = matrix(t.m, width, 0), dk0 = matrix(t.n, kv, 0),
                     dv0 = matrix(t.n, kv, 0);
    for (int64_t i = 0; i < t.n; i++) /* rows that no sequence uses keep what they hold */
      for (int64_t j = 0; j < kv; j++) {
        if (dk.b)
          dk.b[i * dk.ld + j] = 0;
        else
          *el(&dk, i, j) = 0;
        if (dv.b)
          dv.b[i * dv.ld + j] = 0;
        else
          *el(&dv, i, j) = 0;
      }
    fill(&dk0, 0), fill(&dv0, 0), fill(&dk1, 0), fill(&dv1, 0);
    OK(pylora_attention_backward(&g, &q, &k, &v, &kept, &lse0, &t.s, &t.a, &dq, &dk, &dv, t.ws,
                                 t.bytes));
    OK(pylora_attention_backward(&g, &q, &k, &v, &wide, &lse0, &t.s, &t.a, &dq1, &dk1, &dv1, t.ws,
                                 t.bytes));
    expect_stored("dq", &dq, &dq1);
    expect_stored("dk", &dk, &dk1);
    expect_stored("dv", &dv, &dv1);
    if (pairs) {
      pylora_ref_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &wide, &lse0, &t.s, &t.a, &dq0, &dk0,
                                    &dv0);
      const bounds b = bounds_of(&t, &wide, &lse0);
      near("dq of pairs", &dq1, &dq0, &b.dq);
      if (!t.s.k_start) near("dk of pairs", &dk1, &dk0, &b.dk), near("dv", &dv1, &dv0, &b.dv);
    } else {
      OK(pylora_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &wide, &lse0, &t.s, &t.a, &dq0, &dk0,
                                   &dv0, t.ws, t.bytes));
      expect_same("dq", &dq1, &dq0);
      expect_same("dk", &dk1, &dk0);
      expect_same("dv", &dv1, &dv0);
    }
    if (!t.s.k_start) /* a query alone gets the same bits from bfloat16 too */
      for (int64_t i = 0; i < t.s.n; i++)
        for (int64_t row = t.s.q_start[i]; row < t.s.q_start[i + 1]; row += 1 + below(9)) {
          const int64_t one[2] = {0, 1}, start = t.s.q_start[i], len = row + 1 - start;
          const pylora_seqs s = {1, one, &start, &len};
          const pylora_mat own = matrix(1, width, 0), l = matrix(1, t.a.heads, 0),
                           oi = row_of(&o1, row), li = row_of(&lse, row);
          pylora_mat qi = q;
          qi.rows = 1;
          if (q.b)
            qi.b += row * q.ld;
          else
            qi.p += row * q.ld;
          const size_t bytes = pylora_attention_workspace(&s, &t.a);
          OK(pylora_attention_forward(&qi, &k, &v, &s, &t.a, &own, &l, bytes_of(bytes), bytes));
          expect_same("o of a query alone", &own, &oi);
          expect_same("lse of a query alone", &l, &li);
        }
    release();
  }
}

/* Sequences long enough that backward cuts them in parts: bounds, threads, and neighbours. */
static void long_sequences(void) {
  const int64_t starts[4] = {0, 300, 301, 860}, alone[2] = {0, 559};
  const pylora_attn a = {2, 1, 8, (int32_t)PICK(0, 200), 0.35f, (float)PICK(0, 0, 3)};
  const pylora_seqs s = {3, starts, NULL, NULL}, one = {1, alone, NULL, NULL};
  setting t = {.a = a, .s = s, .m = 860, .n = 860};
  t.q = matrix(860, 16, 2), t.d_o = matrix(860, 16, 1);
  t.k = matrix(860, 8, 2), t.v = matrix(860, 8, 1);
  t.bytes = pylora_attention_workspace(&s, &a);
  t.ws = bytes_of(t.bytes);
  const pylora_mat o = matrix(860, 16, 0), lse = matrix(860, 2, 0), dq = matrix(860, 16, 0);
  const pylora_mat dk = matrix(860, 8, 0), dv = matrix(860, 8, 0), dq0 = matrix(860, 16, 0);
  const pylora_mat dk0 = matrix(860, 8, 0), dv0 = matrix(860, 8, 0);
  OK(pylora_attention_forward(&t.q, &t.k, &t.v, &s, &a, &o, &lse, t.ws, t.bytes));
  OK(pylora_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o, &lse, &s, &a, &dq, &dk, &dv, t.ws,
                               t.bytes));
  pylora_mat part[8] = {t.d_o, t.q, t.k, t.v, o, lse, dq, dk};
  for (int p = 0; p < 8; p++) part[p].p += 301 * part[p].ld, part[p].rows = 559;
  const pylora_mat dq1 = matrix(559, 16, 0), dk1 = matrix(559, 8, 0), dv1 = matrix(559, 8, 0);
  OK(pylora_attention_backward(&part[0], &part[1], &part[2], &part[3], &part[4], &part[5], &one, &a,
                               &dq1, &dk1, &dv1, t.ws, t.bytes));
  expect_same("dq of a sequence alone", &dq1, &part[6]);
  expect_same("dk of a sequence alone", &dk1, &part[7]);
  if (pylora_num_threads() > 1) return; /* the reference once */
  pylora_ref_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o, &lse, &s, &a, &dq0, &dk0, &dv0);
  const bounds b = bounds_of(&t, &o, &lse);
  near("dq", &dq, &dq0, &b.dq);
  near("dk", &dk, &dk0, &b.dk);
  near("dv", &dv, &dv0, &b.dv);
}

/* A scale of scores is positive: another one is refused, before anything is written. */
static void scales(void) {
  setting t = random_setting(0, 9);
  const pylora_mat o = matrix(t.m, t.q.cols, 0), lse = matrix(t.m, t.a.heads, 0);
  const float bad[] = {0, -0.5f, NAN, INFINITY};
  for (int i = 0; i < 4; i++) {
    t.a.scale = bad[i];
    EXPECT(pylora_attention_workspace(&t.s, &t.a) == 0, "no workspace for a scale of %g", bad[i]);
    EXPECT_STATUS(PYLORA_E_VALUE,
                  pylora_attention_forward(&t.q, &t.k, &t.v, &t.s, &t.a, &o, &lse, t.ws, t.bytes));
    EXPECT_STATUS(PYLORA_E_VALUE,
                  pylora_attention_backward(&t.d_o, &t.q, &t.k, &t.v, &o, &lse, &t.s, &t.a, &t.q,
                                            &t.k, &t.v, t.ws, t.bytes));
  }
}

int main(void) {
  each_setup(cases);
  each_setup(decode_is_prefill);
  each_setup(isolation);
  each_setup(storage);
  each_setup(long_sequences);
  each_setup(threads);
  each_setup(shared_keys_and_many_heads);
  scales();
  return finish("test_attention");
}
