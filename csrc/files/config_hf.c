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
};

/* ---- what is refused ---- */

/* Keys that change the result, and the values that ask for nothing: null always, and of these. */
enum { IS_FALSE = 1, IS_0 = 2, IS_1 = 4, IS_LIST = 8 };
#define FAMILY(f) (1u << (f))
#define GEMMAS (FAMILY(GEMMA2) | FAMILY(GEMMA3))
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
    {"mlp_only_layers", IS_LIST, 0},
    {"moe_intermediate_size", 0, 0},
    {"multi_query", IS_FALSE, 0},
    {"n_routed_experts", IS_0, 0},
    {"n_shared_experts", IS_0, 0},
    {"no_rope_layers", 0, FAMILY(SMOLLM3)},
    {"num_experts", IS_0, 0},
    {"num_local_experts", IS_0, 0},
    {"num_nextn_predict_layers", IS_0, 0},
    {"parallel_attn", IS_FALSE, 0},
    {"qk_layernorm", IS_FALSE, 0},
    {"query_pre_attn_scalar", 0, GEMMAS},
    {"residual_multiplier", IS_1, FAMILY(GRANITE)},
    {"rotary_pct", IS_1, 0},
    {"rope_local_base_freq", 0, FAMILY(GEMMA3)},
    {"scale_attn_by_inverse_layer_idx", IS_FALSE, 0},
    {"shared_intermediate_size", IS_0, 0},
    {"shared_expert_intermediate_size", IS_0, 0},
    {"use_bidirectional_attention", IS_FALSE, 0},
    {"use_parallel_residual", IS_FALSE, 0},
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
    const pylora_json_value *v = get(c, changes[i].key);
    if (!v || changes[i].known & FAMILY(family) || asks_for_nothing(v, changes[i].neutral))
      continue;
    REFUSE("%.300s: %s is set, and a %s model has no such feature here", c->path, changes[i].key,
           pylora_families[family].name);
  }
  return PYLORA_OK;
}

static int activation(const config *c, pylora_family family) {
  static const char *const silu[] = {"silu", "swish", NULL, NULL, NULL};
  static const char *const gelu[] = {"gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate",
                                     "gelu"};
  const char *const *known = pylora_families[family].gelu ? gelu : silu;
  const pylora_json_value *act = get(c, "hidden_activation");
  if (!act || pylora_json_empty(act)) act = get(c, "hidden_act");
  if (!act) return PYLORA_OK;
  const int n =
      family == GEMMA ? 5 : 4; /* its first files say "gelu", and mean the approximation */
  for (int i = 0; i < n && known[i]; i++)
    if (is_text(act, known[i])) return PYLORA_OK;
  REFUSE("%.300s: hidden_act '%.40s'; a %s model is supported with %s", c->path,
         act->type == JSON_TEXT ? act->u.text : "?", pylora_families[family].name, known[0]);
}

static int refuse(const config *c, pylora_family family) {
  TRY(activation(c, family));
  if (get(c, "quantization_config"))
    REFUSE("%.300s: quantization_config is set; use unquantized weights, or a GGUF file", c->path);
  if (json_is(get(c, "quantization"), JSON_OBJECT))
    REFUSE("%.300s: this is a model that MLX quantized; it is read dequantized: mlx_lm.convert "
           "--dequantize",
           c->path);
  TRY(unknown(c, family));
  return pylora_config_whole_head(c, c->j.value);
}

/* ---- layers that differ ---- */

static int64_t some_layers(const pylora_settings *s) {
  return s->layers < PYLORA_MAX_LAYERS ? s->layers : PYLORA_MAX_LAYERS;
}

