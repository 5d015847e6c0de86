/* low_rank.h - the low-rank path on the host's side: tables of adapters, launches, and how large products are cut.
 *
 * linear_forward.cu and linear_backward.cu say what is to be done; low_rank.cu queues it. */
#ifndef PYLORA_CUDA_LOW_RANK_H
#define PYLORA_CUDA_LOW_RANK_H

#include <string.h>

#include "drop.h"
#include "host.h"
#include "low_rank.cuh"

int low_put(void *stream, const void *words, size_t bytes, void *to); /* at most LOW_PUT bytes */
enum { LOW_PUT = 3584 }; /* 4 kB of arguments is what every driver and compiler takes */

/* A table of T as kernels get it: up to LOW_FEW in the arguments, else in the workspace.  Pushed in two rounds: one that
 * counts, and one that writes. */
template <typename T> struct Table {
  T few[LOW_FEW];
  T *device;
  int64_t n, put;
  bool counting;
  T waiting[LOW_PUT / sizeof(T)];

  Table() : device(NULL), n(0), put(0), counting(true) { memset((void *)few, 0, sizeof few); }
  /* After the counting. */
  int begin(Arena *ws) {
    const int64_t many = n;
    n = put = 0, counting = false, device = NULL;
    if (many <= LOW_FEW) return PYLORA_OK;
    device = (T *)ws->take((size_t)many * sizeof(T));
    return device ? PYLORA_OK : PYLORA_E_WORKSPACE;
  }
  int push(void *stream, const T &item) {
    if (!counting && device) waiting[n - put] = item;
    if (!counting && !device) few[n] = item;
    n++;
    return device && n - put == (int64_t)(LOW_PUT / sizeof(T)) ? flush(stream) : PYLORA_OK;
  }
  int flush(void *stream) {
    if (counting || !device || n == put) return PYLORA_OK;
    TRY(low_put(stream, waiting, (size_t)(n - put) * sizeof(T), device + put));
    put = n;
    return PYLORA_OK;
  }
};

/* Groups under construction: units of adapters that share x, and the blocks and partial sums that they need. */
struct Groups {
  Table<LowGroup> table;
  int64_t blocks, floats; /* floats of partial sums for one split */
  int64_t most_cols;
  int units;      /* at most of a group */
  int widest;     /* units of any group */
  bool over_rows; /* outer products: blocks go over the columns and sums over the rows */
  LowGroup open;

  void start(int units_, bool over_rows_) {
    units = units_, over_rows = over_rows_;
    blocks = floats = most_cols = 0, widest = 0;
    memset((void *)&open, 0, sizeof open);
  }
  /* r ranks of a job; x is the same view for all jobs of an open group.  `alone`: a group of its own. */
  int add(void *stream, const View &x, int64_t row0, int64_t rows, int32_t job, int64_t r,
          bool alone);
  int close(void *stream);
};

/* The jobs and groups of one launch, and the launch.  `splits`: parts of the sum; `partial` for more than one. */
struct LowCall {
  LowJobs jobs;
  LowGroups groups;
  int64_t blocks;
  int splits, units;
  float *partial;
};
LowCall low_call(const Table<LowJob> &jobs, const Groups &groups, int64_t splits, float *partial);
int low_down(void *stream, int dtype, bool of_B, const LowCall &c);
/* dtype: of the groups' x. */
int low_outer(void *stream, int dtype, const LowCall &c);
int low_up(void *stream, bool strict, bool of_A, LowUp tile, const LowJobs &jobs);

/* ---- sizes, for the operations and their workspace query --------------------------------- */

/* Units of a group: float32 takes three terms, and shared memory for fewer. */
static inline int low_units(int dtype) { return dtype == PYLORA_F32 ? 2 : LOW_UNITS; }
int64_t low_down_splits(const pylora_cuda *g, int64_t m, int64_t terms, int64_t blocks);
int64_t low_outer_splits(const pylora_cuda *g, int64_t m, int64_t blocks);
/* Floats of partial sums that suffice: r is all ranks with each adapter's rounded up to 8. */
double low_down_floats(const pylora_cuda *g, int64_t m, double r);
double low_outer_floats(const pylora_cuda *g, int64_t m, double r, double columns);

/* A product [m,n] is cut into tiles of rows x cols, so that the float32 sums of one fit in L2. */
struct Tiling {
  int64_t rows, cols;
};
int64_t tile_bytes(const pylora_cuda *g);
/* row_bytes: of the factor's rows where it has to be cast, some at a time; 0: not cast. */
Tiling tiling(const pylora_cuda *g, int64_t m, int64_t n, int64_t row_bytes);
/* For rows that are cast, and how many at a time: at least 128. */
static inline int64_t cast_bytes(const pylora_cuda *g) { return 4 * tile_bytes(g); }
static inline int64_t cast_rows(const pylora_cuda *g, int64_t m, int64_t row_bytes) {
  return min64(m, max64(LOW_ROWS, cast_bytes(g) / max64(1, row_bytes) / LOW_ROWS * LOW_ROWS));
}

static inline bool aligned16(const void *p, int64_t ld, size_t size) {
  return ((uintptr_t)p | (uint64_t)ld * size) % 16 == 0;
}
/* Whether rows can be read in 16 bytes, and in eights of elements. */
static inline bool eights_fit(const View &v) {
  return v.cols % 8 == 0 && aligned16(v.p, v.rows > 1 ? v.ld : 0, bytes_of(v.dtype));
}
/* Rows i.. and columns j.. of a view. */
static inline View part_of(const View &v, int64_t i, int64_t rows, int64_t j, int64_t cols) {
  View t = v;
  t.p = (char *)v.p + (i * v.ld + j) * (int64_t)bytes_of(v.dtype);
  t.rows = rows, t.cols = cols;
  return t;
}
static inline pylora_mat mat_of(const View &v) {
  pylora_mat a = {NULL, v.rows, v.cols, v.ld, NULL, NULL};
  if (v.dtype == PYLORA_F32)
    a.p = (float *)v.p;
  else if (v.dtype == PYLORA_BF16)
    a.b = (uint16_t *)v.p;
  else
    a.h = (uint16_t *)v.p;
  return a;
}
/* Whether cuBLAS can read or write rows as they lie. */
static inline bool lies_well(const View &v) { return v.rows <= 1 || v.ld >= v.cols; }

int check_low(const pylora_lora *l, int64_t m, int64_t d, int64_t k);
static inline int check_weight(const pylora_packed *W) {
  if (!W) return PYLORA_E_NULL;
  if (W->magic != PYLORA_MAGIC_CUDA || W->d < 0 || W->k < 0) return PYLORA_E_PACKED;
  if (W->dtype != PYLORA_F32 && W->dtype != PYLORA_BF16 && W->dtype != PYLORA_F16)
    return PYLORA_E_PACKED;
  return W->d && W->k && !W->data ? PYLORA_E_PACKED : PYLORA_OK;
}

#endif
