/* model.h - what a model's readers share: its settings, its modules, where its tensors are. */
#ifndef PYLORA_MODEL_INTERNAL_H
#define PYLORA_MODEL_INTERNAL_H

#include "files/files.h"
#include "pylora_model.h"

enum { PYLORA_MAX_LAYERS = 10000, PYLORA_MAX_EXPERTS = 65536 };

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
  PHI3,
  GPT2,
  GPT_NEOX,
  MIXTRAL,
  QWEN3_MOE,
  OLMOE,
  FAMILIES
} pylora_family;

/* What all models of a family have in common (families.c). */
typedef struct pylora_family_facts {
  const char *name; /* config.json's model_type */
  const char *arch; /* llama.cpp's; NULL: none of its own */
  int interleaved;  /* llama.cpp's files have rows of q and k interleaved */
  int offset;       /* a norm multiplies by 1 + its weight; llama.cpp's files have the sum */
  int norm;         /* a pylora_norm_kind; LayerNorms have biases */
  enum { BEFORE, BOTH, AFTER } places; /* of norms, beside a sublayer */
  enum { NO_NORM, OF_HEADS, OF_ALL } qk_norm;
  int layout;                                        /* of rotations: a pylora_rope_layout */
  int fused;                                         /* a pylora_fused_qkv */
  enum { GATE_AND_UP, GATE_UP_IN_ONE, NO_GATE } mlp; /* without experts */
  int transposed; /* Hugging Face's files have its projections [inputs, outputs] */
  int learned;    /* a table of positions, which is added to the embedding; no rotations */
} pylora_family_facts;
extern const pylora_family_facts pylora_families[FAMILIES];
int pylora_usual_activation(pylora_family family);

/* What a tensor is in a model. */
typedef enum pylora_role {
  ROLE_EMBEDDING,
  ROLE_POSITIONS,
  ROLE_LAST_NORM,
  ROLE_HEAD,
  ROLE_Q, /* from here on of a layer */
  ROLE_K,
  ROLE_V,
  ROLE_QKV,
  ROLE_O,
  ROLE_GATE,
  ROLE_UP,
  ROLE_GATE_UP,
  ROLE_DOWN,
  ROLE_ROUTER,
  ROLE_EXPERT_GATE, /* in GGUF of all experts of the layer */
  ROLE_EXPERT_UP,
  ROLE_EXPERT_DOWN,
  ROLE_INPUT_NORM,
  ROLE_MID_NORM,
  ROLE_AFTER_ATTENTION,
  ROLE_AFTER_MLP,
  ROLE_Q_NORM,
  ROLE_K_NORM,
  ROLES
} pylora_role;
enum { PYLORA_NAME = 96, NORMS = ROLES - ROLE_INPUT_NORM };

/* What the files of a family call a tensor; 0: nothing.  `ending` is ".weight", ".bias" or "". (names.c) */
int pylora_tensor_name(pylora_family family, int gguf, pylora_role role, int64_t layer,
                       int64_t expert, const char *ending, char out[PYLORA_NAME]);
/* Hugging Face's path of the layers: "model.layers". */
const char *pylora_layers_path(pylora_family family);
/* Whether the layers of a family have this norm. */
int pylora_has_norm(pylora_family family, pylora_role norm);

/* Stretched angles of the rotary embedding. */
typedef struct pylora_scaling {
  enum { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, ROPE_DYNAMIC, ROPE_LONG } kind;
  double factor, low, high, original; /* LLAMA3: all of them; YARN, LONG: factor and original */
  /* YARN's own, 0 where the file has none; in place of the attention factor that follows from the others. */
  double beta_fast, beta_slow, attention_factor, mscale, mscale_all;
  int as_it_is;     /* the ends of the ramp are not cut to whole numbers */
  double *divisors; /* LONG: [rotated pairs] of short sequences, then of those beyond `original` */
} pylora_scaling;

/* A model's settings, with config.json's meanings. */
typedef struct pylora_settings {
  pylora_family family;
  int64_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, positions;
  double eps, theta, local_theta; /* the latter of the second kind of rotation, if there is one */
  double partial;                 /* the part of a head that is rotated; 0: all */
  pylora_scaling scaling, local_scaling;
  int two_ropes, parallel;
  int activation; /* a pylora_activation */
  int qkv_bias, o_bias, mlp_bias, tied;
  int64_t experts, top_k, expert_size; /* of the layers that have any; 0: none has */
  int norm_experts;                    /* the weights of the chosen ones add up to 1 */
  double attention_scale, embedding_multiplier, residual_multiplier,
      logit_multiplier;                    /* 0: as in Llama */
  double attention_softcap, logit_softcap; /* 0: none */
  int64_t window;                          /* 0: none */
  unsigned char local[PYLORA_MAX_LAYERS];  /* layers that have it */
  signed char rope[PYLORA_MAX_LAYERS];     /* which rotation a layer has; -1: none */
  unsigned char dense[PYLORA_MAX_LAYERS];  /* layers without experts */
  int scale_by_layer; /* that of attention is divided by 1 + the layer's number */
  int64_t bos, eos[PYLORA_MAX_EOS];
  int32_t eos_count;
  int interleaved; /* the file's rows of q and k are llama.cpp's */
} pylora_settings;