/* layer_types, where it is there: which layers have the window. */
static int types(const config *c, pylora_settings *s, int may_slide) {
  const pylora_json_value *list = get(c, "layer_types");
  if (!list) return PYLORA_OK;
  if (list->type != JSON_LIST || list->items != s->layers)
    WRONG("%.300s: layer_types must be a list of %lld names", c->path, (long long)s->layers);
  int64_t i = 0;
  JSON_EACH(item, &c->j, list) {
    const int slides = is_text(item, "sliding_attention");
    if (!is_text(item, "full_attention") && !(slides && may_slide))
      REFUSE("%.300s: layer_types has '%.40s', which a %s model has not here", c->path,
             item->type == JSON_TEXT ? item->u.text : "?", pylora_families[s->family].name);
    if (i < PYLORA_MAX_LAYERS) s->local[i++] = (unsigned char)slides;
  }
  return PYLORA_OK;
}

/* The window's width, where some layer has one. */
static int width(const config *c, pylora_settings *s, int64_t missing) {
  int any = 0;
  for (int64_t i = 0; i < some_layers(s); i++) any |= s->local[i];
  if (!any) return PYLORA_OK;
  TRY(whole(c, "sliding_window", missing, 0, &s->window));
  if (s->window < 1) WRONG("%.300s: sliding_window must be from 1 on", c->path);
  return PYLORA_OK;
}

/* A number but 0, 1 where there is none; or a positive one, 0 where it is null or 0. */
static int multiplier(const config *c, const char *key, double *out) {
  const pylora_json_value *v = get(c, key);
  *out = 1;
  if (v) TRY(number(c, v, key, out));
  if (*out == 0) WRONG("%.300s: %s must be a finite number but 0", c->path, key);
  return PYLORA_OK;
}
static int cap(const config *c, const char *key, double missing, double *out) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  *out = v ? 0 : missing;
  return v && v->type != JSON_NULL ? number(c, v, key, out) : PYLORA_OK;
}

static int gemma(const config *c, pylora_settings *s) {
  double scalar = 256;
  int64_t every = s->family == GEMMA2 ? 2 : 6;
  const pylora_json_value *v = get(c, "query_pre_attn_scalar");
  if (v) TRY(number(c, v, "query_pre_attn_scalar", &scalar));
  if (!(scalar > 0)) WRONG("%.300s: query_pre_attn_scalar must be a positive number", c->path);
  s->attention_scale = pow(scalar, -0.5);
  s->embedding_multiplier = sqrt((double)s->hidden);
  const int capped = s->family == GEMMA2;
  TRY(cap(c, "attn_logit_softcapping", capped ? 50 : 0, &s->attention_softcap));
  TRY(cap(c, "final_logit_softcapping", capped ? 30 : 0, &s->logit_softcap));
  const char *pattern = "sliding_window_pattern";
  if (!pylora_json_member(&c->j, c->j.value, pattern)) pattern = "_sliding_window_pattern";
  if (s->family == GEMMA3) TRY(whole(c, pattern, every, every, &every));
  if (every < 1) WRONG("%.300s: %s must be from 1 on", c->path, pattern);
  for (int64_t i = 0; i < some_layers(s); i++) s->local[i] = (i + 1) % every != 0;
  TRY(types(c, s, 1));
  for (int64_t i = 0; i < some_layers(s) && s->family == GEMMA3; i++)
    s->rope[i] = (signed char)s->local[i];
  return width(c, s, 4096);
}

static int olmo3(const config *c, pylora_settings *s) {
  for (int64_t i = 0; i < some_layers(s); i++) s->local[i] = (i + 1) % 4 != 0;
  TRY(types(c, s, 1));
  for (int64_t i = 0; i < some_layers(s); i++) s->rope[i] = (signed char)s->local[i];
  return width(c, s, 4096);
}

/* A window in all layers, or in those that layer_types name. */
static int ministral(const config *c, pylora_settings *s) {
  const pylora_json_value *window = pylora_json_member(&c->j, c->j.value, "sliding_window");
  const int has = !window || window->type != JSON_NULL;
  for (int64_t i = 0; i < some_layers(s); i++) s->local[i] = (unsigned char)has;
  TRY(types(c, s, 1));
  return width(c, s, 4096);
}

