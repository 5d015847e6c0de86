/* config_gguf.c - a model's settings out of GGUF's metadata.
 *
 * Settings that change the result and that are not carried out are refused by name.  The tensors say what the
 * metadata do not: tied embeddings, biases, and Llama 3's rope scaling, which the converter folds into a tensor of
 * frequency factors. */
#include <math.h>
#include <stdio.h>

#include "files/model.h"

#define ROPE_FACTORS "rope_freqs.weight"

typedef struct meta {
  const pylora_file *file; /* the first, which has the metadata */
  const pylora_files *files;
  char arch[16];
  pylora_message *why;
} meta;

typedef struct key {
  char text[80];
} key;

static key key_of(const meta *m, const char *name) {
  key k;
  snprintf(k.text, sizeof k.text, "%s.%s", m->arch, name);
  return k;
}

static int has(const meta *m, const char *name) {
  return pylora_file_meta(m->file, key_of(m, name).text) != NULL;
}

static int wrong(const meta *m, const char *name, const char *kind) {
  return pylora_fail(m->why, PYLORA_E_UNSUPPORTED,
                     "%.300s: %s is not one %s; values that differ from layer to layer are not "
                     "supported",
                     m->file->name, key_of(m, name).text, kind);
}

/* A whole number; where the key is missing, `otherwise`, or an error where that is negative. */
static int whole(const meta *m, const char *name, int64_t otherwise, int64_t *out) {
  if (pylora_file_whole(m->file, key_of(m, name).text, out)) return PYLORA_OK;
  if (has(m, name)) return wrong(m, name, "whole number");
  if (otherwise < 0)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: the metadata lack %s", m->file->name,
                       key_of(m, name).text);
  *out = otherwise;
  return PYLORA_OK;
}

/* The file holds float32; the shortest decimal that gives it is what the author wrote. */
static double shortest(double value) {
  const float f = (float)value;
  char text[40];
  if (!isfinite(f)) return (double)f;
  for (int digits = 1; digits <= 9; digits++) {
    snprintf(text, sizeof text, "%.*e", digits - 1, (double)f);
    if (strtof(text, NULL) == f) return strtod(text, NULL);
  }
  return (double)f;
}

/* A number; where the key is missing, `otherwise`, or an error where that is negative. */
static int real(const meta *m, const char *name, double otherwise, double *out) {
  double value;
  if (pylora_file_real(m->file, key_of(m, name).text, &value)) {
    *out = shortest(value);
    return PYLORA_OK;
  }
  if (has(m, name)) return wrong(m, name, "number");
  if (otherwise < 0)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: the metadata lack %s", m->file->name,
                       key_of(m, name).text);
  *out = otherwise;
  return PYLORA_OK;
}

/* ---- what must be so ---- */

static int architecture(meta *m, pylora_settings *s) {
  const char *text = "none";
  size_t n = 4;
  pylora_file_text(m->file, "general.architecture", &text, &n);
  char list[160] = "";
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
  if (has(m, "use_parallel_residual"))
    return pylora_fail(m->why, PYLORA_E_UNSUPPORTED, "%.300s: %s is set; it is not supported",
                       m->file->name, key_of(m, "use_parallel_residual").text);
  return PYLORA_OK;
}

