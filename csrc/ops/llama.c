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
#include "runtime/internal.h"

enum { MODULES = PYLORA_LAYER_MODULES, SHARED = 3 /* projections of one x at most */ };

/* Pieces of the workspace; what is left of it is the operations' own. */
typedef struct buffers {
  pylora_mat x, raw_q, raw_k, q, k, v, o, gate, up, last, lse;
  float *rstd, *h;          /* of heads; h [m,r]: of the embedding's adapter */
  const pylora_lora **lora; /* [SHARED * segments] */
  int64_t *head_start;      /* [segments + 1]: segments of the outputs */
} buffers;

typedef struct run {
  const pylora_llama *model;
  const pylora_step *step;
  int64_t hidden, q_size, kv_size, inner, vocab;
  int64_t segments;
  int own_bias; /* some adapter has a bias */
  buffers b;
  void *ws; /* for the operations */
  size_t ws_bytes;
} run;

/* ---- what the caller said ---- */

static int check_model(const pylora_llama *f) {
  if (!f || !f->embedding || !f->head || !f->norm || (f->layers > 0 && !f->layer))
    return PYLORA_E_NULL;
  if (f->layers < 0) return PYLORA_E_SHAPE;
  if (f->activations != PYLORA_F32 && f->activations != PYLORA_BF16) return PYLORA_E_UNSUPPORTED;
  if (f->attn.heads < 1 || f->attn.kv_heads < 1 || f->attn.head_dim < 1) return PYLORA_E_SHAPE;
  if (f->head->d != f->embedding->d || f->head->k != f->embedding->k) return PYLORA_E_SHAPE;
  for (int64_t i = 0; i < f->layers; i++) {
    const pylora_layer *l = &f->layer[i];
    if (!l->input_norm || !l->mid_norm || !l->q_norm != !l->k_norm) return PYLORA_E_NULL;
    for (int j = 0; j < MODULES; j++)
      if (!l->W[j]) return PYLORA_E_NULL;
    if (l->W[PYLORA_UP]->d != l->W[PYLORA_GATE]->d || l->W[PYLORA_DOWN]->k != l->W[PYLORA_GATE]->d)
      return PYLORA_E_SHAPE;
  }
  return PYLORA_OK;
}

static int check_step(const pylora_step *s) {
  if (!s || !s->seqs) return PYLORA_E_NULL;
  if (s->m < 0 || s->outputs < 0 || s->segments < 0) return PYLORA_E_SHAPE;
  if ((s->m && (!s->ids || !s->position || !s->kv_row)) || (s->outputs && !s->output))
    return PYLORA_E_NULL;
  for (int64_t i = 0; i < s->outputs; i++) {
    if (s->output[i] < 0 || s->output[i] >= s->m) return PYLORA_E_INDEX;
    if (i && s->output[i] < s->output[i - 1]) return PYLORA_E_SHAPE;
  }
  if (!s->seg_start) return s->segments == 1 || !s->adapter ? PYLORA_OK : PYLORA_E_SHAPE;
  if (s->segments < 1 || s->seg_start[0] != 0 || s->seg_start[s->segments] != s->m)
    return PYLORA_E_SHAPE;
  for (int64_t i = 0; i < s->segments; i++)
    if (s->seg_start[i + 1] < s->seg_start[i]) return PYLORA_E_SHAPE;
  return PYLORA_OK;
}

static const pylora_adapter *adapter_of(const run *f, int64_t segment) {
  return f->step->adapter ? f->step->adapter[segment] : NULL;
}

/* Tokens of a segment. */
static int64_t first_of(const run *f, int64_t segment) {
  return f->step->seg_start ? f->step->seg_start[segment] : segment * f->step->m;
}

static const pylora_lora *lora_of(const pylora_adapter *a, int64_t module) {
  return a && a->lora ? a->lora[module] : NULL;
}

