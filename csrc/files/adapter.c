/* adapter.c - an adapter out of its files: matched with the model, its numbers checked, packed for its weights. */
#include <math.h>

#include "files/adapter.h"

struct pylora_adapter_file {
  pylora_adapter adapter;
  const pylora_lora **table; /* [modules - 1] */
  const float **bias;        /* [modules - 1] */
  pylora_lora *lora;         /* [modules] */
  pylora_packed embedding_B;
  void **aligned;
  int64_t aligned_count;
  pylora_plan_entry *entry;
  int64_t entries;
};

typedef struct maker {
  const pylora_model *m;
  const pylora_file *file;
  pylora_adapter_file *a;
  pylora_message *why;
} maker;

#define SAY(status, ...) return pylora_fail(x->why, status, __VA_ARGS__)

static void *keep(const maker *x, size_t bytes) {
  void *p = pylora_take_aligned(bytes ? bytes : 1);
  if (p) x->a->aligned[x->a->aligned_count++] = p;
  return p;
}

static int no_memory(const maker *x, double bytes) {
  return pylora_no_memory(x->why, x->file->name, bytes);
}

int pylora_adapter_row(const pylora_tensor *t, int64_t i, float *out, pylora_message *why) {
  if (!pylora_is_f64(t)) return pylora_tensor_read(t, i, 1, out, why);
  const int64_t n = pylora_columns(t);
  for (int64_t j = 0; j < n; j++) { /* what does not fit becomes infinite, which is refused */
    double v;
    memcpy(&v, (const char *)t->data + (i * n + j) * 8, sizeof v);
    out[j] = (float)v;
  }
  return PYLORA_OK;
}

/* A tensor's numbers [rows, cols], in Hugging Face's order of rows, transposed where it asks for that; to be freed.
 * None may be NaN or infinite. */
static int read(const maker *x, const pylora_tensor *t, int64_t rows, int64_t cols, int64_t heads,
                int transposed, float **out) {
  float *to = *out = pylora_take((size_t)rows * (size_t)cols, sizeof *to);
  float *line = pylora_take((size_t)rows + (size_t)cols, sizeof *line);
  int status = to && line ? PYLORA_OK : no_memory(x, (double)rows * (double)cols * 4);
  const int64_t n = transposed ? cols : rows, width = transposed ? rows : cols;
  int finite = 1;
  for (int64_t i = 0; i < n && !status; i++) {
    const int64_t from = transposed ? i : pylora_source_row(rows, heads, i);
    status = pylora_adapter_row(t, t->dims == 1 ? 0 : from, line, x->why);
    for (int64_t j = 0; j < width && !status; j++) {
      finite &= isfinite(line[j]) != 0;
      to[transposed ? j * cols + i : i * cols + j] = line[j];
    }
  }
  free(line);
  if (status) return status;
  if (!finite)
    SAY(PYLORA_E_FILE,
        "%.300s: tensor '%.200s' contains NaN or infinity; the training that wrote it diverged, or "
        "the file is damaged",
        x->file->name, t->name);
  return PYLORA_OK;
}

static int nonzero(const float *v, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (v[i] != 0) return 1;
  return 0;
}

/* scale * bias of B where it is not all zeros, kept; NULL: none. */
static int own_bias(const maker *x, const pylora_part *p, int64_t d, float **out) {
  *out = NULL;
  if (!p->bias) return PYLORA_OK;
  float *v;
  int status = read(x, p->bias, 1, d, 0, 0, &v);
  if (!status && nonzero(v, d)) {
    *out = keep(x, (size_t)d * sizeof **out);
    if (!*out) status = no_memory(x, (double)d * 4);
    for (int64_t i = 0; i < d && !status; i++) (*out)[i] = v[i] * (float)p->scale;
  }
  free(v);
  return status;
}

