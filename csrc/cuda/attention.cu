/* attention.cu - the host's side of attention: checks, which kernels, how the work is cut.
 *
 * Whatever is decided here depends on shapes, types and layouts alone, never on what device arrays hold. */
#include <float.h>

#include "attention.cuh"
#include "host.h"

enum {
  MOST_D = 256,
  FEW_ROWS = 16,   /* rows (queries of a group's heads) of a block of one warp */
  MANY_ROWS = 128, /* of a block of eight */
  FEW_CHUNK = 128, /* keys of a piece, beside such a block of rows */
  MANY_CHUNK = 512,
  MOST_PIECES = 64,
  KEY_TILE = 64, /* at least that of every kernel */
  LARGEST_BLOCKS = 264
};

/* ---- how the work is cut ----------------------------------------------------------------- */

struct Cut {
  int64_t rows;  /* of a block */
  int64_t tiles; /* blocks of a sequence */
  int64_t splits, chunk;
};

/* Pieces of keys only where one block has all of a sequence's queries; their number does not depend on
 * how many sequences there are, so that a sequence's bits do not either. */
static Cut cut_forward(const pylora_cuda_seqs *s, const pylora_attn *a, bool tensor) {
  const int64_t rows = s->max_q * (a->heads / a->kv_heads);
  Cut c;
  c.rows = !tensor ? (int)PLAIN : rows <= FEW_ROWS ? (int)FEW_ROWS : (int)MANY_ROWS;
  c.tiles = ceil_div(rows, c.rows), c.splits = 1;
  c.chunk = c.rows == MANY_ROWS ? MANY_CHUNK : FEW_CHUNK;
  if (c.tiles > 1) return c;
  int64_t keys = s->max_k;
  if (a->window > 0 && a->window + s->max_q < keys) /* a window need not start where a tile does */
    keys = a->window + s->max_q + KEY_TILE;
  if (keys > MOST_PIECES * c.chunk)
    c.chunk = ceil_div(ceil_div(keys, MOST_PIECES), KEY_TILE) * KEY_TILE;
  c.splits = max64(1, ceil_div(keys, c.chunk));
  return c;
}

