/* A whole model in one call: the bits of the single operations on whole sequences, whatever the structure,
 * the batch, the cache, the segments and the threads; and what it refuses. */
#include "check.h"

enum { LAYERS = 2, EXPERTS = 3, MOST = 4 + 3 * EXPERTS, TABLE = LAYERS * MOST + 1, ADAPTERS = 4 };
enum { HIDDEN = 64, HEADS = 4, KV_HEADS = 2, D = 16, INNER = 96, VOCAB = 70, ROWS = 64 };
enum { SEQUENCES = 4, LONGEST = 11 };

typedef struct world {
  pylora_decoder model;
  pylora_layer layer[LAYERS];
  pylora_packed W[TABLE]; /* the layers' modules and the head */
  int table;              /* how many these are */
  pylora_packed embedding, positions, router;
  const pylora_packed *at[TABLE];
  const float *own_bias[TABLE];
  pylora_experts experts;
  pylora_rope_table rope[2];
  int dtype, act;
  pylora_lora plain[ADAPTERS][TABLE], packed[ADAPTERS][TABLE], low[ADAPTERS];
  const pylora_lora *plain_at[ADAPTERS][TABLE], *packed_at[ADAPTERS][TABLE];
  const float *bias[ADAPTERS][TABLE];
  pylora_packed B[ADAPTERS];
  pylora_adapter adapter[ADAPTERS], unpacked[ADAPTERS];
  pylora_mat k[LAYERS], v[LAYERS];
  pylora_kv kv;
} world;

static void *aligned(size_t n) {
  char *p = bytes_of(n + 64);
  return p + (64 - (uintptr_t)p % 64) % 64;
}

static pylora_packed weight(int dtype, int64_t d, int64_t k) {
  const pylora_mat W = matrix(d, k, 0.3f);
  pylora_packed P;
  OK(pylora_pack(dtype, &W, aligned(pylora_pack_bytes(dtype, d, k)), &P));
  return P;
}

static pylora_mat mat_of(int act, int64_t rows, int64_t cols) {
  void *p = bytes_of((size_t)(rows * cols) * sizeof(float));
  memset(p, 0xff, (size_t)(rows * cols) * sizeof(float)); /* NaN in either type */
  return (pylora_mat){act ? NULL : p, rows, cols, cols, act ? p : NULL, NULL};
}

static pylora_lora low_rank(int64_t d, int64_t k, int64_t r) {
  return (pylora_lora){r, floats(r * k, 0.3f), k, floats(d * r, 0.3f), r, 0.7f, NULL, NULL};
}

/* Adapter 0: ranks 1 .. 64 on all modules; 1: the same with biases and an embedding; 2: rank 3 on some;
 * 3: a bias alone. */
static void make_adapters(world *w) {
  memset(w->plain_at, 0, sizeof w->plain_at);
  memset(w->packed_at, 0, sizeof w->packed_at);
  memset(w->bias, 0, sizeof w->bias);
  for (int a = 0; a < ADAPTERS; a++) {
    for (int i = 0; i < w->table; i++) {
      const int64_t d = w->W[i].d, k = w->W[i].k;
      if (a == 3 || (a == 2 && i % 3)) continue;
      w->plain[a][i] = low_rank(d, k, a == 2 ? 3 : PICK(1, 2, 8, 31, 32, 33, 64));
      if (i == 5) memset((float *)w->plain[a][i].B, 0, (size_t)(d * w->plain[a][i].r) * 4);
      w->plain_at[a][i] = &w->plain[a][i];
      void *buffer = aligned(pylora_lora_pack_bytes(w->dtype, d, k, w->plain[a][i].r));
      OK(pylora_lora_pack(w->dtype, d, k, &w->plain[a][i], buffer));
      w->packed[a][i] = (pylora_lora){.r = w->plain[a][i].r, .packed = buffer};
      w->packed_at[a][i] = &w->packed[a][i];
    }
    w->adapter[a] = (pylora_adapter){.lora = w->packed_at[a]};
    w->unpacked[a] = (pylora_adapter){.lora = w->plain_at[a]};
    if (a == 0 || a == 2) continue;
    for (int i = 0; i < w->table; i += 2) w->bias[a][i] = floats(w->W[i].d, 0.5f);
    w->low[a] = low_rank(HIDDEN, VOCAB, 5);
    const pylora_mat B = {(float *)w->low[a].B, HIDDEN, 5, 5, NULL, NULL};
    OK(pylora_pack(PYLORA_F32, &B, aligned(pylora_pack_bytes(PYLORA_F32, HIDDEN, 5)), &w->B[a]));
    w->adapter[a].bias = w->unpacked[a].bias = w->bias[a];
    if (a == 3) continue;
    w->adapter[a].embedding = w->unpacked[a].embedding = &w->low[a];
    w->adapter[a].embedding_B = w->unpacked[a].embedding_B = &w->B[a];
    w->adapter[a].embedding_bias = w->unpacked[a].embedding_bias = floats(HIDDEN, 0.3f);
  }
}

