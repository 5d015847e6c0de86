/* decoder.c - a whole model in one call: inference, with a KV cache and an adapter for each segment of the
 * tokens.  Its projections, embedding and head; decoder_layer.c and decoder_experts.c are the layers.
 *
 * It is a composition of the public operations and nothing else, so it gives the bits that they give;
 * what it saves is the caller's time between them.  The residual stream is float32; what only feeds
 * products has the type that the model says.  q, k and v share an x, and so do gate and up: each group
 * is one call where its weights have one dtype.
 *
 * Where an adapter brings a bias of its own, the module runs segment by segment: rows do not depend on
 * each other, so that changes the time and not the bits. */
#include "ops/decoder_step.h"

static pylora_mat rows_of(const pylora_mat *a, int64_t first, int64_t n) {
  return (pylora_mat){a->p ? a->p + first * a->ld : NULL, n,   a->cols, a->ld,
                      a->b ? a->b + first * a->ld : NULL, NULL};
}

/* One segment of the projections j .. end - 1, each with the bias of that segment's adapter. */
static int linear_alone(const run *f, const group *g, int j, int end, int64_t segment,
                        int64_t first, int64_t rows) {
  const pylora_adapter *a = adapter_of(f, segment);
  const pylora_mat some = rows_of(g->x, first, rows);
  pylora_linear own[SHARED];
  pylora_finish finish[SHARED];
  pylora_rotation rotation[SHARED];
  pylora_mat y[SHARED], residual[SHARED], product[SHARED];
  const int n = end - j;
  for (int i = 0; i < n; i++) {
    const pylora_linear *l = g->linear + j + i;
    const int64_t module = g->module + j + i;
    own[i] = *l;
    y[i] = rows_of(l->y, first, rows);
    own[i].y = &y[i];
    if (l->residual) {
      residual[i] = rows_of(l->residual, first, rows);
      own[i].residual = &residual[i];
    }
    if (l->lora) own[i].lora = l->lora + segment;
    if (l->factor) own[i].factor = l->factor + segment;
    if (a && a->bias && a->bias[module]) own[i].bias = a->bias[module];
    if (!g->finish) continue;
    finish[i] = g->finish[j + i];
    if (finish[i].rotation) {
      rotation[i] = *finish[i].rotation;
      rotation[i].position += first;
      finish[i].rotation = &rotation[i];
    }
    if (finish[i].product) {
      product[i] = rows_of(finish[i].product, first, rows);
      finish[i].product = &product[i];
    }
  }
  return pylora_fused_forward(&some, g->norm, n, own, g->finish ? finish : NULL, 1, NULL, f->ws,
                              f->ws_bytes);
}

int pylora_decoder_linears(const run *f, const group *g) {
  int own_bias = 0;
  for (int j = 0; j < g->n; j++) {
    const pylora_lora **table = f->b.lora + j * f->segments;
    const float **factor = f->b.factor + j * f->segments;
    int any = 0, scaled = 0;
    for (int64_t i = 0; i < f->segments; i++) {
      const pylora_adapter *a = adapter_of(f, i);
      any |= (table[i] = lora_of(a, g->module + j)) != NULL;
      scaled |= (factor[i] = a && a->factor ? a->factor[g->module + j] : NULL) != NULL;
      own_bias |= f->own_bias && a && a->bias && a->bias[g->module + j];
    }
    g->linear[j].lora = any ? table : NULL;
    g->linear[j].factor = scaled ? factor : NULL;
  }
  const int64_t *start = g->start;
  for (int j = 0, end; j < g->n; j = end) { /* one call for those of one dtype */
    for (end = j + 1; end < g->n && g->linear[end].W->dtype == g->linear[j].W->dtype;) end++;
    if (!own_bias) {
      TRY(pylora_fused_forward(g->x, g->norm, end - j, g->linear + j,
                               g->finish ? g->finish + j : NULL, start ? f->segments : 1, start,
                               f->ws, f->ws_bytes));
      continue;
    }
    for (int64_t i = 0; i < f->segments; i++) {
      const int64_t first = start ? start[i] : 0, last = start ? start[i + 1] : g->x->rows;
      if (last > first) TRY(linear_alone(f, g, j, end, i, first, last - first));
    }
  }
  return PYLORA_OK;
}

/* x = multiplier (f (W[ids] + s A[:,ids] Bᵀ) + bias) + positions[position] */
static int embed(const run *f) {
  const pylora_step *s = f->step;
  TRY(pylora_embedding_forward(s->ids, s->m, f->model->embedding, &f->b.x));
  for (int64_t i = 0; i < f->segments; i++) {
    const pylora_adapter *a = adapter_of(f, i);
    const int64_t first = first_of(f, i), n = first_of(f, i + 1) - first;
    if (!a || n == 0) continue;
    const pylora_mat x = rows_of(&f->b.x, first, n);
    if (a->embedding && a->embedding_B) {
      const pylora_lora *l = a->embedding;
      if (!l->A) return PYLORA_E_NULL;
      for (int64_t t = 0; t < n; t++)
        for (int64_t j = 0; j < l->r; j++)
          f->b.h[t * l->r + j] = l->s * l->A[j * l->lda + s->ids[first + t]];
      const pylora_mat h = {f->b.h, n, l->r, l->r, NULL, NULL};
      TRY(pylora_lora_forward(&h, a->embedding_B, NULL, NULL, &x, &x, NULL, f->ws, f->ws_bytes));
    }
    for (int64_t t = 0; a->embedding_factor && t < n; t++)
      for (int64_t j = 0; j < f->hidden; j++) x.p[t * x.ld + j] *= a->embedding_factor[j];
    for (int64_t t = 0; a->embedding_bias && t < n; t++)
      for (int64_t j = 0; j < f->hidden; j++) x.p[t * x.ld + j] += a->embedding_bias[j];
  }
  const float s1 = f->model->embedding_multiplier;
  if (s1 != 0 && s1 != 1) TRY(pylora_soft_cap_forward(&f->b.x, s1, 0, &f->b.x));
  if (f->model->positions) {
    TRY(pylora_embedding_forward(s->position, s->m, f->model->positions, &f->b.out));
    pylora_decoder_add(&f->b.x, &f->b.out, 1);
  }
  return PYLORA_OK;
}

