/* adapter_config.c - what an adapter_config.json says, checked; nothing in it is passed over in silence.
 *
 * Every field of PEFT's LoraConfig is carried out, without effect on the result of a trained adapter, or refused by
 * name; an unknown one is refused unless it is empty.  The lists are those of pylora/adapters/loraconfig.py. */
#include <math.h>
#include <stdio.h>

#include "files/adapter.h"

enum { MAX_CONFIG = 16 << 20, MAX_PATTERN = 4096 };
enum { MAX_NAMES = 1 << 16, MAX_KEYS = 1 << 14 }; /* more than a model has modules */

#define WRONG(...) return pylora_fail(why, PYLORA_E_PLAN, __VA_ARGS__)
#define REFUSE(...) return pylora_fail(why, PYLORA_E_UNSUPPORTED, __VA_ARGS__)

static const char *const known[] = {
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "bias",
    "lora_bias",
    "init_lora_weights",
    "modules_to_save",
    "fan_in_fan_out",
    "task_type",
    "base_model_name_or_path",
    "peft_type",
    /* where a file came from, how A and B were first filled, what is read only beside a refused field */
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "runtime_config",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
};

static const char *const refused[][2] = {
    {"use_dora", "weight-decomposed LoRA (DoRA) rescales the merged weight"},
    {"alora_invocation_tokens", "activated LoRA (aLoRA) switches the adapter on inside a sequence"},
    {"layer_replication", "the model's layers are repeated"},
    {"target_parameters", "the adapter sits on bare parameters, not on modules"},
    {"trainable_token_indices", "single rows of the embedding are trained"},
    {"megatron_config", "the layers are Megatron's parallel layers"},
    {"use_qalora", "QA-LoRA pools the input before A"},
    {"use_bdlora", "block-diagonal LoRA constrains A or B"},
    {"arrow_config", "Arrow routes between several adapters"},
    {"kasa_config", "KaSA truncates the base weight and puts a diagonal between A and B"},
    {"velora_config", "VeLoRA changes the gradient of A"},
    {"monteclora_config", "Monte Carlo LoRA samples the adapter's weights"},
    {"ensure_weight_tying", "the adapters of tied layers share their tensors"},
};

static int refuse_others(const pylora_lora_config *c, pylora_message *why) {
  JSON_EACH(item, &c->j, c->j.value) {
    int fine = pylora_json_empty(item);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
      fine |= strcmp(item->key, known[i]) == 0;
    if (fine) continue;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
      if (strcmp(item->key, refused[i][0]) == 0)
        REFUSE(
            "%.300s: %s is not supported: %s; merge this adapter into its base model with PEFT, or "
            "retrain without it",
            c->path, item->key, refused[i][1]);
    REFUSE(
        "%.300s: the field '%.100s' is unknown to pylora, so what it would change cannot be kept; "
        "remove the field if it has no effect on the result",
        c->path, item->key);
  }
  return PYLORA_OK;
}

/* ---- values ---- */

static const pylora_json_value *get(const pylora_lora_config *c, const char *key) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  return v && v->type != JSON_NULL ? v : NULL;
}

static int rank(const pylora_lora_config *c, const char *what, const pylora_json_value *v,
                int64_t *out, pylora_message *why) {
  if (v->type != JSON_NUMBER || !v->is_whole || v->u.whole < 1 || v->u.whole > INT32_MAX)
    WRONG("%.300s: %.100s: a rank must be a positive whole number", c->path, what);
  *out = v->u.whole;
  return PYLORA_OK;
}

static int alpha(const pylora_lora_config *c, const char *what, const pylora_json_value *v,
                 double *out, pylora_message *why) {
  if (v->type != JSON_NUMBER || !(json_number(v) >= 1e-30) || !(json_number(v) <= 1e30))
    WRONG("%.300s: %.100s: alpha must be a positive number, 1e-30 to 1e30", c->path, what);
  *out = json_number(v);
  return PYLORA_OK;
}

