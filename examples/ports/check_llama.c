/* check_llama.c - the cases of a transformer: its parts, one block, a training run. */
#include "vectors.h"

#include <math.h>
#include <stdio.h>

static pylora_mat like(pylora_mat a) { return zeros(a.rows, a.cols); }

void norm_case(testcase *c) {
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), y = like(x), dx = like(x);
  const pylora_mat rstd = zeros(1, x.rows), w = in(c, "w");
  must(pylora_rms_norm_forward(&x, w.p, (float)number(c, "eps"), &y, rstd.p));
  must(pylora_rms_norm_backward(&dy, &x, w.p, rstd.p, &dx, 0, NULL));
  check(c, "y", y), check(c, "rstd", rstd), check(c, "dx", dx);
}

void rope_case(testcase *c) {
  const pylora_mat x = in(c, "x"), cosines = in(c, "cos"), sines = in(c, "sin"), y = like(x);
  const int64_t *position = typed(c, "position", "i64").p;
  const int32_t D = (int32_t)number(c, "head_dim");
  const int layout = *string(c, "layout") == 'h' ? PYLORA_ROPE_HALF : PYLORA_ROPE_INTERLEAVED;
  must(pylora_rope(&x, &cosines, &sines, position, D, layout, 0, &y));
  check(c, "y", y);
  must(pylora_rope(&x, &cosines, &sines, position, D, layout, 1, &y));
  check(c, "inverse", y);
}

void tables_case(testcase *c) {
  const array position = typed(c, "position", "i64");
  const int64_t half = (int64_t)number(c, "head_dim") / 2;
  const pylora_mat cosines = zeros(position.cols, half), sines = copy(cosines);
  if (has(c, "rope_type"))
    stretched(c, cosines, sines, position.p);
  else
    angles(cosines, sines, position.p, number(c, "theta"));
  check(c, "cos", cosines), check(c, "sin", sines);
}

/* Sequences and heads, from the case's parameters under these names. */
static shape shape_in(const testcase *c, const char *heads, const char *kv_heads, double theta,
                      const char *eps) {
  const int32_t D = (int32_t)number(c, "head_dim");
  const int32_t window = has(c, "window") ? (int32_t)number(c, "window") : 0;
  const pylora_attn a = {(int32_t)number(c, heads),
                         (int32_t)number(c, kv_heads),
                         D,
                         window,
                         (float)(1 / sqrt((double)D)),
                         0};
  int64_t n, *lengths = integers(c, "lengths", &n);
  return shape_of(a, theta, eps ? number(c, eps) : 0, n, lengths);
}

void attention_case(testcase *c) {
  const pylora_mat q = in(c, "q"), k = in(c, "k"), v = in(c, "v");
  shape s = shape_in(c, "heads", "kv_heads", 1, NULL); /* nothing is rotated here */
  s.attn.scale = (float)number(c, "scale");
  s.attn.softcap = has(c, "softcap") ? (float)number(c, "softcap") : 0;
  pylora_mat o, lse, dq, dk, dv;
  attention_forward(&s, q, k, v, &o, &lse);
  attention_backward(&s, in(c, "do"), q, k, v, o, lse, &dq, &dk, &dv);
  check(c, "o", o), check(c, "lse", lse);
  check(c, "dq", dq), check(c, "dk", dk), check(c, "dv", dv);
}

void swiglu_case(testcase *c) {
  const pylora_mat gate = in(c, "gate"), up = in(c, "up"), dy = in(c, "dy");
  const pylora_mat y = like(gate), dgate = like(gate), dup = like(gate);
  must(pylora_swiglu_forward(&gate, &up, &y));
  must(pylora_swiglu_backward(&dy, &gate, &up, &dgate, &dup));
  check(c, "y", y), check(c, "dgate", dgate), check(c, "dup", dup);
}

void loss_case(testcase *c) {
  const pylora_mat logits = in(c, "logits"), weight = in(c, "weight"), d = like(logits);
  const pylora_mat nll = zeros(1, d.rows), lse = zeros(1, d.rows);
  const int64_t *labels = typed(c, "labels", "i64").p;
  must(pylora_cross_entropy_forward(&logits, labels, nll.p, lse.p));
  must(pylora_cross_entropy_backward(&logits, labels, lse.p, weight.p, &d));
  check(c, "nll", nll), check(c, "lse", lse), check(c, "dlogits", d);
}

/* ---- a block, a training run ------------------------------------------------------------- */

/* The input, or what becomes the output, "<prefix><projection><suffix>". */
static const char *name_of(char name[160], const char *prefix, int i, const char *suffix) {
  snprintf(name, 160, "%s%s%s", prefix, projection_names[i], suffix);
  return name;
}

