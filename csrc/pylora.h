/* pylora.h - the C ABI of pylora: types, status codes and every operation with its shapes.
 *
 * This header is all a C program includes.  Rules that hold for every function:
 *
 *   - Errors are returned as a pylora_status, never printed; nothing here calls exit().
 *   - Nothing is allocated inside an operation: outputs and workspaces come from the caller.
 *     (The thread pool is the one exception: it is started by the first call that uses it.)
 *   - A matrix is float32, or bfloat16 where the operation says "bf16 too"; sums are float32 anyway.
 *   - A matrix is row-major with unit stride inside a row; `ld` is the distance between rows in
 *     elements, of any size and sign.  Any alignment that is legal for the element is legal.
 *   - m = 0 tokens, r > min(d, k), m = 1 are ordinary cases.  r = 0 or lora = NULL: no adapter.
 *   - Inputs are never written to.  An output may alias an input only where it says so.
 *   - The bits of a row of an output depend on that row's inputs alone: not on m, not on other
 *     rows, not on the number of threads.
 *
 * Letters: m tokens, k input features, d output features, r rank, s scale (alpha/r or
 * alpha/sqrt(r)); x [m,k], W [d,k], A [r,k], B [d,r].
 */
#ifndef PYLORA_H
#define PYLORA_H

#include <stddef.h>
#include <stdint.h>

