/* rope.c - the angles of rotary position embedding, as pylora/model/rope.py has them: in double, rounded once. */
#include <math.h>

#include "files/model.h"

static const double PI = 3.14159265358979323846;

/* The pair that turns so often in the original length. */
static double pair_of(double turns, double D, double theta, double original) {
  return D * log(original / (turns * 2 * PI)) / (2 * log(theta));
}

/* Pairs that turn often stay, slow ones are divided by the factor, and between them is a ramp. */
static void yarn(const pylora_scaling *r, double theta, int64_t pairs, double *f) {
  const double D = (double)(2 * pairs);
  double low = pair_of(r->beta_fast > 0 ? r->beta_fast : 32, D, theta, r->original);
  double high = pair_of(r->beta_slow > 0 ? r->beta_slow : 1, D, theta, r->original);
  if (!r->as_it_is) low = floor(low), high = ceil(high);
  low = low > 0 ? low : 0, high = high < D - 1 ? high : D - 1;
  const double width = high != low ? high - low : 0.001;
  for (int64_t i = 0; i < pairs; i++) {
    double ramp = ((double)i - low) / width;
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    f[i] *= ramp / r->factor + (1 - ramp);
  }
}

static double mscale(double factor, double m) {
  return factor <= 1 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

double pylora_attention_factor(const pylora_scaling *r) {
  if (r->kind != ROPE_YARN && r->kind != ROPE_LONG) return 1;
  if (r->attention_factor > 0) return r->attention_factor;
  if (r->kind == ROPE_LONG) return r->factor <= 1 ? 1 : sqrt(1 + log(r->factor) / log(r->original));
  if (r->mscale > 0 && r->mscale_all > 0)
    return mscale(r->factor, r->mscale) / mscale(r->factor, r->mscale_all);
  return mscale(r->factor, 1);
}

static const pylora_scaling *scaling_of(const pylora_settings *s, int local) {
  return local ? &s->local_scaling : &s->scaling;
}

int64_t pylora_longest(const pylora_settings *s) {
  double longest = (double)s->positions;
  for (int i = 0; i < 1 + s->two_ropes; i++) {
    const pylora_scaling *r = scaling_of(s, i);
    if (r->kind == ROPE_DYNAMIC && r->factor > 1)
      longest = fmax(longest, floor((double)s->positions * r->factor));
  }
  return longest < INT32_MAX ? (int64_t)longest : INT32_MAX;
}

int64_t pylora_rope_unchanged(const pylora_settings *s, int local) {
  const pylora_scaling *r = scaling_of(s, local);
  if (r->kind == ROPE_DYNAMIC) return s->positions;
  return r->kind == ROPE_LONG && r->original < INT32_MAX ? (int64_t)r->original : INT32_MAX;
}

void pylora_frequencies(const pylora_settings *s, int local, int64_t length, double *out) {
  const pylora_scaling *r = scaling_of(s, local);
  double theta = local ? s->local_theta : s->theta;
  const int64_t pairs = pylora_pairs(s);
  const double D = (double)(2 * pairs);
  const int beyond = length > pylora_rope_unchanged(s, local);
  if (r->kind == ROPE_DYNAMIC && beyond && pairs > 1)
    theta *= pow(r->factor * (double)length / (double)s->positions - (r->factor - 1), D / (D - 2));
  for (int64_t i = 0; i < pairs; i++) {
    double f = pow(theta, -(double)(2 * i) / D);
    if (r->kind == ROPE_LINEAR) f /= r->factor;
    if (r->kind == ROPE_LONG) f /= r->divisors[(beyond ? pairs : 0) + i];
    if (r->kind == ROPE_LLAMA3) {
      const double turns = r->original * f / (2 * PI);
      double blend = (turns - r->low) / (r->high - r->low); /* 0: stretched, 1: left as it is */
      blend = blend < 0 ? 0 : blend > 1 ? 1 : blend;
      f *= (1 - blend) / r->factor + blend;
    }
    out[i] = f;
  }
  if (r->kind == ROPE_YARN) yarn(r, theta, pairs, out);
}

int pylora_rope_rows(const pylora_settings *s, int local, int64_t length, int64_t first,
                     int64_t rows, float *cosines, float *sines) {
  const int64_t half = pylora_pairs(s);
  const double times = pylora_attention_factor(scaling_of(s, local));
  double *frequency = pylora_take((size_t)half, sizeof *frequency);
  if (!frequency) return PYLORA_E_MEMORY;
  pylora_frequencies(s, local, length, frequency);
  for (int64_t p = 0; p < rows; p++)
    for (int64_t i = 0; i < half; i++) {
      const double angle = (double)(first + p) * frequency[i];
      cosines[p * half + i] = (float)(cos(angle) * times);
      sines[p * half + i] = (float)(sin(angle) * times);
    }
  free(frequency);
  return PYLORA_OK;
}

int pylora_model_rope(const pylora_model *m, int32_t table, int64_t positions, float *cosines,
                      float *sines) {
  if (!m || !cosines || !sines) return PYLORA_E_NULL;
  if (table < 0 || table >= m->decoder.ropes) return PYLORA_E_VALUE;
  if (positions < 0 || positions > m->about.positions) return PYLORA_E_SHAPE;
  return pylora_rope_rows(&m->s, table, positions, 0, positions, cosines, sines);
}
