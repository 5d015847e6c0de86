/* json.c - see json.h.  Two passes: the first counts values, so that one allocation holds them all. */
#include <locale.h>
#include <math.h>

#include "files/json.h"

typedef struct reader {
  char *p, *end, *begin; /* *end is 0 */
  pylora_json *out;
  const char *where;
  pylora_message *why;
  int64_t n;
} reader;

static int bad(reader *r, const char *what) {
  return pylora_fail(r->why, PYLORA_E_FILE, "%.300s: not valid JSON: %s at byte %lld", r->where,
                     what, (long long)(r->p - r->begin));
}

static void space(reader *r) {
  while (*r->p == ' ' || *r->p == '\t' || *r->p == '\n' || *r->p == '\r') r->p++;
}

/* ---- texts ---- */

static int hex4(const char *p, unsigned *out) {
  *out = 0;
  for (int i = 0; i < 4; i++) {
    const char c = p[i];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return 0; /* also the zero at the end of the text */
    *out = *out << 4 | (unsigned)digit;
  }
  return 1;
}

static char *put_utf8(char *to, unsigned c) {
  if (c < 0x80) {
    *to++ = (char)c;
  } else if (c < 0x800) {
    *to++ = (char)(0xc0 | c >> 6);
    *to++ = (char)(0x80 | (c & 63));
  } else if (c < 0x10000) {
    *to++ = (char)(0xe0 | c >> 12);
    *to++ = (char)(0x80 | (c >> 6 & 63));
    *to++ = (char)(0x80 | (c & 63));
  } else {
    *to++ = (char)(0xf0 | c >> 18);
    *to++ = (char)(0x80 | (c >> 12 & 63));
    *to++ = (char)(0x80 | (c >> 6 & 63));
    *to++ = (char)(0x80 | (c & 63));
  }
  return to;
}

/* What follows a backslash, decoded to *to; r->p is behind it then. */
static int escape(reader *r, char **to) {
  static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
  const char c = *r->p;
  const char *found = c ? strchr(from, c) : NULL;
  if (found) {
    *(*to)++ = into[found - from];
    r->p++;
    return PYLORA_OK;
  }
  unsigned u, low;
  if (c != 'u' || !hex4(r->p + 1, &u)) return bad(r, "an unknown escape");
  r->p += 5;
  if (u >= 0xd800 && u < 0xe000) {
    if (u >= 0xdc00 || r->p[0] != '\\' || r->p[1] != 'u' || !hex4(r->p + 2, &low) || low < 0xdc00 ||
        low > 0xdfff)
      return bad(r, "half a surrogate pair");
    u = 0x10000 + ((u & 0x3ff) << 10) + (low & 0x3ff);
    r->p += 6;
  }
  if (u == 0) return bad(r, "a zero in a text");
  *to = put_utf8(*to, u); /* never longer than the escape */
  return PYLORA_OK;
}

/* A text, decoded where it stands: it only gets shorter. */
static int text(reader *r, const char **out) {
  char *to = ++r->p;
  *out = to;
  while (*r->p != '"') {
    const unsigned char c = (unsigned char)*r->p;
    if (c < 0x20) return bad(r, r->p == r->end ? "a text without an end" : "a control character");
    if (c == '\\') {
      r->p++;
      TRY(escape(r, &to));
    } else {
      *to++ = *r->p++;
    }
  }
  *to = 0; /* at most where the quotation mark was */
  r->p++;
  return PYLORA_OK;
}

/* ---- numbers ---- */

static int digits(reader *r) {
  const char *before = r->p;
  while (*r->p >= '0' && *r->p <= '9') r->p++;
  return r->p > before;
}

static int number(reader *r, pylora_json_value *v) {
  char *first = r->p;
  v->type = JSON_NUMBER;
  if (*r->p == '-') r->p++;
  const int zero = *r->p == '0';
  const char *start = r->p;
  if (!digits(r) || (zero && r->p - start > 1)) return bad(r, "a number that is none");
  v->is_whole = 1;
  if (*r->p == '.') {
    v->is_whole = 0, r->p++;
    if (!digits(r)) return bad(r, "a number that is none");
  }
  if (*r->p == 'e' || *r->p == 'E') {
    v->is_whole = 0, r->p++;
    if (*r->p == '+' || *r->p == '-') r->p++;
    if (!digits(r)) return bad(r, "a number that is none");
  }
  if (v->is_whole && r->p - start <= 19) { /* UINT64_MAX has 20 digits */
    uint64_t u = 0;
    for (const char *p = start; p < r->p; p++) u = u * 10 + (uint64_t)(*p - '0');
    if (u <= INT64_MAX) {
      v->u.whole = *first == '-' ? -(int64_t)u : (int64_t)u;
      return PYLORA_OK;
    }
  }
  v->is_whole = 0;
  /* strtod reads the decimal point of the program's locale, and goes no further than it is let. */
  char copy[400];
  const size_t n = (size_t)(r->p - first);
  if (n >= sizeof copy) return bad(r, "a number of too many digits");
  memcpy(copy, first, n);
  copy[n] = 0;
  char *point = strchr(copy, '.');
  if (point) *point = *localeconv()->decimal_point;
  v->u.number = strtod(copy, NULL);
  return isfinite(v->u.number) ? PYLORA_OK : bad(r, "a number that is too large");
}

/* ---- values ---- */

static int word(reader *r, const char *w) {
  const size_t n = strlen(w);
  if ((size_t)(r->end - r->p) < n || memcmp(r->p, w, n) != 0) return bad(r, "an unknown word");
  r->p += n;
  return PYLORA_OK;
}