static int begin(run *f, const pylora_llama *model, const pylora_step *step) {
  TRY(check_model(model));
  TRY(check_step(step));
  f->model = model, f->step = step;
  f->hidden = model->embedding->k, f->vocab = model->embedding->d;
  f->q_size = (int64_t)model->attn.heads * model->attn.head_dim;
  f->kv_size = (int64_t)model->attn.kv_heads * model->attn.head_dim;
  f->inner = 0;
  for (int64_t i = 0; i < model->layers; i++)
    f->inner = max64(f->inner, model->layer[i].W[PYLORA_GATE]->d);
  f->segments = step->seg_start ? step->segments : 1;
  f->own_bias = 0;
  for (int64_t i = 0; i < f->segments; i++)
    f->own_bias |= adapter_of(f, i) && adapter_of(f, i)->bias;
  return PYLORA_OK;
}

/* ---- workspace ---- */

/* Counts bytes when `p` is NULL. */
typedef struct pieces {
  char *p, *end;
  double bytes;
} pieces;

static void *piece(pieces *a, double count, size_t size) {
  const double bytes = count * (double)size + PYLORA_ALIGN;
  a->bytes += bytes;
  if (!a->p) return NULL;
  if ((double)(a->end - a->p) < bytes) {
    a->p = a->end = NULL; /* too small: the caller sees a NULL */
    return NULL;
  }
  void *r = a->p;
  a->p += round_up((size_t)count * size);
  return r;
}

static pylora_mat new_mat(pieces *a, int dtype, int64_t rows, int64_t cols) {
  const int half = dtype == PYLORA_BF16;
  void *p = piece(a, (double)rows * (double)cols, half ? sizeof(uint16_t) : sizeof(float));
  return (pylora_mat){half ? NULL : p, rows, cols, cols, half ? p : NULL, NULL};
}

static void lay_out(run *f, pieces *a) {
  const int act = f->model->activations;
  const int64_t m = f->step->m, n = f->step->outputs, heads = f->model->attn.heads;
  int64_t rank = 0;
  for (int64_t i = 0; i < f->segments; i++)
    if (adapter_of(f, i) && adapter_of(f, i)->embedding)
      rank = max64(rank, adapter_of(f, i)->embedding->r);
  buffers *b = &f->b;
  b->x = new_mat(a, PYLORA_F32, m, f->hidden);
  b->q = b->raw_q = new_mat(a, act, m, f->q_size);
  b->k = b->raw_k = new_mat(a, act, m, f->kv_size);
  int normed = 0; /* heads: they are rounded once, when they are rotated */
  for (int64_t i = 0; i < f->model->layers; i++) normed |= f->model->layer[i].q_norm != NULL;
  if (normed && act != PYLORA_F32) {
    b->raw_q = new_mat(a, PYLORA_F32, m, f->q_size);
    b->raw_k = new_mat(a, PYLORA_F32, m, f->kv_size);
  }
  b->v = new_mat(a, act, m, f->kv_size);
  b->o = new_mat(a, act, m, f->q_size);
  b->gate = new_mat(a, act, m, f->inner);
  b->up = new_mat(a, act, m, f->inner);
  b->last = new_mat(a, PYLORA_F32, n, f->hidden);
  b->lse = new_mat(a, PYLORA_F32, m, heads);
  b->rstd = piece(a, (double)m * (double)heads, sizeof(float));
  b->h = piece(a, (double)m * (double)rank, sizeof(float));
  b->lora = piece(a, SHARED * (double)f->segments, sizeof(const pylora_lora *));
  b->head_start = piece(a, (double)f->segments + 1, sizeof(int64_t));
}

/* Of the n projections from `module` on, over all segments. 0: impossible. */
static size_t linear_bytes(const run *f, int64_t rows, int64_t module, int n,
                           const pylora_packed *const *W) {
  int64_t d = 0, r = 0;
  for (int j = 0; j < n; j++) {
    int64_t most = 0;
    for (int64_t i = 0; i < f->segments; i++) {
      const pylora_lora *l = lora_of(adapter_of(f, i), module + j);
      if (l) most = max64(most, l->r);
    }
    d += W[j]->d, r += most;
  }
  return pylora_linear_workspace(rows, n, d, W[0]->k, r);
}

