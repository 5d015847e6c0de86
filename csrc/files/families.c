/* families.c - what all models of a family have in common; see pylora/model/families. */
#include "files/model.h"

/* What is not named is as in Llama: RMSNorm before each sublayer, q, k, v, gate and up apart, pairs (i, i + D/2). */
const pylora_family_facts pylora_families[FAMILIES] = {
    [LLAMA] = {"llama", "llama", .interleaved = 1},
    [MISTRAL] = {"mistral", NULL, .interleaved = 1},
    [QWEN2] = {.name = "qwen2", .arch = "qwen2"},
    [QWEN3] = {"qwen3", "qwen3", .qk_norm = OF_HEADS},
    [GEMMA2] = {"gemma2", "gemma2", .offset = 1, .places = BOTH},
    [GEMMA3] = {"gemma3_text", "gemma3", .offset = 1, .places = BOTH, .qk_norm = OF_HEADS},
    [GRANITE] = {"granite", "granite", .interleaved = 1},
    [SMOLLM3] = {"smollm3", "smollm3", .interleaved = 1},
    [OLMO2] = {"olmo2", "olmo2", .places = AFTER, .qk_norm = OF_ALL},
    [OLMO3] = {"olmo3", NULL, .places = AFTER, .qk_norm = OF_ALL},
    [GEMMA] = {"gemma", "gemma", .offset = 1},
    [MINISTRAL] = {"ministral", NULL, .interleaved = 1},
    [SEED_OSS] = {.name = "seed_oss", .arch = "seed_oss"},
    [ERNIE45] = {"ernie4_5", "ernie4_5", .layout = PYLORA_ROPE_INTERLEAVED},
    [PHI3] = {"phi3", "phi3", .fused = PYLORA_QKV_BLOCKS, .mlp = GATE_UP_IN_ONE},
    [GPT2] = {"gpt2", "gpt2", .norm = PYLORA_LAYER, .fused = PYLORA_QKV_BLOCKS, .mlp = NO_GATE,
              .transposed = 1, .learned = 1},
    [GPT_NEOX] = {"gpt_neox", "gptneox", .norm = PYLORA_LAYER, .fused = PYLORA_QKV_GROUPS,
                  .mlp = NO_GATE},
    [MIXTRAL] = {"mixtral", NULL, .interleaved = 1},
    [QWEN3_MOE] = {"qwen3_moe", "qwen3moe", .qk_norm = OF_HEADS},
    [OLMOE] = {"olmoe", "olmoe", .qk_norm = OF_ALL},
};

int pylora_usual_activation(pylora_family family) {
  switch (family) {
  case GEMMA:
  case GEMMA2:
  case GEMMA3:
  case GPT2:
    return PYLORA_GELU_TANH;
  case GPT_NEOX:
    return PYLORA_GELU_ERF;
  default:
    return PYLORA_SILU;
  }
}
