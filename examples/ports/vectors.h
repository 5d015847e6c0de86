/* vectors.h - the golden vectors: reads inputs and parameters of a case, compares outputs. */
#ifndef VECTORS_H
#define VECTORS_H

#include "port.h"

typedef struct testcase {
  const char *name, *op;
  const char *params, *inputs, *outputs; /* its parts of the manifest, as text */
  int checked;                           /* outputs */
} testcase;

typedef struct array { /* a vector has one row */
  void *p;
  const char *dtype; /* "f32", "i64", ... */
  size_t size;       /* bytes of an element */
  int64_t rows, cols;
} array;

/* Opens a folder of vectors; then gives its cases one after the other, 0 after the last. */
void open_vectors(const char *path);
int next_case(testcase *c);
void finish_case(testcase *c); /* an output that was not checked is a failure */
int report(void);              /* prints the sum of all; the exit status */
void close_vectors(void);
void write_to(const char *path); /* what is checked from now on is written to this file, too */

int has(const testcase *c, const char *key); /* is there such a parameter? */
int truth(const testcase *c, const char *key);
double number(const testcase *c, const char *key);
uint64_t word64(const testcase *c, const char *key); /* 64-bit numbers are text */
const char *string(const testcase *c, const char *key);
int64_t *integers(const testcase *c, const char *key, int64_t *n);
double *numbers(const testcase *c, const char *key, int64_t *n);
const char *folder_of(const char *inside); /* the path of something in the folder of vectors */

/* Parts of the text: where a key's value begins, the entry of an array; NULL if there is none. */
const char *value(const char *part, const char *key);
const char *entry_of(const char *list, const char *name);
array read_array(const char *entry); /* its size and SHA-256 must be right */

array input(const testcase *c, const char *name); /* p is NULL if there is none of this name */
array typed(const testcase *c, const char *name, const char *dtype); /* stops if there is none */
pylora_mat in(const testcase *c, const char *name);                  /* a float32 input */
int listed(const testcase *c, const char *name);                     /* is it an output? */
array output(const testcase *c, const char *name);                   /* what is expected */

/* Compares n elements with an output: within its bound, or bit for bit where it has none. What the
 * case does not list is left out. */
void check_array(testcase *c, const char *name, const char *dtype, const void *got, int64_t n);
void check(testcase *c, const char *name, pylora_mat got);

pylora_drop drop_of(const testcase *c); /* the dropout of a case, its stream by its name (D-7) */

/* Tables of a stretched rotation, as a case's parameters say (check_features.c). */
void stretched(const testcase *c, pylora_mat cosines, pylora_mat sines, const int64_t *position);

/* The cases by their `op`: check_lora.c, check_numbers.c, check_llama.c,
 * check_features.c. */
void lora_case(testcase *c);
void lora16_case(testcase *c);
void rows_case(testcase *c);
void stacked_case(testcase *c);
void mixed_case(testcase *c);
void embedding_case(testcase *c);
void dora_case(testcase *c);
void merge_case(testcase *c);
void unmerge_case(testcase *c);
void philox_case(testcase *c);
void unit_case(testcase *c);
void quantile_case(testcase *c);
void init_case(testcase *c);
void dropout_case(testcase *c);
void adamw_case(testcase *c);
void update_case(testcase *c);
void clip_case(testcase *c);
void embed_case(testcase *c);
void norm_case(testcase *c);
void rope_case(testcase *c);
void tables_case(testcase *c);
void attention_case(testcase *c);
void swiglu_case(testcase *c);
void layer_norm_case(testcase *c);
void activation_case(testcase *c);
void soft_cap_case(testcase *c);
void choose_case(testcase *c);
void loss_case(testcase *c);
void micro_batches_case(testcase *c);
void block_case(testcase *c);
void training_case(testcase *c);
#endif
