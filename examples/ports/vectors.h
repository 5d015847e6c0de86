/* vectors.h - reads the golden vectors and compares with them. For one source file a program. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pylora.h"

static const char *folder;
static char *manifest;
static int checked, failed;
static _Alignas(64) char workspace[1 << 20];

static void stop(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

static void must(int status) {
  if (status != PYLORA_OK) stop("pylora", pylora_status_text(status));
}

/* A whole file with a 0 behind it, or NULL if there is none; *size may be NULL. */
static void *read_file(const char *name, size_t *size) {
  char path[512];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *f = fopen(path, "rb");
  if (!f) return NULL;
  fseek(f, 0, SEEK_END);
  const size_t n = (size_t)ftell(f);
  char *data = calloc(n + 1, 1);
  rewind(f);
  if (!data || fread(data, 1, n, f) != n) stop(path, "cannot be read");
  fclose(f);
  if (size) *size = n;
  return data;
}

/* Where `key` ends in a text. The vectors' JSON has one form, so no parser is needed. */
static const char *after(const char *text, const char *key) {
  const char *found = text ? strstr(text, key) : NULL;
  if (!found) stop(key, "is not in the file");
  return found + strlen(key);
}

static const char *entry(const char *name) {
  char key[128];
  snprintf(key, sizeof key, "\"name\": \"%s\"", name);
  return after(manifest, key);
}

static double number(const char *name, const char *key) {
  char quoted[64];
  snprintf(quoted, sizeof quoted, "\"%s\": ", key);
  return strtod(after(entry(name), quoted), NULL);
}

static inline uint64_t word64(const char *name, const char *key) { /* 64-bit numbers are text */
  char quoted[64];
  snprintf(quoted, sizeof quoted, "\"%s\": \"", key);
  return strtoull(after(entry(name), quoted), NULL, 10);
}

typedef struct array {
  void *p;
  size_t bytes;
  int64_t rows, cols; /* a vector has one row */
} array;

static array input(const char *name, const char *what) {
  char file[128], key[64], *end;
  snprintf(file, sizeof file, "%s/%s.bin", name, what);
  snprintf(key, sizeof key, "\"%s\": {", what);
  array a = {0};
  if (!(a.p = read_file(file, &a.bytes))) return a;
  const char *shape = after(after(entry(name), key), "\"shape\": [");
  const int64_t first = strtoll(shape, &end, 10), two = *end == ',';
  a.rows = two ? first : 1;
  a.cols = two ? strtoll(end + 1, NULL, 10) : first;
  return a;
}

static pylora_mat mat(array a) { return (pylora_mat){a.p, a.rows, a.cols, a.cols}; }
static pylora_mat zeros(int64_t rows, int64_t cols) {
  return (pylora_mat){calloc((size_t)(rows * cols) + 1, sizeof(float)), rows, cols, cols};
}

/* Compares with an output of a case: within its bounds, or bit for bit where it has none. */
static void check(const char *name, const char *what, const void *got) {
  char file[128];
  size_t bytes = 0, bad = 0;
  snprintf(file, sizeof file, "%s/%s.bin", name, what);
  const double *want = read_file(file, &bytes);
  if (!want) stop(file, "is missing");
  snprintf(file, sizeof file, "%s/%s.bound.bin", name, what);
  const double *bound = read_file(file, NULL);
  if (!bound) bad = memcmp(got, want, bytes) != 0;
  for (size_t i = 0; bound && i < bytes / sizeof *want; i++)
    bad += !(fabs(((const float *)got)[i] - want[i]) <= bound[i]);
  checked++;
  if (bad) fprintf(stderr, "%s/%s: %zu numbers are wrong\n", name, what, bad), failed++;
}

static pylora_packed pack(pylora_mat W) {
  pylora_packed P;
  must(pylora_pack(&W, malloc(pylora_pack_bytes(W.rows, W.cols) + 1), &P));
  return P;
}

/* Opens the folder that the command line names. */
static void open_vectors(int argc, char **argv) {
  folder = argc > 1 ? argv[1] : "vectors";
  if (!(manifest = read_file("manifest.json", NULL))) stop(folder, "has no manifest.json");
  after(manifest, "\"format\": \"pylora-vectors\"");
  if (strtol(after(manifest, "\"version\": "), NULL, 10) != 1) stop(folder, "is not version 1");
}

static int report(void) {
  printf("%d arrays checked, %d wrong\n", checked, failed);
  return failed != 0;
}