/* A number that is there, or `otherwise`. */
static int maybe(const meta *m, const char *name, double otherwise, double *out) {
  if (has(m, name)) return real(m, name, 0, out);
  *out = otherwise;
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

/* ---- rope scaling ---- */

static double clip(double x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

/* Whether Llama 3's formula with these settings gives the stored factors. */
static int gives(const float *stored, int64_t n, double theta, double factor, double original) {
  for (int64_t i = 0; i < n; i++) {
    const double wavelength = 2 * 3.14159265358979323846 * pow(theta, (double)i / (double)n);
    const double smooth = clip((original / wavelength - 1.0) / 3.0);
    const double got = 1 / ((1 - smooth) / factor + smooth);
    if (!(fabs(got - stored[i]) <= 1e-4 * fabs((double)stored[i]))) return 0;
  }
  return 1;
}

/* Llama 3's settings, recovered from the factors that they gave: the published low 1, high 4 and every power of
 * two of original positions are tried. */
static int llama3(const meta *m, const pylora_tensor *t, pylora_settings *s) {
  const int64_t n = s->head_dim / 2;
  if (strcmp(t->type, "F32") != 0 || t->dims != 1 || t->shape[0] != n)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: tensor '%s' must be F32 of shape [%lld]",
                       m->file->name, t->name, (long long)n);
  float *stored = pylora_take((size_t)n, sizeof *stored);
  if (!stored) return pylora_no_memory(m->why, m->file->name, (double)n * 4);
  memcpy(stored, t->data, (size_t)n * sizeof *stored);
  double largest = 0;
  int odd = 0, plain = 1;
  for (int64_t i = 0; i < n; i++) {
    odd |= !(stored[i] >= 0.5f && stored[i] <= 1e4f); /* NaN, too */
    plain &= stored[i] == 1;
    largest = stored[i] > largest ? (double)stored[i] : largest;
  }
  int found = plain || odd;
  const double near = nearbyint(largest);
  const double factor = fabs(largest - near) < 1e-5 * largest ? near : largest;
  for (int power = 9; power < 21 && !found; power++) {
    found = gives(stored, n, s->theta, factor, (double)(1 << power));
    if (found)
      s->scaling = (pylora_scaling){.kind = ROPE_LLAMA3,
                                    .factor = factor,
                                    .low = 1,
                                    .high = 4,
                                    .original = (double)(1 << power)};
  }
  free(stored);
  if (odd || !found)
    return pylora_fail(
        m->why, PYLORA_E_UNSUPPORTED, "%.300s: tensor '%s' holds factors %s", m->file->name,
        t->name, odd ? "outside 0.5 to 10000" : "that are not those of Llama 3's rope scaling");
  return PYLORA_OK;
}

static int scaling(const meta *m, pylora_settings *s) {
  double linear, factor;
  TRY(real(m, "rope.scale_linear", 1, &linear));
  TRY(real(m, "rope.scaling.factor", linear, &factor));
  const char *text = factor == 1 ? "none" : "linear";
  size_t n = strlen(text);
  if (has(m, "rope.scaling.type") &&
      !pylora_file_text(m->file, key_of(m, "rope.scaling.type").text, &text, &n))
    return wrong(m, "rope.scaling.type", "text");
  if (n == 4 && memcmp(text, "yarn", 4) == 0) {
    int64_t original;
    TRY(whole(m, "rope.scaling.original_context_length", -1, &original));
    s->scaling = (pylora_scaling){.kind = ROPE_YARN, .factor = factor};
    s->scaling.original = (double)original;
    TRY(maybe(m, "rope.scaling.yarn_beta_fast", 0, &s->scaling.beta_fast));
    return maybe(m, "rope.scaling.yarn_beta_slow", 0, &s->scaling.beta_slow);
  }
  const int is_linear = n == 6 && memcmp(text, "linear", 6) == 0;
  if (!is_linear && !(n == 4 && memcmp(text, "none", 4) == 0))
    return pylora_fail(m->why, PYLORA_E_UNSUPPORTED, "%.300s: rope scaling of type '%.*s'",
                       m->file->name, (int)(n < 40 ? n : 40), text);
  const pylora_tensor *factors = pylora_files_find(m->files, ROPE_FACTORS);
  if (is_linear) s->scaling = (pylora_scaling){.kind = ROPE_LINEAR, .factor = factor};
  if (!factors) return PYLORA_OK;
  if (is_linear)
    return pylora_fail(m->why, PYLORA_E_UNSUPPORTED,
                       "%.300s: linear rope scaling together with " ROPE_FACTORS, m->file->name);
  return llama3(m, factors, s);
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

int pylora_settings_gguf(const pylora_files *files, pylora_settings *s, pylora_message *why) {
  const pylora_file *file = files->file[0];
  meta m_ = {file, files, "", why}, *m = &m_;
  *s = (pylora_settings){.interleaved = 0};
  TRY(architecture(m, s));
  s->interleaved = pylora_families[s->family].interleaved;
  TRY(whole(m, "attention.head_count", -1, &s->heads));
  TRY(whole(m, "embedding_length", -1, &s->hidden));
  TRY(whole(m, "attention.key_length", s->heads > 0 ? s->hidden / s->heads : 0, &s->head_dim));
  if (s->head_dim < 0) s->head_dim = 0; /* refused below, by its size */
  TRY(only(m, "attention.value_length", s->head_dim));
  TRY(only(m, "rope.dimension_count", s->head_dim));
  TRY(only(m, "expert_count", 0));
  TRY(only(m, "expert_shared_count", 0));
  TRY(refuse(m, s->family));
  TRY(real(m, "rope.freq_base", 10000, &s->theta));
  TRY(whole(m, "attention.sliding_window", 0, &s->window));
  const int gemma = s->family == GEMMA2 || s->family == GEMMA3;
  if (s->window && s->family == OLMO2) s->family = OLMO3;
  if (s->window && s->family != LLAMA && s->family != OLMO3 && !gemma)
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
  TRY(real(m, "attention.layer_norm_rms_epsilon", -1, &s->eps));
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
  s->tied = pylora_files_find(files, "output.weight") == NULL;
  TRY(token(m, "tokenizer.ggml.bos_token_id", &s->bos));
  TRY(token(m, "tokenizer.ggml.eos_token_id", &s->eos[0]));
  s->eos_count = s->eos[0] >= 0;
  if (s->heads < 1) return pylora_settings_check(file->name, s, why);
  TRY(own(m, s));
  TRY(pylora_settings_check(file->name, s, why));
  TRY(scaling(m, s));
  return pylora_settings_check(file->name, s, why);
}
