/* reference.c - every operation in plain scalar C. See reference.h. */
#include "reference.h"

#include <math.h>
#include <string.h>

static float *at(const pylora_mat *a, int64_t i, int64_t j) { return a->p + i * a->ld + j; }

/* What dropout multiplies element (i,j) of a matrix of k columns by: 0 or 1 / (1 - p). */
static double kept(const pylora_drop *drop, int64_t k, int64_t i, int64_t j) {
  if (!drop || drop->p == 0) return 1;
  uint32_t word;
  pylora_ref_philox(drop->seed, drop->stream, (drop->row0 + i) * k + j, 1, &word);
  return word >= floor((double)drop->p * 4294967296.0) ? 1.0f / (1.0f - drop->p) : 0;
}

/* ---- LoRA linear ------------------------------------------------------------------------- */

/* h = drop(x) Aᵀ [m,r];  y = residual + x Wᵀ + bias + s h Bᵀ [m,d] */
void pylora_ref_lora_forward(const pylora_mat *x, const pylora_mat *W, const float *bias,
                             const pylora_lora *lora, const pylora_mat *residual,
                             const pylora_mat *y, const pylora_mat *h) {
  const int64_t m = x->rows, k = x->cols, d = W->rows, r = lora ? lora->r : 0;
  for (int64_t i = 0; i < m; i++) {
    for (int64_t q = 0; q < r; q++) {
      double sum = 0;
      for (int64_t t = 0; t < k; t++)
        sum += kept(lora->drop, k, i, t) * *at(x, i, t) * lora->A[q * lora->lda + t];
      *at(h, i, q) = (float)sum;
    }
    for (int64_t j = 0; j < d; j++) {
      double base = bias ? bias[j] : 0, low = 0;
      for (int64_t t = 0; t < k; t++) base += (double)*at(x, i, t) * *at(W, j, t);
      for (int64_t q = 0; q < r; q++) low += (double)*at(h, i, q) * lora->B[j * lora->ldb + q];
      if (residual) base += *at(residual, i, j);
      *at(y, i, j) = (float)(r ? base + lora->s * low : base);
    }
  }
}

/* Element (i,q) of g = dy B [m,r] */
static double g_of(const pylora_mat *dy, const pylora_lora *lora, int64_t i, int64_t q) {
  double g = 0;
  for (int64_t j = 0; j < dy->cols; j++) g += (double)*at(dy, i, j) * lora->B[j * lora->ldb + q];
  return g;
}

/* dB = s dyᵀ h [d,r];  dA = s gᵀ drop(x) [r,k];  dx = [dx +] dy W + s drop'(g A) [m,k] */
void pylora_ref_lora_backward(const pylora_mat *dy, const pylora_mat *x, const pylora_mat *h,
                              const pylora_mat *W, const pylora_lora *lora, const pylora_mat *dx,
                              int add_dx, const pylora_mat *dA, const pylora_mat *dB) {
  const int64_t m = dy->rows, d = dy->cols, r = lora ? lora->r : 0;
  for (int64_t i = 0; dx && i < m; i++)
    for (int64_t t = 0; t < W->cols; t++) {
      double sum = add_dx ? *at(dx, i, t) : 0, low = 0;
      for (int64_t j = 0; j < d; j++) sum += (double)*at(dy, i, j) * *at(W, j, t);
      for (int64_t q = 0; q < r; q++) low += g_of(dy, lora, i, q) * lora->A[q * lora->lda + t];
      *at(dx, i, t) = (float)(r ? sum + lora->s * kept(lora->drop, W->cols, i, t) * low : sum);
    }
  for (int64_t q = 0; dA && q < r; q++)
    for (int64_t t = 0; t < x->cols; t++) {
      double sum = 0;
      for (int64_t i = 0; i < m; i++)
        sum += g_of(dy, lora, i, q) * kept(lora->drop, x->cols, i, t) * *at(x, i, t);
      *at(dA, q, t) = (float)(lora->s * sum);
    }
  for (int64_t j = 0; dB && j < d; j++)
    for (int64_t q = 0; q < r; q++) {
      double sum = 0;
      for (int64_t i = 0; i < m; i++) sum += (double)*at(dy, i, j) * *at(h, i, q);
      *at(dB, j, q) = (float)(lora->s * sum);
    }
}

