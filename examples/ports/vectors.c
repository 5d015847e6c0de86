/* vectors.c - reads what `pylora vectors` wrote. The manifest has one form, so
 * no parser is needed: a case begins with a line "  {", and its parts stand in one order. */
#include "vectors.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *folder;
static char *manifest, *rest; /* rest: where the next case begins, or NULL */

const char *folder_of(const char *inside) {
  const size_t n = strlen(folder) + strlen(inside) + 2;
  char *path = take(n);
  snprintf(path, n, "%s/%s", folder, inside);
  return path;
}

void open_vectors(const char *path) {
  size_t size;
  folder = path;
  const char *text = read_file(folder_of("manifest.json"), &size);
  if (!text) stop(path, "has no manifest.json");
  after(text, "\"format\": \"pylora-vectors\"");
  if (strtol(after(text, "\"version\": "), NULL, 10) != 1) stop(path, "is not version 1");
  if (!(manifest = malloc(size + 1))) stop(path, "is too large");
  memcpy(manifest, text, size + 1);
  rest = strstr(manifest, "\n  {\n");
  release();
}

/* A copy of the text from `at` to the next quote. */
static char *quoted(const char *at) {
  const size_t n = strcspn(at, "\"");
  return memcpy(take(n + 1), at, n);
}

int next_case(testcase *c) {
  if (!rest) return 0;
  char *text = rest + 1;
  if ((rest = strstr(text, "\n  {\n"))) *rest = 0; /* nothing is found beyond the case */
  char *params = strstr(text, "\"params\": "), *inputs = strstr(text, "\"inputs\": {");
  char *outputs = strstr(text, "\"outputs\": {");
  if (!params || inputs < params || outputs < inputs) stop("manifest.json", "has another form");
  params[-1] = inputs[-1] = outputs[-1] = 0;
  *c = (testcase){.params = params, .inputs = inputs, .outputs = outputs};
  c->name = quoted(after(text, "\"name\": \"")), c->op = quoted(after(text, "\"op\": \""));
  return 1;
}

/* ---- parameters and arrays --------------------------------------------------------------- */

/* Where the value of `key` begins in a part of a case; NULL if it has none. */
const char *value(const char *part, const char *key) {
  char name[128];
  snprintf(name, sizeof name, "\"%s\": ", key);
  const char *found = strstr(part, name);
  return found ? found + strlen(name) : NULL;
}

static const char *parameter(const testcase *c, const char *key) {
  const char *found = value(c->params, key);
  if (!found) stop(c->name, key);
  return found;
}

int has(const testcase *c, const char *key) { return value(c->params, key) != NULL; }
int truth(const testcase *c, const char *key) { return *parameter(c, key) == 't'; }
double number(const testcase *c, const char *key) { return strtod(parameter(c, key), NULL); }
const char *string(const testcase *c, const char *key) { return quoted(parameter(c, key) + 1); }
uint64_t word64(const testcase *c, const char *key) {
  return strtoull(parameter(c, key) + 1, NULL, 10); /* behind the quote */
}

double *numbers(const testcase *c, const char *key, int64_t *n) {
  const char *at = parameter(c, key);
  double *list = take(64 * sizeof *list);
  char *end;
  for (*n = 0; *at != ']' && *n < 64; at = end + strcspn(end, ",]"))
    list[(*n)++] = strtod(at + 1, &end);
  return list;
}

int64_t *integers(const testcase *c, const char *key, int64_t *n) {
  const char *at = parameter(c, key);
  int64_t *list = take(64 * sizeof *list);
  char *end;
  for (*n = 0; *at != ']' && *n < 64; at = end + strcspn(end, ",]"))
    list[(*n)++] = strtoll(at + 1, &end, 10);
  return list;
}

/* The entry of an array, alone; NULL if the list has none of this name. */
const char *entry_of(const char *list, const char *name) {
  const char *found = value(list, name), *end = found ? strstr(found, "\n    }") : NULL;
  return end ? memcpy(take((size_t)(end - found) + 1), found, (size_t)(end - found)) : NULL;
}

/* The array of an entry. Its size and SHA-256 must be right. */
array read_array(const char *entry) {
  const char *file = quoted(after(entry, "\"file\": \"")), *shape = after(entry, "\"shape\": [");
  const char *digest = after(entry, "\"sha256\": \"");
  array a = {.dtype = quoted(after(entry, "\"dtype\": \""))};
  a.size = strtoull(a.dtype + 1, NULL, 10) / 8;
  char *end, hex[65];
  const int64_t first = strtoll(shape, &end, 10), two = *end == ',';
  a.rows = two ? first : 1;
  a.cols = two ? strtoll(end + 1, NULL, 10) : first;
  size_t bytes;
  unsigned char sum[32];
  if (!(a.p = read_file(folder_of(file), &bytes))) stop(file, "is missing");
  sha256(a.p, bytes, sum);
  for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", sum[i]);
  if (bytes != (size_t)a.rows * (size_t)a.cols * a.size || strncmp(hex, digest, 64))
    stop(file, "was changed");
  return a;
}

array input(const testcase *c, const char *name) {
  const char *entry = entry_of(c->inputs, name);
  return entry ? read_array(entry) : (array){0};
}

array typed(const testcase *c, const char *name, const char *dtype) {
  const array a = input(c, name);
  if (!a.p || strcmp(a.dtype, dtype)) stop(name, "is not an input of this dtype");
  return a;
}

pylora_mat in(const testcase *c, const char *name) {
  const array a = typed(c, name, "f32");
  return (pylora_mat){a.p, a.rows, a.cols, a.cols, NULL, NULL};
}

int listed(const testcase *c, const char *name) { return entry_of(c->outputs, name) != NULL; }

array output(const testcase *c, const char *name) {
  const char *entry = entry_of(c->outputs, name);
  if (!entry) stop(name, "is not an output of the case");
  return read_array(entry);
}

void close_vectors(void) { free(manifest); }