static pylora_norm norm_of(int kind, int64_t k) {
  return (pylora_norm){.w = floats(k, 1),
                       .eps = 1e-5f,
                       .kind = kind,
                       .b = kind == PYLORA_LAYER && below(2) ? floats(k, 1) : NULL};
}

/* Any structure, or Llama's if it is `plain`. */
static void structure(pylora_decoder *g, int plain) {
  if (plain) return;
  const int experts = below(3) == 0;
  g->activation = (int32_t)below(4);
  g->fused_qkv = (int32_t)below(3);
  g->ungated = !experts && below(3) == 0;
  g->fused_gate_up = !experts && !g->ungated && below(2);
  g->parallel = !experts && below(3) == 0;
  g->embedding_multiplier = below(2) ? 3 : 0;
  g->residual_multiplier = below(2) ? 0.7f : 0;
  g->logit_multiplier = below(2) ? 0.5f : 0;
  g->logit_softcap = below(2) ? 2 : 0;
  g->attn.softcap = below(2) ? 1.5f : 0;
}

static void make_layer(world *w, int i, int plain) {
  const pylora_decoder *g = &w->model;
  pylora_layer *l = &w->layer[i];
  const int64_t q = HEADS * D, kv = KV_HEADS * D;
  const int kind = plain ? PYLORA_RMS : (int)below(2), any = !plain && below(2);
  const int experts = !plain && !g->ungated && !g->fused_gate_up && !g->parallel && below(2);
  *l = (pylora_layer){.W = w->at + w->table, .bias = w->own_bias + w->table, .module = w->table};
  if (!any || g->parallel) l->input_norm = norm_of(kind, HIDDEN);
  if (!any) l->mid_norm = norm_of(kind, HIDDEN);
  if (any && !g->parallel)
    l->after_attention = norm_of(kind, HIDDEN), l->after_mlp = norm_of(kind, HIDDEN);
  if (below(2)) {
    l->norm_of = plain ? PYLORA_NORM_SHARED : (int32_t)below(3);
    const int shared = l->norm_of == PYLORA_NORM_SHARED;
    l->q_norm = norm_of(kind, shared ? D : q), l->k_norm = norm_of(kind, shared ? D : kv);
  }
  l->window = i ? 5 : 0;
  l->scale = plain || below(2) ? 0 : 0.3f;
  l->rope = plain ? 0 : (int32_t)below(3) - 1;
  if (experts) l->experts = &w->experts;
  int64_t d[MOST], k[MOST];
  int n = 0;
#define ADD(rows, cols) d[n] = rows, k[n++] = cols
  if (g->fused_qkv) {
    ADD(q + 2 * kv, HIDDEN);
  } else {
    ADD(q, HIDDEN), ADD(kv, HIDDEN), ADD(kv, HIDDEN);
  }
  ADD(HIDDEN, q);
  for (int e = 0; e < (experts ? EXPERTS : 1); e++) {
    ADD(g->fused_gate_up ? 2 * INNER : INNER, HIDDEN);
    if (!g->ungated && !g->fused_gate_up) ADD(INNER, HIDDEN);
    ADD(HIDDEN, INNER);
  }
#undef ADD
  for (int j = 0; j < n; j++, w->table++) {
    w->W[w->table] = weight(w->dtype, d[j], k[j]);
    w->at[w->table] = &w->W[w->table];
    w->own_bias[w->table] = j < 3 ? floats(d[j], 0.5f) : NULL;
  }
}

