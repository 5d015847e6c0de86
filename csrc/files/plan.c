/* plan.c - which modules an adapter_config.json adapts, and each one's rank, alpha and scale.
 *
 * Matching is PEFT's; a target, an exclusion, a pattern or a layer that matches nothing is an error. */
#include <math.h>
#include <stdio.h>

#include "files/adapter.h"

typedef struct planner {
  const pylora_model *m;
  const pylora_lora_config *c;
  int64_t n; /* modules */
  pylora_message *why;
} planner;

#define WRONG(...) return pylora_fail(p->why, PYLORA_E_PLAN, __VA_ARGS__)

static const char *name_of(const planner *p, int64_t i) { return pylora_module_path(p->m, i); }
/* Experts' projections are one parameter to PEFT, and no modules. */
static int adaptable(const planner *p, int64_t i) { return p->m->module[i].expert < 0; }

/* The last names of the modules that can take LoRA, for a sentence. */
static void list(const planner *p, char *out, size_t room) {
  uint8_t seen[ROLES] = {0};
  size_t n = 0;
  out[0] = 0;
  for (int64_t i = 0; i < p->n; i++) {
    const char *path = name_of(p, i), *dot = strrchr(path, '.');
    if (!adaptable(p, i) || seen[p->m->module[i].role]) continue;
    seen[p->m->module[i].role] = 1;
    const int put = snprintf(out + n, room - n, "%s%s", n ? ", " : "", dot ? dot + 1 : path);
    if (put < 0 || (size_t)put >= room - n) return;
    n += (size_t)put;
  }
}

/* A name matches a path that equals it or ends in a dot and it. */
static int ends_in(const char *path, const char *name) {
  const size_t a = strlen(path), b = strlen(name);
  if (a < b || strcmp(path + a - b, name) != 0) return 0;
  return a == b || path[a - b - 1] == '.';
}

static int open_regex(const planner *p, const char *what, const char *pattern, pylora_regex **out) {
  int supported;
  *out = pylora_regex_open(pattern, &supported);
  if (!*out) return pylora_no_memory(p->why, p->c->path, 0);
  if (supported) return PYLORA_OK;
  pylora_regex_close(*out);
  *out = NULL;
  return pylora_fail(
      p->why, PYLORA_E_UNSUPPORTED,
      "%.300s: %s: '%.200s' is not a regular expression that is matched here; write "
      "it without look-around, references, \\b and flags, or list the modules' names",
      p->c->path, what, pattern);
}

/* hit [n] = 1 where target_modules or exclude_modules `v` chooses a module; `whole` where by its whole path. */
static int choose(const planner *p, const char *what, const pylora_json_value *v, uint8_t *hit,
                  uint8_t *whole) {
  if (v->type == JSON_LIST) {
    JSON_EACH(item, &p->c->j, v) {
      int any = 0;
      for (int64_t i = 0; i < p->n; i++) {
        const int found = adaptable(p, i) && ends_in(name_of(p, i), item->u.text);
        hit[i] |= (uint8_t)found, any |= found;
        whole[i] |= (uint8_t)(found && strcmp(name_of(p, i), item->u.text) == 0);
      }
      if (any) continue;
      char there[200];
      list(p, there, sizeof there);
      WRONG("%.300s: %s: '%.100s' matches no module that can take LoRA; there are %s", p->c->path,
            what, item->u.text, there);
    }
    return PYLORA_OK;
  }
  static const char all[] = "all-linear";
  int every = strcmp(what, "target_modules") == 0 && strlen(v->u.text) == sizeof all - 1;
  for (size_t i = 0; every && i < sizeof all - 1; i++)
    every = (v->u.text[i] | (all[i] == '-' ? 0 : 32)) == all[i];
  if (every) {
    for (int64_t i = 0; i < p->n - 2; i++)
      hit[i] = (uint8_t)adaptable(p, i); /* not the output layer, not the embedding */
    return PYLORA_OK;
  }
  if (!v->u.text[0]) return PYLORA_OK;
  pylora_regex *r;
  TRY(open_regex(p, what, v->u.text, &r));
  int any = 0;
  for (int64_t i = 0; i < p->n; i++) {
    const int found = adaptable(p, i) && pylora_regex_full(r, name_of(p, i), strlen(name_of(p, i)));
    hit[i] |= (uint8_t)found, any |= found;
  }
  pylora_regex_close(r);
  if (!any)
    WRONG("%.300s: %s: the regular expression '%.200s' matches no module path", p->c->path, what,
          v->u.text);
  return PYLORA_OK;
}

/* Whether layers_pattern names the list of layers: "layers", or a pattern for the path up to their numbers. */
static int layers_named(const planner *p, int *named) {
  const pylora_json_value *v = p->c->layers_pattern;
  *named = !v;
  if (!v) return PYLORA_OK;
  const int list = v->type == JSON_LIST;
  JSON_EACH(item, &p->c->j, v) {
    if (!list) break;
    pylora_regex *r;
    TRY(open_regex(p, "layers_pattern", item->u.text, &r));
    *named |= pylora_regex_end(r, pylora_layers_path(p->m->s.family));
    pylora_regex_close(r);
  }
  if (!list) {
    pylora_regex *r;
    TRY(open_regex(p, "layers_pattern", v->u.text, &r));
    *named = pylora_regex_end(r, pylora_layers_path(p->m->s.family));
    pylora_regex_close(r);
  }
  if (!*named) WRONG("%.300s: layers_pattern matches no module path", p->c->path);
  return PYLORA_OK;
}

