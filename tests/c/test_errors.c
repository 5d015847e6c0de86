/* What is wrong comes back as a status, before anything is written: NULL, shapes, ranges, workspace. */
#include "check.h"

static pylora_mat X, Y, W, A, B, H, DX; /* a sound call's operands: m 4, k 6, d 5, r 2 */
static pylora_packed P;
static pylora_lora lora;
static void *ws;
static size_t bytes;

static void operands(void) {
  X = matrix(4, 6, 1), Y = matrix(4, 5, 1), W = matrix(5, 6, 1), A = matrix(2, 6, 1),
  B = matrix(5, 2, 1);
  H = matrix(4, 2, 1), DX = matrix(4, 6, 1);
  P = packed(&W);
  lora = (pylora_lora){2, A.p, A.ld, B.p, B.ld, 1, NULL, NULL};
  bytes = pylora_lora_workspace(4, 5, 6, 2);
  ws = bytes_of(bytes);
}
#define E_NULL(call) EXPECT_STATUS(PYLORA_E_NULL, call)
#define E_SHAPE(call) EXPECT_STATUS(PYLORA_E_SHAPE, call)
#define E_INDEX(call) EXPECT_STATUS(PYLORA_E_INDEX, call)
#define E_VALUE(call) EXPECT_STATUS(PYLORA_E_VALUE, call)

