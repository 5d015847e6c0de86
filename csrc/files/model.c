/* model.c - a model out of its files: every tensor that the settings ask for, packed; no tensor left over. */
#include <math.h>
#include <stdio.h>

#include "files/model.h"

typedef struct loader {
  pylora_model *m;
  int precision;
  int64_t used; /* tensors of the files that were asked for */
  pylora_message *why;
} loader;

#define SAY(status, ...) return pylora_fail(l->why, status, __VA_ARGS__)

/* Memory that the model gives back when it is closed. */
static void *keep(loader *l, size_t bytes) {
  void *p = pylora_take_aligned(bytes ? bytes : 1);
  if (p) l->m->aligned[l->m->aligned_count++] = p;
  return p;
}

/* The tensor of this name and shape (cols = 0: a vector). */
static int find(loader *l, const char *name, int64_t rows, int64_t cols,
                const pylora_tensor **out) {
  const pylora_model *m = l->m;
  const pylora_tensor *t = *out = pylora_model_tensor(&m->files, name);
  if (!t)
    SAY(PYLORA_E_FILE, "%.300s: there is no tensor '%s', which a %s model with %lld layers has",
        m->path, name, pylora_families[m->s.family].name, (long long)m->s.layers);
  const int64_t shape[2] = {rows, cols};
  const int dims = cols ? 2 : 1;
  if (t->dims != dims || t->shape[0] != rows || (cols && t->shape[1] != cols))
    SAY(PYLORA_E_FILE, "%.300s: tensor '%.200s' has the shape %s, but the configuration implies %s",
        m->path, t->name, pylora_shape(t->dims, t->shape).text, pylora_shape(dims, shape).text);
  if (!pylora_is_float(t) && (!m->files.gguf || !cols))
    SAY(PYLORA_E_UNSUPPORTED, "%.300s: tensor '%.200s' is %s; only F32, F16 and BF16 are supported",
        m->path, t->name, t->type);
  l->used++;
  return PYLORA_OK;
}

/* The mapped file that a tensor is in. */
static const pylora_map *map_of(const loader *l, const pylora_tensor *t) {
  const uint8_t *p = t->data;
  for (int64_t i = 0; i < l->m->files.files; i++) {
    const pylora_map *map = &l->m->files.file[i]->map;
    if (p >= map->bytes && p < map->bytes + map->size) return map;
  }
  return NULL;
}

static int matrix(loader *l, const char *name, int64_t d, int64_t k, int64_t heads,
                  pylora_packed *out) {
  const pylora_tensor *t;
  TRY(find(l, name, d, k, &t));
  const int dtype = pylora_tensor_dtype(t, l->precision);
  const size_t bytes = pylora_pack_bytes(dtype, d, k);
  void *buffer = bytes ? keep(l, bytes) : NULL;
  if (bytes && !buffer) return pylora_no_memory(l->why, l->m->path, (double)bytes);
  if (!bytes)
    SAY(PYLORA_E_UNSUPPORTED,
        "%.300s: tensor '%.200s' of shape %s cannot be stored in this precision: quantized weights "
        "have groups of 32 inputs, or of 256; use float32 or bfloat16",
        l->m->path, t->name, pylora_shape(2, t->shape).text);
  l->m->about.weight_bytes += (int64_t)bytes;
  return pylora_prefix(l->why, l->m->path,
                       pylora_tensor_pack_from(map_of(l, t), t, dtype, heads, buffer, out, l->why));
}

/* A vector [n], of q's and k's biases in Hugging Face's order. */
static int vector(loader *l, const char *name, int64_t n, int64_t heads, const float **out) {
  const pylora_tensor *t;
  TRY(find(l, name, n, 0, &t));
  float *to = keep(l, (size_t)n * sizeof *to), *from = heads ? pylora_take((size_t)n, 4) : to;
  if (!to || !from) return pylora_no_memory(l->why, l->m->path, (double)n * 4);
  pylora_kind_of(t->kind)->decode(t->data, n, from);
  if (heads) {
    for (int64_t i = 0; i < n; i++) to[i] = from[pylora_source_row(n, heads, i)];
    free(from);
  }
  *out = to;
  return PYLORA_OK;
}

