/* peft.c - the tensors of a PEFT adapter: each one that the plan asks for, and no other.
 *
 * Keys are "base_model.model." + module path + an ending.  A copy of a base weight, as PEFT writes for adapted
 * embeddings, must be the base model's. */
#include <math.h>
#include <stdio.h>

#include "files/adapter.h"
#include "ops/number.h"

#define PREFIX "base_model.model."
enum { KEY = PYLORA_NAME + 64 };

/* A tensor by the key that PEFT writes to files. */
typedef struct plain {
  char *key;
  const pylora_tensor *t;
} plain;

typedef struct matcher {
  const pylora_model *m;
  const pylora_file *file;
  plain *keys;   /* [tensors], sorted */
  char *text;    /* of all keys */
  uint8_t *used; /* [tensors] of the file */
  pylora_message *why;
} matcher;

#define WRONG(...) return pylora_fail(x->why, PYLORA_E_PLAN, __VA_ARGS__)

/* Copies a key without an adapter's name (NULL: PEFT keeps it in a model's state) and with the
 * prefix of its wrappers. */
static void copy_plain(const char *key, char *to) {
  static const char *const marks[] = {".lora_A.", ".lora_B.", ".lora_embedding_A.",
                                      ".lora_embedding_B."};
  const size_t prefix = sizeof PREFIX - 1;
  to[0] = 0;
  if (strstr(key, ".lora_") && strncmp(key, PREFIX, prefix) != 0) strcpy(to, PREFIX);
  strcat(to, key);
  for (int i = 0; i < 4; i++) {
    char *mark = NULL; /* the last */
    for (char *p = strstr(to, marks[i]); p; p = strstr(p + 1, marks[i])) mark = p;
    if (!mark) continue;
    char *name = mark + strlen(marks[i]), *end = strchr(name, '.');
    if (!*name || *name == '.' || strcmp(name, "weight") == 0 || strcmp(name, "bias") == 0)
      continue;
    if (!end)
      name[-1] = 0;
    else if (strcmp(end, ".weight") == 0 || strcmp(end, ".bias") == 0)
      memmove(name - 1, end, strlen(end) + 1);
  }
}

static int by_plain(const void *a, const void *b) {
  return strcmp(((const plain *)a)->key, ((const plain *)b)->key);
}

static int sort_keys(matcher *x) {
  size_t total = 0;
  const size_t n = (size_t)x->file->tensors;
  for (size_t i = 0; i < n; i++) total += strlen(x->file->tensor[i].name) + sizeof PREFIX;
  x->keys = pylora_take(n, sizeof *x->keys), x->text = pylora_take(total, 1);
  x->used = pylora_take(n, 1);
  if (!x->keys || !x->text || !x->used)
    return pylora_no_memory(x->why, x->file->name, (double)total);
  char *to = x->text;
  for (size_t i = 0; i < n; i++) {
    const pylora_tensor *t = &x->file->tensor[i];
    copy_plain(t->name, to);
    x->keys[i] = (plain){to, t};
    to += strlen(t->name) + sizeof PREFIX;
  }
  qsort(x->keys, n, sizeof *x->keys, by_plain);
  for (size_t i = 1; i < n; i++)
    if (by_plain(&x->keys[i], &x->keys[i - 1]) == 0)
      WRONG("%.300s: '%.200s' and '%.200s' are the same tensor, twice", x->file->name,
            x->keys[i - 1].t->name, x->keys[i].t->name);
  return PYLORA_OK;
}

static const pylora_tensor *look(const matcher *x, const char *path, const char *ending,
                                 char key[KEY]) {
  snprintf(key, KEY, PREFIX "%s%s", path, ending);
  const plain wanted = {key, NULL};
  const plain *found =
      bsearch(&wanted, x->keys, (size_t)x->file->tensors, sizeof *x->keys, by_plain);
  return found ? found->t : NULL;
}

/* The tensor of one of two keys, of this shape; the second is another spelling. */
static int want(const matcher *x, const char *path, const char *ending, const char *other,
                int64_t rows, int64_t cols, const pylora_tensor **out) {
  char key[KEY], second[KEY];
  const pylora_tensor *a = look(x, path, ending, key);
  const pylora_tensor *b = other ? look(x, path, other, second) : NULL;
  if (a && b) WRONG("%.300s: '%s' and '%s' are the same tensor, twice", x->file->name, key, second);
  const pylora_tensor *t = *out = a ? a : b;
  if (!t)
    WRONG("%.300s: there is no tensor '%s', which adapter_config.json and the model imply",
          x->file->name, key);
  const int64_t shape[2] = {rows, cols};
  const int dims = cols ? 2 : 1;
  if (t->dims != dims || t->shape[0] != rows || (cols && t->shape[1] != cols))
    WRONG(
        "%.300s: tensor '%.200s' has the shape %s, but adapter_config.json and the model imply %s",
        x->file->name, t->name, pylora_shape(t->dims, t->shape).text,
        pylora_shape(dims, shape).text);
  if (!pylora_is_float(t) && !pylora_is_f64(t))
    WRONG("%.300s: tensor '%.200s' is %s, expected F32, F16, BF16 or F64", x->file->name, t->name,
          t->type);
  x->used[t - x->file->tensor] = 1;
  return PYLORA_OK;
}

