/* model.c - a model out of its files: every tensor that the settings ask for, packed; no tensor left over. */
#include <math.h>
#include <stdio.h>

#include "files/load.h"

/* ---- all of it ---- */

static int name_modules(loader *l) {
  pylora_model *m = l->m;
  m->names = pylora_take((size_t)m->modules, PYLORA_NAME);
  if (!m->names) return pylora_no_memory(l->why, m->path, (double)m->modules * PYLORA_NAME);
  for (int64_t i = 0; i < m->modules; i++) {
    const pylora_module *at = &m->module[i];
    pylora_tensor_name(m->s.family, 0, (pylora_role)at->role, at->layer, at->expert, "",
                       m->names + i * PYLORA_NAME);
  }
  return PYLORA_OK;
}

/* Experts are counted before anything is allocated for them: an absurd number costs nothing. */
static int count_experts(loader *l, int64_t tensors) {
  const pylora_settings *s = &l->m->s;
  if (!s->experts) return PYLORA_OK;
  const int64_t stacks[2][3] = {{s->experts, s->expert_size, s->hidden},
                                {s->experts, s->hidden, s->expert_size}};
  int64_t mixtures = 0;
  for (int64_t i = 0; i < s->layers; i++) {
    if (s->dense[i]) continue;
    mixtures++;
    for (int role = ROLE_EXPERT_GATE; role <= ROLE_EXPERT_DOWN && l->m->files.gguf; role++) {
      const wanted w = {(pylora_role)role, i, 0, ".weight"};
      const pylora_tensor *t;
      TRY(pylora_load_find(l, &w, 3, stacks[role == ROLE_EXPERT_DOWN], &t));
    }
  }
  if (!l->m->files.gguf && mixtures > tensors / (3 * s->experts))
    SAY(PYLORA_E_FILE,
        "%.300s: the configuration says %lld experts in %lld layers, three tensors each, but there "
        "are only %lld tensors",
        l->m->path, (long long)s->experts, (long long)mixtures, (long long)tensors);
  return PYLORA_OK;
}

static void describe(pylora_model *m, int precision) {
  const pylora_settings *s = &m->s;
  const pylora_family_facts *f = &pylora_families[s->family];
  pylora_about *a = &m->about;
  a->family = f->name;
  a->vocab = s->vocab, a->hidden = s->hidden, a->inner = s->inner;
  a->positions = pylora_longest(s);
  a->layers = (int32_t)s->layers, a->heads = (int32_t)s->heads;
  a->kv_heads = (int32_t)s->kv_heads, a->head_dim = (int32_t)s->head_dim;
  a->precision = precision, a->tied = s->tied, a->bos = s->bos, a->eos_count = s->eos_count;
  memcpy(a->eos, s->eos, sizeof a->eos);
  a->rotated = f->learned ? 0 : (int32_t)(2 * pylora_pairs(s));
  m->decoder = (pylora_decoder){
      .layers = (int32_t)s->layers,
      .activations = precision == PYLORA_BF16 ? PYLORA_BF16 : PYLORA_F32,
      .attn = {(int32_t)s->heads, (int32_t)s->kv_heads, (int32_t)s->head_dim, 0,
               (float)(s->attention_scale == 0 ? pow((double)s->head_dim, -0.5)
                                               : s->attention_scale),
               (float)s->attention_softcap},
      .activation = s->activation,
      .ungated = f->mlp == NO_GATE,
      .parallel = s->parallel,
      .fused_qkv = f->fused,
      .fused_gate_up = f->mlp == GATE_UP_IN_ONE,
      .embedding_multiplier = (float)s->embedding_multiplier,
      .residual_multiplier = (float)s->residual_multiplier,
      .logit_multiplier = (float)s->logit_multiplier,
      .logit_softcap = (float)s->logit_softcap,
      .ropes = f->learned ? 0 : 1 + s->two_ropes, /* a session has the tables */
      .layer = m->layer,
  };
}