/* The bias in effect where it is not the module's own: a replacement, and what B adds. */
static int bias(const maker *x, int64_t i, const pylora_part *p, int64_t d) {
  const float *own = i < pylora_head_number(x->m) ? x->m->bias[i] : NULL;
  float *more;
  TRY(own_bias(x, p, d, &more));
  const float *base = own;
  if (p->base_bias) {
    float *v, *to = keep(x, (size_t)d * sizeof *to);
    if (!to) return no_memory(x, (double)d * 4);
    const int status = read(x, p->base_bias, 1, d, 0, 0, &v);
    if (!status) memcpy(to, v, (size_t)d * sizeof *to);
    free(v);
    TRY(status);
    base = to;
  }
  if (more && base)
    for (int64_t j = 0; j < d; j++) more[j] = base[j] + more[j];
  x->a->bias[i] = more ? more : base == own ? NULL : base;
  if (x->a->bias[i]) x->a->adapter.bias = x->a->bias;
  return PYLORA_OK;
}

static int linear(const maker *x, int64_t i, const pylora_part *p, int64_t d, int64_t k) {
  const int64_t head = pylora_head_number(x->m);
  const pylora_packed *W = i == head ? x->m->decoder.head : &x->m->packed[i];
  pylora_lora *l = &x->a->lora[i];
  if (p->r) {
    const size_t bytes = pylora_lora_pack_bytes(W->dtype, d, k, p->r);
    if (!bytes)
      SAY(PYLORA_E_PLAN, "%.300s: the rank %lld is too large", x->file->name, (long long)p->r);
    float *A = NULL, *B = NULL;
    void *to = keep(x, bytes);
    int status = to ? read(x, p->A, p->r, k, 0, p->A_transposed, &A) : no_memory(x, (double)bytes);
    if (!status) status = read(x, p->B, d, p->r, p->heads, 0, &B);
    const pylora_lora plain = {p->r, A, k, B, p->r, (float)p->scale, NULL, NULL};
    if (!status) status = pylora_lora_pack(W->dtype, d, k, &plain, to);
    free(A);
    free(B);
    TRY(status);
    *l = (pylora_lora){.r = p->r, .s = (float)p->scale, .packed = to};
    x->a->table[i] = l;
  }
  return bias(x, i, p, d);
}

static int embedding(const maker *x, int64_t i, const pylora_part *p, int64_t d, int64_t k) {
  pylora_adapter *a = &x->a->adapter;
  float *A = NULL, *B = NULL, *kept = keep(x, (size_t)k * (size_t)p->r * sizeof *kept),
        *kept_B = keep(x, (size_t)d * (size_t)p->r * sizeof *kept_B);
  const size_t bytes = pylora_pack_bytes(PYLORA_F32, d, p->r);
  void *panels = bytes ? keep(x, bytes) : NULL;
  int status = kept && kept_B && panels ? PYLORA_OK : no_memory(x, (double)k * (double)p->r * 4);
  if (!status) status = read(x, p->A, p->r, k, 0, p->A_transposed, &A);
  if (!status) status = read(x, p->B, d, p->r, 0, 0, &B);
  if (!status) {
    memcpy(kept, A, (size_t)k * (size_t)p->r * sizeof *kept);
    memcpy(kept_B, B, (size_t)d * (size_t)p->r * sizeof *kept_B);
    x->a->lora[i] = (pylora_lora){p->r, kept, k, kept_B, p->r, (float)p->scale, NULL, NULL};
    a->embedding = &x->a->lora[i];
    const pylora_mat W = {kept_B, d, p->r, p->r, NULL, NULL};
    if (nonzero(A, k * p->r) && nonzero(B, d * p->r)) {
      status = pylora_pack(PYLORA_F32, &W, panels, &x->a->embedding_B);
      a->embedding_B = &x->a->embedding_B;
    }
  }
  free(A);
  free(B);
  float *more = NULL;
  if (!status) status = own_bias(x, p, d, &more);
  a->embedding_bias = more;
  return status;
}

static int make(const maker *x, const pylora_part *part) {
  const int64_t n = pylora_module_count(x->m);
  pylora_adapter_file *a = x->a;
  a->table = pylora_take((size_t)n, sizeof *a->table);
  a->bias = pylora_take((size_t)n, sizeof *a->bias);
  a->lora = pylora_take((size_t)n, sizeof *a->lora);
  a->aligned = pylora_take((size_t)n, 4 * sizeof *a->aligned);
  a->entry = pylora_take((size_t)n, sizeof *a->entry);
  if (!a->table || !a->bias || !a->lora || !a->aligned || !a->entry)
    return no_memory(x, (double)n * sizeof *a->entry);
  a->adapter.lora = a->table;
  /* the embedding comes first in a model's order, and last in the numbers of modules */
  for (int64_t step = 0; step < n; step++) {
    const int64_t i = step ? step - 1 : n - 1;
    const pylora_part *p = &part[i];
    if (!p->r && !p->has_base_bias) continue;
    const int64_t d = x->m->module[i].d, k = x->m->module[i].k;
    TRY(i == n - 1 ? embedding(x, i, p, d, k) : linear(x, i, p, d, k));
    a->entry[a->entries++] =
        (pylora_plan_entry){pylora_module_path(x->m, i), p->r, d, k, p->alpha, p->r ? p->scale : 1};
  }
  return PYLORA_OK;
}

