/* attention_tensor.cuh - tiles of 16-bit numbers in shared memory and what tensor cores take from them.
 *
 * A tile is rows of DT numbers (the head's D, filled up with zeros).  The pieces of 16 bytes of row r are
 * stored at piece ^ (r % 8), so that eight rows of one piece are in different banks. */
#ifndef PYLORA_ATTENTION_TENSOR_CUH
#define PYLORA_ATTENTION_TENSOR_CUH

#include "attention_common.cuh"

template <int DT> DEVICE uint16_t *tile_at(uint16_t *tile, int row, int piece) {
  return tile + row * DT + ((piece ^ (row & 7)) << 3);
}

/* Queues copies of `count` rows of q (or do) from row R0 of a sequence; what lies behind its last is zeros. */
template <int DT, int COUNT, int THREADS>
DEVICE void copy_queries(const AttentionArgs &a, const View &x, const Span &s, int kv, int32_t R0,
                         uint16_t *tile) {
  const int32_t rows = s.queries * a.group;
  for (int e = threadIdx.x; e < COUNT * DT / 8; e += THREADS) {
    const int r = e / (DT / 8), piece = e % (DT / 8);
    const bool in = r < rows - R0 && piece * 8 < a.D;
    const uint16_t *from = (const uint16_t *)x.p;
    if (in) from += attention_at(a, x, s, kv, R0 + r) + piece * 8;
    copy_async16(tile_at<DT>(tile, r, piece), from, in ? 16 : 0);
  }
}
/* Of rows row0 + [0, COUNT) of k or v, those in [0, end). */
template <int DT, int COUNT, int THREADS>
DEVICE void copy_keys(const AttentionArgs &a, const View &x, int64_t row0, int64_t end, int kv,
                      uint16_t *tile) {
  for (int e = threadIdx.x; e < COUNT * DT / 8; e += THREADS) {
    const int r = e / (DT / 8), piece = e % (DT / 8);
    const bool in = row0 + r >= 0 && row0 + r < end && piece * 8 < a.D;
    const uint16_t *from = (const uint16_t *)x.p;
    if (in) from += (row0 + r) * x.ld + (int64_t)kv * a.D + piece * 8;
    copy_async16(tile_at<DT>(tile, r, piece), from, in ? 16 : 0);
  }
}

/* A's fragment: rows row .. row+15, columns 16 step .. of a tile. */
template <int DT> DEVICE void load_a(uint32_t (&f)[4], uint16_t *tile, int row, int step) {
  const int lane = threadIdx.x % WARP;
  load_matrix_x4<false>(f, tile_at<DT>(tile, row + lane % 16, 2 * step + lane / 16));
}
/* B's fragments of the product with the transpose of tile rows row .. row+15, columns 16 step ..: f[0..1] of rows
 * row .. row+7, f[2..3] of the others. */
template <int DT> DEVICE void load_b_of_rows(uint32_t (&f)[4], uint16_t *tile, int row, int step) {
  const int lane = threadIdx.x % WARP;
  load_matrix_x4<false>(f,
                        tile_at<DT>(tile, row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}
/* B's fragments of the product with tile rows row .. row+15 themselves, columns 16 step ..: f[0..1] of the first
 * eight columns. */
template <int DT> DEVICE void load_b(uint32_t (&f)[4], uint16_t *tile, int row, int step) {
  const int lane = threadIdx.x % WARP;
  load_matrix_x4<true>(f, tile_at<DT>(tile, row + lane % 16, 2 * step + lane / 16));
}

template <int DTYPE>
DEVICE void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                     const uint32_t (&f)[4]) {
  const uint32_t b0[2] = {f[0], f[1]}, b1[2] = {f[2], f[3]};
  mma_16816<DTYPE>(d0, a, b0);
  mma_16816<DTYPE>(d1, a, b1);
}

/* s [16, 8 N] = 16 rows of A's tile times the transpose of 8 N rows of B's. */
template <int DTYPE, int DT, int N>
DEVICE void tile_scores(float (&s)[N][4], uint16_t *A, int row, uint16_t *B) {
  ATTENTION_UNROLL
  for (int j = 0; j < N; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
  ATTENTION_BY_TWO /* all at once the addresses would take the registers that the sums need */
      for (int step = 0; step < DT / 16; step++) {
    uint32_t x[4], y[4];
    load_a<DT>(x, A, row, step);
    ATTENTION_UNROLL
    for (int j = 0; j < N; j += 2) {
      load_b_of_rows<DT>(y, B, 8 * j, step);
      mma_pair<DTYPE>(s[j], s[j + 1], x, y);
    }
  }
}

/* Two numbers rounded to one word, the first in the lower half. */
template <int DTYPE> DEVICE uint32_t round_pair(float low, float high) {
#ifdef PYLORA_EMULATE
  return DTYPE == PYLORA_BF16 ? round_bf16(low) | (uint32_t)round_bf16(high) << 16
                              : round_f16(low) | (uint32_t)round_f16(high) << 16;
#else
  uint32_t r;
  if (DTYPE == PYLORA_BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#endif
}

/* acc [16, DT] += w [16, 8 N], rounded to 16 bits, times 8 N rows of B's tile. */
template <int DTYPE, int DT, int N>
DEVICE void tile_weighted(float (&acc)[DT / 8][4], const float (&w)[N][4], uint16_t *B) {
  ATTENTION_UNROLL
  for (int j = 0; j < N; j += 2) {
    const uint32_t x[4] = {round_pair<DTYPE>(w[j][0], w[j][1]), round_pair<DTYPE>(w[j][2], w[j][3]),
                           round_pair<DTYPE>(w[j + 1][0], w[j + 1][1]),
                           round_pair<DTYPE>(w[j + 1][2], w[j + 1][3])};
    uint32_t y[4];
    ATTENTION_UNROLL
    for (int c = 0; c < DT / 16; c++) {
      load_b<DT>(y, B, 8 * j, c);
      mma_pair<DTYPE>(acc[2 * c], acc[2 * c + 1], x, y);
    }
  }
}

/* A product sums a row's zeros too, and 0 * NaN is NaN: where not every row sees every row of a tile, those
 * rows of it that hold infinities or NaN are set to zero and marked, and whoever sees one becomes NaN.  So
 * what lies behind the diagonal changes no bit.  Needs a barrier before, and has one after. */
template <int DTYPE, int DT, int COUNT, int THREADS>
DEVICE void mark_not_finite(uint16_t *tile, int32_t *marks) {
  const uint32_t exponent = DTYPE == PYLORA_BF16 ? 0x7f80 : 0x7c00;
  for (int e = threadIdx.x; e < COUNT * DT / 8; e += THREADS) {
    const int r = e / (DT / 8);
    uint4 *at = (uint4 *)tile_at<DT>(tile, r, e % (DT / 8));
    const uint4 x = *at;
    const uint32_t word[4] = {x.x, x.y, x.z, x.w};
    bool finite = true;
    ATTENTION_UNROLL
    for (int j = 0; j < 4; j++)
      finite = finite && (word[j] & exponent) != exponent && (word[j] >> 16 & exponent) != exponent;
    if (finite) continue;
    marks[r] = 1;
    uint4 zero;
    zero.x = zero.y = zero.z = zero.w = 0;
    *at = zero;
  }
}

#endif
