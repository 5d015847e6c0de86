/* llama_step.c - a step of a whole model before it runs: what the caller may say, and how much memory it
 * takes. */
#include "ops/llama_step.h"

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

int pylora_llama_begin(run *f, const pylora_llama *model, const pylora_step *step) {
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

void pylora_llama_lay_out(run *f, pieces *a) {
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
  if (pylora_llama_begin(&f, model, step)) return 0;
  const int64_t m = step->m;
  pieces count = {0};
  pylora_llama_lay_out(&f, &count);
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
