/* config_hf.c - a model's settings out of Hugging Face's config.json, for the families of
 * settings.c.
 *
 * The rules and defaults are those of pylora/model/hfconfig.py.  A key that changes the result and is not carried
 * out is refused by name. */
#include <math.h>
#include <stdio.h>

#include "files/config.h"

enum { MAX_CONFIG = 4 << 20 }; /* bytes */

/* What a family's config.json means where a key is missing; -1: nothing. */
typedef struct defaults {
  int64_t positions, kv_heads, head_dim; /* 0: as many as heads; hidden / heads */
  int64_t bos, eos;
  double theta, eps;
  int tied;
} defaults;
static const defaults default_of[FAMILIES] = {
    [LLAMA] = {2048, 0, 0, 1, 2, 1e4, 1e-6, 0},
    [MISTRAL] = {131072, 8, 0, 1, 2, 1e4, 1e-6, 0},
    [QWEN2] = {32768, 32, 0, -1, -1, 1e4, 1e-6, 0},
    [QWEN3] = {32768, 32, 128, -1, -1, 1e4, 1e-6, 0},
    [GEMMA2] = {8192, 4, 256, 2, 1, 1e4, 1e-6, 1},
    [GEMMA3] = {131072, 4, 256, 2, 1, 1e6, 1e-6, 1},
    [GRANITE] = {2048, 0, 0, 1, 2, 1e4, 1e-6, 0},
    [SMOLLM3] = {32768, 4, 0, 128000, 128001, 2e6, 1e-6, 1},
    [OLMO2] = {2048, 0, 0, -1, 50279, 1e4, 1e-5, 0},
    [OLMO3] = {2048, 0, 0, -1, 50279, 5e5, 1e-5, 0},
    [GEMMA] = {8192, 16, 256, 2, 1, 1e4, 1e-6, 1},
    [MINISTRAL] = {131072, 8, 0, 1, 2, 1e4, 1e-6, 0},
    [SEED_OSS] = {524288, 8, 128, 0, 2, 1e4, 1e-6, 0},
    [ERNIE45] = {131072, 2, 128, 1, 2, 5e5, 1e-5, 1},
    [PHI3] = {4096, 0, 0, 1, 32000, 1e4, 1e-5, 0},
    [GPT2] = {1024, 0, 0, 50256, 50256, 1e4, 1e-5, 1},
    [GPT_NEOX] = {2048, 0, 0, 0, 2, 1e4, 1e-5, 0},
    [MIXTRAL] = {131072, 8, 0, 1, 2, 1e6, 1e-5, 0},
    [QWEN3_MOE] = {32768, 4, 0, -1, -1, 1e4, 1e-6, 0},
    [OLMOE] = {4096, 0, 0, -1, 50279, 1e4, 1e-5, 0},
};

/* ---- what is refused ---- */

/* Keys that change the result, and the values that ask for nothing: null always, and of these. */
enum { IS_FALSE = 1, IS_0 = 2, IS_1 = 4, IS_LIST = 8 };
#define FAMILY(f) (1u << (f))
#define GEMMAS (FAMILY(GEMMA2) | FAMILY(GEMMA3))
#define COUNTED (FAMILY(QWEN3_MOE) | FAMILY(OLMOE)) /* whose experts are num_experts */
static const struct {
  const char *key;
  int neutral;
  unsigned known; /* families that carry it out */
} changes[] = {
    {"alibi", IS_FALSE, 0},
    {"attention_multiplier", 0, FAMILY(GRANITE)},
    {"attn_logit_softcapping", IS_0, GEMMAS},
    {"attn_temperature_tuning", IS_FALSE | IS_0, 0},
    {"clip_qkv", 0, 0},
    {"embedding_multiplier", IS_1, FAMILY(GRANITE)},
    {"final_logit_softcapping", IS_0, GEMMAS},
    {"kv_lora_rank", 0, 0},
    {"logit_scale", IS_1, 0},
    {"logits_scaling", IS_1, FAMILY(GRANITE)},
    {"mlp_only_layers", IS_LIST, FAMILY(QWEN3_MOE)},
    {"moe_intermediate_size", 0, FAMILY(QWEN3_MOE)},
    {"multi_query", IS_FALSE, 0},
    {"n_routed_experts", IS_0, 0},
    {"n_shared_experts", IS_0, 0},
    {"no_rope_layers", 0, FAMILY(SMOLLM3)},
    {"num_experts", IS_0, COUNTED},
    {"num_local_experts", IS_0, FAMILY(MIXTRAL) | COUNTED},
    {"num_nextn_predict_layers", IS_0, 0},
    {"parallel_attn", IS_FALSE, 0},
    {"qk_layernorm", IS_FALSE, 0},
    {"partial_rotary_factor", IS_1, FAMILY(PHI3) | FAMILY(GPT_NEOX)},
    {"query_pre_attn_scalar", 0, GEMMAS},
    {"residual_multiplier", IS_1, FAMILY(GRANITE)},
    {"rotary_pct", IS_1, FAMILY(GPT_NEOX)},
    {"rope_local_base_freq", 0, FAMILY(GEMMA3)},
    {"scale_attn_by_inverse_layer_idx", IS_FALSE, FAMILY(GPT2)},
    {"shared_intermediate_size", IS_0, 0},
    {"shared_expert_intermediate_size", IS_0, 0},
    {"use_bidirectional_attention", IS_FALSE, 0},
    {"use_parallel_residual", IS_FALSE, FAMILY(GPT_NEOX)},
    {"use_qk_norm", IS_FALSE, 0},
};

