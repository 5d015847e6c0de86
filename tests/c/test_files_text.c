/* test_files_text.c - the texts that come with adapters: JSON, and the regular expressions in it. */
#include "files.h"

/* ---- JSON ---- */

static int parse(const char *text, size_t n, pylora_json *j) {
  static char *copy; /* to the byte, and without a zero behind it */
  free(copy);
  copy = malloc(n ? n : 1);
  if (!copy) abort();
  memcpy(copy, text, n);
  why.text[0] = 0;
  snprintf(context, sizeof context, "%.*s", (int)(n < 150 ? n : 150), text);
  return pylora_json_parse(copy, n, "text", j, &why);
}

static void test_json(void) {
  pylora_json j;
  static const char text[] =
      " {\"a\" : [1, -2.5e1, true, false, null, \"x\\n\\u00e9\\ud83d\\ude00\"],"
      "\"b\":{}, \"c\":[], \"d\":9223372036854775807, \"e\":1e2,"
      "\"f\":9223372036854775808, \"g\":-9223372036854775807}\r\n";
  OK(parse(text, sizeof text - 1, &j));
  const pylora_json_value *a = pylora_json_member(&j, j.value, "a"),
                          *d = pylora_json_member(&j, j.value, "d"),
                          *e = pylora_json_member(&j, j.value, "e"),
                          *f = pylora_json_member(&j, j.value, "f"),
                          *g = pylora_json_member(&j, j.value, "g");
  EXPECT(j.value->items == 7 && a && a->type == JSON_LIST && a->items == 6);
  EXPECT(!pylora_json_member(&j, j.value, "x") && !pylora_json_member(&j, a, "a"));
  int n = 0;
  JSON_EACH(item, &j, a) {
    EXPECT((n == 0) == (item->type == JSON_NUMBER && item->is_whole && item->u.whole == 1));
    if (n == 1) EXPECT(item->type == JSON_NUMBER && !item->is_whole && item->u.number == -25);
    if (n == 2) EXPECT(item->type == JSON_TRUE);
    if (n == 3) EXPECT(item->type == JSON_FALSE);
    if (n == 4) EXPECT(item->type == JSON_NULL);
    if (n == 5) EXPECT(strcmp(item->u.text, "x\n\xc3\xa9\xf0\x9f\x98\x80") == 0);
    n++;
  }
  EXPECT(n == 6);
  EXPECT(pylora_json_empty(pylora_json_member(&j, j.value, "b")));
  EXPECT(pylora_json_empty(pylora_json_member(&j, j.value, "c")) && !pylora_json_empty(a));
  EXPECT(d->is_whole && d->u.whole == INT64_MAX && !e->is_whole && e->u.number == 100);
  EXPECT(!f->is_whole && f->u.number == 9223372036854775808.0);
  EXPECT(g->is_whole && g->u.whole == -INT64_MAX);
  pylora_json_free(&j);
  for (size_t i = 0; i + 3 < sizeof text; i++) { /* a text that is cut off */
    EXPECT_STATUS(PYLORA_E_FILE, parse(text, i, &j));
    EXPECT(strstr(why.text, "not valid JSON"), "%s", why.text);
    pylora_json_free(&j);
  }
}

static void test_json_refused(void) {
  static const char *const bad[] = {
      "",
      " ",
      "{",
      "[",
      "\"",
      "\"\\",
      "\"\\u12",
      "nul",
      "tru",
      "[1 2]",
      "[1,]",
      "[,1]",
      "{\"a\"}",
      "{\"a\":}",
      "{\"a\":1,}",
      "{a:1}",
      "{1:2}",
      "'a'",
      "01",
      "-",
      "+1",
      ".5",
      "1.",
      "1e",
      "1e+",
      "0x10",
      "NaN",
      "Infinity",
      "-Infinity",
      "1e999",
      "\"\t\"",
      "\"\\x41\"",
      "\"\\ud800\"",
      "\"\\ud800\\u0041\"",
      "\"\\udc00\"",
      "\"\\u0000\"",
      "[1] 2",
      "// c\n1",
      "{\"a\":1,\"a\":2}",
      "{\"\\u0061\":1,\"a\":2}",
      "\"\x80\"",
      "\"\xc3\"",
      "\"\xed\xa0\x80\"",
      "\"\xf5\x80\x80\x80\"",
      "\"\xc0\xaf\"",
  };
  pylora_json j;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    EXPECT_STATUS(PYLORA_E_FILE, parse(bad[i], strlen(bad[i]), &j));
    EXPECT(why.text[0] && pylora_utf8(why.text, strlen(why.text)));
    pylora_json_free(&j);
  }
  EXPECT_STATUS(PYLORA_E_FILE, parse("[1,\0]", 5, &j));
  pylora_json_free(&j);
  static char deep[100000]; /* the stack must not be the bound */
  memset(deep, '[', sizeof deep);
  EXPECT_STATUS(PYLORA_E_FILE, parse(deep, sizeof deep, &j));
  EXPECT(strstr(why.text, "too many brackets"), "%s", why.text);
  pylora_json_free(&j);
  for (int i = 0; i < 100; i++) deep[i] = i < 50 ? '[' : ']';
  OK(parse(deep, 100, &j));
  pylora_json_free(&j);
  memset(deep, '7', sizeof deep);
  EXPECT_STATUS(PYLORA_E_FILE, parse(deep, sizeof deep, &j));
  pylora_json_free(&j);
  context[0] = 0;
}

