/* cpu/kernels.h - the table of inner loops that each instruction set fills in.
 *
 * Everything above it (lora_forward.c, transformer.c, ...) is plain C that knows tiles, threads and memory,
 * but no instruction set.  Everything below it (gemm.inc, rows.inc) is one source, compiled with the
 * vector type of vec.h once for each instruction set that makes a difference to it.
 *
 * One rule makes the library's determinism: an element of a result is summed over k in the order
 * k = 0, 1, 2, ... in one accumulator, whatever the tile; long sums are cut into pieces at places
 * that depend on k alone.  So no tiling, row count or thread count changes its bits. */
#ifndef PYLORA_CPU_KERNELS_H
#define PYLORA_CPU_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define PYLORA_PHILOX_WORDS 64
#define PYLORA_FEW 4

/* What a product does with what is in c. */
enum {
  GEMM_SET = 0,      /* c = sum */
  GEMM_CONTINUE = 1, /* the sum starts from c: one chain, as if both calls were one */
  GEMM_ADD = 2,      /* c = c + sum: pieces of a long sum, which lose less than one long chain */
};

/* A row of a matrix, or a piece of it, in either type: one of the two is NULL. */
typedef struct pylora_vec {
  float *p;
  uint16_t *b; /* bfloat16 */
} pylora_vec;

/* Some rows and columns of a weight, and the adapter's part for them. */
enum {
  MERGE_ROWS = 64,  /* rows at most; up to 32 ranks of A are widened once for them */
  MERGE_COLS = 128, /* columns at most, if `lossy` is asked for */
  MERGE_WORDS = MERGE_COLS / 16,
  MERGE_ADD = 0,
  MERGE_TAKE,
  MERGE_FIND,
};
typedef struct merge_job {
  int m; /* rows */
  int64_t n, r, lda, ldb, ldw, ldo;
  const float *A, *B; /* [r,n] and [m,r] */
  double s;
  const void *w;
  void *out;
  /* [m][MERGE_WORDS]: bit c of word i is column 16 i + c, set if it does not come back. NULL: not asked;
   * MERGE_TAKE does not look. */
  uint16_t *lossy;
} merge_job;

/* Where tiles will be stored, so that it can be asked for early: row i of panel u is `bytes` at
 * p + i * step + u * bytes.  p may be NULL. */
typedef struct pylora_put {
  const char *p;
  int64_t step, bytes;
} pylora_put;

/* A tile c [m][32] = sum over kk terms of a's rows times b [kk][32], as `mode` says, and what is asked for
 * meanwhile: where it will be stored, and `pieces` of what is read next, piece_step bytes apart. */
typedef struct rows_job {
  int64_t m, kk;
  const float *a;
  int64_t lda;
  const float *b;
  float *c;
  int mode;
  pylora_put put;
  const char *next;
  int64_t pieces, piece_step, piece_bytes;
} rows_job;

/* Tiles of bfloat16 products: c [n][m][32] = (GEMM_SET) or += the rows of a times n panels of 32 outputs,
 * [pairs][32][2].  With low_b, float32 in halves: the lower ones lie low_a and low_b elements after
 * the upper ones, and a b is a1 b1 + a1 b2 + a2 b1. */
typedef struct panels_job {
  int64_t m;
  int n;
  int64_t pairs;
  const uint16_t *a;
  int64_t lda, low_a;
  const uint16_t *b;
  int64_t step, low_b; /* from a panel to the next one */
  float *c;
  int64_t step_c;
  int mode;
} panels_job;

/* ---- what each kernel does */

/* c[i,j] = sum_t a[i*ars + t*acs] * b[t*ldb + j]  for i < m, j < n, t < kk, as `mode` says.
 * n <= PYLORA_PANEL; b and c are touched only at j < n. */
typedef void pylora_kernel_gemm(int64_t m, int n, int64_t kk, const float *a, int64_t ars,
                                int64_t acs, const float *b, int64_t ldb, float *c, int64_t ldc,
                                int mode);
/* gemm of many rows and a panel, in the same order of sums. */
typedef void pylora_kernel_rows_f32(const rows_job *j);
/* dst[j*ldd + i] = src[i*lds + j]  for i < m, j < n: any 32-bit words, whose bits stay. */
typedef void pylora_kernel_transpose(int64_t m, int64_t n, const float *src, int64_t lds,
                                     float *dst, int64_t ldd);

/* bfloat16, where b holds pairs of terms: c[i,j] = sum_t  a[i*lda + 2t + 1] b[t*ldb + 2j + 1]
 *                                                       + a[i*lda + 2t] b[t*ldb + 2j],  t < pairs.
 * Each element is one chain of fused multiply-adds in this order: t upwards, the odd term before the
 * even one (what vdpbf16ps does); but for amx, whose order is in gemm_amx.inc: there GEMM_ADD is
 * GEMM_CONTINUE, and a sum that is continued after a number of pairs that is no multiple of 16 is not
 * as if both calls were one.
 * Subnormal inputs and results may be taken as 0. n, modes as gemm.
 * lda, ldb in elements. */
