/* safetensors.c - the header of a safetensors file: JSON of names, dtypes, shapes and byte ranges.
 *
 * Layout: https://github.com/huggingface/safetensors#format.  The tensors must cover the data exactly: no
 * overlap, no hole, nothing left over. */
#include "files/json.h"

enum { MAX_HEADER = 100000000 }; /* bytes; the reference implementation's limit */

#define BAD(name, ...) return bad(file, name, why, __VA_ARGS__)

static int bad(const pylora_file *file, const char *name, pylora_message *why, const char *what) {
  return pylora_fail(why, PYLORA_E_FILE, "%.300s: tensor '%.200s': %s", file->name, name, what);
}

/* The numbers of a list of at most `most` numbers from 0 on; -1 if it is none. */
static int numbers(const pylora_json *j, const pylora_json_value *v, int most, int64_t *out) {
  if (!json_is(v, JSON_LIST) || v->items > most) return -1;
  int n = 0;
  JSON_EACH(item, j, v) {
    if (item->type != JSON_NUMBER || !item->is_whole || item->u.whole < 0) return -1;
    out[n++] = item->u.whole;
  }
  return n;
}

static int entry(const pylora_file *file, const pylora_json *j, const pylora_json_value *v,
                 pylora_tensor *t, int64_t data, pylora_message *why) {
  t->name = v->key;
  const pylora_json_value *dtype = pylora_json_member(j, v, "dtype"),
                          *shape = pylora_json_member(j, v, "shape"),
                          *offsets = pylora_json_member(j, v, "data_offsets");
  if (!dtype || !shape || !offsets || v->items != 3)
    BAD(v->key, "its header entry must have dtype, shape and data_offsets, and nothing else");
  t->kind =
      dtype->type == JSON_TEXT ? pylora_kind_safetensors(dtype->u.text, strlen(dtype->u.text)) : -1;
  if (t->kind < 0)
    return pylora_fail(why, PYLORA_E_FILE, "%.300s: tensor '%.200s': unknown dtype '%.40s'",
                       file->name, v->key, dtype->type == JSON_TEXT ? dtype->u.text : "?");
  const pylora_kind *kind = pylora_kind_of(t->kind);
  t->type = kind->name;
  int64_t range[2], need = kind->bytes;
  t->dims = numbers(j, shape, PYLORA_MAX_DIMS, t->shape);
  if (t->dims < 0 || numbers(j, offsets, 2, range) != 2)
    BAD(v->key, "shape and data_offsets must be lists of non-negative whole numbers, of at most 16 "
                "and of exactly 2");
  int empty = 0, large = 0;
  for (int i = 0; i < t->dims; i++) empty |= t->shape[i] == 0;
  for (int i = 0; i < t->dims && !empty && !large; i++) {
    large = need > INT64_MAX / t->shape[i];
    if (!large) need *= t->shape[i];
  }
  if (empty) need = 0;
  if (large || range[1] < range[0] || range[1] - range[0] != need)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: tensor '%.200s': %s of shape %s needs %s%lld bytes, but its "
                       "data_offsets hold %lld",
                       file->name, v->key, kind->name, pylora_shape(t->dims, t->shape).text,
                       large ? "more than " : "", (long long)need,
                       (long long)(range[1] - range[0]));
  if (range[1] > data)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: tensor '%.200s' ends at byte %lld of the data, but the file has "
                       "%lld; it is truncated",
                       file->name, v->key, (long long)range[1], (long long)data);
  t->bytes = need;
  t->data = file->map.bytes + file->map.size - data + range[0];
  return PYLORA_OK;
}

