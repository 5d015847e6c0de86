/* cover.h - the grid for operations that treat the elements of a matrix alike (vector.cuh). */
#ifndef PYLORA_CUDA_COVER_H
#define PYLORA_CUDA_COVER_H

#include "host.h"

enum { COVER_THREADS = 256 };

struct Covering {
  dim3 grid;
  int32_t lanes;
  /* A matrix of `rows` rows of `vectors` vectors, of which a thread takes about `each`. */
  Covering(int64_t rows, int64_t vectors, int64_t each) {
    for (lanes = 1; lanes < COVER_THREADS && lanes < vectors;) lanes *= 2;
    const int64_t across = ceil_div(vectors, lanes * each),
                  down = ceil_div(rows, COVER_THREADS / lanes);
    grid = dim3((unsigned)min64(across, INT32_MAX), (unsigned)min64(down, 65535));
  }
};

/* Matrices of one shape that all lie without gaps are one row each: no element is special, and vectors fit whatever
 * the number of columns. */
template <typename... V> static inline void flatten(V &...views) {
  const bool whole[] = {views.rows <= 1 || views.ld == views.cols...};
  for (bool w : whole)
    if (!w) return;
  View *const each[] = {&views...};
  for (View *v : each) v->cols *= v->rows, v->rows = min64(v->rows, 1), v->ld = v->cols;
}

template <typename... V> static inline bool all_fit(int n, const V &...views) {
  const bool fit[] = {vectors_fit(views, n)...};
  for (bool f : fit)
    if (!f) return false;
  return true;
}

#endif
