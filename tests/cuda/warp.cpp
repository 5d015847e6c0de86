/* warp.cpp - what the 32 lanes of a warp do together: shuffles, ballots, products of the tensor cores, and
 * loads of matrices out of shared memory; and float16. */
#include <algorithm>

#include "engine.h"

/* ---- shuffles ---- */

namespace {
struct Exchange {
  uint64_t in, out;
  EmulatedShuffle kind;
  int arg, width;
};
} // namespace

static void exchange(void **lanes) {
  for (int i = 0; i < 32; i++) {
    Exchange *mine = (Exchange *)lanes[i];
    const int width = mine->width, base = i / width * width;
    int from = i;
    if (mine->kind == EMULATED_FROM) from = base + (mine->arg & (width - 1));
    if (mine->kind == EMULATED_XOR && (i ^ mine->arg) < base + width) from = i ^ mine->arg;
    if (mine->kind == EMULATED_DOWN && i + mine->arg < base + width) from = i + mine->arg;
    mine->out = ((Exchange *)lanes[from])->in;
  }
}
uint64_t emulated_exchange(EmulatedSite site, EmulatedShuffle kind, uint32_t mask, uint64_t bits,
                           int arg, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    emulated_fail(site, "its width is not a power of two up to 32");
  if (arg < 0 || (kind != EMULATED_FROM && arg > 31))
    emulated_fail(site, "it reaches for a lane outside the warp");
  Exchange mine = {bits, 0, kind, arg, width};
  emulated_together(site, mask, &mine, exchange);
  return mine.out;
}

static void ballot(void **lanes) {
  uint32_t all = 0;
  for (int i = 0; i < 32; i++) all |= *(uint32_t *)lanes[i] << i;
  for (int i = 0; i < 32; i++) *(uint32_t *)lanes[i] = all;
}
uint32_t emulated_ballot(EmulatedSite site, uint32_t mask, int predicate) {
  uint32_t mine = (uint32_t)predicate;
  emulated_together(site, mask, &mine, ballot);
  return mine;
}
void emulated_syncwarp(EmulatedSite site, uint32_t mask) {
  emulated_together(site, mask, nullptr, nullptr);
}

/* ---- tensor cores (PTX ISA, mma.m16n8k16 and ldmatrix) ---- */

namespace {
struct Product {
  float *d;
  const uint32_t *a, *b;
};
} // namespace

template <bool bf16> static float half_of(uint32_t word, int which) {
  const uint16_t h = (uint16_t)(word >> 16 * which);
  return bf16 ? emulated_float_of_bits((uint32_t)h << 16) : emulated_widen_f16(h);
}
template <bool bf16> static void product(void **lanes) {
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Product *p = (const Product *)lanes[lane];
    const int group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; i++)
      for (int h = 0; h < 2; h++)
        A[group + i % 2 * 8][2 * pair + i / 2 * 8 + h] = half_of<bf16>(p->a[i], h);
    for (int i = 0; i < 2; i++)
      for (int h = 0; h < 2; h++) B[2 * pair + i * 8 + h][group] = half_of<bf16>(p->b[i], h);
  }
  for (int lane = 0; lane < 32; lane++) {
    const Product *p = (const Product *)lanes[lane];
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, col = 2 * (lane % 4) + i % 2;
      float sum = p->d[i];
      for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][col];
      p->d[i] = sum;
    }
  }
}
void emulated_mma(EmulatedSite site, bool bf16, float *d, const uint32_t *a, const uint32_t *b) {
  Product mine = {d, a, b};
  emulated_together(site, 0xffffffffu, &mine, bf16 ? product<true> : product<false>);
}

namespace {
struct Loading {
  uint32_t *r;
  const char *row;
};
} // namespace

template <bool transposed> static void load_matrices(void **lanes) {
  for (int m = 0; m < 4; m++) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; i++) memcpy(matrix[i], ((Loading *)lanes[8 * m + i])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint16_t low = transposed ? matrix[j][i] : matrix[i][j];
      const uint16_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      ((Loading *)lanes[lane])->r[m] = low | (uint32_t)high << 16;
    }
  }
}
void emulated_load_matrix(EmulatedSite site, bool transposed, uint32_t *r, const void *shared) {
  emulated_check_shared(site, shared, 16);
  Loading mine = {r, (const char *)shared};
  emulated_together(site, 0xffffffffu, &mine,
                    transposed ? load_matrices<true> : load_matrices<false>);
}

/* ---- float16 ---- */

float emulated_widen_f16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, digits = h & 1023;
  if (exponent == 31) /* infinity; NaN becomes quiet */
    return emulated_float_of_bits(sign | 0x7f800000u | digits << 13 | (digits ? 0x400000u : 0));
  if (exponent == 0) {
    const float f = (float)digits * 0x1p-24f;
    return sign ? -f : f;
  }
  return emulated_float_of_bits(sign | (exponent + 112) << 23 | digits << 13);
}
uint16_t emulated_round_f16(float f) {
  const uint32_t u = emulated_bits_of_float(f), abs = u & 0x7fffffffu;
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  if (abs > 0x7f800000u) return 0x7fff;         /* cvt gives this NaN */
  if (abs >= 0x477ff000u) return sign | 0x7c00; /* 65520 and above */
  if (abs < 0x38800000u) /* below 2^-14: a multiple of 2^-24, to nearest even by the addition */
    return sign |
           (uint16_t)(emulated_bits_of_float(emulated_float_of_bits(abs) + 0.5f) - 0x3f000000u);
  const uint32_t rounded = abs + 0xfffu + (abs >> 13 & 1);
  return sign | (uint16_t)((rounded >> 13) - (112 << 10));
}
