/* load.c - the tensors of a model: found by their names, checked for their shapes, packed. */
#include <math.h>

#include "files/load.h"

/* Memory that the model gives back when it is closed. */
static void *keep(loader *l, size_t bytes) {
  void *p = pylora_take_aligned(bytes ? bytes : 1);
  if (p) l->m->aligned[l->m->aligned_count++] = p;
  return p;
}

/* The mapped file that a tensor is in, and its number among all tensors. */
static const pylora_map *map_of(const loader *l, const pylora_tensor *t, int64_t *number) {
  int64_t first = 0;
  for (int64_t i = 0; i < l->m->files.files; i++) {
    const pylora_file *file = l->m->files.file[i];
    const uintptr_t at = (uintptr_t)t, from = (uintptr_t)file->tensor;
    if (at >= from && at < from + (size_t)file->tensors * sizeof *t) {
      *number = first + (t - file->tensor);
      return &file->map;
    }
    first += file->tensors;
  }
  return NULL;
}

/* The wanted tensor, of this shape. */
int pylora_load_find(loader *l, const wanted *w, int dims, const int64_t *shape,
                     const pylora_tensor **out) {
  const pylora_model *m = l->m;
  const pylora_tensor *t = *out = pylora_model_tensor(m, w->role, w->layer, w->expert, w->ending);
  if (!t) {
    char name[PYLORA_NAME] = "";
    pylora_tensor_name(m->s.family, m->files.gguf, w->role, w->layer, w->expert, w->ending, name);
    SAY(PYLORA_E_FILE, "%.300s: there is no tensor '%s', which a %s model with %lld layers has",
        m->path, name, pylora_families[m->s.family].name, (long long)m->s.layers);
  }
  int same = t->dims == dims;
  for (int i = 0; i < dims && same; i++) same = t->shape[i] == shape[i];
  if (!same)
    SAY(PYLORA_E_FILE, "%.300s: tensor '%.200s' has the shape %s, but the configuration implies %s",
        m->path, t->name, pylora_shape(t->dims, t->shape).text, pylora_shape(dims, shape).text);
  if (!pylora_is_float(t) && (!m->files.gguf || dims < 2))
    SAY(PYLORA_E_UNSUPPORTED, "%.300s: tensor '%.200s' is %s; only F32, F16 and BF16 are supported",
        m->path, t->name, t->type);
  int64_t number = 0;
  map_of(l, t, &number);
  l->used[number] = 1;
  return PYLORA_OK;
}

/* Packs the matrix [d,k] that a tensor is: `part` of `parts` that it is a stack of. */
static int pack(loader *l, const pylora_tensor *t, const pylora_module *at, int dtype,
                int transposed, int64_t part, int64_t parts, pylora_packed *out) {
  const size_t bytes = pylora_pack_bytes(dtype, at->d, at->k);
  void *buffer = bytes ? keep(l, bytes) : NULL;
  if (bytes && !buffer) return pylora_no_memory(l->why, l->m->path, (double)bytes);
  if (!bytes)
    SAY(PYLORA_E_UNSUPPORTED,
        "%.300s: tensor '%.200s' of shape %s cannot be stored in this precision: quantized weights "
        "have groups of 32 inputs, or of 256; use float32 or bfloat16",
        l->m->path, t->name, pylora_shape(t->dims, t->shape).text);
  l->m->about.weight_bytes += (int64_t)bytes;
  int64_t number;
  const pylora_map *map = map_of(l, t, &number);
  pylora_tensor one = *t;
  if (t->dims == 3) { /* experts, each a matrix */
    one.dims = 2, one.shape[0] = t->shape[1], one.shape[1] = t->shape[2];
    one.bytes = t->bytes / parts;
    one.data = (const uint8_t *)t->data + part * one.bytes;
  }
  return pylora_prefix(
      l->why, l->m->path,
      pylora_tensor_pack_from(map, &one, dtype, at->heads, transposed, buffer, out, l->why));
}

