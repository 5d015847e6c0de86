/* features.c - what families have beside a Llama and pylora.h leaves to its caller: the frequencies of
 * stretched rotations, the gradient of a choice of experts.  Statements of docs/spec.md. */
#include <math.h>
#include <string.h>

#include "port.h"

static const double PI = 3.14159265358979323846;

static double clamp(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

static int is(const stretch *s, const char *type) { return s->type && !strcmp(s->type, type); }

/* The pair that turns so often in the original length. */
static double pair_of(double turns, double R, double theta, const stretch *s) {
  return R * log(s->original / (turns * 2 * PI)) / (2 * log(theta));
}

static double scale_of(double m, double factor) { return 0.1 * m * log(factor) + 1; }

static double yarn(double *f, int64_t pairs, double theta, const stretch *s) {
  const double R = 2 * (double)pairs;
  double low = pair_of(s->beta_fast, R, theta, s), high = pair_of(s->beta_slow, R, theta, s);
  if (s->truncate) low = floor(low), high = ceil(high);
  if (low < 0) low = 0;
  if (high > R - 1) high = R - 1;
  for (int64_t i = 0; i < pairs; i++) {
    const double ramp = clamp(((double)i - low) / (high - low), 0, 1);
    f[i] *= ramp / s->factor + (1 - ramp);
  }
  if (s->attention_factor > 0) return s->attention_factor;
  if (s->mscale > 0) return scale_of(s->mscale, s->factor) / scale_of(s->mscale_all, s->factor);
  return scale_of(1, s->factor);
}

double frequencies(double *out, int64_t pairs, double theta, const stretch *s) {
  const double R = 2 * (double)pairs;
  if (is(s, "dynamic") && s->length > s->trained)
    theta *= pow(s->factor * s->length / s->trained - (s->factor - 1), R / (R - 2));
  for (int64_t i = 0; i < pairs; i++) {
    double f = pow(theta, -2 * (double)i / R);
    if (is(s, "linear")) f /= s->factor;
    if (is(s, "llama3")) {
      const double turns = s->original * f / (2 * PI);
      const double part = clamp((turns - s->low) / (s->high - s->low), 0, 1);
      f *= (1 - part) / s->factor + part;
    }
    if (is(s, "longrope")) f /= s->length > s->original ? s->long_factor[i] : s->short_factor[i];
    out[i] = f;
  }
  if (is(s, "longrope")) return sqrt(1 + log(s->factor) / log(s->original));
  return is(s, "yarn") ? yarn(out, pairs, theta, s) : 1;
}

pylora_mat choose_backward(pylora_mat dw, pylora_mat p, const int64_t *chosen, int normalize) {
  const pylora_mat d = zeros(p.rows, p.cols);
  for (int64_t i = 0; i < p.rows; i++) {
    const int64_t *own = chosen + i * dw.cols;
    const float *g = dw.p + i * dw.cols, *q = p.p + i * p.cols;
    double total = 0, along = 0, mean = 0;
    for (int64_t t = 0; t < dw.cols; t++) total += (double)q[own[t]];
    for (int64_t t = 0; t < dw.cols; t++) along += (double)g[t] * (double)q[own[t]] / total;
    if (!normalize) total = 1, along = 0;
    double *dp = take((size_t)p.cols * sizeof *dp);
    for (int64_t t = 0; t < dw.cols; t++) dp[own[t]] = ((double)g[t] - along) / total;
    for (int64_t e = 0; e < p.cols; e++) mean += dp[e] * (double)q[e];
    for (int64_t e = 0; e < p.cols; e++)
      d.p[i * p.cols + e] = (float)((double)q[e] * (dp[e] - mean));
  }
  return d;
}
