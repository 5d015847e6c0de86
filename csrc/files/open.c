/* open.c - an open file: which kind it is, its tensors and metadata by name. */
#include "files/files.h"

static int begin(pylora_file *file, pylora_message *why) {
  const uint8_t *p = file->map.bytes;
  static const char lfs[] = "version https://git-lfs";
  if (file->map.size >= 4 && memcmp(p, "GGUF", 4) == 0) {
    file->gguf = 1;
    return pylora_gguf_read(file, why);
  }
  if (file->map.size >= sizeof lfs - 1 && memcmp(p, lfs, sizeof lfs - 1) == 0)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: this is a pointer of Git LFS, not the file itself; fetch it with "
                       "`git lfs pull`",
                       file->name);
  if (file->map.size >= 9 && p[8] == '{') return pylora_safetensors_read(file, why);
  return pylora_fail(why, PYLORA_E_FILE,
                     "%.300s: this is neither a GGUF file (its first bytes are not 'GGUF') nor a "
                     "safetensors file (no JSON object follows its first 8 bytes)",
                     file->name);
}

static int open_map(const char *name, pylora_map map, pylora_file **out, pylora_message *why) {
  pylora_file *file = pylora_take(1, sizeof *file);
  char *copy = malloc(strlen(name) + 1);
  if (!file || !copy) {
    free(file);
    free(copy);
    pylora_map_close(&map);
    return pylora_no_memory(why, name, (double)sizeof *file);
  }
  memcpy(copy, name, strlen(name) + 1);
  file->map = map, file->name = copy;
  const int status = begin(file, why);
  if (status) {
    pylora_file_close(file);
    return status;
  }
  *out = file;
  return PYLORA_OK;
}

int pylora_file_open(const char *path, pylora_file **out, pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!path || !out) return pylora_fail(why, PYLORA_E_NULL, "no path was given");
  *out = NULL;
  pylora_map map;
  TRY(pylora_map_open(path, &map, why));
  return open_map(path, map, out, why);
}

int pylora_file_open_memory(const char *name, const void *bytes, size_t size, pylora_file **out,
                            pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!name || !bytes || !out) return pylora_fail(why, PYLORA_E_NULL, "no file was given");
  *out = NULL;
  const pylora_map map = {bytes, size, NULL};
  return open_map(name, map, out, why);
}

void pylora_file_close(pylora_file *file) {
  if (!file) return;
  pylora_map_close(&file->map);
  free(file->name);
  free(file->tensor);
  free(file->by_name);
  free(file->meta);
  free(file->names);
  free(file);
}

/* ---- tensors ---- */

/* C's qsort gives its comparison no context: the names are sorted through pointers to tensors. */
static int by_name(const void *a, const void *b) {
  const pylora_tensor *const *x = a, *const *y = b;
  return strcmp((*x)->name, (*y)->name);
}

int pylora_file_index(pylora_file *file, pylora_message *why) {
  const size_t n = (size_t)file->tensors;
  const pylora_tensor **sorted = pylora_take(n, sizeof *sorted);
  file->by_name = pylora_take(n, sizeof *file->by_name);
  if (!sorted || !file->by_name) {
    free(sorted);
    return pylora_no_memory(why, file->name, (double)n * sizeof *sorted);
  }
  for (size_t i = 0; i < n; i++) sorted[i] = &file->tensor[i];
  qsort(sorted, n, sizeof *sorted, by_name);
  int status = PYLORA_OK;
  for (size_t i = 0; i < n; i++) {
    file->by_name[i] = sorted[i] - file->tensor;
    if (i && !status && strcmp(sorted[i]->name, sorted[i - 1]->name) == 0)
      status = pylora_fail(why, PYLORA_E_FILE, "%.300s: tensor '%.200s' occurs twice", file->name,
                           sorted[i]->name);
  }
  free(sorted);
  return status;
}

int64_t pylora_file_tensors(const pylora_file *file) { return file ? file->tensors : 0; }

const pylora_tensor *pylora_file_tensor(const pylora_file *file, int64_t index) {
  return file && index >= 0 && index < file->tensors ? &file->tensor[index] : NULL;
}

const pylora_tensor *pylora_file_find(const pylora_file *file, const char *name) {
  if (!file || !name) return NULL;
  int64_t low = 0, high = file->tensors;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const pylora_tensor *t = &file->tensor[file->by_name[middle]];
    const int order = strcmp(name, t->name);
    if (order == 0) return t;
    if (order < 0)
      high = middle;
    else
      low = middle + 1;
  }
  return NULL;
}

/* ---- metadata ---- */

const pylora_meta *pylora_file_meta(const pylora_file *file, const char *key) {
  const size_t n = strlen(key);
  int64_t low = 0, high = file->metas;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const pylora_meta *m = &file->meta[middle];
    const size_t common = n < m->key_bytes ? n : m->key_bytes;
    int order = memcmp(key, m->key, common);
    if (order == 0) order = n < m->key_bytes ? -1 : n > m->key_bytes;
    if (order == 0) return m;
    if (order < 0)
      high = middle;
    else
      low = middle + 1;
  }
  return NULL;
}

static const pylora_meta *single(const pylora_file *file, const char *key) {
  const pylora_meta *m = file && key ? pylora_file_meta(file, key) : NULL;
  return m && !m->array ? m : NULL;
}

int pylora_file_text(const pylora_file *file, const char *key, const char **text, size_t *bytes) {
  const pylora_meta *m = single(file, key);
  if (!m || m->type != 8 || !text || !bytes) return 0;
  *text = (const char *)m->value, *bytes = (size_t)m->count;
  return 1;
}

int pylora_file_whole(const pylora_file *file, const char *key, int64_t *value) {
  const pylora_meta *m = single(file, key);
  if (!m || !value) return 0;
  const uint8_t *p = m->value;
  switch (m->type) {
  case 0:
    return *value = p[0], 1;
  case 1:
    return *value = (int8_t)p[0], 1;
  case 2:
    return *value = load16(p), 1;
  case 3:
    return *value = (int16_t)load16(p), 1;
  case 4:
    return *value = load32(p), 1;
  case 5:
    return *value = (int32_t)load32(p), 1;
  case 10:
    if (load64(p) > INT64_MAX) return 0;
    return *value = (int64_t)load64(p), 1;
  case 11:
    return *value = (int64_t)load64(p), 1;
  default:
    return 0;
  }
}

int pylora_file_real(const pylora_file *file, const char *key, double *value) {
  const pylora_meta *m = single(file, key);
  int64_t whole;
  if (!m || !value) return 0;
  if (m->type == 6) {
    float f;
    memcpy(&f, m->value, sizeof f);
    return *value = f, 1;
  }
  if (m->type == 12) {
    memcpy(value, m->value, sizeof *value);
    return 1;
  }
  if (pylora_file_whole(file, key, &whole)) return *value = (double)whole, 1;
  if (m->type == 10) return *value = (double)load64(m->value), 1;
  return 0;
}