typedef struct pylora_files { /* those that hold a model's tensors (weights.c) */
  pylora_file **file;
  int64_t files;
  int gguf;
  size_t bare; /* how many letters of Hugging Face's names they leave out: "transformer." */
} pylora_files;
/* The tensor of this name in one of the files; NULL: none has it. */
const pylora_tensor *pylora_files_find(const pylora_files *files, const char *name);

/* From GGUF's metadata (config_gguf.c) and from config.json (config_hf.c). */
int pylora_settings_gguf(const pylora_files *files, pylora_settings *out, pylora_message *why);
int pylora_settings_hf(const char *path, pylora_settings *out, pylora_message *why);
/* What both must keep (settings.c): PYLORA_E_FILE. */
int pylora_settings_check(const char *where, const pylora_settings *s, pylora_message *why);

/* Pairs of numbers of a head that are rotated. */
static inline int64_t pylora_pairs(const pylora_settings *s) {
  return s->partial > 0 ? (int64_t)((double)s->head_dim * s->partial) / 2 : s->head_dim / 2;
}
/* Radians per position of each pair [pylora_pairs], of the first or second rotation, in a sequence of so many tokens.
 * (rope.c) */
void pylora_frequencies(const pylora_settings *s, int local, int64_t length, double *out);
/* cos and sin [rows, pairs] of the positions from `first` on, in a sequence of `length` tokens. */
int pylora_rope_rows(const pylora_settings *s, int local, int64_t length, int64_t first,
                     int64_t rows, float *cosines, float *sines);
/* The longest sequence whose angles are those of a short one. */
int64_t pylora_rope_unchanged(const pylora_settings *s, int local);
/* The longest sequence of all. */
int64_t pylora_longest(const pylora_settings *s);
/* What cos and sin are multiplied by. */
double pylora_attention_factor(const pylora_scaling *r);

/* ---- an open model ---- */

/* A module that can take LoRA, or a projection of an expert, which cannot by itself. */
typedef struct pylora_module {
  int64_t d, k;          /* an embedding's inputs are the vocabulary */
  int64_t layer, expert; /* -1: in none */
  int64_t heads;         /* of llama.cpp's order of its rows; see pylora_source_row */
  int32_t role, bias;
} pylora_module;

struct pylora_model {
  char *path;
  pylora_settings s;
  pylora_files
      files; /* open as long as the model is: an adapter may bring copies of base weights */
  pylora_about about;
  pylora_decoder decoder; /* its tables of angles are a session's own */
  pylora_layer *layer;
  pylora_experts *mixture; /* [layers] */
  pylora_packed *router;   /* [layers] */
  pylora_module *module;   /* [modules]: the layers', the head, the embedding */
  const pylora_packed **W; /* [modules - 2], and their biases */
  const float **bias;
  int64_t modules;
  pylora_packed *packed; /* [modules], and the positions */
  void **aligned;        /* everything that pylora_give is for */
  int64_t aligned_count;
  char *names; /* of modules, NAME bytes each */
};

/* Finds a tensor of the files; NULL: there is none. */
const pylora_tensor *pylora_model_tensor(const pylora_model *m, pylora_role role, int64_t layer,
                                         int64_t expert, const char *ending);
void pylora_files_close(pylora_files *files);
/* Opens what `path` is and reads its settings. */
int pylora_files_open(const char *path, pylora_files *files, pylora_settings *s,
                      pylora_message *why);

/* ---- modules (modules.c) ---- */

/* How many there are in a model, the head and the embedding among them; those of a layer. */
int64_t pylora_modules_of(const pylora_settings *s);
int64_t pylora_layer_modules(const pylora_settings *s, int64_t layer);
/* `heads` are those of the model's file; adapters in GGUF have llama.cpp's order whatever the model came from. */
void pylora_modules_list(const pylora_settings *s, pylora_module *out);
int64_t pylora_rows_order(const pylora_settings *s, pylora_role role);

/* The number of the head behind the layers' modules; how many modules there are. */
static inline int64_t pylora_head_number(const pylora_model *m) { return m->modules - 2; }
static inline int64_t pylora_module_count(const pylora_model *m) { return m->modules; }
static inline const char *pylora_module_path(const pylora_model *m, int64_t number) {
  return m->names + number * PYLORA_NAME;
}

/* "model.gguf: " before a sentence that does not name the file yet. */
int pylora_prefix(pylora_message *why, const char *where, int status);

#endif
