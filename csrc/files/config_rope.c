/* config_rope.c - the rotary settings of a config.json, in both spellings; the rules are those of
 * pylora/model/families/common.py. */
#include <string.h>

#include "files/config.h"

int pylora_config_partial(pylora_family family) { return family == PHI3 || family == GPT_NEOX; }

/* The part of each head that is rotated: beside the scaling it counts more. */
static int partial(const config *c, const pylora_json_value *raw, pylora_settings *s,
                   double otherwise) {
  const pylora_json_value *v = raw ? in(c, raw, "partial_rotary_factor") : NULL;
  if (!v || pylora_json_empty(v)) v = get(c, "partial_rotary_factor");
  s->partial = otherwise;
  if (v && !pylora_json_empty(v)) TRY(number(c, v, "partial_rotary_factor", &s->partial));
  if (!(s->partial > 0) || s->partial > 1)
    WRONG("%.300s: partial_rotary_factor must be above 0, at most 1, got %g", c->path, s->partial);
  if (s->partial != 1 && !pylora_config_partial(s->family))
    REFUSE("%.300s: partial_rotary_factor is %g, and a %s model has no such feature here", c->path,
           s->partial, pylora_families[s->family].name);
  return PYLORA_OK;
}

/* Keys that say nothing of the scaling itself. */
static int beside(const char *key) {
  static const char *const others[] = {
      "rope_type",        "type", "rope_theta", "mrope_section", "partial_rotary_factor",
      "mrope_interleaved"};
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    if (strcmp(key, others[i]) == 0) return 1;
  return 0;
}

/* The list of a number for each pair of a head. */
static int listed(const config *c, const pylora_json_value *raw, const char *key, int64_t pairs,
                  const pylora_json_value **out) {
  *out = in(c, raw, key);
  if (!json_is(*out, JSON_LIST) || (*out)->items != pairs)
    WRONG("%.300s: %s of rope_scaling must be a list of %lld numbers, one for each pair that is "
          "rotated",
          c->path, key, (long long)pairs);
  return PYLORA_OK;
}

/* LongRoPE's: a factor for each pair, another set for sequences beyond the original length. */
static int longrope(const config *c, const pylora_json_value *raw, const pylora_settings *s,
                    pylora_scaling *out) {
  const struct {
    const char *key;
    double *to;
  } keys[] = {{"original_max_position_embeddings", &out->original},
              {"factor", &out->factor},
              {"attention_factor", &out->attention_factor}};
  out->kind = ROPE_LONG;
  out->original = (double)s->positions;
  JSON_EACH(item, &c->j, raw) {
    int known = item->type == JSON_NULL || beside(item->key) ||
                strcmp(item->key, "short_factor") == 0 || strcmp(item->key, "long_factor") == 0;
    for (int i = 0; i < 3; i++) {
      if (strcmp(item->key, keys[i].key) != 0) continue;
      known = 1;
      if (item->type != JSON_NULL) TRY(number(c, item, keys[i].key, keys[i].to));
    }
    if (!known)
      REFUSE("%.300s: rope_scaling of type longrope has '%.60s', which is not supported", c->path,
             item->key);
  }
  const pylora_json_value *own = get(c, keys[0].key), *factor = in(c, raw, "factor");
  if (own) TRY(number(c, own, keys[0].key, &out->original));
  if (!own && s->family == PHI3 && !value_of(c, keys[0].key))
    out->original = 4096; /* its class's */
  if (!(out->original > 0)) WRONG("%.300s: %s must be positive", c->path, keys[0].key);
  if (!factor) out->factor = (double)s->positions / out->original;
  const int64_t pairs = s->head_dim <= 65536 ? pylora_pairs(s) : 0;
  const pylora_json_value *lists[2];
  if (pairs < 1) WRONG("%.300s: head_dim must be from 2 to 65536", c->path);
  TRY(listed(c, raw, "short_factor", pairs, &lists[0]));
  TRY(listed(c, raw, "long_factor", pairs, &lists[1]));
  double *to = out->divisors = pylora_take((size_t)pairs, 2 * sizeof *to);
  if (!to) return pylora_no_memory(c->why, c->path, (double)pairs * 16);
  for (int i = 0; i < 2; i++)
    JSON_EACH(item, &c->j, lists[i]) TRY(number(c, item, "a factor of longrope", to++));
  return PYLORA_OK;
}