/* The weight of a module. */
int pylora_load_matrix(loader *l, const pylora_module *at, pylora_packed *out) {
  const pylora_model *m = l->m;
  const int stacked = m->files.gguf && at->expert >= 0;
  const int transposed =
      !m->files.gguf && at->layer >= 0 && pylora_families[m->s.family].transposed;
  const int64_t shape[3] = {m->s.experts, at->d, at->k}, turned[2] = {at->k, at->d};
  const wanted w = {(pylora_role)at->role, at->layer, at->expert, ".weight"};
  const pylora_tensor *t;
  TRY(pylora_load_find(l, &w, stacked ? 3 : 2,
                       transposed ? turned
                       : stacked  ? shape
                                  : shape + 1,
                       &t));
  const int dtype = pylora_tensor_dtype(t, l->precision);
  return pack(l, t, at, dtype, transposed, at->expert, m->s.experts, out);
}

/* A matrix that is never rounded. */
int pylora_load_exact(loader *l, pylora_role role, int64_t layer, int64_t d, pylora_packed *out) {
  const pylora_module at = {d, l->m->s.hidden, layer, -1, 0, (int32_t)role, 0};
  const wanted w = {role, layer, -1, ".weight"};
  const int64_t shape[2] = {at.d, at.k};
  const pylora_tensor *t;
  TRY(pylora_load_find(l, &w, 2, shape, &t));
  return pack(l, t, &at, PYLORA_F32, 0, 0, 1, out);
}