/* ---- merge and exact unmerge ------------------------------------------------------------- */

/* A floating-point format: digits of the significand, exponent of the smallest subnormal, bits. */
typedef struct format {
  int digits, smallest, width;
} format;

static format format_of(int dtype) {
  if (dtype == PYLORA_F16) return (format){11, -24, 16};
  if (dtype == PYLORA_BF16) return (format){8, -133, 16};
  return (format){24, -149, 32};
}

static double decode(format f, uint32_t bits) {
  const uint32_t one = 1u << (f.digits - 1), fields = 1u << (f.width - f.digits);
  const uint32_t fraction = bits & (one - 1), e = bits / one & (fields - 1);
  double v = e == fields - 1 ? (fraction ? (double)NAN : (double)INFINITY)
             : e             ? ldexp(one + fraction, (int)e - 1 + f.smallest)
                             : ldexp(fraction, f.smallest);
  return bits >> (f.width - 1) ? -v : v;
}

/* The nearest number of the format, ties to even, in one rounding. */
static uint32_t encode(format f, double t) {
  const uint32_t one = 1u << (f.digits - 1);
  const uint32_t sign = signbit(t) ? 1u << (f.width - 1) : 0, inf = (1u << (f.width - 1)) - one;
  if (isnan(t)) return sign | inf | one / 2;
  if (isinf(t)) return sign | inf;
  int e;
  frexp(t, &e); /* |t| in [2^(e-1), 2^e) */
  int last = e - f.digits > f.smallest && t != 0 ? e - f.digits : f.smallest;
  const double n = rint(ldexp(fabs(t), -last)); /* in units of the last place: 0 .. 2^digits */
  const double bits =
      (double)(last - f.smallest + 1) * one + (n - one); /* carries into the exponent */
  return sign | (bits < inf ? (uint32_t)bits : inf);
}

static uint32_t bits_at(format f, const void *p, int64_t i) {
  return f.width == 32 ? ((const uint32_t *)p)[i] : ((const uint16_t *)p)[i];
}

static void set_bits(format f, void *p, int64_t i, uint32_t bits) {
  if (f.width == 32)
    ((uint32_t *)p)[i] = bits;
  else
    ((uint16_t *)p)[i] = (uint16_t)bits;
}

/* Element (i,j) of s B A [d,k], summed in double in the order of the rank. */
static double delta(const pylora_lora *l, int64_t i, int64_t j) {
  double t = 0;
  for (int64_t q = 0; q < l->r; q++) t += (double)l->B[i * l->ldb + q] * l->A[q * l->lda + j];
  return l->s * t;
}

/* W' = round(W + s B A);  the residue: where round(W' - s B A) is not W, and W's bits there */
int64_t pylora_ref_merge(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                         const pylora_lora *lora, void *out, int64_t ldo, int64_t *position,
                         uint32_t *bits) {
  const format f = format_of(dtype);
  int64_t n = 0;
  for (int64_t i = 0; i < d; i++)
    for (int64_t j = 0; j < k; j++) {
      const uint32_t w = bits_at(f, W, i * ldw + j);
      const double t = delta(lora, i, j);
      const uint32_t merged = encode(f, decode(f, w) + t);
      set_bits(f, out, i * ldo + j, merged);
      if (encode(f, decode(f, merged) - t) == w) continue;
      position[n] = i * k + j;
      bits[n++] = w;
    }
  return n;
}

/* W = round(W' - s B A), then the residue's bits */
void pylora_ref_unmerge(int dtype, int64_t d, int64_t k, const void *merged, int64_t ldm,
                        const pylora_lora *lora, int64_t n, const int64_t *position,
                        const uint32_t *bits, void *out, int64_t ldo) {
  const format f = format_of(dtype);
  for (int64_t i = 0; i < d; i++)
    for (int64_t j = 0; j < k; j++)
      set_bits(f, out, i * ldo + j,
               encode(f, decode(f, bits_at(f, merged, i * ldm + j)) - delta(lora, i, j)));
  for (int64_t p = 0; p < n; p++)
    set_bits(f, out, position[p] / k * ldo + position[p] % k, bits[p]);
}

/* ---- transformer ------------------------------------------------------------------------- */

