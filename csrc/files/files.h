/* files.h - what the readers of files share: sentences, a mapped file, bytes in its order, types. */
#ifndef PYLORA_FILES_INTERNAL_H
#define PYLORA_FILES_INTERNAL_H

#include <stdarg.h>
#include <stdlib.h>

#include "pylora_files.h"
#include "runtime/internal.h"

/* ---- sentences (message.c) ---- */

/* Writes the sentence, with everything in it that is not printable UTF-8 made "?". */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void pylora_say(pylora_message *why, const char *format, ...);
/* The same; its value is `status`, which a compiler sees is none of success. */
#define pylora_fail(why, status, ...) (pylora_say(why, __VA_ARGS__), (status))
int pylora_no_memory(pylora_message *why, const char *where, double bytes);
/* Whether the bytes are well-formed UTF-8. */
int pylora_utf8(const char *text, size_t bytes);

/* A shape as "[2, 3]" for a sentence. */
typedef struct pylora_shape_text {
  char text[112];
} pylora_shape_text;
pylora_shape_text pylora_shape(int dims, const int64_t *shape);

/* ---- memory ---- */

/* count * size bytes, zeroed; NULL also where the product overflows.  Never NULL for 0. */
void *pylora_take(size_t count, size_t size);
/* 64-byte aligned, and given back by pylora_give. */
void *pylora_take_aligned(size_t bytes);
void pylora_give(void *aligned);

/* ---- a file in memory (map.c) ---- */

typedef struct pylora_map {
  const uint8_t *bytes;
  size_t size;
  void *handle; /* of the mapping; NULL: the memory is somebody else's */
} pylora_map;

int pylora_map_open(const char *path, pylora_map *out, pylora_message *why);
void pylora_map_close(pylora_map *map);
/* Gives back the pages that lie wholly in these bytes of a mapped file: they count as the process's memory, and come
 * from the file again when somebody looks.  Nothing happens where the memory is somebody else's. */
void pylora_map_forget(const pylora_map *map, const void *p, size_t bytes);
int pylora_is_directory(const char *path);
int pylora_is_file(const char *path);
/* directory + "/" + name, to be freed; NULL: no memory. */
char *pylora_path(const char *directory, const char *name);

/* ---- types of tensors (types.c) ---- */

typedef struct pylora_kind {
  const char *name;
  int32_t number;       /* ggml's; -1: safetensors alone */
  int32_t block, bytes; /* numbers in a block, and its bytes */
  int32_t dtype;        /* what pylora_pack_blocks takes, or PYLORA_F32, _F16, _BF16; -1 */
  void (*decode)(const uint8_t *blocks, int64_t n, float *out); /* NULL: nobody decodes it */
} pylora_kind;

const pylora_kind *pylora_kind_of(int kind); /* pylora_tensor.kind */
int pylora_kind_ggml(uint32_t number);       /* the kind, or -1 */
int pylora_kind_safetensors(const char *name, size_t bytes);
static inline int pylora_is_float(const pylora_tensor *t) {
  const int dtype = pylora_kind_of(t->kind)->dtype;
  return dtype == PYLORA_F32 || dtype == PYLORA_F16 || dtype == PYLORA_BF16;
}

/* pylora_tensor_pack, which forgets what it has packed of the mapped file that the tensor is in (or NULL): else a
 * model would need its file's size twice.  `transposed`: the file has numbers [k,d]. (tensor.c) */
int pylora_tensor_pack_from(const pylora_map *map, const pylora_tensor *t, int dtype, int64_t heads,
                            int transposed, void *buffer, pylora_packed *out, pylora_message *why);

/* ---- an open file (open.c) ---- */

/* A value of GGUF's metadata, where it lies. */
typedef struct pylora_meta {
  const char *key;
  size_t key_bytes;
  const uint8_t *value; /* of an array: its first element */
  uint64_t count;       /* elements of an array, bytes of a text, else 1 */
  uint32_t type;        /* GGUF's number; of an array: that of its elements */
  int32_t array;
} pylora_meta;

struct pylora_file {
  pylora_map map;
  char *name; /* for sentences */
  int gguf;
  int64_t tensors, metas;
  pylora_tensor *tensor; /* in the file's order */
  int64_t *by_name;      /* their numbers, sorted */
  pylora_meta *meta;     /* sorted by key */
  char *names;           /* all names, each terminated by a zero */
};

int pylora_gguf_read(pylora_file *file, pylora_message *why);
int pylora_safetensors_read(pylora_file *file, pylora_message *why);
const pylora_meta *pylora_file_meta(const pylora_file *file, const char *key);
/* Sorts by_name; PYLORA_E_FILE where a name occurs twice. */
int pylora_file_index(pylora_file *file, pylora_message *why);

/* ---- numbers in the file's byte order ---- */

static inline uint16_t load16(const uint8_t *p) {
  uint16_t v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline uint32_t load32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline uint64_t load64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* The file's row of row i of d in Hugging Face's order.  heads > 0: of each head of n rows llama.cpp's converter puts
 * row j n/2 + i to 2 i + j, for the interleaved rotation.  heads < 0: of one projection whose heads have q, k and v
 * each, -heads of them, it puts all q first, then all k, then all v.  0: the rows are where they were. */
static inline int64_t pylora_source_row(int64_t d, int64_t heads, int64_t i) {
  if (!heads) return i;
  if (heads < 0) {
    const int64_t n = d / -heads / 3;
    return i / n % 3 * (d / 3) + i / (3 * n) * n + i % n;
  }
  const int64_t n = d / heads, in = i % n;
  return i - in + in % (n / 2) * 2 + in / (n / 2);
}

/* All axes but the last, and the last; a scalar is [1, 1]. */
static inline int64_t pylora_columns(const pylora_tensor *t) {
  return t->dims ? t->shape[t->dims - 1] : 1;
}
static inline int64_t pylora_rows(const pylora_tensor *t) {
  int64_t n = t->bytes > 0; /* without numbers it has no rows: the other axes may be of any size */
  for (int i = 0; i + 1 < t->dims; i++) n *= t->shape[i];
  return n;
}

#endif