static void make_world(world *w, int dtype, int plain) {
  w->dtype = dtype, w->act = dtype == PYLORA_BF16, w->table = 0;
  w->model = (pylora_decoder){
      .layers = LAYERS,
      .activations = w->act ? PYLORA_BF16 : PYLORA_F32,
      .attn = {HEADS, KV_HEADS, D, 0, 0.25f, 0},
      .ropes = 2,
      .rope = w->rope,
      .embedding = &w->embedding,
      .norm = norm_of(plain ? PYLORA_RMS : (int)below(2), HIDDEN),
      .layer = w->layer,
  };
  structure(&w->model, plain);
  for (int i = 0; i < 2; i++) {
    const int64_t half = plain || below(2) ? D / 2 : D / 4;
    w->rope[i] = (pylora_rope_table){matrix(LONGEST, half, 1), matrix(LONGEST, half, 1),
                                     plain ? PYLORA_ROPE_HALF : (int)below(2), NULL};
  }
  w->router = weight(PYLORA_F32, EXPERTS, HIDDEN);
  w->experts = (pylora_experts){&w->router, EXPERTS, (int32_t)(1 + below(EXPERTS)), (int)below(2)};
  w->embedding = weight(dtype, VOCAB, HIDDEN);
  w->positions = weight(dtype, LONGEST, HIDDEN);
  if (!plain && below(2)) w->model.positions = &w->positions;
  for (int i = 0; i < LAYERS; i++) make_layer(w, i, plain);
  w->W[w->table] = weight(dtype, VOCAB, HIDDEN);
  w->model.head = &w->W[w->table++];
  for (int i = 0; i < LAYERS; i++)
    w->k[i] = mat_of(w->act, ROWS, KV_HEADS * D), w->v[i] = mat_of(w->act, ROWS, KV_HEADS * D);
  w->kv = (pylora_kv){w->k, w->v};
  make_adapters(w);
}

/* ---- one sequence at once by the single operations, with adapters that are not packed ---- */

static void one_linear(const world *w, const pylora_mat *x, int module, const pylora_adapter *a,
                       const float *bias, const pylora_mat *residual, const pylora_mat *y) {
  const pylora_packed *W = &w->W[module];
  const pylora_lora *l = a ? a->lora[module] : NULL;
  if (a && a->bias && a->bias[module]) bias = a->bias[module];
  const size_t n = pylora_lora_workspace(x->rows, W->d, W->k, l ? l->r : 0);
  const pylora_mat h = mat_of(0, x->rows, l ? l->r : 0);
  OK(pylora_lora_forward(x, W, bias, l, residual, y, l ? &h : NULL, bytes_of(n), n));
}

static void normed_to(const pylora_norm *n, const pylora_mat *x, const pylora_mat *y) {
  float *rstd = floats(x->rows, 0);
  if (!n->w)
    OK(pylora_cast(x, y));
  else if (n->kind == PYLORA_LAYER)
    OK(pylora_layer_norm_forward(x, n->w, n->b, n->eps, y, rstd));
  else
    OK(pylora_rms_norm_forward(x, n->w, n->eps, y, rstd));
}

static void turned(const world *w, const pylora_layer *l, const pylora_norm *n, const pylora_mat *x,
                   const int64_t *position, const pylora_mat *y) {
  const int64_t width = l->norm_of == PYLORA_NORM_WHOLE ? x->cols : D;
  const pylora_mat heads = {x->p, x->rows * x->cols / width, width, width, NULL, NULL};
  if (n->w && l->norm_of != PYLORA_NORM_EACH) normed_to(n, &heads, &heads);
  for (int64_t i = 0; n->w && l->norm_of == PYLORA_NORM_EACH && i < heads.rows; i++) {
    const pylora_mat one = {x->p + i * D, 1, D, D, NULL, NULL};
    pylora_norm own = *n; /* row by row: head i % heads */
    own.w += i * D % x->cols;
    if (own.b) own.b += i * D % x->cols;
    normed_to(&own, &one, &one);
  }
  const pylora_rope_table *r = &w->rope[l->rope < 0 ? 0 : l->rope];
  if (l->rope < 0)
    OK(pylora_cast(x, y));
  else
    OK(pylora_rope(x, &r->cosines, &r->sines, position, D, r->layout, 0, y));
}