#if defined(PYLORA_SHARED) && defined(__GNUC__)
#pragma GCC visibility push(default) /* while the shared library itself is compiled */
#endif
#ifdef __cplusplus
extern "C" {
#endif

#define PYLORA_VERSION "0.1.0"
#define PYLORA_ABI_VERSION 5

typedef enum pylora_status {
  PYLORA_OK = 0,
  PYLORA_E_NULL = 1,        /* a required pointer is NULL */
  PYLORA_E_SHAPE = 2,       /* shapes do not fit each other, or a size is negative or overflows */
  PYLORA_E_WORKSPACE = 3,   /* the workspace is smaller than the query function says */
  PYLORA_E_INDEX = 4,       /* a token id, label or position is out of range */
  PYLORA_E_VALUE = 5,       /* a scalar argument is out of its domain */
  PYLORA_E_UNSUPPORTED = 6, /* this build or machine cannot do it (dtype, instruction set) */
  PYLORA_E_PACKED = 7,      /* the packed weight is not one that pylora_pack filled */
  PYLORA_E_THREADS = 8,     /* threads could not be started */
  PYLORA_E_DEVICE = 9,      /* the GPU, its driver or cuBLAS; see pylora_cuda_error() */
  PYLORA_E_FILE = 10,       /* a file is missing, damaged or of another kind; see the message */
  PYLORA_E_PLAN = 11,       /* an adapter does not fit the model; see the message */
  PYLORA_E_MEMORY = 12,     /* no memory (files, models and sessions alone allocate) */
} pylora_status;

/* A sentence for a status; never NULL, also for numbers that are not a status. */
const char *pylora_status_text(int status);
int pylora_abi_version(void);

/* ---- run time: instruction set and threads ---------------------------------------------- */

/* The kernel table in use: "portable", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx" or "neon".
 * Chosen at the first use from what the CPU has; the environment variable PYLORA_ISA overrides it. */
const char *pylora_isa(void);
/* The tables that this build has AND this CPU can run, best first; NULL past the end. */
const char *pylora_isa_name(int index);
/* Switches the table.  PYLORA_E_UNSUPPORTED if the build or CPU lacks it.  Packed weights stay
 * valid: their layout is the same for every table. */
int pylora_use_isa(const char *name);

/* Default: the processors this process may run on, or PYLORA_NUM_THREADS.  n >= 1. */
int pylora_set_num_threads(int n);
int pylora_num_threads(void);

/* ---- types ------------------------------------------------------------------------------ */

/* How numbers are stored.  The quantized formats are ggml's.  In groups of 32 inputs: a group holds a
 * float16 scale (Q4_1, Q5_1: and a float16 minimum m) and 32 codes q; the value is scale * q (Q8_0),
 * scale * (q - 8) (Q4_0), scale * (q - 16) (Q5_0), scale * q + m (Q4_1, Q5_1), or scale times what a table
 * has for q (IQ4_NL; MXFP4, whose scale is a power of two).  In blocks of 256, with float16 d and dmin, a
 * small integer s for each 16 or 32 inputs and, with a minimum, another one t: d s q - dmin t (Q2_K, Q4_K,
 * Q5_K), d s (q - 4) (Q3_K), d s (q - 32) (Q6_K), or d s times IQ4_NL's table (IQ4_XS).  float32 holds
 * these values exactly but for sums with a minimum, which are rounded once. */
typedef enum pylora_dtype {
  PYLORA_F32 = 0,
  PYLORA_BF16 = 1,
  PYLORA_F16 = 2, /* merge and unmerge only */
  PYLORA_Q8_0 = 3,
  PYLORA_Q4_0 = 4,
  PYLORA_Q4_1 = 5,
  PYLORA_F32X3 = 6, /* a float32 weight as two bfloat16 halves: three products in place of one */
  PYLORA_Q5_0 = 7,  /* these are packed from a file's blocks alone (pylora_pack_blocks) */
  PYLORA_Q5_1 = 8,
  PYLORA_Q2_K = 9,
  PYLORA_Q3_K = 10,
  PYLORA_Q4_K = 11,
  PYLORA_Q5_K = 12,
  PYLORA_Q6_K = 13,
  PYLORA_IQ4_NL = 14,
  PYLORA_IQ4_XS = 15,
  PYLORA_MXFP4 = 16,
  /* Added to a quantized dtype of a packed weight: x is rounded to 8 bits in place of 16. */
  PYLORA_A8 = 64,
  PYLORA_Q8_0_A8 = PYLORA_A8 + PYLORA_Q8_0,
  PYLORA_Q4_0_A8 = PYLORA_A8 + PYLORA_Q4_0,
  PYLORA_Q4_1_A8 = PYLORA_A8 + PYLORA_Q4_1,
} pylora_dtype;

typedef struct pylora_mat {
  float *p;
  int64_t rows, cols, ld;
  uint16_t *b; /* bfloat16 elements, in place of p */
  uint16_t *h; /* float16 elements, in place of p: GPUs only (cuda/pylora_cuda.h) */
} pylora_mat;

/* A frozen weight W [d,k], packed once: ceil(d / 32) panels of 32 outputs, the last one filled up with
 * zeros, in the layout of its dtype (csrc/formats/format.h).  One copy serves x Wᵀ and, by transposing tiles
 * on the way, dy W.  Layouts are the same for every instruction set and never written to disk.
 *
 * What a product computes depends on the dtype alone:
 *   F32       float32 throughout.
 *   BF16      x and dy are rounded to bfloat16 (round to nearest even; exact if they are bfloat16
 *             already), and so are A and B in h = x Aᵀ and g = dy B; sums are float32.
 *   Q8_0 ...  x is rounded to 16-bit integers with one scale per row and group of 32; products and sums
 *             within a group are exact integers; groups are summed in float32.  dy W is float32, with
 *             the weight's exact values.
 *   ... A8    the same with 8-bit integers, as llama.cpp does it: faster, and x is off by up to 1/254 of
 *             the largest of its group.
 *   F32X3     x = x1 + x2 and W = W1 + W2 in bfloat16; x1 W1 + x1 W2 + x2 W1, summed in float32. */
#define PYLORA_PANEL 32
typedef struct pylora_packed {
  uint32_t magic;
  int32_t dtype;
  int64_t d, k;
  const void *data;
} pylora_packed;

/* Dropout on the input of A.  Element e = (row0 + i) * k + j of x is kept iff philox word
 * e (see pylora_philox) is >= floor(p * 2^32); kept elements are multiplied by 1 / (1 - p). */
typedef struct pylora_drop {
  float p; /* 0 <= p < 1 */
  uint64_t seed, stream;
  int64_t row0; /* index of the first row in the whole batch */
} pylora_drop;

typedef struct pylora_lora {
  int64_t r;
  const float *A; /* [r,k] */
  int64_t lda;
  const float *B; /* [d,r] */
  int64_t ldb;
  float s;
  const pylora_drop *drop; /* NULL: none */
  const void *packed;      /* of pylora_lora_pack, or NULL: A and B are packed at every call */
} pylora_lora;

/* n sequences that lie one behind the other.  The queries of sequence i are rows
 * q_start[i] .. q_start[i+1]-1; its keys are rows k_start[i] .. k_start[i]+k_len[i]-1, the last
 * query seeing the last key.  k_start = k_len = NULL: keys are where the queries are. */
typedef struct pylora_seqs {
  int64_t n;
  const int64_t *q_start; /* [n+1] */
  const int64_t *k_start; /* [n] */
  const int64_t *k_len;   /* [n] */
} pylora_seqs;

typedef struct pylora_attn {
  int32_t heads, kv_heads, head_dim; /* heads % kv_heads == 0 */
  int32_t window;                    /* > 0: only the last `window` keys are seen; 0: all */
  float scale;                       /* > 0; usually 1 / sqrt(head_dim) */
  float softcap; /* > 0: scores become softcap tanh(scores / softcap); 0: none */
} pylora_attn;

typedef enum pylora_rope_layout {
  PYLORA_ROPE_HALF = 0,        /* pairs (i, i + D/2): Hugging Face, GPT-NeoX */
  PYLORA_ROPE_INTERLEAVED = 1, /* pairs (2i, 2i + 1): the paper, GGUF's Llama */
} pylora_rope_layout;

typedef enum pylora_norm_kind {
  PYLORA_RMS = 0,   /* x rstd w */
  PYLORA_LAYER = 1, /* (x - mean) rstd w + b */
} pylora_norm_kind;

typedef enum pylora_activation {
  PYLORA_SILU = 0,      /* x sigmoid(x) */
  PYLORA_GELU_TANH = 1, /* x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x³) */
  PYLORA_GELU_ERF = 2,  /* x (1 + erf(x / sqrt 2)) / 2 */
  PYLORA_RELU2 = 3,     /* max(x, 0)² */
} pylora_activation;

typedef struct pylora_adamw { /* doubles: 1 - 0.999 of a float is off by 1e-5 */
  double lr, beta1, beta2, eps, weight_decay;
  double grad_scale; /* the gradient is multiplied by this first (clipping); 1: unchanged */
  int64_t step;      /* 1 for the first step */
} pylora_adamw;

/* ---- packing ---------------------------------------------------------------------------- */

/* Bytes of the buffer for a packed [d,k] weight; 0 if the size is negative or overflows, if there is
 * no such dtype of weights, or (quantized) if k is not a multiple of a group of 32 or a block of 256. */
size_t pylora_pack_bytes(int dtype, int64_t d, int64_t k);
/* W [d,k], float32 -> out, rounded to dtype (quantized: by ggml's reference rule); W is bf16 too for
 * PYLORA_BF16.  `buffer` (of pylora_pack_bytes, 64-byte aligned) must outlive out.
 * PYLORA_E_UNSUPPORTED for PYLORA_Q5_0 and those after it. */
int pylora_pack(int dtype, const pylora_mat *W, void *buffer, pylora_packed *out);
/* The same from d rows of ggml's blocks, each `row_bytes` after the one before: the codes and scales
 * are taken as they are.  dtype is one of the quantized ones. */
int pylora_pack_blocks(int dtype, int64_t d, int64_t k, const void *rows, int64_t row_bytes,
                       void *buffer, pylora_packed *out);
/* The order of the bytes of packed weights: another number whenever one of them changes.  Until then, and on
 * machines of one byte order, a program may keep them (out->data, pylora_pack_bytes long) in a file of its own. */
#define PYLORA_LAYOUT 1
/* Packed bytes that lie somewhere, such as in a file that is mapped, as a weight; nothing is copied.  They are
 * 64-byte aligned, outlive out, and are those of a [d,k] in this dtype: their values are not looked at. */
int pylora_packed_at(int dtype, int64_t d, int64_t k, const void *bytes, pylora_packed *out);
/* Types of weights in files, by ggml's numbers. */
#define PYLORA_BLOCK_Q4_0 2
#define PYLORA_BLOCK_Q4_1 3
#define PYLORA_BLOCK_Q5_0 6
#define PYLORA_BLOCK_Q5_1 7
#define PYLORA_BLOCK_Q8_0 8
#define PYLORA_BLOCK_Q2_K 10
#define PYLORA_BLOCK_Q3_K 11
#define PYLORA_BLOCK_Q4_K 12
#define PYLORA_BLOCK_Q5_K 13
#define PYLORA_BLOCK_Q6_K 14
/* Bytes of a row of k numbers; -1: not such a type, or k is no multiple of its block's numbers. */
int64_t pylora_blocks_bytes(int type, int64_t k);
/* x [rows,k] -> out [rows][pylora_blocks_bytes], the bytes of ggml's own quantizer (without an importance
 * matrix).  Numbers must be finite: what becomes of others is no error and means nothing. */
int pylora_encode_blocks(int type, int64_t rows, int64_t k, const float *x, void *out);
/* Row-major W [d,k] again, float32: the value of every stored element, exactly (F32: bit for bit). */
int pylora_unpack(const pylora_packed *P, const pylora_mat *W);

/* An adapter whose weights stay as they are (inference) can be packed once, for a W of this dtype.
 * Then set lora->packed = buffer; A, B and s are not read by forward any more.  0: bad sizes. */
size_t pylora_lora_pack_bytes(int dtype, int64_t d, int64_t k, int64_t r);
int pylora_lora_pack(int dtype, int64_t d, int64_t k, const pylora_lora *lora, void *buffer);

/* ---- LoRA linear ------------------------------------------------------------------------ */

/* One projection of an x that several share: q, k and v; gate and up.
 * y = residual + x Wᵀ + bias + s h Bᵀ, with h = drop(x) Aᵀ; the rows of segment i use lora[i].
 * With a factor f (DoRA) y = residual + f (x Wᵀ + s h Bᵀ) + bias in them; not together with dropout, and not
 * on a GPU: PYLORA_E_UNSUPPORTED. */
typedef struct pylora_linear {
  const pylora_packed *W;
  const float *bias;              /* [d] or NULL */
  const pylora_lora *const *lora; /* [segments], each may be NULL; or NULL: no adapters at all */
  const pylora_mat *residual;     /* [m,d] or NULL; float32 */
  const pylora_mat *y;            /* [m,d]; bf16 too; may be residual */
  const pylora_mat *h;            /* [m,r] for backward, or NULL: not kept (float32; one segment) */
  const float *const *factor;     /* [segments], each f [d] or NULL; or NULL: none has one */
} pylora_linear;

/* Bytes of workspace that suffice for `n` projections of d outputs in all, k inputs and ranks of r in
 * all, in both directions and with the present number of threads.  0 if a size is negative or
 * overflows.  (r: for each projection the largest rank of its adapters, added up.) */
size_t pylora_linear_workspace(int64_t m, int64_t n, int64_t d, int64_t k, int64_t r);

/* n projections of x [m,k] (bf16 too) at once.  Rows seg_start[i] .. seg_start[i+1]-1 are segment i;
 * seg_start = NULL: one segment of all rows.  With more segments each adapter must be packed and have
 * no dropout.  The weights have one dtype.
 * Where B is all zeros the low-rank term is left out, so that B = 0 is the base model bit for bit. */
int pylora_linear_forward(const pylora_mat *x, int64_t n, const pylora_linear *linear,
                          int64_t segments, const int64_t *seg_start, void *ws, size_t ws_bytes);

/* What stands before and after the projections of a block, done with them while the rows and tiles are in
 * the cache.  The bits are those of the operations one after the other. */
typedef struct pylora_norm { /* x is normed first, as by pylora_rms_norm_forward */
  const float *w;            /* [k] */
  float eps;
  int32_t dtype;  /* of the normed x: PYLORA_F32 or PYLORA_BF16 */
  float *rstd;    /* [m], or NULL: not kept */
  int32_t kind;   /* a pylora_norm_kind: PYLORA_LAYER as by pylora_layer_norm_forward */
  const float *b; /* [k] or NULL, of PYLORA_LAYER */
} pylora_norm;
typedef struct pylora_rotation { /* see pylora_rope */
  pylora_mat cosines, sines;
  const int64_t *position; /* [m] */
  int32_t head_dim, layout;
} pylora_rotation;
typedef struct pylora_finish {
  /* y is rotated, float32 until then; or NULL */
  const pylora_rotation *rotation;
  /* act(gate) up goes there [m,d], bf16 too: gate and up are the y of the projection before this one and
   * this one's.  It may be either of them, the whole of it.  Or NULL */
  const pylora_mat *product;
  int32_t activation; /* of the product: a pylora_activation */
} pylora_finish;

/* pylora_linear_forward with a norm (or NULL) and with finish [n] (or NULL), in the same workspace.  h is
 * of the normed x.  PYLORA_E_UNSUPPORTED where whole heads in whole panels are more than 512 panels
 * (an even head_dim above 1024). */
int pylora_fused_forward(const pylora_mat *x, const pylora_norm *norm, int64_t n,
                         const pylora_linear *linear, const pylora_finish *finish, int64_t segments,
                         const int64_t *seg_start, void *ws, size_t ws_bytes);

/* One projection's part of backward; dA [r,k] and dB [d,r] may be NULL. */
typedef struct pylora_linear_grad {
  const pylora_packed *W;  /* NULL without dx */
  const pylora_lora *lora; /* or NULL */
  const pylora_mat *dy;    /* [m,d]; bf16 too */
  const pylora_mat *h;     /* [m,r]; NULL without dB */
  const pylora_mat *dA, *dB;
} pylora_linear_grad;

/* g = dy B [m,r];  dB = s dyᵀ h;  dA = s gᵀ drop(x);
 * dx = [dx +] sum over the projections of dy W + s drop'(g A)  [m,k].
 * dx (bf16 too, unless added to) may be NULL; x (bf16 too) may be NULL without dA. */
int pylora_linear_backward(const pylora_mat *x, int64_t n, const pylora_linear_grad *linear,
                           const pylora_mat *dx, int add_dx, void *ws, size_t ws_bytes);

/* The same for one projection: see there. */
size_t pylora_lora_workspace(int64_t m, int64_t d, int64_t k, int64_t r);
int pylora_lora_forward(const pylora_mat *x, const pylora_packed *W, const float *bias,
                        const pylora_lora *lora, const pylora_mat *residual, const pylora_mat *y,
                        const pylora_mat *h, void *ws, size_t ws_bytes);
int pylora_lora_backward(const pylora_mat *dy, const pylora_mat *x, const pylora_mat *h,
                         const pylora_packed *W, const pylora_lora *lora, const pylora_mat *dx,
                         int add_dx, const pylora_mat *dA, const pylora_mat *dB, void *ws,
                         size_t ws_bytes);

/* ---- merge and exact unmerge ------------------------------------------------------------ */

/* W' = round(W + s B A): t = double(s) * sum_i double(B[.,i]) * double(A[i,.]) summed in the order
 * i = 0..r-1 (each product is exact in double, so every machine gets the same bits), then
 * double(W) + t, rounded once to dtype.  W and out: [d,k] of `dtype`, row strides in elements;
 * out may be W.  row_lossy [d], if not NULL: the number of elements of each row that
 * round(W' - t) does not give back. */
int pylora_merge(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                 const pylora_lora *lora, void *out, int64_t ldo, int64_t *row_lossy);
/* The positions (row * k + column, ascending) that row_lossy counted, and W's bits there. */
int pylora_merge_residue(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                         const void *merged, int64_t ldm, const pylora_lora *lora,
                         const int64_t *row_lossy, int64_t *position, uint32_t *bits);
/* W = round(W' - t), then the n residue elements are put back: bit for bit the W before merging. */
int pylora_unmerge(int dtype, int64_t d, int64_t k, const void *merged, int64_t ldm,
                   const pylora_lora *lora, int64_t n, const int64_t *position,
                   const uint32_t *bits, void *out, int64_t ldo);

/* ---- transformer ------------------------------------------------------------------------ */

/* y = x, both of them float32 or bf16, to nearest even where y has fewer digits. */
int pylora_cast(const pylora_mat *x, const pylora_mat *y);

/* rstd = 1 / sqrt(mean(x²) + eps) [m];  y = x * rstd * w  [m,k]. x and y bf16 too.  y may be x. */
int pylora_rms_norm_forward(const pylora_mat *x, const float *w, float eps, const pylora_mat *y,
                            float *rstd);
/* dx = [dx +] rstd * (dy w - x * rstd² * mean(dy w x));  dw = sum_rows dy * x * rstd (may be NULL).
 * dx may be dy; dy and x bf16 too. */
int pylora_rms_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                             const float *rstd, const pylora_mat *dx, int add_dx, float *dw);