static void lora_linear(void) {
  operands();
  const pylora_mat before = copy_of(&Y), dx_before = copy_of(&DX);
  pylora_packed bad = P;
  bad.magic = 1;
  pylora_lora no_A = lora, no_B = lora, negative = lora, dropped = lora;
  no_A.A = NULL, no_B.B = NULL, negative.r = -1;
  const pylora_drop all = {1.0f, 1, 2, 0}, nan = {NAN, 1, 2, 0};
  OK(pylora_lora_forward(&X, &P, NULL, &lora, NULL, &Y, &H, ws, bytes));
  copy(&before, &Y);
  E_NULL(pylora_lora_forward(NULL, &P, NULL, &lora, NULL, &Y, &H, ws, bytes));
  E_NULL(pylora_lora_forward(&X, NULL, NULL, &lora, NULL, &Y, &H, ws, bytes));
  E_NULL(pylora_lora_forward(&X, &P, NULL, &lora, NULL, NULL, &H, ws, bytes));
  E_NULL(pylora_lora_forward(&X, &P, NULL, &lora, NULL, &Y, NULL, ws, bytes));
  E_NULL(pylora_lora_forward(&X, &P, NULL, &no_A, NULL, &Y, &H, ws, bytes));
  E_NULL(pylora_lora_forward(&X, &P, NULL, &no_B, NULL, &Y, &H, ws, bytes));
  E_SHAPE(pylora_lora_forward(&Y, &P, NULL, &lora, NULL, &Y, &H, ws, bytes));
  E_SHAPE(pylora_lora_forward(&X, &P, NULL, &lora, &X, &Y, &H, ws, bytes));
  E_SHAPE(pylora_lora_forward(&X, &P, NULL, &lora, NULL, &X, &H, ws, bytes));
  E_SHAPE(pylora_lora_forward(&X, &P, NULL, &lora, NULL, &Y, &X, ws, bytes));
  E_SHAPE(pylora_lora_forward(&X, &P, NULL, &negative, NULL, &Y, &H, ws, bytes));
  EXPECT_STATUS(PYLORA_E_PACKED,
                pylora_lora_forward(&X, &bad, NULL, &lora, NULL, &Y, &H, ws, bytes));
  EXPECT_STATUS(PYLORA_E_WORKSPACE, pylora_lora_forward(&X, &P, NULL, &lora, NULL, &Y, &H, ws, 64));
  dropped.drop = &all;
  E_VALUE(pylora_lora_forward(&X, &P, NULL, &dropped, NULL, &Y, &H, ws, bytes));
  dropped.drop = &nan;
  E_VALUE(pylora_lora_forward(&X, &P, NULL, &dropped, NULL, &Y, &H, ws, bytes));
  expect_same("y after errors", &Y, &before);

  E_NULL(pylora_lora_backward(NULL, &X, &H, &P, &lora, &DX, 0, NULL, NULL, ws, bytes));
  E_NULL(pylora_lora_backward(&Y, &X, &H, NULL, &lora, &DX, 0, NULL, NULL, ws, bytes));
  E_NULL(pylora_lora_backward(&Y, NULL, &H, &P, &lora, NULL, 0, &A, NULL, ws, bytes));
  E_NULL(pylora_lora_backward(&Y, &X, NULL, &P, &lora, NULL, 0, NULL, &B, ws, bytes));
  E_SHAPE(pylora_lora_backward(&Y, &X, &H, &P, &lora, &Y, 0, NULL, NULL, ws, bytes));
  E_SHAPE(pylora_lora_backward(&Y, &X, &H, &P, &lora, &DX, 0, &B, NULL, ws, bytes));
  E_SHAPE(pylora_lora_backward(&Y, &X, &H, &P, &lora, &DX, 0, NULL, &A, ws, bytes));
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_lora_backward(&Y, &X, &H, &P, &lora, &DX, 0, NULL, NULL, ws, 64));
  expect_same("dx after errors", &DX, &dx_before);

  EXPECT(pylora_lora_workspace(-1, 1, 1, 1) == 0 &&
         pylora_lora_workspace(INT64_MAX, 8, INT64_MAX, 8) == 0);
  EXPECT(pylora_pack_bytes(PYLORA_F32, -1, 4) == 0 &&
         pylora_pack_bytes(PYLORA_F32, INT64_MAX, 4) == 0 &&
         pylora_pack_bytes(PYLORA_F16, 4, 4) == 0);
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_pack_blocks(PYLORA_F32, 5, 6, ws, 24, ws, &bad));
  E_NULL(pylora_pack(PYLORA_F32, NULL, ws, &bad));
  E_NULL(pylora_pack(PYLORA_F32, &W, NULL, &bad));
  E_NULL(pylora_pack(PYLORA_F32, &W, ws, NULL));
  static _Alignas(64) char there[4096]; /* panels that a program keeps */
  EXPECT_STATUS(PYLORA_OK, pylora_pack(PYLORA_F32, &W, there, &bad));
  EXPECT_STATUS(PYLORA_OK, pylora_packed_at(PYLORA_F32, 5, 6, there, &bad));
  const pylora_mat again = matrix(5, 6, 1);
  EXPECT_STATUS(PYLORA_OK, pylora_unpack(&bad, &again));
  expect_same("a weight of bytes that lie somewhere", &again, &W);
  E_NULL(pylora_packed_at(PYLORA_F32, 5, 6, NULL, &bad));
  E_NULL(pylora_packed_at(PYLORA_F32, 5, 6, there, NULL));
  E_SHAPE(pylora_packed_at(PYLORA_F32, -5, 6, there, &bad));
  E_SHAPE(pylora_packed_at(PYLORA_Q8_0, 5, 6, there, &bad));
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_packed_at(99, 5, 6, there, &bad));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_packed_at(PYLORA_F32, 5, 6, there + 4, &bad));
  E_NULL(pylora_unpack(NULL, &W));
  E_SHAPE(pylora_unpack(&P, &X));
}

