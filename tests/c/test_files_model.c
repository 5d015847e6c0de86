/* test_files_model.c - models and adapters out of tiny files: what a good one does, and that no damaged one is taken
 * or steps outside. */
#include <unistd.h>

#include "files.h"

enum { VOCAB = 11, HIDDEN = 32, INNER = 32, HEADS = 4, KV = 2, HEAD = 8 };

static char path[300];
static const char config_path[] = "adapter_config.json";

static void save(const bytes *b, size_t n) {
  remove(path); /* or some file systems write the old one out first */
  FILE *f = fopen(path, "wb");
  if (!f || fwrite(b->p, 1, n, f) != n || fclose(f)) abort();
}

static const struct {
  const char *name;
  int rows, cols;
} weights[] = {
    {"token_embd.weight", VOCAB, HIDDEN},
    {"output_norm.weight", 0, HIDDEN},
    {"blk.0.attn_norm.weight", 0, HIDDEN},
    {"blk.0.ffn_norm.weight", 0, HIDDEN},
    {"blk.0.attn_q.weight", HEADS * HEAD, HIDDEN},
    {"blk.0.attn_k.weight", KV * HEAD, HIDDEN},
    {"blk.0.attn_v.weight", KV * HEAD, HIDDEN},
    {"blk.0.attn_output.weight", HIDDEN, HEADS * HEAD},
    {"blk.0.ffn_gate.weight", INNER, HIDDEN},
    {"blk.0.ffn_up.weight", INNER, HIDDEN},
    {"blk.0.ffn_down.weight", HIDDEN, INNER},
};
enum { TENSORS = sizeof weights / sizeof *weights };

/* A model of one layer; `skip`: without this tensor (-1: with all); returns where the data begins. */
static size_t tiny(bytes *b, int skip) {
  gguf_begin(b, TENSORS - (skip >= 0), 9);
  meta_text(b, "general.architecture", "llama");
  meta_u32(b, "llama.block_count", 1);
  meta_u32(b, "llama.context_length", 16);
  meta_u32(b, "llama.embedding_length", HIDDEN);
  meta_u32(b, "llama.feed_forward_length", INNER);
  meta_u32(b, "llama.attention.head_count", HEADS);
  meta_u32(b, "llama.attention.head_count_kv", KV);
  meta_f32(b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
  meta_u32(b, "tokenizer.ggml.eos_token_id", 2);
  uint64_t at = 0;
  for (int i = 0; i < TENSORS; i++) {
    if (i == skip) continue;
    tensor_entry(b, weights[i].name, (uint64_t)weights[i].rows, (uint64_t)weights[i].cols, 0, at);
    at += (uint64_t)(weights[i].rows ? weights[i].rows : 1) * (uint64_t)weights[i].cols * 4;
  }
  put_zeros(b, 32);
  const size_t data = b->n;
  for (uint64_t i = 0; i < at / 4; i++) {
    const float v = 0.3f * uniform();
    put(b, &v, 4);
  }
  return data;
}

/* Opens what was saved; if it is a model, two tokens go through it. */
static int try_model(int precision) {
  pylora_model *m;
  const int status = pylora_model_open(path, precision, &m, &why);
  EXPECT(!status == !why.text[0] && pylora_utf8(why.text, strlen(why.text)));
  pylora_session *s;
  if (!status && pylora_model_about(m)->vocab <= 64 &&
      !pylora_session_open(m, 2 < m->s.positions ? 2 : m->s.positions, &s, &why)) {
    float logits[64];
    const int64_t ids[2] = {0, pylora_model_about(m)->vocab - 1};
    pylora_session_forward(s, NULL, ids, 2, logits, &why);
    pylora_session_close(s);
  }
  pylora_model_close(m);
  return status;
}

static void test_model(void) {
  static bytes b, c;
  const size_t data = tiny(&b, -1);
  save(&b, b.n);
  OK(try_model(PYLORA_F32));
  OK(try_model(PYLORA_BF16));
  OK(try_model(PYLORA_Q8_0));
  OK(try_model(PYLORA_Q4_1));
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, try_model(PYLORA_F16));
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, try_model(-1));
  for (size_t n = 1; n < b.n; n += n < data ? 1 : 997) {
    save(&b, n);
    snprintf(context, sizeof context, "the first %zu bytes", n);
    EXPECT_STATUS(PYLORA_E_FILE, try_model(PYLORA_F32));
  }
  static const uint8_t wrong[] = {0, 0x7f, 0xff};
  for (size_t i = 0; i < data; i++)
    for (size_t k = 0; k < sizeof wrong; k++) {
      c = b;
      c.p[i] = wrong[k];
      save(&c, c.n);
      snprintf(context, sizeof context, "byte %zu is %d", i, wrong[k]);
      try_model(PYLORA_F32);
    }
  for (int i = 0; i < TENSORS; i++) {
    tiny(&c, i);
    save(&c, c.n);
    snprintf(context, sizeof context, "without %s", weights[i].name);
    EXPECT_STATUS(PYLORA_E_FILE, try_model(PYLORA_F32));
  }
  context[0] = 0;
}

