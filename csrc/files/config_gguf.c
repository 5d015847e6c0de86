/* config_gguf.c - a model's settings out of GGUF's metadata.
 *
 * Settings that change the result and that are not carried out are refused by name.  The tensors say what the
 * metadata do not: tied embeddings, biases, and Llama 3's rope scaling, which the converter folds into a tensor of
 * frequency factors. */
#include <math.h>
#include <stdio.h>

#include "files/config_meta.h"

/* ---- what must be so ---- */

static int architecture(meta *m, pylora_settings *s) {
  const char *text = "none";
  size_t n = 4;
  pylora_file_text(m->file, "general.architecture", &text, &n);
  char list[300] = "";
  for (int i = 0; i < FAMILIES; i++) {
    const char *name = pylora_families[i].arch;
    if (!name) continue;
    if (strlen(name) == n && memcmp(name, text, n) == 0) {
      s->family = (pylora_family)i;
      snprintf(m->arch, sizeof m->arch, "%s", name);
      return PYLORA_OK;
    }
    const size_t end = strlen(list);
    snprintf(list + end, sizeof list - end, "%s%s", end ? ", " : "", name);
  }
  return pylora_fail(m->why, PYLORA_E_UNSUPPORTED,
                     "%.300s: the architecture is '%.*s'; supported by the C library are %s",
                     m->file->name, (int)(n < 80 ? n : 80), text, list);
}

static int only(const meta *m, const char *name, int64_t expected) {
  int64_t value;
  TRY(whole(m, name, expected, &value));
  if (value != expected)
    return pylora_fail(m->why, PYLORA_E_UNSUPPORTED, "%.300s: %s is %lld; only %lld is supported",
                       m->file->name, key_of(m, name).text, (long long)value, (long long)expected);
  return PYLORA_OK;
}

#define GEMMAS (1u << GEMMA2 | 1u << GEMMA3)

static int refuse(const meta *m, pylora_family family) {
  static const struct {
    const char *key;
    unsigned known; /* families that carry it out */
  } refused[] = {
      {"attention.scale", 1u << GRANITE},  {"attention.clamp_kqv", 0},
      {"attention.max_alibi_bias", 0},     {"attn_logit_softcapping", GEMMAS},
      {"final_logit_softcapping", GEMMAS}, {"embedding_scale", 1u << GRANITE},
      {"logit_scale", 1u << GRANITE},      {"residual_scale", 1u << GRANITE},
      {"expert_weights_scale", 0},
  };
  for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
    if (has(m, refused[i].key) && !(refused[i].known & 1u << family))
      return pylora_fail(m->why, PYLORA_E_UNSUPPORTED, "%.300s: %s is set; it is not supported",
                         m->file->name, key_of(m, refused[i].key).text);
  int parallel = 1;
  const int given = has(m, "use_parallel_residual");
  if (given && family != GPT_NEOX && (!truth(m, "use_parallel_residual", &parallel) || parallel))
    return pylora_fail(m->why, PYLORA_E_UNSUPPORTED, "%.300s: %s is set; it is not supported",
                       m->file->name, key_of(m, "use_parallel_residual").text);
  return PYLORA_OK;
}

/* Layers with a window: those that a list of the file names, or three of four. */
static int olmo3(const meta *m, pylora_settings *s, int64_t layers) {
  const pylora_meta *list =
      pylora_file_meta(m->file, key_of(m, "attention.sliding_window_pattern").text);
  const int given = list && list->array && list->type == 7; /* booleans */
  if (given && (int64_t)list->count != s->layers)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: %s must have %lld values", m->file->name,
                       key_of(m, "attention.sliding_window_pattern").text, (long long)s->layers);
  for (int64_t i = 0; i < layers; i++) {
    s->local[i] = given ? list->value[i] != 0 : (i + 1) % 4 != 0;
    s->rope[i] = (signed char)s->local[i];
  }
  s->two_ropes = 1, s->local_theta = s->theta;
  return PYLORA_OK;
}

