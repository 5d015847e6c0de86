/* config_meta.h - GGUF's metadata as their readers see them: a value below the architecture's name, or a sentence. */
#ifndef PYLORA_CONFIG_META_H
#define PYLORA_CONFIG_META_H

#include <math.h>
#include <stdio.h>

#include "files/model.h"

typedef struct meta {
  const pylora_file *file; /* the first, which has the metadata */
  const pylora_files *files;
  char arch[16];
  pylora_message *why;
} meta;

typedef struct key {
  char text[80];
} key;

static inline key key_of(const meta *m, const char *name) {
  key k;
  snprintf(k.text, sizeof k.text, "%s.%s", m->arch, name);
  return k;
}

static inline int has(const meta *m, const char *name) {
  return pylora_file_meta(m->file, key_of(m, name).text) != NULL;
}

static inline int wrong(const meta *m, const char *name, const char *kind) {
  return pylora_fail(m->why, PYLORA_E_UNSUPPORTED,
                     "%.300s: %s is not one %s; values that differ from layer to layer are not "
                     "supported",
                     m->file->name, key_of(m, name).text, kind);
}

/* A whole number; where the key is missing, `otherwise`, or an error where that is negative. */
static inline int whole(const meta *m, const char *name, int64_t otherwise, int64_t *out) {
  if (pylora_file_whole(m->file, key_of(m, name).text, out)) return PYLORA_OK;
  if (has(m, name)) return wrong(m, name, "whole number");
  if (otherwise < 0)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: the metadata lack %s", m->file->name,
                       key_of(m, name).text);
  *out = otherwise;
  return PYLORA_OK;
}

/* The file holds float32; the shortest decimal that gives it is what the author wrote. */
static inline double shortest(double value) {
  const float f = (float)value;
  char text[40];
  if (!isfinite(f)) return (double)f;
  for (int digits = 1; digits <= 9; digits++) {
    snprintf(text, sizeof text, "%.*e", digits - 1, (double)f);
    if (strtof(text, NULL) == f) return strtod(text, NULL);
  }
  return (double)f;
}

/* A number; where the key is missing, `otherwise`, or an error where that is negative. */
static inline int real(const meta *m, const char *name, double otherwise, double *out) {
  double value;
  if (pylora_file_real(m->file, key_of(m, name).text, &value)) {
    *out = shortest(value);
    return PYLORA_OK;
  }
  if (has(m, name)) return wrong(m, name, "number");
  if (otherwise < 0)
    return pylora_fail(m->why, PYLORA_E_FILE, "%.300s: the metadata lack %s", m->file->name,
                       key_of(m, name).text);
  *out = otherwise;
  return PYLORA_OK;
}

/* true or false; 0: it is something else. */
static inline int truth(const meta *m, const char *name, int *out) {
  const pylora_meta *v = pylora_file_meta(m->file, key_of(m, name).text);
  if (!v || v->array || v->type != 7) return 0;
  *out = v->value[0] != 0;
  return 1;
}

/* A number that is there, or `otherwise`. */
static inline int maybe(const meta *m, const char *name, double otherwise, double *out) {
  if (has(m, name)) return real(m, name, 0, out);
  *out = otherwise;
  return PYLORA_OK;
}

/* The scaling of rotations, from the metadata and from tensors of factors. (config_gguf_rope.c) */
int pylora_meta_rope(const meta *m, pylora_settings *s);

#endif
