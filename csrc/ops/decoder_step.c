/* decoder_step.c - a step of a whole model before it runs: what the caller may say, and how much memory it
 * takes. */
#include "ops/decoder_step.h"

/* ---- what the caller said ---- */

static int check_norm(const pylora_norm *n) {
  return n->kind == PYLORA_RMS || n->kind == PYLORA_LAYER ? PYLORA_OK : PYLORA_E_VALUE;
}

static int check_structure(const pylora_decoder *f) {
  if (f->activations != PYLORA_F32 && f->activations != PYLORA_BF16) return PYLORA_E_UNSUPPORTED;
  if (f->activation < PYLORA_SILU || f->activation > PYLORA_RELU2) return PYLORA_E_VALUE;
  if (f->fused_qkv < PYLORA_QKV_APART || f->fused_qkv > PYLORA_QKV_GROUPS) return PYLORA_E_VALUE;
  if (f->ungated && f->fused_gate_up) return PYLORA_E_VALUE;
  if (!(f->logit_softcap >= 0)) return PYLORA_E_VALUE;
  if (f->ropes < 0) return PYLORA_E_SHAPE;
  if (f->ropes && !f->rope) return PYLORA_E_NULL;
  if (f->attn.heads < 1 || f->attn.kv_heads < 1 || f->attn.head_dim < 1 ||
      f->attn.heads % f->attn.kv_heads)
    return PYLORA_E_SHAPE;
  if (f->head->d != f->embedding->d || f->head->k != f->embedding->k) return PYLORA_E_SHAPE;
  return f->positions && f->positions->k != f->embedding->k ? PYLORA_E_SHAPE : PYLORA_OK;
}

static int check_experts(const pylora_decoder *f, const pylora_layer *l, int64_t first) {
  const pylora_experts *mix = l->experts;
  if (f->parallel || f->ungated || f->fused_gate_up) return PYLORA_E_UNSUPPORTED;
  if (mix->top_k < 1 || mix->top_k > mix->count) return PYLORA_E_VALUE;
  if (!mix->router) return PYLORA_E_NULL;
  if (mix->router->d != mix->count || mix->router->k != f->embedding->k) return PYLORA_E_SHAPE;
  for (int64_t e = 0; e < mix->count; e++) {
    const pylora_packed *const *W = l->W + first + EXPERT * e;
    if (W[0]->d != W[1]->d || W[2]->k != W[0]->d || W[2]->d != f->embedding->k)
      return PYLORA_E_SHAPE;
  }
  return PYLORA_OK;
}

