/* load.h - what reads a model's tensors: each that the settings ask for, packed; no tensor left over. */
#ifndef PYLORA_LOAD_INTERNAL_H
#define PYLORA_LOAD_INTERNAL_H

#include "files/model.h"

typedef struct loader {
  pylora_model *m;
  int precision;
  uint8_t *used; /* the files' tensors, one behind the other, that were asked for */
  pylora_message *why;
} loader;

#define SAY(status, ...) return pylora_fail(l->why, status, __VA_ARGS__)

/* Which tensor is wanted. */
typedef struct wanted {
  pylora_role role;
  int64_t layer, expert;
  const char *ending;
} wanted;

/* The wanted tensor, of this shape. */
int pylora_load_find(loader *l, const wanted *w, int dims, const int64_t *shape,
                     const pylora_tensor **out);
/* The weight of a module, and a matrix [d,hidden] that is never rounded. */
int pylora_load_matrix(loader *l, const pylora_module *at, pylora_packed *out);
int pylora_load_exact(loader *l, pylora_role role, int64_t layer, int64_t d, pylora_packed *out);
int pylora_load_norm(loader *l, pylora_role role, int64_t layer, int64_t n, pylora_norm *out);
/* Layer i, whose modules are those from `first` on. */
int pylora_load_layer(loader *l, int64_t i, int64_t first);
/* No tensor of the files was asked for by nobody. */
int pylora_load_nothing_left(loader *l);

#endif
