/* names.c - what the files of each family call their tensors: Hugging Face's names, and llama.cpp's. */
#include <stdio.h>

#include "files/model.h"

/* ---- Hugging Face's ---- */

typedef struct changed {
  pylora_family family;
  pylora_role role;
  const char *name;
} changed;

static const char *const usual[ROLES] = {
    [ROLE_EMBEDDING] = "model.embed_tokens",
    [ROLE_LAST_NORM] = "model.norm",
    [ROLE_HEAD] = "lm_head",
    [ROLE_Q] = "self_attn.q_proj",
    [ROLE_K] = "self_attn.k_proj",
    [ROLE_V] = "self_attn.v_proj",
    [ROLE_QKV] = "self_attn.qkv_proj",
    [ROLE_O] = "self_attn.o_proj",
    [ROLE_GATE] = "mlp.gate_proj",
    [ROLE_UP] = "mlp.up_proj",
    [ROLE_GATE_UP] = "mlp.gate_up_proj",
    [ROLE_DOWN] = "mlp.down_proj",
    [ROLE_ROUTER] = "mlp.gate",
    [ROLE_EXPERT_GATE] = "mlp.experts.gate_proj", /* their number stands behind "experts" */
    [ROLE_EXPERT_UP] = "mlp.experts.up_proj",
    [ROLE_EXPERT_DOWN] = "mlp.experts.down_proj",
    [ROLE_INPUT_NORM] = "input_layernorm",
    [ROLE_MID_NORM] = "post_attention_layernorm",
    [ROLE_AFTER_ATTENTION] = "post_attention_layernorm",
    [ROLE_AFTER_MLP] = "post_feedforward_layernorm",
    [ROLE_Q_NORM] = "self_attn.q_norm",
    [ROLE_K_NORM] = "self_attn.k_norm",
};

static const changed own[] = {
    {GPT2, ROLE_EMBEDDING, "transformer.wte"},
    {GPT2, ROLE_POSITIONS, "transformer.wpe"},
    {GPT2, ROLE_LAST_NORM, "transformer.ln_f"},
    {GPT2, ROLE_QKV, "attn.c_attn"},
    {GPT2, ROLE_O, "attn.c_proj"},
    {GPT2, ROLE_UP, "mlp.c_fc"},
    {GPT2, ROLE_DOWN, "mlp.c_proj"},
    {GPT2, ROLE_INPUT_NORM, "ln_1"},
    {GPT2, ROLE_MID_NORM, "ln_2"},
    {GPT_NEOX, ROLE_EMBEDDING, "gpt_neox.embed_in"},
    {GPT_NEOX, ROLE_LAST_NORM, "gpt_neox.final_layer_norm"},
    {GPT_NEOX, ROLE_QKV, "attention.query_key_value"},
    {GPT_NEOX, ROLE_O, "attention.dense"},
    {GPT_NEOX, ROLE_UP, "mlp.dense_h_to_4h"},
    {GPT_NEOX, ROLE_DOWN, "mlp.dense_4h_to_h"},
    {MIXTRAL, ROLE_ROUTER, "block_sparse_moe.gate"},
    {MIXTRAL, ROLE_EXPERT_GATE, "block_sparse_moe.experts.w1"},
    {MIXTRAL, ROLE_EXPERT_UP, "block_sparse_moe.experts.w3"},
    {MIXTRAL, ROLE_EXPERT_DOWN, "block_sparse_moe.experts.w2"},
};

static const char *hf_name(pylora_family family, pylora_role role) {
  for (size_t i = 0; i < sizeof own / sizeof *own; i++)
    if (own[i].family == family && own[i].role == role) return own[i].name;
  /* Norms on both sides leave the usual name to the one behind attention. */
  if (role == ROLE_MID_NORM && pylora_families[family].places != BEFORE)
    return "pre_feedforward_layernorm";
  return usual[role];
}

const char *pylora_layers_path(pylora_family family) {
  return family == GPT2 ? "transformer.h" : family == GPT_NEOX ? "gpt_neox.layers" : "model.layers";
}

int pylora_has_norm(pylora_family family, pylora_role norm) {
  const pylora_family_facts *f = &pylora_families[family];
  if (norm == ROLE_Q_NORM || norm == ROLE_K_NORM) return f->qk_norm != NO_NORM;
  const int before = norm == ROLE_INPUT_NORM || norm == ROLE_MID_NORM;
  return f->places == BOTH || before == (f->places == BEFORE);
}

/* ---- llama.cpp's ---- */

static const char *const stem[ROLES] = {
    [ROLE_EMBEDDING] = "token_embd",
    [ROLE_POSITIONS] = "position_embd",
    [ROLE_LAST_NORM] = "output_norm",
    [ROLE_HEAD] = "output",
    [ROLE_Q] = "attn_q",
    [ROLE_K] = "attn_k",
    [ROLE_V] = "attn_v",
    [ROLE_QKV] = "attn_qkv",
    [ROLE_O] = "attn_output",
    [ROLE_GATE] = "ffn_gate",
    [ROLE_UP] = "ffn_up",
    [ROLE_GATE_UP] = "ffn_up",
    [ROLE_DOWN] = "ffn_down",
    [ROLE_ROUTER] = "ffn_gate_inp",
    [ROLE_EXPERT_GATE] = "ffn_gate_exps",
    [ROLE_EXPERT_UP] = "ffn_up_exps",
    [ROLE_EXPERT_DOWN] = "ffn_down_exps",
    [ROLE_INPUT_NORM] = "attn_norm",
    [ROLE_MID_NORM] = "ffn_norm",
    [ROLE_AFTER_ATTENTION] = "post_attention_norm",
    [ROLE_AFTER_MLP] = "post_ffw_norm",
    [ROLE_Q_NORM] = "attn_q_norm",
    [ROLE_K_NORM] = "attn_k_norm",
};

int pylora_tensor_name(pylora_family family, int gguf, pylora_role role, int64_t layer,
                       int64_t expert, const char *ending, char out[PYLORA_NAME]) {
  const pylora_role as =
      gguf && family == SEED_OSS && role == ROLE_MID_NORM ? ROLE_AFTER_ATTENTION : role;
  const char *name = gguf ? stem[as] : hf_name(family, role);
  if (!name) return 0;
  if (role < ROLE_Q) return snprintf(out, PYLORA_NAME, "%s%s", name, ending) > 0;
  if (gguf) return snprintf(out, PYLORA_NAME, "blk.%lld.%s%s", (long long)layer, name, ending) > 0;
  const char *path = pylora_layers_path(family), *dot = strrchr(name, '.');
  if (expert < 0 || !dot)
    return snprintf(out, PYLORA_NAME, "%s.%lld.%s%s", path, (long long)layer, name, ending) > 0;
  return snprintf(out, PYLORA_NAME, "%s.%lld.%.*s.%lld%s%s", path, (long long)layer,
                  (int)(dot - name), name, (long long)expert, dot, ending) > 0;
}