static int granite(const config *c, pylora_settings *s) {
  double scaling;
  TRY(multiplier(c, "embedding_multiplier", &s->embedding_multiplier));
  TRY(multiplier(c, "residual_multiplier", &s->residual_multiplier));
  TRY(multiplier(c, "attention_multiplier", &s->attention_scale));
  TRY(multiplier(c, "logits_scaling", &scaling));
  s->logit_multiplier = 1 / scaling;
  return types(c, s, 0);
}

static int smollm3(const config *c, pylora_settings *s) {
  const pylora_json_value *list = get(c, "no_rope_layers"), *window = get(c, "sliding_window");
  int64_t every = 4, i = 0;
  int local;
  if (list) {
    int good = list->type == JSON_LIST && list->items >= s->layers;
    if (good) JSON_EACH(item, &c->j, list) {
        good &= item->type == JSON_NUMBER && item->is_whole && (item->u.whole | 1) == 1;
        if (good && i < some_layers(s)) s->rope[i++] = (signed char)(item->u.whole - 1);
      }
    if (!good)
      WRONG("%.300s: no_rope_layers must be %lld numbers, each 0 or 1", c->path,
            (long long)s->layers);
  } else {
    TRY(whole(c, "no_rope_layer_interval", 4, -1, &every));
    if (every < 1) WRONG("%.300s: no_rope_layer_interval must be from 1 on", c->path);
    for (; i < some_layers(s); i++) s->rope[i] = (i + 1) % every ? 0 : -1;
  }
  const pylora_json_value *use = get(c, "use_sliding_window");
  if (use) TRY(flag(c, "use_sliding_window", 0, &local));
  local = use && use->type == JSON_TRUE && window;
  for (i = 0; i < some_layers(s); i++) s->local[i] = local && s->rope[i] < 0;
  TRY(types(c, s, 1));
  return width(c, s, -1);
}

static int window(const config *c, pylora_settings *s) {
  int used = s->family == MISTRAL;
  int64_t first = 0;
  const int qwen = s->family == QWEN2 || s->family == QWEN3;
  if (qwen) TRY(flag(c, "use_sliding_window", 0, &used));
  if (used) {
    TRY(whole(c, "sliding_window", 4096, 0, &s->window));
    const pylora_json_value *v = get(c, "sliding_window");
    if (v && s->window == 0) WRONG("%.300s: sliding_window must be null or from 1 on", c->path);
    if (qwen) TRY(whole(c, "max_window_layers", 28, -1, &first));
  }
  for (int64_t k = 0; k < some_layers(s); k++) s->local[k] = s->window && k >= first;
  const pylora_json_value *types = get(c, "layer_types");
  if (!types) return PYLORA_OK;
  int fits = types->type == JSON_LIST && types->items == s->layers;
  int64_t i = 0;
  if (fits) JSON_EACH(item, &c->j, types) {
      const int has = s->window && i++ >= first;
      fits &= is_text(item, has ? "sliding_attention" : "full_attention");
    }
  if (!fits)
    REFUSE("%.300s: layer_types does not follow from sliding_window and max_window_layers",
           c->path);
  return PYLORA_OK;
}

