/* llama.c - a whole Llama-type model in one call: inference, with a KV cache and an adapter for each
 * segment of the tokens.
 *
 * It is a composition of the public operations and nothing else, so it gives the bits that they give;
 * what it saves is the caller's time between them.  The residual stream is float32; what only feeds
 * products has the type that the model says.  q, k and v share an x, and so do gate and up: each group
 * is one call where its weights have one dtype.
 *
 * Where an adapter brings a bias of its own, the module runs segment by segment: rows do not depend on
 * each other, so that changes the time and not the bits. */
#include "ops/llama_step.h"

static pylora_mat rows_of(const pylora_mat *a, int64_t first, int64_t n) {
  return (pylora_mat){a->p ? a->p + first * a->ld : NULL, n,   a->cols, a->ld,
                      a->b ? a->b + first * a->ld : NULL, NULL};
}

/* The first `cols` columns of a buffer, side by side. */
static pylora_mat part(const pylora_mat *a, int64_t cols) {
  return (pylora_mat){a->p, a->rows, cols, cols, a->b, NULL};
}

/* Projections module .. module + n - 1 of one x; `start` are its segments (NULL: one). */
typedef struct group {
  const pylora_mat *x;
  const pylora_norm *norm; /* or NULL */
  int64_t module;
  int n;
  pylora_linear *linear;
  const pylora_finish *finish; /* or NULL */
  const int64_t *start;
} group;

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

static int linears(const run *f, const group *g) {
  int own_bias = 0;
  for (int j = 0; j < g->n; j++) {
    const pylora_lora **table = f->b.lora + j * f->segments;
    int any = 0;
    for (int64_t i = 0; i < f->segments; i++) {
      const pylora_adapter *a = adapter_of(f, i);
      any |= (table[i] = lora_of(a, g->module + j)) != NULL;
      own_bias |= f->own_bias && a && a->bias && a->bias[g->module + j];
    }
    g->linear[j].lora = any ? table : NULL;
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

/* x = W[ids] + s A[:,ids] Bᵀ + bias */
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
    for (int64_t t = 0; a->embedding_bias && t < n; t++)
      for (int64_t j = 0; j < f->hidden; j++) x.p[t * x.ld + j] += a->embedding_bias[j];
  }
  return PYLORA_OK;
}

/* q or k: normed per head in place, and rotated. */
static int turn(const run *f, const pylora_mat *raw, const float *norm, const pylora_rotation *r,
                const pylora_mat *y) {
  const int64_t D = r->head_dim;
  const pylora_mat heads = {raw->p, raw->rows * (raw->cols / D), D, D, NULL, NULL};
  TRY(pylora_rms_norm_forward(&heads, norm, f->model->eps, &heads, f->b.rstd));
  return pylora_rope(raw, &r->cosines, &r->sines, r->position, r->head_dim, r->layout, 0, y);
}

static void store(const run *f, const pylora_mat *from, const pylora_mat *cache) {
  for (int64_t i = 0; i < from->rows; i++) {
    const int64_t row = f->step->kv_row[i];
    if (from->b)
      memcpy(cache->b + row * cache->ld, from->b + i * from->ld,
             (size_t)from->cols * sizeof(uint16_t));
    else
      memcpy(cache->p + row * cache->ld, from->p + i * from->ld,
             (size_t)from->cols * sizeof(float));
  }
}

static int attention(const run *f, int64_t i, const pylora_kv *kv) {
  const pylora_llama *model = f->model;
  const pylora_layer *l = &model->layer[i];
  const buffers *b = &f->b;
  const int64_t *start = f->step->seg_start;
  const pylora_norm norm = {.w = l->input_norm, .eps = model->eps, .dtype = model->activations};
  const pylora_rotation r = {model->cosines, model->sines, f->step->position, model->attn.head_dim,
                             model->rope_layout};
  const int later = l->q_norm != NULL; /* a norm comes before the rotation */
  pylora_linear qkv[] = {
      {.W = l->W[PYLORA_Q], .bias = l->bias[PYLORA_Q], .y = later ? &b->raw_q : &b->q},
      {.W = l->W[PYLORA_K], .bias = l->bias[PYLORA_K], .y = later ? &b->raw_k : &b->k},
      {.W = l->W[PYLORA_V], .bias = l->bias[PYLORA_V], .y = &b->v},
  };
  const pylora_finish turned[] = {{.rotation = &r}, {.rotation = &r}, {.rotation = NULL}};
  const group in = {&b->x, &norm, i * MODULES + PYLORA_Q, 3, qkv, later ? NULL : turned, start};
  TRY(linears(f, &in));
  if (later) {
    TRY(turn(f, &b->raw_q, l->q_norm, &r, &b->q));
    TRY(turn(f, &b->raw_k, l->k_norm, &r, &b->k));
  }
  store(f, &b->k, &kv->k[i]);
  store(f, &b->v, &kv->v[i]);
  pylora_attn a = model->attn;
  a.window = l->window;
  TRY(pylora_attention_forward(&b->q, &kv->k[i], &kv->v[i], f->step->seqs, &a, &b->o, &b->lse,
                               f->ws, f->ws_bytes));
  pylora_linear o = {.W = l->W[PYLORA_O], .bias = l->bias[PYLORA_O], .y = &b->x};
  o.residual = &b->x;
  const group out = {&b->o, NULL, i * MODULES + PYLORA_O, 1, &o, NULL, start};
  return linears(f, &out);
}

