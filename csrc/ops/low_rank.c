/* low_rank.c - A and B of an adapter in the order the kernels read them, and h = x Aᵀ. */
#include "ops/low_rank.h"

enum { PANEL = PYLORA_PANEL };

int pylora_check_lora(const pylora_lora *l, int64_t d, int64_t k) {
  if (l->r < 0) return PYLORA_E_SHAPE;
  if (l->drop && !(l->drop->p >= 0 && l->drop->p < 1)) return PYLORA_E_VALUE;
  if (l->packed) {
    const low_pack *P = l->packed;
    if (P->magic != PYLORA_MAGIC) return PYLORA_E_PACKED;
    return P->d == d && P->k == k && P->r == l->r ? PYLORA_OK : PYLORA_E_SHAPE;
  }
  if (l->r && ((!l->A && k) || (!l->B && d))) return PYLORA_E_NULL;
  return PYLORA_OK;
}

int pylora_any_nonzero(const float *B, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++)
      if (B[i * ld + j] != 0) return 1; /* also NaN */
  return 0;
}

static int in_pairs(int dtype) { return dtype == PYLORA_BF16; }

static size_t at_bytes(int dtype, int64_t k, int64_t r) {
  return in_pairs(dtype) ? (size_t)ceil_div(k, 2) * (size_t)r * 2 * sizeof(uint16_t)
                         : (size_t)k * (size_t)r * sizeof(float);
}

size_t pylora_lora_pack_bytes(int dtype, int64_t d, int64_t k, int64_t r) {
  const int64_t most = (int64_t)1 << 40;
  if (!pylora_format_of(dtype) || d < 0 || k < 0 || r < 0 || d > most || k > most || r > most)
    return 0;
  if ((double)(d + PANEL + k + 2) * (double)r > 1e15) return 0;
  return round_up(sizeof(low_pack)) + round_up(at_bytes(dtype, k, r)) +
         (size_t)pad_panel(d) * (size_t)r * sizeof(float);
}

void pylora_pack_pairs(const pylora_kernels *K, const float *M, int64_t rows, int64_t cols,
                       int64_t ld, uint16_t *out) {
  float words[PANEL * PANEL]; /* a pair of columns is a 32-bit word, and words are transposed */
  const int64_t pairs = ceil_div(cols, 2);
  for (int64_t p = 0; p < rows; p += PANEL, out += pairs * PANEL * 2) {
    const int64_t w = min64(PANEL, rows - p), room = PANEL * PANEL / w;
    for (int64_t t = 0; t < cols; t += 2 * room) {
      const int64_t n = min64(2 * room, cols - t);
      for (int64_t j = 0; j < w; j++) {
        uint16_t *row = (uint16_t *)(void *)(words + j * room);
        K->to_bf16(n, M + (p + j) * ld + t, row);
        if (n % 2) row[n] = 0;
      }
      K->transpose(w, ceil_div(n, 2), words, room, (float *)(void *)(out + t * w), w);
    }
  }
}

void pylora_pack_up(const pylora_kernels *K, const pylora_lora *l, int64_t d, int64_t panel,
                    float *out) {
  const int64_t i = panel * PANEL, n = min64(PANEL, d - i);
  if (n < PANEL) memset(out, 0, (size_t)(l->r * PANEL) * sizeof(float));
  K->transpose(n, l->r, l->B + i * l->ldb, l->ldb, out, PANEL);
  K->scale(l->r * PANEL, out, l->s, out);
}

int pylora_pack_down(int dtype, int64_t d, int64_t k, const pylora_lora *l, void *buffer) {
  if (!l || !buffer) return PYLORA_E_NULL;
  if (l->packed) return PYLORA_E_VALUE;
  if (!pylora_lora_pack_bytes(dtype, d, k, l->r)) return PYLORA_E_SHAPE;
  TRY(pylora_check_lora(l, d, k));
  const pylora_kernels *K = pylora_table();
  const int64_t r = l->r, at = (int64_t)round_up(sizeof(low_pack)),
                bt = at + (int64_t)round_up(at_bytes(dtype, k, r));
  low_pack *P = buffer;
  *P = (low_pack){PYLORA_MAGIC, dtype, d, k, r, pylora_any_nonzero(l->B, d, r, l->ldb), at, bt};
  if (in_pairs(dtype)) {
    pylora_pack_pairs(K, l->A, r, k, l->lda, (uint16_t *)(void *)((char *)buffer + at));
  } else {
    float *out = (float *)(void *)((char *)buffer + at);
    for (int64_t p = 0; p < r; p += PANEL, out += k * PANEL) {
      const int64_t w = min64(PANEL, r - p);
      K->transpose(w, k, l->A + p * l->lda, l->lda, out, w);
    }
  }
  return PYLORA_OK;
}

int pylora_lora_pack(int dtype, int64_t d, int64_t k, const pylora_lora *l, void *buffer) {
  TRY(pylora_pack_down(dtype, d, k, l, buffer));
  float *out = (float *)(void *)((char *)buffer + ((low_pack *)buffer)->bt);
  for (int64_t q = 0; q * PANEL < d && l->r; q++)
    pylora_pack_up(pylora_table(), l, d, q, out + q * l->r * PANEL);
  return PYLORA_OK;
}

void pylora_down(const pylora_kernels *K, const low_pack *P, int64_t m, const void *rows,
                 int64_t stride, float *out, int64_t ld) {
  const char *at = (const char *)P + P->at;
  for (int64_t p = 0; p < P->r; p += PANEL) {
    const int64_t w = min64(PANEL, P->r - p);
    if (in_pairs(P->dtype))
      pylora_product_bf16(K, m, w, P->k, rows, stride,
                          (const uint16_t *)(const void *)at + p * ceil_div(P->k, 2) * 2, 2 * w,
                          out + p, ld);
    else
      pylora_product(K, m, w, P->k, rows, stride, 1, (const float *)(const void *)at + p * P->k, w,
                     out + p, ld);
  }
}

void pylora_down_few(const pylora_kernels *K, int n, const low_pack *const *P,
                     const void *const *rows, float *const *out) {
  const int64_t r = P[0]->r, k = P[0]->k;
  const int pairs = in_pairs(P[0]->dtype);
  const pylora_format *F = pairs ? &pylora_format_bf16 : &pylora_format_f32;
  const void *at[PYLORA_FEW];
  float *to[PYLORA_FEW];
  for (int64_t p = 0; p < r; p += PANEL) {
    for (int i = 0; i < n; i++) {
      at[i] = (const char *)P[i] + P[i]->at + at_bytes(P[i]->dtype, k, p);
      to[i] = out[i] + p;
    }
    F->few(K, n, (int)min64(PANEL, r - p), k, rows, at, to);
  }
}