/* ---- regular expressions ---- */

static void test_regex(void) {
  static const char q[] = "model.layers.12.self_attn.q_proj";
  enum { NOT = -1 }; /* not matched here */
  static const struct {
    const char *pattern;
    int full, end; /* of q: all of it, its end */
  } cases[] = {
      {"q_proj", 0, 1},
      {"q.proj", 0, 1},
      {"q\\.proj", 0, 0},
      {"self_attn\\.q_proj", 0, 1},
      {"attn.q_proj", 0, 0},
      {"layers\\.12\\..*", 0, 1},
      {"layers\\.1\\..*", 0, 0},
      {".*", 1, 1},
      {".*q_proj", 1, 1},
      {".*\\.(q|v)_proj", 1, 1},
      {".*\\.(?:k|v)_proj", 0, 0},
      {"(\\w+\\.)+(q_proj|v_proj)", 1, 1},
      {"model\\.layers\\.\\d+\\.self_attn\\.[kqv]_proj", 1, 1},
      {"model\\.layers\\.\\d\\.self_attn\\.[kqv]_proj", 0, 0},
      {"model\\.layers\\.\\d{2}\\.self_attn\\.[^kv]_proj", 1, 1},
      {"model\\.layers\\.\\d{1,}\\..*?q_proj", 1, 1},
      {"model\\.layers\\.\\d{,3}\\..*q_proj", 1, 1},
      {"model\\.layers\\.\\d{3,9}\\..*q_proj", 0, 0},
      {"model\\.layers\\.(1?[0-5])\\..+", 1, 1},
      {"model\\.layers\\.(1[3-9]|2\\d)\\..+", 0, 0},
      {"^model.*q_proj$", 1, 1},
      {"^layers.*q_proj$", 0, 0},
      {"layers.*q_proj$", 0, 1},
      {"a|b|q_proj", 0, 1},
      {"(a|b|)q_proj", 0, 1},
      {"((((((q))))))_proj", 0, 1},
      {"(q_|k_)*proj", 0, 1},
      {"(q?_?){3}proj", 0, 1},
      {"(.*)*q_proj", 1, 1},
      {"(.+)+x", 0, 0},
      {"\\S+", 1, 1},
      {"\\D+", 0, 1},
      {"[\\w.]+", 1, 1},
      {"[a-z_.0-9]*", 1, 1},
      {"[]a]+", 0, 0},
      {"", 0, 0},
      {"(?=q)q_proj", NOT, NOT},
      {"(?i)Q_PROJ", NOT, NOT},
      {"(?P<n>q)_proj", NOT, NOT},
      {"\\bq_proj", NOT, NOT},
      {"(q)_\\1", NOT, NOT},
      {"a$b", NOT, NOT},
      {"^a|b", NOT, NOT},
      {"a|b$", NOT, NOT},
      {"*a", NOT, NOT},
      {"a**", NOT, NOT},
      {"(a", NOT, NOT},
      {"a)", NOT, NOT},
      {"[a", NOT, NOT},
      {"[z-a]", NOT, NOT},
      {"a{2", NOT, NOT},
      {"a{3,2}", NOT, NOT},
      {"\\", NOT, NOT},
      {"(a{900}){900}", NOT, NOT},
      {"\xc3\xa9", NOT, NOT},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    snprintf(context, sizeof context, "%s", cases[i].pattern);
    int supported;
    pylora_regex *r = pylora_regex_open(cases[i].pattern, &supported);
    EXPECT(r && supported == (cases[i].full != NOT));
    if (supported) {
      EXPECT(pylora_regex_full(r, q, strlen(q)) == cases[i].full);
      EXPECT(pylora_regex_end(r, q) == cases[i].end);
    }
    pylora_regex_close(r);
  }
  /* What takes a backtracking matcher longer than the age of the world. */
  char hard[400] = "";
  for (int i = 0; i < 40; i++) strcat(hard, "(.*.*)*");
  strcat(hard, "x");
  int supported;
  pylora_regex *r = pylora_regex_open(hard, &supported);
  EXPECT(r && supported && !pylora_regex_end(r, q));
  pylora_regex_close(r);
  static char deep[5000];
  memset(deep, '(', sizeof deep - 1);
  r = pylora_regex_open(deep, &supported);
  EXPECT(r && !supported);
  pylora_regex_close(r);
  context[0] = 0;
}

/* Random patterns of what is matched here do not step outside, and the empty path of a list ends. */
static void test_random_patterns(void) {
  static const char signs[] = "a.b*+?()|[]^$\\{}1,2-dw";
  for (int i = 0; i < 20000; i++) {
    char pattern[40];
    const int n = (int)below(30);
    for (int k = 0; k < n; k++) pattern[k] = signs[below(sizeof signs - 1)];
    pattern[n] = 0;
    int supported;
    pylora_regex *r = pylora_regex_open(pattern, &supported);
    if (r && supported) pylora_regex_end(r, "a.b.a1.b");
    pylora_regex_close(r);
  }
}

int main(void) {
  test_json();
  test_json_refused();
  test_regex();
  test_random_patterns();
  return finish("test_files_text");
}