/* rstd = 1 / sqrt(mean(x²) + eps) [m];  y = x rstd w [m,k] */
void pylora_ref_rms_norm_forward(const pylora_mat *x, const float *w, float eps,
                                 const pylora_mat *y, float *rstd) {
  for (int64_t i = 0; i < x->rows; i++) {
    double sum = 0;
    for (int64_t j = 0; j < x->cols; j++) sum += (double)*at(x, i, j) * *at(x, i, j);
    const double r = 1 / sqrt(sum / (double)x->cols + eps);
    rstd[i] = (float)r;
    for (int64_t j = 0; j < x->cols; j++) *at(y, i, j) = (float)(*at(x, i, j) * r * w[j]);
  }
}

/* dx = [dx +] rstd (dy w - x rstd² mean(dy w x)) [m,k];  dw = sum over rows of dy x rstd [k] */
void pylora_ref_rms_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                                  const float *rstd, const pylora_mat *dx, int add_dx, float *dw) {
  for (int64_t j = 0; dw && j < x->cols; j++) {
    double sum = 0;
    for (int64_t i = 0; i < x->rows; i++)
      sum += (double)*at(dy, i, j) * *at(x, i, j) * (double)rstd[i];
    dw[j] = (float)sum;
  }
  for (int64_t i = 0; i < x->rows; i++) {
    const double r = rstd[i];
    double mean = 0;
    for (int64_t j = 0; j < x->cols; j++)
      mean += (double)*at(dy, i, j) * w[j] * (double)*at(x, i, j) / (double)x->cols;
    for (int64_t j = 0; j < x->cols; j++) {
      const double t = r * ((double)*at(dy, i, j) * w[j] - *at(x, i, j) * r * r * mean);
      *at(dx, i, j) = (float)(add_dx ? *at(dx, i, j) + t : t);
    }
  }
}

/* Pairs (a, b) of each head become (a c - b s, b c + a s); x [m, heads*D], c and s [positions, R/2], R <= D:
 * the numbers of a head from R on stay. */
void pylora_ref_rope(const pylora_mat *x, const pylora_mat *cosines, const pylora_mat *sines,
                     const int64_t *position, int32_t head_dim, int layout, int inverse,
                     const pylora_mat *y) {
  const int64_t half = cosines->cols;
  for (int64_t i = 0; i < x->rows; i++)
    for (int64_t head = 0; head < x->cols; head += head_dim) {
      for (int64_t j = 2 * half; j < head_dim; j++) *at(y, i, head + j) = *at(x, i, head + j);
      for (int64_t j = 0; j < half; j++) {
        const int64_t first = head + (layout == PYLORA_ROPE_HALF ? j : 2 * j);
        const int64_t second = first + (layout == PYLORA_ROPE_HALF ? half : 1);
        const double a = *at(x, i, first), b = *at(x, i, second);
        const double c = *at(cosines, position[i], j);
        const double s = inverse ? -*at(sines, position[i], j) : *at(sines, position[i], j);
        *at(y, i, first) = (float)(a * c - b * s);
        *at(y, i, second) = (float)(b * c + a * s);
      }
    }
}

/* The keys [first, end) that query row t of sequence i sees. */
static void keys_of(const pylora_seqs *s, const pylora_attn *a, int64_t i, int64_t t,
                    int64_t *first, int64_t *end) {
  const int64_t start = s->k_start ? s->k_start[i] : s->q_start[i];
  const int64_t keys = s->k_len ? s->k_len[i] : s->q_start[i + 1] - s->q_start[i];
  *end = start + keys - (s->q_start[i + 1] - 1 - t);
  *first = a->window > 0 && *end - a->window > start ? *end - a->window : start;
}

static double dot(int64_t n, const float *a, const float *b) {
  double sum = 0;
  for (int64_t j = 0; j < n; j++) sum += (double)a[j] * b[j];
  return sum;
}

/* The score of a query and a key, capped where the model says so. */
static double score_of(const pylora_attn *a, const float *query, const float *key) {
  const double s = a->scale * dot(a->head_dim, query, key);
  return a->softcap > 0 ? a->softcap * tanh(s / a->softcap) : s;
}