/* x += s y, each product rounded */
static void plus(const pylora_mat *x, const pylora_mat *y, float s) {
  for (int64_t i = 0; i < x->rows * x->cols; i++) {
    const float part = y->p[i] * s;
    x->p[i] += part;
  }
}

static void feed_forward(const world *w, const pylora_layer *l, int64_t at, const pylora_mat *x,
                         const pylora_adapter *a, const pylora_mat *y) {
  const pylora_decoder *g = &w->model;
  const int64_t m = x->rows;
  const pylora_mat gate = mat_of(w->act, m, INNER), up = mat_of(w->act, m, INNER);
  const float *const *bias = l->bias + (at - l->module);
  if (g->fused_gate_up) {
    const pylora_mat both = mat_of(w->act, m, 2 * INNER);
    one_linear(w, x, (int)at, a, bias[0], NULL, &both);
    pylora_mat half[2] = {both, both};
    half[0].cols = half[1].cols = INNER;
    if (w->act)
      half[1].b += INNER;
    else
      half[1].p += INNER;
    OK(pylora_cast(&half[0], &gate));
    OK(pylora_cast(&half[1], &up));
  } else {
    one_linear(w, x, (int)at, a, bias[0], NULL, &gate);
    if (!g->ungated) one_linear(w, x, (int)++at, a, bias[1], NULL, &up);
  }
  OK(pylora_activation_forward(g->activation, &gate, g->ungated ? NULL : &up, &gate));
  one_linear(w, &gate, (int)at + 1, a, NULL, NULL, y);
}

/* Each token by itself through each expert that it goes to. */
static void mixture(const world *w, const pylora_layer *l, int64_t at, const pylora_mat *x,
                    const pylora_adapter *a, const pylora_mat *y) {
  const int64_t m = x->rows, k = w->experts.top_k;
  const pylora_mat logits = mat_of(0, m, EXPERTS), weights = mat_of(0, m, k);
  int64_t *chosen = ids_below(m * k, 1);
  const size_t n = pylora_lora_workspace(m, EXPERTS, HIDDEN, 0);
  OK(pylora_lora_forward(x, &w->router, NULL, NULL, NULL, &logits, NULL, bytes_of(n), n));
  OK(pylora_choose(&logits, k, w->experts.normalize, &logits, chosen, &weights));
  memset(y->p, 0, (size_t)(m * HIDDEN) * sizeof(float));
  for (int64_t i = 0; i < m; i++)
    for (int e = 0; e < EXPERTS; e++)
      for (int64_t c = 0; c < k; c++) {
        if (chosen[i * k + c] != e) continue;
        pylora_mat one = *x;
        one.rows = 1;
        if (one.b)
          one.b += i * x->ld;
        else
          one.p += i * x->ld;
        const pylora_mat out = mat_of(0, 1, HIDDEN), to = row_of(y, i);
        feed_forward(w, l, at + 3 * e, &one, a, &out);
        plus(&to, &out, *el(&weights, i, c));
      }
}

/* q, k (float32) and v out of the projections, as they are or fused. */
static void split(const world *w, const pylora_layer *l, const pylora_mat *x,
                  const pylora_adapter *a, const pylora_mat *q, const pylora_mat *k,
                  const pylora_mat *v) {
  const int at = (int)l->module, how = w->model.fused_qkv;
  if (how == PYLORA_QKV_APART) {
    one_linear(w, x, at, a, l->bias[0], NULL, q);
    one_linear(w, x, at + 1, a, l->bias[1], NULL, k);
    one_linear(w, x, at + 2, a, l->bias[2], NULL, v);
    return;
  }
  const int64_t each = HEADS / KV_HEADS;
  const pylora_mat all = mat_of(0, x->rows, (HEADS + 2 * KV_HEADS) * D),
                   wide = mat_of(0, x->rows, KV_HEADS * D);
  one_linear(w, x, at, a, l->bias[0], NULL, &all);
  for (int64_t i = 0; i < x->rows; i++)
    for (int64_t h = 0; h < HEADS + 2 * KV_HEADS; h++) {
      const int64_t kv = h / (each + 2), in = h % (each + 2);
      int64_t to = h; /* heads of q, then of k, then of v */
      if (how == PYLORA_QKV_GROUPS)
        to = in < each ? kv * each + in : in == each ? HEADS + kv : HEADS + KV_HEADS + kv;
      const pylora_mat *y = to < HEADS ? q : to < HEADS + KV_HEADS ? k : &wide;
      to -= to < HEADS ? 0 : to < HEADS + KV_HEADS ? HEADS : HEADS + KV_HEADS;
      memcpy(el(y, i, to * D), el(&all, i, h * D), D * sizeof(float));
    }
  OK(pylora_cast(&wide, v));
}

