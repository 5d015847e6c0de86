/* config_hf.c - a model's settings out of Hugging Face's config.json: Llama, Mistral, Qwen2 and Qwen3.
 *
 * The rules and defaults are those of pylora/model/hfconfig.py.  A key that changes the result and is not carried
 * out is refused by name. */
#include "files/json.h"
#include "files/model.h"

enum { MAX_CONFIG = 4 << 20 }; /* bytes */

typedef struct config {
  const char *path;
  pylora_json j;
  pylora_message *why;
} config;

#define REFUSE(...) return pylora_fail(c->why, PYLORA_E_UNSUPPORTED, __VA_ARGS__)
#define WRONG(...) return pylora_fail(c->why, PYLORA_E_FILE, __VA_ARGS__)

/* A member that is there and not null. */
static const pylora_json_value *in(const config *c, const pylora_json_value *object,
                                   const char *key) {
  const pylora_json_value *v = pylora_json_member(&c->j, object, key);
  return v && v->type != JSON_NULL ? v : NULL;
}
static const pylora_json_value *get(const config *c, const char *key) {
  return in(c, c->j.value, key);
}
static int is_text(const pylora_json_value *v, const char *text) {
  return json_is(v, JSON_TEXT) && strcmp(v->u.text, text) == 0;
}

/* A whole number: `missing` where the key is not there, `null` where it is null; -1: an error. */
static int whole(const config *c, const char *key, int64_t missing, int64_t null, int64_t *out) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  *out = !v ? missing : null;
  if (v && v->type != JSON_NULL) {
    if (v->type != JSON_NUMBER || !v->is_whole || v->u.whole < 0)
      WRONG("%.300s: %s must be a whole number from 0 on", c->path, key);
    *out = v->u.whole;
  }
  if (*out < 0) WRONG("%.300s: the key '%s' is missing", c->path, key);
  return PYLORA_OK;
}

static int flag(const config *c, const char *key, int otherwise, int *out) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  *out = v ? v->type == JSON_TRUE : otherwise;
  if (v && v->type != JSON_TRUE && v->type != JSON_FALSE)
    WRONG("%.300s: %s must be true or false", c->path, key);
  return PYLORA_OK;
}

static int number(const config *c, const pylora_json_value *v, const char *key, double *out) {
  if (v->type != JSON_NUMBER) WRONG("%.300s: %s must be a number", c->path, key);
  *out = json_number(v);
  return PYLORA_OK;
}

/* null or 1: anything else would turn a part of each head only. */
static int whole_head(const config *c, const pylora_json_value *object) {
  const pylora_json_value *v = in(c, object, "partial_rotary_factor");
  if (v && (v->type != JSON_NUMBER || json_number(v) != 1))
    REFUSE("%.300s: partial_rotary_factor other than 1 is not supported", c->path);
  return PYLORA_OK;
}

static int refuse(const config *c) {
  const pylora_json_value *act = pylora_json_member(&c->j, c->j.value, "hidden_act");
  if (act && !is_text(act, "silu"))
    REFUSE("%.300s: hidden_act '%.40s'; only silu is supported", c->path,
           act->type == JSON_TEXT ? act->u.text : "?");
  if (get(c, "quantization_config"))
    REFUSE("%.300s: quantization_config is set; use unquantized weights, or a GGUF file", c->path);
  if (json_is(get(c, "quantization"), JSON_OBJECT))
    REFUSE("%.300s: this is a model that MLX quantized; it is read dequantized: mlx_lm.convert "
           "--dequantize",
           c->path);
  return whole_head(c, c->j.value);
}

/* From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`. */
static int rope(const config *c, pylora_settings *s) {
  const pylora_json_value *raw = get(c, "rope_scaling");
  if (!raw || pylora_json_empty(raw)) raw = get(c, "rope_parameters");
  if (raw && pylora_json_empty(raw)) raw = NULL;
  int flat = !raw || raw->type == JSON_OBJECT;
  if (raw && flat) JSON_EACH(item, &c->j, raw) flat &= item->type != JSON_OBJECT;
  if (!flat) REFUSE("%.300s: rope parameters per layer type are not supported", c->path);
  const pylora_json_value *theta = raw ? in(c, raw, "rope_theta") : NULL;
  if (!theta || pylora_json_empty(theta)) theta = get(c, "rope_theta");
  s->theta = 10000;
  if (theta && !pylora_json_empty(theta)) TRY(number(c, theta, "rope_theta", &s->theta));
  if (!raw) return PYLORA_OK;
  TRY(whole_head(c, raw));
  const pylora_json_value *kind = pylora_json_member(&c->j, raw, "rope_type");
  if (!kind) kind = pylora_json_member(&c->j, raw, "type");
  if (!kind || is_text(kind, "default")) return PYLORA_OK;
  const int linear = is_text(kind, "linear");
  if (!linear && !is_text(kind, "llama3"))
    REFUSE("%.300s: rope_scaling of type '%.40s' is not supported; supported are linear and llama3",
           c->path, kind->type == JSON_TEXT ? kind->u.text : "?");
  s->scaling.kind = linear ? ROPE_LINEAR : ROPE_LLAMA3;
  s->scaling.original = (double)s->positions;
  const struct {
    const char *key;
    double *to;
  } keys[] = {{"factor", &s->scaling.factor},
              {"low_freq_factor", &s->scaling.low},
              {"high_freq_factor", &s->scaling.high},
              {"original_max_position_embeddings", &s->scaling.original}};
  for (int i = 0; i < (linear ? 1 : 4); i++) {
    const pylora_json_value *v = in(c, raw, keys[i].key);
    if (v)
      TRY(number(c, v, keys[i].key, keys[i].to));
    else if (i < 3)
      WRONG("%.300s: rope_scaling lacks %s", c->path, keys[i].key);
  }
  return PYLORA_OK;
}

