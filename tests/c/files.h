/* files.h - files put together byte by byte, for tests of what reads them. */
#ifndef TEST_FILES_H
#define TEST_FILES_H

#include "check.h"
#include "files/adapter.h"

/* Bytes that grow. */
typedef struct bytes {
  uint8_t p[1 << 16];
  size_t n;
} bytes;

static inline void put(bytes *b, const void *from, size_t n) {
  if (b->n + n > sizeof b->p) abort();
  memcpy(b->p + b->n, from, n);
  b->n += n;
}
static inline void put32(bytes *b, uint32_t v) { put(b, &v, 4); }
static inline void put64(bytes *b, uint64_t v) { put(b, &v, 8); }
static inline void put_text(bytes *b, const char *text) {
  put64(b, strlen(text));
  put(b, text, strlen(text));
}
static inline void put_zeros(bytes *b, size_t alignment) {
  while (b->n % alignment) put(b, "", 1);
}

/* ---- GGUF ---- */

static inline void gguf_begin(bytes *b, uint64_t tensors, uint64_t pairs) {
  b->n = 0;
  put(b, "GGUF", 4);
  put32(b, 3);
  put64(b, tensors);
  put64(b, pairs);
}
static inline void meta_text(bytes *b, const char *key, const char *text) {
  put_text(b, key);
  put32(b, 8);
  put_text(b, text);
}
static inline void meta_u32(bytes *b, const char *key, uint32_t value) {
  put_text(b, key);
  put32(b, 4);
  put32(b, value);
}
static inline void meta_f32(bytes *b, const char *key, float value) {
  put_text(b, key);
  put32(b, 6);
  put(b, &value, 4);
}
/* Rows and columns; rows = 0: a vector. */
static inline void tensor_entry(bytes *b, const char *name, uint64_t rows, uint64_t cols,
                                uint32_t type, uint64_t offset) {
  put_text(b, name);
  put32(b, rows ? 2 : 1);
  put64(b, cols);
  if (rows) put64(b, rows);
  put32(b, type);
  put64(b, offset);
}

/* ---- safetensors ---- */

static inline void safetensors(bytes *b, const char *header, size_t data) {
  b->n = 0;
  put64(b, strlen(header));
  put(b, header, strlen(header));
  for (size_t i = 0; i < data; i++) put(b, &(uint8_t){(uint8_t)(i * 7)}, 1);
}

/* ---- opening ---- */

/* Opens a copy of the first n bytes that is allocated to the byte, so that a sanitizer sees a step outside; it and
 * the message stay until the next call. */
static pylora_message why;
static inline int open_bytes(const bytes *b, size_t n, pylora_file **out) {
  static uint8_t *copy;
  free(copy);
  copy = malloc(n ? n : 1);
  if (!copy) abort();
  memcpy(copy, b->p, n);
  *out = NULL;
  const int status = pylora_file_open_memory("bytes", copy, n, out, &why);
  EXPECT(!status == !why.text[0] && !status == (*out != NULL), "%s", why.text);
  EXPECT(pylora_utf8(why.text, strlen(why.text)));
  return status;
}

/* The status, and a piece of the sentence. */
#define REFUSED(wanted, b, piece)                                           \
  do {                                                                      \
    pylora_file *file_;                                                     \
    const int got_ = open_bytes((b), (b)->n, &file_);                       \
    EXPECT(got_ == (wanted), "%s: %s", pylora_status_text(got_), why.text); \
    EXPECT(strstr(why.text, piece), "the sentence is \"%s\"", why.text);    \
    pylora_file_close(file_);                                               \
  } while (0)

#endif