typedef void pylora_kernel_gemm_bf16(int64_t m, int n, int64_t pairs, const uint16_t *a,
                                     int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                                     int64_t ldc, int mode);
/* The same in that one chain on every table, amx too. */
typedef void pylora_kernel_gemm_pairs(int64_t m, int n, int64_t pairs, const uint16_t *a,
                                      int64_t lda, const uint16_t *b, int64_t ldb, float *c,
                                      int64_t ldc, int mode);
/* gemm_bf16 for panels, in the same order of sums; with low_b in any order that is the same for all m
 * and n. */
typedef void pylora_kernel_panels_bf16(const panels_job *j);
/* Up to PYLORA_FEW single rows, each with a matrix of its own: gemm and gemm_bf16 of m = 1, n = w,
 * lda = ldc = anything, ldb = w and 2 w, GEMM_SET or GEMM_ADD.  A row alone is one chain that waits for each of its sums. */
typedef void pylora_kernel_few_rows(int jobs, int w, int64_t kk, const float *const *a,
                                    const float *const *b, float *const *c, int mode);
typedef void pylora_kernel_few_rows_bf16(int jobs, int w, int64_t pairs, const uint16_t *const *a,
                                         const uint16_t *const *b, float *const *c, int mode);
/* y = residual + tile, cols <= 32 of n rows; residual may be NULL, and y may be residual. */
typedef void pylora_kernel_put_tile(int64_t n, int cols, const float *tile, const float *residual,
                                    int64_t ldr, pylora_vec y, int64_t ldy);
/* A tile of 32 outputs x 32 inputs, from pairs of inputs to pairs of outputs:
 * dst[(i/2)*64 + 2*j + i%2] = src[(j/2)*64 + 2*i + j%2]  for outputs i < 32, inputs j < 32. */
typedef void pylora_kernel_transpose32_bf16(const uint16_t *src, uint16_t *dst);
typedef void pylora_kernel_to_bf16(int64_t n, const float *x,
                                   uint16_t *y); /* to nearest even; NaN stays NaN */
typedef void pylora_kernel_from_bf16(int64_t n, const uint16_t *x, float *y);
/* x in two halves: rounded, and what is left, rounded.  A number that is not finite is its upper half; the
 * halves of one that would be rounded to infinity are cut off instead. */
typedef void pylora_kernel_halves(int64_t n, const float *x, uint16_t *high, uint16_t *low);

/* Quantized weights; rows and panels lie as format_q.h says.
 * groups x 32 numbers of a row of x -> pylora_qrow [groups] */
typedef void pylora_kernel_quantize_row(int dtype, int64_t groups, const float *x, void *out);
/* c[i,j] = sum over the groups, j < 32, in one chain, as `mode` says; `stride` in bytes. */
typedef void pylora_kernel_gemm_q(int dtype, int64_t m, int64_t groups, const void *rows,
                                  size_t stride, const void *panel, float *c, int64_t ldc,
                                  int mode);
/* One group of a panel: out[t*32 + i] = W[i, t], the exact values. */
typedef void pylora_kernel_dequantize(int dtype, const void *group, float *out);

/* K-quants and their kin; rows and panels lie as format_k.h says.
 * groups x 32 numbers of a row of x -> pylora_krow [groups], of codes up to `most` */
typedef void pylora_kernel_quantize_bytes(int most, int64_t groups, const float *x, void *out);
/* gemm_q, over `supers` of them. */
typedef void pylora_kernel_gemm_k(int dtype, int64_t m, int64_t supers, const void *rows,
                                  size_t stride, const void *panel, float *c, int64_t ldc,
                                  int mode);
/* Group `group` of a super: out[t*32 + i] = W[i, t], the exact values. */
typedef void pylora_kernel_dequantize_k(int dtype, const void *super, int group, float *out);

/* Loops over one row of n elements (rows.inc). An element has the same bits in a full vector and in
 * the tail, and sums are in an order fixed by n alone. Outputs may be inputs, element for element, of the
 * same type.  A bfloat16 row gives the bits of the float32 row of its values, rounded once. */
typedef float pylora_kernel_sum_squares(int64_t n, const float *x);
typedef float pylora_kernel_dot(int64_t n, const float *a, const float *b);
typedef void pylora_kernel_scale(int64_t n, const float *x, float s, float *y); /* y = x s */
/* y = x r w */
typedef void pylora_kernel_rms_forward(int64_t n, const float *x, const float *w, float r,
                                       pylora_vec y);
