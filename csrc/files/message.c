/* message.c - sentences about files, memory for what they hold. */
#include <stdio.h>

#include "files/files.h"

/* Bytes of the well-formed UTF-8 character at p, or 0. */
static size_t character(const unsigned char *p, size_t left) {
  const unsigned c = p[0];
  if (c < 0x80) return 1;
  const size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
  if (c < 0xc2 || c > 0xf4 || n > left) return 0;
  for (size_t i = 1; i < n; i++)
    if ((p[i] & 0xc0) != 0x80) return 0;
  /* too long a form, surrogates, beyond the last character */
  if ((c == 0xe0 && p[1] < 0xa0) || (c == 0xed && p[1] > 0x9f)) return 0;
  if ((c == 0xf0 && p[1] < 0x90) || (c == 0xf4 && p[1] > 0x8f)) return 0;
  return n;
}

int pylora_utf8(const char *text, size_t bytes) {
  const unsigned char *p = (const unsigned char *)text;
  while (bytes) {
    const size_t n = character(p, bytes);
    if (!n) return 0;
    p += n, bytes -= n;
  }
  return 1;
}

void pylora_say(pylora_message *why, const char *format, ...) {
  if (!why) return;
  va_list list;
  va_start(list, format);
  const int wrote = vsnprintf(why->text, sizeof why->text, format, list);
  va_end(list);
  if (wrote < 0) why->text[0] = 0;
  unsigned char *p = (unsigned char *)why->text;
  size_t left = strlen(why->text);
  const int cut = wrote >= (int)sizeof why->text;
  while (left) {
    size_t n = character(p, left);
    if (!n && cut && left < 4) { /* the last character, cut in two */
      *p = 0;
      break;
    }
    if (!n || *p < 0x20 || *p == 0x7f) *p = '?', n = 1;
    p += n, left -= n;
  }
}

int pylora_no_memory(pylora_message *why, const char *where, double bytes) {
  return pylora_fail(why, PYLORA_E_MEMORY, "%.300s: there is no memory for %.0f bytes", where,
                     bytes);
}

pylora_shape_text pylora_shape(int dims, const int64_t *shape) {
  pylora_shape_text out = {"["};
  size_t at = 1;
  for (int i = 0; i < dims && at < 80; i++)
    at += (size_t)snprintf(out.text + at, sizeof out.text - at, "%s%lld", i ? ", " : "",
                           (long long)shape[i]);
  snprintf(out.text + at, sizeof out.text - at, at < 80 ? "]" : ", ...]");
  return out;
}

void *pylora_take(size_t count, size_t size) {
  if (size && count > SIZE_MAX / 2 / size) return NULL;
  return calloc(count && size ? count : 1, count && size ? size : 1);
}

void *pylora_take_aligned(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return NULL;
  char *base = malloc(bytes + PYLORA_ALIGN + sizeof(void *));
  if (!base) return NULL;
  uintptr_t at = (uintptr_t)base + sizeof(void *) + PYLORA_ALIGN - 1;
  at &= ~(uintptr_t)(PYLORA_ALIGN - 1);
  memcpy((char *)at - sizeof(void *), &base, sizeof base);
  return (void *)at;
}

void pylora_give(void *aligned) {
  if (!aligned) return;
  void *base;
  memcpy(&base, (char *)aligned - sizeof(void *), sizeof base);
  free(base);
}