static int mlp(const run *f, int64_t i) {
  const pylora_layer *l = &f->model->layer[i];
  const buffers *b = &f->b;
  const int64_t *start = f->step->seg_start, inner = l->W[PYLORA_GATE]->d;
  const pylora_norm norm = {.w = l->mid_norm, .eps = f->model->eps, .dtype = f->model->activations};
  const pylora_mat gate = part(&b->gate, inner), up = part(&b->up, inner);
  pylora_linear both[] = {
      {.W = l->W[PYLORA_GATE], .bias = l->bias[PYLORA_GATE], .y = &gate},
      {.W = l->W[PYLORA_UP], .bias = l->bias[PYLORA_UP], .y = &up},
  };
  const pylora_finish product[] = {{.product = NULL}, {.product = &gate}};
  const int together = both[0].W->dtype == both[1].W->dtype; /* else in two calls */
  const group in = {&b->x, &norm, i * MODULES + PYLORA_GATE, 2, both, together ? product : NULL,
                    start};
  TRY(linears(f, &in));
  if (!together) TRY(pylora_swiglu_forward(&gate, &up, &gate));
  pylora_linear down = {.W = l->W[PYLORA_DOWN], .bias = l->bias[PYLORA_DOWN], .y = &b->x};
  down.residual = &b->x;
  const group out = {&gate, NULL, i * MODULES + PYLORA_DOWN, 1, &down, NULL, start};
  return linears(f, &out);
}

static int head(const run *f, const pylora_mat *logits) {
  const pylora_step *s = f->step;
  const buffers *b = &f->b;
  for (int64_t i = 0; i < s->outputs; i++)
    memcpy(b->last.p + i * f->hidden, b->x.p + s->output[i] * f->hidden,
           (size_t)f->hidden * sizeof(float));
  const pylora_norm norm = {.w = f->model->norm, .eps = f->model->eps, .dtype = f->model->activations};
  for (int64_t i = 0, t = 0; s->seg_start && i <= f->segments; i++) {
    while (t < s->outputs && s->output[t] < s->seg_start[i]) t++;
    b->head_start[i] = t;
  }
  pylora_linear out = {.W = f->model->head, .y = logits};
  const int64_t *start = s->seg_start ? b->head_start : NULL;
  const group all = {&b->last, &norm, f->model->layers * (int64_t)MODULES, 1, &out, NULL, start};
  return linears(f, &all);
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

int pylora_llama_forward(const pylora_llama *model, const pylora_kv *kv, const pylora_step *step,
                         const pylora_mat *logits, void *ws, size_t ws_bytes) {
  run f;
  TRY(pylora_llama_begin(&f, model, step));
  TRY(check_cache(&f, kv));
  TRY(check_mat(logits, step->outputs, f.vocab, 1));
  if (step->m == 0) return PYLORA_OK;
  if (!ws) return PYLORA_E_NULL;
  arena a = arena_of(ws, ws_bytes);
  pieces p = {a.p, a.end, 0};
  if (a.p > a.end) return PYLORA_E_WORKSPACE;
  pylora_llama_lay_out(&f, &p);
  if (!p.p) return PYLORA_E_WORKSPACE;
  f.ws = p.p, f.ws_bytes = (size_t)(p.end - p.p);
  TRY(embed(&f));
  for (int64_t i = 0; i < model->layers; i++) {
    TRY(attention(&f, i, kv));
    TRY(mlp(&f, i));
  }
  return step->outputs ? head(&f, logits) : PYLORA_OK;
}