static void test_session(void) {
  static bytes b;
  tiny(&b, -1);
  save(&b, b.n);
  pylora_model *m;
  pylora_session *s;
  OK(pylora_model_open(path, PYLORA_F32, &m, &why));
  const pylora_about *about = pylora_model_about(m);
  EXPECT(about->vocab == VOCAB && about->layers == 1 && about->tied && about->eos_count == 1);
  EXPECT(about->eos[0] == 2 && about->bos == -1 && strcmp(about->family, "llama") == 0);
  EXPECT(strcmp(pylora_model_module(m, 8), "model.embed_tokens") == 0 &&
         !pylora_model_module(m, 9));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_session_open(m, 17, &s, &why));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_session_open(m, 0, &s, &why));
  OK(pylora_session_open(m, 4, &s, &why));
  float whole[VOCAB], again[VOCAB];
  const int64_t ids[4] = {1, 2, 3, 4}, bad[2] = {1, VOCAB};
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_session_forward(s, NULL, ids, 0, whole, &why));
  EXPECT_STATUS(PYLORA_E_INDEX, pylora_session_forward(s, NULL, bad, 2, whole, &why));
  EXPECT(pylora_session_length(s) == 0 && strstr(why.text, "ids[1] is 11"));
  OK(pylora_session_forward(s, NULL, ids, 4, whole, &why));
  EXPECT_STATUS(PYLORA_E_INDEX, pylora_session_forward(s, NULL, ids, 1, again, &why));
  EXPECT(pylora_session_length(s) == 4);
  pylora_session_clear(s);
  for (int i = 0; i < 4; i++) OK(pylora_session_forward(s, NULL, ids + i, 1, again, &why));
  EXPECT(memcmp(whole, again, sizeof whole) == 0, "token by token has other bits");
  int64_t token, first = 0;
  for (int i = 1; i < VOCAB; i++) first = whole[i] > whole[first] ? i : first;
  OK(pylora_greedy(whole, VOCAB, &token));
  EXPECT(token == first);
  whole[first] = whole[VOCAB - 1] = 1e9f; /* the first of equals */
  OK(pylora_greedy(whole, VOCAB, &token));
  EXPECT(token == first);
  whole[3] = NAN;
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_greedy(whole, VOCAB, &token));
  whole[3] = -INFINITY;
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_greedy(whole, VOCAB, &token));
  pylora_session_close(s);
  pylora_model_close(m);
}

/* A GGUF adapter of q, of a rank. */
static void gguf_adapter(bytes *b, uint64_t r) {
  gguf_begin(b, 2, 4);
  meta_text(b, "general.architecture", "llama");
  meta_text(b, "general.type", "adapter");
  meta_text(b, "adapter.type", "lora");
  meta_f32(b, "adapter.lora.alpha", 4);
  tensor_entry(b, "blk.0.attn_q.weight.lora_a", r, HIDDEN, 0, 0);
  tensor_entry(b, "blk.0.attn_q.weight.lora_b", HEADS * HEAD, r, 0, r * HIDDEN * 4);
  put_zeros(b, 32);
  for (uint64_t i = 0; i < r * (HIDDEN + HEADS * HEAD); i++) {
    const float v = uniform();
    put(b, &v, 4);
  }
}

