/* pylora_cuda.h - the operations of pylora.h on an NVIDIA GPU: libpylora_cuda, with no Python needed.
 *
 * The types, letters, formulas and rules are pylora.h's; what differs is said here:
 *
 *   - Every `p`, `b`, `h`, `data`, A, B, bias, weight and index array is memory of the device.  The structs
 *     that hold them, and seg_start, are the host's, and may be reused once the call returns.
 *   - Work is queued on `stream` (a cudaStream_t, NULL: the default stream) and the call returns; nothing here
 *     waits for the device, so a call may be captured into a CUDA graph.  Exceptions say so.
 *   - Matrices are float32, bfloat16 or float16, each by itself, wherever pylora.h says float32 or bf16;
 *     sums are float32.  Attention takes q, k and v of one type.
 *   - A packed weight is row-major [d,k] of F32, BF16 or F16 (pylora_cuda_pack_bytes, pylora_cuda_pack).
 *     float32 is strict float32 unless pylora_cuda_set_tf32 allowed TF32.
 *   - PYLORA_E_DEVICE: pylora_cuda_error() has a sentence that names the kernel or the call.
 *   - An id, label or position that is out of range cannot be an error of the call that queues the work:
 *     the row is NaN (of an int: unchanged), and pylora_cuda_check says PYLORA_E_INDEX afterwards.
 *   - The same call on the same device gives the same bits each time: no sum depends on the order in which
 *     threads happen to run.  A row's bits may depend on the number of rows, since cuBLAS chooses by it.
 */
#ifndef PYLORA_CUDA_H
#define PYLORA_CUDA_H

#include "pylora.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PYLORA_CUDA_ABI_VERSION 2

/* A device, made ready: its properties, cuBLASLt, and the choices made for the shapes seen.  Several threads
 * may use one at a time on different streams. */
typedef struct pylora_cuda pylora_cuda;

typedef struct pylora_cuda_device {
  char name[256];
  int32_t major, minor; /* compute capability */
  int32_t multiprocessors;
  int32_t driver, runtime; /* versions, 1000 * major + 10 * minor */
  int32_t cublaslt;        /* its version number; 0 before pylora_cuda_open */
  int64_t total_bytes, free_bytes, l2_bytes, shared_bytes; /* shared memory of a block, at most */
} pylora_cuda_device;

int pylora_cuda_abi_version(void);
/* The sentence of the last PYLORA_E_DEVICE of this thread; "" before any. */
const char *pylora_cuda_error(void);
/* 0 devices is success: a machine without a GPU or driver has none, and pylora_cuda_error() says why. */
int pylora_cuda_device_count(int32_t *count);
int pylora_cuda_device_info(int32_t device, pylora_cuda_device *out);
/* cublaslt: the path of libcublasLt.so, or NULL: one that is loaded already, or that the system finds. */
int pylora_cuda_open(int32_t device, const char *cublaslt, pylora_cuda **out);
void pylora_cuda_close(pylora_cuda *g);
/* allow != 0: float32 products may round their factors to TF32 (10 bits). */
int pylora_cuda_set_tf32(pylora_cuda *g, int32_t allow);
/* Waits for the stream.  PYLORA_E_INDEX if a kernel met an index out of range since the last check. */
int pylora_cuda_check(pylora_cuda *g, void *stream);

/* ---- packing ---------------------------------------------------------------------------- */

size_t pylora_cuda_pack_bytes(int32_t dtype, int64_t d, int64_t k);
/* W [d,k] rounded to dtype into buffer, 256-byte aligned.  If W is contiguous and of that dtype, buffer may be
 * W's own memory: nothing is copied then. */
int pylora_cuda_pack(pylora_cuda *g, void *stream, int32_t dtype, const pylora_mat *W, void *buffer,
                     pylora_packed *out);

/* ---- LoRA linear ------------------------------------------------------------------------ */

/* Bytes of device memory that suffice for `n` projections in both directions (pylora_linear_workspace). */
size_t pylora_cuda_linear_workspace(pylora_cuda *g, int64_t m, int64_t n, int64_t d, int64_t k,
                                    int64_t r, int64_t segments);
/* pylora_linear_forward; adapters need not be packed, and `packed` is not read.  Segments may have any rank.
 * A row of h or of B that is all zeros adds nothing to any bit of y, also where the other factor is not finite: B = 0
 * is the base model bit for bit.  Otherwise an infinity in h may become NaN.  A row's bits do not depend on the
 * number of rows as long as these are at most 16. */
