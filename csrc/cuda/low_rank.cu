/* low_rank.cu - launches of the low-rank path's kernels, and the sizes of their work. */
#include "low_rank.h"

#include "low_down.cuh"
#include "low_outer.cuh"
#include "low_up.cuh"
#include "products.h"

int low_put(void *stream, const void *words, size_t bytes, void *to) {
  static_assert(sizeof(LowBlob) == LOW_PUT, "a table's part fits the arguments of a kernel");
  LowBlob blob;
  memset(&blob, 0, sizeof blob);
  memcpy(&blob, words, bytes);
  LAUNCH(pylora_low_table, 1, 256, 0, stream, blob, (uint32_t *)to, (int32_t)(bytes / 4));
  return PYLORA_OK;
}

/* ---- tables ------------------------------------------------------------------------------ */

int Groups::add(void *stream, const View &x, int64_t row0, int64_t rows, int32_t job, int64_t r,
                bool alone) {
  if (alone) TRY(close(stream));
  for (int64_t q = 0; q < r; q += 8) {
    if (open.of.units == units) TRY(close(stream));
    if (open.of.units == 0) {
      open.of.x = x, open.of.row0 = row0, open.of.rows = rows;
      open.of.vec = eights_fit(x);
    }
    open.unit[open.of.units].job = job;
    open.unit[open.of.units++].q0 = (int32_t)q;
  }
  return alone ? close(stream) : PYLORA_OK;
}

int Groups::close(void *stream) {
  if (open.of.units == 0) return PYLORA_OK;
  open.of.first = blocks, open.of.at = floats;
  blocks += over_rows ? ceil_div(open.of.x.cols, LOW_COLUMNS) : ceil_div(open.of.rows, LOW_ROWS);
  floats += (over_rows ? open.of.x.cols : open.of.rows) * 8 * open.of.units;
  most_cols = max64(most_cols, open.of.x.cols);
  if (open.of.units > widest) widest = open.of.units;
  const int status = table.push(stream, open);
  memset((void *)&open, 0, sizeof open);
  return status;
}

LowCall low_call(const Table<LowJob> &jobs, const Groups &groups, int64_t splits, float *partial) {
  LowCall c;
  c.jobs.table = jobs.device;
  memcpy((void *)c.jobs.few, (const void *)jobs.few, sizeof jobs.few);
  c.groups.table = groups.table.device;
  c.groups.n = (int32_t)groups.table.n;
  memcpy((void *)c.groups.few, (const void *)groups.table.few, sizeof groups.table.few);
  c.blocks = groups.blocks, c.units = groups.widest;
  c.splits = (int)splits, c.partial = splits > 1 ? partial : NULL;
  return c;
}

/* ---- launches ---------------------------------------------------------------------------- */

