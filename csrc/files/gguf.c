/* gguf.c - the header of a GGUF file, walked with every count and length checked against the file's size.
 *
 * Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  Versions 2 and 3.  What the metadata and
 * tensors mean is config_gguf.c's and model.c's matter. */
#include "files/files.h"

enum { STRING = 8, ARRAY = 9, MAX_DIMS = 4, MAX_ALIGNMENT = 1 << 20, LEAST_TENSOR = 32 };
enum { LEAST_META = 13 }; /* bytes that a metadata entry takes at least */

/* A cursor that never leaves the file. */
typedef struct walk {
  const char *file;
  const uint8_t *bytes;
  size_t at, size;
  pylora_message *why;
} walk;

#define DAMAGED(...) return pylora_fail(w->why, PYLORA_E_FILE, __VA_ARGS__)

static int take(walk *w, uint64_t n, const char *what, const uint8_t **out) {
  if (n > w->size - w->at)
    DAMAGED("%.300s: %s at byte %zu needs %llu bytes, but the file ends after %zu; it is truncated "
            "or damaged",
            w->file, what, w->at, (unsigned long long)n, w->size - w->at);
  *out = w->bytes + w->at;
  w->at += (size_t)n;
  return PYLORA_OK;
}

static int u32(walk *w, const char *what, uint32_t *out) {
  const uint8_t *p;
  TRY(take(w, 4, what, &p));
  *out = load32(p);
  return PYLORA_OK;
}

static int u64(walk *w, const char *what, uint64_t *out) {
  const uint8_t *p;
  TRY(take(w, 8, what, &p));
  *out = load64(p);
  return PYLORA_OK;
}

/* A count of things that take at least `least` bytes each of what is left. */
static int count(walk *w, const char *what, size_t least, uint64_t *out) {
  TRY(u64(w, what, out));
  if (*out > (w->size - w->at) / least)
    DAMAGED("%.300s: %s is %llu, more than fit into the %zu bytes that follow; the file is "
            "truncated or damaged",
            w->file, what, (unsigned long long)*out, w->size - w->at);
  return PYLORA_OK;
}

static int string(walk *w, const char *what, const char **text, uint64_t *n) {
  const uint8_t *p;
  TRY(count(w, what, 1, n));
  TRY(take(w, *n, what, &p));
  if (!pylora_utf8((const char *)p, (size_t)*n)) DAMAGED("%.300s: %s is not UTF-8", w->file, what);
  *text = (const char *)p;
  return PYLORA_OK;
}

/* Bytes of a number of this value type; 0: there is no such type. */
static unsigned scalar_bytes(uint32_t type) {
  static const unsigned char bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < sizeof bytes ? bytes[type] : 0;
}

static int unknown_type(walk *w, const pylora_meta *m, uint32_t type) {
  DAMAGED("%.300s: metadata '%.*s' has the unknown value type %u", w->file,
          (int)(m->key_bytes < 200 ? m->key_bytes : 200), m->key, type);
}

static int value(walk *w, pylora_meta *m) {
  TRY(u32(w, "the type of a metadata value", &m->type));
  m->count = 1;
  if (m->type == STRING) {
    const char *text;
    TRY(string(w, "a text of the metadata", &text, &m->count));
    m->value = (const uint8_t *)text;
    return PYLORA_OK;
  }
  if (m->type != ARRAY) {
    if (!scalar_bytes(m->type)) return unknown_type(w, m, m->type);
    return take(w, scalar_bytes(m->type), "a metadata value", &m->value);
  }
  m->array = 1;
  TRY(u32(w, "the type of an array's elements", &m->type));
  if (m->type == ARRAY)
    DAMAGED("%.300s: metadata '%.*s' is an array of arrays", w->file,
            (int)(m->key_bytes < 200 ? m->key_bytes : 200), m->key);
  if (m->type != STRING) {
    const unsigned bytes = scalar_bytes(m->type);
    if (!bytes) return unknown_type(w, m, m->type);
    TRY(count(w, "the length of an array", bytes, &m->count));
    return take(w, m->count * bytes, "an array of the metadata", &m->value);
  }
  TRY(count(w, "the length of an array of texts", 8, &m->count));
  m->value = w->bytes + w->at;
  for (uint64_t i = 0; i < m->count; i++) {
    const char *text;
    uint64_t n;
    TRY(string(w, "a text in an array of the metadata", &text, &n));
  }
  return PYLORA_OK;
}