int pylora_cuda_linear_forward(pylora_cuda *g, void *stream, const pylora_mat *x, int64_t n,
                               const pylora_linear *linear, int64_t segments,
                               const int64_t *seg_start, void *ws, size_t ws_bytes);
/* pylora_linear_backward. */
int pylora_cuda_linear_backward(pylora_cuda *g, void *stream, const pylora_mat *x, int64_t n,
                                const pylora_linear_grad *linear, const pylora_mat *dx,
                                int32_t add_dx, void *ws, size_t ws_bytes);

/* ---- merge and exact unmerge ------------------------------------------------------------ */

/* pylora_merge, pylora_merge_residue, pylora_unmerge: the same bits as on a CPU, for F32, F16 and BF16.
 * All arrays are the device's.  row_lossy, position and bits: see there. */
int pylora_cuda_merge(pylora_cuda *g, void *stream, int32_t dtype, int64_t d, int64_t k,
                      const void *W, int64_t ldw, const pylora_lora *lora, void *out, int64_t ldo,
                      int64_t *row_lossy);
/* row_first [d]: the sum of row_lossy of the rows before.  position = bits = NULL: there is no residue. */
int pylora_cuda_merge_residue(pylora_cuda *g, void *stream, int32_t dtype, int64_t d, int64_t k,
                              const void *W, int64_t ldw, const void *merged, int64_t ldm,
                              const pylora_lora *lora, const int64_t *row_first, int64_t *position,
                              uint32_t *bits);
int pylora_cuda_unmerge(pylora_cuda *g, void *stream, int32_t dtype, int64_t d, int64_t k,
                        const void *merged, int64_t ldm, const pylora_lora *lora, int64_t n,
                        const int64_t *position, const uint32_t *bits, void *out, int64_t ldo);

/* ---- transformer ------------------------------------------------------------------------ */

int pylora_cuda_cast(pylora_cuda *g, void *stream, const pylora_mat *x, const pylora_mat *y);
int pylora_cuda_rms_norm_forward(pylora_cuda *g, void *stream, const pylora_mat *x, const float *w,
                                 float eps, const pylora_mat *y, float *rstd);
/* dw [k] may be NULL; it needs a workspace of pylora_cuda_rms_norm_workspace bytes. */
size_t pylora_cuda_rms_norm_workspace(pylora_cuda *g, int64_t m, int64_t k);
int pylora_cuda_rms_norm_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                  const pylora_mat *x, const float *w, const float *rstd,
                                  const pylora_mat *dx, int32_t add_dx, float *dw, void *ws,
                                  size_t ws_bytes);
int pylora_cuda_layer_norm_forward(pylora_cuda *g, void *stream, const pylora_mat *x,
                                   const float *w, const float *b, float eps, const pylora_mat *y,
                                   float *rstd);
int pylora_cuda_layer_norm_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                    const pylora_mat *x, const float *w, const float *rstd,
                                    const pylora_mat *dx, int32_t add_dx);
int pylora_cuda_rope(pylora_cuda *g, void *stream, const pylora_mat *x, const pylora_mat *cosines,
                     const pylora_mat *sines, const int64_t *position, int32_t head_dim,
                     int32_t layout, int32_t inverse, const pylora_mat *y);
/* pylora_seqs with arrays of the device, and what a launch must know of them. */
typedef struct pylora_cuda_seqs {
  int64_t n;
  const int64_t *q_start; /* [n+1] */
  const int64_t *k_start; /* [n] */
  const int64_t *k_len;   /* [n] */
  int64_t max_q, max_k;   /* no sequence has more queries, or more keys; a larger number is fine */
} pylora_cuda_seqs;
/* Attention with 16-bit q, k and v, a head_dim that is a multiple of 8 and rows at multiples of 16 bytes uses tensor
 * cores, unless there is a softcap: P, dS and do are rounded to that type for products.  (float16: do is scaled by a power of two first, so
 * that small gradients have numbers.)  All else is float32 throughout, any layout, head_dim at most 256.
 * A sequence whose numbers do not fit the matrices gets NaN in o,
 * lse and dq, and leaves dk and dv as they are.  A row that sees an infinity may be NaN throughout. */
size_t pylora_cuda_attention_workspace(pylora_cuda *g, const pylora_cuda_seqs *seqs,
                                       const pylora_attn *a, int64_t q_rows, int64_t k_rows);
int pylora_cuda_attention_forward(pylora_cuda *g, void *stream, const pylora_mat *q,
                                  const pylora_mat *k, const pylora_mat *v,
                                  const pylora_cuda_seqs *seqs, const pylora_attn *a,
                                  const pylora_mat *o, const pylora_mat *lse, void *ws,
                                  size_t ws_bytes);
