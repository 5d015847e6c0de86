/* llama.c - a transformer block with LoRA on its seven projections, out of the operations of
 * pylora.h: statement A-1 of docs/spec.md, forward and backward, held against the vectors.
 *
 *   pylora vectors --out DIR && make -C examples/ports c VECTORS=DIR
 */
#include "vectors.h"

#define CHECK(matrix) check(c, #matrix, matrix.p)

static pylora_mat like(pylora_mat a) { return zeros(a.rows, a.cols); }
static pylora_mat in(const char *name, const char *what) { return mat(input(name, what)); }

static void norm_case(const char *c) {
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), y = like(x), dx = like(x);
  const float *w = in(c, "w").p, eps = (float)number(c, "eps");
  float *rstd = zeros(1, x.rows).p;
  must(pylora_rms_norm_forward(&x, w, eps, &y, rstd));
  must(pylora_rms_norm_backward(&dy, &x, w, rstd, &dx, 0, NULL));
  CHECK(y), check(c, "rstd", rstd), CHECK(dx);
}

static void rope_case(const char *c, int layout) {
  const pylora_mat x = in(c, "x"), cosines = in(c, "cos"), sines = in(c, "sin"), y = like(x);
  const int64_t *position = input(c, "position").p;
  const int32_t D = (int32_t)number(c, "head_dim");
  must(pylora_rope(&x, &cosines, &sines, position, D, layout, 0, &y));
  CHECK(y);
  must(pylora_rope(&x, &cosines, &sines, position, D, layout, 1, &y));
  check(c, "inverse", y.p);
}

/* The sequences of a case: where each begins, and the position of each row. */
static pylora_seqs sequences(const char *c, int64_t m, int64_t **position) {
  int64_t *start = calloc((size_t)m + 2, sizeof *start), n = 0;
  const char *at = after(entry(c), "\"lengths\": [");
  *position = calloc((size_t)m + 1, sizeof **position);
  for (char *end; start[n] < m; at = end + 1) {
    start[n + 1] = start[n] + strtoll(at, &end, 10);
    for (int64_t t = start[n]; t < start[n + 1]; t++) (*position)[t] = t - start[n];
    n++;
  }
  return (pylora_seqs){n, start, NULL, NULL};
}

static pylora_attn shape_of(const char *c, int32_t window) {
  const int32_t D = (int32_t)number(c, "head_dim");
  const int32_t heads = (int32_t)number(c, "heads"), kv = (int32_t)number(c, "kv_heads");
  return (pylora_attn){heads, kv, D, window, (float)(1 / sqrt((double)D))};
}

static void attention_case(const char *c) {
  const pylora_mat q = in(c, "q"), k = in(c, "k"), v = in(c, "v"), d_o = in(c, "do");
  int64_t *position;
  const pylora_seqs seqs = sequences(c, q.rows, &position);
  const pylora_attn a = shape_of(c, (int32_t)number(c, "window"));
  const pylora_mat o = like(q), dq = like(q), dk = like(k), dv = like(v);
  const pylora_mat lse = zeros(q.rows, a.heads);
  if (pylora_attention_workspace(&seqs, &a) > sizeof workspace) stop(c, "the workspace is small");
  must(pylora_attention_forward(&q, &k, &v, &seqs, &a, &o, &lse, workspace, sizeof workspace));
  must(pylora_attention_backward(&d_o, &q, &k, &v, &o, &lse, &seqs, &a, &dq, &dk, &dv, workspace,
                                 sizeof workspace));
  CHECK(o), CHECK(lse);
  CHECK(dq), CHECK(dk), CHECK(dv);
}

static void swiglu_case(const char *c) {
  const pylora_mat gate = in(c, "gate"), up = in(c, "up"), dy = in(c, "dy");
  const pylora_mat y = like(gate), dgate = like(gate), dup = like(gate);
  must(pylora_swiglu_forward(&gate, &up, &y));
  must(pylora_swiglu_backward(&dy, &gate, &up, &dgate, &dup));
  CHECK(y), CHECK(dgate), CHECK(dup);
}

