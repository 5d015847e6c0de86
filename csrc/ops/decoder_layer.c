/* decoder_layer.c - a layer of a decoder: attention and the feed-forward part, and how they are added to x.
 *
 * What only feeds products has the type that the model says; all else is float32.  A norm is fused with the
 * projections that it comes before, a rotation with q and k, the product of gate and up with both, and
 * the sum with o and down, wherever the structure lets them follow each other. */
#include "ops/decoder_step.h"

/* What a group of projections reads: x and the norm before them, or x as it is in the narrow type. */
typedef struct source {
  const pylora_mat *x;
  const pylora_norm *norm;
  pylora_norm own;
} source;

static int read_from(const run *f, const pylora_norm *norm, source *s) {
  s->x = &f->b.x, s->norm = NULL;
  if (norm->w) {
    s->own = *norm;
    s->own.dtype = f->model->activations, s->own.rstd = NULL;
    s->norm = &s->own;
  } else if (f->model->activations != PYLORA_F32) {
    s->x = &f->b.normed;
    return pylora_cast(&f->b.x, s->x);
  }
  return PYLORA_OK;
}

/* ---- attention ---- */

/* Of each token, in a table of angles. */
static const int64_t *rows_of(const run *f, const pylora_rope_table *t) {
  return t->position ? t->position : f->step->position;
}

/* q or k: normed in place and rotated, each where that is asked for. */
static int turn(const run *f, const pylora_layer *l, const pylora_mat *raw, const pylora_norm *norm,
                const pylora_mat *y) {
  const int64_t D = f->model->attn.head_dim;
  if (norm->w && l->norm_of == PYLORA_NORM_EACH) {
    for (int64_t first = 0; first < raw->cols; first += D) {
      const pylora_mat head = {raw->p + first, raw->rows, D, raw->ld, NULL, NULL};
      pylora_norm own = *norm;
      own.w += first;
      if (own.b) own.b += first;
      TRY(pylora_decoder_norm(f, &head, &own, &head));
    }
  } else if (norm->w) {
    const int64_t width = l->norm_of == PYLORA_NORM_WHOLE ? raw->cols : D;
    const pylora_mat heads = {raw->p, raw->rows * (raw->cols / width), width, width, NULL, NULL};
    TRY(pylora_decoder_norm(f, &heads, norm, &heads));
  }
  if (l->rope < 0) return pylora_cast(raw, y);
  const pylora_rope_table *r = &f->model->rope[l->rope];
  return pylora_rope(raw, &r->cosines, &r->sines, rows_of(f, r), (int32_t)D, r->layout, 0, y);
}

static void put(const pylora_mat *y, int64_t row, int64_t to, const float *from, int64_t n) {
  const pylora_vec at = row_at(y, row, to);
  if (at.b)
    pylora_table()->to_bf16(n, from, at.b);
  else
    memcpy(at.p, from, (size_t)n * sizeof(float));
}

/* The output of one projection -> q, k (float32) and v. */
static void split(const run *f, const pylora_mat *y) {
  const pylora_attn *a = &f->model->attn;
  const buffers *b = &f->b;
  const int64_t D = a->head_dim, each = a->heads / a->kv_heads;
  for (int64_t i = 0; i < y->rows; i++) {
    const float *from = y->p + i * y->ld;
    if (f->model->fused_qkv == PYLORA_QKV_BLOCKS) {
      put(&b->raw_q, i, 0, from, f->q_size);
      put(&b->raw_k, i, 0, from + f->q_size, f->kv_size);
      put(&b->v, i, 0, from + f->q_size + f->kv_size, f->kv_size);
      continue;
    }
    for (int64_t kv = 0; kv < a->kv_heads; kv++, from += (each + 2) * D) {
      put(&b->raw_q, i, kv * each * D, from, each * D);
      put(&b->raw_k, i, kv * D, from + each * D, D);
      put(&b->v, i, kv * D, from + (each + 1) * D, D);
    }
  }
}