/* c = x - mean(x);  rstd = 1 / sqrt(mean(c²) + eps) [m];  y = c rstd w + b  [m,k]; b may be NULL.  x and y bf16
 * too.  y may be x. */
int pylora_layer_norm_forward(const pylora_mat *x, const float *w, const float *b, float eps,
                              const pylora_mat *y, float *rstd);
/* dx = [dx +] rstd * (g - mean(g) - n mean(g n)), g = dy w, n = (x - mean(x)) rstd.  dx may be dy; dy and x
 * bf16 too. */
int pylora_layer_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                               const float *rstd, const pylora_mat *dx, int add_dx);

/* Rotates each of the cols / head_dim heads of x [m, heads*D] by the angles whose cosines and sines
 * are row position[i] of cos, sin [positions, R/2], 2 <= R <= D: the numbers of a head from R on stay.
 * PYLORA_ROPE_HALF pairs (i, i + R/2).  inverse != 0: by the negative angle, which is the backward
 * pass.  x and y bf16 too; y may be x. */
int pylora_rope(const pylora_mat *x, const pylora_mat *cosines, const pylora_mat *sines,
                const int64_t *position, int32_t head_dim, int layout, int inverse,
                const pylora_mat *y);

size_t pylora_attention_workspace(const pylora_seqs *seqs, const pylora_attn *a);
/* Causal grouped-query attention.  q, o [m, heads*D]; k, v [n, kv_heads*D];
 * P = softmax(scale q kᵀ), o = P v;  lse [m, heads] = log sum exp of the scaled scores.  With a softcap c
 * the scores are c tanh(scale q kᵀ / c).
 * q, k, v, o bf16 too, each by itself. */
