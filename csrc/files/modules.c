/* modules.c - the modules of a model: which there are in each layer, in the order of the decoder, and their sizes. */
#include "files/model.h"

static const pylora_role apart[] = {ROLE_Q, ROLE_K, ROLE_V, ROLE_O}, fused[] = {ROLE_QKV, ROLE_O},
                         mlps[][3] = {{ROLE_GATE, ROLE_UP, ROLE_DOWN},
                                      {ROLE_GATE_UP, ROLE_DOWN, ROLES},
                                      {ROLE_UP, ROLE_DOWN, ROLES}},
                         expert[] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};
enum { OF_EXPERT = 3 };

static int has_experts(const pylora_settings *s, int64_t layer) {
  return s->experts && !s->dense[layer];
}

int64_t pylora_layer_modules(const pylora_settings *s, int64_t layer) {
  const pylora_family_facts *f = &pylora_families[s->family];
  const int64_t attention = f->fused ? 2 : 4;
  if (has_experts(s, layer)) return attention + OF_EXPERT * s->experts;
  return attention + (f->mlp == GATE_AND_UP ? 3 : 2);
}

int64_t pylora_modules_of(const pylora_settings *s) {
  int64_t n = 2;
  for (int64_t i = 0; i < s->layers; i++) n += pylora_layer_modules(s, i);
  return n;
}

int64_t pylora_rows_order(const pylora_settings *s, pylora_role role) {
  const pylora_family_facts *f = &pylora_families[s->family];
  if (role == ROLE_QKV && f->fused == PYLORA_QKV_GROUPS) return -s->heads;
  if (!f->interleaved) return 0;
  return role == ROLE_Q ? s->heads : role == ROLE_K ? s->kv_heads : 0;
}

static pylora_module one(const pylora_settings *s, pylora_role role, int64_t layer, int64_t e) {
  const int64_t q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
  pylora_module m = {s->hidden, s->hidden, layer, e, 0, role, 0};
  m.heads = s->interleaved ? pylora_rows_order(s, role) : 0;
  switch (role) {
  case ROLE_EMBEDDING:
    m.k = s->vocab;
    break;
  case ROLE_HEAD:
    m.d = s->vocab;
    break;
  case ROLE_Q:
    m.d = q, m.bias = s->qkv_bias;
    break;
  case ROLE_K:
  case ROLE_V:
    m.d = kv, m.bias = s->qkv_bias;
    break;
  case ROLE_QKV:
    m.d = q + 2 * kv, m.bias = s->qkv_bias;
    break;
  case ROLE_O:
    m.k = q, m.bias = s->o_bias;
    break;
  case ROLE_GATE_UP:
    m.d = 2 * s->inner, m.bias = s->mlp_bias;
    break;
  case ROLE_DOWN:
    m.k = s->inner, m.bias = s->mlp_bias;
    break;
  case ROLE_EXPERT_DOWN:
    m.k = s->expert_size;
    break;
  case ROLE_EXPERT_GATE:
  case ROLE_EXPERT_UP:
    m.d = s->expert_size;
    break;
  default:
    m.d = s->inner, m.bias = s->mlp_bias;
  }
  return m;
}

void pylora_modules_list(const pylora_settings *s, pylora_module *out) {
  const pylora_family_facts *f = &pylora_families[s->family];
  const pylora_role *attention = f->fused ? fused : apart;
  for (int64_t i = 0; i < s->layers; i++) {
    for (int j = 0; j < (f->fused ? 2 : 4); j++) *out++ = one(s, attention[j], i, -1);
    if (has_experts(s, i)) {
      for (int64_t e = 0; e < s->experts; e++)
        for (int j = 0; j < OF_EXPERT; j++) *out++ = one(s, expert[j], i, e);
      continue;
    }
    for (int j = 0; j < 3 && mlps[f->mlp][j] != ROLES; j++) *out++ = one(s, mlps[f->mlp][j], i, -1);
  }
  *out++ = one(s, ROLE_HEAD, -1, -1);
  *out = one(s, ROLE_EMBEDDING, -1, -1);
}