static int check_layer(const run *f, const pylora_layer *l, int64_t modules) {
  const pylora_decoder *model = f->model;
  const int64_t first = f->attention_modules;
  const pylora_norm *norms[] = {&l->input_norm, &l->mid_norm,        &l->q_norm,
                                &l->k_norm,     &l->after_attention, &l->after_mlp};
  for (int i = 0; i < 6; i++) TRY(check_norm(norms[i]));
  if (!l->q_norm.w != !l->k_norm.w || !l->W) return PYLORA_E_NULL;
  for (int64_t j = 0; j < modules; j++)
    if (!l->W[j]) return PYLORA_E_NULL;
  if (l->rope < -1 || l->rope >= model->ropes) return PYLORA_E_VALUE;
  if (l->window < 0) return PYLORA_E_VALUE;
  if (l->norm_of < PYLORA_NORM_SHARED || l->norm_of > PYLORA_NORM_EACH) return PYLORA_E_VALUE;
  const int64_t qkv[] = {f->q_size, f->kv_size, f->kv_size};
  for (int j = 0; j < 3 && !model->fused_qkv; j++)
    if (l->W[j]->d != qkv[j]) return PYLORA_E_SHAPE;
  if (model->fused_qkv && l->W[0]->d != f->q_size + 2 * f->kv_size) return PYLORA_E_SHAPE;
  if (l->W[first - 1]->k != f->q_size || l->W[first - 1]->d != f->hidden) return PYLORA_E_SHAPE;
  if (l->experts) return check_experts(model, l, first);
  const pylora_packed *in = l->W[first], *down = l->W[modules - 1];
  if (model->fused_gate_up && in->d % 2) return PYLORA_E_SHAPE;
  if (!model->ungated && !model->fused_gate_up && l->W[first + 1]->d != in->d)
    return PYLORA_E_SHAPE;
  const int64_t inner = model->fused_gate_up ? in->d / 2 : in->d;
  return down->k != inner || down->d != f->hidden ? PYLORA_E_SHAPE : PYLORA_OK;
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

int pylora_decoder_begin(run *f, const pylora_decoder *model, const pylora_step *step) {
  if (!model || !model->embedding || !model->head || !model->norm.w ||
      (model->layers > 0 && !model->layer))
    return PYLORA_E_NULL;
  if (model->layers < 0) return PYLORA_E_SHAPE;
  TRY(check_structure(model));
  TRY(check_norm(&model->norm));
  TRY(check_step(step));
  *f = (run){.model = model, .step = step};
  f->hidden = model->embedding->k, f->vocab = model->embedding->d;
  f->q_size = (int64_t)model->attn.heads * model->attn.head_dim;
  f->kv_size = (int64_t)model->attn.kv_heads * model->attn.head_dim;
  f->attention_modules = model->fused_qkv ? 2 : 4;
  f->mlp_modules = model->ungated || model->fused_gate_up ? 2 : 3;
  for (int64_t i = 0; i < model->layers; i++) {
    const pylora_layer *l = &model->layer[i];
    const int64_t count = l->experts ? l->experts->count : 0;
    if (l->experts && count < 1) return PYLORA_E_VALUE;
    const int64_t modules = f->attention_modules + (count ? EXPERT * count : f->mlp_modules);
    if (l->module != f->head) return PYLORA_E_VALUE;
    f->head += modules;
    TRY(check_layer(f, l, modules));
    for (int64_t e = 0; e < max64(count, 1); e++)
      f->inner = max64(f->inner, l->W[f->attention_modules + EXPERT * e]->d);
    f->experts = max64(f->experts, count);
    f->top_k = max64(f->top_k, count ? l->experts->top_k : 0);
  }
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

void pylora_decoder_lay_out(run *f, pieces *a) {
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
  const pylora_decoder *model = f->model;
  int later = model->fused_qkv; /* they are rounded once, when they are rotated */
  int apart = model->parallel || model->positions || residual_of(model) != 1, bare = 0;
  for (int64_t i = 0; i < model->layers; i++) {
    const pylora_layer *l = &model->layer[i];
    later |= l->q_norm.w != NULL;
    apart |= l->after_attention.w || l->after_mlp.w;
    bare |= l->experts || !l->input_norm.w || !l->mid_norm.w;
  }
  if (later && act != PYLORA_F32) {
    b->raw_q = new_mat(a, PYLORA_F32, m, f->q_size);
    b->raw_k = new_mat(a, PYLORA_F32, m, f->kv_size);
  }
  b->v = new_mat(a, act, m, f->kv_size);
  b->o = new_mat(a, act, m, f->q_size);
  if (model->fused_qkv) b->qkv = new_mat(a, PYLORA_F32, m, f->q_size + 2 * f->kv_size);
  b->gate = new_mat(a, act, m, f->inner);
  b->up = new_mat(a, act, m, f->inner);
  if (model->fused_gate_up) b->gate_up = new_mat(a, act, m, f->inner);
  if (bare) b->normed = new_mat(a, act, m, f->hidden);
  if (apart || f->experts) {
    b->out = new_mat(a, PYLORA_F32, m, f->hidden);
    b->inner = new_mat(a, PYLORA_F32, m, f->hidden);
  }
  if (f->experts) {
    b->some = new_mat(a, act, m, f->hidden);
    b->logits = new_mat(a, PYLORA_F32, m, f->experts);
    b->p = new_mat(a, PYLORA_F32, m, f->experts);
    b->weights = new_mat(a, PYLORA_F32, m, f->top_k);
    b->chosen = piece(a, (double)m * (double)f->top_k, sizeof(int64_t));
    b->row = piece(a, (double)m, sizeof(int64_t));
    b->place = piece(a, (double)m, sizeof(int64_t));
    b->start = piece(a, (double)f->segments + 1, sizeof(int64_t));
  }
  b->last = new_mat(a, PYLORA_F32, n, f->hidden);
  b->lse = new_mat(a, PYLORA_F32, m, heads);
  b->rstd = piece(a, (double)m * (double)heads, sizeof(float));
  b->h = piece(a, (double)m * (double)rank, sizeof(float));
  b->lora = piece(a, SHARED * (double)f->segments, sizeof(const pylora_lora *));
  b->factor = piece(a, SHARED * (double)f->segments, sizeof(const float *));
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

/* The most of what the groups of a layer take; 0: impossible. */
static size_t layer_bytes(const run *f, const pylora_layer *l) {
  const int64_t m = f->step->m, o = f->attention_modules - 1, inner = f->mlp_modules - 1;
  size_t most = linear_bytes(f, m, l->module, (int)o, l->W);
  size_t one = linear_bytes(f, m, l->module + o, 1, l->W + o);
  if (most == 0 || one == 0) return 0;
  most = one > most ? one : most;
  for (int64_t e = 0; e < (l->experts ? l->experts->count : 1); e++) {
    const int64_t at = o + 1 + EXPERT * e;
    one = linear_bytes(f, m, l->module + at, (int)inner, l->W + at);
    if (one == 0) return 0;
    most = one > most ? one : most;
    one = linear_bytes(f, m, l->module + at + inner, 1, l->W + at + inner);
    if (one == 0) return 0;
    most = one > most ? one : most;
  }
  if (!l->experts) return most;
  one = pylora_linear_workspace(m, 1, l->experts->count, f->hidden, 0);
  return one == 0 ? 0 : one > most ? one : most;
}

size_t pylora_decoder_workspace(const pylora_decoder *model, const pylora_step *step) {
  run f;
  if (pylora_decoder_begin(&f, model, step)) return 0;
  const int64_t m = step->m;
  pieces count = {0};
  pylora_decoder_lay_out(&f, &count);
  pylora_attn all = model->attn;
  all.window = 0; /* the layer that needs most */
  size_t most = pylora_attention_workspace(step->seqs, &all), one;
  if (most == 0) return 0;
  for (int64_t i = 0; i < model->layers; i++) {
    one = layer_bytes(&f, &model->layer[i]);
    if (one == 0) return 0;
    most = one > most ? one : most;
  }
  one = linear_bytes(&f, step->outputs, f.head, 1, &model->head);
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