int pylora_cuda_attention_backward(pylora_cuda *g, void *stream, const pylora_mat *d_o,
                                   const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                                   const pylora_mat *o, const pylora_mat *lse,
                                   const pylora_cuda_seqs *seqs, const pylora_attn *a,
                                   const pylora_mat *dq, const pylora_mat *dk, const pylora_mat *dv,
                                   void *ws, size_t ws_bytes);
int pylora_cuda_swiglu_forward(pylora_cuda *g, void *stream, const pylora_mat *gate,
                               const pylora_mat *up, const pylora_mat *y);
int pylora_cuda_swiglu_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                const pylora_mat *gate, const pylora_mat *up,
                                const pylora_mat *dgate, const pylora_mat *dup);
int pylora_cuda_activation_forward(pylora_cuda *g, void *stream, int32_t kind, const pylora_mat *x,
                                   const pylora_mat *up, const pylora_mat *y);
int pylora_cuda_activation_backward(pylora_cuda *g, void *stream, int32_t kind,
                                    const pylora_mat *dy, const pylora_mat *x, const pylora_mat *up,
                                    const pylora_mat *dx, const pylora_mat *dup);
int pylora_cuda_soft_cap_forward(pylora_cuda *g, void *stream, const pylora_mat *x,
                                 float multiplier, float cap, const pylora_mat *y);
int pylora_cuda_soft_cap_backward(pylora_cuda *g, void *stream, const pylora_mat *dy,
                                  const pylora_mat *y, float multiplier, float cap,
                                  const pylora_mat *dx);
int pylora_cuda_embedding_forward(pylora_cuda *g, void *stream, const int64_t *ids, int64_t m,
                                  const pylora_packed *W, const pylora_mat *y);
int pylora_cuda_embedding_backward(pylora_cuda *g, void *stream, const int64_t *ids,
                                   const pylora_mat *dy, const pylora_mat *dW);
/* y[row[i],:] = x[i,:] (x's type or y's own): new keys and values into a cache.  A row out of range: see above. */
int pylora_cuda_scatter_rows(pylora_cuda *g, void *stream, const pylora_mat *x, const int64_t *row,
                             const pylora_mat *y);
/* y[i,:] = x[row[i],:] */
int pylora_cuda_gather_rows(pylora_cuda *g, void *stream, const pylora_mat *x, const int64_t *row,
                            const pylora_mat *y);

/* ---- loss ------------------------------------------------------------------------------- */

int pylora_cuda_cross_entropy_forward(pylora_cuda *g, void *stream, const pylora_mat *logits,
                                      const int64_t *labels, float *nll, float *lse);
int pylora_cuda_cross_entropy_backward(pylora_cuda *g, void *stream, const pylora_mat *logits,
                                       const int64_t *labels, const float *lse, const float *weight,
                                       const pylora_mat *dlogits);
int pylora_cuda_cross_entropy(pylora_cuda *g, void *stream, const pylora_mat *logits,
                              const int64_t *labels, const float *weight, float *nll, float *lse,
                              const pylora_mat *dlogits);

/* ---- optimizer -------------------------------------------------------------------------- */

/* One array of a step: float32, n contiguous elements. */
typedef struct pylora_cuda_parameter {
  int64_t n;
  float *param;
  const float *grad;
  float *m, *v;
  double lr, weight_decay;
} pylora_cuda_parameter;
/* pylora_adamw_step on `count` arrays (a host array) in one pass; o->lr and o->weight_decay are not read. */
int pylora_cuda_adamw_step(pylora_cuda *g, void *stream, int64_t count,
                           const pylora_cuda_parameter *parameters, const pylora_adamw *o);
/* sum x² over all `count` arrays (host arrays of n and of device pointers), in double, into out[0] of the device. */
size_t pylora_cuda_sum_squares_workspace(pylora_cuda *g, int64_t count, const int64_t *n);
int pylora_cuda_sum_squares(pylora_cuda *g, void *stream, int64_t count, const int64_t *n,
                            const float *const *x, double *out, void *ws, size_t ws_bytes);

/* ---- random numbers --------------------------------------------------------------------- */

int pylora_cuda_philox(pylora_cuda *g, void *stream, uint64_t seed, uint64_t stream_number,
                       int64_t first, int64_t n, uint32_t *out);
int pylora_cuda_dropout(pylora_cuda *g, void *stream, const pylora_mat *x, const pylora_drop *drop,
                        const pylora_mat *y);

#ifdef __cplusplus
}
#endif
#endif