/* P = softmax(scale q kᵀ) over the keys a query sees;  o = P v [m, heads*D];  lse [m, heads] */
void pylora_ref_attention_forward(const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                                  const pylora_seqs *seqs, const pylora_attn *a,
                                  const pylora_mat *o, const pylora_mat *lse) {
  const int64_t D = a->head_dim, group = a->heads / a->kv_heads;
  for (int64_t i = 0; i < seqs->n; i++)
    for (int64_t t = seqs->q_start[i]; t < seqs->q_start[i + 1]; t++)
      for (int64_t head = 0; head < a->heads; head++) {
        const int64_t kv = head / group * D;
        const float *query = at(q, t, head * D);
        int64_t first, end;
        keys_of(seqs, a, i, t, &first, &end);
        double top = -INFINITY, total = 0;
        for (int64_t j = first; j < end; j++) top = fmax(top, score_of(a, query, at(k, j, kv)));
        for (int64_t j = first; j < end; j++) total += exp(score_of(a, query, at(k, j, kv)) - top);
        const double log_total = top + log(total);
        *at(lse, t, head) = (float)log_total;
        for (int64_t c = 0; c < D; c++) {
          double sum = 0;
          for (int64_t j = first; j < end; j++)
            sum += exp(score_of(a, query, at(k, j, kv)) - log_total) * *at(v, j, kv + c);
          *at(o, t, head * D + c) = (float)sum;
        }
      }
}

/* P and dS of one query, head and key: P = exp(scale q kᵀ - lse), dS = P (do vᵀ - do oᵀ) */
static double weight_of(const pylora_mat *d_o, const pylora_mat *q, const pylora_mat *k,
                        const pylora_mat *v, const pylora_mat *o, const pylora_mat *lse,
                        const pylora_attn *a, int64_t t, int64_t head, int64_t j, double *dS) {
  const int64_t D = a->head_dim, kv = head / (a->heads / a->kv_heads) * D, c = head * D;
  const double s = score_of(a, at(q, t, c), at(k, j, kv)), P = exp(s - *at(lse, t, head));
  *dS = P * (dot(D, at(d_o, t, c), at(v, j, kv)) - dot(D, at(d_o, t, c), at(o, t, c)));
  if (a->softcap > 0) *dS *= 1 - s / a->softcap * (s / a->softcap);
  return P;
}

/* dq = scale dS k;  dk = scale dSᵀ q;  dv = Pᵀ do */
void pylora_ref_attention_backward(const pylora_mat *d_o, const pylora_mat *q, const pylora_mat *k,
                                   const pylora_mat *v, const pylora_mat *o, const pylora_mat *lse,
                                   const pylora_seqs *seqs, const pylora_attn *a,
                                   const pylora_mat *dq, const pylora_mat *dk,
                                   const pylora_mat *dv) {
  const int64_t D = a->head_dim, group = a->heads / a->kv_heads;
  for (int64_t i = 0; i < seqs->n; i++) {
    int64_t first, end, last = seqs->q_start[i + 1];
    if (last == seqs->q_start[i]) continue;
    for (int64_t t = seqs->q_start[i]; t < last; t++)
      for (int64_t head = 0; head < a->heads; head++)
        for (int64_t c = 0; c < D; c++) {
          double sum = 0, dS;
          keys_of(seqs, a, i, t, &first, &end);
          for (int64_t j = first; j < end; j++) {
            weight_of(d_o, q, k, v, o, lse, a, t, head, j, &dS);
            sum += a->scale * dS * *at(k, j, head / group * D + c);
          }
          *at(dq, t, head * D + c) = (float)sum;
        }
    keys_of(seqs, a, i, last - 1, &first, &end);
    for (int64_t j = seqs->k_start ? seqs->k_start[i] : seqs->q_start[i]; j < end; j++)
      for (int64_t kv = 0; kv < a->kv_heads; kv++)
        for (int64_t c = 0; c < D; c++) {
          double sum_k = 0, sum_v = 0, dS;
          for (int64_t t = seqs->q_start[i]; t < last; t++) {
            int64_t low, high;
            keys_of(seqs, a, i, t, &low, &high);
            for (int64_t head = kv * group; j >= low && j < high && head < (kv + 1) * group;
                 head++) {
              const double P = weight_of(d_o, q, k, v, o, lse, a, t, head, j, &dS);
              sum_k += a->scale * dS * *at(q, t, head * D + c);
              sum_v += P * *at(d_o, t, head * D + c);
            }
          }
          *at(dk, j, kv * D + c) = (float)sum_k;
          *at(dv, j, kv * D + c) = (float)sum_v;
        }
  }
}