static const struct {
  int module, n;
} groups[] = {{PYLORA_Q, 3}, {PYLORA_O, 1}, {PYLORA_GATE, 2}, {PYLORA_DOWN, 1}};

size_t pylora_llama_workspace(const pylora_llama *model, const pylora_step *step) {
  run f;
  if (begin(&f, model, step)) return 0;
  const int64_t m = step->m;
  pieces count = {0};
  lay_out(&f, &count);
  pylora_attn all = model->attn;
  all.window = 0; /* the layer that needs most */
  size_t most = pylora_attention_workspace(step->seqs, &all), one;
  if (most == 0) return 0;
  for (int64_t i = 0; i < model->layers; i++)
    for (int g = 0; g < 4; g++) {
      const int first = groups[g].module;
      one = linear_bytes(&f, m, i * MODULES + first, groups[g].n, model->layer[i].W + first);
      if (one == 0) return 0;
      most = one > most ? one : most;
    }
  one = linear_bytes(&f, step->outputs, model->layers * (int64_t)MODULES, 1, &model->head);
  if (one == 0) return 0;
  most = one > most ? one : most;
  for (int64_t i = 0; i < f.segments; i++) {
    const pylora_adapter *a = adapter_of(&f, i);
    if (!a || !a->embedding || !a->embedding_B) continue;
    one = pylora_lora_workspace(m, f.hidden, a->embedding->r, 0);
    if (one == 0) return 0;
    most = one > most ? one : most;
  }
  const double total = count.bytes + (double)most + 2 * PYLORA_ALIGN;
  return total > 1e15 ? 0 : (size_t)total;
}

/* ---- parts ---- */

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
  const pylora_norm norm = {l->input_norm, model->eps, model->activations, NULL};
  const pylora_rotation r = {model->cosines, model->sines, f->step->position, model->attn.head_dim,
                             model->rope_layout};
  const int later = l->q_norm != NULL; /* a norm comes before the rotation */
  pylora_linear qkv[] = {
      {.W = l->W[PYLORA_Q], .bias = l->bias[PYLORA_Q], .y = later ? &b->raw_q : &b->q},
      {.W = l->W[PYLORA_K], .bias = l->bias[PYLORA_K], .y = later ? &b->raw_k : &b->k},
      {.W = l->W[PYLORA_V], .bias = l->bias[PYLORA_V], .y = &b->v},
  };
  const pylora_finish turned[] = {{&r, NULL}, {&r, NULL}, {NULL, NULL}};
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
  const pylora_norm norm = {l->mid_norm, f->model->eps, f->model->activations, NULL};
  const pylora_mat gate = part(&b->gate, inner), up = part(&b->up, inner);
  pylora_linear both[] = {
      {.W = l->W[PYLORA_GATE], .bias = l->bias[PYLORA_GATE], .y = &gate},
      {.W = l->W[PYLORA_UP], .bias = l->bias[PYLORA_UP], .y = &up},
  };
  const pylora_finish product[] = {{NULL, NULL}, {NULL, &gate}};
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
  const pylora_norm norm = {f->model->norm, f->model->eps, f->model->activations, NULL};
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
  TRY(begin(&f, model, step));
  TRY(check_cache(&f, kv));
  TRY(check_mat(logits, step->outputs, f.vocab, 1));
  if (step->m == 0) return PYLORA_OK;
  if (!ws) return PYLORA_E_NULL;
  arena a = arena_of(ws, ws_bytes);
  pieces p = {a.p, a.end, 0};
  if (a.p > a.end) return PYLORA_E_WORKSPACE;
  lay_out(&f, &p);
  if (!p.p) return PYLORA_E_WORKSPACE;
  f.ws = p.p, f.ws_bytes = (size_t)(p.end - p.p);
  TRY(embed(&f));
  for (int64_t i = 0; i < model->layers; i++) {
    TRY(attention(&f, i, kv));
    TRY(mlp(&f, i));
  }
  return step->outputs ? head(&f, logits) : PYLORA_OK;
}