/* ---- copies of base weights ---- */

/* Whether row i of both is the same at the precision that the copy has. */
static int same_row(const pylora_tensor *copy, const pylora_tensor *base, int64_t i, int64_t from,
                    float *a, float *b) {
  const int64_t k = base->shape[1];
  const int dtype = pylora_kind_of(copy->kind)->dtype;
  if (pylora_adapter_row(copy, i, a, NULL) || pylora_tensor_read(base, from, 1, b, NULL)) return 0;
  for (int64_t j = 0; j < k; j++) {
    float v = b[j];
    if (dtype == PYLORA_BF16) v = bf16_widen(bf16_round(v));
    if (dtype == PYLORA_F16) v = (float)widen_f16(narrow_f16((double)v));
    if (!(v == a[j])) return 0;
  }
  return 1;
}

static int check_copy(const matcher *x, int64_t module, const pylora_tensor *copy) {
  const pylora_module *at = &x->m->module[module];
  const pylora_tensor *base =
      pylora_model_tensor(x->m, (pylora_role)at->role, at->layer, at->expert, ".weight");
  if (!base) /* a tied head */
    base = pylora_model_tensor(x->m, ROLE_EMBEDDING, -1, -1, ".weight");
  if ((!pylora_is_float(copy) && !pylora_is_f64(copy)) || copy->dims != 2 ||
      copy->shape[0] != base->shape[0] || copy->shape[1] != base->shape[1])
    WRONG("%.300s: tensor '%.200s' is %s of shape %s, expected the base model's weight of shape %s",
          x->file->name, copy->name, copy->type, pylora_shape(copy->dims, copy->shape).text,
          pylora_shape(base->dims, base->shape).text);
  const int64_t d = base->shape[0], k = base->shape[1];
  float *rows = pylora_take((size_t)k, 2 * sizeof *rows);
  if (!rows) return pylora_no_memory(x->why, x->file->name, (double)k * 8);
  const int64_t heads = at->heads;
  int same = 1;
  for (int64_t i = 0; i < d && same; i++)
    same = same_row(copy, base, i, pylora_source_row(d, heads, i), rows, rows + k);
  free(rows);
  if (!same)
    WRONG("%.300s: tensor '%.200s' differs from the base model's weight: this adapter belongs to "
          "another base model, or that weight was trained too",
          x->file->name, copy->name);
  return PYLORA_OK;
}

/* ---- all of it ---- */

static int module(const matcher *x, int64_t i, pylora_part *p) {
  const char *path = pylora_module_path(x->m, i);
  const int embedding = i == pylora_module_count(x->m) - 1;
  const int64_t d = x->m->module[i].d, k = x->m->module[i].k;
  if (p->r) {
    char key[KEY];
    if (embedding) {
      TRY(want(x, path, ".lora_embedding_A", NULL, p->r, k, &p->A));
      TRY(want(x, path, ".lora_embedding_B", NULL, d, p->r, &p->B));
    } else {
      TRY(want(x, path, ".lora_A.weight", NULL, p->r, k, &p->A));
      TRY(want(x, path, ".lora_B.weight", NULL, d, p->r, &p->B));
    }
    const pylora_tensor *copy = look(x, path, ".base_layer.weight", key);
    if (copy) {
      TRY(check_copy(x, i, copy));
      x->used[copy - x->file->tensor] = 1;
    }
  }
  if (p->has_lora_bias) TRY(want(x, path, ".lora_B.bias", NULL, d, 0, &p->bias));
  if (p->has_base_bias) /* PEFT before 0.6 did not wrap the layer */
    TRY(want(x, path, p->r ? ".base_layer.bias" : ".bias", p->r ? ".bias" : NULL, d, 0,
             &p->base_bias));
  return PYLORA_OK;
}

int pylora_peft_match(const pylora_model *m, const pylora_file *file, pylora_part *part,
                      pylora_message *why) {
  matcher x_ = {m, file, NULL, NULL, NULL, why}, *x = &x_;
  int status = sort_keys(x);
  for (int64_t i = 0; i < pylora_module_count(m) && !status; i++) status = module(x, i, &part[i]);
  for (int64_t i = 0; i < file->tensors && !status; i++)
    if (!x->used[i])
      status =
          pylora_fail(why, PYLORA_E_PLAN,
                      "%.300s: tensor '%.250s' is not one that adapter_config.json and the model "
                      "imply; nothing is left out in silence",
                      file->name, file->tensor[i].name);
  free(x->used);
  free(x->keys);
  free(x->text);
  return status;
}
