/* attention.h - what attention's forward, decoding and backward share. See attention.c. */
#ifndef PYLORA_ATTENTION_H
#define PYLORA_ATTENTION_H

#include "runtime/internal.h"

enum { PANEL = PYLORA_PANEL };

/* Rows r of a staircase see the columns [max(0, r + low), min(n, r + high)). */
typedef struct band_shape {
  int64_t low, high, n;
} band_shape;

/* c[r,:] += sum over the t that row r sees of a[r*ars + t*acs] b[t*ldb + :], t ascending. */
typedef struct product {
  const pylora_kernels *K;
  const float *a;
  int64_t ars, acs;
  const float *b;
  int64_t ldb;
  float *c;
  int64_t ldc, cols;
} product;

void pylora_band(const product *p, band_shape s, int64_t r0, int64_t r1, int64_t t0, int64_t t1);

typedef struct span {
  int64_t q0, queries, k0, keys;
} span;

static inline span span_of(const pylora_seqs *s, int64_t i) {
  span r = {s->q_start[i], s->q_start[i + 1] - s->q_start[i], 0, 0};
  r.k0 = s->k_start ? s->k_start[i] : r.q0;
  r.keys = s->k_len ? s->k_len[i] : r.queries;
  return r;
}

/* Queries [first, first + n) of a sequence, and the union of the keys that they see. */
typedef struct block {
  int64_t row, n;      /* rows of q */
  int64_t key, keys;   /* rows of k and v */
  band_shape of_query; /* rows: queries, columns: keys of the union */
  band_shape of_key;   /* the same seen from the keys */
} block;

block pylora_block_of(span s, const pylora_attn *a, int64_t first, int64_t n);

/* Scratch of one thread. D = head_dim; keys: of the longest sequence; seen: as far as the window lets
 * a block see. */
typedef struct scratch {
  float *s, *dp;              /* [seen][32] scores, and gradients of P */
  float *qt, *ot;             /* queries and do transposed, [pad_panel(D)][32] */
  float *k, *v;               /* [keys][D] of one kv head: bfloat16 widened */
  float *q, *d_o, *acc, *row; /* [32][D], [32][D], [32][D] and [D] */
  float *heads;               /* [2][heads][D]: a single query widened, and its output */
} scratch;

typedef struct call {
  const pylora_kernels *K;
  const pylora_mat *q, *k, *v, *o, *lse;
  const pylora_mat *d_o, *dq, *dk, *dv; /* backward only */
  const pylora_seqs *seqs;
  const pylora_attn *a;
  int threads;
  /* Tasks of the sequences: number i has those from first[i] to first[i+1]. Of queries alone in their
   * sequence (`alone`, forward only) they are pieces of its keys. */
  int64_t *first, *alone;
  /* Where a sequence's part of `shared` starts. Forward: scores of the queries alone. Backward:
   * partial dk and dv. */
  int64_t *at;
  float *shared;
  char *scratch;
  int64_t keys;    /* of the longest sequence */
  int64_t parts;   /* of a value_task's columns */
  int shared_keys; /* sequences have keys in common */
} call;

scratch pylora_attention_scratch(const call *f, int thread);
/* The sequence that task number n of `first` belongs to. */
int64_t pylora_owner(const int64_t *first, int64_t sequences, int64_t n);

/* Are products of these two matrices made of pairs of bfloat16? The rule of gemm_bf16. */
static inline int in_pairs(const pylora_mat *x, const pylora_mat *y, int64_t D) {
  return x->b && y->b && D % 2 == 0;
}

/* The queries' side of scores: rows of x transposed, out[t][c] (float32), or out[t/2][c] a pair. */
void pylora_transpose(const pylora_kernels *K, pylora_vec x, int64_t ld, int64_t cols, int64_t D,
                      int pairs, float *out);
/* s[t][c] = keys' side row t (k) times column c of qt */
static inline void pylora_scores(const call *f, int64_t keys, int64_t cols, int pairs, pylora_vec k,
                                 int64_t ldk, const float *qt, float *s) {
  const int64_t D = f->a->head_dim;
  if (pairs)
    f->K->gemm_bf16(keys, (int)cols, D / 2, k.b, ldk, (const uint16_t *)(const void *)qt, 2 * PANEL,
                    s, PANEL, GEMM_SET);
  else
    f->K->gemm(keys, (int)cols, D, k.p, ldk, 1, qt, PANEL, s, PANEL, GEMM_SET);
}

/* n rows of D columns in float32: as they are (*ld is theirs), or widened into out [n][D]. */
const float *pylora_rows(const pylora_kernels *K, const pylora_mat *x, int64_t row, int64_t col,
                         int64_t n, int64_t D, float *out, int64_t *ld);

/* y = x s, in y's type (through `row` [D] if that is bfloat16). */
void pylora_put_scaled(const pylora_kernels *K, int64_t D, const float *x, float s, pylora_vec y,
                       float *row);

/* Sequences of one query. (attention_decode.c) */
void pylora_attention_alone(call *f, int64_t pieces);
enum { ALONE_KEYS = 32 }; /* keys of a piece: few, so that a short context is shared out, too */

/* Parts of a sequence's queries whose dk and dv are summed apart; the number depends on nothing but the
 * sequence's own length. (attention_backward.c) */
enum { CHUNKS = 4, CHUNK_QUERIES = 128 };
static inline int64_t chunks_of(int64_t queries) {
  return queries ? max64(1, min64(CHUNKS, queries / CHUNK_QUERIES)) : 0;
}

/* What softmax multiplies scores by: capped ones were scaled before. */
static inline float pylora_scale(const pylora_attn *a) { return a->softcap > 0 ? 1.0f : a->scale; }

int pylora_check_attn(const pylora_attn *a);
int pylora_check_seqs(const pylora_seqs *s, int64_t m, int64_t n);
int pylora_take_scratch(call *f, int backward, void *ws, size_t bytes);

#endif