int pylora_attention_forward(const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                             const pylora_seqs *seqs, const pylora_attn *a, const pylora_mat *o,
                             const pylora_mat *lse, void *ws, size_t ws_bytes);
/* dP = do vᵀ; dS = P (dP - rowsum(do o)); dq = scale dS k; dk = scale dSᵀ q; dv = Pᵀ do.  With a softcap c dS is
 * multiplied by 1 - (S / c)², S being the capped scores.
 * Rows of dk, dv that no sequence uses are left as they are.  All but lse bf16 too, each by itself. */
int pylora_attention_backward(const pylora_mat *d_o, const pylora_mat *q, const pylora_mat *k,
                              const pylora_mat *v, const pylora_mat *o, const pylora_mat *lse,
                              const pylora_seqs *seqs, const pylora_attn *a, const pylora_mat *dq,
                              const pylora_mat *dk, const pylora_mat *dv, void *ws,
                              size_t ws_bytes);

/* y = gate * sigmoid(gate) * up.  All three bf16 too; y may be gate or up. */
int pylora_swiglu_forward(const pylora_mat *gate, const pylora_mat *up, const pylora_mat *y);
/* dgate may be gate, dup may be up.  All bf16 too. */
int pylora_swiglu_backward(const pylora_mat *dy, const pylora_mat *gate, const pylora_mat *up,
                           const pylora_mat *dgate, const pylora_mat *dup);

