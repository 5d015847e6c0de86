/* drop.h - pylora_drop on the host's side: its check, and what a kernel gets of it (philox.cuh). */
#ifndef PYLORA_CUDA_DROP_H
#define PYLORA_CUDA_DROP_H

#include "host.h"
#include "philox.cuh"

/* The numbers of the elements of m rows of k must fit. */
static inline int check_drop(const pylora_drop *drop, int64_t m, int64_t k) {
  if (!drop) return PYLORA_E_NULL;
  if (!(drop->p >= 0 && drop->p < 1)) return PYLORA_E_VALUE;
  const int64_t most = INT64_MAX / max64(1, k);
  if (drop->row0 < 0 || m > most || drop->row0 > most - m) return PYLORA_E_VALUE;
  return PYLORA_OK;
}

/* NULL: no dropout. */
static inline Drop drop_of(const pylora_drop *drop) {
  Drop d = {0, 0, 0, 0, 1.0f};
  if (!drop) return d;
  d.seed = drop->seed, d.stream = drop->stream, d.row0 = drop->row0;
  d.threshold = (uint32_t)((double)drop->p * 4294967296.0);
  d.scale = 1.0f / (1.0f - drop->p);
  return d;
}

#endif
