/* pack.c - frozen weights in the order the kernels read them: panels of 32 outputs in a format's layout. */
#include "formats/format.h"

/* Both of a type: with 16 and with 8 bits of x. */
#define BOTH(type, format) [PYLORA_##type] = &format[0], [PYLORA_A8 + PYLORA_##type] = &format[1]

static const pylora_format *const formats[] = {
    [PYLORA_F32] = &pylora_format_f32,
    [PYLORA_BF16] = &pylora_format_bf16,
    [PYLORA_F32X3] = &pylora_format_f32x3,
    [PYLORA_Q8_0] = &pylora_format_q8_0,
    [PYLORA_Q8_0_A8] = &pylora_format_q8_0_a8,
    [PYLORA_Q4_0] = &pylora_format_q4_0,
    [PYLORA_Q4_0_A8] = &pylora_format_q4_0_a8,
    [PYLORA_Q4_1] = &pylora_format_q4_1,
    [PYLORA_Q4_1_A8] = &pylora_format_q4_1_a8,
    BOTH(Q5_0, pylora_format_q5_0),
    BOTH(Q5_1, pylora_format_q5_1),
    BOTH(Q2_K, pylora_format_q2_k),
    BOTH(Q3_K, pylora_format_q3_k),
    BOTH(Q4_K, pylora_format_q4_k),
    BOTH(Q5_K, pylora_format_q5_k),
    BOTH(Q6_K, pylora_format_q6_k),
    BOTH(IQ4_NL, pylora_format_iq4_nl),
    BOTH(IQ4_XS, pylora_format_iq4_xs),
    BOTH(MXFP4, pylora_format_mxfp4),
};

const pylora_format *pylora_format_of(int dtype) {
  return dtype >= 0 && dtype < (int)(sizeof formats / sizeof *formats) ? formats[dtype] : NULL;
}

int pylora_check_packed(const pylora_packed *P) {
  if (!P || !P->data) return PYLORA_E_NULL;
  if (P->magic != PYLORA_MAGIC || P->d < 0 || P->k < 0) return PYLORA_E_PACKED;
  return pylora_format_of(P->dtype) ? PYLORA_OK : PYLORA_E_UNSUPPORTED;
}

size_t pylora_pack_bytes(int dtype, int64_t d, int64_t k) {
  const pylora_format *F = pylora_format_of(dtype);
  const int64_t most = INT64_MAX / 1024;
  if (!F || d < 0 || k < 0 || d > most || k > most || k % F->multiple) return 0;
  const size_t panels = (size_t)ceil_div(d, PYLORA_PANEL), bytes = F->panel_bytes(k);
  if (bytes && panels > SIZE_MAX / 4 / bytes) return 0;
  const size_t total = panels * bytes;
  return total > 0 ? total : PYLORA_ALIGN; /* never 0 for a legal size */
}

typedef struct job {
  const pylora_format *F;
  const pylora_kernels *K;
  const pylora_mat *W;
  char *panels;
  size_t bytes;
} job;

static void pack_panel(void *ctx, int64_t p, int thread) {
  (void)thread;
  const job *j = ctx;
  j->F->pack(j->K, j->W, p * PYLORA_PANEL, j->panels + (size_t)p * j->bytes);
}

int pylora_pack(int dtype, const pylora_mat *W, void *buffer, pylora_packed *out) {
  if (!W || !out || !buffer) return PYLORA_E_NULL;
  TRY(dtype == PYLORA_BF16 ? check_mat16(W, W->rows, W->cols, 0)
                           : check_mat(W, W->rows, W->cols, 0));
  const pylora_format *F = pylora_format_of(dtype);
  if (!F || !F->pack) return PYLORA_E_UNSUPPORTED;
  if (!pylora_pack_bytes(dtype, W->rows, W->cols)) return PYLORA_E_SHAPE;
  job j = {F, pylora_table(), W, buffer, F->panel_bytes(W->cols)};
  if (W->cols)
    pylora_parallel(pack_panel, &j, ceil_div(W->rows, PYLORA_PANEL), pylora_num_threads());
  *out = (pylora_packed){PYLORA_MAGIC, dtype, W->rows, W->cols, buffer};
  return PYLORA_OK;
}

typedef struct blocks_job {
  const pylora_format *F;
  const void *rows;
  int64_t row_bytes, d, k;
  char *panels;
  size_t bytes;
} blocks_job;

static void pack_blocks_panel(void *ctx, int64_t p, int thread) {
  (void)thread;
  const blocks_job *j = ctx;
  j->F->pack_blocks(j->rows, j->row_bytes, j->d, j->k, p * PYLORA_PANEL,
                    j->panels + (size_t)p * j->bytes);
}

int pylora_pack_blocks(int dtype, int64_t d, int64_t k, const void *rows, int64_t row_bytes,
                       void *buffer, pylora_packed *out) {
  if (!out || !buffer) return PYLORA_E_NULL;
  const pylora_format *F = pylora_format_of(dtype);
  if (!F || !F->pack_blocks) return PYLORA_E_UNSUPPORTED;
  if (!pylora_pack_bytes(dtype, d, k)) return PYLORA_E_SHAPE;
  if (d && k && !rows) return PYLORA_E_NULL;
  if (d > 1 && row_bytes < (int64_t)F->blocks_bytes(k)) return PYLORA_E_SHAPE;
  blocks_job j = {F, rows, row_bytes, d, k, buffer, F->panel_bytes(k)};
  if (k) pylora_parallel(pack_blocks_panel, &j, ceil_div(d, PYLORA_PANEL), pylora_num_threads());
  *out = (pylora_packed){PYLORA_MAGIC, dtype, d, k, buffer};
  return PYLORA_OK;
}

int pylora_packed_at(int dtype, int64_t d, int64_t k, const void *bytes, pylora_packed *out) {
  if (!bytes || !out) return PYLORA_E_NULL;
  if (!pylora_format_of(dtype)) return PYLORA_E_UNSUPPORTED;
  if (!pylora_pack_bytes(dtype, d, k)) return PYLORA_E_SHAPE;
  if ((uintptr_t)bytes % PYLORA_ALIGN) return PYLORA_E_VALUE;
  *out = (pylora_packed){PYLORA_MAGIC, dtype, d, k, bytes};
  return PYLORA_OK;
}

typedef struct unjob {
  const pylora_format *F;
  const pylora_packed *P;
  const pylora_mat *W;
  size_t bytes;
} unjob;

static void unpack_panel(void *ctx, int64_t p, int thread) {
  (void)thread;
  const unjob *j = ctx;
  const char *panel = (const char *)j->P->data + (size_t)p * j->bytes;
  for (int64_t i = p * PYLORA_PANEL; i < min64(j->P->d, (p + 1) * PYLORA_PANEL); i++)
    j->F->unpack(panel, j->P->k, (int)(i % PYLORA_PANEL), j->W->p + i * j->W->ld);
}

int pylora_unpack(const pylora_packed *P, const pylora_mat *W) {
  TRY(pylora_check_packed(P));
  TRY(check_mat(W, P->d, P->k, 1));
  const pylora_format *F = pylora_format_of(P->dtype);
  unjob j = {F, P, W, F->panel_bytes(P->k)};
  if (P->k) pylora_parallel(unpack_panel, &j, ceil_div(P->d, PYLORA_PANEL), pylora_num_threads());
  return PYLORA_OK;
}