static void loss_case(const char *c) {
  const pylora_mat logits = in(c, "logits"), d = like(logits);
  const int64_t *labels = input(c, "labels").p;
  float *nll = zeros(1, d.rows).p, *lse = zeros(1, d.rows).p;
  must(pylora_cross_entropy_forward(&logits, labels, nll, lse));
  must(pylora_cross_entropy_backward(&logits, labels, lse, in(c, "weight").p, &d));
  check(c, "nll", nll), check(c, "lse", lse), check(c, "dlogits", d.p);
}

/* ---- a block ----------------------------------------------------------------------------- */

typedef struct linear {
  const char *name;
  pylora_packed W;
  pylora_lora lora;
  pylora_mat x, h;
} linear;

static linear module(const char *name) {
  char what[64];
  snprintf(what, sizeof what, "%s.weight", name);
  linear l = {.name = name, .W = pack(in("block", what))};
  snprintf(what, sizeof what, "%s.A", name);
  const pylora_mat A = in("block", what);
  snprintf(what, sizeof what, "%s.B", name);
  const pylora_mat B = in("block", what);
  l.lora = (pylora_lora){A.rows, A.p, A.ld, B.p, B.ld, (float)number("block", "scale"), NULL};
  return l;
}

static pylora_mat forward(linear *l, pylora_mat x, const pylora_mat *residual) {
  const pylora_mat y = zeros(x.rows, l->W.d);
  l->x = x, l->h = zeros(x.rows, l->lora.r);
  must(pylora_lora_forward(&x, &l->W, NULL, &l->lora, residual, &y, &l->h, workspace,
                           sizeof workspace));
  return y;
}

/* dx, added to what is there; checks the gradients of the adapter. */
static void backward(linear *l, pylora_mat dy, pylora_mat dx) {
  const pylora_mat dA = zeros(l->lora.r, l->W.k), dB = zeros(l->W.d, l->lora.r);
  must(pylora_lora_backward(&dy, &l->x, &l->h, &l->W, &l->lora, &dx, 1, &dA, &dB, workspace,
                            sizeof workspace));
  char what[64];
  snprintf(what, sizeof what, "%s.h", l->name), check("block", what, l->h.p);
  snprintf(what, sizeof what, "%s.dA", l->name), check("block", what, dA.p);
  snprintf(what, sizeof what, "%s.dB", l->name), check("block", what, dB.p);
}