static int by_place(const void *a, const void *b) {
  const pylora_tensor *x = *(const pylora_tensor *const *)a, *y = *(const pylora_tensor *const *)b;
  const char *p = x->data, *q = y->data;
  return p != q ? (p < q ? -1 : 1) : x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int no_holes(const pylora_file *file, const char *data, pylora_message *why) {
  const size_t n = (size_t)file->tensors;
  const pylora_tensor **sorted = pylora_take(n, sizeof *sorted);
  if (!sorted) return pylora_no_memory(why, file->name, (double)n * sizeof *sorted);
  for (size_t i = 0; i < n; i++) sorted[i] = &file->tensor[i];
  qsort(sorted, n, sizeof *sorted, by_place);
  const char *end = data, *before = "the start of the data";
  int status = PYLORA_OK;
  for (size_t i = 0; i < n && !status; i++) {
    const char *p = sorted[i]->data;
    if (p != end)
      status = pylora_fail(why, PYLORA_E_FILE,
                           "%.300s: tensor '%.150s' at byte %lld %s %.150s, "
                           "which ends at %lld",
                           file->name, sorted[i]->name, (long long)(p - data),
                           p < end ? "overlaps" : "leaves a hole behind", before,
                           (long long)(end - data));
    end = p + sorted[i]->bytes, before = sorted[i]->name;
  }
  const char *last = (const char *)file->map.bytes + file->map.size;
  if (!status && end != last)
    status =
        pylora_fail(why, PYLORA_E_FILE,
                    "%.300s: the tensors need %lld bytes of data, but the file has %lld; bytes "
                    "are left over after %.150s",
                    file->name, (long long)(end - data), (long long)(last - data), before);
  free(sorted);
  return status;
}

/* The names, out of the JSON, which is let go. */
static int keep_names(pylora_file *file, pylora_message *why) {
  size_t total = 0;
  for (int64_t i = 0; i < file->tensors; i++) total += strlen(file->tensor[i].name) + 1;
  char *to = file->names = pylora_take(total, 1);
  if (!to) return pylora_no_memory(why, file->name, (double)total);
  for (int64_t i = 0; i < file->tensors; i++) {
    const size_t n = strlen(file->tensor[i].name) + 1;
    memcpy(to, file->tensor[i].name, n);
    file->tensor[i].name = to;
    to += n;
  }
  return PYLORA_OK;
}

static int table(pylora_file *file, const pylora_json *j, int64_t data, pylora_message *why) {
  const pylora_json_value *top = j->value, *meta = pylora_json_member(j, top, "__metadata__");
  if (top->type != JSON_OBJECT)
    return pylora_fail(why, PYLORA_E_FILE, "%.300s: the safetensors header is not a JSON object",
                       file->name);
  if (meta && meta->type != JSON_NULL) { /* mlx writes null where there is none */
    int texts = meta->type == JSON_OBJECT;
    if (texts) JSON_EACH(item, j, meta) texts &= item->type == JSON_TEXT;
    if (!texts)
      return pylora_fail(why, PYLORA_E_FILE, "%.300s: __metadata__ must map texts to texts",
                         file->name);
  }
  file->tensor = pylora_take((size_t)top->items, sizeof *file->tensor);
  if (!file->tensor)
    return pylora_no_memory(why, file->name, (double)top->items * sizeof *file->tensor);
  JSON_EACH(item, j, top) {
    if (item == meta) continue;
    if (item->type != JSON_OBJECT)
      return bad(file, item->key, why, "its header entry is not an object");
    TRY(entry(file, j, item, &file->tensor[file->tensors], data, why));
    file->tensors++;
  }
  return keep_names(file, why);
}

int pylora_safetensors_read(pylora_file *file, pylora_message *why) {
  const size_t size = file->map.size;
  const uint64_t length = load64(file->map.bytes);
  if (length > MAX_HEADER || length > size - 8)
    return pylora_fail(why, PYLORA_E_FILE,
                       "%.300s: the header claims %llu bytes, but the file has %zu (and %d is the "
                       "most allowed); it is truncated or no safetensors file",
                       file->name, (unsigned long long)length, size, MAX_HEADER);
  const int64_t data = (int64_t)(size - 8 - (size_t)length);
  pylora_json j;
  int status =
      pylora_json_parse((const char *)file->map.bytes + 8, (size_t)length, file->name, &j, why);
  if (!status) status = table(file, &j, data, why);
  pylora_json_free(&j);
  if (!status) status = pylora_file_index(file, why);
  if (!status) status = no_holes(file, (const char *)file->map.bytes + size - data, why);
  return status;
}