static void merging(void) {
  operands();
  int64_t lossy[5] = {0}, position[1] = {30};
  uint32_t bits[1] = {0};
  const pylora_mat out = matrix(5, 6, 1);
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_merge(9, 5, 6, W.p, 6, &lora, out.p, 6, lossy));
  E_NULL(pylora_merge(0, 5, 6, NULL, 6, &lora, out.p, 6, lossy));
  E_NULL(pylora_merge(0, 5, 6, W.p, 6, NULL, out.p, 6, lossy));
  E_NULL(pylora_merge(0, 5, 6, W.p, 6, &lora, NULL, 6, lossy));
  E_SHAPE(pylora_merge(0, -5, 6, W.p, 6, &lora, out.p, 6, lossy));
  E_SHAPE(pylora_merge(0, 5, 6, W.p, 6, &lora, out.p, 3, lossy)); /* rows of the output overlap */
  E_NULL(pylora_merge_residue(0, 5, 6, W.p, 6, out.p, 6, &lora, lossy, NULL, bits));
  E_INDEX(pylora_unmerge(0, 5, 6, W.p, W.ld, &lora, 1, position, bits, out.p, out.ld));
  position[0] = -1;
  E_INDEX(pylora_unmerge(0, 5, 6, W.p, W.ld, &lora, 1, position, bits, out.p, out.ld));
  E_NULL(pylora_unmerge(0, 5, 6, W.p, W.ld, &lora, 1, NULL, bits, out.p, out.ld));
  E_SHAPE(pylora_unmerge(0, 5, 6, W.p, W.ld, &lora, -1, position, bits, out.p, out.ld));
}