/* dx = (add ? dx : 0) + r (dy w - x r² mean(dy w x)) */
typedef void pylora_kernel_rms_backward(int64_t n, pylora_vec dy, pylora_vec x, const float *w,
                                        float r, float *dx, int add);
typedef void pylora_kernel_rms_weight(int64_t n, pylora_vec dy, pylora_vec x, float r,
                                      float *dw); /* dw += dy x r */
/* (ya, yb) = (a c - b s, b c + a s): the pair rotated */
typedef void pylora_kernel_rotate(int64_t n, pylora_vec a, pylora_vec b, const float *c,
                                  const float *s, int inverse, pylora_vec ya, pylora_vec yb);
typedef void pylora_kernel_swiglu_forward(int64_t n, pylora_vec gate, pylora_vec up, pylora_vec y);
typedef void pylora_kernel_swiglu_backward(int64_t n, pylora_vec dy, pylora_vec gate, pylora_vec up,
                                           pylora_vec dgate, pylora_vec dup);
/* LayerNorm: sum x;  sum (x - mean)²;  y = (x - mean) r w + b, b may be NULL */
typedef float pylora_kernel_sum(int64_t n, pylora_vec x);
typedef float pylora_kernel_deviations(int64_t n, pylora_vec x, float mean);
typedef void pylora_kernel_layer_forward(int64_t n, pylora_vec x, const float *w, const float *b,
                                         float mean, float r, pylora_vec y);
/* dx = (add ? dx : 0) + r (g - mean(g) - t mean(g t)), g = dy w, t = (x - mean) r */
typedef void pylora_kernel_layer_backward(int64_t n, pylora_vec dy, pylora_vec x, const float *w,
                                          float mean, float r, float *dx, int add);
/* y = act(x) up; without up (both pointers NULL) act(x).  kind: pylora_activation */
typedef void pylora_kernel_activation_forward(int kind, int64_t n, pylora_vec x, pylora_vec up,
                                              pylora_vec y);
/* dx = dy up act'(x), dup = dy act(x); without up dx = dy act'(x) */
typedef void pylora_kernel_activation_backward(int kind, int64_t n, pylora_vec dy, pylora_vec x,
                                               pylora_vec up, pylora_vec dx, pylora_vec dup);
/* y = cap tanh(multiplier x / cap), cap > 0;  dx = dy (1 - (y / cap)²) multiplier */
typedef void pylora_kernel_soft_cap(int64_t n, const float *x, float multiplier, float cap,
                                    float *y);
typedef void pylora_kernel_soft_cap_backward(int64_t n, const float *dy, const float *y,
                                             float multiplier, float cap, float *dx);
typedef void pylora_kernel_exp_sum(int64_t n, const float *x, float *top,
                                   float *sum); /* max x, sum exp(x - max x) */
typedef void pylora_kernel_exp_scaled(int64_t n, const float *x, float lse, float weight,
                                      pylora_vec y); /* weight exp(x - lse) */
/* top = max x; whether all are finite. -infinity does no harm to top. */
typedef int pylora_kernel_look(int64_t n, const float *x, float *top);
/* sum exp((x - top) scale) of the x that are not above upto */
typedef float pylora_kernel_exp_below(int64_t n, const float *x, float top, float scale,
                                      float upto);
/* Where x > above, upwards, and how many; at has room for n. */
typedef int64_t pylora_kernel_pick(int64_t n, const float *x, float above, int32_t *at);
/* param, m, v after one step; c: see pylora_adamw_step */
typedef void pylora_kernel_adamw(int64_t n, float *param, const float *grad, float *m, float *v,
                                 const float *c);

/* Attention (attend.inc). A panel s [n][32], of which the first `cols` columns are used: a column is
 * one query, a row is one key.
 * s = exp(s scale - top), top = max over the rows, sum = sum over the rows of the new s, in order */
typedef void pylora_kernel_softmax_columns(int64_t n, int cols, float scale, float *s, float *top,
                                           float *sum);
/* s = P = exp(s scale - lse);  dp = scale P (dp - delta) */
typedef void pylora_kernel_softmax_columns_backward(int64_t n, int cols, float *s, float *dp,
                                                    const float *lse, const float *delta,
                                                    float scale);
/* The same of capped scores c = cap tanh(s scale / cap): s = P = exp(c - lse);
 * dp = scale (1 - (c / cap)²) P (dp - delta) */
typedef void pylora_kernel_softmax_columns_backward_capped(int64_t n, int cols, float *s, float *dp,
                                                           const float *lse, const float *delta,
                                                           float scale, float cap);
/* A few heads of one query, each with a row of s, where the above has columns; every sum in the same
 * order.  s[h*lds + t] = q[h] k[t] for n keys: float32 terms, or pairs as in gemm_bf16 if q is
 * bfloat16 (then k is, too, and D is even).  q [heads][D]. */