static int tokens(const config *c, pylora_settings *s) {
  const defaults *d = &default_of[s->family];
  const pylora_json_value *bos = pylora_json_member(&c->j, c->j.value, "bos_token_id"),
                          *eos = pylora_json_member(&c->j, c->j.value, "eos_token_id");
  s->bos = bos ? -1 : d->bos;
  if (bos && bos->type != JSON_NULL) TRY(whole(c, "bos_token_id", -1, -1, &s->bos));
  s->eos[0] = d->eos, s->eos_count = !eos && d->eos >= 0;
  if (!eos || eos->type == JSON_NULL) return PYLORA_OK;
  if (eos->type != JSON_LIST) {
    s->eos_count = 1;
    return whole(c, "eos_token_id", -1, -1, &s->eos[0]);
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

static int family(const config *c, pylora_settings *s) {
  const pylora_json_value *kind = get(c, "model_type");
  char list[200] = "";
  for (int i = 0; i < FAMILIES; i++) {
    if (is_text(kind, pylora_families[i].name)) {
      s->family = (pylora_family)i;
      return PYLORA_OK;
    }
    const size_t n = strlen(list);
    snprintf(list + n, sizeof list - n, "%s%s", i ? ", " : "", pylora_families[i].name);
  }
  REFUSE("%.300s: model_type is '%.80s'; supported by the C library are %s", c->path,
         json_is(kind, JSON_TEXT) ? kind->u.text : "?", list);
}

static int read(const config *c, pylora_settings *s) {
  if (c->j.value->type != JSON_OBJECT) WRONG("%.300s: this is not a JSON object", c->path);
  TRY(family(c, s));
  TRY(refuse(c, s->family));
  const defaults *d = &default_of[s->family];
  TRY(whole(c, "vocab_size", -1, -1, &s->vocab));
  TRY(whole(c, "hidden_size", -1, -1, &s->hidden));
  TRY(whole(c, "intermediate_size", -1, -1, &s->inner));
  TRY(whole(c, "num_hidden_layers", -1, -1, &s->layers));
  TRY(whole(c, "num_attention_heads", -1, -1, &s->heads));
  if (s->heads < 1) WRONG("%.300s: num_attention_heads must be from 1 on", c->path);
  TRY(whole(c, "num_key_value_heads", d->kv_heads ? d->kv_heads : s->heads, s->heads,
            &s->kv_heads));
  const int64_t head = s->hidden / s->heads;
  TRY(whole(c, "head_dim", d->head_dim ? d->head_dim : head, head, &s->head_dim));
  TRY(whole(c, "max_position_embeddings", d->positions, -1, &s->positions));
  s->eps = d->eps;
  const pylora_json_value *eps = pylora_json_member(&c->j, c->j.value, "rms_norm_eps");
  if (eps) TRY(number(c, eps, "rms_norm_eps", &s->eps));
  TRY(flag(c, "attention_bias", s->family == QWEN2 || s->family == SEED_OSS, &s->qkv_bias));
  if (s->family == QWEN2 || s->family == MISTRAL || s->family == MINISTRAL) /* they ignore it */
    s->qkv_bias = s->family == QWEN2;
  s->o_bias = s->qkv_bias && s->family != QWEN2;
  TRY(flag(c, "mlp_bias", 0, &s->mlp_bias));
  s->mlp_bias = s->mlp_bias && (s->family == LLAMA || s->family == GRANITE ||
                                s->family == SMOLLM3 || s->family == SEED_OSS);
  if (s->family == SEED_OSS) TRY(flag(c, "attention_out_bias", 0, &s->o_bias));
  if (s->family == ERNIE45) {
    TRY(flag(c, "use_bias", 0, &s->qkv_bias));
    s->o_bias = s->mlp_bias = s->qkv_bias;
  }
  TRY(flag(c, "tie_word_embeddings", d->tied, &s->tied));
  TRY(pylora_config_rope(c, s, d->theta));
  switch (s->family) {
  case GEMMA2:
  case GEMMA3:
    TRY(gemma(c, s));
    break;
  case GRANITE:
    TRY(granite(c, s));
    break;
  case SMOLLM3:
    TRY(smollm3(c, s));
    break;
  case GEMMA:
    s->embedding_multiplier = sqrt((double)s->hidden);
    TRY(types(c, s, 0));
    break;
  case OLMO3:
    TRY(olmo3(c, s));
    break;
  case MINISTRAL:
    TRY(ministral(c, s));
    break;
  case OLMO2:
  case SEED_OSS:
  case ERNIE45:
    TRY(types(c, s, 0));
    break;
  default:
    TRY(window(c, s));
  }
  TRY(tokens(c, s));
  return pylora_settings_check(c->path, s, c->why);
}

int pylora_settings_hf(const char *path, pylora_settings *s, pylora_message *why) {
  config c = {path, {NULL, NULL, 0}, why};
  *s = (pylora_settings){.interleaved = 0};
  int status = pylora_json_file(path, MAX_CONFIG, &c.j, why);
  if (!status) status = read(&c, s);
  pylora_json_free(&c.j);
  return status;
}
