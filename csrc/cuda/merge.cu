/* merge.cu - pylora_cuda_merge, _merge_residue and _unmerge: checks and launches. */
#include "host.h"
#include "merge.cuh"

enum {
  RANKS = 64,      /* of A and B in shared memory, at most */
  RANKS_WIDE = 16, /* the same where eight columns of doubles are a lane's */
  THREADS = 256,
  RESIDUE_THREADS = 128,
};

static int check(int32_t dtype, int64_t d, int64_t k, const void *W, const void *out,
                 const pylora_lora *l, int64_t ldo) {
  if (dtype != PYLORA_F32 && dtype != PYLORA_BF16 && dtype != PYLORA_F16)
    return PYLORA_E_UNSUPPORTED;
  if (d < 0 || k < 0 || (d > 1 && ldo < k && ldo > -k)) return PYLORA_E_SHAPE;
  if (!l) return PYLORA_E_NULL;
  if (l->r < 0) return PYLORA_E_SHAPE;
  if (d && k && (!W || !out || (l->r && (!l->A || !l->B)))) return PYLORA_E_NULL;
  return PYLORA_OK;
}

static Merge merge_of(int32_t dtype, int64_t d, int64_t k, const void *W, int64_t ldw, void *out,
                      int64_t ldo, const pylora_lora *l) {
  Merge q = {};
  q.W = W, q.out = out, q.A = l->A, q.B = l->B;
  q.d = d, q.k = k, q.ldw = ldw, q.ldo = ldo, q.lda = l->lda, q.ldb = l->ldb, q.r = l->r;
  q.dtype = dtype, q.s = l->s, q.sign = 1;
  return q;
}

/* MergeTile::place: bytes for tiles of WARP * V columns and, for each warp, `rows` rows. */
static size_t shared_bytes(int64_t ranks, int V, int rows, int warps, size_t size) {
  return WARP * V * sizeof(float) +
         (size_t)ranks * ((size_t)WARP * V + (size_t)warps * rows) * size;
}

/* Do the bound of merge.cuh and its shared memory (all ranks at once) allow the way through float32? */
static bool by_way_of_float(const pylora_cuda *g, const Merge &q, size_t shared) {
  return q.dtype != PYLORA_F32 && q.r > 0 && q.r <= RANKS && fabsf(q.s) <= 0x1p20f &&
         shared <= g->max_shared;
}

template <typename K>
static int launch_tiles(const pylora_cuda *g, const char *what, K kernel, void *stream, Merge q,
                        int V, int rows, int64_t ranks, size_t size) {
  enum { WARPS = THREADS / WARP };
  while (ranks > 1 && shared_bytes(ranks, V, rows, WARPS, size) > g->max_shared) ranks /= 2;
  q.ranks = (int32_t)ranks;
  const int64_t across = ceil_div(q.k, WARP * V), down = ceil_div(q.d, WARPS * rows);
  /* Several tiles of a block share its part of A; but there should be a few blocks for each multiprocessor. */
  const int64_t each = max64(1, min64(8, across * down / (4 * g->multiprocessors)));
  const dim3 grid((unsigned)across, (unsigned)min64(65535, ceil_div(down, each)));
  return launch(what, kernel, grid, THREADS, shared_bytes(ranks, V, rows, WARPS, size), stream, q);
}
#define LAUNCH_TILES(kernel, ...) TRY(launch_tiles(g, #kernel, kernel, stream, __VA_ARGS__))

static bool wide(const void *p, int64_t ld, int64_t d, int64_t n) {
  return (uintptr_t)p % 16 == 0 && (ld % n == 0 || d <= 1);
}