static pylora_mat by_hand(const world *w, const int64_t *ids, int64_t m, const pylora_adapter *a,
                          pylora_mat *last) {
  const pylora_decoder *g = &w->model;
  const int act = w->act;
  const pylora_mat x = mat_of(0, m, HIDDEN), normed = mat_of(act, m, HIDDEN),
                   out = mat_of(0, m, HIDDEN), inner = mat_of(0, m, HIDDEN);
  const pylora_mat raw_q = mat_of(0, m, HEADS * D), raw_k = mat_of(0, m, KV_HEADS * D);
  const pylora_mat q = mat_of(act, m, HEADS * D), k = mat_of(act, m, KV_HEADS * D),
                   v = mat_of(act, m, KV_HEADS * D), o = mat_of(act, m, HEADS * D);
  const pylora_mat lse = mat_of(0, m, HEADS);
  int64_t *position = ids_below(m, 1);
  for (int64_t i = 0; i < m; i++) position[i] = i;
  const int64_t start[] = {0, m};
  const pylora_seqs seqs = {1, start, NULL, NULL};
  const float s = g->residual_multiplier == 0 ? 1 : g->residual_multiplier;

  OK(pylora_embedding_forward(ids, m, g->embedding, &x));
  if (a && a->embedding) {
    const pylora_lora *l = a->embedding;
    const pylora_mat h = mat_of(0, m, l->r);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < l->r; j++) *el(&h, i, j) = l->s * l->A[j * l->lda + ids[i]];
    const size_t n = pylora_lora_workspace(m, HIDDEN, l->r, 0);
    OK(pylora_lora_forward(&h, a->embedding_B, NULL, NULL, &x, &x, NULL, bytes_of(n), n));
    for (int64_t i = 0; i < m * HIDDEN; i++) x.p[i] += a->embedding_bias[i % HIDDEN];
  }
  for (int64_t i = 0; g->embedding_multiplier != 0 && i < m * HIDDEN; i++)
    x.p[i] *= g->embedding_multiplier;
  if (g->positions) {
    OK(pylora_embedding_forward(position, m, g->positions, &out));
    plus(&x, &out, 1);
  }
  for (int i = 0; i < LAYERS; i++) {
    const pylora_layer *l = &w->layer[i];
    const int64_t last = l->module + (g->fused_qkv ? 1 : 3);
    normed_to(&l->input_norm, &x, &normed);
    split(w, l, &normed, a, &raw_q, &raw_k, &v);
    turned(w, l, &l->q_norm, &raw_q, position, &q);
    turned(w, l, &l->k_norm, &raw_k, position, &k);
    pylora_attn attn = g->attn;
    attn.window = l->window;
    if (l->scale != 0) attn.scale = l->scale;
    const size_t n = pylora_attention_workspace(&seqs, &attn);
    OK(pylora_attention_forward(&q, &k, &v, &seqs, &attn, &o, &lse, bytes_of(n), n));
    one_linear(w, &o, (int)last, a, l->bias[last - l->module], NULL, &out);
    if (l->after_attention.w) normed_to(&l->after_attention, &out, &out);
    if (!g->parallel) plus(&x, &out, s);
    if (!g->parallel || l->mid_norm.w) normed_to(&l->mid_norm, &x, &normed);
    (l->experts ? mixture : feed_forward)(w, l, last + 1, &normed, a, &inner);
    if (l->after_mlp.w) normed_to(&l->after_mlp, &inner, &inner);
    if (g->parallel) plus(&x, &out, s);
    plus(&x, &inner, s);
  }
  normed_to(&g->norm, &x, &normed);
  *last = mat_of(0, m, HIDDEN); /* the same, not rounded to the type that products take */
  normed_to(&g->norm, &x, last);
  const pylora_mat logits = mat_of(0, m, VOCAB);
  one_linear(w, &normed, w->table - 1, a, NULL, NULL, &logits);
  OK(pylora_soft_cap_forward(&logits, g->logit_multiplier == 0 ? 1 : g->logit_multiplier,
                             g->logit_softcap, &logits));
  return logits;
}