static int by_key(const void *a, const void *b) {
  const pylora_meta *x = a, *y = b;
  const size_t n = x->key_bytes < y->key_bytes ? x->key_bytes : y->key_bytes;
  const int order = memcmp(x->key, y->key, n);
  return order ? order : x->key_bytes < y->key_bytes ? -1 : x->key_bytes > y->key_bytes;
}

static int metadata(walk *w, pylora_file *file, uint64_t n) {
  file->meta = pylora_take((size_t)n, sizeof *file->meta);
  if (!file->meta) return pylora_no_memory(w->why, w->file, (double)n * sizeof *file->meta);
  for (uint64_t i = 0; i < n; i++) {
    pylora_meta *m = &file->meta[i];
    uint64_t bytes;
    TRY(string(w, "a metadata key", &m->key, &bytes));
    m->key_bytes = (size_t)bytes;
    TRY(value(w, m));
  }
  file->metas = (int64_t)n;
  qsort(file->meta, (size_t)n, sizeof *file->meta, by_key);
  for (uint64_t i = 1; i < n; i++)
    if (by_key(&file->meta[i], &file->meta[i - 1]) == 0)
      DAMAGED("%.300s: the metadata key '%.*s' occurs twice", w->file,
              (int)(file->meta[i].key_bytes < 200 ? file->meta[i].key_bytes : 200),
              file->meta[i].key);
  return PYLORA_OK;
}

/* ---- tensors ---- */

/* Its shape and the bytes that it takes: data is its offset until `place`. */
static int tensor(walk *w, pylora_tensor *t, uint64_t *offset) {
  uint32_t dims, number;
  TRY(u32(w, "the dimensions of a tensor", &dims));
  if (dims < 1 || dims > MAX_DIMS)
    DAMAGED("%.300s: tensor '%.200s' has %u dimensions, not 1 to 4", w->file, t->name, dims);
  t->dims = (int32_t)dims;
  uint64_t n[MAX_DIMS];
  for (uint32_t i = 0; i < dims; i++) {
    TRY(u64(w, "the shape of a tensor", &n[dims - 1 - i]));
    t->shape[dims - 1 - i] = (int64_t)n[dims - 1 - i];
  }
  TRY(u32(w, "the type of a tensor", &number));
  TRY(u64(w, "the offset of a tensor", offset));
  t->kind = pylora_kind_ggml(number);
  if (t->kind < 0)
    return pylora_fail(w->why, PYLORA_E_UNSUPPORTED,
                       "%.300s: tensor '%.200s' has the unknown ggml type %u", w->file, t->name,
                       number);
  const pylora_kind *kind = pylora_kind_of(t->kind);
  t->type = kind->name;
  uint64_t bytes = n[dims - 1] / (uint64_t)kind->block;
  int bad = n[dims - 1] < 1 || n[dims - 1] % (uint64_t)kind->block || n[dims - 1] > INT64_MAX;
  bad |= bytes > w->size / (uint64_t)kind->bytes;
  if (!bad) bytes *= (uint64_t)kind->bytes;
  for (uint32_t i = 0; i + 1 < dims && !bad; i++) {
    bad = n[i] < 1 || n[i] > w->size / bytes;
    if (!bad) bytes *= n[i];
  }
  if (bad)
    DAMAGED("%.300s: tensor '%.200s' has the shape %s, which is empty, not made of whole %s blocks "
            "of %d, or larger than the file",
            w->file, t->name, pylora_shape(t->dims, t->shape).text, kind->name, kind->block);
  t->bytes = (int64_t)bytes;
  return PYLORA_OK;
}

typedef struct place {
  uint64_t offset;
  pylora_tensor *tensor;
} place;

static int by_offset(const void *a, const void *b) {
  const place *x = a, *y = b;
  if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
  return x->tensor < y->tensor ? -1 : x->tensor > y->tensor;
}

/* Checks that the byte ranges are aligned, inside the file and do not overlap. */
static int set_places(walk *w, place *places, uint64_t n, uint64_t start, uint64_t alignment) {
  qsort(places, (size_t)n, sizeof *places, by_offset);
  uint64_t end = 0;
  const char *before = "nothing";
  for (uint64_t i = 0; i < n; i++) {
    pylora_tensor *t = places[i].tensor;
    const uint64_t offset = places[i].offset;
    const unsigned long long shown = offset;
    if (offset % alignment)
      DAMAGED("%.300s: tensor '%.200s' at offset %llu is not aligned to %llu bytes", w->file,
              t->name, shown, (unsigned long long)alignment);
    if (offset < end)
      DAMAGED("%.300s: tensor '%.150s' at offset %llu overlaps tensor '%.150s', which ends at %llu",
              w->file, t->name, shown, before, (unsigned long long)end);
    if (start > w->size || offset > w->size - start ||
        (uint64_t)t->bytes > w->size - start - offset)
      DAMAGED(
          "%.300s: tensor '%.200s' at offset %llu needs %lld bytes, but the file ends before; it "
          "is truncated or damaged",
          w->file, t->name, shown, (long long)t->bytes);
    end = offset + (uint64_t)t->bytes, before = t->name;
    t->data = w->bytes + start + offset;
  }
  return PYLORA_OK;
}