/* What a family has beside Llama; see pylora/model/families. */
static int own(const meta *m, pylora_settings *s) {
  const int64_t layers = s->layers < PYLORA_MAX_LAYERS ? s->layers : PYLORA_MAX_LAYERS;
  double scaling;
  if (s->family == GRANITE) {
    TRY(maybe(m, "attention.scale", 1, &s->attention_scale));
    TRY(maybe(m, "embedding_scale", 1, &s->embedding_multiplier));
    TRY(maybe(m, "residual_scale", 1, &s->residual_multiplier));
    TRY(maybe(m, "logit_scale", 1, &scaling));
    s->logit_multiplier = 1 / scaling;
  }
  if (s->family == GPT2)
    for (int64_t i = 0; i < layers; i++) s->rope[i] = -1;
  if (s->family == GPT_NEOX && has(m, "use_parallel_residual") &&
      !truth(m, "use_parallel_residual", &s->parallel))
    return wrong(m, "use_parallel_residual", "truth value");
  if (s->family == SMOLLM3)
    for (int64_t i = 0; i < layers; i++) s->rope[i] = (i + 1) % 4 ? 0 : -1;
  if (s->family == GEMMA) s->embedding_multiplier = sqrt((double)s->hidden);
  if (s->family == OLMO3) return olmo3(m, s, layers);
  if (s->family != GEMMA2 && s->family != GEMMA3) {
    for (int64_t i = 0; i < layers; i++) s->local[i] = s->window > 0;
    return PYLORA_OK;
  }
  /* llama.cpp knows the scale of attention by the size of the model: the 27B ones have a width of heads that is
   * not their head_dim. */
  int64_t width = 256, every = s->family == GEMMA2 ? 2 : 6;
  TRY(whole(m, "attention.key_length", 256, &width));
  if (s->layers == (s->family == GEMMA3 ? 62 : 46)) width = s->hidden / s->heads;
  s->attention_scale = pow((double)width, -0.5);
  s->embedding_multiplier = sqrt((double)s->hidden);
  TRY(maybe(m, "attn_logit_softcapping", 0, &s->attention_softcap));
  TRY(maybe(m, "final_logit_softcapping", 0, &s->logit_softcap));
  TRY(whole(m, "attention.sliding_window_pattern", every, &every)); /* a list is refused by name */
  if (s->family == GEMMA2) every = 2;
  if (every < 1)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: %s must be from 1 on", m->file->name,
                       key_of(m, "attention.sliding_window_pattern").text);
  int any = 0;
  for (int64_t i = 0; i < layers; i++) {
    any |= s->local[i] = (i + 1) % every != 0;
    if (s->family == GEMMA3) s->rope[i] = (signed char)s->local[i];
  }
  if (any && s->window < 1)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: the metadata lack %s", m->file->name,
                       key_of(m, "attention.sliding_window").text);
  s->two_ropes = s->family == GEMMA3;
  return maybe(m, "rope.freq_base_swa", 1e4, &s->local_theta);
}

/* ---- all of it ---- */

/* A token's id: -1 where there is none. */
static int token(const meta *m, const char *name, int64_t *out) {
  *out = -1;
  if (pylora_file_meta(m->file, name) && !pylora_file_whole(m->file, name, out))
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: %s is not a whole number", m->file->name,
                       name);
  return PYLORA_OK;
}

/* Experts, where the family may have any; a llama that has is a Mixtral, unless a window makes it a Mistral. */
static int mixture(const meta *m, pylora_settings *s) {
  int64_t count, window, inner;
  TRY(whole(m, "expert_count", 0, &count));
  TRY(whole(m, "attention.sliding_window", 0, &window));
  if (s->family == LLAMA && count && !window) s->family = MIXTRAL;
  if (s->family != MIXTRAL && s->family != QWEN3_MOE && s->family != OLMOE)
    return only(m, "expert_count", 0);
  TRY(whole(m, "expert_count", -1, &s->experts));
  TRY(whole(m, "expert_used_count", -1, &s->top_k));
  TRY(whole(m, "feed_forward_length", -1, &inner));
  TRY(whole(m, "expert_feed_forward_length", inner, &s->expert_size));
  s->norm_experts = s->family != OLMOE;
  if (s->experts < 1)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: %s must be from 1 on", m->file->name,
                       key_of(m, "expert_count").text);
  return PYLORA_OK;
}

/* How much of a head is rotated: all of it, but in a few families. */
static int rotated(const meta *m, pylora_settings *s) {
  const int64_t head = s->heads > 0 ? s->hidden / s->heads : 0;
  int64_t count;
  if (s->family != PHI3 && s->family != GPT_NEOX)
    return only(m, "rope.dimension_count", s->head_dim);
  TRY(whole(m, "rope.dimension_count", head, &count));
  s->partial = head > 0 ? (double)count / (double)head : 1;
  if (!(s->partial > 0) || s->partial > 1)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: %s must be from 2 to %lld", m->file->name,
                       key_of(m, "rope.dimension_count").text, (long long)head);
  return PYLORA_OK;
}