int low_down(void *stream, int dtype, bool of_B, const LowCall &c) {
  const dim3 grid((unsigned)c.blocks, (unsigned)c.splits);
#define DOWN(name) \
  LAUNCH(pylora_low_down_##name, grid, LOW_THREADS, 0, stream, c.jobs, c.groups, c.partial)
  if (dtype == PYLORA_F32 && of_B)
    DOWN(B_f32);
  else if (dtype == PYLORA_F32)
    DOWN(A_f32);
  else if (dtype == PYLORA_BF16 && of_B)
    DOWN(B_bf16);
  else if (dtype == PYLORA_BF16)
    DOWN(A_bf16);
  else if (of_B)
    DOWN(B_f16);
  else
    DOWN(A_f16);
#undef DOWN
  if (c.partial)
    LAUNCH(pylora_low_reduce, dim3((unsigned)c.blocks, (unsigned)c.units), 256, 0, stream, c.jobs,
           c.groups, (const float *)c.partial, c.splits);
  return PYLORA_OK;
}

int low_outer(void *stream, int dtype, const LowCall &c) {
  const dim3 grid((unsigned)c.blocks, (unsigned)c.splits);
  if (dtype == PYLORA_BF16)
    LAUNCH(pylora_low_outer_bf16, grid, LOW_THREADS, 0, stream, c.jobs, c.groups, c.partial);
  else if (dtype == PYLORA_F16)
    LAUNCH(pylora_low_outer_f16, grid, LOW_THREADS, 0, stream, c.jobs, c.groups, c.partial);
  else
    LAUNCH(pylora_low_outer_f32, grid, LOW_THREADS, 0, stream, c.jobs, c.groups, c.partial);
  if (c.partial)
    LAUNCH(pylora_outer_reduce, dim3((unsigned)c.blocks, (unsigned)c.units), 256, 0, stream, c.jobs,
           c.groups, (const float *)c.partial, c.splits);
  return PYLORA_OK;
}

int low_up(void *stream, bool strict, bool of_A, LowUp t, const LowJobs &jobs) {
  if (t.out.rows == 0 || t.out.cols == 0) return PYLORA_OK;
  /* Four neighbours start at multiples of four: the rest of a row that is no multiple is read one by one. */
  const auto fours = [](const View &v) {
    const int64_t ld = v.rows > 1 ? v.ld : 0;
    const uint64_t bytes = 4 * bytes_of(v.dtype);
    return ((uintptr_t)v.p | (uint64_t)ld * bytes_of(v.dtype)) % bytes == 0;
  };
  t.vec_out = fours(t.out), t.vec_prior = t.prior.p && fours(t.prior);
  t.vec_base = t.base && aligned16(t.base, t.out.rows > 1 ? t.ldb : 0, 4);
  const dim3 grid(
      (unsigned)ceil_div(t.out.cols, of_A ? (int64_t)UP_COLUMNS_A : (int64_t)UP_COLUMNS_B),
      (unsigned)ceil_div(t.out.rows, UP_ROWS));
  if (strict && of_A)
    LAUNCH(pylora_low_up_A_strict, grid, LOW_THREADS, 0, stream, t, jobs);
  else if (of_A)
    LAUNCH(pylora_low_up_A, grid, LOW_THREADS, 0, stream, t, jobs);
  else if (strict)
    LAUNCH(pylora_low_up_B_strict, grid, LOW_THREADS, 0, stream, t, jobs);
  else
    LAUNCH(pylora_low_up_B, grid, LOW_THREADS, 0, stream, t, jobs);
  return PYLORA_OK;
}

/* ---- sizes ------------------------------------------------------------------------------- */

enum {
  BLOCKS_EACH = 4, /* blocks of 128 threads for a multiprocessor */
  MOST_SPLITS = 64,
  FEW = 16,
  LEAST_COLUMNS = 256, /* of a tile that is not all columns */
};

/* Few rows: by the number of terms alone, so that a row's bits do not depend on the others. */
int64_t low_down_splits(const pylora_cuda *g, int64_t m, int64_t terms, int64_t blocks) {
  const int64_t most = min64(MOST_SPLITS, max64(1, terms / 128));
  if (m <= FEW) return most;
  return min64(most, ceil_div(BLOCKS_EACH * g->multiprocessors, max64(1, blocks)));
}
int64_t low_outer_splits(const pylora_cuda *g, int64_t m, int64_t blocks) {
  return min64(max64(1, m / 64), ceil_div(BLOCKS_EACH * g->multiprocessors, max64(1, blocks)));
}
double low_down_floats(const pylora_cuda *g, int64_t m, double r) {
  const int64_t splits = low_down_splits(g, m, INT64_MAX, ceil_div(m, LOW_ROWS));
  return (double)splits * (double)m * r;
}
/* Each of the blocks has at most 64 ranks of 128 columns, and splits * blocks <= BLOCKS_EACH * multiprocessors + blocks. */
double low_outer_floats(const pylora_cuda *g, int64_t m, double r, double columns) {
  const double by_rows = (double)max64(1, m / 64) * r * columns;
  const double blocks = (columns / LOW_COLUMNS + 1) * (r / 8);
  const double by_blocks =
      (BLOCKS_EACH * (double)g->multiprocessors + blocks) * 8 * LOW_UNITS * LOW_COLUMNS;
  return by_rows < by_blocks ? by_rows : by_blocks;
}

/* Two thirds of L2: the tile is written by cuBLAS and read right after. */
int64_t tile_bytes(const pylora_cuda *g) {
  const int64_t l2 = g->l2_bytes ? g->l2_bytes : (int64_t)24 << 20;
  return min64((int64_t)64 << 20, max64(LOW_ROWS * LEAST_COLUMNS * 4, l2 / 3 * 2));
}

/* A cut costs what its last blocks leave idle (blocks of 128 x 256 on all multiprocessors at once, which is about what
 * cuBLAS does) and two launches, about a quarter of a round. */
Tiling tiling(const pylora_cuda *g, int64_t m, int64_t n, int64_t row_bytes) {
  const int64_t most = tile_bytes(g) / (int64_t)sizeof(float);
  const auto rounds = [g](int64_t rows, int64_t cols) {
    return (double)ceil_div(ceil_div(rows, 128) * ceil_div(cols, 256),
                            max64(1, g->multiprocessors));
  };
  Tiling best = {min64(m, LOW_ROWS), min64(n, LEAST_COLUMNS)};
  double least = 0;
  for (int64_t across = 1; across <= ceil_div(n, LEAST_COLUMNS); across++) {
    const int64_t cols =
        across == 1 ? n : ceil_div(ceil_div(n, across), LEAST_COLUMNS) * LEAST_COLUMNS;
    if (least > 0 && cols <= 2048) break; /* it only gets worse */
    /* A grid has at most 65535 blocks in its second dimension: low_up. */
    int64_t rows = min64(most / max64(1, cols), (int64_t)65535 * UP_ROWS) / LOW_ROWS * LOW_ROWS;
    if (rows == 0) continue;
    if (row_bytes) rows = min64(rows, cast_rows(g, m, row_bytes));
    const int64_t down = ceil_div(m, rows);
    rows = min64(m, ceil_div(ceil_div(m, down), LOW_ROWS) * LOW_ROWS);
    const int64_t whole = n / cols, rest = n % cols, full = m / rows, last = m % rows;
    double cost = 0.25 * (double)(down * ceil_div(n, cols));
    cost += (double)(full * whole) * rounds(rows, cols);
    if (last) cost += (double)whole * rounds(last, cols);
    if (rest) cost += (double)full * rounds(rows, rest);
    if (last && rest) cost += rounds(last, rest);
    if (least == 0 || cost < least) least = cost, best.rows = rows, best.cols = cols;
  }
  return best;
}

int check_low(const pylora_lora *l, int64_t m, int64_t d, int64_t k) {
  if (l->r < 0 || l->r > INT32_MAX) return PYLORA_E_SHAPE;
  if (l->drop) TRY(check_drop(l->drop, m, k));
  return l->r && ((!l->A && k) || (!l->B && d)) ? PYLORA_E_NULL : PYLORA_OK;
}

size_t pylora_cuda_linear_workspace(pylora_cuda *g, int64_t m, int64_t n, int64_t d, int64_t k,
                                    int64_t r, int64_t segments) {
  const int64_t most = (int64_t)1 << 40;
  if (!g || m < 0 || n < 0 || d < 0 || k < 0 || r < 0 || segments < 0 || m > most || n > most ||
      d > most || k > most || r > most || segments > most)
    return 0;
  const double M = (double)m, R = (double)r + 8 * (double)n, S = (double)max64(1, segments);
  /* A factor in another type, some rows of it at a time. */
  const double some = (double)cast_bytes(g);
  const auto cast = [M, some](double columns) {
    const double all = M * columns * 4, piece = min64((int64_t)M, LOW_ROWS) * columns * 4;
    return all < some ? all : piece > some ? piece : some;
  };
  const double sums = M * (double)max64(d, k) * 4;
  /* Jobs and groups: forward's are those of each segment; backward has two sets of both, by type. */
  const double jobs = (double)n * (S + 2), groups = (S + 8) * (R / 16 + 2 * (double)n + 2);
  double total = jobs * (double)sizeof(LowJob) + groups * (double)sizeof(LowGroup);
  total +=
      4 * (low_down_floats(g, m, R) + M * R + low_outer_floats(g, m, R, (double)k + (double)d));
  total += cast((double)d + 64 * (double)n) + cast((double)k);
  total += sums < (double)tile_bytes(g) ? sums : (double)tile_bytes(g);
  total += (double)products_workspace(g) + 256 * (4 * (double)n + 64);
  return total > 1e17 ? 0 : (size_t)total;
}
