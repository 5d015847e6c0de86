/* A block's norm, rotation and SwiGLU with the projections: bit for bit as one operation after the other. */
#include "check.h"

enum { N = 3, SEGMENTS = 5 };

static const int dtypes[] = {PYLORA_F32,  PYLORA_BF16,  PYLORA_Q8_0,
                             PYLORA_Q4_1, PYLORA_F32X3, PYLORA_Q4_1_A8};

static int quantized(int dtype) {
  return dtype == PYLORA_Q8_0 || dtype == PYLORA_Q4_1 || dtype >= PYLORA_A8;
}

static pylora_packed stored(int dtype, int64_t d, int64_t k) {
  const pylora_mat W = matrix(d, k, 1);
  pylora_packed P;
  OK(pylora_pack(dtype, &W, bytes_of(pylora_pack_bytes(dtype, d, k)), &P));
  return P;
}

/* An unwritten matrix of a type. */
static pylora_mat output(int half, int64_t rows, int64_t cols) {
  return half ? matrix16(rows, cols) : matrix(rows, cols, 0);
}
static void expect_equal(const char *what, const pylora_mat *a, const pylora_mat *b) {
  for (int64_t i = 0; i < a->rows; i++) {
    const void *x = a->b ? (const void *)(a->b + i * a->ld) : (const void *)(a->p + i * a->ld),
               *y = b->b ? (const void *)(b->b + i * b->ld) : (const void *)(b->p + i * b->ld);
    const size_t size = a->b ? sizeof(uint16_t) : sizeof(float);
    EXPECT(memcmp(x, y, (size_t)a->cols * size) == 0, "%s: row %d has other bits", what, (int)i);
  }
}

typedef struct setup {
  int dtype, half; /* half: what feeds products is bfloat16 */
  int64_t m, k, segments, start[SEGMENTS + 1];
  pylora_mat x, normed;
  float *w, *rstd, *rstd_alone;
  pylora_norm norm;
  pylora_linear l[N];
  pylora_packed W[N];
  const pylora_lora *at[N][SEGMENTS];
  void *ws;
  size_t bytes;
} setup;

static const pylora_lora *adapter(const setup *t, const pylora_packed *W, const pylora_drop *drop) {
  if (below(4) == 0) return NULL;
  const int64_t r = PICK(1, 8, 8, 33);
  const pylora_mat A = matrix(r, t->k, 1), B = matrix(W->d, r, 1);
  pylora_lora *l = bytes_of(sizeof *l);
  *l = (pylora_lora){r, A.p, A.ld, B.p, B.ld, 0.5f, t->segments == 1 ? drop : NULL, NULL};
  if (t->segments == 1 && below(2)) return l;
  if (t->segments == 1 && drop) return l;
  void *buffer = bytes_of(pylora_lora_pack_bytes(t->dtype, W->d, t->k, r));
  OK(pylora_lora_pack(t->dtype, W->d, t->k, l, buffer));
  l->packed = buffer;
  return l;
}