static int load(loader *l) {
  pylora_model *m = l->m;
  int64_t tensors = 0;
  for (int64_t i = 0; i < m->files.files; i++) tensors += m->files.file[i]->tensors;
  if (m->s.layers > tensors) /* so that an absurd number costs nothing */
    SAY(PYLORA_E_FILE,
        "%.300s: the configuration says %lld layers, but there are only %lld tensors", m->path,
        (long long)m->s.layers, (long long)tensors);
  l->used = pylora_take((size_t)tensors, 1);
  if (!l->used) return pylora_no_memory(l->why, m->path, (double)tensors);
  TRY(count_experts(l, tensors));
  const size_t layers = (size_t)m->s.layers, n = (size_t)pylora_modules_of(&m->s);
  m->layer = pylora_take(layers, sizeof *m->layer);
  m->mixture = pylora_take(layers, sizeof *m->mixture);
  m->router = pylora_take(layers, sizeof *m->router);
  m->module = pylora_take(n, sizeof *m->module);
  m->packed = pylora_take(n + 1, sizeof *m->packed);
  m->W = pylora_take(n, sizeof *m->W);
  m->bias = pylora_take(n, sizeof *m->bias);
  m->aligned = pylora_take(2 * n + (2 * NORMS + 1) * layers + 3, sizeof *m->aligned);
  if (!m->layer || !m->mixture || !m->router || !m->module || !m->packed || !m->W || !m->bias ||
      !m->aligned)
    return pylora_no_memory(l->why, m->path, (double)n * sizeof *m->module);
  m->modules = (int64_t)n;
  pylora_modules_list(&m->s, m->module);
  describe(m, l->precision);
  TRY(name_modules(l));
  pylora_packed *embedding = &m->packed[n - 1], *head = m->s.tied ? embedding : embedding - 1,
                *positions = embedding + 1;
  pylora_module table = m->module[n - 1]; /* its rows are what a module has as inputs */
  table.d = m->s.vocab, table.k = m->s.hidden;
  TRY(pylora_load_matrix(l, &table, embedding));
  if (pylora_families[m->s.family].learned) {
    TRY(pylora_load_exact(l, ROLE_POSITIONS, -1, m->s.positions, positions));
    m->decoder.positions = positions;
  }
  for (int64_t i = 0, first = 0; i < m->s.layers; i++) {
    TRY(pylora_load_layer(l, i, first));
    first += pylora_layer_modules(&m->s, i);
  }
  TRY(pylora_load_norm(l, ROLE_LAST_NORM, -1, m->s.hidden, &m->decoder.norm));
  if (!m->s.tied) TRY(pylora_load_matrix(l, &m->module[n - 2], head));
  m->decoder.embedding = embedding, m->decoder.head = head;
  return pylora_load_nothing_left(l);
}

int pylora_model_open(const char *path, int precision, pylora_model **out, pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!path || !out) return pylora_fail(why, PYLORA_E_NULL, "no path was given");
  *out = NULL;
  if (precision == PYLORA_F32X3 && strcmp(pylora_isa(), "amx") != 0) precision = PYLORA_F32;
  if (precision != PYLORA_F32 && precision != PYLORA_F32X3 && precision != PYLORA_BF16 &&
      precision != PYLORA_Q8_0 && precision != PYLORA_Q4_1 && precision != PYLORA_Q8_0_A8 &&
      precision != PYLORA_Q4_1_A8)
    return pylora_fail(
        why, PYLORA_E_UNSUPPORTED,
        "a model's precision is PYLORA_F32, PYLORA_F32X3, PYLORA_BF16, PYLORA_Q8_0 or "
        "PYLORA_Q4_1, the last two with PYLORA_A8 or without, not %d",
        precision);
  pylora_model *m = pylora_take(1, sizeof *m);
  if (m) m->path = malloc(strlen(path) + 1);
  if (!m || !m->path) {
    free(m);
    return pylora_no_memory(why, path, sizeof *m);
  }
  memcpy(m->path, path, strlen(path) + 1);
  loader l = {m, precision, NULL, why};
  int status = pylora_files_open(path, &m->files, &m->s, why);
  if (!status) status = load(&l);
  free(l.used);
  if (status)
    pylora_model_close(m);
  else
    *out = m;
  return status;
}

void pylora_model_close(pylora_model *m) {
  if (!m) return;
  for (int64_t i = 0; i < m->aligned_count; i++) pylora_give(m->aligned[i]);
  pylora_files_close(&m->files);
  free(m->aligned);
  free(m->layer);
  free(m->W);
  free(m->bias);
  free(m->packed);
  free(m->mixture);
  free(m->router);
  free(m->module);
  free(m->s.scaling.divisors);
  free(m->s.local_scaling.divisors);
  free(m->names);
  free(m->path);
  free(m);
}

const pylora_about *pylora_model_about(const pylora_model *m) { return m ? &m->about : NULL; }

const pylora_decoder *pylora_model_decoder(const pylora_model *m) { return m ? &m->decoder : NULL; }

const char *pylora_model_module(const pylora_model *m, int64_t number) {
  if (!m || number < 0 || number >= pylora_module_count(m)) return NULL;
  return m->names + number * PYLORA_NAME;
}
