/* config.h - config.json as its readers see it: a key, a number, a sentence that names the file. */
#ifndef PYLORA_CONFIG_INTERNAL_H
#define PYLORA_CONFIG_INTERNAL_H

#include "files/json.h"
#include "files/model.h"

typedef struct config {
  const char *path;
  pylora_json j;
  pylora_message *why;
} config;

#define REFUSE(...) return pylora_fail(c->why, PYLORA_E_UNSUPPORTED, __VA_ARGS__)
#define WRONG(...) return pylora_fail(c->why, PYLORA_E_FILE, __VA_ARGS__)

/* A member that is there and not null. */
static inline const pylora_json_value *in(const config *c, const pylora_json_value *object,
                                          const char *key) {
  const pylora_json_value *v = pylora_json_member(&c->j, object, key);
  return v && v->type != JSON_NULL ? v : NULL;
}
static inline const pylora_json_value *get(const config *c, const char *key) {
  return in(c, c->j.value, key);
}
static inline int is_text(const pylora_json_value *v, const char *text) {
  return json_is(v, JSON_TEXT) && strcmp(v->u.text, text) == 0;
}

/* A whole number: `missing` where the key is not there, `null` where it is null; -1: an error. */
static inline int whole(const config *c, const char *key, int64_t missing, int64_t null,
                        int64_t *out) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  *out = !v ? missing : null;
  if (v && v->type != JSON_NULL) {
    if (v->type != JSON_NUMBER || !v->is_whole || v->u.whole < 0)
      WRONG("%.300s: %s must be a whole number from 0 on", c->path, key);
    *out = v->u.whole;
  }
  if (*out < 0) WRONG("%.300s: the key '%s' is missing", c->path, key);
  return PYLORA_OK;
}

static inline int flag(const config *c, const char *key, int otherwise, int *out) {
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, key);
  *out = v ? v->type == JSON_TRUE : otherwise;
  if (v && v->type != JSON_TRUE && v->type != JSON_FALSE)
    WRONG("%.300s: %s must be true or false", c->path, key);
  return PYLORA_OK;
}

static inline int number(const config *c, const pylora_json_value *v, const char *key,
                         double *out) {
  if (v->type != JSON_NUMBER) WRONG("%.300s: %s must be a number", c->path, key);
  *out = json_number(v);
  return PYLORA_OK;
}

/* From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`; `theta` where there is none. (config_rope.c) */
int pylora_config_rope(const config *c, pylora_settings *s, double theta);
/* null or 1: anything else would turn a part of each head only. */
int pylora_config_whole_head(const config *c, const pylora_json_value *object);

#endif
