/* generate.c - text generation in C with an adapter, token ids in and token ids out.
 *
 *   generate MODEL ADAPTER PRECISION COUNT ID...
 *
 *   MODEL      a GGUF file, or a directory of Hugging Face's with safetensors
 *   ADAPTER    a PEFT directory or a GGUF adapter; - for the base model
 *   PRECISION  fp32, fp32x3, bf16, int8 or int4
 *   COUNT      how many tokens at most; the model's end-of-text token ends it, too
 *   ID...      the prompt, as a tokenizer gives it (pylora's, or any other of the model's)
 *
 * Prints the new ids, and a hash (FNV-1a, 64 bits) of all logits that they were chosen from: Python's pylora
 * gives the same ids and the same bits.  Built against an installed library:
 *
 *   cc generate.c $(pkg-config --cflags --libs pylora) -o generate        or find_package(pylora) in CMake
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pylora_model.h"

static const struct {
  const char *name;
  int dtype;
} precisions[] = {{"fp32", PYLORA_F32},
                  {"fp32x3", PYLORA_F32X3},
                  {"bf16", PYLORA_BF16},
                  {"int8", PYLORA_Q8_0},
                  {"int4", PYLORA_Q4_1}};

/* Everything that is open, so that it is closed in one place. */
typedef struct program {
  pylora_model *model;
  pylora_adapter_file *adapter;
  pylora_session *session;
  int64_t *ids;
  float *logits;
  pylora_message why;
} program;

static int fail(const program *p, int status) {
  fprintf(stderr, "generate: %s\n", p->why.text[0] ? p->why.text : pylora_status_text(status));
  return status;
}

static void hash(uint64_t *h, const void *bytes, size_t n) {
  for (const unsigned char *c = bytes; n--; c++) *h = (*h ^ *c) * UINT64_C(1099511628211);
}

static int ends(const pylora_about *about, int64_t token) {
  for (int i = 0; i < about->eos_count; i++)
    if (about->eos[i] == token) return 1;
  return 0;
}

/* What the adapter does, to standard error: every module, its rank and scale. */
static void show_plan(const pylora_adapter_file *adapter) {
  const pylora_plan_entry *e;
  for (int64_t i = 0; (e = pylora_adapter_entry(adapter, i)); i++)
    fprintf(stderr, "%-40s r %" PRId64 "  alpha %g  scale %g\n", e->module, e->r, e->alpha,
            e->scale);
}

static int run(program *p, int64_t prompt, int64_t count) {
  const pylora_about *about = pylora_model_about(p->model);
  const int64_t vocab = about->vocab;
  int status = pylora_session_open(p->model, prompt + count, &p->session, &p->why);
  if (status) return status;
  p->logits = malloc((size_t)vocab * sizeof *p->logits);
  if (!p->logits) return PYLORA_E_MEMORY;
  uint64_t h = UINT64_C(14695981039346656037);
  int64_t token = 0;
  for (int64_t i = 0; i < count; i++) {
    status = pylora_session_forward(p->session, pylora_adapter_struct(p->adapter),
                                    i ? &token : p->ids, i ? 1 : prompt, p->logits, &p->why);
    if (status) return status;
    hash(&h, p->logits, (size_t)vocab * sizeof *p->logits);
    status = pylora_greedy(p->logits, vocab, &token);
    if (status) return status;
    if (ends(about, token)) break;
    printf("%s%" PRId64, i ? " " : "", token);
    fflush(stdout);
  }
  printf("\nlogits %016" PRIx64 "\n", h);
  return PYLORA_OK;
}

static int prepare(program *p, char **argv, int64_t prompt) {
  int dtype = -1;
  for (size_t i = 0; i < sizeof precisions / sizeof *precisions; i++)
    if (strcmp(argv[3], precisions[i].name) == 0) dtype = precisions[i].dtype;
  if (dtype < 0) {
    snprintf(p->why.text, sizeof p->why.text, "there is no precision '%.40s'", argv[3]);
    return PYLORA_E_VALUE;
  }
  if (!(p->ids = malloc((size_t)prompt * sizeof *p->ids))) return PYLORA_E_MEMORY;
  for (int64_t i = 0; i < prompt; i++) {
    char *end;
    p->ids[i] = strtoll(argv[5 + i], &end, 10);
    if (*end || end == argv[5 + i]) {
      snprintf(p->why.text, sizeof p->why.text, "'%.40s' is not a token id", argv[5 + i]);
      return PYLORA_E_VALUE;
    }
  }
  const int status = pylora_model_open(argv[1], dtype, &p->model, &p->why);
  if (status || strcmp(argv[2], "-") == 0) return status;
  return pylora_adapter_open(p->model, argv[2], &p->adapter, &p->why);
}

int main(int argc, char **argv) {
  const int64_t count = argc > 4 ? strtoll(argv[4], NULL, 10) : 0;
  if (argc < 6 || count < 1 || count > 1000000) {
    fprintf(stderr, "usage: generate MODEL ADAPTER|- fp32|fp32x3|bf16|int8|int4 COUNT ID...\n");
    return 2;
  }
  program p = {0};
  const int64_t prompt = argc - 5;
  int status = prepare(&p, argv, prompt);
  if (!status) show_plan(p.adapter);
  if (!status) status = run(&p, prompt, count);
  if (status) fail(&p, status);
  pylora_session_close(p.session);
  pylora_adapter_close(p.adapter);
  pylora_model_close(p.model);
  free(p.logits);
  free(p.ids);
  return status ? 1 : 0;
}