typedef void pylora_kernel_few_scores(int64_t n, int64_t D, int heads, pylora_vec q, pylora_vec k,
                                      int64_t ldk, float *s, int64_t lds);
typedef void pylora_kernel_softmax_row(int64_t n, float scale, float *s,
                                       float *top); /* without the sum */
/* o[h*ldo + c] += sum_t p[h*ldp + t] v[t*ldv + c], c < cols;  sum[h] += sum_t p[h*ldp + t] */
typedef void pylora_kernel_few_values(int64_t n, int64_t cols, int heads, const float *p,
                                      int64_t ldp, pylora_vec v, int64_t ldv, float *o, int64_t ldo,
                                      float *sum);

/* The words of blocks b .. b + 15 of a Philox stream. */
typedef void pylora_kernel_philox(uint64_t seed, uint64_t stream, uint64_t b, uint32_t *out);
/* y = word >= threshold ? x scale : 0 */
typedef void pylora_kernel_drop(int64_t n, const uint32_t *word, uint32_t threshold, const float *x,
                                float scale, float *y);

/* out = round(w + t) or w - t for the rows of a merge_job, t = s B A in double with the ranks upwards;
 * out may be w.  MERGE_FIND only reads, and looks what the way back from out does not restore.  The
 * same bits from every table. (merge.inc) */
typedef void pylora_kernel_merge_rows(int dtype, int mode, const merge_job *f);

/* ---- tables of them */

/* The kernels by the file that makes them; a table may have those of another table. */
#define PYLORA_F32_KERNELS(K) K(gemm) K(rows_f32) K(transpose) K(few_rows)
#define PYLORA_PAIR_KERNELS(K) K(gemm_pairs) K(transpose32_bf16) K(to_bf16) K(from_bf16) K(halves)
#define PYLORA_PRODUCT_KERNELS(K) \
  K(gemm_bf16) K(panels_bf16) K(few_rows_bf16) K(few_scores) K(gemm_q) K(gemm_k)
#define PYLORA_Q_KERNELS(K) K(quantize_row) K(dequantize) K(quantize_bytes) K(dequantize_k)
/* The formatter finds another way to break these lines each time. */
/* clang-format off */
#define PYLORA_ROW_KERNELS(K) \
  K(put_tile) K(sum_squares) K(dot) K(scale) K(rms_forward) K(rms_backward) K(rms_weight) \
  K(rotate) K(swiglu_forward) K(swiglu_backward) K(exp_sum) K(exp_scaled) K(look) K(exp_below) K(pick) K(adamw) \
  K(philox) K(drop) K(sum) K(deviations) K(layer_forward) K(layer_backward) \
  K(activation_forward) K(activation_backward) K(soft_cap) K(soft_cap_backward)
/* clang-format on */
#define PYLORA_ATTEND_KERNELS(K) \
  K(softmax_columns)             \
  K(softmax_columns_backward) K(softmax_columns_backward_capped) K(softmax_row) K(few_values)
#define PYLORA_MERGE_KERNELS(K) K(merge_rows)
#define PYLORA_ALL_KERNELS(K) \
  PYLORA_F32_KERNELS(K)       \
  PYLORA_PAIR_KERNELS(K)      \
  PYLORA_PRODUCT_KERNELS(K)   \
  PYLORA_Q_KERNELS(K) PYLORA_ROW_KERNELS(K) PYLORA_ATTEND_KERNELS(K) PYLORA_MERGE_KERNELS(K)

typedef struct pylora_kernels {
  const char *name;
  int tiles; /* panels_bf16 multiplies matrices at once, and takes long sums in pieces by itself */
  int (*supported)(void); /* can this CPU run the table? */
#define PYLORA_MEMBER(kernel) pylora_kernel_##kernel *kernel;
  PYLORA_ALL_KERNELS(PYLORA_MEMBER)
#undef PYLORA_MEMBER
} pylora_kernels;

extern const pylora_kernels pylora_kernels_portable;
#if defined(__x86_64__) || defined(_M_X64)
#define PYLORA_X86 1
extern const pylora_kernels pylora_kernels_avx2;
extern const pylora_kernels pylora_kernels_avx512;
extern const pylora_kernels pylora_kernels_avx512vnni;
extern const pylora_kernels pylora_kernels_avx512bf16;
#if defined(__linux__) && defined(__LP64__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define PYLORA_AMX 1
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define PYLORA_ARM64 1
extern const pylora_kernels pylora_kernels_neon;
#endif

#if defined(PYLORA_AMX) || defined(PYLORA_AMX_EMULATED)
extern const pylora_kernels pylora_kernels_amx;
#endif

/* The table in use; chosen at the first call. */
const pylora_kernels *pylora_table(void);

#endif