static int by_key(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* No key of an object twice. */
static int unique(reader *r, const pylora_json_value *v) {
  if (v->items < 2) return PYLORA_OK;
  const char **keys = pylora_take((size_t)v->items, sizeof *keys);
  if (!keys) return pylora_no_memory(r->why, r->where, (double)v->items * sizeof *keys);
  size_t n = 0;
  JSON_EACH(item, r->out, v) keys[n++] = item->key;
  qsort(keys, n, sizeof *keys, by_key);
  int status = PYLORA_OK;
  for (size_t i = 1; i < n && !status; i++)
    if (strcmp(keys[i], keys[i - 1]) == 0)
      status = pylora_fail(r->why, PYLORA_E_FILE, "%.300s: the key '%.200s' is there twice",
                           r->where, keys[i]);
  free(keys);
  return status;
}

static int value(reader *r, int depth, const char *key);

static int items(reader *r, int depth, pylora_json_value *v) {
  const int object = v->type == JSON_OBJECT;
  const char close = object ? '}' : ']';
  r->p++;
  space(r);
  if (*r->p == close) {
    r->p++;
    return PYLORA_OK;
  }
  for (;;) {
    const char *key = NULL;
    if (object) {
      if (*r->p != '"') return bad(r, "a member without a key in quotation marks");
      TRY(text(r, &key));
      space(r);
      if (*r->p != ':') return bad(r, "a key without a colon");
      r->p++;
    }
    TRY(value(r, depth + 1, key));
    v->items++;
    space(r);
    if (*r->p == close) break;
    if (*r->p != ',') return bad(r, "a missing comma or bracket");
    r->p++;
    space(r);
  }
  r->p++;
  return PYLORA_OK;
}

static int value(reader *r, int depth, const char *key) {
  if (depth > PYLORA_JSON_DEPTH) return bad(r, "too many brackets inside each other");
  pylora_json_value *v = &r->out->value[r->n++];
  v->key = key;
  space(r);
  int status = PYLORA_OK;
  switch (*r->p) {
  case '"':
    v->type = JSON_TEXT;
    status = text(r, &v->u.text);
    break;
  case '{':
  case '[':
    v->type = *r->p == '{' ? JSON_OBJECT : JSON_LIST;
    status = items(r, depth, v);
    break;
  case 'n':
    v->type = JSON_NULL, status = word(r, "null");
    break;
  case 't':
    v->type = JSON_TRUE, status = word(r, "true");
    break;
  case 'f':
    v->type = JSON_FALSE, status = word(r, "false");
    break;
  default:
    status = number(r, v);
  }
  v->next = r->n;
  if (!status && v->type == JSON_OBJECT) status = unique(r, v);
  return status;
}

/* At most as many values as there are commas, and brackets that open: each value but the first follows one. */
static int64_t most_values(const char *p, const char *end) {
  int64_t n = 2;
  for (; p < end; p++) n += *p == ',' || *p == '[' || *p == '{';
  return n;
}

int pylora_json_parse(const char *from, size_t bytes, const char *where, pylora_json *out,
                      pylora_message *why) {
  *out = (pylora_json){NULL, NULL, 0};
  if (!pylora_utf8(from, bytes))
    return pylora_fail(why, PYLORA_E_FILE, "%.300s: not valid JSON: it is not UTF-8", where);
  const int64_t most = most_values(from, from + bytes);
  out->text = malloc(bytes + 1);
  out->value = pylora_take((size_t)most, sizeof *out->value);
  if (!out->text || !out->value)
    return pylora_no_memory(why, where, (double)most * sizeof *out->value);
  memcpy(out->text, from, bytes);
  out->text[bytes] = 0;
  reader r = {out->text, out->text + bytes, out->text, out, where, why, 0};
  TRY(value(&r, 0, NULL));
  space(&r);
  if (r.p != r.end) return bad(&r, "something behind the value");
  out->values = r.n;
  return PYLORA_OK;
}

int pylora_json_file(const char *path, size_t limit, pylora_json *out, pylora_message *why) {
  *out = (pylora_json){NULL, NULL, 0};
  pylora_map map;
  TRY(pylora_map_open(path, &map, why));
  const int status = map.size > limit
                         ? pylora_fail(why, PYLORA_E_FILE,
                                       "%.300s: %zu bytes are more than the %zu that are "
                                       "plausible for this file",
                                       path, map.size, limit)
                         : pylora_json_parse((const char *)map.bytes, map.size, path, out, why);
  pylora_map_close(&map);
  return status;
}

void pylora_json_free(pylora_json *json) {
  free(json->text);
  free(json->value);
  *json = (pylora_json){NULL, NULL, 0};
}

const pylora_json_value *pylora_json_member(const pylora_json *j, const pylora_json_value *object,
                                            const char *key) {
  if (json_is(object, JSON_OBJECT)) JSON_EACH(item, j, object)
  if (strcmp(item->key, key) == 0) return item;
  return NULL;
}

int pylora_json_empty(const pylora_json_value *v) {
  switch (v->type) {
  case JSON_NULL:
  case JSON_FALSE:
    return 1;
  case JSON_NUMBER:
    return v->is_whole ? v->u.whole == 0 : v->u.number == 0;
  case JSON_TEXT:
    return v->u.text[0] == 0;
  case JSON_LIST:
  case JSON_OBJECT:
    return v->items == 0;
  default:
    return 0;
  }
}
