/* fuzz_json.c - any bytes as JSON: what is read is walked, and is the whole text; and as a model's config.json. */
#include "fuzz.h"

static int64_t walk(const pylora_json *j, const pylora_json_value *v, int depth) {
  MUST(depth <= PYLORA_JSON_DEPTH && v->next > v - j->value && v->next <= j->values);
  if (v->type == JSON_TEXT) MUST(pylora_utf8(v->u.text, strlen(v->u.text)));
  if (v->type != JSON_LIST && v->type != JSON_OBJECT) return 1;
  int64_t n = 1;
  int items = 0;
  JSON_EACH(item, j, v) {
    if (v->type == JSON_OBJECT) MUST(pylora_json_member(j, v, item->key) == item);
    n += walk(j, item, depth + 1);
    items++;
  }
  MUST(items == v->items);
  return n;
}

/* What is taken as a model's settings must be safe to make modules and angles of. */
static void configure(const uint8_t *bytes, size_t size) {
  static pylora_settings s; /* too large for some stacks */
  pylora_message why = {""};
  const int status = pylora_settings_hf(path_of(bytes, size), &s, &why);
  check_message(status, &why);
  if (!status) {
    MUST(pylora_modules_of(&s) > s.layers && pylora_longest(&s) >= s.positions);
    const int64_t pairs = pylora_pairs(&s), lengths[2] = {1, pylora_longest(&s)};
    double *out = malloc(((size_t)pairs + 1) * sizeof *out);
    for (int i = 0; out && i < 4; i++)
      pylora_frequencies(&s, s.two_ropes && i / 2, lengths[i % 2], out);
    free(out);
  }
  free(s.scaling.divisors);
  free(s.local_scaling.divisors);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  pylora_message why = {""};
  pylora_json j;
  const int status = pylora_json_parse((const char *)bytes, size, "text", &j, &why);
  check_message(status, &why);
  if (!status) MUST(walk(&j, j.value, 0) == j.values);
  pylora_json_free(&j);
  configure(bytes, size);
  int supported; /* the same bytes as a pattern: any answer, in time */
  char pattern[512];
  if (size < sizeof pattern && !memchr(bytes, 0, size)) {
    memcpy(pattern, bytes, size);
    pattern[size] = 0;
    pylora_regex *r = pylora_regex_open(pattern, &supported);
    if (r && supported) pylora_regex_end(r, "model.layers.12.self_attn.q_proj");
    pylora_regex_close(r);
  }
  return 0;
}