/* y = act(x) up; up = NULL: act(x).  `kind` is a pylora_activation.  All bf16 too; y may be x or up.  PYLORA_SILU
 * with up has the bits of pylora_swiglu_forward. */
int pylora_activation_forward(int kind, const pylora_mat *x, const pylora_mat *up,
                              const pylora_mat *y);
/* dx = dy up act'(x), dup = dy act(x); up = dup = NULL: dx = dy act'(x).  All bf16 too; dx may be x, dup up. */
int pylora_activation_backward(int kind, const pylora_mat *dy, const pylora_mat *x,
                               const pylora_mat *up, const pylora_mat *dx, const pylora_mat *dup);
/* y = cap tanh(multiplier x / cap); cap = 0: multiplier x.  y may be x. */
int pylora_soft_cap_forward(const pylora_mat *x, float multiplier, float cap, const pylora_mat *y);
/* dx = multiplier dy (1 - (y / cap)²), y being what forward gave; cap = 0: multiplier dy.  dx may be dy. */
int pylora_soft_cap_backward(const pylora_mat *dy, const pylora_mat *y, float multiplier, float cap,
                             const pylora_mat *dx);
/* Which experts each token goes to: p = softmax(logits) [m,experts], the top_k largest of a row (of equal ones
 * the first, NaN last) in chosen [m,top_k], their p in weights [m,top_k], divided by their sum with
 * `normalize`.  p may be logits. */