/* A vector [n], with its rows in Hugging Face's order. */
static int vector(loader *l, const wanted *w, int64_t n, int64_t heads, const float **out) {
  const pylora_tensor *t;
  TRY(pylora_load_find(l, w, 1, &n, &t));
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
int pylora_load_norm(loader *l, pylora_role role, int64_t layer, int64_t n, pylora_norm *out) {
  const pylora_family_facts *f = &pylora_families[l->m->s.family];
  const wanted weight = {role, layer, -1, ".weight"}, bias = {role, layer, -1, ".bias"};
  const int kind = role == ROLE_Q_NORM || role == ROLE_K_NORM ? PYLORA_RMS : f->norm;
  const float *w = NULL, *b = NULL;
  TRY(vector(l, &weight, n, 0, &w));
  if (kind == PYLORA_LAYER) TRY(vector(l, &bias, n, 0, &b));
  float *own = (float *)(uintptr_t)w;
  for (int64_t i = 0; f->offset && i < n; i++) {
    const float less = l->m->files.gguf ? own[i] - 1.0f : own[i];
    own[i] = less + 1.0f;
  }
  *out = (pylora_norm){.w = w, .eps = (float)l->m->s.eps, .kind = kind, .b = b};
  return PYLORA_OK;
}

static int norms(loader *l, int64_t i) {
  const pylora_settings *s = &l->m->s;
  pylora_layer *out = &l->m->layer[i];
  const int whole = pylora_families[s->family].qk_norm == OF_ALL;
  const struct {
    pylora_role role;
    pylora_norm *to;
    int64_t size;
  } all[] = {
      {ROLE_INPUT_NORM, &out->input_norm, s->hidden},
      {ROLE_MID_NORM, &out->mid_norm, s->hidden},
      {ROLE_AFTER_ATTENTION, &out->after_attention, s->hidden},
      {ROLE_AFTER_MLP, &out->after_mlp, s->hidden},
      {ROLE_Q_NORM, &out->q_norm, s->head_dim * (whole ? s->heads : 1)},
      {ROLE_K_NORM, &out->k_norm, s->head_dim * (whole ? s->kv_heads : 1)},
  };
  out->norm_of = whole ? PYLORA_NORM_WHOLE : PYLORA_NORM_SHARED;
  for (size_t j = 0; j < sizeof all / sizeof *all; j++)
    if (pylora_has_norm(s->family, all[j].role))
      TRY(pylora_load_norm(l, all[j].role, i, all[j].size, all[j].to));
  return PYLORA_OK;
}

/* Layer i, whose modules are those from `first` on. */
int pylora_load_layer(loader *l, int64_t i, int64_t first) {
  pylora_model *m = l->m;
  const pylora_settings *s = &m->s;
  pylora_layer *out = &m->layer[i];
  TRY(norms(l, i));
  out->module = first;
  out->W = m->W + first, out->bias = m->bias + first;
  for (int64_t j = first; j < first + pylora_layer_modules(s, i); j++) {
    const pylora_module *at = &m->module[j];
    const wanted bias = {(pylora_role)at->role, i, -1, ".bias"};
    TRY(pylora_load_matrix(l, at, &m->packed[j]));
    m->W[j] = &m->packed[j];
    if (at->bias) TRY(vector(l, &bias, at->d, at->heads, &m->bias[j]));
  }
  if (s->experts && !s->dense[i]) {
    TRY(pylora_load_exact(l, ROLE_ROUTER, i, s->experts, &m->router[i]));
    m->mixture[i] =
        (pylora_experts){&m->router[i], (int32_t)s->experts, (int32_t)s->top_k, s->norm_experts};
    out->experts = &m->mixture[i];
  }
  out->window = (int32_t)(s->local[i] ? s->window : 0);
  out->rope = s->rope[i];
  if (s->scale_by_layer) {
    const double all =
        s->attention_scale == 0 ? pow((double)s->head_dim, -0.5) : s->attention_scale;
    out->scale = (float)(all / (double)(i + 1));
  }
  return PYLORA_OK;
}

/* ---- tensors that are left over ---- */

static int ends(const char *text, const char *end) {
  const size_t n = strlen(text), k = strlen(end);
  return n >= k && strcmp(text + n - k, end) == 0;
}

/* What a converter or an older exporter leaves beside the weights: tables of angles, masks. */
static int carries_nothing(const pylora_files *files, const char *name) {
  static const char *const hf[] = {".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias",
                                   ".attention.bias", ".attention.masked_bias"};
  static const char *const gguf[] = {"rope_freqs.weight", "rope_factors_long.weight",
                                     "rope_factors_short.weight"};
  if (files->gguf) {
    for (size_t i = 0; i < sizeof gguf / sizeof *gguf; i++)
      if (strcmp(name, gguf[i]) == 0) return 1;
    return strncmp(name, "blk.", 4) == 0 && ends(name, ".attn_rot_embd");
  }
  for (size_t i = 0; i < sizeof hf / sizeof *hf; i++)
    if (ends(name, hf[i])) return 1;
  return 0;
}

/* A stored copy of a tied head may be left out only if it is the embedding. */
static int tied_copy(loader *l, const pylora_tensor *t) {
  const pylora_tensor *e = pylora_model_tensor(l->m, ROLE_EMBEDDING, -1, -1, ".weight");
  if (t->kind != e->kind || t->bytes != e->bytes || memcmp(t->data, e->data, (size_t)t->bytes) != 0)
    SAY(PYLORA_E_FILE,
        "%.300s: config.json says tie_word_embeddings, but '%s' is stored and differs from "
        "'%s'; one of the two is wrong",
        l->m->path, t->name, e->name);
  return PYLORA_OK;
}

int pylora_load_nothing_left(loader *l) {
  const pylora_files *files = &l->m->files;
  const pylora_tensor *head =
      files->gguf || !l->m->s.tied ? NULL : pylora_model_tensor(l->m, ROLE_HEAD, -1, -1, ".weight");
  int64_t number = 0;
  for (int64_t f = 0; f < files->files; f++)
    for (int64_t i = 0; i < files->file[f]->tensors; i++, number++) {
      const pylora_tensor *t = &files->file[f]->tensor[i];
      if (l->used[number] || carries_nothing(files, t->name)) continue;
      if (t == head) {
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
