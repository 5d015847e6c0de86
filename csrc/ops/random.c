/* random.c - Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011) and the dropout that is keyed by it. Any word can be had without those before it, so the
 * bits depend on neither threads nor batch. */
#include "runtime/internal.h"

enum { WORDS = PYLORA_PHILOX_WORDS, CHUNK = 64 * WORDS };

static void words(const pylora_kernels *K, uint64_t seed, uint64_t stream, int64_t first, int64_t n,
                  uint32_t *out) {
  uint32_t block[WORDS];
  while (n > 0) {
    const int64_t skip = first % 4, take = min64(n, WORDS - skip);
    K->philox(seed, stream, (uint64_t)(first / 4), block);
    memcpy(out, block + skip, (size_t)take * sizeof(uint32_t));
    first += take, out += take, n -= take;
  }
}

typedef struct philox {
  const pylora_kernels *K;
  uint64_t seed, stream;
  int64_t first, n;
  uint32_t *out;
} philox;

static void philox_task(void *ctx, int64_t task, int thread) {
  (void)thread;
  const philox *f = ctx;
  const int64_t i = task * CHUNK;
  words(f->K, f->seed, f->stream, f->first + i, min64(CHUNK, f->n - i), f->out + i);
}

int pylora_philox(uint64_t seed, uint64_t stream, int64_t first, int64_t n, uint32_t *out) {
  if (n < 0) return PYLORA_E_SHAPE;
  if (first < 0 || first > INT64_MAX - n) return PYLORA_E_VALUE;
  if (n && !out) return PYLORA_E_NULL;
  philox f = {pylora_table(), seed, stream, first, n, out};
  pylora_parallel(philox_task, &f, ceil_div(n, CHUNK), pylora_num_threads());
  return PYLORA_OK;
}

/* One row: x and y are elements first .. first+n-1 of the stream that `drop` names. */
static void dropout_row(const pylora_drop *drop, int64_t first, int64_t n, const float *x,
                        float *y) {
  /* p 2^32 is exact in double, and at most 2^32 - 2^8. */
  const uint32_t threshold = (uint32_t)((double)drop->p * 4294967296.0);
  const float scale = 1.0f / (1.0f - drop->p);
  const pylora_kernels *K = pylora_table();
  uint32_t w[WORDS];
  for (int64_t j = 0; j < n; j += WORDS, first += WORDS) {
    const int64_t part = min64(WORDS, n - j);
    words(K, drop->seed, drop->stream, first, part, w);
    K->drop(part, w, threshold, x + j, scale, y + j);
  }
}

/* Rows `row` .. of a matrix of width k must have element numbers that fit. */
static int check_drop(const pylora_drop *drop, int64_t row, int64_t rows, int64_t k) {
  if (!drop) return PYLORA_E_NULL;
  if (!(drop->p >= 0 && drop->p < 1)) return PYLORA_E_VALUE;
  const int64_t most = INT64_MAX / max64(1, k);
  if (drop->row0 < 0 || row < 0 || rows > most || row > most - rows ||
      drop->row0 > most - rows - row)
    return PYLORA_E_VALUE;
  return PYLORA_OK;
}

int pylora_dropout_at(const pylora_mat *x, const pylora_drop *drop, int64_t row, int64_t col,
                      int64_t k, const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_mat(x, x->rows, x->cols, 0));
  TRY(check_mat(y, x->rows, x->cols, 1));
  if (col < 0 || col > k - x->cols) return PYLORA_E_SHAPE;
  TRY(check_drop(drop, row, x->rows, k));
  for (int64_t i = 0; i < x->rows; i++) {
    const float *from = x->p + i * x->ld;
    float *to = y->p + i * y->ld;
    if (drop->p == 0)
      memmove(to, from, (size_t)x->cols * sizeof(float));
    else
      dropout_row(drop, (drop->row0 + row + i) * k + col, x->cols, from, to);
  }
  return PYLORA_OK;
}

typedef struct dropout {
  const pylora_mat *x, *y;
  const pylora_drop *drop;
} dropout;

static void dropout_task(void *ctx, int64_t i, int thread) {
  (void)thread;
  const dropout *f = ctx;
  const int64_t k = f->x->cols;
  const pylora_mat x = {f->x->p + i * f->x->ld, 1, k, k, NULL, NULL},
                   y = {f->y->p + i * f->y->ld, 1, k, k, NULL, NULL};
  (void)pylora_dropout_at(&x, f->drop, i, 0, k, &y); /* its arguments were checked */
}

int pylora_dropout(const pylora_mat *x, const pylora_drop *drop, const pylora_mat *y) {
  if (!x || !y) return PYLORA_E_NULL;
  TRY(check_mat(x, x->rows, x->cols, 0));
  TRY(check_mat(y, x->rows, x->cols, 1));
  TRY(check_drop(drop, 0, x->rows, x->cols));
  dropout f = {x, y, drop};
  if (x->cols) pylora_parallel(dropout_task, &f, x->rows, pylora_num_threads());
  return PYLORA_OK;
}
