/* settings.c - what every model's settings must keep. */
#include <math.h>

#include "files/model.h"

static int bad(const char *where, pylora_message *why, const char *what, long long value) {
  return pylora_fail(why, PYLORA_E_FILE, "%.300s: %s, got %lld", where, what, value);
}

static int check_scaling(const char *where, const pylora_scaling *r, int64_t pairs,
                         pylora_message *why) {
  if (r->kind != ROPE_PLAIN && (!(r->factor > 0) || r->factor > 1e300))
    return pylora_fail(
        why, PYLORA_E_FILE,
        "%.300s: the factor of rope scaling must be a positive finite number, got %g", where,
        r->factor);
  if (r->kind == ROPE_LLAMA3 &&
      (!(r->low > 0) || !(r->high > r->low) || !(r->original > 0) || r->high > 1e300))
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: rope scaling of type llama3 needs 0 < low_freq_factor < "
                       "high_freq_factor and a positive original length",
                       where);
  const double more[] = {r->beta_fast, r->beta_slow, r->attention_factor, r->mscale, r->mscale_all};
  const int longer = r->kind == ROPE_LONG;
  for (size_t i = 0; (longer || r->kind == ROPE_YARN) && i < sizeof more / sizeof *more; i++)
    if (!(more[i] >= 0) || more[i] > 1e300 || !(r->original > 0) || r->original > 1e300)
      return pylora_fail(why, PYLORA_E_FILE,
                         "%.300s: rope scaling of type %s needs positive finite numbers", where,
                         longer ? "longrope" : "yarn");
  for (int64_t i = 0; longer && i < 2 * pairs; i++)
    if (!(r->divisors[i] > 0) || r->divisors[i] > 1e300)
      return pylora_fail(why, PYLORA_E_FILE,
                         "%.300s: the factors of rope scaling of type longrope must be positive "
                         "finite numbers, got %g",
                         where, r->divisors[i]);
  return PYLORA_OK;
}

/* The part of a head that is rotated. */
static int check_rotated(const char *where, const pylora_settings *s, pylora_message *why) {
  if (pylora_families[s->family].learned) return PYLORA_OK;
  const double part = s->partial == 0 ? 1 : s->partial;
  if (s->head_dim % 2)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: the size of a head must be even for rotary embedding, got %lld",
                       where, (long long)s->head_dim);
  const double turned = floor((double)s->head_dim * part);
  if (!(part > 0) || !(part <= 1) || turned < 2)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: partial_rotary_factor must leave 2 to %lld numbers of a head to "
                       "rotate, got %g",
                       where, (long long)s->head_dim, part);
  if (fmod(turned, 2) != 0)
    return pylora_fail(why, PYLORA_E_UNSUPPORTED,
                       "%.300s: partial_rotary_factor %g of head_dim %lld rotates %.0f numbers of "
                       "a head, which are no pairs",
                       where, part, (long long)s->head_dim, turned);
  return PYLORA_OK;
}

static int check_experts(const char *where, const pylora_settings *s, pylora_message *why) {
  if (!s->experts) return PYLORA_OK;
  const struct {
    const char *what;
    int64_t value, most;
  } whole[] = {
      {"the number of experts must be from 1 to 65536", s->experts, PYLORA_MAX_EXPERTS},
      {"the number of experts of a token must be from 1 to that of experts", s->top_k, s->experts},
      {"the size of an expert must be from 1 to 2147483647", s->expert_size, INT32_MAX},
  };
  for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
    if (whole[i].value < 1 || whole[i].value > whole[i].most)
      return bad(where, why, whole[i].what, whole[i].value);
  return PYLORA_OK;
}

int pylora_settings_check(const char *where, const pylora_settings *s, pylora_message *why) {
  const struct {
    const char *what;
    int64_t value, most;
  } whole[] = {
      {"the size of the vocabulary must be from 1 to 2147483647", s->vocab, INT32_MAX},
      {"the hidden size must be from 1 to 2147483647", s->hidden, INT32_MAX},
      {"the size of the MLP must be from 1 to 2147483647", s->inner, INT32_MAX},
      {"the number of layers must be from 1 to 10000", s->layers, PYLORA_MAX_LAYERS},
      {"the number of heads must be from 1 to 65536", s->heads, 65536},
      {"the number of key-value heads must be from 1 to 65536", s->kv_heads, 65536},
      {"the size of a head must be from 1 to 65536", s->head_dim, 65536},
      {"the longest sequence must be from 1 to 2147483647 tokens", s->positions, INT32_MAX},
  };
  for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
    if (whole[i].value < 1 || whole[i].value > whole[i].most)
      return bad(where, why, whole[i].what, whole[i].value);
  if (s->heads % s->kv_heads)
    return bad(where, why, "the number of heads must be a multiple of that of key-value heads",
               s->heads);
  TRY(check_rotated(where, s, why));
  TRY(check_experts(where, s, why));
  if (s->window < 0 || s->window > INT32_MAX)
    return bad(where, why, "the sliding window must be from 1 to 2147483647", s->window);
  if (!(s->eps > 0) || !(s->theta > 0) || s->eps > 1e300 || s->theta > 1e300)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: the norms' epsilon and the rotary base must be positive finite "
                       "numbers, got %g and %g",
                       where, s->eps, s->theta);
  for (int i = 0; i < 1 + s->two_ropes; i++) {
    const pylora_scaling *r = i ? &s->local_scaling : &s->scaling;
    TRY(check_scaling(where, r, pylora_pairs(s), why));
  }
  const struct {
    const char *what;
    double value;
  } reals[] = {
      {"local rotary base", s->two_ropes ? s->local_theta : 1},
      {"scale of attention", s->attention_scale == 0 ? 1 : s->attention_scale},
      {"multiplier of embeddings", s->embedding_multiplier == 0 ? 1 : s->embedding_multiplier},
      {"multiplier of residuals", s->residual_multiplier == 0 ? 1 : s->residual_multiplier},
      {"multiplier of logits", s->logit_multiplier == 0 ? 1 : s->logit_multiplier},
  };
  for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
    if (!(fabs(reals[i].value) <= 1e30) || fabs(reals[i].value) < 1e-30)
      return pylora_fail(why, PYLORA_E_FILE, "%.300s: the %s must be a finite number but 0, got %g",
                         where, reals[i].what, reals[i].value);
  if (!(s->attention_softcap >= 0) || !(s->logit_softcap >= 0) || s->attention_softcap > 1e30 ||
      s->logit_softcap > 1e30)
    return pylora_fail(why, PYLORA_E_FILE, "%.300s: a soft cap must be a positive number", where);
  for (int i = -1; i < s->eos_count; i++) {
    const int64_t id = i < 0 ? s->bos : s->eos[i];
    if ((i >= 0 || id >= 0) && (id < 0 || id >= s->vocab))
      return bad(where, why, "the tokens of beginning and end must be in the vocabulary", id);
  }
  return PYLORA_OK;
}

int pylora_prefix(pylora_message *why, const char *where, int status) {
  if (!status || !why) return status;
  pylora_message was = *why;
  pylora_say(why, "%.300s: %.460s", where, was.text);
  return status;
}