int pylora_choose(const pylora_mat *logits, int64_t top_k, int normalize, const pylora_mat *p,
                  int64_t *chosen, const pylora_mat *weights);

/* y[i,:] = W[ids[i],:]  (W [vocab,k], packed) */
int pylora_embedding_forward(const int64_t *ids, int64_t m, const pylora_packed *W,
                             const pylora_mat *y);
/* dW[ids[i],:] += dy[i,:], in the order of i; dW [vocab,k] is zeroed first. */
int pylora_embedding_backward(const int64_t *ids, const pylora_mat *dy, const pylora_mat *dW);

/* ---- the next token ---------------------------------------------------------------------- */

/* How one is chosen from a row of logits. */
typedef struct pylora_sampling {
  double temperature; /* 0: the largest, of equals the first; and what follows changes nothing */
  double top_p;       /* in (0, 1]; 1: all */
  double min_p;       /* in [0, 1]; 0: all */
  double u;           /* the number that decides, in (0, 1) */
  int64_t top_k;      /* 0: all */
  /* Bit i % 32 of word i / 32 says whether token i may come, those behind the words may not.  NULL: all. */
  const uint32_t *allowed;
  int64_t words;
} pylora_sampling;

size_t pylora_sample_workspace(int64_t m, int64_t n);
/* token [m], of logits [m,n]: p = exp((x - max) / temperature), ranked, equals by the lower index; top_k keeps
 * the first, top_p then the shortest run of them whose share of the sum is at least that, min_p those with
 * p >= min_p; the token is the first whose running sum is above u times the sum of those that are left.
 * In double, but for the sum of those with p < 1e-5, whose terms are float32.  -1: the row is not finite,
 * -2: nothing may come. */
int pylora_sample(const pylora_mat *logits, const pylora_sampling *how, int64_t *token, void *ws,
                  size_t ws_bytes);
/* lse [m] = log sum exp of each row, and the count[i] largest of row i in best [m,most], largest first, equals
 * by the lower index.  A row of count < 0 is left alone, one that is not finite has the lse NaN. */
int pylora_likeliest(const pylora_mat *logits, const int64_t *count, int64_t most, double *lse,
                     int64_t *best, void *ws, size_t ws_bytes);

/* ---- a whole model, inference only ------------------------------------------------------- */

