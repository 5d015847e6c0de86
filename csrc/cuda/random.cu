/* random.cu - pylora_cuda_philox and pylora_cuda_dropout: checks and launches. */
#include "host.h"
#include "random.cuh"
#include "drop.h"

enum { THREADS = 256 };

int pylora_cuda_philox(pylora_cuda *g, void *stream, uint64_t seed, uint64_t stream_number,
                       int64_t first, int64_t n, uint32_t *out) {
  if (!g) return PYLORA_E_NULL;
  if (n < 0) return PYLORA_E_SHAPE;
  if (first < 0 || first > INT64_MAX - n) return PYLORA_E_VALUE;
  if (n == 0) return PYLORA_OK;
  if (!out) return PYLORA_E_NULL;
  const OnDevice device(g);
  const int64_t blocks = (first + n - 1) / 4 - first / 4 + 1; /* of four words */
  const dim3 grid((unsigned)min64(ceil_div(blocks, THREADS), 1 << 20));
  const int32_t aligned = first % 4 == 0 && (uintptr_t)out % 16 == 0;
  LAUNCH(pylora_philox_words, grid, THREADS, 0, stream, seed, stream_number, first, n, out,
         aligned);
  return PYLORA_OK;
}

int pylora_cuda_dropout(pylora_cuda *g, void *stream, const pylora_mat *x, const pylora_drop *drop,
                        const pylora_mat *y) {
  if (!g || !x || !y) return PYLORA_E_NULL;
  const int64_t m = x->rows, k = x->cols;
  TRY(check_view(x, m, k, false));
  TRY(check_view(y, m, k, true));
  TRY(check_drop(drop, m, k));
  if (m == 0 || k == 0) return PYLORA_OK;
  const OnDevice device(g);
  const View from = view_of(x), to = view_of(y);
  const int32_t aligned = k % 4 == 0 && vectors_fit(from, 4) && vectors_fit(to, 4);
  const dim3 grid((unsigned)min64(ceil_div(k / 4 + 2, THREADS), 1 << 20),
                  (unsigned)min64(m, 65535));
  LAUNCH(pylora_dropout_rows, grid, THREADS, 0, stream, from, drop_of(drop), to, aligned);
  return PYLORA_OK;
}