/* ---- steps ---- */

static int run_step(const world *w, const pylora_step *s, const pylora_mat *logits) {
  const size_t n = pylora_decoder_workspace(&w->model, s); /* exactly: a sanitizer sees more */
  EXPECT(n > 0);
  return pylora_decoder_forward(&w->model, &w->kv, s, logits, bytes_of(n), n);
}

/* Sequences of several lengths, each with an adapter (or the base), are put in chunk by chunk, in a
 * batch with the others; each chunk's logits must be those of the whole sequence by hand. */
static void chunks(world *w, int unpacked) {
  static int64_t text[SEQUENCES][LONGEST];
  int64_t length[SEQUENCES], done[SEQUENCES] = {0};
  pylora_mat want[SEQUENCES], last[SEQUENCES];
  const pylora_adapter *adapter[SEQUENCES];
  const pylora_adapter *table = unpacked ? w->unpacked : w->adapter;
  for (int i = 0; i < SEQUENCES; i++) {
    length[i] = 1 + below(LONGEST);
    for (int j = 0; j < LONGEST; j++) text[i][j] = below(VOCAB);
    const int64_t a = i && below(3) == 0 ? -2 : below(ADAPTERS + 1) - 1;
    adapter[i] = a == -2 ? adapter[i - 1] : a == -1 ? NULL : &table[a];
    const pylora_adapter *plain = adapter[i] ? &w->unpacked[adapter[i] - table] : NULL;
    want[i] = by_hand(w, text[i], length[i], plain, &last[i]);
  }
  for (int round = 0; round < 50; round++) {
    int64_t ids[SEQUENCES * LONGEST], position[SEQUENCES * LONGEST], row[SEQUENCES * LONGEST];
    int64_t q_start[SEQUENCES + 1] = {0}, k_start[SEQUENCES], k_len[SEQUENCES],
                                seg[SEQUENCES + 1] = {0};
    int64_t output[SEQUENCES * LONGEST], from[SEQUENCES * LONGEST], m = 0, n = 0, outputs = 0;
    const pylora_adapter *of[SEQUENCES];
    int who[SEQUENCES * LONGEST];
    for (int i = 0; i < SEQUENCES; i++) {
      const int64_t left = length[i] - done[i];
      if (left == 0 || (below(4) == 0 && round < 40)) continue;
      if (unpacked && n) continue; /* one segment at a time */
      const int64_t some = 1 + below(left);
      for (int64_t j = 0; j < some; j++, m++) {
        ids[m] = text[i][done[i] + j], position[m] = done[i] + j;
        row[m] = i * (ROWS / SEQUENCES) + done[i] + j;
        if (j + 1 == some || below(2))
          output[outputs] = m, from[outputs] = done[i] + j, who[outputs++] = i;
      }
      done[i] += some;
      k_start[n] = i * (ROWS / SEQUENCES), k_len[n] = done[i];
      of[n++] = adapter[i];
      q_start[n] = seg[n] = m;
    }
    const pylora_seqs seqs = {n, q_start, k_start, k_len};
    const pylora_mat normed = matrix(outputs, HIDDEN, 0);
    const pylora_step s = {
        m,       ids,    position, row, &seqs, n, unpacked || n == 0 ? NULL : seg, n ? of : NULL,
        outputs, output, &normed};
    const pylora_mat logits = matrix(outputs, VOCAB, 0);
    if (n) OK(run_step(w, &s, &logits));
    for (int64_t i = 0; i < outputs; i++) {
      const pylora_mat got = row_of(&logits, i), exact = row_of(&want[who[i]], from[i]);
      expect_same("logits", &got, &exact);
      const pylora_mat hidden = row_of(&normed, i), behind = row_of(&last[who[i]], from[i]);
      expect_same("normed", &hidden, &behind);
    }
  }
  for (int i = 0; i < SEQUENCES; i++) EXPECT(done[i] == length[i]);
}

