/* json.h - a small, strict JSON reader (RFC 8259): the whole text, or a sentence.
 *
 * Not read: repeated keys, texts with a zero or half a surrogate pair, nesting deeper than PYLORA_JSON_DEPTH,
 * numbers that double cannot hold, NaN and Infinity, comments, trailing commas.  Memory is in proportion to the
 * text; values are a flat array in the order of the text. */
#ifndef PYLORA_JSON_H
#define PYLORA_JSON_H

#include "files/files.h"

enum { PYLORA_JSON_DEPTH = 64 };

typedef enum pylora_json_type {
  JSON_NULL,
  JSON_FALSE,
  JSON_TRUE,
  JSON_NUMBER,
  JSON_TEXT,
  JSON_LIST,
  JSON_OBJECT,
} pylora_json_type;

typedef struct pylora_json_value {
  uint8_t type;
  uint8_t is_whole; /* written without point and exponent, and int64_t holds it */
  int32_t items;    /* of a list or an object */
  const char *key;  /* of a member of an object; else NULL */
  int64_t next;     /* number of the value behind this one and all that is in it */
  union {
    const char *text; /* ends with a zero; there is none inside */
    int64_t whole;
    double number; /* unless is_whole */
  } u;
} pylora_json_value;

typedef struct pylora_json {
  char *text;
  pylora_json_value *value; /* value[0] is the whole */
  int64_t values;
} pylora_json;

/* Parses `bytes` of text; `where` begins the sentence of an error.  PYLORA_E_FILE or PYLORA_E_MEMORY; `out` is
 * to be freed in each case. */
int pylora_json_parse(const char *text, size_t bytes, const char *where, pylora_json *out,
                      pylora_message *why);
/* The same of a file of at most `limit` bytes. */
int pylora_json_file(const char *path, size_t limit, pylora_json *out, pylora_message *why);
void pylora_json_free(pylora_json *json);

/* for (each item of a list or an object v of j) */
#define JSON_EACH(item, j, v)                                                               \
  for (const pylora_json_value *item = (v) + 1, *const item##_end = (j)->value + (v)->next; \
       item < item##_end; item = (j)->value + item->next)

/* The member of an object, or NULL. */
const pylora_json_value *pylora_json_member(const pylora_json *j, const pylora_json_value *object,
                                            const char *key);
static inline int json_is(const pylora_json_value *v, pylora_json_type type) {
  return v && v->type == type;
}
static inline double json_number(const pylora_json_value *v) {
  return v->is_whole ? (double)v->u.whole : v->u.number;
}
/* null, false, 0, "", [] or {}: what stands for "not set" */
int pylora_json_empty(const pylora_json_value *v);

#endif