static block block_in(const testcase *c, const char *prefix, double scale) {
  char name[160];
  block b = {0};
  for (int i = 0; i < PROJECTIONS; i++) {
    b.L[i].W = pack(in(c, name_of(name, prefix, i, ".weight")));
    b.L[i].A = in(c, name_of(name, prefix, i, ".A"));
    b.L[i].B = in(c, name_of(name, prefix, i, ".B"));
    b.L[i].s = (float)scale;
  }
  snprintf(name, sizeof name, "%sinput_layernorm.weight", prefix);
  b.norm1 = in(c, name).p;
  snprintf(name, sizeof name, "%spost_attention_layernorm.weight", prefix);
  b.norm2 = in(c, name).p;
  return b;
}

void block_case(testcase *c) {
  const pylora_mat x = in(c, "x");
  const shape s = shape_in(c, "heads", "kv_heads", number(c, "rope_theta"), "eps");
  block b = block_in(c, "", number(c, "scale"));
  block_forward(&b, &s, x);
  block_backward(&b, &s, in(c, "dy"));
  for (int i = 0; i < PROJECTIONS; i++) {
    char name[160];
    check(c, name_of(name, "", i, ".h"), b.L[i].h);
    check(c, name_of(name, "", i, ".dA"), b.L[i].dA);
    check(c, name_of(name, "", i, ".dB"), b.L[i].dB);
  }
  const struct {
    const char *name;
    pylora_mat value;
  } others[] = {{"normed1", b.normed1},
                {"q", b.q},
                {"k", b.k},
                {"v", b.v},
                {"o", b.o},
                {"lse", b.lse},
                {"mid", b.mid},
                {"normed2", b.normed2},
                {"gate", b.gate},
                {"up", b.up},
                {"act", b.act},
                {"y", b.y},
                {"dact", b.dact},
                {"dgate", b.dgate},
                {"dup", b.dup},
                {"dnormed2", b.dnormed2},
                {"dmid", b.dmid},
                {"do", b.d_o},
                {"dq", b.dq},
                {"dk", b.dk},
                {"dv", b.dv},
                {"dnormed1", b.dnormed1},
                {"dx", b.dx}};
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    check(c, others[i].name, others[i].value);
  check_array(c, "rstd1", "f32", b.rstd1, x.rows);
  check_array(c, "rstd2", "f32", b.rstd2, x.rows);
}

void training_case(testcase *c) {
  const array ids = typed(c, "ids", "i64"), labels = typed(c, "labels", "i64");
  const array rates = typed(c, "lr", "f64");
  llama model = {.layers = (int64_t)number(c, "num_hidden_layers"),
                 .embed = pack(in(c, "model.embed_tokens.weight")),
                 .norm = in(c, "model.norm.weight").p};
  model.s = shape_in(c, "num_attention_heads", "num_key_value_heads", number(c, "rope_theta"),
                     "rms_norm_eps");
  model.blocks = take((size_t)model.layers * sizeof *model.blocks);
  char prefix[64], name[160];
  for (int64_t n = 0; n < model.layers; n++) {
    snprintf(prefix, sizeof prefix, "model.layers.%lld.", (long long)n);
    model.blocks[n] = block_in(c, prefix, number(c, "alpha") / number(c, "r")); /* S-1 */
  }
  if (ids.cols != model.s.rows) stop(c->name, "the sequences do not fill a row of ids");
  double *loss = take((size_t)ids.rows * sizeof *loss);
  for (int64_t i = 0; i < ids.rows; i++) {
    const pylora_adamw o = {((const double *)rates.p)[i],
                            number(c, "beta1"),
                            number(c, "beta2"),
                            number(c, "eps"),
                            number(c, "weight_decay"),
                            1,
                            i + 1};
    loss[i] = train_step(&model, (const int64_t *)ids.p + i * ids.cols,
                         (const int64_t *)labels.p + i * ids.cols, o, (float)number(c, "dropout"),
                         word64(c, "seed"));
  }
  check_array(c, "loss", "f64", loss, ids.rows);
  for (int64_t n = 0; n < model.layers; n++)
    for (int i = 0; i < PROJECTIONS; i++) {
      snprintf(prefix, sizeof prefix, "new.model.layers.%lld.", (long long)n);
      check(c, name_of(name, prefix, i, ".A"), model.blocks[n].L[i].A);
      check(c, name_of(name, prefix, i, ".B"), model.blocks[n].L[i].B);
    }
}