static int alignment_of(walk *w, const pylora_file *file, uint64_t *out) {
  int64_t n = 32;
  if (pylora_file_meta(file, "general.alignment") &&
      !pylora_file_whole(file, "general.alignment", &n))
    n = 0;
  if (n < 1 || n > MAX_ALIGNMENT || (n & (n - 1)))
    DAMAGED("%.300s: general.alignment is not a power of two from 1 to %d", w->file, MAX_ALIGNMENT);
  *out = (uint64_t)n;
  return PYLORA_OK;
}

/* Where the names go: of all tensors together no more bytes than the header has. */
static int tensors(walk *w, pylora_file *file, place *places, uint64_t n) {
  const size_t begin = w->at;
  char *to = NULL;
  for (int pass = 0; pass < 2; pass++) { /* the names' lengths, then all of it */
    size_t total = 0;
    w->at = begin;
    for (uint64_t i = 0; i < n; i++) {
      pylora_tensor skipped = {0}, *t = pass ? &file->tensor[i] : &skipped;
      const char *name;
      uint64_t bytes, offset;
      TRY(string(w, "a tensor name", &name, &bytes));
      if (memchr(name, 0, (size_t)bytes))
        DAMAGED("%.300s: the tensor name '%.200s' has a zero byte in it", w->file, name);
      t->name = "";
      if (pass) {
        memcpy(to, name, (size_t)bytes);
        t->name = to, to += bytes + 1;
      }
      total += (size_t)bytes + 1;
      if (!pass) { /* its dimensions are read to come to the next name; errors name it in the next pass */
        uint32_t dims;
        const uint8_t *rest;
        TRY(u32(w, "the dimensions of a tensor", &dims));
        TRY(take(w, (dims > MAX_DIMS ? 0 : dims * 8u) + 12u, "a tensor's shape", &rest));
        if (dims > MAX_DIMS) break;
        continue;
      }
      TRY(tensor(w, t, &offset));
      places[i] = (place){offset, t};
    }
    if (!pass) to = file->names = pylora_take(total + n, 1);
    if (!to) return pylora_no_memory(w->why, w->file, (double)total);
  }
  return PYLORA_OK;
}

int pylora_gguf_read(pylora_file *file, pylora_message *why) {
  walk walker = {file->name, file->map.bytes, 4, file->map.size, why}, *w = &walker;
  uint32_t version;
  uint64_t n, pairs, alignment;
  TRY(u32(w, "the version", &version));
  if (version != 2 && version != 3)
    return pylora_fail(why, PYLORA_E_UNSUPPORTED,
                       "%.300s: GGUF of version %u%s is not supported; convert it with llama.cpp's "
                       "tools to version 3, little-endian",
                       file->name, version,
                       version & 0xffff ? "" : " (or of big-endian byte order)");
  TRY(count(w, "the number of tensors", LEAST_TENSOR, &n));
  TRY(count(w, "the number of metadata entries", LEAST_META, &pairs));
  TRY(metadata(w, file, pairs));
  TRY(alignment_of(w, file, &alignment));
  if (n > (w->size - w->at) / LEAST_TENSOR)
    DAMAGED("%.300s: the number of tensors is %llu, more than fit into the %zu bytes that follow",
            w->file, (unsigned long long)n, w->size - w->at);
  file->tensor = pylora_take((size_t)n, sizeof *file->tensor);
  place *places = pylora_take((size_t)n, sizeof *places);
  int status = file->tensor && places
                   ? PYLORA_OK
                   : pylora_no_memory(why, file->name, (double)n * sizeof *file->tensor);
  if (!status) status = tensors(w, file, places, n);
  if (!status) {
    file->tensors = (int64_t)n;
    status = pylora_file_index(file, why);
  }
  const uint64_t start = ((uint64_t)w->at + alignment - 1) & ~(alignment - 1);
  if (!status) status = set_places(w, places, n, start, alignment);
  free(places);
  return status;
}