static void test_adapter(void) {
  static bytes b, c;
  tiny(&b, -1);
  save(&b, b.n);
  pylora_model *m;
  OK(pylora_model_open(path, PYLORA_Q8_0, &m, &why));
  pylora_adapter_file *a;
  gguf_adapter(&b, 8);
  save(&b, b.n);
  OK(pylora_adapter_open(m, path, &a, &why));
  const pylora_plan_entry *e = pylora_adapter_entry(a, 0);
  EXPECT(e && strcmp(e->module, "model.layers.0.self_attn.q_proj") == 0 && e->r == 8);
  EXPECT(e->scale == 0.5 && e->alpha == 4 && !pylora_adapter_entry(a, 1));
  pylora_session *s;
  OK(pylora_session_open(m, 4, &s, &why));
  float with[VOCAB], without[VOCAB];
  const int64_t ids[2] = {1, 2};
  OK(pylora_session_forward(s, pylora_adapter_struct(a), ids, 2, with, &why));
  pylora_session_clear(s);
  OK(pylora_session_forward(s, NULL, ids, 2, without, &why));
  EXPECT(memcmp(with, without, sizeof with) != 0, "the adapter changes nothing");
  pylora_adapter_close(a);
  for (size_t n = 1; n < b.n; n += n < 600 ? 1 : 97) {
    save(&b, n);
    snprintf(context, sizeof context, "the first %zu bytes of an adapter", n);
    EXPECT_STATUS(PYLORA_E_FILE, pylora_adapter_open(m, path, &a, &why));
  }
  for (size_t i = 0; i < 600; i++)
    for (int k = 0; k < 2; k++) {
      c = b;
      c.p[i] = k ? 0xff : 0;
      save(&c, c.n);
      snprintf(context, sizeof context, "byte %zu of an adapter is %d", i, c.p[i]);
      if (!pylora_adapter_open(m, path, &a, &why)) {
        pylora_session_clear(s);
        pylora_session_forward(s, pylora_adapter_struct(a), ids, 2, with, &why);
        pylora_adapter_close(a);
      }
    }
  context[0] = 0;
  pylora_session_close(s);
  pylora_model_close(m);
}

/* Configurations, cut off and damaged, against the plan of a model. */
static void test_config(void) {
  static bytes b;
  tiny(&b, -1);
  save(&b, b.n);
  pylora_model *m;
  OK(pylora_model_open(path, PYLORA_F32, &m, &why));
  static const char text[] =
      "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":2,\"target_modules\":[\"q_proj\",\"mlp.up_"
      "proj\"],"
      "\"rank_pattern\":{\"layers\\\\.0\\\\.mlp.*\":3},\"alpha_pattern\":{\"q_proj\":8},\"use_"
      "rslora\":false,"
      "\"layers_to_transform\":[0],\"layers_pattern\":\"layers\",\"exclude_modules\":[\"v_proj\"]}";
  const size_t n = sizeof text - 1;
  pylora_part *part = bytes_of((size_t)pylora_module_count(m) * sizeof *part);
  pylora_lora_config config;
  memset(part, 0, (size_t)pylora_module_count(m) * sizeof *part);
  OK(pylora_lora_config_parse(config_path, text, n, &config, &why));
  OK(pylora_plan(m, &config, part, &why));
  EXPECT(part[PYLORA_Q].r == 4 && part[PYLORA_Q].scale == 2 && !part[PYLORA_V].r);
  EXPECT(part[PYLORA_UP].r == 3 && part[PYLORA_UP].scale == 2.0 / 3 && !part[PYLORA_DOWN].r);
  pylora_lora_config_free(&config);
  for (size_t i = 0; i < n; i++)
    for (int k = 0; k < 4; k++) {
      char *copy = malloc(n);
      if (!copy) abort();
      memcpy(copy, text, n);
      if (k) copy[i] = " \"9"[k - 1];
      snprintf(context, sizeof context, "byte %zu, change %d", i, k);
      const int status = pylora_lora_config_parse(config_path, copy, k ? n : i, &config, &why);
      free(copy);
      memset(part, 0, (size_t)pylora_module_count(m) * sizeof *part);
      EXPECT(k || status == PYLORA_E_FILE);
      if (!status) pylora_plan(m, &config, part, &why);
      pylora_lora_config_free(&config);
    }
  context[0] = 0;
  pylora_model_close(m);
  release();
}

int main(void) {
  const char *folder = getenv("TMPDIR");
  snprintf(path, sizeof path, "%.200s/pylora-test-%d.gguf", folder ? folder : "/tmp",
           (int)getpid());
  pylora_set_num_threads(1);
  test_model();
  test_session();
  test_adapter();
  test_config();
  remove(path);
  return finish("test_files_model");
}