/* out = round(W + sign s B A) */
static int merge(const pylora_cuda *g, void *stream, const Merge &q) {
  if (q.d == 0 || q.k == 0) return PYLORA_OK;
  const int64_t vector = q.dtype == PYLORA_F32 ? 4 : 8, ranks = max64(1, min64(q.r, RANKS));
  const bool vectors =
      q.k % vector == 0 && wide(q.W, q.ldw, q.d, vector) && wide(q.out, q.ldo, q.d, vector);
  const bool fast = by_way_of_float(g, q, shared_bytes(ranks, 8, 8, THREADS / WARP, 4));
  if (fast && vectors)
    LAUNCH_TILES(pylora_merge_8_float, q, 8, 8, ranks, sizeof(float));
  else if (fast)
    LAUNCH_TILES(pylora_merge_1_float, q, 1, 8, ranks, sizeof(float));
  else if (vectors && vector == 8)
    LAUNCH_TILES(pylora_merge_8_double, q, 8, 4, min64(ranks, RANKS_WIDE), sizeof(double));
  else if (vectors)
    LAUNCH_TILES(pylora_merge_4_double, q, 4, 8, ranks, sizeof(double));
  else
    LAUNCH_TILES(pylora_merge_1_double, q, 1, 8, ranks, sizeof(double));
  return PYLORA_OK;
}

int pylora_cuda_merge(pylora_cuda *g, void *stream, int32_t dtype, int64_t d, int64_t k,
                      const void *W, int64_t ldw, const pylora_lora *lora, void *out, int64_t ldo,
                      int64_t *row_lossy) {
  if (!g) return PYLORA_E_NULL;
  TRY(check(dtype, d, k, W, out, lora, ldo));
  const OnDevice device(g);
  Merge q = merge_of(dtype, d, k, W, ldw, out, ldo, lora);
  q.row_lossy = row_lossy;
  if (row_lossy && d)
    TRY(device_status(
        "cudaMemsetAsync (merge)",
        cudaMemsetAsync(row_lossy, 0, (size_t)d * sizeof *row_lossy, (cudaStream_t)stream)));
  return merge(g, stream, q);
}

int pylora_cuda_merge_residue(pylora_cuda *g, void *stream, int32_t dtype, int64_t d, int64_t k,
                              const void *W, int64_t ldw, const void *merged, int64_t ldm,
                              const pylora_lora *lora, const int64_t *row_first, int64_t *position,
                              uint32_t *bits) {
  enum { ROWS = 8, WARPS = RESIDUE_THREADS / WARP };
  if (!g) return PYLORA_E_NULL;
  TRY(check(dtype, d, k, W, merged, lora, ldm));
  if (d == 0 || k == 0) return PYLORA_OK;
  if (!position && !bits)
    return PYLORA_OK; /* no element is lost: an empty array may have no address */
  if (!row_first || !position || !bits) return PYLORA_E_NULL;
  const OnDevice device(g);
  Merge q = merge_of(dtype, d, k, W, ldw, (void *)(uintptr_t)merged, ldm, lora);
  q.row_first = row_first, q.position = position, q.bits = bits;
  q.ranks = (int32_t)max64(1, min64(q.r, RANKS));
  const dim3 grid((unsigned)ceil_div(d, WARPS * ROWS));
  const size_t narrow = shared_bytes(q.ranks, 1, ROWS, WARPS, sizeof(float));
  if (by_way_of_float(g, q, narrow))
    LAUNCH(pylora_merge_residue_float, grid, RESIDUE_THREADS, narrow, stream, q);
  else
    LAUNCH(pylora_merge_residue_double, grid, RESIDUE_THREADS,
           shared_bytes(q.ranks, 1, ROWS, WARPS, sizeof(double)), stream, q);
  return PYLORA_OK;
}

int pylora_cuda_unmerge(pylora_cuda *g, void *stream, int32_t dtype, int64_t d, int64_t k,
                        const void *merged, int64_t ldm, const pylora_lora *lora, int64_t n,
                        const int64_t *position, const uint32_t *bits, void *out, int64_t ldo) {
  if (!g) return PYLORA_E_NULL;
  TRY(check(dtype, d, k, merged, out, lora, ldo));
  if (n < 0) return PYLORA_E_SHAPE;
  if (n && (!position || !bits)) return PYLORA_E_NULL;
  if (n && k == 0) return PYLORA_E_INDEX;
  const OnDevice device(g);
  Merge q = merge_of(dtype, d, k, merged, ldm, out, ldo, lora);
  q.sign = -1;
  TRY(merge(g, stream, q));
  LAUNCH(pylora_merge_put_back, (unsigned)min64(ceil_div(n, 256), 1 << 20), 256, 0, stream, dtype,
         d, k, n, position, bits, out, ldo, g->bad);
  return PYLORA_OK;
}