static int has_layer(const planner *p, int64_t layer) {
  const pylora_json_value *v = p->c->layers;
  if (v->type == JSON_NUMBER) return v->u.whole == layer;
  JSON_EACH(item, &p->c->j, v) if (item->u.whole == layer) return 1;
  return 0;
}

static int check_layers(const planner *p) {
  const pylora_json_value *v = p->c->layers;
  const pylora_json_value *end = p->c->j.value + v->next;
  int named;
  TRY(layers_named(p, &named));
  for (const pylora_json_value *i = v->type == JSON_LIST ? v + 1 : v; i < end;
       i = p->c->j.value + i->next)
    if (i->u.whole < 0 || i->u.whole >= p->m->s.layers)
      WRONG("%.300s: layers_to_transform: the model has no layer %lld; its layers are 0 to %lld",
            p->c->path, (long long)i->u.whole, (long long)p->m->s.layers - 1);
  return PYLORA_OK;
}

/* rank_pattern or alpha_pattern: the first key that matches a chosen module's path, or its end after a dot, gives
 * its value. */
static int apply(const planner *p, const char *what, const pylora_json_value *patterns,
                 const uint8_t *hit, pylora_part *part, int ranks, uint8_t *done) {
  memset(done, 0, (size_t)p->n);
  if (!patterns) return PYLORA_OK;
  JSON_EACH(item, &p->c->j, patterns) {
    pylora_regex *r;
    int any = 0;
    TRY(open_regex(p, what, item->key, &r));
    for (int64_t i = 0; i < p->n; i++) {
      if (!hit[i] || !pylora_regex_end(r, name_of(p, i))) continue;
      any = 1;
      if (done[i]) continue;
      done[i] = 1;
      if (ranks)
        part[i].r = item->u.whole;
      else
        part[i].alpha = json_number(item);
    }
    pylora_regex_close(r);
    if (!any)
      WRONG("%.300s: %s key '%.200s' matches none of the target modules", p->c->path, what,
            item->key);
  }
  return PYLORA_OK;
}

static int resolve(const planner *p, pylora_part *part, uint8_t *hit, uint8_t *whole,
                   uint8_t *out) {
  const pylora_lora_config *c = p->c;
  if (!c->targets || pylora_json_empty(c->targets))
    WRONG("%.300s: target_modules is not given", c->path);
  TRY(choose(p, "target_modules", c->targets, hit, whole));
  if (c->layers) {
    TRY(check_layers(p));
    for (int64_t i = 0; i < p->n; i++) /* a whole path is chosen whatever the layers say */
      if (!whole[i] && (i >= p->n - 2 || !has_layer(p, p->m->module[i].layer))) hit[i] = 0;
  }
  if (c->exclude && !pylora_json_empty(c->exclude)) {
    uint8_t *ignored = whole; /* not needed any more */
    TRY(choose(p, "exclude_modules", c->exclude, out, ignored));
    for (int64_t i = 0; i < p->n; i++) hit[i] &= !out[i];
  }
  int64_t chosen = 0;
  for (int64_t i = 0; i < p->n; i++) {
    chosen += hit[i];
    if (hit[i]) part[i].r = c->r, part[i].alpha = c->alpha;
  }
  if (!chosen) WRONG("%.300s: no module is left to adapt", c->path);
  TRY(apply(p, "rank_pattern", c->rank_pattern, hit, part, 1, out));
  TRY(apply(p, "alpha_pattern", c->alpha_pattern, hit, part, 0, out));
  if (hit[p->n - 1] && c->lora_bias)
    return pylora_fail(p->why, PYLORA_E_UNSUPPORTED,
                       "%.300s: lora_bias is not defined for an embedding (as in PEFT)", c->path);
  const int turned = pylora_families[p->m->s.family].transposed;
  for (int64_t i = 0; i < p->n - 1 && c->fan_in_fan_out; i++)
    if (hit[i] && !(turned && p->m->module[i].layer >= 0))
      return pylora_fail(p->why, PYLORA_E_UNSUPPORTED,
                         "%.300s: fan_in_fan_out is for layers that store W as [in, out] (GPT-2's "
                         "Conv1D); %s stores [out, in]: set it to false",
                         c->path, name_of(p, i));
  for (int64_t i = 0; i < p->n; i++) {
    const int bias = p->m->module[i].bias;
    if (hit[i]) {
      const double r = (double)part[i].r;
      part[i].scale = c->rslora ? part[i].alpha / sqrt(r) : part[i].alpha / r;
      part[i].has_lora_bias = c->lora_bias;
    }
    part[i].has_base_bias = bias && (c->bias == BIAS_ALL || (hit[i] && c->bias == BIAS_LORA));
  }
  return PYLORA_OK;
}

int pylora_plan(const pylora_model *m, const pylora_lora_config *c, pylora_part *part,
                pylora_message *why) {
  const planner p = {m, c, pylora_module_count(m), why};
  const size_t n = (size_t)p.n;
  uint8_t *marks = pylora_take(n, 3);
  if (!marks) return pylora_no_memory(why, c->path, (double)n * 3);
  const int status = resolve(&p, part, marks, marks + n, marks + 2 * n);
  free(marks);
  return status;
}
