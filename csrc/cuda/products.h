/* products.h - the two large products of a linear, by cuBLASLt. */
#ifndef PYLORA_CUDA_PRODUCTS_H
#define PYLORA_CUDA_PRODUCTS_H

#include "host.h"

/* out [m,n] = [out +] a W' in float32 sums, where W' is Wᵀ of W [n,terms] (x Wᵀ), or, with `rows_of_W`, W
 * [terms,n] (dy W).  All row-major; a and W have one dtype, out is float32. */
struct Product {
  int dtype;
  bool rows_of_W, add;
  int64_t m, n, terms;
  const void *a, *W;
  int64_t lda, ldw; /* lda >= terms; ldw >= terms, or >= n with rows_of_W */
  float *out;
  int64_t ldo; /* >= n */
};

/* Of the workspace that a product is given: more lets cuBLASLt choose among more algorithms. */
size_t products_workspace(const pylora_cuda *g);
/* An empty product is nothing to do, unless it has to be zeros: with terms = 0 it is not called. */
int product(pylora_cuda *g, void *stream, const Product &p, void *ws, size_t ws_bytes);

#endif
