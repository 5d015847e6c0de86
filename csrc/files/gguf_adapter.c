/* gguf_adapter.c - a LoRA adapter in a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it.
 *
 * Tensors are "<name of the base's tensor>.lora_a" and ".lora_b"; one alpha serves all, divided by each rank, and
 * without an alpha the scale is 1, as in llama.cpp.  The rows of B are in the order of the base's rows there (q and k
 * of the architecture "llama": that of the interleaved rotation); lora_a of the embedding is transposed. */
#include <math.h>
#include <stdio.h>

#include "files/adapter.h"

#define WRONG(...) return pylora_fail(why, PYLORA_E_PLAN, __VA_ARGS__)

static int is(const pylora_file *file, const char *key, const char *expected, const char **text,
              size_t *n) {
  *text = "missing", *n = 7;
  pylora_file_text(file, key, text, n);
  return *n == strlen(expected) && memcmp(*text, expected, *n) == 0;
}

/* llama.cpp's of a family; "" where it has none. */
static const char *architecture(pylora_family family) {
  if (family == MISTRAL || family == MIXTRAL) family = LLAMA; /* they have one */
  if (family == OLMO3) family = OLMO2;
  return pylora_families[family].arch ? pylora_families[family].arch : "";
}

static int metadata(const pylora_model *m, const pylora_file *file, double *alpha,
                    pylora_message *why) {
  const char *text;
  size_t n;
  if (!is(file, "general.type", "adapter", &text, &n) ||
      !is(file, "adapter.type", "lora", &text, &n))
    return pylora_fail(
        why, PYLORA_E_FILE,
        "%.300s: this GGUF file is no LoRA adapter: general.type must be 'adapter' and "
        "adapter.type 'lora', and one of them is '%.*s'",
        file->name, (int)(n < 80 ? n : 80), text);
  const char *arch = architecture(m->s.family);
  if (!is(file, "general.architecture", arch, &text, &n))
    WRONG("%.300s: the adapter is for the architecture '%.*s', the model is a %s", file->name,
          (int)(n < 80 ? n : 80), text, arch);
  const pylora_meta *tokens = pylora_file_meta(file, "adapter.alora.invocation_tokens");
  if (tokens && !(tokens->array && tokens->count == 0))
    return pylora_fail(
        why, PYLORA_E_UNSUPPORTED,
        "%.300s: adapter.alora.invocation_tokens: activated LoRA (aLoRA) switches the "
        "adapter on inside a sequence; it is not supported",
        file->name);
  *alpha = 0;
  if (pylora_file_meta(file, "adapter.lora.alpha") &&
      !pylora_file_real(file, "adapter.lora.alpha", alpha))
    WRONG("%.300s: adapter.lora.alpha is not a number", file->name);
  if (!(*alpha == 0 || (*alpha >= 1e-30 && *alpha <= 1e30)))
    WRONG("%.300s: adapter.lora.alpha is %g; it must be a positive number", file->name, *alpha);
  return PYLORA_OK;
}

/* The number of the module whose weight a tensor of the base is; -1: of none. */
static int64_t module_of(const pylora_model *m, const char *name, size_t n) {
  for (int64_t i = 0; i < pylora_module_count(m); i++) {
    const pylora_module *at = &m->module[i];
    char own[PYLORA_NAME];
    if (at->expert >= 0) continue; /* one tensor of all: no module */
    pylora_tensor_name(m->s.family, 1, (pylora_role)at->role, at->layer, -1, ".weight", own);
    if (strlen(own) == n && memcmp(own, name, n) == 0) return i;
  }
  return -1;
}

static int shapes(const pylora_model *m, const pylora_file *file, int64_t i, pylora_part *p,
                  pylora_message *why) {
  const int64_t d = m->module[i].d, k = m->module[i].k;
  const char *path = pylora_module_path(m, i);
  if (!p->A || !p->B)
    WRONG("%.300s: %s: '%.200s' is there without its other half", file->name, path,
          p->A ? p->A->name : p->B->name);
  const int across = p->A_transposed;
  if (p->A->dims != 2 || p->B->dims != 2 || p->A->shape[!across] != k || p->B->shape[0] != d ||
      p->B->shape[1] != p->A->shape[across])
    WRONG("%.300s: %s: lora_a has the shape %s and lora_b %s; the module has %lld inputs and %lld "
          "outputs",
          file->name, path, pylora_shape(p->A->dims, p->A->shape).text,
          pylora_shape(p->B->dims, p->B->shape).text, (long long)k, (long long)d);
  p->r = p->B->shape[1];
  if (p->r > INT32_MAX) WRONG("%.300s: %s: the rank is too large", file->name, path);
  return PYLORA_OK;
}

int pylora_gguf_adapter(const pylora_model *m, const pylora_file *file, pylora_part *part,
                        pylora_message *why) {
  double alpha;
  int64_t found = 0;
  TRY(metadata(m, file, &alpha, why));
  for (int64_t i = 0; i < file->tensors; i++) {
    const pylora_tensor *t = &file->tensor[i];
    const size_t n = strlen(t->name), tail = 7; /* of ".lora_a" */
    const char *end = n > tail ? t->name + n - tail : "";
    const int is_a = strcmp(end, ".lora_a") == 0, is_b = strcmp(end, ".lora_b") == 0;
    const int64_t number = is_a || is_b ? module_of(m, t->name, n - tail) : -1;
    if (number < 0)
      WRONG("%.300s: tensor '%.200s' is no lora_a or lora_b of a module that the model has; "
            "nothing is "
            "left out in silence",
            file->name, t->name);
    *(is_a ? &part[number].A : &part[number].B) = t;
  }
  for (int64_t i = 0; i < pylora_module_count(m); i++) {
    pylora_part *p = &part[i];
    if (!p->A && !p->B) continue;
    p->A_transposed = i == pylora_module_count(m) - 1;
    TRY(shapes(m, file, i, p, why));
    /* by the adapter's architecture, which is the model's: also for a model from Hugging Face's files */
    p->heads = pylora_rows_order(&m->s, (pylora_role)m->module[i].role);
    p->alpha = alpha ? alpha : (double)p->r;
    p->scale = p->alpha / (double)p->r;
    found++;
  }
  if (!found) WRONG("%.300s: the adapter has no tensors", file->name);
  return PYLORA_OK;
}