static int padded(int D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

static bool tensor_fits(const pylora_attn *a, const View &q, const View &k, const View &v) {
  return a->softcap == 0 && q.dtype != PYLORA_F32 && a->head_dim % 8 == 0 && vectors_fit(q, 8) &&
         vectors_fit(k, 8) && vectors_fit(v, 8);
}

/* ---- checks ------------------------------------------------------------------------------ */

static int check_shape(const pylora_attn *a, const pylora_cuda_seqs *s) {
  if (!a || !s) return PYLORA_E_NULL;
  if (a->heads < 1 || a->kv_heads < 1 || a->head_dim < 1 || a->heads % a->kv_heads)
    return PYLORA_E_SHAPE;
  if (a->window < 0 || !(a->softcap >= 0)) return PYLORA_E_VALUE;
  if (!(a->scale > 0) || !(a->scale <= FLT_MAX)) return PYLORA_E_VALUE;
  if (a->head_dim > MOST_D) return PYLORA_E_UNSUPPORTED;
  if (s->n < 0 || s->max_q < 0 || s->max_k < 0) return PYLORA_E_SHAPE;
  if (s->n > 0 && (!s->q_start || !s->k_start != !s->k_len)) return PYLORA_E_NULL;
  const int64_t most = (int64_t)1 << 30; /* positions are 32 bits */
  if (s->max_q > most / (a->heads / a->kv_heads) || s->max_k > most) return PYLORA_E_UNSUPPORTED;
  if (s->n > most) return PYLORA_E_UNSUPPORTED;
  return PYLORA_OK;
}

static int check_inputs(const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                        const pylora_cuda_seqs *s, const pylora_attn *a) {
  TRY(check_shape(a, s));
  if (!q || !k || !v) return PYLORA_E_NULL;
  const int64_t width = (int64_t)a->heads * a->head_dim;
  const int64_t kv_width = (int64_t)a->kv_heads * a->head_dim;
  TRY(check_view(q, q->rows, width, false));
  TRY(check_view(k, k->rows, kv_width, false));
  TRY(check_view(v, k->rows, kv_width, false));
  if (s->n == 0 && q->rows > 0) return PYLORA_E_SHAPE;
  /* An empty matrix has no memory, and so no type. */
  if (q->rows && k->rows &&
      (view_of(q).dtype != view_of(k).dtype || view_of(k).dtype != view_of(v).dtype))
    return PYLORA_E_UNSUPPORTED;
  return PYLORA_OK;
}

static int check_lse(const pylora_mat *lse, const pylora_mat *q, const pylora_attn *a, bool out) {
  TRY(check_view(lse, q->rows, a->heads, out));
  return view_of(lse).dtype == PYLORA_F32 ? PYLORA_OK : PYLORA_E_UNSUPPORTED;
}

static AttentionArgs arguments_of(pylora_cuda *g, const pylora_mat *q, const pylora_mat *k,
                                  const pylora_mat *v, const pylora_mat *o, const pylora_mat *lse,
                                  const pylora_cuda_seqs *s, const pylora_attn *a) {
  AttentionArgs args = {};
  args.q = view_of(q), args.k = view_of(k), args.v = view_of(v);
  args.o = view_of(o), args.lse = view_of(lse);
  args.q_start = s->q_start, args.k_start = s->k_start, args.k_len = s->k_len;
  args.n = s->n, args.max_q = s->max_q;
  args.heads = a->heads, args.kv_heads = a->kv_heads, args.group = a->heads / a->kv_heads;
  args.D = a->head_dim, args.window = a->window > 0 ? a->window : ATTENTION_MOST;
  args.splits = 1, args.scale = a->scale, args.softcap = a->softcap, args.bad = g->bad;
  return args;
}

/* ---- the workspace ----------------------------------------------------------------------- */

static size_t parts_bytes(const Cut &c, int64_t rows, int64_t D) {
  if (c.splits == 1) return 0;
  return arena_size((size_t)(c.splits * rows * D) * sizeof(float)) +
         arena_size((size_t)(c.splits * rows * 2) * sizeof(float));
}

/* delta, do in 16 bits, and the largest of do. */
static size_t backward_bytes(int64_t rows, int64_t D) {
  return arena_size((size_t)rows * sizeof(float)) +
         arena_size((size_t)(rows * D) * sizeof(uint16_t)) +
         arena_size((LARGEST_BLOCKS + 1) * sizeof(float));
}

size_t pylora_cuda_attention_workspace(pylora_cuda *g, const pylora_cuda_seqs *seqs,
                                       const pylora_attn *a, int64_t q_rows, int64_t k_rows) {
  if (!g || check_shape(a, seqs) || q_rows < 0 || k_rows < 0) return 0;
  const int64_t rows = q_rows * a->heads, D = a->head_dim;
  const size_t tensor = parts_bytes(cut_forward(seqs, a, true), rows, D);
  const size_t plain = parts_bytes(cut_forward(seqs, a, false), rows, D);
  const size_t forward = tensor > plain ? tensor : plain, backward = backward_bytes(rows, D);
  return 256 + (forward > backward ? forward : backward);
}

/* ---- forward ----------------------------------------------------------------------------- */

typedef void (*AttentionKernel)(AttentionArgs);

#define BY_TYPE_AND_D(name, suffix)                              \
  static AttentionKernel name(int dtype, int DT) {               \
    if (dtype == PYLORA_BF16)                                    \
      return DT == 64    ? pylora_attention_##suffix(bf16, 64)   \
             : DT == 128 ? pylora_attention_##suffix(bf16, 128)  \
                         : pylora_attention_##suffix(bf16, 256); \
    return DT == 64    ? pylora_attention_##suffix(f16, 64)      \
           : DT == 128 ? pylora_attention_##suffix(f16, 128)     \
                       : pylora_attention_##suffix(f16, 256);    \
  }
#define pylora_attention_forward_8_of(type, DT) pylora_attention_forward_##type##_##DT##_8
#define pylora_attention_forward_1_of(type, DT) pylora_attention_forward_##type##_##DT##_1
BY_TYPE_AND_D(forward_of_many, forward_8_of)
BY_TYPE_AND_D(forward_of_few, forward_1_of)

static AttentionKernel forward_plain(int DT) {
  return DT == 64    ? pylora_attention_forward_plain_64
         : DT == 128 ? pylora_attention_forward_plain_128
                     : pylora_attention_forward_plain_256;
}

/* Three tiles of 32 rows and the weights, or four tiles and two sets of weights (backward). */
static size_t plain_shared(int DT, int tiles, int weights) {
  return sizeof(float) * (size_t)(tiles * PLAIN * PLAIN_LD(DT) + weights * PLAIN * PLAIN_W);
}

static int grid_of(int64_t a, int64_t b, int64_t c, dim3 *grid) {
  if (a && b && c > INT32_MAX / a / b) return PYLORA_E_UNSUPPORTED;
  *grid = dim3((unsigned)(a * b * c));
  return PYLORA_OK;
}

static bool in_pairs(const View &x) {
  return x.ld % 2 == 0 && (uintptr_t)x.p % (2 * bytes_of(x.dtype)) == 0;
}

int pylora_cuda_attention_forward(pylora_cuda *g, void *stream, const pylora_mat *q,
                                  const pylora_mat *k, const pylora_mat *v,
                                  const pylora_cuda_seqs *seqs, const pylora_attn *a,
                                  const pylora_mat *o, const pylora_mat *lse, void *ws,
                                  size_t ws_bytes) {
  if (!g || !o || !lse) return PYLORA_E_NULL;
  TRY(check_inputs(q, k, v, seqs, a));
  TRY(check_view(o, q->rows, (int64_t)a->heads * a->head_dim, true));
  TRY(check_lse(lse, q, a, true));
  AttentionArgs args = arguments_of(g, q, k, v, o, lse, seqs, a);
  const bool tensor = tensor_fits(a, args.q, args.k, args.v);
  const Cut c = cut_forward(seqs, a, tensor);
  const int DT = padded(a->head_dim);
  args.tiles = (int32_t)c.tiles, args.splits = (int32_t)c.splits, args.chunk = (int32_t)c.chunk;
  args.pairs = in_pairs(args.o);
  if (c.splits > 1) {
    if (!ws) return PYLORA_E_NULL;
    const int64_t rows = q->rows * a->heads;
    Arena arena(ws, ws_bytes);
    args.part_o = (float *)arena.take((size_t)(c.splits * rows * a->head_dim) * sizeof(float));
    args.part_ml = (float *)arena.take((size_t)(c.splits * rows * 2) * sizeof(float));
    if (!args.part_o || !args.part_ml) return PYLORA_E_WORKSPACE;
  }
  OnDevice on(g);
  dim3 grid;
  TRY(grid_of(a->kv_heads, seqs->n, c.tiles, &grid));
  grid.y = (unsigned)c.splits;
  if (!tensor) {
    const AttentionKernel kernel = forward_plain(DT);
    TRY(launch("pylora_attention_forward_plain", kernel, grid, PLAIN_THREADS,
               plain_shared(DT, 3, 1), stream, args));
  } else {
    const bool few = c.rows == FEW_ROWS;
    const int keys = few || DT == 256 ? 32 : 64; /* of a tile */
    const size_t shared = sizeof(uint16_t) * (size_t)DT * (size_t)(c.rows + 2 * 2 * keys);
    const AttentionKernel kernel =
        few ? forward_of_few(args.q.dtype, DT) : forward_of_many(args.q.dtype, DT);
    TRY(launch("pylora_attention_forward", kernel, grid, few ? WARP : 8 * WARP, shared, stream,
               args));
  }
  if (c.splits > 1) {
    const int64_t warps = seqs->n * seqs->max_q * a->heads;
    TRY(grid_of(ceil_div(warps, 4), 1, 1, &grid));
    LAUNCH(pylora_attention_combine, grid, 4 * WARP, 0, stream, args);
  }
  return PYLORA_OK;
}

/* ---- backward ---------------------------------------------------------------------------- */

#define pylora_attention_keys_of(type, DT) \
  (DT == 64 ? pylora_attention_keys_##type##_64 : pylora_attention_keys_##type##_128)
#define pylora_attention_rows_of(type, DT) pylora_attention_rows_##type##_##DT
BY_TYPE_AND_D(backward_of_keys, keys_of)
BY_TYPE_AND_D(backward_of_rows, rows_of)

static AttentionKernel backward_keys_plain(int DT) {
  return DT == 64    ? pylora_attention_keys_plain_64
         : DT == 128 ? pylora_attention_keys_plain_128
                     : pylora_attention_keys_plain_256;
}
static AttentionKernel backward_rows_plain(int DT) {
  return DT == 64    ? pylora_attention_rows_plain_64
         : DT == 128 ? pylora_attention_rows_plain_128
                     : pylora_attention_rows_plain_256;
}

/* delta; and do in the type of q, aligned, if it is not so: args->d_o is then that copy. float16 is scaled. */
static int prepare(AttentionArgs *args, bool tensor, void *stream, void *ws, size_t ws_bytes) {
  const int64_t rows = args->q.rows * args->heads;
  const bool scaled = tensor && args->q.dtype == PYLORA_F16;
  const bool copied =
      tensor && (scaled || args->d_o.dtype != args->q.dtype || !vectors_fit(args->d_o, 8));
  if (!ws) return PYLORA_E_NULL;
  Arena arena(ws, ws_bytes);
  uint16_t *copy = NULL;
  float *largest = NULL;
  args->delta = (float *)arena.take((size_t)rows * sizeof(float));
  if (!args->delta) return PYLORA_E_WORKSPACE;
  if (copied && !(copy = (uint16_t *)arena.take((size_t)(rows * args->D) * sizeof(uint16_t))))
    return PYLORA_E_WORKSPACE;
  if (scaled && !(largest = (float *)arena.take((LARGEST_BLOCKS + 1) * sizeof(float))))
    return PYLORA_E_WORKSPACE;
  if (scaled) {
    LAUNCH(pylora_attention_largest, LARGEST_BLOCKS, 256, 0, stream, args->d_o, largest);
    LAUNCH(pylora_attention_factor, 1, 256, 0, stream, largest, LARGEST_BLOCKS,
           largest + LARGEST_BLOCKS);
    args->factor = largest + LARGEST_BLOCKS;
  }
  dim3 grid;
  TRY(grid_of(ceil_div(rows, 4), 1, 1, &grid));
  LAUNCH(pylora_attention_delta, grid, 4 * WARP, 0, stream, *args, copy);
  if (copied) {
    const int64_t width = (int64_t)args->heads * args->D;
    args->d_o = View{copy, args->q.rows, width, width, args->q.dtype};
  }
  return PYLORA_OK;
}

int pylora_cuda_attention_backward(pylora_cuda *g, void *stream, const pylora_mat *d_o,
                                   const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                                   const pylora_mat *o, const pylora_mat *lse,
                                   const pylora_cuda_seqs *seqs, const pylora_attn *a,
                                   const pylora_mat *dq, const pylora_mat *dk, const pylora_mat *dv,
                                   void *ws, size_t ws_bytes) {
  if (!g || !d_o || !o || !lse || !dq || !dk || !dv) return PYLORA_E_NULL;
  TRY(check_inputs(q, k, v, seqs, a));
  const int64_t width = (int64_t)a->heads * a->head_dim;
  const int64_t kv_width = (int64_t)a->kv_heads * a->head_dim;
  const int dtype = view_of(q->rows ? q : k).dtype;
  TRY(check_view(d_o, q->rows, width, false));
  TRY(check_view(o, q->rows, width, false));
  TRY(check_view(dq, q->rows, width, true));
  TRY(check_view(dk, k->rows, kv_width, true));
  TRY(check_view(dv, k->rows, kv_width, true));
  TRY(check_lse(lse, q, a, false));
  if (q->rows == 0 || k->rows == 0 || seqs->n == 0) return PYLORA_OK;
  AttentionArgs args = arguments_of(g, q, k, v, o, lse, seqs, a);
  args.d_o = view_of(d_o), args.dq = view_of(dq), args.dk = view_of(dk), args.dv = view_of(dv);
  args.pairs = in_pairs(args.dq) && in_pairs(args.dk) && in_pairs(args.dv);
  const bool tensor = tensor_fits(a, args.q, args.k, args.v);
  const int DT = padded(a->head_dim), edge = tensor ? 64 : PLAIN; /* keys, or rows, of a block */
  OnDevice on(g);
  TRY(prepare(&args, tensor, stream, ws, ws_bytes));

  dim3 of_keys, of_rows;
  if (seqs->k_start)
    TRY(grid_of(a->kv_heads, ceil_div(k->rows, edge), 1, &of_keys));
  else
    TRY(grid_of(a->kv_heads, seqs->n, ceil_div(seqs->max_q, edge), &of_keys));
  args.tiles = (int32_t)ceil_div(seqs->max_q * args.group, edge);
  TRY(grid_of(a->kv_heads, seqs->n, args.tiles, &of_rows));
  if (!tensor) {
    const AttentionKernel keys = backward_keys_plain(DT), rows = backward_rows_plain(DT);
    TRY(launch("pylora_attention_keys_plain", keys, of_keys, PLAIN_THREADS, plain_shared(DT, 4, 2),
               stream, args));
    return launch("pylora_attention_rows_plain", rows, of_rows, PLAIN_THREADS,
                  plain_shared(DT, 4, 1), stream, args);
  }
  const int keys = DT == 64 ? 64 : DT == 128 ? 32 : 16, rows = 32; /* of a step */
  const size_t row_bytes = sizeof(uint16_t) * (size_t)DT;
  const size_t keys_shared = row_bytes * (size_t)(2 * 64 + 2 * 2 * rows);
  const size_t rows_shared = row_bytes * (size_t)(2 * 64 + 2 * 2 * keys);
  if (DT == 256) {
    const bool bf16 = dtype == PYLORA_BF16;
    TRY(launch("pylora_attention_dv",
               bf16 ? pylora_attention_dv_bf16_256 : pylora_attention_dv_f16_256, of_keys, 128,
               keys_shared, stream, args));
    TRY(launch("pylora_attention_dk",
               bf16 ? pylora_attention_dk_bf16_256 : pylora_attention_dk_f16_256, of_keys, 128,
               keys_shared, stream, args));
  } else {
    TRY(launch("pylora_attention_keys", backward_of_keys(dtype, DT), of_keys, 128, keys_shared,
               stream, args));
  }
  return launch("pylora_attention_rows", backward_of_rows(dtype, DT), of_rows, 128, rows_shared,
                stream, args);
}