/* n projections of d[i] outputs, and what they read. */
static setup *begin(int n, const int64_t *d) {
  static const pylora_drop drop = {0.3f, 7, 9, 4};
  setup *t = bytes_of(sizeof *t);
  memset(t, 0, sizeof *t);
  t->dtype = dtypes[below(sizeof dtypes / sizeof *dtypes)];
  t->half = (int)below(2);
  t->k = quantized(t->dtype) ? PICK(32, 96) : PICK(1, 33, 96, 512, 1100);
  t->segments = PICK(1, SEGMENTS);
  for (int s = 0; s < t->segments; s++)
    t->start[s + 1] =
        t->start[s] + (t->segments == 1 ? PICK(1, 2, 70, 300) : PICK(0, 1, 1, 1, 2, 70));
  t->m = t->start[t->segments];
  t->x = input_of(t->m, t->k, 1).x;
  t->normed = output(t->half, t->m, t->k);
  t->w = floats(t->k, 2), t->rstd = floats(t->m, 0), t->rstd_alone = floats(t->m, 0);
  t->norm = (pylora_norm){.w = t->w,
                          .eps = 1e-5f,
                          .dtype = t->half ? PYLORA_BF16 : PYLORA_F32,
                          .rstd = t->rstd,
                          .kind = (int32_t)below(2)};
  if (t->norm.kind == PYLORA_LAYER && below(2)) t->norm.b = floats(t->k, 1);
  int64_t all = 0;
  const pylora_drop *dropped = below(3) ? NULL : &drop;
  for (int i = 0; i < n; i++) {
    t->W[i] = stored(t->dtype, d[i], t->k);
    for (int s = 0; s < t->segments; s++) t->at[i][s] = adapter(t, &t->W[i], dropped);
    t->l[i] = (pylora_linear){.W = &t->W[i], .bias = below(2) ? floats(d[i], 1) : NULL};
    t->l[i].lora = below(5) ? t->at[i] : NULL;
    all += d[i];
  }
  t->bytes = pylora_linear_workspace(t->m, n, all, t->k, N * 33);
  t->ws = bytes_of(t->bytes);
  if (t->norm.kind == PYLORA_LAYER)
    OK(pylora_layer_norm_forward(&t->x, t->w, t->norm.b, t->norm.eps, &t->normed, t->rstd_alone));
  else
    OK(pylora_rms_norm_forward(&t->x, t->w, t->norm.eps, &t->normed, t->rstd_alone));
  return t;
}

static void linear_alone(setup *t, int n) {
  OK(pylora_linear_forward(&t->normed, n, t->l, t->segments, t->segments > 1 ? t->start : NULL,
                           t->ws, t->bytes));
}
static void fused(setup *t, int n, const pylora_finish *finish) {
  OK(pylora_fused_forward(&t->x, &t->norm, n, t->l, finish, t->segments,
                          t->segments > 1 ? t->start : NULL, t->ws, t->bytes));
  EXPECT(memcmp(t->rstd, t->rstd_alone, (size_t)t->m * sizeof(float)) == 0, "rstd");
}

static void qkv_once(void) {
  const int64_t D = PICK(2, 24, 32, 64, 80, 128), heads = 1 + below(3);
  const int64_t d[N] = {heads * D, D, 40};
  setup *t = begin(N, d);
  const int64_t positions = t->m + 3;
  const int64_t half = 1 + below(D / 2); /* of a part of each head */
  const pylora_rotation r = {matrix(positions, half, 1), matrix(positions, half, 1),
                             ids_below(t->m, positions), (int32_t)D, (int32_t)below(2)};
  pylora_mat raw[2], y[N], alone[N], residual = matrix(t->m, d[0], 1);
  for (int i = 0; i < N; i++) {
    y[i] = output(t->half, t->m, d[i]), alone[i] = output(t->half, t->m, d[i]);
    if (i < 2) raw[i] = matrix(t->m, d[i], 0);
    t->l[i].y = i < 2 ? &raw[i] : &alone[i];
  }
  if (below(2)) t->l[0].residual = &residual;
  linear_alone(t, N);
  for (int i = 0; i < 2; i++)
    OK(pylora_rope(&raw[i], &r.cosines, &r.sines, r.position, r.head_dim, r.layout, 0, &alone[i]));
  for (int i = 0; i < N; i++) t->l[i].y = &y[i];
  const pylora_finish finish[N] = {{.rotation = &r}, {.rotation = &r}, {.rotation = NULL}};
  fused(t, N, finish);
  for (int i = 0; i < N; i++) expect_equal("q, k or v", &y[i], &alone[i]);
}