static int window(const config *c, pylora_settings *s) {
  int used = s->family == MISTRAL;
  const int qwen = s->family == QWEN2 || s->family == QWEN3;
  if (qwen) TRY(flag(c, "use_sliding_window", 0, &used));
  if (used) {
    TRY(whole(c, "sliding_window", 4096, 0, &s->window));
    const pylora_json_value *v = get(c, "sliding_window");
    if (v && s->window == 0) WRONG("%.300s: sliding_window must be null or from 1 on", c->path);
    if (qwen) TRY(whole(c, "max_window_layers", 28, -1, &s->first_window));
  }
  const pylora_json_value *types = get(c, "layer_types");
  if (!types) return PYLORA_OK;
  int fits = types->type == JSON_LIST && types->items == s->layers;
  int64_t i = 0;
  if (fits) JSON_EACH(item, &c->j, types) {
      const int has = s->window && i++ >= s->first_window;
      fits &= is_text(item, has ? "sliding_attention" : "full_attention");
    }
  if (!fits)
    REFUSE("%.300s: layer_types does not follow from sliding_window and max_window_layers",
           c->path);
  return PYLORA_OK;
}

static int tokens(const config *c, pylora_settings *s) {
  const int old = s->family == LLAMA || s->family == MISTRAL;
  const pylora_json_value *bos = pylora_json_member(&c->j, c->j.value, "bos_token_id"),
                          *eos = pylora_json_member(&c->j, c->j.value, "eos_token_id");
  s->bos = !bos && old ? 1 : -1;
  if (bos && bos->type != JSON_NULL) TRY(whole(c, "bos_token_id", -1, -1, &s->bos));
  s->eos[0] = 2, s->eos_count = !eos && old;
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
  for (int i = 0; i < FAMILIES; i++)
    if (is_text(kind, pylora_family_names[i])) {
      s->family = (pylora_family)i;
      return PYLORA_OK;
    }
  REFUSE("%.300s: model_type is '%.80s'; supported are llama, mistral, qwen2, qwen3", c->path,
         json_is(kind, JSON_TEXT) ? kind->u.text : "?");
}

static int read(const config *c, pylora_settings *s) {
  if (c->j.value->type != JSON_OBJECT) WRONG("%.300s: this is not a JSON object", c->path);
  TRY(family(c, s));
  TRY(refuse(c));
  const int qwen = s->family == QWEN2 || s->family == QWEN3;
  TRY(whole(c, "vocab_size", -1, -1, &s->vocab));
  TRY(whole(c, "hidden_size", -1, -1, &s->hidden));
  TRY(whole(c, "intermediate_size", -1, -1, &s->inner));
  TRY(whole(c, "num_hidden_layers", -1, -1, &s->layers));
  TRY(whole(c, "num_attention_heads", -1, -1, &s->heads));
  if (s->heads < 1) WRONG("%.300s: num_attention_heads must be from 1 on", c->path);
  const int64_t kv = qwen ? 32 : s->family == MISTRAL ? 8 : s->heads;
  TRY(whole(c, "num_key_value_heads", kv, s->heads, &s->kv_heads));
  const int64_t head = s->hidden / s->heads;
  TRY(whole(c, "head_dim", s->family == QWEN3 ? 128 : head, head, &s->head_dim));
  const int64_t longest = qwen ? 32768 : s->family == MISTRAL ? 131072 : 2048;
  TRY(whole(c, "max_position_embeddings", longest, -1, &s->positions));
  s->eps = 1e-6;
  const pylora_json_value *eps = pylora_json_member(&c->j, c->j.value, "rms_norm_eps");
  if (eps) TRY(number(c, eps, "rms_norm_eps", &s->eps));
  TRY(flag(c, "attention_bias", s->family == QWEN2, &s->qkv_bias));
  if (s->family == QWEN2 || s->family == MISTRAL) /* they ignore the key */
    s->qkv_bias = s->family == QWEN2;
  s->o_bias = s->qkv_bias && s->family != QWEN2;
  TRY(flag(c, "mlp_bias", 0, &s->mlp_bias));
  s->mlp_bias = s->mlp_bias && s->family == LLAMA;
  s->qk_norm = s->family == QWEN3;
  TRY(flag(c, "tie_word_embeddings", 0, &s->tied));
  TRY(rope(c, s));
  TRY(window(c, s));
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
