/* config_family.c - what a family's config.json says beyond what all say: other names of keys, biases, layers that
 * differ, multipliers, experts.  The rules are those of pylora/model/families. */
#include <math.h>

#include "files/config.h"

/* ---- names of keys ---- */

const char *pylora_config_alias(pylora_family family, const char *key) {
  static const struct {
    pylora_family family;
    const char *common, *own;
  } names[] = {
      {GPT2, "hidden_size", "n_embd"},
      {GPT2, "max_position_embeddings", "n_positions"},
      {GPT2, "num_attention_heads", "n_head"},
      {GPT2, "num_hidden_layers", "n_layer"},
      {GPT2, "intermediate_size", "n_inner"},
      {GPT2, "rms_norm_eps", "layer_norm_epsilon"},
      {GPT2, "hidden_act", "activation_function"},
      {GPT_NEOX, "rms_norm_eps", "layer_norm_eps"},
      {QWEN3_MOE, "num_experts", "num_local_experts"}, /* transformers 5 writes it so */
      {OLMOE, "num_experts", "num_local_experts"},
  };
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].family == family && strcmp(names[i].common, key) == 0) return names[i].own;
  return key;
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
  const pylora_json_value *v = value_of(c, key);
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
  if (!value_of(c, pattern)) pattern = "_sliding_window_pattern";
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
  const pylora_json_value *window = value_of(c, "sliding_window");
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
  const int qwen = s->family == QWEN2 || s->family == QWEN3 || s->family == QWEN3_MOE;
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

/* ---- experts ---- */

/* Counts of experts, of those of a token, and their size under its own key. */
static int experts(const config *c, pylora_settings *s, const char *count, int64_t usual,
                   int64_t each, const char *size, int64_t usual_size) {
  TRY(positive(c, count, usual, &s->experts));
  TRY(positive(c, "num_experts_per_tok", each, &s->top_k));
  TRY(positive(c, size, usual_size, &s->expert_size));
  if (s->top_k > s->experts)
    WRONG("%.300s: num_experts_per_tok (%lld) is more than the %lld experts (%s)", c->path,
          (long long)s->top_k, (long long)s->experts, count);
  return PYLORA_OK;
}

static int mixtral(const config *c, pylora_settings *s) {
  const pylora_json_value *list = get(c, "layer_types");
  TRY(experts(c, s, "num_local_experts", 8, 2, "intermediate_size", -1));
  s->norm_experts = 1;
  if (get(c, "sliding_window")) TRY(positive(c, "sliding_window", -1, &s->window));
  for (int64_t i = 0; i < some_layers(s); i++) s->local[i] = s->window > 0;
  if (!list) return PYLORA_OK;
  TRY(types(c, s, s->window > 0));
  for (int64_t i = 0; i < some_layers(s); i++)
    if (s->local[i] != (s->window > 0))
      REFUSE("%.300s: layer_types does not follow from sliding_window", c->path);
  return PYLORA_OK;
}

static int qwen3_moe(const config *c, pylora_settings *s) {
  const pylora_json_value *without = get(c, "mlp_only_layers");
  int64_t step;
  TRY(window(c, s));
  TRY(experts(c, s, "num_experts", 128, 8, "moe_intermediate_size", 768));
  TRY(flag(c, "norm_topk_prob", 0, &s->norm_experts));
  TRY(positive(c, "decoder_sparse_step", 1, &step));
  if (without && without->type != JSON_LIST)
    WRONG("%.300s: mlp_only_layers must be a list", c->path);
  for (int64_t i = 0; i < some_layers(s); i++) s->dense[i] = (i + 1) % step != 0;
  if (without) JSON_EACH(item, &c->j, without) {
      if (item->type != JSON_NUMBER || !item->is_whole)
        WRONG("%.300s: mlp_only_layers must be a list of whole numbers", c->path);
      if (item->u.whole >= 0 && item->u.whole < some_layers(s)) s->dense[item->u.whole] = 1;
    }
  int64_t dense = 0;
  for (int64_t i = 0; i < some_layers(s); i++) dense += s->dense[i];
  if (dense == s->layers) s->experts = 0; /* none is left */
  return PYLORA_OK;
}