/* A norm; llama.cpp's files of a family that multiplies by 1 + w hold the sum, rounded once. */
static int norm(loader *l, const char *name, int64_t n, pylora_norm *out) {
  const float *w = NULL;
  TRY(vector(l, name, n, 0, &w));
  float *own = (float *)(uintptr_t)w;
  for (int64_t i = 0; pylora_families[l->m->s.family].offset && i < n; i++) {
    const float less = l->m->files.gguf ? own[i] - 1.0f : own[i];
    own[i] = less + 1.0f;
  }
  *out = (pylora_norm){.w = w, .eps = (float)l->m->s.eps};
  return PYLORA_OK;
}

/* What the files call a norm of layer i; 0: the family has none. */
static int norm_name(const pylora_model *m, long long i, int which, char out[PYLORA_NAME]) {
  const char *hf = pylora_norm_suffix(m->s.family, which);
  if (!hf) return 0;
  if (m->files.gguf)
    snprintf(out, PYLORA_NAME, "blk.%lld.%s.weight", i, pylora_norm_stem(m->s.family, which));
  else
    snprintf(out, PYLORA_NAME, "model.layers.%lld.%s.weight", i, hf);
  return 1;
}

static int layer(loader *l, int64_t i) {
  pylora_model *m = l->m;
  pylora_layer *out = &m->layer[i];
  char name[PYLORA_NAME];
#define NAMED(...) (snprintf(name, sizeof name, __VA_ARGS__), name)
  const long long n = i;
  const int whole = pylora_families[m->s.family].qk_norm == OF_ALL;
  pylora_norm *norms[NORMS] = {&out->input_norm, &out->mid_norm, &out->after_attention,
                               &out->after_mlp,  &out->q_norm,   &out->k_norm};
  const int64_t D = m->s.head_dim, size[NORMS] = {m->s.hidden,
                                                  m->s.hidden,
                                                  m->s.hidden,
                                                  m->s.hidden,
                                                  whole ? m->s.heads * D : D,
                                                  whole ? m->s.kv_heads * D : D};
  for (int j = 0; j < NORMS; j++)
    if (norm_name(m, n, j, name)) TRY(norm(l, name, size[j], norms[j]));
  out->norm_of = whole ? PYLORA_NORM_WHOLE : PYLORA_NORM_SHARED;
  out->module = MODULES * i;
  out->W = m->W + MODULES * i, out->bias = m->bias + MODULES * i;
  for (int j = 0; j < MODULES; j++) {
    int64_t d, k;
    int bias;
    pylora_module_size(&m->s, MODULES * i + j, &d, &k, &bias);
    const int64_t heads = pylora_module_heads(&m->s, MODULES * i + j);
    pylora_packed *W = &m->packed[MODULES * i + j];
    TRY(matrix(l, NAMED("model.layers.%lld.%s.weight", n, pylora_module_suffix[j]), d, k, heads,
               W));
    m->W[MODULES * i + j] = W;
    if (bias)
      TRY(vector(l, NAMED("model.layers.%lld.%s.bias", n, pylora_module_suffix[j]), d, heads,
                 &m->bias[MODULES * i + j]));
  }
#undef NAMED
  out->window = (int32_t)(m->s.local[i] ? m->s.window : 0);
  out->rope = m->s.rope[i];
  return PYLORA_OK;
}

/* ---- tensors that are left over ---- */

static int ends(const char *text, const char *end) {
  const size_t n = strlen(text), k = strlen(end);
  return n >= k && strcmp(text + n - k, end) == 0;
}

/* What a converter leaves beside the weights: tables of angles. */
static int carries_nothing(const pylora_files *files, const char *name) {
  if (!files->gguf) return ends(name, ".rotary_emb.inv_freq");
  return strcmp(name, "rope_freqs.weight") == 0 ||
         (strncmp(name, "blk.", 4) == 0 && ends(name, ".attn_rot_embd"));
}

/* A stored copy of a tied head may be left out only if it is the embedding. */
static int tied_copy(loader *l, const pylora_tensor *t) {
  const pylora_tensor *e = pylora_model_tensor(&l->m->files, "model.embed_tokens.weight");
  if (t->kind != e->kind || t->bytes != e->bytes || memcmp(t->data, e->data, (size_t)t->bytes) != 0)
    SAY(PYLORA_E_FILE,
        "%.300s: config.json says tie_word_embeddings, but '%s' is stored and differs from "
        "'%s'; one of the two is wrong",
        l->m->path, t->name, e->name);
  return PYLORA_OK;
}

