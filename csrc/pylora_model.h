/* pylora_model.h - a model and its adapters out of files, and tokens through them: ids in, ids out.
 *
 *   pylora_model_open      a GGUF file, or a directory of config.json and safetensors, packed for the engine
 *   pylora_adapter_open    a PEFT directory or a GGUF adapter for that model: resolved, checked, packed
 *   pylora_session_open    one sequence's keys and values;  pylora_session_forward: tokens -> logits
 *   pylora_greedy          the likeliest token
 *
 * There is no tokenizer here.  The rules are those of Python's pylora, and so are the bits: a tensor left over or
 * missing, a wrong shape, a name that matches nothing, a setting that is not carried out are refused with a
 * sentence that names it; nothing is skipped in silence.  These functions allocate (pylora.h's never do).
 */
#ifndef PYLORA_MODEL_H
#define PYLORA_MODEL_H

#include "pylora_files.h"

#if defined(PYLORA_SHARED) && defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

/* ---- a model ---------------------------------------------------------------------------- */

typedef struct pylora_model pylora_model;

#define PYLORA_MAX_EOS 16
typedef struct pylora_about {
  const char *family; /* config.json's model_type: "llama", "gemma3_text", ... */
  int64_t vocab, hidden, inner;
  int64_t positions; /* the longest sequence */
  int32_t layers, heads, kv_heads, head_dim;
  int32_t precision; /* PYLORA_F32, ...: what is computed in */
  int32_t tied;      /* the head is the embedding */
  int64_t bos;       /* -1: none */
  int64_t eos[PYLORA_MAX_EOS];
  int32_t eos_count;
  int64_t weight_bytes; /* of the packed weights */
  int32_t rotated;      /* numbers of a head that have a rotation: head_dim, or fewer, or none */
} pylora_about;

/* `path`: a GGUF file, or a directory with config.json and model.safetensors, whole or in shards.
 * `precision`: PYLORA_F32, PYLORA_F32X3 (plain float32 without AMX), PYLORA_BF16, PYLORA_Q8_0 (8 bits) or
 * PYLORA_Q4_1 (4 bits), or these two with PYLORA_A8; see pylora_tensor_dtype for what blocks become.
 * PYLORA_E_FILE, PYLORA_E_UNSUPPORTED (an architecture or a setting that is not read), PYLORA_E_MEMORY. */
int pylora_model_open(const char *path, int precision, pylora_model **out, pylora_message *why);
/* Adapters and sessions of it must be closed before. */
void pylora_model_close(pylora_model *model);
const pylora_about *pylora_model_about(const pylora_model *model);

/* The weights, for a program that calls pylora_decoder_forward itself, with many sequences or adapters.  Its
 * `rope` is NULL: a program has tables of its own (pylora_model_rope) in a copy of the struct. */
const pylora_decoder *pylora_model_decoder(const pylora_model *model);
/* cos, sin [positions, rotated / 2] of table 0 .. ropes - 1 of pylora_decoder, for a sequence of so many tokens: where
 * angles depend on its length (dynamic, longrope) a longer one has others. */
int pylora_model_rope(const pylora_model *model, int32_t table, int64_t positions, float *cosines,
                      float *sines);

/* The modules that can take LoRA are numbered as pylora_adapter's tables are, the embedding behind the head; their
 * names are Hugging Face's.  NULL past the end; the text lives as long as the model. */
const char *pylora_model_module(const pylora_model *model, int64_t number);

/* ---- an adapter ------------------------------------------------------------------------- */

typedef struct pylora_adapter_file pylora_adapter_file;

/* One adapted module: the update is scale B A. */
typedef struct pylora_plan_entry {
  const char *module;
  int64_t r, d, k; /* A [r,k], B [d,r]; r = 0: only a bias is replaced */
  double alpha, scale;
} pylora_plan_entry;

/* `path`: a directory with adapter_config.json and adapter_model.safetensors (PEFT's), or a GGUF file of
 * general.type "adapter" (llama.cpp's).  Packed for the model's weights; it must be closed before the model is.
 * PYLORA_E_PLAN where it does not fit the model, PYLORA_E_FILE, PYLORA_E_UNSUPPORTED, PYLORA_E_MEMORY. */
int pylora_adapter_open(const pylora_model *model, const char *path, pylora_adapter_file **out,
                        pylora_message *why);
void pylora_adapter_close(pylora_adapter_file *adapter);
/* As pylora_decoder_forward and pylora_session_forward take it. */
const pylora_adapter *pylora_adapter_struct(const pylora_adapter_file *adapter);
/* What it does, module by module, in the model's order; NULL past the end. */
const pylora_plan_entry *pylora_adapter_entry(const pylora_adapter_file *adapter, int64_t index);

/* ---- one sequence ----------------------------------------------------------------------- */

typedef struct pylora_session pylora_session;

/* An empty sequence of at most `capacity` tokens. */
int pylora_session_open(const pylora_model *model, int64_t capacity, pylora_session **out,
                        pylora_message *why);
void pylora_session_close(pylora_session *session);
void pylora_session_clear(pylora_session *session); /* empty again */
int64_t pylora_session_length(const pylora_session *session);
/* Appends n >= 1 tokens; logits [vocab] are those of the last one.  `adapter` NULL: the base model.  On an error the
 * sequence is as long as before.  PYLORA_E_INDEX names an id outside the vocabulary, or says that the capacity is
 * used up. */
int pylora_session_forward(pylora_session *session, const pylora_adapter *adapter,
                           const int64_t *ids, int64_t n, float *logits, pylora_message *why);
/* The first of the largest logits.  PYLORA_E_VALUE where one is not finite: then no token can be chosen. */
int pylora_greedy(const float *logits, int64_t vocab, int64_t *token);

#ifdef __cplusplus
}
#endif
#if defined(PYLORA_SHARED) && defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