static int flag(const pylora_lora_config *c, const char *key, int *out, pylora_message *why) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  *out = v && v->type == JSON_TRUE;
  if (v && v->type != JSON_TRUE && v->type != JSON_FALSE)
    WRONG("%.300s: %s must be true or false", c->path, key);
  return PYLORA_OK;
}

/* A text or a list of texts that are not empty. */
static int names(const pylora_lora_config *c, const char *key, const pylora_json_value **out,
                 pylora_message *why) {
  const pylora_json_value *v = *out = get(c, key);
  if (!v || v->type == JSON_TEXT) {
    if (v && strlen(v->u.text) > MAX_PATTERN)
      WRONG("%.300s: %s is longer than %d characters", c->path, key, MAX_PATTERN);
    return PYLORA_OK;
  }
  int fine = v->type == JSON_LIST && v->items <= MAX_NAMES;
  if (fine) JSON_EACH(item, &c->j, v) fine &= item->type == JSON_TEXT && item->u.text[0] != 0;
  if (!fine)
    WRONG("%.300s: %s must be a text or a list of names that are not empty, at most 65536 of them",
          c->path, key);
  return PYLORA_OK;
}

static int patterns(pylora_lora_config *c, pylora_message *why) {
  const pylora_json_value *v = c->rank_pattern = get(c, "rank_pattern");
  const pylora_json_value *w = c->alpha_pattern = get(c, "alpha_pattern");
  if ((v && v->type != JSON_OBJECT) || (w && w->type != JSON_OBJECT))
    WRONG("%.300s: rank_pattern and alpha_pattern must be objects of patterns and numbers",
          c->path);
  if ((v && v->items > MAX_KEYS) || (w && w->items > MAX_KEYS))
    WRONG("%.300s: rank_pattern and alpha_pattern have at most %d keys", c->path, MAX_KEYS);
  int64_t r;
  double a;
  if (v) JSON_EACH(item, &c->j, v) TRY(rank(c, item->key, item, &r, why));
  if (w) JSON_EACH(item, &c->j, w) TRY(alpha(c, item->key, item, &a, why));
  return PYLORA_OK;
}

static int layers(pylora_lora_config *c, pylora_message *why) {
  const pylora_json_value *v = c->layers = get(c, "layers_to_transform");
  int fine = !v || v->type == JSON_LIST || (v->type == JSON_NUMBER && v->is_whole);
  if (v && v->type == JSON_LIST) {
    JSON_EACH(item, &c->j, v) fine &= item->type == JSON_NUMBER && item->is_whole;
    if (!v->items) c->layers = NULL; /* PEFT takes an empty list as every layer */
  }
  if (!fine) WRONG("%.300s: layers_to_transform must be a whole number or a list of them", c->path);
  TRY(names(c, "layers_pattern", &c->layers_pattern, why));
  if (c->layers_pattern && pylora_json_empty(c->layers_pattern)) c->layers_pattern = NULL;
  if (json_is(c->targets, JSON_TEXT) && (c->layers || c->layers_pattern))
    WRONG(
        "%.300s: layers_to_transform and layers_pattern need target_modules to be a list of names",
        c->path);
  if (c->layers_pattern && !c->layers)
    WRONG("%.300s: layers_pattern is given without layers_to_transform; name the layers too",
          c->path);
  return PYLORA_OK;
}

static int is_text(const pylora_json_value *v, const char *text) {
  return json_is(v, JSON_TEXT) && strcmp(v->u.text, text) == 0;
}

/* Whether a text begins with, or is, a word, whatever its capitals. */
static int begins(const char *text, const char *word, int whole) {
  for (; *word; text++, word++)
    if ((*text >= 'A' && *text <= 'Z' ? *text + 32 : *text) != *word) return 0;
  return !whole || !*text;
}

