/* check_features.c - the cases of what families have beside a Llama. */
#include <math.h>
#include <string.h>

#include "vectors.h"

static pylora_mat like(pylora_mat a) { return zeros(a.rows, a.cols); }

void layer_norm_case(testcase *c) {
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), y = like(x), dx = like(x);
  const pylora_mat rstd = zeros(1, x.rows), w = in(c, "w");
  const float *b = input(c, "b").p, eps = (float)number(c, "eps");
  must(pylora_layer_norm_forward(&x, w.p, b, eps, &y, rstd.p));
  must(pylora_layer_norm_backward(&dy, &x, w.p, rstd.p, &dx, 0));
  check(c, "y", y), check(c, "rstd", rstd), check(c, "dx", dx);
}

void activation_case(testcase *c) {
  static const char *const kinds[] = {"silu", "gelu_tanh", "gelu_erf", "relu2"};
  static const int numbers_of[] = {PYLORA_SILU, PYLORA_GELU_TANH, PYLORA_GELU_ERF, PYLORA_RELU2};
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), y = like(x), dx = like(x), dup = like(x);
  const int has_up = input(c, "up").p != NULL;
  const pylora_mat up = has_up ? in(c, "up") : dup;
  for (int i = 0; i < 4; i++) {
    if (strncmp(string(c, "kind"), kinds[i], strlen(kinds[i]))) continue;
    must(pylora_activation_forward(numbers_of[i], &x, has_up ? &up : NULL, &y));
    must(pylora_activation_backward(numbers_of[i], &dy, &x, has_up ? &up : NULL, &dx,
                                    has_up ? &dup : NULL));
  }
  check(c, "y", y), check(c, "dx", dx);
  if (has_up) check(c, "dup", dup);
}

void soft_cap_case(testcase *c) {
  const pylora_mat x = in(c, "x"), dy = in(c, "dy"), y = like(x), dx = like(x);
  const float times = (float)number(c, "multiplier"), cap = (float)number(c, "cap");
  must(pylora_soft_cap_forward(&x, times, cap, &y));
  must(pylora_soft_cap_backward(&dy, &y, times, cap, &dx));
  check(c, "y", y), check(c, "dx", dx);
}

void choose_case(testcase *c) {
  const pylora_mat logits = in(c, "logits"), dw = in(c, "dw"), p = like(logits), w = like(dw);
  int64_t *chosen = take((size_t)(dw.rows * dw.cols) * sizeof *chosen);
  const int normalize = truth(c, "normalize");
  must(pylora_choose(&logits, (int64_t)number(c, "top_k"), normalize, &p, chosen, &w));
  check(c, "probabilities", p), check(c, "weights", w);
  check_array(c, "chosen", "i64", chosen, dw.rows * dw.cols);
  check(c, "dlogits", choose_backward(dw, p, chosen, normalize));
}

static double number_or(const testcase *c, const char *key, double otherwise) {
  return has(c, key) ? number(c, key) : otherwise;
}

void stretched(const testcase *c, pylora_mat cosines, pylora_mat sines, const int64_t *position) {
  int64_t n;
  stretch s = {.type = string(c, "rope_type"),
               .factor = number_or(c, "factor", 1),
               .original = number_or(c, "original_max_position_embeddings", 0),
               .low = number_or(c, "low_freq_factor", 0),
               .high = number_or(c, "high_freq_factor", 0),
               .beta_fast = number_or(c, "beta_fast", 32),
               .beta_slow = number_or(c, "beta_slow", 1),
               .attention_factor = number_or(c, "attention_factor", 0),
               .mscale = number_or(c, "mscale", 0),
               .mscale_all = number_or(c, "mscale_all_dim", 0),
               .length = number(c, "length"),
               .trained = number(c, "trained"),
               .truncate = !has(c, "truncate") || truth(c, "truncate")};
  if (has(c, "short_factor")) {
    s.short_factor = numbers(c, "short_factor", &n);
    s.long_factor = numbers(c, "long_factor", &n);
  }
  double *f = take((size_t)cosines.cols * sizeof *f);
  const double times = frequencies(f, cosines.cols, number(c, "theta"), &s);
  for (int64_t i = 0; i < cosines.rows * cosines.cols; i++) {
    const double angle = (double)position[i / cosines.cols] * f[i % cosines.cols];
    cosines.p[i] = (float)(times * cos(angle)), sines.p[i] = (float)(times * sin(angle));
  }
}