/* YaRN's: positive numbers, and nothing that is not known. */
static int yarn(const config *c, const pylora_json_value *raw, const pylora_settings *s,
                pylora_scaling *out) {
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
    int known = item->type == JSON_NULL || beside(item->key) || strcmp(item->key, "truncate") == 0;
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
  const pylora_json_value *kind = pylora_json_member(&c->j, raw, "rope_type");
  if (!kind) kind = pylora_json_member(&c->j, raw, "type");
  if (!kind || kind->type == JSON_NULL || is_text(kind, "default")) return PYLORA_OK;
  if (is_text(kind, "mrope")) return PYLORA_OK;
  if (s->family == PHI3) { /* older files call it by other names */
    if (is_text(kind, "longrope") || is_text(kind, "su") || is_text(kind, "yarn"))
      return longrope(c, raw, s, out);
    REFUSE("%.300s: rope_scaling of type '%.40s'; a Phi-3 model has longrope", c->path,
           kind->type == JSON_TEXT ? kind->u.text : "?");
  }
  if (is_text(kind, "longrope")) return longrope(c, raw, s, out);
  if (is_text(kind, "yarn")) return yarn(c, raw, s, out);
  const int linear = is_text(kind, "linear"), dynamic = is_text(kind, "dynamic");
  if (!linear && !dynamic && !is_text(kind, "llama3"))
    REFUSE("%.300s: rope_scaling of type '%.40s' is not supported; supported are linear, dynamic, "
           "llama3, yarn and longrope",
           c->path, kind->type == JSON_TEXT ? kind->u.text : "?");
  if (dynamic) JSON_EACH(item, &c->j, raw)
  if (item->type != JSON_NULL && !beside(item->key) && strcmp(item->key, "factor") != 0)
    REFUSE("%.300s: rope_scaling of type dynamic has '%.60s', which is not supported", c->path,
           item->key);
  out->kind = linear ? ROPE_LINEAR : dynamic ? ROPE_DYNAMIC : ROPE_LLAMA3;
  out->original = (double)s->positions;
  const struct {
    const char *key;
    double *to;
  } keys[] = {{"factor", &out->factor},
              {"low_freq_factor", &out->low},
              {"high_freq_factor", &out->high},
              {"original_max_position_embeddings", &out->original}};
  for (int i = 0; i < (linear || dynamic ? 1 : 4); i++) {
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

int pylora_config_rope(const config *c, pylora_settings *s, double usual, double part) {
  const char *key = s->family == GPT_NEOX ? "rotary_emb_base" : "rope_theta";
  const pylora_json_value *raw = unless_empty(get(c, "rope_scaling")),
                          *theta = unless_empty(get(c, key));
  const pylora_json_value *nested = unless_empty(get(c, "rope_parameters"));
  s->theta = usual, s->local_theta = 1e4;
  if (theta) TRY(number(c, theta, key, &s->theta));
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
    for (int i = 0; i < 2; i++) TRY(partial(c, i ? local : full, s, part));
    TRY(one_rope(c, full, s, &s->theta, &s->scaling));
    TRY(one_rope(c, local, s, &s->local_theta, &s->local_scaling));
    s->scaling.as_it_is = s->local_scaling.as_it_is = 0; /* transformers looks for it elsewhere */
    return PYLORA_OK;
  }
  if (!raw) raw = nested;
  int flat = !raw || raw->type == JSON_OBJECT;
  if (raw && flat) JSON_EACH(item, &c->j, raw) flat &= item->type != JSON_OBJECT;
  if (!flat) REFUSE("%.300s: rope parameters per layer type are not supported", c->path);
  TRY(partial(c, raw, s, part));
  return one_rope(c, raw, s, &s->theta, &s->scaling);
}