/* The modules of a Llama layer, in the order of forward. */
#define PYLORA_Q 0
#define PYLORA_K 1
#define PYLORA_V 2
#define PYLORA_O 3
#define PYLORA_GATE 4
#define PYLORA_UP 5
#define PYLORA_DOWN 6
#define PYLORA_LAYER_MODULES 7

/* How the rows of one projection of q, k and v lie. */
typedef enum pylora_fused_qkv {
  PYLORA_QKV_APART = 0,  /* it is three */
  PYLORA_QKV_BLOCKS = 1, /* all of q, then of k, then of v */
  PYLORA_QKV_GROUPS = 2, /* for each kv head its queries' heads, its key, its value */
} pylora_fused_qkv;

/* A mixture of experts in the place of a layer's feed-forward part: the sum of each token's top_k experts by
 * their weights, expert by expert. */
typedef struct pylora_experts {
  const pylora_packed *router; /* [count,hidden] */
  int32_t count, top_k;
  int32_t normalize; /* see pylora_choose */
} pylora_experts;

/* A layer. Where a norm's w is NULL there is none; of the others w, eps, kind and b count. */
/* What q_norm and k_norm are of. */
typedef enum pylora_norm_of {
  PYLORA_NORM_SHARED = 0, /* each head, with one weight [D] for all */
  PYLORA_NORM_WHOLE = 1,  /* the whole projection */
  PYLORA_NORM_EACH = 2,   /* each head, with a weight of its own: [heads*D] one behind the other */
} pylora_norm_of;

typedef struct pylora_layer {
  pylora_norm input_norm,
      mid_norm; /* [hidden], before attention and before the feed-forward part */
  pylora_norm after_attention, after_mlp; /* [hidden], of what is added */
  /* Before the rotation: of each head [head_dim], or as norm_of says of [heads*D], [kv_heads*D];
   * both or neither. */
  pylora_norm q_norm, k_norm;
  int32_t norm_of;               /* a pylora_norm_of */
  int32_t window;                /* see pylora_attn */
  int32_t rope;                  /* which of the model's tables; -1: no rotation */
  const pylora_experts *experts; /* or NULL */
  /* The modules: q [heads*D,hidden], k, v [kv_heads*D,hidden] (or qkv, as the model says); o; then gate, up, down
   * (or up, down; or gate_up, down); with experts gate, up, down of each. */
  const pylora_packed *const *W;
  const float *const *bias; /* of each [d] or NULL; NULL: none has one */
  int64_t module;           /* the number of W[0]; the layers' modules follow each other */
  float scale;              /* of scores; 0: the model's */
} pylora_layer;

/* cos, sin [positions, R/2]: see pylora_rope. */
typedef struct pylora_rope_table {
  pylora_mat cosines, sines;
  int32_t layout;
  const int64_t *position; /* [m]: each token's row, where that is not its position; or NULL */
} pylora_rope_table;

/* A decoder; where a field of its structure is 0, it is as in Llama: x = embedding; for each layer
 * x += o(attention(rope(q, k of norm(x)), v)), x += down(silu(gate(norm(x))) * up(norm(x)));
 * logits = head(norm(x)).
 * With bf16 activations the norms' results, q and k once rotated, v, o, gate, up and their product are
 * bfloat16, as bf16 weights take them; x, what is added to it and the logits are float32 all the same. */
typedef struct pylora_decoder {
  int32_t layers;
  int32_t activations; /* PYLORA_F32; or PYLORA_BF16, see above */
  pylora_attn attn;    /* `window` is each layer's own */

  int32_t activation; /* a pylora_activation */
  int32_t ungated;    /* down(act(up x)), without gate */
  int32_t
      parallel; /* attention and feed-forward part of the same x; mid_norm may be missing: then the
                                 * latter is of input_norm, too */
  int32_t fused_qkv;          /* a pylora_fused_qkv */
  int32_t fused_gate_up;      /* one projection, gate in the first half of its rows */
  float embedding_multiplier; /* of what the embedding and its adapter give; 0: none, as 1 */
  float residual_multiplier;  /* of what is added to x; 0: none */
  float logit_multiplier;     /* 0: none */
  float logit_softcap;        /* after the multiplier; 0: none */

  int32_t ropes;
  const pylora_rope_table *rope;
  const pylora_packed *embedding, *head; /* [vocab,hidden]; may be the same */
  const pylora_packed *positions;        /* [positions,hidden], added to the embedding; or NULL */
  pylora_norm norm;                      /* the last one */
  const pylora_layer *layer;             /* [layers] */
} pylora_decoder;

/* An adapter of the model's modules.  Tables have an entry for each module (7 * layers of
 * Llama's), then the head's. */