static const int dtypes[] = {PYLORA_F32,  PYLORA_BF16,    PYLORA_Q8_0,   PYLORA_Q4_0,
                             PYLORA_Q4_1, PYLORA_Q8_0_A8, PYLORA_Q4_1_A8};

static void steps(void) {
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
    for (int c = 0; c < 8; c++) {
      const int unpacked = c % 2;
      snprintf(context, sizeof context, "%s, dtype %d, structure %d", pylora_isa(), dtypes[i], c);
      static world w;
      make_world(&w, dtypes[i], c < 2);
      chunks(&w, unpacked);
      release();
    }
}

/* ---- what is refused ---- */

static void refused(void) {
  static world w;
  make_world(&w, PYLORA_F32, 1);
  int64_t ids[] = {1, 2, 3}, position[] = {0, 1, 0}, row[] = {0, 1, 16}, output[] = {1, 2};
  int64_t q_start[] = {0, 2, 3}, k_start[] = {0, 16}, k_len[] = {2, 1}, seg[] = {0, 2, 3};
  const pylora_seqs seqs = {2, q_start, k_start, k_len};
  const pylora_adapter *of[] = {&w.adapter[0], NULL};
  const pylora_step good = {3, ids, position, row, &seqs, 2, seg, of, 2, output, NULL};
  const pylora_mat logits = matrix(2, VOCAB, 0);
  OK(run_step(&w, &good, &logits));
  const size_t n = pylora_decoder_workspace(&w.model, &good);
  void *ws = bytes_of(n);
#define REFUSES(status, s) \
  EXPECT_STATUS(status, pylora_decoder_forward(&w.model, &w.kv, s, &logits, ws, n))
#define WITH(status, change) \
  do {                       \
    pylora_step bad = good;  \
    change;                  \
    REFUSES(status, &bad);   \
  } while (0)
  REFUSES(PYLORA_E_NULL, NULL);
  WITH(PYLORA_E_NULL, bad.ids = NULL);
  WITH(PYLORA_E_NULL, bad.position = NULL);
  WITH(PYLORA_E_NULL, bad.kv_row = NULL);
  WITH(PYLORA_E_NULL, bad.seqs = NULL);
  WITH(PYLORA_E_NULL, bad.output = NULL);
  WITH(PYLORA_E_SHAPE, bad.normed = &logits);
  WITH(PYLORA_E_SHAPE, bad.m = -1);
  WITH(PYLORA_E_SHAPE, (bad.m = 2, bad.outputs = 1));
  WITH(PYLORA_E_SHAPE, bad.seg_start = NULL);
  WITH(PYLORA_E_SHAPE, bad.segments = 0);
  WITH(PYLORA_E_SHAPE, bad.segments = 1);
  const pylora_adapter *loose[] = {&w.unpacked[0], NULL};
  WITH(PYLORA_E_VALUE, bad.adapter = loose); /* segments need packed adapters */
#define SWAPPED(status, array, value) \
  do {                                \
    const int64_t kept = array;       \
    array = value;                    \
    REFUSES(status, &good);           \
    array = kept;                     \
  } while (0)
  SWAPPED(PYLORA_E_INDEX, ids[2], VOCAB);
  SWAPPED(PYLORA_E_INDEX, ids[0], -1);
  SWAPPED(PYLORA_E_INDEX, position[0], LONGEST);
  SWAPPED(PYLORA_E_INDEX, position[0], -1);
  SWAPPED(PYLORA_E_INDEX, row[2], ROWS);
  SWAPPED(PYLORA_E_INDEX, row[0], -1);
  SWAPPED(PYLORA_E_INDEX, output[1], 3);
  SWAPPED(PYLORA_E_INDEX, output[0], -1);
  SWAPPED(PYLORA_E_SHAPE, output[0], 2 + (output[1] = 1) - 1);
  output[1] = 2;
  SWAPPED(PYLORA_E_SHAPE, seg[1], 4);
  SWAPPED(PYLORA_E_SHAPE, seg[0], 1);
  SWAPPED(PYLORA_E_INDEX, k_start[1], ROWS);
  SWAPPED(PYLORA_E_SHAPE, k_len[0], 1);
  EXPECT_STATUS(PYLORA_E_NULL, pylora_decoder_forward(&w.model, &w.kv, &good, &logits, NULL, 0));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_decoder_forward(&w.model, NULL, &good, &logits, ws, n));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_decoder_forward(NULL, &w.kv, &good, &logits, ws, n));
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_decoder_forward(&w.model, &w.kv, &good, &logits, ws, n / 100));
  const pylora_mat narrow = matrix(2, VOCAB - 1, 0);
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_decoder_forward(&w.model, &w.kv, &good, &narrow, ws, n));
  world half; /* a bf16 cache for a float32 model */
  half.k[0] = half.k[1] = half.v[0] = half.v[1] = mat_of(1, ROWS, KV_HEADS * D);
  const pylora_kv kv = {half.k, half.v};
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_decoder_forward(&w.model, &kv, &good, &logits, ws, n));
#define MODEL(status, field, value)      \
  do {                                   \
    const pylora_decoder kept = w.model; \
    w.model.field = value;               \
    REFUSES(status, &good);              \
    w.model = kept;                      \
  } while (0)