static int asks_for_nothing(const pylora_json_value *v, int neutral) {
  if (v->type == JSON_FALSE) return neutral & IS_FALSE;
  if (v->type == JSON_LIST) return (neutral & IS_LIST) && v->items == 0;
  if (v->type != JSON_NUMBER) return 0;
  return ((neutral & IS_0) && json_number(v) == 0) || ((neutral & IS_1) && json_number(v) == 1);
}

static int unknown(const config *c, pylora_family family) {
  for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
    const pylora_json_value *v = in(c, c->j.value, changes[i].key);
    if (!v || changes[i].known & FAMILY(family) || asks_for_nothing(v, changes[i].neutral))
      continue;
    REFUSE("%.300s: %s is set, and a %s model has no such feature here", c->path, changes[i].key,
           pylora_families[family].name);
  }
  return PYLORA_OK;
}

/* What Hugging Face calls an activation, and which families have it. */
#define TANHS (GEMMAS | FAMILY(GEMMA))
#define ANY (FAMILY(GPT2) | FAMILY(GPT_NEOX))
static const struct {
  const char *name;
  int is;
  unsigned known;
} activations[] = {
    {"silu", PYLORA_SILU, ~TANHS},
    {"swish", PYLORA_SILU, ~TANHS},
    {"gelu_pytorch_tanh", PYLORA_GELU_TANH, TANHS | ANY},
    {"gelu_new", PYLORA_GELU_TANH, TANHS | ANY},
    {"gelu_fast", PYLORA_GELU_TANH, TANHS | ANY},
    {"gelu_accurate", PYLORA_GELU_TANH, TANHS | ANY},
    {"gelu", PYLORA_GELU_TANH, FAMILY(GEMMA)}, /* its first files say so of the approximation */
    {"gelu", PYLORA_GELU_ERF, ANY},
    {"relu2", PYLORA_RELU2, ANY},
};

static int activation(const config *c, pylora_settings *s) {
  s->activation = pylora_usual_activation(s->family);
  const pylora_json_value *act = get(c, "hidden_activation");
  if (!act || pylora_json_empty(act)) act = get(c, "hidden_act");
  if (!act || pylora_json_empty(act)) return PYLORA_OK;
  const char *first = NULL;
  for (size_t i = 0; i < sizeof activations / sizeof *activations; i++) {
    if (!(activations[i].known & FAMILY(s->family))) continue;
    if (!first) first = activations[i].name;
    if (!is_text(act, activations[i].name)) continue;
    s->activation = activations[i].is;
    return PYLORA_OK;
  }
  REFUSE("%.300s: hidden_act '%.40s'; a %s model is supported with %s", c->path,
         act->type == JSON_TEXT ? act->u.text : "?", pylora_families[s->family].name, first);
}

static int refuse(const config *c, pylora_family family) {
  if (get(c, "quantization_config"))
    REFUSE("%.300s: quantization_config is set; use unquantized weights, or a GGUF file", c->path);
  if (json_is(get(c, "quantization"), JSON_OBJECT))
    REFUSE("%.300s: this is a model that MLX quantized; it is read dequantized: mlx_lm.convert "
           "--dequantize",
           c->path);
  return unknown(c, family);
}

