/* reference.h - every operation of pylora.h in plain scalar C: the specification in C.
 *
 * Same order and names as pylora/reference.py. Sums are taken in double and each result is rounded
 * once, so these are also the yardstick that the fast path is measured with. Arguments are not
 * checked, weights are plain matrices, and there is no workspace. Not part of the library: the test
 * program links it, and a port can start from it. */
#ifndef PYLORA_REFERENCE_H
#define PYLORA_REFERENCE_H

#include "pylora.h"

/* m tokens, k input and d output features, r rank: x [m,k], W [d,k], A [r,k], B [d,r], h [m,r]. */

void pylora_ref_lora_forward(const pylora_mat *x, const pylora_mat *W, const float *bias,
                             const pylora_lora *lora, const pylora_mat *residual,
                             const pylora_mat *y, const pylora_mat *h);
void pylora_ref_lora_backward(const pylora_mat *dy, const pylora_mat *x, const pylora_mat *h,
                              const pylora_mat *W, const pylora_lora *lora, const pylora_mat *dx,
                              int add_dx, const pylora_mat *dA, const pylora_mat *dB);

/* Returns the number of elements of the residue; position and bits hold at most d * k. */
int64_t pylora_ref_merge(int dtype, int64_t d, int64_t k, const void *W, int64_t ldw,
                         const pylora_lora *lora, void *out, int64_t ldo, int64_t *position,
                         uint32_t *bits);
void pylora_ref_unmerge(int dtype, int64_t d, int64_t k, const void *merged, int64_t ldm,
                        const pylora_lora *lora, int64_t n, const int64_t *position,
                        const uint32_t *bits, void *out, int64_t ldo);

void pylora_ref_rms_norm_forward(const pylora_mat *x, const float *w, float eps,
                                 const pylora_mat *y, float *rstd);
void pylora_ref_rms_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                                  const float *rstd, const pylora_mat *dx, int add_dx, float *dw);
void pylora_ref_rope(const pylora_mat *x, const pylora_mat *cosines, const pylora_mat *sines,
                     const int64_t *position, int32_t head_dim, int layout, int inverse,
                     const pylora_mat *y);
void pylora_ref_attention_forward(const pylora_mat *q, const pylora_mat *k, const pylora_mat *v,
                                  const pylora_seqs *seqs, const pylora_attn *a,
                                  const pylora_mat *o, const pylora_mat *lse);
void pylora_ref_attention_backward(const pylora_mat *d_o, const pylora_mat *q, const pylora_mat *k,
                                   const pylora_mat *v, const pylora_mat *o, const pylora_mat *lse,
                                   const pylora_seqs *seqs, const pylora_attn *a,
                                   const pylora_mat *dq, const pylora_mat *dk,
                                   const pylora_mat *dv);
void pylora_ref_swiglu_forward(const pylora_mat *gate, const pylora_mat *up, const pylora_mat *y);
void pylora_ref_swiglu_backward(const pylora_mat *dy, const pylora_mat *gate, const pylora_mat *up,
                                const pylora_mat *dgate, const pylora_mat *dup);
void pylora_ref_layer_norm_forward(const pylora_mat *x, const float *w, const float *b, float eps,
                                   const pylora_mat *y, float *rstd);
void pylora_ref_layer_norm_backward(const pylora_mat *dy, const pylora_mat *x, const float *w,
                                    const float *rstd, const pylora_mat *dx, int add_dx);
void pylora_ref_activation_forward(int kind, const pylora_mat *x, const pylora_mat *up,
                                   const pylora_mat *y);
void pylora_ref_activation_backward(int kind, const pylora_mat *dy, const pylora_mat *x,
                                    const pylora_mat *up, const pylora_mat *dx,
                                    const pylora_mat *dup);
void pylora_ref_soft_cap_forward(const pylora_mat *x, float multiplier, float cap,
                                 const pylora_mat *y);
void pylora_ref_soft_cap_backward(const pylora_mat *dy, const pylora_mat *y, float multiplier,
                                  float cap, const pylora_mat *dx);
void pylora_ref_choose(const pylora_mat *logits, int64_t top_k, int normalize, const pylora_mat *p,
                       int64_t *chosen, const pylora_mat *weights);
void pylora_ref_embedding_forward(const int64_t *ids, int64_t m, const pylora_mat *W,
                                  const pylora_mat *y);
void pylora_ref_embedding_backward(const int64_t *ids, const pylora_mat *dy, const pylora_mat *dW);

void pylora_ref_cross_entropy_forward(const pylora_mat *logits, const int64_t *labels, float *nll,
                                      float *lse);
void pylora_ref_cross_entropy_backward(const pylora_mat *logits, const int64_t *labels,
                                       const float *lse, const float *weight,
                                       const pylora_mat *dlogits);
void pylora_ref_cross_entropy(const pylora_mat *logits, const int64_t *labels, const float *weight,
                              float *nll, float *lse, const pylora_mat *dlogits);
void pylora_ref_adamw_step(int64_t n, float *param, const float *grad, float *m, float *v,
                           const pylora_adamw *o);
double pylora_ref_sum_squares(int64_t n, const float *x);

void pylora_ref_philox(uint64_t seed, uint64_t stream, int64_t first, int64_t n, uint32_t *out);
void pylora_ref_dropout(const pylora_mat *x, const pylora_drop *drop, const pylora_mat *y);

#endif