#define LAYER(status, field, value)       \
  do {                                    \
    const pylora_layer kept = w.layer[1]; \
    w.layer[1].field = value;             \
    REFUSES(status, &good);               \
    w.layer[1] = kept;                    \
  } while (0)
  MODEL(PYLORA_E_VALUE, activation, 4);
  MODEL(PYLORA_E_VALUE, activation, -1);
  MODEL(PYLORA_E_VALUE, fused_qkv, 3);
  MODEL(PYLORA_E_VALUE, logit_softcap, -1);
  MODEL(PYLORA_E_VALUE, logit_softcap, NAN);
  MODEL(PYLORA_E_VALUE, norm.kind, 2);
  MODEL(PYLORA_E_NULL, norm.w, NULL);
  MODEL(PYLORA_E_NULL, rope, NULL);
  MODEL(PYLORA_E_VALUE, ropes, 0);
  MODEL(PYLORA_E_SHAPE, attn.kv_heads, 3);
  MODEL(PYLORA_E_VALUE, attn.scale, 0);
  MODEL(PYLORA_E_UNSUPPORTED, activations, PYLORA_Q8_0);
  MODEL(PYLORA_E_SHAPE, ungated, 1); /* then `up` stands where `down` should */
  MODEL(PYLORA_E_SHAPE, positions, &w.W[PYLORA_DOWN]);
  LAYER(PYLORA_E_VALUE, rope, 2);
  LAYER(PYLORA_E_VALUE, rope, -2);
  LAYER(PYLORA_E_VALUE, module, 6);
  LAYER(PYLORA_E_VALUE, window, -1);
  LAYER(PYLORA_E_VALUE, norm_of, 3);
  LAYER(PYLORA_E_VALUE, scale, -1);
  LAYER(PYLORA_E_VALUE, mid_norm.kind, 7);
  LAYER(PYLORA_E_NULL, W, NULL);
  pylora_experts none = {&w.router, 0, 1, 0};
  LAYER(PYLORA_E_VALUE, experts, &none);
  const pylora_packed *up = w.at[7 + PYLORA_UP];
  w.at[7 + PYLORA_UP] = w.at[7 + PYLORA_Q];
  REFUSES(PYLORA_E_SHAPE, &good);
  EXPECT(pylora_decoder_workspace(&w.model, &good) == 0);
  w.at[7 + PYLORA_UP] = NULL;
  REFUSES(PYLORA_E_NULL, &good);
  w.at[7 + PYLORA_UP] = up;
  OK(run_step(&w, &good, &logits));
  release();
}

int main(void) {
  each_setup(steps);
  refused();
  return finish("decoder");
}
