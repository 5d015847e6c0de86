/* config_gguf_rope.c - the scaling of rotations out of a GGUF file: its metadata, and tensors of factors. */
#include <math.h>

#include "files/config_meta.h"

#define ROPE_FACTORS "rope_freqs.weight"

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
  const int64_t n = pylora_pairs(s);
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

/* LongRoPE, whose factors the file holds as tensors, of float32 that stand for the shortest decimals. */
static int longrope(const meta *m, const pylora_tensor *const *t, pylora_settings *s) {
  const int64_t n = pylora_pairs(s);
  int64_t original;
  for (int i = 0; i < 2; i++)
    if (strcmp(t[i]->type, "F32") != 0 || t[i]->dims != 1 || t[i]->shape[0] != n)
      return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: tensor '%s' must be F32 of shape [%lld]",
                         m->file->name, t[i]->name, (long long)n);
  TRY(whole(m, "rope.scaling.original_context_length", -1, &original));
  pylora_scaling *r = &s->scaling;
  *r = (pylora_scaling){.kind = ROPE_LONG, .original = (double)original};
  r->factor = (double)s->positions / r->original;
  TRY(maybe(m, "rope.scaling.attn_factor", 0, &r->attention_factor));
  if (has(m, "rope.scaling.attn_factor") && !(r->attention_factor > 0))
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: %s must be a positive number", m->file->name,
                       key_of(m, "rope.scaling.attn_factor").text);
  r->divisors = pylora_take((size_t)n, 2 * sizeof *r->divisors);
  if (!r->divisors) return pylora_no_memory(m->why, m->file->name, (double)n * 16);
  for (int64_t i = 0; i < 2 * n; i++) {
    float value;
    memcpy(&value, (const uint8_t *)t[i / n]->data + i % n * 4, sizeof value);
    r->divisors[i] = shortest((double)value);
  }
  return PYLORA_OK;
}

int pylora_meta_rope(const meta *m, pylora_settings *s) {
  double linear, factor;
  TRY(real(m, "rope.scale_linear", 1, &linear));
  TRY(real(m, "rope.scaling.factor", linear, &factor));
  const char *text = factor == 1 ? "none" : "linear";
  size_t n = strlen(text);
  if (has(m, "rope.scaling.type") &&
      !pylora_file_text(m->file, key_of(m, "rope.scaling.type").text, &text, &n))
    return wrong(m, "rope.scaling.type", "text");
  const pylora_tensor *const sets[] = {pylora_files_find(m->files, "rope_factors_short.weight"),
                                       pylora_files_find(m->files, "rope_factors_long.weight")};
  if (sets[0] && sets[1]) return longrope(m, sets, s);
  if (s->family == PHI3 && !(n == 4 && memcmp(text, "none", 4) == 0))
    return pylora_fail(m->why, PYLORA_E_UNSUPPORTED,
                       "%.300s: rope scaling of type '%.*s'; a Phi-3 model has longrope",
                       m->file->name, (int)(n < 40 ? n : 40), text);
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