typedef struct pylora_adapter {
  const pylora_lora *const *lora; /* each may be NULL; packed for its W if the step has segments */
  const float *const *bias;       /* NULL, or: where not NULL, in place of the module's own bias */
  const pylora_lora *embedding;   /* NULL, or A [r,vocab], B [hidden,r]: x += s A[:,id] Bᵀ */
  const pylora_packed *embedding_B; /* B, packed as float32; NULL: B or A is all zeros */
  const float *embedding_bias;      /* [hidden], added last; or NULL */
  const float *const *factor;       /* NULL, or of each module what pylora_linear takes */
  const float *embedding_factor;    /* [hidden], of what embedding and adapter give; or NULL */
} pylora_adapter;

/* Keys and values of the tokens seen so far, of the model's activations' type: what `attention` reads.
 * Which rows belong to which sequence is the caller's business (pylora_step). */
typedef struct pylora_kv {
  const pylora_mat *k, *v; /* [layers], each [rows, kv_heads*D] */
} pylora_kv;

/* m new tokens: of sequences at their beginning, in their middle, or one each. */
typedef struct pylora_step {
  int64_t m;
  const int64_t *ids, *position; /* [m] */
  const int64_t *kv_row;         /* [m], the row of the cache that the token's k and v go to */
  const pylora_seqs *seqs;       /* k_start, k_len: rows of the cache, the new ones included */
  int64_t segments;              /* tokens seg_start[i] .. seg_start[i+1]-1 use adapter[i] */
  const int64_t *seg_start;      /* [segments+1], or NULL: one segment of all tokens */
  const pylora_adapter *const *adapter; /* [segments]; NULL, also inside: the base */
  int64_t outputs;
  const int64_t *output; /* [outputs], the tokens whose logits are wanted, ascending */
  /* Where their rows behind the last norm go [outputs,hidden], of which logits are made, or NULL. */
  const pylora_mat *normed;
} pylora_step;

/* Bytes of workspace for a step (its sizes, sequences and adapters; not its ids), with the present
 * number of threads; 0 if something does not fit. */
size_t pylora_decoder_workspace(const pylora_decoder *model, const pylora_step *step);
/* Writes the tokens' keys and values to the cache and the wanted rows' logits [outputs,vocab].  The
 * same bits as the operations above one by one, and as the whole sequences at once.  On an error the
 * cache's rows kv_row may have been written. */
int pylora_decoder_forward(const pylora_decoder *model, const pylora_kv *kv,
                           const pylora_step *step, const pylora_mat *logits, void *ws,
                           size_t ws_bytes);

/* ---- loss ------------------------------------------------------------------------------- */

#define PYLORA_IGNORE (-100)
/* lse[i] = log sum_j exp(logits[i,j]);  nll[i] = lse[i] - logits[i,labels[i]], 0 where the label is
 * PYLORA_IGNORE. */
int pylora_cross_entropy_forward(const pylora_mat *logits, const int64_t *labels, float *nll,
                                 float *lse);
/* dlogits = weight[i] * (exp(logits - lse[i]) - onehot(labels[i])); rows with PYLORA_IGNORE are 0.
 * dlogits may be logits; bf16 too. */
int pylora_cross_entropy_backward(const pylora_mat *logits, const int64_t *labels, const float *lse,
                                  const float *weight, const pylora_mat *dlogits);
/* Both, bit for bit, with the logits read from memory once. */
int pylora_cross_entropy(const pylora_mat *logits, const int64_t *labels, const float *weight,
                         float *nll, float *lse, const pylora_mat *dlogits);

/* ---- optimizer -------------------------------------------------------------------------- */

/* Decoupled AdamW on n contiguous elements, in place (Loshchilov & Hutter 2019, algorithm 2). */
int pylora_adamw_step(int64_t n, float *param, const float *grad, float *m, float *v,
                      const pylora_adamw *o);
/* sum x², in double, in an order that does not depend on the number of threads. */
int pylora_sum_squares(int64_t n, const float *x, double *out);

/* ---- random numbers --------------------------------------------------------------------- */

/* Philox 4x32-10 (Salmon et al. 2011).  key = (seed lo, seed hi); block b has the counter
 * (b lo, b hi, stream lo, stream hi); word e is word e % 4 of block e / 4.  Writes words
 * first .. first+n-1. */
int pylora_philox(uint64_t seed, uint64_t stream, int64_t first, int64_t n, uint32_t *out);
/* y = drop(x), see pylora_drop.  y may be x. */
int pylora_dropout(const pylora_mat *x, const pylora_drop *drop, const pylora_mat *y);

#ifdef __cplusplus
}
#endif
#if defined(PYLORA_SHARED) && defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
