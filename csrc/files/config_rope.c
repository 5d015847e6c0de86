/* config_rope.c - the rotary settings of a config.json, in both spellings; the rules are those of
 * pylora/model/families/common.py. */
#include <string.h>

#include "files/config.h"

int pylora_config_whole_head(const config *c, const pylora_json_value *object) {
  const pylora_json_value *v = in(c, object, "partial_rotary_factor");
  if (v && (v->type != JSON_NUMBER || json_number(v) != 1))
    REFUSE("%.300s: partial_rotary_factor other than 1 is not supported", c->path);
  return PYLORA_OK;
}

/* YaRN's: positive numbers, and nothing that is not known. */
static int yarn(const config *c, const pylora_json_value *raw, const pylora_settings *s,
                pylora_scaling *out) {
  static const char *const others[] = {"rope_type",        "type",     "rope_theta",
                                       "mrope_section",    "truncate", "partial_rotary_factor",
                                       "mrope_interleaved"};
  const struct {
    const char *key;
    double *to;
  } keys[] = {{"factor", &out->factor},
              {"original_max_position_embeddings", &out->original},
              {"beta_fast", &out->beta_fast},
              {"beta_slow", &out->beta_slow},
              {"attention_factor", &out->attention_factor},
              {"mscale", &out->mscale},
              {"mscale_all_dim", &out->mscale_all}};
  out->kind = ROPE_YARN;
  out->original = (double)s->positions;
  JSON_EACH(item, &c->j, raw) {
    int known = item->type == JSON_NULL;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
      known |= strcmp(item->key, others[i]) == 0;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
      if (strcmp(item->key, keys[i].key) != 0) continue;
      known = 1;
      if (item->type == JSON_NULL) continue;
      TRY(number(c, item, keys[i].key, keys[i].to));
      if (!(*keys[i].to > 0))
        WRONG("%.300s: %s of rope_scaling must be a positive number", c->path, keys[i].key);
    }
    if (!known)
      REFUSE("%.300s: rope_scaling of type yarn has '%.60s', which is not supported", c->path,
             item->key);
  }
  const pylora_json_value *cut = in(c, raw, "truncate");
  if (cut && cut->type != JSON_TRUE && cut->type != JSON_FALSE)
    WRONG("%.300s: truncate of rope_scaling must be true or false", c->path);
  out->as_it_is = cut && cut->type == JSON_FALSE;
  const pylora_json_value *own = get(c, keys[1].key), /* beside the scaling it counts more */
      *factor = pylora_json_member(&c->j, raw, "factor");
  if (own) TRY(number(c, own, keys[1].key, &out->original));
  if (!factor) WRONG("%.300s: rope_scaling lacks factor", c->path);
  if (factor->type == JSON_NULL) out->factor = (double)s->positions / out->original;
  return PYLORA_OK;
}

/* One set of rotary parameters (NULL: none); `theta` holds what counts where it says none. */
static int one_rope(const config *c, const pylora_json_value *raw, const pylora_settings *s,
                    double *theta, pylora_scaling *out) {
  const pylora_json_value *base = raw ? in(c, raw, "rope_theta") : NULL;
  if (base && !pylora_json_empty(base)) TRY(number(c, base, "rope_theta", theta));
  if (!raw) return PYLORA_OK;
  TRY(pylora_config_whole_head(c, raw));
  const pylora_json_value *kind = pylora_json_member(&c->j, raw, "rope_type");
  if (!kind) kind = pylora_json_member(&c->j, raw, "type");
  if (!kind || kind->type == JSON_NULL || is_text(kind, "default")) return PYLORA_OK;
  if (is_text(kind, "mrope")) return PYLORA_OK;
  if (is_text(kind, "yarn")) return yarn(c, raw, s, out);
  const int linear = is_text(kind, "linear");
  if (!linear && !is_text(kind, "llama3"))
    REFUSE("%.300s: rope_scaling of type '%.40s' is not supported by the C library; supported are "
           "linear, llama3 and yarn",
           c->path, kind->type == JSON_TEXT ? kind->u.text : "?");
  out->kind = linear ? ROPE_LINEAR : ROPE_LLAMA3;
  out->original = (double)s->positions;
  const struct {
    const char *key;
    double *to;
  } keys[] = {{"factor", &out->factor},
              {"low_freq_factor", &out->low},
              {"high_freq_factor", &out->high},
              {"original_max_position_embeddings", &out->original}};
  for (int i = 0; i < (linear ? 1 : 4); i++) {
    const pylora_json_value *v = in(c, raw, keys[i].key);
    if (i == 3 && get(c, keys[i].key))
      v = get(c, keys[i].key); /* beside the scaling it counts more */
    if (v)
      TRY(number(c, v, keys[i].key, keys[i].to));
    else if (i < 3)
      WRONG("%.300s: rope_scaling lacks %s", c->path, keys[i].key);
  }
  return PYLORA_OK;
}

static const pylora_json_value *unless_empty(const pylora_json_value *v) {
  return v && !pylora_json_empty(v) ? v : NULL;
}

int pylora_config_rope(const config *c, pylora_settings *s, double usual) {
  const pylora_json_value *raw = unless_empty(get(c, "rope_scaling")),
                          *theta = unless_empty(get(c, "rope_theta"));
  const pylora_json_value *nested = unless_empty(get(c, "rope_parameters"));
  s->theta = usual, s->local_theta = 1e4;
  if (theta) TRY(number(c, theta, "rope_theta", &s->theta));
  if (s->family == OLMO3) s->local_theta = s->theta;
  if (s->family == GEMMA3 || s->family == OLMO3) {
    const pylora_json_value *full = NULL, *local = NULL;
    if (nested && nested->type == JSON_OBJECT) {
      full = unless_empty(in(c, nested, "full_attention"));
      local = unless_empty(in(c, nested, "sliding_attention"));
    }
    if (!full) full = raw;
    if ((full && full->type != JSON_OBJECT) || (local && local->type != JSON_OBJECT))
      REFUSE("%.300s: rope_parameters must have an object per layer type", c->path);
    const pylora_json_value *base = unless_empty(get(c, "rope_local_base_freq"));
    if (base && s->family == GEMMA3) TRY(number(c, base, "rope_local_base_freq", &s->local_theta));
    s->two_ropes = 1;
    TRY(one_rope(c, full, s, &s->theta, &s->scaling));
    TRY(one_rope(c, local, s, &s->local_theta, &s->local_scaling));
    s->scaling.as_it_is = s->local_scaling.as_it_is = 0; /* transformers looks for it elsewhere */
    return PYLORA_OK;
  }
  if (!raw) raw = nested;
  int flat = !raw || raw->type == JSON_OBJECT;
  if (raw && flat) JSON_EACH(item, &c->j, raw) flat &= item->type != JSON_OBJECT;
  if (!flat) REFUSE("%.300s: rope parameters per layer type are not supported", c->path);
  return one_rope(c, raw, s, &s->theta, &s->scaling);
}