static void block(void) {
  const char *c = "block";
  const pylora_mat x = in(c, "x"), dy = in(c, "dy");
  const int64_t m = x.rows, hidden = x.cols;
  const float eps = (float)number(c, "eps"), *w1 = in(c, "input_layernorm.weight").p;
  const float *w2 = in(c, "post_attention_layernorm.weight").p;
  int64_t *position;
  const pylora_seqs seqs = sequences(c, m, &position);
  const pylora_attn a = shape_of(c, 0);
  const int32_t D = a.head_dim;
  const pylora_mat cosines = zeros(m, D / 2), sines = zeros(m, D / 2);
  for (int64_t i = 0; i < m * D / 2; i++) { /* tables in double, rounded once */
    const int64_t t = i / (D / 2), pair = i % (D / 2);
    const double angle = (double)t * pow(number(c, "rope_theta"), -2.0 * (double)pair / D);
    cosines.p[i] = (float)cos(angle), sines.p[i] = (float)sin(angle);
  }
  linear q_proj = module("self_attn.q_proj"), k_proj = module("self_attn.k_proj");
  linear v_proj = module("self_attn.v_proj"), o_proj = module("self_attn.o_proj");
  linear gate_proj = module("mlp.gate_proj"), up_proj = module("mlp.up_proj");
  linear down_proj = module("mlp.down_proj");

  float *rstd1 = zeros(1, m).p, *rstd2 = zeros(1, m).p;
  const pylora_mat normed1 = like(x), normed2 = like(x), lse = zeros(m, a.heads);
  must(pylora_rms_norm_forward(&x, w1, eps, &normed1, rstd1));
  const pylora_mat q = forward(&q_proj, normed1, NULL), k = forward(&k_proj, normed1, NULL);
  const pylora_mat v = forward(&v_proj, normed1, NULL), o = like(q);
  must(pylora_rope(&q, &cosines, &sines, position, D, PYLORA_ROPE_HALF, 0, &q));
  must(pylora_rope(&k, &cosines, &sines, position, D, PYLORA_ROPE_HALF, 0, &k));
  must(pylora_attention_forward(&q, &k, &v, &seqs, &a, &o, &lse, workspace, sizeof workspace));
  const pylora_mat mid = forward(&o_proj, o, &x);
  must(pylora_rms_norm_forward(&mid, w2, eps, &normed2, rstd2));
  const pylora_mat gate = forward(&gate_proj, normed2, NULL);
  const pylora_mat up = forward(&up_proj, normed2, NULL), act = like(gate);
  must(pylora_swiglu_forward(&gate, &up, &act));
  const pylora_mat y = forward(&down_proj, act, &mid);

  const pylora_mat dact = like(act), dgate = like(act), dup = like(act), dnormed2 = like(x);
  const pylora_mat dmid = like(x), d_o = like(o), dq = like(q), dk = like(k), dv = like(v);
  const pylora_mat dnormed1 = like(x), dx = like(x);
  backward(&down_proj, dy, dact);
  must(pylora_swiglu_backward(&dact, &gate, &up, &dgate, &dup));
  backward(&up_proj, dup, dnormed2);
  backward(&gate_proj, dgate, dnormed2);
  memcpy(dmid.p, dy.p, (size_t)(m * hidden) * sizeof(float));
  must(pylora_rms_norm_backward(&dnormed2, &mid, w2, rstd2, &dmid, 1, NULL));
  backward(&o_proj, dmid, d_o);
  must(pylora_attention_backward(&d_o, &q, &k, &v, &o, &lse, &seqs, &a, &dq, &dk, &dv, workspace,
                                 sizeof workspace));
  CHECK(dq), CHECK(dk), CHECK(dv);
  must(pylora_rope(&dq, &cosines, &sines, position, D, PYLORA_ROPE_HALF, 1, &dq));
  must(pylora_rope(&dk, &cosines, &sines, position, D, PYLORA_ROPE_HALF, 1, &dk));
  backward(&v_proj, dv, dnormed1);
  backward(&k_proj, dk, dnormed1);
  backward(&q_proj, dq, dnormed1);
  memcpy(dx.p, dmid.p, (size_t)(m * hidden) * sizeof(float));
  must(pylora_rms_norm_backward(&dnormed1, &x, w1, rstd1, &dx, 1, NULL));

  CHECK(normed1), CHECK(q), CHECK(k), CHECK(v), CHECK(o), CHECK(lse), CHECK(mid), CHECK(normed2);
  CHECK(gate), CHECK(up), CHECK(act), CHECK(y), CHECK(dact), CHECK(dgate), CHECK(dup);
  CHECK(dnormed2), CHECK(dmid), CHECK(dnormed1), CHECK(dx), check(c, "do", d_o.p);
  check(c, "rstd1", rstd1), check(c, "rstd2", rstd2);
}

int main(int argc, char **argv) {
  open_vectors(argc, argv);
  norm_case("rms-norm");
  rope_case("rope-half", PYLORA_ROPE_HALF);
  rope_case("rope-interleaved", PYLORA_ROPE_INTERLEAVED);
  attention_case("attention");
  swiglu_case("swiglu");
  loss_case("cross-entropy");
  block();
  return report();
}