/* How A and B were first filled matters only where the base was changed with them. */
static int initial(const pylora_lora_config *c, const pylora_json_value *v, pylora_message *why) {
  static const char *const fine[] = {"gaussian", "eva", "orthogonal", "mica"};
  static const char *const changes[] = {"pissa", "olora", "corda", "loftq", "lora_ga"};
  if (!v || v->type == JSON_TRUE || v->type == JSON_FALSE) return PYLORA_OK;
  const char *text = v->type == JSON_TEXT ? v->u.text : "?";
  for (size_t i = 0; i < sizeof fine / sizeof *fine; i++)
    if (begins(text, fine[i], 1)) return PYLORA_OK;
  for (size_t i = 0; i < sizeof changes / sizeof *changes; i++)
    if (begins(text, changes[i], 0))
      REFUSE(
          "%.300s: init_lora_weights '%.40s' changed the base weights before training, so this "
          "adapter does not fit the base model that it names; save it as an ordinary one in PEFT "
          "(path_initial_model_for_weight_conversion), or merge it there",
          c->path, text);
  REFUSE("%.300s: init_lora_weights '%.40s' is not known; expected true, false, 'gaussian', 'eva', "
         "'orthogonal' or 'mica'",
         c->path, text);
}

static int settings(pylora_lora_config *c, pylora_message *why) {
  const pylora_json_value *v = get(c, "peft_type");
  if (v && !is_text(v, "LORA"))
    REFUSE("%.300s: peft_type '%.40s' is not supported, only 'LORA' is", c->path,
           v->type == JSON_TEXT ? v->u.text : "?");
  c->r = 8, c->alpha = 8; /* PEFT's defaults */
  if ((v = pylora_json_member(&c->j, c->j.value, "r"))) TRY(rank(c, "r", v, &c->r, why));
  if ((v = pylora_json_member(&c->j, c->j.value, "lora_alpha")))
    TRY(alpha(c, "lora_alpha", v, &c->alpha, why));
  v = get(c, "lora_dropout");
  if (v && (v->type != JSON_NUMBER || !(json_number(v) >= 0) || !(json_number(v) < 1)))
    WRONG("%.300s: lora_dropout must be a number in [0, 1)", c->path);
  TRY(flag(c, "use_rslora", &c->rslora, why));
  TRY(flag(c, "lora_bias", &c->lora_bias, why));
  TRY(flag(c, "fan_in_fan_out", &c->fan_in_fan_out, why));
  v = get(c, "bias");
  c->bias = is_text(v, "all") ? BIAS_ALL : is_text(v, "lora_only") ? BIAS_LORA : BIAS_NONE;
  if (v && c->bias == BIAS_NONE && !is_text(v, "none"))
    WRONG("%.300s: bias must be 'none', 'all' or 'lora_only'", c->path);
  TRY(initial(c, pylora_json_member(&c->j, c->j.value, "init_lora_weights"), why));
  v = get(c, "modules_to_save");
  if (v && !pylora_json_empty(v))
    REFUSE(
        "%.300s: modules_to_save: whole modules beside the adapter are not supported; target them "
        "with LoRA instead",
        c->path);
  return PYLORA_OK;
}

static int check(pylora_lora_config *c, pylora_message *why) {
  if (c->j.value->type != JSON_OBJECT)
    return pylora_fail(why, PYLORA_E_FILE, "%.300s: this is not a JSON object", c->path);
  TRY(settings(c, why));
  TRY(refuse_others(c, why));
  TRY(names(c, "target_modules", &c->targets, why));
  TRY(names(c, "exclude_modules", &c->exclude, why));
  TRY(patterns(c, why));
  return layers(c, why);
}

int pylora_lora_config_parse(const char *path, const char *text, size_t bytes,
                             pylora_lora_config *c, pylora_message *why) {
  *c = (pylora_lora_config){.path = path};
  TRY(pylora_json_parse(text, bytes, path, &c->j, why));
  return check(c, why);
}

int pylora_lora_config_read(const char *path, pylora_lora_config *c, pylora_message *why) {
  *c = (pylora_lora_config){.path = path};
  TRY(pylora_json_file(path, MAX_CONFIG, &c->j, why));
  return check(c, why);
}

void pylora_lora_config_free(pylora_lora_config *c) { pylora_json_free(&c->j); }