/* Whether the settings ask for this tensor. */
static int expected(const pylora_model *m, const char *name, char *buffer) {
  const char *tops[] = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"};
  for (size_t i = 0; i < (m->s.tied ? 2u : 3u); i++) {
    if (m->files.gguf) pylora_gguf_name(tops[i], buffer);
    if (strcmp(name, m->files.gguf ? buffer : tops[i]) == 0) return 1;
  }
  int number = -1, used = 0;
  const char *frame = m->files.gguf ? "blk.%5d.%n" : "model.layers.%5d.%n";
  if (sscanf(name, frame, &number, &used) != 1 || !used || number < 0 || number >= m->s.layers)
    return 0;
  for (int j = 0; j < NORMS; j++)
    if (norm_name(m, number, j, buffer) && strcmp(name, buffer) == 0) return 1;
  for (int j = 0; j < MODULES; j++) {
    int64_t d, k;
    int bias = 0;
    pylora_module_size(&m->s, j, &d, &k, &bias);
    for (int b = 0; b <= bias; b++) {
      char hf[PYLORA_NAME];
      snprintf(hf, sizeof hf, "model.layers.%d.%s.%s", number, pylora_module_suffix[j],
               b ? "bias" : "weight");
      if (m->files.gguf) pylora_gguf_name(hf, buffer);
      if (strcmp(name, m->files.gguf ? buffer : hf) == 0) return 1;
    }
  }
  return 0;
}

static int nothing_left(loader *l) {
  const pylora_files *files = &l->m->files;
  char buffer[PYLORA_NAME];
  for (int64_t f = 0; f < files->files; f++)
    for (int64_t i = 0; i < files->file[f]->tensors; i++) {
      const pylora_tensor *t = &files->file[f]->tensor[i];
      if (carries_nothing(files, t->name) || expected(l->m, t->name, buffer)) continue;
      if (!files->gguf && l->m->s.tied && strcmp(t->name, "lm_head.weight") == 0) {
        TRY(tied_copy(l, t));
        continue;
      }
      SAY(PYLORA_E_FILE,
          "%.300s: tensor '%.200s' is none of a %s model with %lld layers; nothing is left out in "
          "silence",
          files->file[f]->name, t->name, pylora_families[l->m->s.family].name,
          (long long)l->m->s.layers);
    }
  return PYLORA_OK;
}

/* ---- all of it ---- */

static int name_modules(loader *l) {
  pylora_model *m = l->m;
  const int64_t n = pylora_module_count(m);
  m->names = pylora_take((size_t)n, PYLORA_NAME);
  if (!m->names) return pylora_no_memory(l->why, m->path, (double)n * PYLORA_NAME);
  for (int64_t i = 0; i < n; i++) {
    char *to = m->names + i * PYLORA_NAME;
    if (i < n - 2)
      snprintf(to, PYLORA_NAME, "model.layers.%lld.%s", (long long)(i / MODULES),
               pylora_module_suffix[i % MODULES]);
    else
      snprintf(to, PYLORA_NAME, "%s", i == n - 1 ? "model.embed_tokens" : "lm_head");
  }
  return PYLORA_OK;
}

static void describe(pylora_model *m, int precision) {
  const pylora_settings *s = &m->s;
  pylora_about *a = &m->about;
  a->family = pylora_families[s->family].name;
  a->vocab = s->vocab, a->hidden = s->hidden, a->inner = s->inner, a->positions = s->positions;
  a->layers = (int32_t)s->layers, a->heads = (int32_t)s->heads;
  a->kv_heads = (int32_t)s->kv_heads, a->head_dim = (int32_t)s->head_dim;
  a->precision = precision, a->tied = s->tied, a->bos = s->bos, a->eos_count = s->eos_count;
  memcpy(a->eos, s->eos, sizeof a->eos);
  m->decoder = (pylora_decoder){
      .layers = (int32_t)s->layers,
      .activations = precision == PYLORA_BF16 ? PYLORA_BF16 : PYLORA_F32,
      .attn = {(int32_t)s->heads, (int32_t)s->kv_heads, (int32_t)s->head_dim, 0,
               (float)(s->attention_scale == 0 ? pow((double)s->head_dim, -0.5)
                                               : s->attention_scale),
               (float)s->attention_softcap},
      .activation = pylora_families[s->family].gelu ? PYLORA_GELU_TANH : PYLORA_SILU,
      .embedding_multiplier = (float)s->embedding_multiplier,
      .residual_multiplier = (float)s->residual_multiplier,
      .logit_multiplier = (float)s->logit_multiplier,
      .logit_softcap = (float)s->logit_softcap,
      .ropes = 1 + s->two_ropes, /* a session has the tables */
      .layer = m->layer,
  };
}

