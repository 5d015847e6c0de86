/* model.h - what a model's readers share: its settings, its modules, where its tensors are. */
#ifndef PYLORA_MODEL_INTERNAL_H
#define PYLORA_MODEL_INTERNAL_H

#include "files/files.h"
#include "pylora_model.h"

enum { MODULES = PYLORA_LAYER_MODULES, PYLORA_MAX_LAYERS = 10000 };

typedef enum pylora_family {
  LLAMA,
  MISTRAL,
  QWEN2,
  QWEN3,
  GEMMA2,
  GEMMA3,
  GRANITE,
  SMOLLM3,
  OLMO2,
  OLMO3,
  GEMMA,
  MINISTRAL,
  SEED_OSS,
  ERNIE45,
  FAMILIES
} pylora_family;

/* What all models of a family have in common (settings.c). */
typedef struct pylora_family_facts {
  const char *name; /* config.json's model_type */
  const char *arch; /* llama.cpp's; NULL: none of its own */
  int interleaved;  /* llama.cpp's files have rows of q and k interleaved */
  int offset;       /* a norm multiplies by 1 + its weight; llama.cpp's files have the sum */
  int gelu;         /* the activation is GELU by tanh, else SiLU */
  enum { BEFORE, BOTH, AFTER } places; /* of norms, beside a sublayer */
  enum { NO_NORM, OF_HEADS, OF_ALL } qk_norm;
  int layout; /* of rotations: a pylora_rope_layout */
} pylora_family_facts;
extern const pylora_family_facts pylora_families[FAMILIES];

/* The norms of a layer; their names in Hugging Face's files (NULL: the family has none) and in llama.cpp's. */
enum { INPUT_NORM, MID_NORM, AFTER_ATTENTION, AFTER_MLP, Q_NORM, K_NORM, NORMS };
const char *pylora_norm_suffix(pylora_family family, int norm);
const char *pylora_norm_stem(pylora_family family, int norm);

/* Stretched angles of the rotary embedding. */
typedef struct pylora_scaling {
  enum { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN } kind;
  double factor, low, high, original; /* LLAMA3: all of them; YARN: factor and original */
  /* YARN's own, 0 where the file has none; in place of the attention factor that follows from the others. */
  double beta_fast, beta_slow, attention_factor, mscale, mscale_all;
  int as_it_is; /* the ends of the ramp are not cut to whole numbers */
} pylora_scaling;

/* A model's settings, with config.json's meanings. */
typedef struct pylora_settings {
  pylora_family family;
  int64_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, positions;
  double eps, theta, local_theta; /* the latter of the second kind of rotation, if there is one */
  pylora_scaling scaling, local_scaling;
  int two_ropes;
  int qkv_bias, o_bias, mlp_bias, tied;
  double attention_scale, embedding_multiplier, residual_multiplier,
      logit_multiplier;                    /* 0: as in Llama */
  double attention_softcap, logit_softcap; /* 0: none */
  int64_t window;                          /* 0: none */
  unsigned char local[PYLORA_MAX_LAYERS];  /* layers that have it */
  signed char rope[PYLORA_MAX_LAYERS];     /* which rotation a layer has; -1: none */
  int64_t bos, eos[PYLORA_MAX_EOS];
  int32_t eos_count;
  int interleaved; /* the file's rows of q and k are llama.cpp's */
} pylora_settings;

typedef struct pylora_files { /* those that hold a model's tensors (weights.c) */
  pylora_file **file;
  int64_t files;
  int gguf;
} pylora_files;
/* The tensor of this name in one of the files; NULL: none has it. */
const pylora_tensor *pylora_files_find(const pylora_files *files, const char *name);

/* From GGUF's metadata (config_gguf.c) and from config.json (config_hf.c). */
int pylora_settings_gguf(const pylora_files *files, pylora_settings *out, pylora_message *why);
int pylora_settings_hf(const char *path, pylora_settings *out, pylora_message *why);
/* What both must keep (settings.c): PYLORA_E_FILE. */
int pylora_settings_check(const char *where, const pylora_settings *s, pylora_message *why);

/* Radians per position of each pair of a head, [head_dim / 2], of the first or second rotation. (rope.c) */
void pylora_frequencies(const pylora_settings *s, int local, double *out);
/* What cos and sin are multiplied by. */
double pylora_attention_factor(const pylora_scaling *r);

/* ---- an open model ---- */

struct pylora_model {
  char *path;
  pylora_settings s;
  pylora_files
      files; /* open as long as the model is: an adapter may bring copies of base weights */
  pylora_about about;
  pylora_decoder decoder; /* its tables of angles are a session's own */
  pylora_layer *layer;
  const pylora_packed **W; /* [7 * layers], and their biases */
  const float **bias;
  pylora_packed *packed; /* [7 * layers + 2] */
  void **aligned;        /* everything that pylora_give is for */
  int64_t aligned_count;
  double *frequency;
  char *names; /* of modules, NAME bytes each */
};

/* Finds a tensor by Hugging Face's name, as the files call it; NULL: there is none. */
const pylora_tensor *pylora_model_tensor(const pylora_files *files, const char *hf_name);
void pylora_files_close(pylora_files *files);
/* Opens what `path` is and reads its settings. */
int pylora_files_open(const char *path, pylora_files *files, pylora_settings *s,
                      pylora_message *why);
/* The GGUF name of a Hugging Face one, written to `out`; 0: it has none. */
enum { PYLORA_NAME = 96 };
int pylora_gguf_name(const char *hf_name, char out[PYLORA_NAME]);

/* ---- modules ---- */

/* The number of a module behind the layers' and the head; how many there are. */
static inline int64_t pylora_head_number(const pylora_model *m) { return MODULES * m->s.layers; }
static inline int64_t pylora_module_count(const pylora_model *m) {
  return MODULES * m->s.layers + 2;
}
/* Outputs and inputs of a module, an embedding's inputs being the vocabulary, and whether it has a bias. */
void pylora_module_size(const pylora_settings *s, int64_t number, int64_t *d, int64_t *k,
                        int *bias);
extern const char *const pylora_module_suffix[MODULES]; /* "self_attn.q_proj", ... */

/* Heads of a module's rows that the model's file has in llama.cpp's order; 0: they are in Hugging Face's. */
static inline int64_t pylora_module_heads(const pylora_settings *s, int64_t number) {
  if (!s->interleaved || number >= MODULES * s->layers) return 0;
  const int64_t place = number % MODULES;
  return place == PYLORA_Q ? s->heads : place == PYLORA_K ? s->kv_heads : 0;
}

/* "model.gguf: " before a sentence that does not name the file yet. */
int pylora_prefix(pylora_message *why, const char *where, int status);

#endif
