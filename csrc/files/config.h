/* config.h - config.json as its readers see it: a key, a number, a sentence that names the file. */
#ifndef PYLORA_CONFIG_INTERNAL_H
#define PYLORA_CONFIG_INTERNAL_H

#include "files/json.h"
#include "files/model.h"

typedef struct config {
  const char *path;
  pylora_json j;
  pylora_message *why;
  pylora_family family; /* whose names its keys have */
} config;

#define REFUSE(...) return pylora_fail(c->why, PYLORA_E_UNSUPPORTED, __VA_ARGS__)
#define WRONG(...) return pylora_fail(c->why, PYLORA_E_FILE, __VA_ARGS__)

/* What a family calls a key that others have, too; the key itself where it has no other name. (config_family.c) */
const char *pylora_config_alias(pylora_family family, const char *key);
/* The value of a key, null among them; NULL: it is not there. */
static inline const pylora_json_value *value_of(const config *c, const char *key) {
  const char *own = pylora_config_alias(c->family, key);
  const pylora_json_value *v = pylora_json_member(&c->j, c->j.value, own);
  return v || own == key ? v : pylora_json_member(&c->j, c->j.value, key);
}

/* A member that is there and not null. */
static inline const pylora_json_value *in(const config *c, const pylora_json_value *object,
                                          const char *key) {
  const pylora_json_value *v = pylora_json_member(&c->j, object, key);
  return v && v->type != JSON_NULL ? v : NULL;
}
static inline const pylora_json_value *get(const config *c, const char *key) {
  const pylora_json_value *v = value_of(c, key);
  return v && v->type != JSON_NULL ? v : NULL;
}
static inline int is_text(const pylora_json_value *v, const char *text) {
  return json_is(v, JSON_TEXT) && strcmp(v->u.text, text) == 0;
}

/* A whole number: `missing` where the key is not there, `null` where it is null; -1: an error. */
static inline int whole(const config *c, const char *key, int64_t missing, int64_t null,
                        int64_t *out) {
  const pylora_json_value *v = value_of(c, key);
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
  const pylora_json_value *v = value_of(c, key);
  *out = v && v->type != JSON_NULL ? v->type == JSON_TRUE : otherwise;
  if (v && v->type != JSON_NULL && v->type != JSON_TRUE && v->type != JSON_FALSE)
    WRONG("%.300s: %s must be true or false", c->path, key);
  return PYLORA_OK;
}

static inline int number(const config *c, const pylora_json_value *v, const char *key,
                         double *out) {
  if (v->type != JSON_NUMBER) WRONG("%.300s: %s must be a number", c->path, key);
  *out = json_number(v);
  return PYLORA_OK;
}

/* A whole number from 1 on. */
static inline int positive(const config *c, const char *key, int64_t missing, int64_t *out) {
  TRY(whole(c, key, missing, missing, out));
  if (*out < 1) WRONG("%.300s: %s must be from 1 on", c->path, key);
  return PYLORA_OK;
}

/* From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`; `theta` where there is none, and the part
 * of a head that is rotated, `partial` where the file says nothing. (config_rope.c) */
int pylora_config_rope(const config *c, pylora_settings *s, double theta, double partial);
/* Whether a family may rotate a part of each head only. */
int pylora_config_partial(pylora_family family);
/* Keys of a family's own, and layers that differ. (config_family.c) */
int pylora_config_own(const config *c, pylora_settings *s);

#endif