static void transformer(void) {
  operands();
  const float *w = floats(6, 1);
  float *r = floats(6, 1);
  const pylora_mat before = copy_of(&DX), none = {NULL, 4, 0, 0, NULL, NULL};
  E_NULL(pylora_rms_norm_forward(NULL, w, 0, &DX, r));
  E_NULL(pylora_rms_norm_forward(&X, NULL, 0, &DX, r));
  E_NULL(pylora_rms_norm_forward(&X, w, 0, NULL, r));
  E_NULL(pylora_rms_norm_forward(&X, w, 0, &DX, NULL));
  E_SHAPE(pylora_rms_norm_forward(&X, w, 0, &Y, r));
  E_SHAPE(pylora_rms_norm_forward(&none, w, 0, &none, r));
  E_NULL(pylora_rms_norm_backward(NULL, &X, w, r, &DX, 0, NULL));
  E_NULL(pylora_rms_norm_backward(&X, &X, w, NULL, &DX, 0, NULL));
  E_NULL(pylora_rms_norm_backward(&X, &X, w, r, NULL, 0, NULL));
  E_SHAPE(pylora_rms_norm_backward(&Y, &X, w, r, &DX, 0, NULL));

  const pylora_mat c = matrix(3, 1, 1), c2 = matrix(3, 2, 1);
  int64_t position[4] = {0, 1, 2, 3};
  E_INDEX(pylora_rope(&X, &c, &c, position, 2, 0, 0, &DX));
  position[3] = -1;
  E_INDEX(pylora_rope(&X, &c, &c, position, 2, 0, 0, &DX));
  position[3] = 0;
  E_SHAPE(pylora_rope(&X, &c, &c2, position, 2, 0, 0, &DX));
  E_SHAPE(pylora_rope(&X, &c, &c, position, 4, 0, 0, &DX)); /* heads do not fit */
  E_SHAPE(pylora_rope(&X, &c, &c, position, 1, 0, 0, &DX)); /* narrower than the tables */
  E_SHAPE(pylora_rope(&X, &c, &c, position, 2, 0, 0, &Y));
  E_VALUE(pylora_rope(&X, &c, &c, position, 2, 7, 0, &DX));
  E_NULL(pylora_rope(&X, &c, &c, NULL, 2, 0, 0, &DX));
  E_NULL(pylora_rope(&X, NULL, &c, position, 2, 0, 0, &DX));

  E_NULL(pylora_layer_norm_forward(NULL, w, NULL, 0, &DX, r));
  E_NULL(pylora_layer_norm_forward(&X, NULL, NULL, 0, &DX, r));
  E_NULL(pylora_layer_norm_forward(&X, w, NULL, 0, &DX, NULL));
  E_SHAPE(pylora_layer_norm_forward(&X, w, NULL, 0, &Y, r));
  E_SHAPE(pylora_layer_norm_forward(&none, w, NULL, 0, &none, r));
  E_NULL(pylora_layer_norm_backward(&X, &X, w, NULL, &DX, 0));
  E_SHAPE(pylora_layer_norm_backward(&Y, &X, w, r, &DX, 0));
  E_NULL(pylora_activation_forward(0, NULL, NULL, &DX));
  E_VALUE(pylora_activation_forward(4, &X, NULL, &DX));
  E_VALUE(pylora_activation_forward(-1, &X, NULL, &DX));
  E_SHAPE(pylora_activation_forward(1, &X, &Y, &DX));
  E_NULL(pylora_activation_backward(1, &X, &X, &X, &DX, NULL)); /* up and dup, or neither */
  E_NULL(pylora_activation_backward(1, &X, &X, NULL, &DX, &DX));
  E_SHAPE(pylora_activation_backward(1, &Y, &X, NULL, &DX, NULL));
  E_NULL(pylora_soft_cap_forward(&X, 1, 1, NULL));
  E_VALUE(pylora_soft_cap_forward(&X, 1, -1, &DX));
  E_VALUE(pylora_soft_cap_forward(&X, 1, NAN, &DX));
  E_SHAPE(pylora_soft_cap_backward(&X, &Y, 1, 1, &DX));
  int64_t chosen[8];
  E_VALUE(pylora_choose(&X, 0, 0, &DX, chosen, &DX));
  E_VALUE(pylora_choose(&X, X.cols + 1, 0, &DX, chosen, &DX));
  E_SHAPE(pylora_choose(&X, 1, 0, &DX, chosen, &Y));
  E_NULL(pylora_choose(&X, X.cols, 0, &DX, NULL, &DX));

  pylora_sampling how[8];
  for (int i = 0; i < 8; i++) how[i] = (pylora_sampling){1, 1, 0, 0.5, 0, NULL, 0};
  double lse[8];
  int64_t count[8] = {0};
  char room[4096];
  E_NULL(pylora_sample(NULL, how, chosen, room, sizeof room));
  E_NULL(pylora_sample(&X, NULL, chosen, room, sizeof room));
  E_NULL(pylora_sample(&X, how, NULL, room, sizeof room));
  how[0].u = 1;
  E_VALUE(pylora_sample(&X, how, chosen, room, sizeof room));
  how[0].u = 0.5, how[0].temperature = -1;
  E_VALUE(pylora_sample(&X, how, chosen, room, sizeof room));
  how[0].temperature = 1, how[0].top_p = 0;
  E_VALUE(pylora_sample(&X, how, chosen, room, sizeof room));
  how[0].top_p = NAN;
  E_VALUE(pylora_sample(&X, how, chosen, room, sizeof room));
  how[0].top_p = 1, how[0].top_k = -1;
  E_VALUE(pylora_sample(&X, how, chosen, room, sizeof room));
  E_NULL(pylora_likeliest(&X, count, 1, lse, NULL, room, sizeof room));
  E_NULL(pylora_likeliest(&X, count, 1, NULL, chosen, room, sizeof room));
  count[0] = 2;
  E_VALUE(pylora_likeliest(&X, count, 1, lse, chosen, room, sizeof room));
  E_VALUE(pylora_likeliest(&X, count, -1, lse, chosen, room, sizeof room));

  E_NULL(pylora_swiglu_forward(&X, NULL, &DX));
  E_SHAPE(pylora_swiglu_forward(&X, &Y, &DX));
  E_NULL(pylora_swiglu_backward(&X, &X, &X, NULL, &DX));
  E_SHAPE(pylora_swiglu_backward(&X, &X, &Y, &DX, &DX));

  const int64_t ids[4] = {0, 4, 5, 0}, negative[4] = {0, -1, 0, 0};
  pylora_packed bad = P;
  bad.magic = 0;
  E_INDEX(pylora_embedding_forward(ids, 4, &P, &DX));
  E_INDEX(pylora_embedding_forward(negative, 4, &P, &DX));
  E_NULL(pylora_embedding_forward(NULL, 4, &P, &DX));
  E_SHAPE(pylora_embedding_forward(ids, 3, &P, &DX));
  EXPECT_STATUS(PYLORA_E_PACKED, pylora_embedding_forward(ids, 4, &bad, &DX));
  const pylora_mat dW = matrix(5, 6, 1);
  E_INDEX(pylora_embedding_backward(ids, &X, &dW));
  E_SHAPE(pylora_embedding_backward(ids, &Y, &dW));
  expect_same("outputs after errors", &DX, &before);
  /* rows of an output may not overlap; of an input, yes */
  const pylora_mat overlapping = {DX.p, 4, 6, 5, NULL, NULL};
  E_SHAPE(pylora_swiglu_forward(&X, &X, &overlapping));
  const pylora_mat repeated = {X.p, 4, 6, 0, NULL, NULL};
  OK(pylora_swiglu_forward(&repeated, &repeated, &DX));
  uint16_t halves[4 * 6] = {0}; /* float16 is for GPUs */
  const pylora_mat half = {NULL, 4, 6, 6, NULL, halves};
  EXPECT(pylora_swiglu_forward(&half, &half, &DX) == PYLORA_E_UNSUPPORTED);
  EXPECT(pylora_cast(&half, &DX) == PYLORA_E_UNSUPPORTED);
}

