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

int has(const testcase *c, const char *key); /* is there such a parameter? */
int truth(const testcase *c, const char *key);
double number(const testcase *c, const char *key);
uint64_t word64(const testcase *c, const char *key); /* 64-bit numbers are text */
const char *string(const testcase *c, const char *key);
int64_t *integers(const testcase *c, const char *key, int64_t *n);
const char *folder_of(const char *inside); /* the path of something in the folder of vectors */

array input(const testcase *c, const char *name); /* p is NULL if there is none of this name */
array typed(const testcase *c, const char *name, const char *dtype); /* stops if there is none */
pylora_mat in(const testcase *c, const char *name);                  /* a float32 input */
array output(const testcase *c, const char *name);                   /* what is expected */

/* Compares n elements with an output: within its bound, or bit for bit where it has none. */
void check_array(testcase *c, const char *name, const char *dtype, const void *got, int64_t n);
void check(testcase *c, const char *name, pylora_mat got);

/* The cases by their `op`: check_lora.c, check_llama.c. */
void lora_case(testcase *c);
void embedding_case(testcase *c);
void merge_case(testcase *c);
void philox_case(testcase *c);
void unit_case(testcase *c);
void init_case(testcase *c);
void dropout_case(testcase *c);
void adamw_case(testcase *c);
void embed_case(testcase *c);
void norm_case(testcase *c);
void rope_case(testcase *c);
void attention_case(testcase *c);
void swiglu_case(testcase *c);
void loss_case(testcase *c);
void block_case(testcase *c);
void training_case(testcase *c);
#endif