static int tokens(const config *c, pylora_settings *s) {
  const defaults *d = &default_of[s->family];
  const pylora_json_value *bos = value_of(c, "bos_token_id"), *eos = value_of(c, "eos_token_id");
  s->bos = bos ? -1 : d->bos;
  if (bos && bos->type != JSON_NULL) TRY(whole(c, "bos_token_id", -1, -1, &s->bos));
  if (s->bos == d->bos && s->bos >= s->vocab)
    s->bos = -1; /* a small vocabulary has not its class's */
  s->eos[0] = d->eos, s->eos_count = !eos && d->eos >= 0 && d->eos < s->vocab;
  if (!eos || eos->type == JSON_NULL) return PYLORA_OK;
  if (eos->type != JSON_LIST) {
    TRY(whole(c, "eos_token_id", -1, -1, &s->eos[0]));
    s->eos_count = s->eos[0] != d->eos || s->eos[0] < s->vocab;
    return PYLORA_OK;
  }
  if (eos->items > PYLORA_MAX_EOS)
    REFUSE("%.300s: eos_token_id lists %d tokens; at most %d are supported", c->path, eos->items,
           PYLORA_MAX_EOS);
  JSON_EACH(item, &c->j, eos) {
    if (item->type != JSON_NUMBER || !item->is_whole)
      WRONG("%.300s: eos_token_id must be a whole number or a list of them", c->path);
    s->eos[s->eos_count++] = item->u.whole;
  }
  return PYLORA_OK;
}

static int family(config *c, pylora_settings *s) {
  const pylora_json_value *kind = in(c, c->j.value, "model_type");
  char list[300] = "";
  for (int i = 0; i < FAMILIES; i++) {
    if (is_text(kind, pylora_families[i].name)) {
      s->family = c->family = (pylora_family)i;
      return PYLORA_OK;
    }
    const size_t n = strlen(list);
    snprintf(list + n, sizeof list - n, "%s%s", i ? ", " : "", pylora_families[i].name);
  }
  REFUSE("%.300s: model_type is '%.80s'; supported by the C library are %s", c->path,
         json_is(kind, JSON_TEXT) ? kind->u.text : "?", list);
}

static int read(config *c, pylora_settings *s) {
  if (c->j.value->type != JSON_OBJECT) WRONG("%.300s: this is not a JSON object", c->path);
  TRY(family(c, s));
  TRY(activation(c, s));
  TRY(refuse(c, s->family));
  const defaults *d = &default_of[s->family];
  TRY(whole(c, "vocab_size", -1, -1, &s->vocab));
  TRY(whole(c, "hidden_size", -1, -1, &s->hidden));
  const int64_t four = s->family == GPT2 && s->hidden <= INT32_MAX ? 4 * s->hidden : -1;
  TRY(whole(c, "intermediate_size", four, four, &s->inner));
  TRY(whole(c, "num_hidden_layers", -1, -1, &s->layers));
  TRY(whole(c, "num_attention_heads", -1, -1, &s->heads));
  if (s->heads < 1) WRONG("%.300s: num_attention_heads must be from 1 on", c->path);
  TRY(whole(c, "num_key_value_heads", d->kv_heads ? d->kv_heads : s->heads, s->heads,
            &s->kv_heads));
  const int64_t head = s->hidden / s->heads;
  TRY(whole(c, "head_dim", d->head_dim ? d->head_dim : head, head, &s->head_dim));
  TRY(whole(c, "max_position_embeddings", d->positions, -1, &s->positions));
  s->eps = d->eps;
  const pylora_json_value *eps = value_of(c, "rms_norm_eps");
  if (eps) TRY(number(c, eps, "rms_norm_eps", &s->eps));
  TRY(flag(c, "tie_word_embeddings", d->tied, &s->tied));
  double part = 1;
  const pylora_json_value *percent = s->family == GPT_NEOX ? get(c, "rotary_pct") : NULL;
  if (s->family == GPT_NEOX) part = 0.25;
  if (percent) TRY(number(c, percent, "rotary_pct", &part));
  s->theta = d->theta;
  if (!pylora_families[s->family].learned) TRY(pylora_config_rope(c, s, d->theta, part));
  TRY(pylora_config_own(c, s));
  TRY(tokens(c, s));
  return pylora_settings_check(c->path, s, c->why);
}

int pylora_settings_hf(const char *path, pylora_settings *s, pylora_message *why) {
  config c = {path, {NULL, NULL, 0}, why, LLAMA};
  *s = (pylora_settings){.interleaved = 0};
  int status = pylora_json_file(path, MAX_CONFIG, &c.j, why);
  if (!status) status = read(&c, s);
  pylora_json_free(&c.j);
  return status;
}