static void attention(void) {
  const pylora_mat q = matrix(4, 12, 1), k = matrix(6, 6, 1), v = matrix(6, 6, 1),
                   o = matrix(4, 12, 1);
  const pylora_mat lse = matrix(4, 4, 1), before = copy_of(&o), dk = matrix(6, 6, 1),
                   dv = matrix(6, 6, 1);
  const pylora_attn a = {4, 2, 3, 0, 1, 0};
  pylora_attn bad = a;
  int64_t q_start[3] = {0, 1, 4}, k_start[2] = {0, 2}, k_len[2] = {2, 4};
  pylora_seqs s = {2, q_start, k_start, k_len};
  bytes = pylora_attention_workspace(&s, &a);
  ws = bytes_of(bytes);
#define CALL(s, a) pylora_attention_forward(&q, &k, &v, s, a, &o, &lse, ws, bytes)
  OK(CALL(&s, &a));
  copy(&before, &o);
  E_NULL(CALL(NULL, &a));
  E_NULL(CALL(&s, NULL));
  E_NULL(pylora_attention_forward(NULL, &k, &v, &s, &a, &o, &lse, ws, bytes));
  E_NULL(pylora_attention_forward(&q, &k, &v, &s, &a, &o, NULL, ws, bytes));
  E_NULL(pylora_attention_forward(&q, &k, &v, &s, &a, &o, &lse, NULL, bytes));
  EXPECT_STATUS(PYLORA_E_WORKSPACE, pylora_attention_forward(&q, &k, &v, &s, &a, &o, &lse, ws, 64));
  E_SHAPE(pylora_attention_forward(&k, &k, &v, &s, &a, &o, &lse, ws, bytes));
  E_SHAPE(pylora_attention_forward(&q, &q, &v, &s, &a, &o, &lse, ws, bytes));
  E_SHAPE(pylora_attention_forward(&q, &k, &v, &s, &a, &o, &q, ws, bytes));
  bad.kv_heads = 3;
  E_SHAPE(CALL(&s, &bad));
  bad = a, bad.heads = 0;
  E_SHAPE(CALL(&s, &bad));
  EXPECT(pylora_attention_workspace(&s, &bad) == 0);
  bad = a, bad.window = -1;
  E_VALUE(CALL(&s, &bad));
  q_start[2] = 3; /* not all the queries */
  E_SHAPE(CALL(&s, &a));
  q_start[1] = 5, q_start[2] = 4; /* backwards */
  E_SHAPE(CALL(&s, &a));
  q_start[1] = 1;
  k_start[1] = 3; /* keys beyond the end */
  E_INDEX(CALL(&s, &a));
  k_start[1] = -1;
  E_INDEX(CALL(&s, &a));
  k_start[1] = INT64_MAX;
  E_INDEX(CALL(&s, &a));
  k_start[1] = 2, k_len[1] = 2; /* fewer keys than queries */
  E_SHAPE(CALL(&s, &a));
  k_len[1] = INT64_MAX;
  E_INDEX(CALL(&s, &a));
  EXPECT(pylora_attention_workspace(&s, &a) == 0);
  k_len[1] = 4, s.k_len = NULL;
  E_NULL(CALL(&s, &a));
  s.k_len = k_len;
  expect_same("o after errors", &o, &before);
  E_NULL(pylora_attention_backward(&o, &q, &k, &v, &o, &lse, &s, &a, NULL, &dk, &dv, ws, bytes));
  E_SHAPE(pylora_attention_backward(&o, &q, &k, &v, &o, &lse, &s, &a, &q, &q, &dv, ws, bytes));
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_attention_backward(&o, &q, &k, &v, &o, &lse, &s, &a, &o, &dk, &dv, ws, 64));
  const pylora_seqs empty = {0, NULL, NULL, NULL};
  E_SHAPE(CALL(&empty, &a));
}

