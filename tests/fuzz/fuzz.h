/* fuzz.h - what the fuzzers share: a file that is bytes in memory and has a path, and what must hold of an error. */
#ifndef FUZZ_H
#define FUZZ_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "files/adapter.h"

#define MUST(condition)                                                             \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      abort();                                                                      \
    }                                                                               \
  } while (0)

/* An error has a status that is known and a sentence in printable UTF-8; a success has none. */
static inline void check_message(int status, const pylora_message *why) {
  const size_t n = strnlen(why->text, sizeof why->text);
  MUST(n < sizeof why->text && pylora_utf8(why->text, n));
  for (size_t i = 0; i < n; i++) MUST((unsigned char)why->text[i] >= 0x20);
  MUST(status ? n > 0 : n == 0);
  MUST(status == PYLORA_OK || status == PYLORA_E_FILE || status == PYLORA_E_UNSUPPORTED ||
       status == PYLORA_E_MEMORY || status == PYLORA_E_PLAN || status == PYLORA_E_SHAPE ||
       status == PYLORA_E_INDEX || status == PYLORA_E_VALUE);
}

/* A path whose file holds these bytes until the next call. */
static inline const char *path_of(const uint8_t *bytes, size_t size) {
  static char path[64];
  static int file = -1;
  if (file >= 0) close(file);
  file = memfd_create("fuzz", MFD_CLOEXEC);
  MUST(file >= 0 && write(file, bytes, size) == (ssize_t)size);
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  return path;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

#endif
