/* regex.c - regular expressions out of adapter configurations, matched against module paths.
 *
 * Python's syntax as far as it is about whole matches: letters, ., classes, groups, |, * + ? {m,n} (lazy or not),
 * \d \w \s and escaped signs, ^ at the beginning and $ at the end.  Whatever else it knows (look-around, back
 * references, \b, flags) is refused.  All ways to match are followed at once, so the time is the product of the
 * pattern's and the path's length at most: no pattern takes longer. */
#include "files/adapter.h"

enum { CODE = 4096, SETS = 128, DEPTH = 64 };
enum { CHAR, ANY, SET, SPLIT, JUMP };

typedef struct instruction {
  int16_t op, a, b; /* SPLIT: goes on at +a and at +b; JUMP: at +a; CHAR: a; SET: number a */
} instruction;

typedef struct compiler {
  const char *p;
  int n, sets, depth, bad;
  instruction code[CODE];
  uint8_t set[SETS][32];
} compiler;

static void emit(compiler *c, int op, int a, int b) {
  if (c->n >= CODE) {
    c->bad = 1;
    return;
  }
  c->code[c->n++] = (instruction){(int16_t)op, (int16_t)a, (int16_t)b};
}

/* Room for one instruction before a fragment: its jumps are relative and inside it. */
static void insert(compiler *c, int at, int op, int a, int b) {
  emit(c, JUMP, 0, 0);
  if (c->bad) return;
  memmove(&c->code[at + 1], &c->code[at], (size_t)(c->n - 1 - at) * sizeof *c->code);
  c->code[at] = (instruction){(int16_t)op, (int16_t)a, (int16_t)b};
}

static void add(uint8_t *set, int low, int high) {
  for (int i = low; i <= high; i++) set[i / 8] |= (uint8_t)(1 << i % 8);
}

/* \d, \w, \s and their opposites as a set; 0: this letter is none. */
static int add_class(uint8_t *set, char letter) {
  uint8_t one[32] = {0};
  switch (letter | 32) {
  case 'd':
    add(one, '0', '9');
    break;
  case 'w':
    add(one, '0', '9'), add(one, 'a', 'z'), add(one, 'A', 'Z'), add(one, '_', '_');
    break;
  case 's':
    add(one, 9, 13), add(one, ' ', ' '), add(one, 28, 31);
    break;
  default:
    return 0;
  }
  for (int i = 0; i < 32; i++) set[i] |= letter & 32 ? one[i] : (uint8_t)~one[i];
  return 1;
}