static int project(const run *f, const pylora_layer *l) {
  const buffers *b = &f->b;
  const int normed = l->q_norm.w != NULL, turned = l->rope >= 0;
  source s;
  TRY(read_from(f, &l->input_norm, &s));
  if (f->model->fused_qkv) {
    pylora_linear all = linear_of(l, 0, &b->qkv);
    const group in = {s.x, s.norm, l->module, 1, &all, NULL, f->step->seg_start};
    TRY(pylora_decoder_linears(f, &in));
    split(f, &b->qkv);
  } else {
    pylora_linear qkv[] = {
        linear_of(l, PYLORA_Q, normed ? &b->raw_q : &b->q),
        linear_of(l, PYLORA_K, normed ? &b->raw_k : &b->k),
        linear_of(l, PYLORA_V, &b->v),
    };
    pylora_rotation r = {.head_dim = f->model->attn.head_dim};
    if (turned) {
      const pylora_rope_table *t = &f->model->rope[l->rope];
      r.cosines = t->cosines, r.sines = t->sines, r.layout = t->layout;
      r.position = rows_of(f, t);
    }
    const pylora_finish finish[] = {{.rotation = &r}, {.rotation = &r}, {.rotation = NULL}};
    const group in = {
        s.x, s.norm, l->module, 3, qkv, normed || !turned ? NULL : finish, f->step->seg_start};
    TRY(pylora_decoder_linears(f, &in));
    if (!normed) return PYLORA_OK;
  }
  TRY(turn(f, l, &b->raw_q, &l->q_norm, &b->q));
  return turn(f, l, &b->raw_k, &l->k_norm, &b->k);
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

static int attention(const run *f, const pylora_layer *l, int64_t i, const pylora_kv *kv) {
  const buffers *b = &f->b;
  TRY(project(f, l));
  store(f, &b->k, &kv->k[i]);
  store(f, &b->v, &kv->v[i]);
  pylora_attn a = f->model->attn;
  a.window = l->window;
  if (l->scale != 0) a.scale = l->scale;
  return pylora_attention_forward(&b->q, &kv->k[i], &kv->v[i], f->step->seqs, &a, &b->o, &b->lse,
                                  f->ws, f->ws_bytes);
}

/* ---- feed-forward ---- */

/* act(gate) up of the norm of x, or act(up): what the last module takes. */
static int product(const run *f, const pylora_layer *l, const pylora_norm *norm, pylora_mat *y) {
  const buffers *b = &f->b;
  const int64_t first = f->attention_modules, *start = f->step->seg_start;
  const int kind = f->model->activation;
  source s;
  TRY(read_from(f, norm, &s));
  const int64_t d = l->W[first]->d, n = f->model->fused_gate_up ? d / 2 : d;
  const pylora_mat gate = part(&b->gate, n), up = part(&b->up, n), all = part(&b->gate_up, d);
  *y = gate;
  if (f->model->ungated || f->model->fused_gate_up) {
    pylora_linear one = linear_of(l, first, f->model->ungated ? &gate : &all);
    const group in = {s.x, s.norm, l->module + first, 1, &one, NULL, start};
    TRY(pylora_decoder_linears(f, &in));
    if (f->model->ungated) return pylora_activation_forward(kind, &gate, NULL, &gate);
    pylora_mat halves[2] = {all, all};
    halves[0].cols = halves[1].cols = n;
    if (all.b)
      halves[1].b += n;
    else
      halves[1].p += n;
    return pylora_activation_forward(kind, &halves[0], &halves[1], &gate);
  }
  pylora_linear both[] = {linear_of(l, first, &gate), linear_of(l, first + 1, &up)};
  const pylora_finish finish[] = {{.product = NULL}, {.product = &gate, .activation = kind}};
  const int together = both[0].W->dtype == both[1].W->dtype; /* else in two calls */
  const group in = {s.x, s.norm, l->module + first, 2, both, together ? finish : NULL, start};
  TRY(pylora_decoder_linears(f, &in));
  return together ? PYLORA_OK : pylora_activation_forward(kind, &gate, &up, &gate);
}

/* Module number `module` of the layer -> y, or added to x if y is x. */
static int last(const run *f, const pylora_layer *l, int64_t module, const pylora_mat *in,
                const pylora_mat *y) {
  pylora_linear one = linear_of(l, module, y);
  if (y == &f->b.x) one.residual = y;
  const group g = {in, NULL, l->module + module, 1, &one, NULL, f->step->seg_start};
  return pylora_decoder_linears(f, &g);
}

/* x += what module number `module` makes of `in`, normed and multiplied as the model says. */
static int join(const run *f, const pylora_layer *l, int64_t module, const pylora_mat *in,
                const pylora_norm *norm) {
  const float s = residual_of(f->model);
  if (!norm->w && s == 1) return last(f, l, module, in, &f->b.x);
  TRY(last(f, l, module, in, &f->b.out));
  if (norm->w) TRY(pylora_decoder_norm(f, &f->b.out, norm, &f->b.out));
  pylora_decoder_add(&f->b.x, &f->b.out, s);
  return PYLORA_OK;
}

int pylora_decoder_layer(const run *f, int64_t i, const pylora_kv *kv) {
  const pylora_layer *l = &f->model->layer[i];
  const int64_t o = f->attention_modules - 1, down = o + f->mlp_modules;
  const float s = residual_of(f->model);
  pylora_mat inner;
  TRY(attention(f, l, i, kv));
  if (f->model->parallel) {
    TRY(last(f, l, o, &f->b.o, &f->b.out));
    TRY(product(f, l, l->mid_norm.w ? &l->mid_norm : &l->input_norm, &inner));
    TRY(last(f, l, down, &inner, &f->b.inner));
    pylora_decoder_add(&f->b.x, &f->b.out, s);
    pylora_decoder_add(&f->b.x, &f->b.inner, s);
    return PYLORA_OK;
  }
  TRY(join(f, l, o, &f->b.o, &l->after_attention));
  if (!l->experts) {
    TRY(product(f, l, &l->mid_norm, &inner));
    return join(f, l, down, &inner, &l->after_mlp);
  }
  TRY(pylora_decoder_experts(f, i));
  if (l->after_mlp.w) TRY(pylora_decoder_norm(f, &f->b.inner, &l->after_mlp, &f->b.inner));
  pylora_decoder_add(&f->b.x, &f->b.inner, s);
  return PYLORA_OK;
}