int pylora_adapter_make(const pylora_model *m, const pylora_file *file, const pylora_part *part,
                        pylora_adapter_file **out, pylora_message *why) {
  pylora_adapter_file *a = pylora_take(1, sizeof *a);
  const maker x = {m, file, a, why};
  if (!a) return no_memory(&x, sizeof *a);
  const int status = make(&x, part);
  if (status)
    pylora_adapter_close(a);
  else
    *out = a;
  return status;
}

void pylora_adapter_close(pylora_adapter_file *a) {
  if (!a) return;
  for (int64_t i = 0; i < a->aligned_count; i++) pylora_give(a->aligned[i]);
  free(a->aligned);
  free(a->table);
  free(a->bias);
  free(a->lora);
  free(a->entry);
  free(a);
}

const pylora_adapter *pylora_adapter_struct(const pylora_adapter_file *a) {
  return a ? &a->adapter : NULL;
}

const pylora_plan_entry *pylora_adapter_entry(const pylora_adapter_file *a, int64_t index) {
  return a && index >= 0 && index < a->entries ? &a->entry[index] : NULL;
}

/* ---- what a path is ---- */

static int from_directory(const pylora_model *m, const char *path, pylora_part *part,
                          pylora_file **file, pylora_message *why) {
  char *config = pylora_path(path, "adapter_config.json"),
       *weights = pylora_path(path, "adapter_model.safetensors"),
       *pickle = pylora_path(path, "adapter_model.bin");
  pylora_lora_config c = {.path = path};
  int status = config && weights && pickle ? PYLORA_OK : pylora_no_memory(why, path, 0);
  if (!status) status = pylora_lora_config_read(config, &c, why);
  if (!status && !pylora_is_file(weights) && pylora_is_file(pickle))
    status =
        pylora_fail(why, PYLORA_E_FILE,
                    "%.300s is a pickle file, which can run code when it is loaded, so it is not "
                    "read; save the adapter as adapter_model.safetensors (PEFT: "
                    "safe_serialization=True)",
                    pickle);
  if (!status) status = pylora_file_open(weights, file, why);
  if (!status && (*file)->gguf)
    status =
        pylora_fail(why, PYLORA_E_FILE, "%.300s: this is a GGUF file, not safetensors", weights);
  if (!status) status = pylora_plan(m, &c, part, why);
  if (!status) status = pylora_peft_match(m, *file, part, why);
  pylora_lora_config_free(&c);
  free(config);
  free(weights);
  free(pickle);
  return status;
}

int pylora_adapter_open(const pylora_model *m, const char *path, pylora_adapter_file **out,
                        pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!m || !path || !out) return pylora_fail(why, PYLORA_E_NULL, "no model or path was given");
  *out = NULL;
  pylora_file *file = NULL;
  pylora_part *part = pylora_take((size_t)pylora_module_count(m), sizeof *part);
  int status = part ? PYLORA_OK : pylora_no_memory(why, path, sizeof *part);
  if (!status && pylora_is_directory(path)) {
    status = from_directory(m, path, part, &file, why);
  } else if (!status) {
    status = pylora_file_open(path, &file, why);
    if (!status && !file->gguf)
      status = pylora_fail(why, PYLORA_E_FILE,
                           "%.300s: an adapter is a directory with adapter_config.json and "
                           "adapter_model.safetensors, or a GGUF file",
                           path);
    if (!status) status = pylora_gguf_adapter(m, file, part, why);
  }
  if (!status) status = pylora_adapter_make(m, file, part, out, why);
  pylora_file_close(file);
  free(part);
  return status;
}
