/* settings.c - what every model's settings must keep, and the sizes of its modules. */
#include <math.h>

#include "files/model.h"

const pylora_family_facts pylora_families[FAMILIES] = {
    [LLAMA] = {"llama", "llama", 1, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [MISTRAL] = {"mistral", NULL, 1, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [QWEN2] = {"qwen2", "qwen2", 0, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [QWEN3] = {"qwen3", "qwen3", 0, 0, 0, BEFORE, OF_HEADS, PYLORA_ROPE_HALF},
    [GEMMA2] = {"gemma2", "gemma2", 0, 1, 1, BOTH, NO_NORM, PYLORA_ROPE_HALF},
    [GEMMA3] = {"gemma3_text", "gemma3", 0, 1, 1, BOTH, OF_HEADS, PYLORA_ROPE_HALF},
    [GRANITE] = {"granite", "granite", 1, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [SMOLLM3] = {"smollm3", "smollm3", 1, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [OLMO2] = {"olmo2", "olmo2", 0, 0, 0, AFTER, OF_ALL, PYLORA_ROPE_HALF},
    [OLMO3] = {"olmo3", NULL, 0, 0, 0, AFTER, OF_ALL, PYLORA_ROPE_HALF},
    [GEMMA] = {"gemma", "gemma", 0, 1, 1, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [MINISTRAL] = {"ministral", NULL, 1, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [SEED_OSS] = {"seed_oss", "seed_oss", 0, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_HALF},
    [ERNIE45] = {"ernie4_5", "ernie4_5", 0, 0, 0, BEFORE, NO_NORM, PYLORA_ROPE_INTERLEAVED},
};

const char *pylora_norm_stem(pylora_family family, int norm) {
  static const char *const stems[NORMS] = {"attn_norm",     "ffn_norm",    "post_attention_norm",
                                           "post_ffw_norm", "attn_q_norm", "attn_k_norm"};
  return stems[family == SEED_OSS && norm == MID_NORM ? AFTER_ATTENTION : norm];
}

const char *pylora_norm_suffix(pylora_family family, int norm) {
  const pylora_family_facts *f = &pylora_families[family];
  static const char *const names[NORMS] = {"input_layernorm",          "pre_feedforward_layernorm",
                                           "post_attention_layernorm", "post_feedforward_layernorm",
                                           "self_attn.q_norm",         "self_attn.k_norm"};
  if (norm >= Q_NORM) return f->qk_norm ? names[norm] : NULL;
  if (f->places == BEFORE)
    return norm == INPUT_NORM ? names[norm] : norm == MID_NORM ? names[AFTER_ATTENTION] : NULL;
  return f->places == BOTH || norm >= AFTER_ATTENTION ? names[norm] : NULL;
}

static int bad(const char *where, pylora_message *why, const char *what, long long value) {
  return pylora_fail(why, PYLORA_E_FILE, "%.300s: %s, got %lld", where, what, value);
}

static int check_scaling(const char *where, const pylora_scaling *r, pylora_message *why) {
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
  for (size_t i = 0; r->kind == ROPE_YARN && i < sizeof more / sizeof *more; i++)
    if (!(more[i] >= 0) || more[i] > 1e300 || !(r->original > 0))
      return pylora_fail(why, PYLORA_E_FILE,
                         "%.300s: rope scaling of type yarn needs positive finite numbers", where);
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
  if (s->head_dim % 2)
    return bad(where, why, "the size of a head must be even for rotary embedding", s->head_dim);
  if (s->window < 0 || s->window > INT32_MAX)
    return bad(where, why, "the sliding window must be from 1 to 2147483647", s->window);
  if (!(s->eps > 0) || !(s->theta > 0) || s->eps > 1e300 || s->theta > 1e300)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: the norms' epsilon and the rotary base must be positive finite "
                       "numbers, got %g and %g",
                       where, s->eps, s->theta);
  for (int i = 0; i < 1 + s->two_ropes; i++) {
    const pylora_scaling *r = i ? &s->local_scaling : &s->scaling;
    TRY(check_scaling(where, r, why));
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

const char *const pylora_module_suffix[MODULES] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj",
};

void pylora_module_size(const pylora_settings *s, int64_t number, int64_t *d, int64_t *k,
                        int *bias) {
  const int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
  const int64_t place = number - MODULES * s->layers; /* 0: the head, 1: the embedding */
  if (place >= 0) {
    *d = place ? s->hidden : s->vocab, *k = place ? s->vocab : s->hidden, *bias = 0;
    return;
  }
  switch (number % MODULES) {
  case PYLORA_Q:
    *d = q, *k = s->hidden, *bias = s->qkv_bias;
    break;
  case PYLORA_K:
  case PYLORA_V:
    *d = kv, *k = s->hidden, *bias = s->qkv_bias;
    break;
  case PYLORA_O:
    *d = s->hidden, *k = q, *bias = s->o_bias;
    break;
  case PYLORA_DOWN:
    *d = s->hidden, *k = s->inner, *bias = s->mlp_bias;
    break;
  default:
    *d = s->inner, *k = s->hidden, *bias = s->mlp_bias;
  }
}

int pylora_prefix(pylora_message *why, const char *where, int status) {
  if (!status || !why) return status;
  pylora_message was = *why;
  pylora_say(why, "%.300s: %.460s", where, was.text);
  return status;
}
