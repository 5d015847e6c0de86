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
  if (r->kind != ROPE_YARN) return 1;
  if (r->attention_factor > 0) return r->attention_factor;
  if (r->mscale > 0 && r->mscale_all > 0)
    return mscale(r->factor, r->mscale) / mscale(r->factor, r->mscale_all);
  return mscale(r->factor, 1);
}

void pylora_frequencies(const pylora_settings *s, int local, double *out) {
  const pylora_scaling *r = local ? &s->local_scaling : &s->scaling;
  const double theta = local ? s->local_theta : s->theta;
  for (int64_t i = 0; i < s->head_dim / 2; i++) {
    double f = pow(theta, -(double)(2 * i) / (double)s->head_dim);
    if (r->kind == ROPE_LINEAR) f /= r->factor;
    if (r->kind == ROPE_LLAMA3) {
      const double turns = r->original * f / (2 * PI);
      double blend = (turns - r->low) / (r->high - r->low); /* 0: stretched, 1: left as it is */
      blend = blend < 0 ? 0 : blend > 1 ? 1 : blend;
      f *= (1 - blend) / r->factor + blend;
    }
    out[i] = f;
  }
  if (r->kind == ROPE_YARN) yarn(r, theta, s->head_dim / 2, out);
}

int pylora_model_rope(const pylora_model *m, int32_t table, int64_t positions, float *cosines,
                      float *sines) {
  if (!m || !cosines || !sines) return PYLORA_E_NULL;
  if (table < 0 || table >= m->decoder.ropes) return PYLORA_E_VALUE;
  if (positions < 0 || positions > m->s.positions) return PYLORA_E_SHAPE;
  const int64_t half = m->s.head_dim / 2;
  const double times = pylora_attention_factor(table ? &m->s.local_scaling : &m->s.scaling);
  for (int64_t p = 0; p < positions; p++)
    for (int64_t i = 0; i < half; i++) {
      const double angle = (double)p * m->frequency[table * half + i];
      cosines[p * half + i] = (float)(cos(angle) * times);
      sines[p * half + i] = (float)(sin(angle) * times);
    }
  return PYLORA_OK;
}