static int olmoe(const config *c, pylora_settings *s) {
  TRY(experts(c, s, "num_experts", 64, 8, "intermediate_size", -1));
  return flag(c, "norm_topk_prob", 0, &s->norm_experts);
}

/* ---- the oldest ---- */

static int gpt2(const config *c, pylora_settings *s) {
  int crossed, scaled;
  TRY(flag(c, "add_cross_attention", 0, &crossed));
  if (crossed) REFUSE("%.300s: add_cross_attention is not supported", c->path);
  TRY(flag(c, "scale_attn_weights", 1, &scaled));
  TRY(flag(c, "scale_attn_by_inverse_layer_idx", 0, &s->scale_by_layer));
  if (!scaled) s->attention_scale = 1;
  s->qkv_bias = s->o_bias = s->mlp_bias = 1;
  for (int64_t i = 0; i < some_layers(s); i++) s->rope[i] = -1;
  return PYLORA_OK;
}

static int gpt_neox(const config *c, pylora_settings *s) {
  TRY(flag(c, "attention_bias", 1, &s->qkv_bias));
  s->o_bias = s->qkv_bias, s->mlp_bias = 1;
  TRY(flag(c, "use_parallel_residual", 1, &s->parallel));
  return types(c, s, 0);
}

static int phi3(const config *c, pylora_settings *s) {
  if (!get(c, "sliding_window")) return types(c, s, 0);
  TRY(positive(c, "sliding_window", -1, &s->window));
  for (int64_t i = 0; i < some_layers(s); i++) s->local[i] = 1;
  return PYLORA_OK;
}

/* ---- all of it ---- */

static int biases(const config *c, pylora_settings *s) {
  const pylora_family f = s->family;
  TRY(flag(c, "attention_bias", f == QWEN2 || f == SEED_OSS, &s->qkv_bias));
  if (f == QWEN2 || f == MISTRAL || f == MINISTRAL || f == PHI3 || f == MIXTRAL) /* ignored */
    s->qkv_bias = f == QWEN2;
  s->o_bias = s->qkv_bias && f != QWEN2;
  TRY(flag(c, "mlp_bias", 0, &s->mlp_bias));
  s->mlp_bias = s->mlp_bias && (f == LLAMA || f == GRANITE || f == SMOLLM3 || f == SEED_OSS);
  if (f == SEED_OSS) TRY(flag(c, "attention_out_bias", 0, &s->o_bias));
  if (f == ERNIE45) {
    TRY(flag(c, "use_bias", 0, &s->qkv_bias));
    s->o_bias = s->mlp_bias = s->qkv_bias;
  }
  return PYLORA_OK;
}

int pylora_config_own(const config *c, pylora_settings *s) {
  TRY(biases(c, s));
  switch (s->family) {
  case GEMMA2:
  case GEMMA3:
    return gemma(c, s);
  case GRANITE:
    return granite(c, s);
  case SMOLLM3:
    return smollm3(c, s);
  case GEMMA:
    s->embedding_multiplier = sqrt((double)s->hidden);
    return types(c, s, 0);
  case OLMO3:
    return olmo3(c, s);
  case MINISTRAL:
    return ministral(c, s);
  case OLMO2:
  case SEED_OSS:
  case ERNIE45:
    return types(c, s, 0);
  case PHI3:
    return phi3(c, s);
  case GPT2:
    return gpt2(c, s);
  case GPT_NEOX:
    return gpt_neox(c, s);
  case MIXTRAL:
    return mixtral(c, s);
  case QWEN3_MOE:
    return qwen3_moe(c, s);
  case OLMOE:
    return olmoe(c, s);
  default:
    return window(c, s);
  }
}