static int is_letter(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static uint8_t *new_set(compiler *c) {
  if (c->sets >= SETS) {
    c->bad = 1;
    return c->set[0];
  }
  return c->set[c->sets++];
}

/* What a set has at c->p: a sign, or -1 where it was a class, which is added. */
static int set_item(compiler *c, uint8_t *set) {
  if (*c->p != '\\') return (unsigned char)*c->p++;
  c->p++;
  const char letter = *c->p;
  if (letter) c->p++;
  if (letter && add_class(set, letter)) return -1;
  if (!letter || is_letter(letter)) c->bad = 1;
  return (unsigned char)letter;
}

static void parse_set(compiler *c) {
  uint8_t *set = new_set(c);
  const int number = c->sets - 1, negated = *++c->p == '^';
  c->p += negated;
  for (int first = 1; !c->bad && (first || *c->p != ']'); first = 0) {
    if (!*c->p || (*c->p == '[' && c->p[1] == ':')) {
      c->bad = 1;
      return;
    }
    const int low = set_item(c, set);
    if (low < 0) continue;
    int high = low;
    if (c->p[0] == '-' && c->p[1] && c->p[1] != ']') {
      c->p++;
      high = set_item(c, set);
    }
    if (high < low || high > 127) c->bad = 1;
    if (!c->bad) add(set, low, high);
  }
  if (c->bad) return;
  c->p++;
  for (int i = 0; i < 32 && negated; i++) set[i] = (uint8_t)~set[i];
  emit(c, SET, number, 0);
}

static void alternatives(compiler *c);

static void atom(compiler *c) {
  const char sign = *c->p;
  switch (sign) {
  case '(':
    c->p++;
    if (*c->p == '?') {
      if (c->p[1] != ':') {
        c->bad = 1;
        return;
      }
      c->p += 2;
    }
    alternatives(c);
    if (*c->p != ')') c->bad = 1;
    c->p++;
    return;
  case '[':
    parse_set(c);
    return;
  case '.':
    c->p++;
    emit(c, ANY, 0, 0);
    return;
  case '\\': {
    const char letter = *++c->p;
    if (letter) c->p++;
    if (is_letter(letter)) {
      uint8_t *set = new_set(c);
      if (!add_class(set, letter)) c->bad = 1;
      emit(c, SET, c->sets - 1, 0);
    } else if (letter) {
      emit(c, CHAR, letter, 0);
    } else {
      c->bad = 1;
    }
    return;
  }
  default:
    if ((unsigned char)sign > 126 || (unsigned char)sign < ' ' || strchr("*+?{}^$", sign)) {
      c->bad = 1;
      return;
    }
    c->p++;
    emit(c, CHAR, sign, 0);
  }
}

static int count(compiler *c) {
  if (*c->p < '0' || *c->p > '9') return -1;
  int n = 0;
  while (*c->p >= '0' && *c->p <= '9' && n < 1000) n = n * 10 + *c->p++ - '0';
  return n;
}

static void copy(compiler *c, int from, int n) {
  for (int i = 0; i < n && !c->bad; i++)
    emit(c, c->code[from + i].op, c->code[from + i].a, c->code[from + i].b);
}

/* {m}, {m,}, {,n} or {m,n} of the fragment from `start` on: m of it, then those that may be there. */
static void repeat(compiler *c, int start) {
  c->p++;
  int least = count(c), most = least;
  if (*c->p == ',') {
    c->p++;
    most = count(c);
    if (most < 0) most = *c->p == '}' ? 1000 : -1;
    if (least < 0) least = 0;
  }
  if (*c->p != '}' || least < 0 || most < least || least > 999 || most == 0) {
    c->bad = 1; /* {0} and a brace that stands for itself, too */
    return;
  }
  c->p++;
  const int n = c->n - start, endless = most == 1000;
  for (int i = 1; i < least; i++) copy(c, start, n);
  if (endless && least) {
    emit(c, SPLIT, -n, 1);
  } else if (endless) {
    insert(c, start, SPLIT, 1, n + 2);
    emit(c, JUMP, -(n + 1), 0);
  } else {
    if (!least) insert(c, start, SPLIT, 1, n + 1);
    const int from = least ? start : start + 1;
    for (int i = least ? least : 1; i < most && !c->bad; i++) {
      emit(c, SPLIT, 1, n + 1);
      copy(c, from, n);
    }
  }
}

static void repeated(compiler *c) {
  const int start = c->n;
  atom(c);
  const int n = c->n - start;
  if (c->bad) return;
  switch (*c->p) {
  case '*':
    insert(c, start, SPLIT, 1, n + 2);
    emit(c, JUMP, -(n + 1), 0);
    c->p++;
    break;
  case '+':
    emit(c, SPLIT, -n, 1);
    c->p++;
    break;
  case '?':
    insert(c, start, SPLIT, 1, n + 1);
    c->p++;
    break;
  case '{':
    repeat(c, start);
    break;
  default:
    return;
  }
  if (*c->p == '?') c->p++; /* lazy: the same whole matches */
  if (*c->p && strchr("*+?{", *c->p)) c->bad = 1;
}

static void alternatives(compiler *c) {
  if (++c->depth > DEPTH) c->bad = 1;
  const int start = c->n;
  while (!c->bad && *c->p && *c->p != '|' && *c->p != ')') repeated(c);
  if (!c->bad && *c->p == '|') {
    c->p++;
    const int n = c->n - start;
    insert(c, start, SPLIT, 1, n + 2);
    const int jump = c->n;
    emit(c, JUMP, 0, 0);
    alternatives(c);
    if (!c->bad) c->code[jump].a = (int16_t)(c->n - jump);
  }
  c->depth--;
}

/* Adds an instruction and what it leads to without a sign to a list. */
static void follow(const compiler *c, uint8_t *on, int16_t *stack, int at) {
  int n = 0;
  stack[n++] = (int16_t)at;
  while (n) {
    at = stack[--n];
    if (on[at]) continue;
    on[at] = 1;
    if (at == c->n) continue;
    const instruction *i = &c->code[at];
    if (i->op == JUMP || i->op == SPLIT) stack[n++] = (int16_t)(at + i->a);
    if (i->op == SPLIT) stack[n++] = (int16_t)(at + i->b);
  }
}

static int run(const compiler *c, const char *text, size_t length, uint8_t *lists, int16_t *stack) {
  uint8_t *on = lists, *next = lists + CODE + 1;
  memset(on, 0, (size_t)c->n + 1);
  follow(c, on, stack, 0);
  for (size_t i = 0; i < length; i++) {
    const unsigned char sign = (unsigned char)text[i];
    memset(next, 0, (size_t)c->n + 1);
    for (int at = 0; at < c->n; at++) {
      if (!on[at]) continue;
      const instruction *in = &c->code[at];
      if ((in->op == CHAR && in->a == sign) || (in->op == ANY && sign != '\n') ||
          (in->op == SET && c->set[in->a][sign / 8] >> sign % 8 & 1))
        follow(c, next, stack, at + 1);
    }
    uint8_t *swap = on;
    on = next, next = swap;
  }
  return on[c->n];
}

struct pylora_regex {
  compiler c;
  int from_start; /* it began with ^ */
  char text[8192];
  uint8_t lists[2 * (CODE + 1)];
  int16_t stack[4 * CODE];
};

pylora_regex *pylora_regex_open(const char *pattern, int *supported) {
  const size_t n = strlen(pattern);
  *supported = 0;
  pylora_regex *r = pylora_take(1, sizeof *r);
  if (!r) return NULL;
  if (n >= sizeof r->text) return r;
  memcpy(r->text, pattern, n + 1);
  /* ^ and $ around all of it say what a whole match is anyway; inside an alternative they would not. */
  char *begin = r->text;
  if (*begin == '^') begin++, r->from_start = 1;
  size_t left = strlen(begin);
  size_t slashes = 0;
  while (left >= 2 + slashes && begin[left - 2 - slashes] == '\\') slashes++;
  if (left && begin[left - 1] == '$' && slashes % 2 == 0) begin[--left] = 0, r->from_start |= 2;
  r->c.p = begin;
  alternatives(&r->c);
  if (*r->c.p) r->c.bad = 1;
  if (r->from_start) { /* with a | outside of groups they belong to one side only */
    int depth = 0;
    for (const char *p = begin; *p && !r->c.bad; p++) {
      if (*p == '\\' && p[1])
        p++;
      else if (*p == '[') {
        for (p++, p += *p == '^', p += *p == ']'; *p && *p != ']'; p++) p += *p == '\\' && p[1];
        if (!*p) break;
      } else
        depth += *p == '(' ? 1 : *p == ')' ? -1 : 0;
      if (*p == '|' && depth == 0) r->c.bad = 1;
    }
  }
  *supported = !r->c.bad;
  return r;
}

void pylora_regex_close(pylora_regex *r) { free(r); }

int pylora_regex_full(pylora_regex *r, const char *text, size_t length) {
  return run(&r->c, text, length, r->lists, r->stack);
}

int pylora_regex_end(pylora_regex *r, const char *path) {
  for (const char *p = path; p; p = strchr(p, '.') ? strchr(p, '.') + 1 : NULL) {
    if (p != path && r->from_start & 1) return 0;
    if (pylora_regex_full(r, p, strlen(p))) return 1;
  }
  return 0;
}