static int load(loader *l) {
  pylora_model *m = l->m;
  int64_t tensors = 0;
  for (int64_t i = 0; i < m->files.files; i++) tensors += m->files.file[i]->tensors;
  if (m->s.layers > tensors) /* so that an absurd number costs nothing */
    SAY(PYLORA_E_FILE,
        "%.300s: the configuration says %lld layers, but there are only %lld tensors", m->path,
        (long long)m->s.layers, (long long)tensors);
  const size_t layers = (size_t)m->s.layers;
  m->layer = pylora_take(layers, sizeof *m->layer);
  m->packed = pylora_take(MODULES * layers + 2, sizeof *m->packed);
  m->W = pylora_take(MODULES * layers, sizeof *m->W);
  m->bias = pylora_take(MODULES * layers, sizeof *m->bias);
  m->aligned = pylora_take((2 * MODULES + NORMS) * layers + 3, sizeof *m->aligned);
  m->frequency = pylora_take((size_t)m->s.head_dim, sizeof *m->frequency);
  if (!m->layer || !m->packed || !m->W || !m->bias || !m->aligned || !m->frequency)
    return pylora_no_memory(l->why, m->path, (double)layers * sizeof *m->layer);
  describe(m, l->precision);
  TRY(name_modules(l));
  pylora_frequencies(&m->s, 0, m->frequency);
  if (m->s.two_ropes) pylora_frequencies(&m->s, 1, m->frequency + m->s.head_dim / 2);
  pylora_packed *embedding = &m->packed[MODULES * layers], *head = embedding + !m->s.tied;
  TRY(matrix(l, "model.embed_tokens.weight", m->s.vocab, m->s.hidden, 0, embedding));
  for (int64_t i = 0; i < m->s.layers; i++) TRY(layer(l, i));
  TRY(norm(l, "model.norm.weight", m->s.hidden, &m->decoder.norm));
  if (!m->s.tied) TRY(matrix(l, "lm_head.weight", m->s.vocab, m->s.hidden, 0, head));
  m->decoder.embedding = embedding, m->decoder.head = head;
  return nothing_left(l);
}

int pylora_model_open(const char *path, int precision, pylora_model **out, pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!path || !out) return pylora_fail(why, PYLORA_E_NULL, "no path was given");
  *out = NULL;
  if (precision == PYLORA_F32X3 && strcmp(pylora_isa(), "amx") != 0) precision = PYLORA_F32;
  if (precision != PYLORA_F32 && precision != PYLORA_F32X3 && precision != PYLORA_BF16 &&
      precision != PYLORA_Q8_0 && precision != PYLORA_Q4_1 && precision != PYLORA_Q8_0_A8 &&
      precision != PYLORA_Q4_1_A8)
    return pylora_fail(
        why, PYLORA_E_UNSUPPORTED,
        "a model's precision is PYLORA_F32, PYLORA_F32X3, PYLORA_BF16, PYLORA_Q8_0 or "
        "PYLORA_Q4_1, the last two with PYLORA_A8 or without, not %d",
        precision);
  pylora_model *m = pylora_take(1, sizeof *m);
  if (m) m->path = malloc(strlen(path) + 1);
  if (!m || !m->path) {
    free(m);
    return pylora_no_memory(why, path, sizeof *m);
  }
  memcpy(m->path, path, strlen(path) + 1);
  loader l = {m, precision, 0, why};
  int status = pylora_files_open(path, &m->files, &m->s, why);
  if (!status) status = load(&l);
  if (status)
    pylora_model_close(m);
  else
    *out = m;
  return status;
}

void pylora_model_close(pylora_model *m) {
  if (!m) return;
  for (int64_t i = 0; i < m->aligned_count; i++) pylora_give(m->aligned[i]);
  pylora_files_close(&m->files);
  free(m->aligned);
  free(m->layer);
  free(m->W);
  free(m->bias);
  free(m->packed);
  free(m->frequency);
  free(m->names);
  free(m->path);
  free(m);
}

const pylora_about *pylora_model_about(const pylora_model *m) { return m ? &m->about : NULL; }

const pylora_decoder *pylora_model_decoder(const pylora_model *m) { return m ? &m->decoder : NULL; }

const char *pylora_model_module(const pylora_model *m, int64_t number) {
  if (!m || number < 0 || number >= pylora_module_count(m)) return NULL;
  return m->names + number * PYLORA_NAME;
}
