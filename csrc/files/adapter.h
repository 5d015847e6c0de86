/* adapter.h - what the readers of adapters share: the plan, and the tensors of each module. */
#ifndef PYLORA_ADAPTER_INTERNAL_H
#define PYLORA_ADAPTER_INTERNAL_H

#include "files/json.h"
#include "files/model.h"

/* ---- regular expressions (regex.c) ---- */

typedef struct pylora_regex pylora_regex;
/* NULL: no memory.  `supported` 0: not a pattern that is matched here; it is to be closed all the same. */
pylora_regex *pylora_regex_open(const char *pattern, int *supported);
void pylora_regex_close(pylora_regex *r);
int pylora_regex_full(pylora_regex *r, const char *text, size_t length); /* all of it */
int pylora_regex_end(pylora_regex *r, const char *path); /* all of it, or its end after a dot */

/* ---- adapter_config.json (adapter_config.c) ---- */

typedef struct pylora_lora_config {
  const char *path;
  pylora_json j; /* which the values below are in */
  int64_t r;
  double alpha;
  int rslora, lora_bias;
  int fan_in_fan_out; /* how PEFT merges; only where the base is stored so */
  enum { BIAS_NONE, BIAS_LORA, BIAS_ALL } bias;
  const pylora_json_value *targets, *exclude;            /* a text, a list of texts, or NULL */
  const pylora_json_value *layers, *layers_pattern;      /* a list or one of them, or NULL */
  const pylora_json_value *rank_pattern, *alpha_pattern; /* an object, or NULL */
} pylora_lora_config;

int pylora_lora_config_read(const char *path, pylora_lora_config *out, pylora_message *why);
/* Of a text in memory; `path` names it. */
int pylora_lora_config_parse(const char *path, const char *text, size_t bytes,
                             pylora_lora_config *out, pylora_message *why);
void pylora_lora_config_free(pylora_lora_config *config);

/* ---- the plan (plan.c) ---- */

typedef struct pylora_part {
  int64_t r; /* 0: no A and B */
  double alpha, scale;
  int has_lora_bias, has_base_bias;
  const pylora_tensor *A, *B, *bias, *base_bias;
  int A_transposed; /* A is [k,r] (an embedding's, in GGUF) */
  int64_t heads;    /* of B's rows in llama.cpp's order: pylora_source_row */
} pylora_part;

/* The part of each module, [pylora_module_count], zeroed; PYLORA_E_PLAN names what matches nothing. */
int pylora_plan(const pylora_model *m, const pylora_lora_config *config, pylora_part *part,
                pylora_message *why);

/* ---- files ---- */

/* Finds each part's tensors; none may be missing or left over. */
int pylora_peft_match(const pylora_model *m, const pylora_file *file, pylora_part *part,
                      pylora_message *why);
int pylora_gguf_adapter(const pylora_model *m, const pylora_file *file, pylora_part *part,
                        pylora_message *why);

/* Whether an adapter's tensor may have its type; row i of it as float32, float64 rounded once. */
static inline int pylora_is_f64(const pylora_tensor *t) { return strcmp(t->type, "F64") == 0; }
int pylora_adapter_row(const pylora_tensor *t, int64_t i, float *out, pylora_message *why);

/* Parts, checked, as the engine takes them. (adapter.c) */
int pylora_adapter_make(const pylora_model *m, const pylora_file *file, const pylora_part *part,
                        pylora_adapter_file **out, pylora_message *why);

#endif
