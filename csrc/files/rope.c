/* rope.c - the angles of rotary position embedding, as pylora/model/rope.py has them: in double, rounded once. */
#include <math.h>

#include "files/model.h"

void pylora_frequencies(const pylora_settings *s, int local, double *out) {
  const double pi = 3.14159265358979323846;
  const pylora_scaling *r = local ? &s->local_scaling : &s->scaling;
  const double theta = local ? s->local_theta : s->theta;
  for (int64_t i = 0; i < s->head_dim / 2; i++) {
    double f = pow(theta, -(double)(2 * i) / (double)s->head_dim);
    if (r->kind == ROPE_LINEAR) f /= r->factor;
    if (r->kind == ROPE_LLAMA3) {
      const double turns = r->original * f / (2 * pi);
      double blend = (turns - r->low) / (r->high - r->low); /* 0: stretched, 1: left as it is */
      blend = blend < 0 ? 0 : blend > 1 ? 1 : blend;
      f *= (1 - blend) / r->factor + blend;
    }
    out[i] = f;
  }
}

int pylora_model_rope(const pylora_model *m, int32_t table, int64_t positions, float *cosines,
                      float *sines) {
  if (!m || !cosines || !sines) return PYLORA_E_NULL;
  if (table < 0 || table >= m->decoder.ropes) return PYLORA_E_VALUE;
  if (positions < 0 || positions > m->s.positions) return PYLORA_E_SHAPE;
  const int64_t half = m->s.head_dim / 2;
  for (int64_t p = 0; p < positions; p++)
    for (int64_t i = 0; i < half; i++) {
      const double angle = (double)p * m->frequency[table * half + i];
      cosines[p * half + i] = (float)cos(angle);
      sines[p * half + i] = (float)sin(angle);
    }
  return PYLORA_OK;
}
