/* types.c - the types that tensors have in files: their blocks, and who decodes them. */
#include "files/decode.h"

/* ggml's numbers first, then what only safetensors has.  A name that both have is one kind. */
static const pylora_kind kinds[] = {
    {"F32", 0, 1, 4, PYLORA_F32, pylora_decode_f32},
    {"F16", 1, 1, 2, PYLORA_F16, pylora_decode_f16},
    {"Q4_0", 2, 32, 18, PYLORA_Q4_0, pylora_decode_q4_0},
    {"Q4_1", 3, 32, 20, PYLORA_Q4_1, pylora_decode_q4_1},
    {"Q5_0", 6, 32, 22, PYLORA_Q5_0, pylora_decode_q5_0},
    {"Q5_1", 7, 32, 24, PYLORA_Q5_1, pylora_decode_q5_1},
    {"Q8_0", 8, 32, 34, PYLORA_Q8_0, pylora_decode_q8_0},
    {"Q8_1", 9, 32, 40, -1, NULL},
    {"Q2_K", 10, 256, 84, PYLORA_Q2_K, pylora_decode_q2_k},
    {"Q3_K", 11, 256, 110, PYLORA_Q3_K, pylora_decode_q3_k},
    {"Q4_K", 12, 256, 144, PYLORA_Q4_K, pylora_decode_q4_k},
    {"Q5_K", 13, 256, 176, PYLORA_Q5_K, pylora_decode_q5_k},
    {"Q6_K", 14, 256, 210, PYLORA_Q6_K, pylora_decode_q6_k},
    {"Q8_K", 15, 256, 292, -1, NULL},
    {"IQ2_XXS", 16, 256, 66, -1, pylora_decode_iq2_xxs},
    {"IQ2_XS", 17, 256, 74, -1, pylora_decode_iq2_xs},
    {"IQ3_XXS", 18, 256, 98, -1, pylora_decode_iq3_xxs},
    {"IQ1_S", 19, 256, 50, -1, pylora_decode_iq1_s},
    {"IQ4_NL", 20, 32, 18, PYLORA_IQ4_NL, pylora_decode_iq4_nl},
    {"IQ3_S", 21, 256, 110, -1, pylora_decode_iq3_s},
    {"IQ2_S", 22, 256, 82, -1, pylora_decode_iq2_s},
    {"IQ4_XS", 23, 256, 136, PYLORA_IQ4_XS, pylora_decode_iq4_xs},
    {"I8", 24, 1, 1, -1, NULL},
    {"I16", 25, 1, 2, -1, NULL},
    {"I32", 26, 1, 4, -1, NULL},
    {"I64", 27, 1, 8, -1, NULL},
    {"F64", 28, 1, 8, -1, NULL},
    {"IQ1_M", 29, 256, 56, -1, pylora_decode_iq1_m},
    {"BF16", 30, 1, 2, PYLORA_BF16, pylora_decode_bf16},
    {"TQ1_0", 34, 256, 54, -1, pylora_decode_tq1_0},
    {"TQ2_0", 35, 256, 66, -1, pylora_decode_tq2_0},
    {"MXFP4", 39, 32, 17, PYLORA_MXFP4, pylora_decode_mxfp4},
    {"NVFP4", 40, 64, 36, -1, pylora_decode_nvfp4},
    {"Q1_0", 41, 128, 18, -1, NULL},
    {"U8", -1, 1, 1, -1, NULL},
    {"U16", -1, 1, 2, -1, NULL},
    {"U32", -1, 1, 4, -1, NULL},
    {"U64", -1, 1, 8, -1, NULL},
    {"BOOL", -1, 1, 1, -1, NULL},
    {"F8_E4M3", -1, 1, 1, -1, NULL},
    {"F8_E5M2", -1, 1, 1, -1, NULL},
    {"F8_E8M0", -1, 1, 1, -1, NULL},
    {"C64", -1, 1, 8, -1, NULL},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

const pylora_kind *pylora_kind_of(int kind) { return &kinds[kind]; }

int pylora_kind_ggml(uint32_t number) {
  for (int i = 0; i < KINDS; i++)
    if (kinds[i].number >= 0 && (uint32_t)kinds[i].number == number) return i;
  return -1;
}

int pylora_kind_safetensors(const char *name, size_t bytes) {
  for (int i = 0; i < KINDS; i++)
    if (kinds[i].block == 1 && strlen(kinds[i].name) == bytes &&
        memcmp(kinds[i].name, name, bytes) == 0)
      return i;
  return -1;
}
