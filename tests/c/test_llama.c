/* A whole model in one call: the bits of the single operations on whole sequences, whatever the batch,
 * the cache, the segments and the threads; and what it refuses. */
#include "check.h"

enum { LAYERS = 2, MODULES = PYLORA_LAYER_MODULES, TABLE = LAYERS * MODULES + 1, ADAPTERS = 4 };
enum { HIDDEN = 64, HEADS = 4, KV_HEADS = 2, D = 16, INNER = 96, VOCAB = 70, ROWS = 64 };
enum { SEQUENCES = 4, LONGEST = 11 };

typedef struct world {
  pylora_llama model;
  pylora_layer layer[LAYERS];
  pylora_packed W[TABLE + 1]; /* the layers' modules, the head, the embedding */
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
    for (int i = 0; i < TABLE; i++) {
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
    for (int i = 0; i < TABLE; i += 2) w->bias[a][i] = floats(w->W[i].d, 0.5f);
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

static void make_world(world *w, int dtype) {
  w->dtype = dtype, w->act = dtype == PYLORA_BF16;
  const int64_t q = HEADS * D, kv = KV_HEADS * D;
  const int64_t d[] = {q, kv, kv, HIDDEN, INNER, INNER, HIDDEN};
  const int64_t k[] = {HIDDEN, HIDDEN, HIDDEN, q, HIDDEN, HIDDEN, INNER};
  const int qk_norm = (int)below(2);
  for (int i = 0; i < LAYERS; i++) {
    w->layer[i] = (pylora_layer){.input_norm = floats(HIDDEN, 1), .mid_norm = floats(HIDDEN, 1)};
    if (qk_norm) w->layer[i].q_norm = floats(D, 1), w->layer[i].k_norm = floats(D, 1);
    w->layer[i].window = i ? 5 : 0;
    for (int j = 0; j < MODULES; j++) {
      w->W[i * MODULES + j] = weight(dtype, d[j], k[j]);
      w->layer[i].W[j] = &w->W[i * MODULES + j];
      w->layer[i].bias[j] = j < 3 ? floats(d[j], 0.5f) : NULL;
    }
  }
  w->W[TABLE - 1] = weight(dtype, VOCAB, HIDDEN);
  w->W[TABLE] = weight(dtype, VOCAB, HIDDEN);
  w->model = (pylora_llama){
      .layers = LAYERS,
      .activations = w->act ? PYLORA_BF16 : PYLORA_F32,
      .attn = {HEADS, KV_HEADS, D, 0, 0.25f},
      .eps = 1e-5f,
      .rope_layout = PYLORA_ROPE_HALF,
      .cosines = matrix(LONGEST, D / 2, 1),
      .sines = matrix(LONGEST, D / 2, 1),
      .embedding = &w->W[TABLE],
      .head = &w->W[TABLE - 1],
      .norm = floats(HIDDEN, 1),
      .layer = w->layer,
  };
  for (int i = 0; i < LAYERS; i++)
    w->k[i] = mat_of(w->act, ROWS, kv), w->v[i] = mat_of(w->act, ROWS, kv);
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

static pylora_mat by_hand(const world *w, const int64_t *ids, int64_t m, const pylora_adapter *a) {
  const pylora_llama *g = &w->model;
  const int act = w->act;
  const pylora_mat x = mat_of(0, m, HIDDEN), normed = mat_of(act, m, HIDDEN);
  const pylora_mat raw_q = mat_of(0, m, HEADS * D), raw_k = mat_of(0, m, KV_HEADS * D);
  const pylora_mat q = mat_of(act, m, HEADS * D), k = mat_of(act, m, KV_HEADS * D),
                   v = mat_of(act, m, KV_HEADS * D), o = mat_of(act, m, HEADS * D);
  const pylora_mat gate = mat_of(act, m, INNER), up = mat_of(act, m, INNER),
                   lse = mat_of(0, m, HEADS);
  float *rstd = floats(m * HEADS, 0);
  int64_t *position = ids_below(m, 1);
  for (int64_t i = 0; i < m; i++) position[i] = i;
  const int64_t start[] = {0, m};
  const pylora_seqs seqs = {1, start, NULL, NULL};

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
  for (int i = 0; i < LAYERS; i++) {
    const pylora_layer *l = &w->layer[i];
    const int first = i * MODULES;
    OK(pylora_rms_norm_forward(&x, l->input_norm, g->eps, &normed, rstd));
    one_linear(w, &normed, first + PYLORA_Q, a, l->bias[PYLORA_Q], NULL, &raw_q);
    one_linear(w, &normed, first + PYLORA_K, a, l->bias[PYLORA_K], NULL, &raw_k);
    one_linear(w, &normed, first + PYLORA_V, a, l->bias[PYLORA_V], NULL, &v);
    if (l->q_norm) {
      const pylora_mat qh = {raw_q.p, m * HEADS, D, D, NULL, NULL};
      const pylora_mat kh = {raw_k.p, m * KV_HEADS, D, D, NULL, NULL};
      OK(pylora_rms_norm_forward(&qh, l->q_norm, g->eps, &qh, rstd));
      OK(pylora_rms_norm_forward(&kh, l->k_norm, g->eps, &kh, rstd));
    }
    OK(pylora_rope(&raw_q, &g->cosines, &g->sines, position, D, PYLORA_ROPE_HALF, 0, &q));
    OK(pylora_rope(&raw_k, &g->cosines, &g->sines, position, D, PYLORA_ROPE_HALF, 0, &k));
    pylora_attn attn = g->attn;
    attn.window = l->window;
    const size_t n = pylora_attention_workspace(&seqs, &attn);
    OK(pylora_attention_forward(&q, &k, &v, &seqs, &attn, &o, &lse, bytes_of(n), n));
    one_linear(w, &o, first + PYLORA_O, a, l->bias[PYLORA_O], &x, &x);
    OK(pylora_rms_norm_forward(&x, l->mid_norm, g->eps, &normed, rstd));
    one_linear(w, &normed, first + PYLORA_GATE, a, l->bias[PYLORA_GATE], NULL, &gate);
    one_linear(w, &normed, first + PYLORA_UP, a, l->bias[PYLORA_UP], NULL, &up);
    OK(pylora_swiglu_forward(&gate, &up, &gate));
    one_linear(w, &gate, first + PYLORA_DOWN, a, l->bias[PYLORA_DOWN], &x, &x);
  }
  OK(pylora_rms_norm_forward(&x, g->norm, g->eps, &normed, rstd));
  const pylora_mat logits = mat_of(0, m, VOCAB);
  one_linear(w, &normed, TABLE - 1, a, NULL, NULL, &logits);
  return logits;
}

/* ---- steps ---- */

static int run_step(const world *w, const pylora_step *s, const pylora_mat *logits) {
  const size_t n = pylora_llama_workspace(&w->model, s); /* exactly: a sanitizer sees more */
  EXPECT(n > 0);
  return pylora_llama_forward(&w->model, &w->kv, s, logits, bytes_of(n), n);
}

/* Sequences of several lengths, each with an adapter (or the base), are put in chunk by chunk, in a
 * batch with the others; each chunk's logits must be those of the whole sequence by hand. */
static void chunks(world *w, int unpacked) {
  static int64_t text[SEQUENCES][LONGEST];
  int64_t length[SEQUENCES], done[SEQUENCES] = {0};
  pylora_mat want[SEQUENCES];
  const pylora_adapter *adapter[SEQUENCES];
  const pylora_adapter *table = unpacked ? w->unpacked : w->adapter;
  for (int i = 0; i < SEQUENCES; i++) {
    length[i] = 1 + below(LONGEST);
    for (int j = 0; j < LONGEST; j++) text[i][j] = below(VOCAB);
    const int64_t a = i && below(3) == 0 ? -2 : below(ADAPTERS + 1) - 1;
    adapter[i] = a == -2 ? adapter[i - 1] : a == -1 ? NULL : &table[a];
    const pylora_adapter *plain = adapter[i] ? &w->unpacked[adapter[i] - table] : NULL;
    want[i] = by_hand(w, text[i], length[i], plain);
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
    const pylora_step s = {
        m,       ids,   position, row, &seqs, n, unpacked || n == 0 ? NULL : seg, n ? of : NULL,
        outputs, output};
    const pylora_mat logits = matrix(outputs, VOCAB, 0);
    if (n) OK(run_step(w, &s, &logits));
    for (int64_t i = 0; i < outputs; i++) {
      const pylora_mat got = row_of(&logits, i), exact = row_of(&want[who[i]], from[i]);
      expect_same("logits", &got, &exact);
    }
  }
  for (int i = 0; i < SEQUENCES; i++) EXPECT(done[i] == length[i]);
}

static const int dtypes[] = {PYLORA_F32, PYLORA_BF16, PYLORA_Q8_0, PYLORA_Q4_0, PYLORA_Q4_1};

static void steps(void) {
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
    for (int unpacked = 0; unpacked < 2; unpacked++) {
      snprintf(context, sizeof context, "%s, dtype %d, unpacked %d", pylora_isa(), dtypes[i],
               unpacked);
      world w;
      make_world(&w, dtypes[i]);
      chunks(&w, unpacked);
      release();
    }
}

/* ---- what is refused ---- */

static void refused(void) {
  static world w;
  make_world(&w, PYLORA_F32);
  int64_t ids[] = {1, 2, 3}, position[] = {0, 1, 0}, row[] = {0, 1, 16}, output[] = {1, 2};
  int64_t q_start[] = {0, 2, 3}, k_start[] = {0, 16}, k_len[] = {2, 1}, seg[] = {0, 2, 3};
  const pylora_seqs seqs = {2, q_start, k_start, k_len};
  const pylora_adapter *of[] = {&w.adapter[0], NULL};
  const pylora_step good = {3, ids, position, row, &seqs, 2, seg, of, 2, output};
  const pylora_mat logits = matrix(2, VOCAB, 0);
  OK(run_step(&w, &good, &logits));
  const size_t n = pylora_llama_workspace(&w.model, &good);
  void *ws = bytes_of(n);
#define REFUSES(status, s) \
  EXPECT_STATUS(status, pylora_llama_forward(&w.model, &w.kv, s, &logits, ws, n))
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
  EXPECT_STATUS(PYLORA_E_NULL, pylora_llama_forward(&w.model, &w.kv, &good, &logits, NULL, 0));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_llama_forward(&w.model, NULL, &good, &logits, ws, n));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_llama_forward(NULL, &w.kv, &good, &logits, ws, n));
  EXPECT_STATUS(PYLORA_E_WORKSPACE,
                pylora_llama_forward(&w.model, &w.kv, &good, &logits, ws, n / 100));
  const pylora_mat narrow = matrix(2, VOCAB - 1, 0);
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_llama_forward(&w.model, &w.kv, &good, &narrow, ws, n));
  world half; /* a bf16 cache for a float32 model */
  half.k[0] = half.k[1] = half.v[0] = half.v[1] = mat_of(1, ROWS, KV_HEADS * D);
  const pylora_kv kv = {half.k, half.v};
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_llama_forward(&w.model, &kv, &good, &logits, ws, n));
  w.layer[1].W[PYLORA_UP] = w.layer[1].W[PYLORA_Q];
  REFUSES(PYLORA_E_SHAPE, &good);
  EXPECT(pylora_llama_workspace(&w.model, &good) == 0);
  w.layer[1].W[PYLORA_UP] = NULL;
  REFUSES(PYLORA_E_NULL, &good);
  release();
}

int main(void) {
  each_setup(steps);
  refused();
  return finish("llama");
}
