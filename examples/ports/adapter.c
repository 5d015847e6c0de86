/* adapter.c - reads one linear module out of a PEFT directory: statements K and S of docs/spec.md.
 *
 * It knows the one form in which PEFT and pylora write these files, so it needs no JSON parser, and
 * refuses what it does not carry out: patterns, biases, DoRA, other dtypes than float32. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "port.h"

void *read_file(const char *path, size_t *size) {
  FILE *f = fopen(path, "rb");
  if (!f) return NULL;
  if (fseek(f, 0, SEEK_END)) stop(path, "cannot be read");
  const long n = ftell(f);
  if (n < 0) stop(path, "cannot be read");
  char *data = take((size_t)n + 1);
  rewind(f);
  if (fread(data, 1, (size_t)n, f) != (size_t)n) stop(path, "cannot be read");
  fclose(f);
  if (size) *size = (size_t)n;
  return data;
}

const char *after(const char *text, const char *key) {
  const char *found = strstr(text, key);
  if (!found) stop(key, "is not in the file");
  return found + strlen(key);
}

/* One tensor [rows, cols] of a safetensors file: its place and size are checked (K-7). */
static pylora_mat tensor(const char *data, size_t size, const char *path, const char *which,
                         int64_t rows, int64_t cols) {
  char key[256], *end;
  uint64_t header = 0;
  for (int i = 7; i >= 0; i--) header = header << 8 | (unsigned char)data[i];
  snprintf(key, sizeof key, "\"base_model.model.%s.%s.weight\":{\"dtype\":\"F32\"", path, which);
  const char *at = after(after(data + 8, key), "\"data_offsets\":[");
  const uint64_t from = strtoull(at, &end, 10), to = *end ? strtoull(end + 1, NULL, 10) : 0;
  const uint64_t row = (uint64_t)cols * sizeof(float);
  if (header > size - 8 || from > to || to > size - 8 - header || (to - from) % row ||
      (to - from) / row != (uint64_t)rows)
    stop(key, "does not have the shape that the settings say");
  const pylora_mat a = zeros(rows, cols);
  memcpy(a.p, data + 8 + header + from, to - from);
  for (int64_t i = 0; i < rows * cols; i++)
    if (!isfinite(a.p[i])) stop(key, "has a number that is not finite"); /* K-4 */
  return a;
}

adapter load_adapter(const char *folder, const char *path, int64_t d, int64_t k) {
  char file[512];
  size_t size;
  snprintf(file, sizeof file, "%s/adapter_config.json", folder);
  const char *settings = read_file(file, NULL);
  if (!settings) stop(file, "is missing");
  if (strstr(settings, "\"use_dora\": true")) stop(file, "use_dora is not supported"); /* K-6 */
  after(settings, "\"rank_pattern\": {}"), after(settings, "\"alpha_pattern\": {}");
  after(settings, "\"bias\": \"none\""), after(settings, "\"lora_bias\": false");
  const int64_t r = strtoll(after(settings, "\"r\": "), NULL, 10);
  const double alpha = strtod(after(settings, "\"lora_alpha\": "), NULL);
  const int rslora = !strncmp(after(settings, "\"use_rslora\": "), "true", 4);
  if (r < 1 || r > 1 << 20) stop(file, "r is not a rank");
  snprintf(file, sizeof file, "%s/adapter_model.safetensors", folder);
  const char *data = read_file(file, &size);
  if (!data || size < 8) stop(file, "is missing or cut off");
  adapter a = {.A = tensor(data, size, path, "lora_A", r, k)};
  a.B = tensor(data, size, path, "lora_B", d, r);
  a.s = (float)(rslora ? alpha / sqrt((double)r) : alpha / (double)r); /* S-1, S-5 */
  return a;
}