static void others(void) {
  operands();
  int64_t labels[4] = {0, 5, 6, PYLORA_IGNORE};
  float f[6] = {0};
  const pylora_mat before = copy_of(&DX);
  E_INDEX(pylora_cross_entropy_forward(&X, labels, f, f));
  labels[2] = -1;
  E_INDEX(pylora_cross_entropy_backward(&X, labels, f, f, &DX));
  labels[2] = 0;
  E_NULL(pylora_cross_entropy_forward(&X, NULL, f, f));
  E_NULL(pylora_cross_entropy_forward(&X, labels, NULL, f));
  E_NULL(pylora_cross_entropy_backward(&X, labels, f, NULL, &DX));
  E_SHAPE(pylora_cross_entropy_backward(&X, labels, f, f, &Y));
  expect_same("dlogits after errors", &DX, &before);

  pylora_adamw o = {1e-3, 0.9, 0.999, 1e-8, 0, 1, 1};
  OK(pylora_adamw_step(1, f, f + 1, f + 2, f + 3, &o));
  E_NULL(pylora_adamw_step(1, f, NULL, f + 2, f + 3, &o));
  E_NULL(pylora_adamw_step(1, f, f + 1, f + 2, f + 3, NULL));
  E_SHAPE(pylora_adamw_step(-1, f, f + 1, f + 2, f + 3, &o));
  o.step = 0;
  E_VALUE(pylora_adamw_step(1, f, f + 1, f + 2, f + 3, &o));
  o.step = 1, o.beta2 = 1;
  E_VALUE(pylora_adamw_step(1, f, f + 1, f + 2, f + 3, &o));
  o.beta2 = 0.9, o.lr = NAN;
  E_VALUE(pylora_adamw_step(1, f, f + 1, f + 2, f + 3, &o));
  double sum;
  E_NULL(pylora_sum_squares(3, NULL, &sum));
  E_NULL(pylora_sum_squares(3, f, NULL));
  E_SHAPE(pylora_sum_squares(-1, f, &sum));

  uint32_t words[4];
  E_VALUE(pylora_philox(1, 2, -1, 4, words));
  E_VALUE(pylora_philox(1, 2, INT64_MAX - 1, 4, words));
  E_SHAPE(pylora_philox(1, 2, 0, -4, words));
  E_NULL(pylora_philox(1, 2, 0, 4, NULL));
  pylora_drop drop = {0.5f, 1, 2, INT64_MAX / 6};
  E_VALUE(pylora_dropout(&X, &drop, &DX));
  drop.row0 = -1;
  E_VALUE(pylora_dropout(&X, &drop, &DX));
  drop.row0 = 0, drop.p = -0.1f;
  E_VALUE(pylora_dropout(&X, &drop, &DX));
  drop.p = 1;
  E_VALUE(pylora_dropout(&X, &drop, &DX));
  E_NULL(pylora_dropout(&X, NULL, &DX));
  drop.p = 0;
  E_SHAPE(pylora_dropout(&X, &drop, &Y));
  expect_same("y after errors", &DX, &before);
}

int main(void) {
  lora_linear(), release();
  merging(), release();
  transformer(), release();
  attention(), release();
  others(), release();
  return finish("test_errors");
}