static double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }

/* y = gate sigmoid(gate) up */
void pylora_ref_swiglu_forward(const pylora_mat *gate, const pylora_mat *up, const pylora_mat *y) {
  for (int64_t i = 0; i < gate->rows; i++)
    for (int64_t j = 0; j < gate->cols; j++) {
      const double g = *at(gate, i, j);
      *at(y, i, j) = (float)(g * sigmoid(g) * *at(up, i, j));
    }
}

/* dgate = dy up σ (1 + gate (1 - σ));  dup = dy gate σ */
void pylora_ref_swiglu_backward(const pylora_mat *dy, const pylora_mat *gate, const pylora_mat *up,
                                const pylora_mat *dgate, const pylora_mat *dup) {
  for (int64_t i = 0; i < gate->rows; i++)
    for (int64_t j = 0; j < gate->cols; j++) {
      const double g = *at(gate, i, j), u = *at(up, i, j), d = *at(dy, i, j);
      *at(dgate, i, j) = (float)(d * u * sigmoid(g) * (1 + g * sigmoid(-g)));
      *at(dup, i, j) = (float)(d * g * sigmoid(g));
    }
}

/* c = x - mean(x);  rstd = 1 / sqrt(mean(c^2) + eps);  y = c rstd w + b */
void pylora_ref_layer_norm_forward(const pylora_mat *x, const float *w, const float *b, float eps,
                                   const pylora_mat *y, float *rstd) {
  const int64_t k = x->cols;
  for (int64_t i = 0; i < x->rows; i++) {
    double mean = 0, squares = 0;
    for (int64_t j = 0; j < k; j++) mean += *at(x, i, j) / (double)k;
    for (int64_t j = 0; j < k; j++) squares += (*at(x, i, j) - mean) * (*at(x, i, j) - mean);
    const double r = 1 / sqrt(squares / (double)k + eps);
    rstd[i] = (float)r;
    for (int64_t j = 0; j < k; j++)
      *at(y, i, j) = (float)((*at(x, i, j) - mean) * r * w[j] + (b ? b[j] : 0));
  }
}

/* dx (+)= rstd (g - mean(g) - n mean(g n)), g = dy w, n = c rstd */
void pylora_ref_layer_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                                    const float *rstd, const pylora_mat *dx, int add_dx) {
  const int64_t k = x->cols;
  for (int64_t i = 0; i < x->rows; i++) {
    double mean = 0, sum = 0, with = 0;
    for (int64_t j = 0; j < k; j++) mean += *at(x, i, j) / (double)k;
    for (int64_t j = 0; j < k; j++) {
      const double g = (double)*at(dy, i, j) * w[j], n = (*at(x, i, j) - mean) * rstd[i];
      sum += g / (double)k, with += g * n / (double)k;
    }
    for (int64_t j = 0; j < k; j++) {
      const double g = (double)*at(dy, i, j) * w[j], n = (*at(x, i, j) - mean) * rstd[i];
      const double d = rstd[i] * (g - sum - n * with);
      *at(dx, i, j) = (float)(add_dx ? *at(dx, i, j) + d : d);
    }
  }
}

/* act(x), and act'(x) */
static double activation_of(int kind, double x, double *slope) {
  const double root = 0.7978845608028654, third = 0.044715; /* sqrt(2/pi) */
  if (kind == PYLORA_RELU2) {
    *slope = x > 0 ? 2 * x : 0;
    return x > 0 ? x * x : 0;
  }
  if (kind == PYLORA_GELU_ERF) {
    const double below = erfc(-x / sqrt(2.0)) / 2;
    *slope = below + x * root / 2 * exp(-x * x / 2);
    return x * below;
  }
  const double u = kind == PYLORA_SILU ? x : 2 * root * (x + third * x * x * x);
  const double du = kind == PYLORA_SILU ? 1 : 2 * root * (1 + 3 * third * x * x);
  *slope = sigmoid(u) * (1 + x * sigmoid(-u) * du);
  return x * sigmoid(u);
}