/* ---- rows ---- */

int pylora_decoder_norm(const run *f, const pylora_mat *x, const pylora_norm *norm,
                        const pylora_mat *y) {
  if (!norm->w) return pylora_cast(x, y);
  if (norm->kind == PYLORA_LAYER)
    return pylora_layer_norm_forward(x, norm->w, norm->b, norm->eps, y, f->b.rstd);
  return pylora_rms_norm_forward(x, norm->w, norm->eps, y, f->b.rstd);
}

typedef struct sum {
  const pylora_mat *x, *y;
  float s;
} sum;

static void add_rows(const void *ctx, int64_t first, int64_t end) {
  const sum *f = ctx;
  for (int64_t i = first; i < end; i++) {
    float *x = f->x->p + i * f->x->ld;
    const float *y = f->y->p + i * f->y->ld;
    for (int64_t j = 0; j < f->x->cols; j++) {
      const float part = y[j] * f->s;
      x[j] += part;
    }
  }
}

void pylora_decoder_add(const pylora_mat *x, const pylora_mat *y, float s) {
  const sum f = {x, y, s};
  pylora_each_row(add_rows, &f, x->rows, x->cols);
}

static int head(const run *f, const pylora_mat *logits) {
  const pylora_step *s = f->step;
  const buffers *b = &f->b;
  for (int64_t i = 0; i < s->outputs; i++)
    memcpy(b->last.p + i * f->hidden, b->x.p + s->output[i] * f->hidden,
           (size_t)f->hidden * sizeof(float));
  pylora_norm norm = f->model->norm;
  if (s->normed) TRY(pylora_decoder_norm(f, &b->last, &norm, s->normed));
  norm.dtype = f->model->activations, norm.rstd = NULL;
  for (int64_t i = 0, t = 0; s->seg_start && i <= f->segments; i++) {
    while (t < s->outputs && s->output[t] < s->seg_start[i]) t++;
    b->head_start[i] = t;
  }
  pylora_linear out = {.W = f->model->head, .y = logits};
  const int64_t *start = s->seg_start ? b->head_start : NULL;
  const group all = {&b->last, &norm, f->head, 1, &out, NULL, start};
  TRY(pylora_decoder_linears(f, &all));
  const float m = f->model->logit_multiplier == 0 ? 1 : f->model->logit_multiplier;
  if (m == 1 && f->model->logit_softcap == 0) return PYLORA_OK;
  return pylora_soft_cap_forward(logits, m, f->model->logit_softcap, logits);
}

static int check_cache(const run *f, const pylora_kv *kv) {
  if (!kv || (f->model->layers && (!kv->k || !kv->v))) return PYLORA_E_NULL;
  const int half = f->model->activations == PYLORA_BF16;
  for (int64_t i = 0; i < f->model->layers; i++) {
    const pylora_mat *both[] = {&kv->k[i], &kv->v[i]};
    for (int j = 0; j < 2; j++) {
      TRY(check_mat16(both[j], kv->k[0].rows, f->kv_size, 1));
      if (both[j]->rows && (both[j]->b != NULL) != half) return PYLORA_E_UNSUPPORTED;
    }
  }
  for (int64_t i = 0; f->model->layers && i < f->step->m; i++)
    if (f->step->kv_row[i] < 0 || f->step->kv_row[i] >= kv->k[0].rows) return PYLORA_E_INDEX;
  return PYLORA_OK;
}

int pylora_decoder_forward(const pylora_decoder *model, const pylora_kv *kv,
                           const pylora_step *step, const pylora_mat *logits, void *ws,
                           size_t ws_bytes) {
  run f;
  TRY(pylora_decoder_begin(&f, model, step));
  TRY(check_cache(&f, kv));
  TRY(check_mat(logits, step->outputs, f.vocab, 1));
  if (step->normed) TRY(check_mat(step->normed, step->outputs, f.hidden, 1));
  if (step->m == 0) return PYLORA_OK;
  if (!ws) return PYLORA_E_NULL;
  arena a = arena_of(ws, ws_bytes);
  pieces p = {a.p, a.end, 0};
  if (a.p > a.end) return PYLORA_E_WORKSPACE;
  pylora_decoder_lay_out(&f, &p);
  if (!p.p) return PYLORA_E_WORKSPACE;
  f.ws = p.p, f.ws_bytes = (size_t)(p.end - p.p);
  TRY(embed(&f));
  for (int64_t i = 0; i < model->layers; i++) TRY(pylora_decoder_layer(&f, i, kv));
  return step->outputs ? head(&f, logits) : PYLORA_OK;
}