static void gate_up_once(void) {
  const int64_t inner = PICK(1, 32, 100, 300), d[2] = {inner, inner};
  setup *t = begin(2, d);
  pylora_mat gate = output(t->half, t->m, inner), up = output(t->half, t->m, inner),
             product = output(t->half, t->m, inner), alone = output(t->half, t->m, inner);
  pylora_mat kept = output(t->half, t->m, inner);
  t->l[0].y = &gate, t->l[1].y = &up;
  linear_alone(t, 2);
  const int32_t kind = (int32_t)below(4);
  OK(pylora_activation_forward(kind, &gate, &up, &alone));
  for (int64_t i = 0; i < t->m; i++) { /* what the fused call has to write again */
    if (t->half)
      memcpy(kept.b + i * kept.ld, up.b + i * up.ld, (size_t)inner * sizeof(uint16_t));
    else
      memcpy(kept.p + i * kept.ld, up.p + i * up.ld, (size_t)inner * sizeof(float));
    if (t->half)
      memset(up.b + i * up.ld, 0, (size_t)inner * sizeof(uint16_t));
    else
      memset(up.p + i * up.ld, 0, (size_t)inner * sizeof(float));
  }
  const pylora_mat *const places[] = {&product, &gate, &up}, *place = places[below(3)];
  const pylora_finish finish[2] = {{.product = NULL}, {.product = place, .activation = kind}};
  fused(t, 2, finish);
  expect_equal("product", place, &alone);
  if (place != &up) expect_equal("up", &up, &kept);
}

static void wrong(void) {
  const int64_t d[2] = {64, 64};
  setup *t = begin(2, d);
  pylora_mat y[2] = {matrix(t->m, 64, 0), matrix(t->m, 64, 0)}, narrow = matrix(t->m, 32, 0);
  t->l[0].y = &y[0], t->l[1].y = &y[1];
  const int64_t *start = t->segments > 1 ? t->start : NULL;
  pylora_rotation r = {matrix(4, 32, 1), matrix(4, 32, 1), ids_below(t->m, 4), 64, 0};
  pylora_finish finish[2] = {{.rotation = &r}, {.rotation = NULL}};
#define CALL(norm) \
  pylora_fused_forward(&t->x, norm, 2, t->l, finish, t->segments, start, t->ws, t->bytes)
  pylora_norm norm = t->norm;
  norm.w = NULL;
  EXPECT_STATUS(PYLORA_E_NULL, CALL(&norm));
  norm = t->norm, norm.dtype = PYLORA_F16;
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, CALL(&norm));
  norm = t->norm, norm.kind = 2;
  EXPECT_STATUS(PYLORA_E_VALUE, CALL(&norm));
  r.head_dim = 48; /* 64 outputs are no whole heads */
  EXPECT_STATUS(PYLORA_E_SHAPE, CALL(NULL));
  r.head_dim = 64, r.layout = 2;
  EXPECT_STATUS(PYLORA_E_VALUE, CALL(NULL));
  r.layout = 0;
  int64_t beyond[400] = {4};
  r.position = beyond;
  if (t->m) EXPECT_STATUS(PYLORA_E_INDEX, CALL(NULL));
  finish[0].rotation = NULL;
  finish[0].product = &y[0]; /* nothing comes before the first */
  EXPECT_STATUS(PYLORA_E_VALUE, CALL(NULL));
  finish[0].product = NULL, finish[1].product = &narrow;
  EXPECT_STATUS(PYLORA_E_SHAPE, CALL(NULL));
  finish[1].product = &y[0], finish[1].activation = 4;
  EXPECT_STATUS(PYLORA_E_VALUE, CALL(NULL));
  finish[1].activation = 0;
  if (t->m)
    EXPECT_STATUS(PYLORA_E_WORKSPACE, pylora_fused_forward(&t->x, &t->norm, 2, t->l, finish,
                                                           t->segments, start, t->ws, 64));
  OK(CALL(&t->norm));
}

static void qkv(void) {
  for (int i = 0; i < 40; i++) qkv_once(), release();
}
static void gate_up(void) {
  for (int i = 0; i < 40; i++) gate_up_once(), release();
}

int main(void) {
  each_setup(qkv);
  each_setup(gate_up);
  each_setup(wrong);
  return finish("test_fused");
}