/* y = act(x) up, or act(x) */
void pylora_ref_activation_forward(int kind, const pylora_mat *x, const pylora_mat *up,
                                   const pylora_mat *y) {
  double slope;
  for (int64_t i = 0; i < x->rows; i++)
    for (int64_t j = 0; j < x->cols; j++)
      *at(y, i, j) = (float)(activation_of(kind, *at(x, i, j), &slope) * (up ? *at(up, i, j) : 1));
}

/* dx = dy up act'(x);  dup = dy act(x) */
void pylora_ref_activation_backward(int kind, const pylora_mat *dy, const pylora_mat *x,
                                    const pylora_mat *up, const pylora_mat *dx,
                                    const pylora_mat *dup) {
  for (int64_t i = 0; i < x->rows; i++)
    for (int64_t j = 0; j < x->cols; j++) {
      double slope;
      const double a = activation_of(kind, *at(x, i, j), &slope), d = *at(dy, i, j);
      const double u = up ? *at(up, i, j) : 1;
      *at(dx, i, j) = (float)(d * u * slope);
      if (up) *at(dup, i, j) = (float)(d * a);
    }
}

/* y = cap tanh(multiplier x / cap); multiplier x without a cap */
void pylora_ref_soft_cap_forward(const pylora_mat *x, float multiplier, float cap,
                                 const pylora_mat *y) {
  for (int64_t i = 0; i < x->rows; i++)
    for (int64_t j = 0; j < x->cols; j++) {
      const double s = (double)multiplier * *at(x, i, j);
      *at(y, i, j) = (float)(cap > 0 ? cap * tanh(s / cap) : s);
    }
}

/* dx = dy multiplier (1 - (y / cap)^2) */
void pylora_ref_soft_cap_backward(const pylora_mat *dy, const pylora_mat *y, float multiplier,
                                  float cap, const pylora_mat *dx) {
  for (int64_t i = 0; i < dy->rows; i++)
    for (int64_t j = 0; j < dy->cols; j++) {
      const double t = cap > 0 ? (double)*at(y, i, j) / cap : 0;
      *at(dx, i, j) = (float)(*at(dy, i, j) * (double)multiplier * (1 - t * t));
    }
}

/* p = softmax(logits); the top_k largest of a row, the first of equal ones, and their p, over their sum */
void pylora_ref_choose(const pylora_mat *logits, int64_t top_k, int normalize, const pylora_mat *p,
                       int64_t *chosen, const pylora_mat *weights) {
  const int64_t n = logits->cols;
  for (int64_t i = 0; i < logits->rows; i++) {
    double top = -INFINITY, total = 0, sum = 0;
    for (int64_t e = 0; e < n; e++) top = fmax(top, *at(logits, i, e));
    for (int64_t e = 0; e < n; e++) total += exp(*at(logits, i, e) - top);
    for (int64_t e = 0; e < n; e++) *at(p, i, e) = (float)(exp(*at(logits, i, e) - top) / total);
    for (int64_t t = 0; t < top_k; t++) {
      int64_t best = -1;
      for (int64_t e = 0; e < n; e++) {
        int taken = 0;
        for (int64_t s = 0; s < t; s++) taken |= chosen[i * top_k + s] == e;
        if (!taken && (best < 0 || *at(p, i, e) > *at(p, i, best))) best = e;
      }
      chosen[i * top_k + t] = best;
      sum += *at(p, i, best);
    }
    for (int64_t t = 0; t < top_k; t++)
      *at(weights, i, t) = (float)(*at(p, i, chosen[i * top_k + t]) / (normalize ? sum : 1));
  }
}

/* y[i,:] = W[ids[i],:];  W [vocab,k] */
void pylora_ref_embedding_forward(const int64_t *ids, int64_t m, const pylora_mat *W,
                                  const pylora_mat *y) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < W->cols; j++) *at(y, i, j) = *at(W, ids[i], j);
}

/* dW[ids[i],:] += dy[i,:] in the order of i, from zero */
void pylora_ref_embedding_backward(const int64_t *ids, const pylora_mat *dy, const pylora_mat *dW) {
  for (int64_t t = 0; t < dW->rows; t++)
    for (int64_t j = 0; j < dW->cols; j++) *at(dW, t, j) = 0;
  for (int64_t i = 0; i < dy->rows; i++)
    for (int64_t j = 0; j < dy->cols; j++) *at(dW, ids[i], j) += *at(dy, i, j);
}