int pylora_settings_gguf(const pylora_files *files, pylora_settings *s, pylora_message *why) {
  const pylora_file *file = files->file[0];
  static const char rms[] = "attention.layer_norm_rms_epsilon";
  meta m_ = {file, files, "", why}, *m = &m_;
  *s = (pylora_settings){.interleaved = 0};
  TRY(architecture(m, s));
  s->interleaved = 1; /* if the family's files are */
  s->activation = pylora_usual_activation(s->family);
  TRY(whole(m, "attention.head_count", -1, &s->heads));
  TRY(whole(m, "embedding_length", -1, &s->hidden));
  TRY(whole(m, "attention.key_length", s->heads > 0 ? s->hidden / s->heads : 0, &s->head_dim));
  if (s->head_dim < 0) s->head_dim = 0; /* refused below, by its size */
  TRY(only(m, "attention.value_length", s->head_dim));
  TRY(mixture(m, s));
  TRY(rotated(m, s));
  TRY(only(m, "expert_shared_count", 0));
  TRY(refuse(m, s->family));
  TRY(real(m, "rope.freq_base", 10000, &s->theta));
  TRY(whole(m, "attention.sliding_window", 0, &s->window));
  const int gemma = s->family == GEMMA2 || s->family == GEMMA3;
  if (s->window && s->family == OLMO2) s->family = OLMO3;
  if (s->window && s->family != LLAMA && s->family != OLMO3 && s->family != PHI3 && !gemma)
    return pylora_fail(why, PYLORA_E_UNSUPPORTED, "%.300s: a sliding window in the architecture %s",
                       file->name, m->arch);
  /* llama.cpp has no architecture of Mistral's own; its window is all that tells it apart. */
  if (s->window && s->family == LLAMA) s->family = MISTRAL;
  const pylora_tensor *embedding = pylora_files_find(files, "token_embd.weight");
  if (embedding)
    s->vocab = embedding->shape[0];
  else
    TRY(whole(m, "vocab_size", -1, &s->vocab));
  TRY(whole(m, "feed_forward_length", -1, &s->inner));
  TRY(whole(m, "block_count", -1, &s->layers));
  TRY(whole(m, "attention.head_count_kv", s->heads > 0 ? s->heads : 0, &s->kv_heads));
  TRY(whole(m, "context_length", -1, &s->positions));
  TRY(real(m, has(m, rms) ? rms : "attention.layer_norm_epsilon", -1, &s->eps));
  const int biased = pylora_files_find(files, "blk.0.attn_q.bias") != NULL;
  s->qkv_bias = s->family == QWEN2 || (biased && s->family != MISTRAL);
  s->o_bias = biased && s->family != QWEN2 && s->family != MISTRAL;
  s->mlp_bias = (s->family == LLAMA || s->family == GRANITE || s->family == SMOLLM3) &&
                pylora_files_find(files, "blk.0.ffn_gate.bias") != NULL;
  if (s->family == SEED_OSS) {
    s->o_bias = pylora_files_find(files, "blk.0.attn_output.bias") != NULL;
    s->mlp_bias = pylora_files_find(files, "blk.0.ffn_up.bias") != NULL;
  }
  if (s->family == ERNIE45) s->mlp_bias = biased;
  if (s->family == PHI3 || s->family == MIXTRAL) s->qkv_bias = s->o_bias = 0;
  if (s->family == GPT2 || s->family == GPT_NEOX) {
    s->mlp_bias = 1;
    s->qkv_bias = s->family == GPT2 || pylora_files_find(files, "blk.0.attn_qkv.bias") != NULL;
    s->o_bias = s->qkv_bias;
  }
  s->tied = pylora_files_find(files, "output.weight") == NULL;
  TRY(token(m, "tokenizer.ggml.bos_token_id", &s->bos));
  TRY(token(m, "tokenizer.ggml.eos_token_id", &s->eos[0]));
  s->eos_count = s->eos[0] >= 0;
  if (s->heads < 1) return pylora_settings_check(file->name, s, why);
  TRY(own(m, s));
  TRY(pylora_settings_check(file->name, s, why));
  if (pylora_families[s->family].learned) return PYLORA_OK;
  TRY(pylora_meta_rope(m, s));
  return pylora_settings_check(file->name, s, why);
}