/* ---- loss and optimizer ------------------------------------------------------------------ */

/* lse = log sum exp(logits);  nll = lse - logits[label], 0 where the label is PYLORA_IGNORE */
void pylora_ref_cross_entropy_forward(const pylora_mat *logits, const int64_t *labels, float *nll,
                                      float *lse) {
  for (int64_t i = 0; i < logits->rows; i++) {
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < logits->cols; j++) top = fmax(top, *at(logits, i, j));
    for (int64_t j = 0; j < logits->cols; j++) total += exp(*at(logits, i, j) - top);
    const double log_total = top + log(total);
    lse[i] = (float)log_total;
    nll[i] = labels[i] == PYLORA_IGNORE ? 0 : (float)(log_total - *at(logits, i, labels[i]));
  }
}

/* dlogits = weight (exp(logits - lse) - onehot(label)), 0 where the label is PYLORA_IGNORE */
void pylora_ref_cross_entropy_backward(const pylora_mat *logits, const int64_t *labels,
                                       const float *lse, const float *weight,
                                       const pylora_mat *dlogits) {
  for (int64_t i = 0; i < logits->rows; i++)
    for (int64_t j = 0; j < logits->cols; j++) {
      const double p = exp((double)*at(logits, i, j) - lse[i]);
      *at(dlogits, i, j) =
          labels[i] == PYLORA_IGNORE ? 0 : (float)(weight[i] * (p - (j == labels[i])));
    }
}

/* Both: nll and lse, and dlogits from that lse */
void pylora_ref_cross_entropy(const pylora_mat *logits, const int64_t *labels, const float *weight,
                              float *nll, float *lse, const pylora_mat *dlogits) {
  pylora_ref_cross_entropy_forward(logits, labels, nll, lse);
  pylora_ref_cross_entropy_backward(logits, labels, lse, weight, dlogits);
}

/* Algorithm 2 of Loshchilov & Hutter (2019): decay is apart from the gradient. */
void pylora_ref_adamw_step(int64_t n, float *param, const float *grad, float *m, float *v,
                           const pylora_adamw *o) {
  for (int64_t i = 0; i < n; i++) {
    const double g = grad[i] * o->grad_scale;
    const double new_m = o->beta1 * m[i] + (1 - o->beta1) * g;
    const double new_v = o->beta2 * v[i] + (1 - o->beta2) * g * g;
    const double m_hat = new_m / (1 - pow(o->beta1, (double)o->step));
    const double v_hat = new_v / (1 - pow(o->beta2, (double)o->step));
    m[i] = (float)new_m;
    v[i] = (float)new_v;
    param[i] =
        (float)(param[i] * (1 - o->lr * o->weight_decay) - o->lr * m_hat / (sqrt(v_hat) + o->eps));
  }
}

double pylora_ref_sum_squares(int64_t n, const float *x) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
  return sum;
}

/* ---- random numbers ---------------------------------------------------------------------- */

/* Ten rounds on the counter (block, stream) with the key `seed`; word e is word e % 4 of block e / 4 */
void pylora_ref_philox(uint64_t seed, uint64_t stream, int64_t first, int64_t n, uint32_t *out) {
  for (int64_t e = first; e < first + n; e++) {
    const uint64_t block = (uint64_t)e / 4;
    uint32_t c[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)stream,
                     (uint32_t)(stream >> 32)};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
      const uint32_t next[4] = {(uint32_t)(p1 >> 32) ^ c[1] ^ key[0], (uint32_t)p1,
                                (uint32_t)(p0 >> 32) ^ c[3] ^ key[1], (uint32_t)p0};
      memcpy(c, next, sizeof c);
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
    out[e - first] = c[e % 4];
  }
}

/* y = drop(x): kept elements times 1 / (1 - p), the others 0 */
void pylora_ref_dropout(const pylora_mat *x, const pylora_drop *drop, const pylora_mat *y) {
  for (int64_t i = 0; i < x->rows; i++)
    for (int64_t j = 0; j < x->cols; j++) {
      const double factor = kept(drop, x->cols, i, j);
      *at(y, i, j) = factor != 0 ? (float)(*at(x, i, j) * factor) : 0;
    }
}
