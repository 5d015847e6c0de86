/* amx_emulation.h - the tiles of Intel's AMX in software, so that the very source of the amx kernels
 * runs on any machine and every access is seen by a sanitizer.
 *
 * Written to "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, LDTILECFG,
 * TILELOADD, TILESTORED, TILERELEASE, TDPBF16PS and TDPBSSD: what would fault there ends the program
 * here.  TDPBF16PS, for tiles C (m x n float32), A (m x k pairs) and B (k x n pairs):
 *
 *     for each row m:
 *       temp[2 n] = 0
 *       for k: for n:   temp[2n] += A[m][2k] * B[k][2n];   temp[2n+1] += A[m][2k+1] * B[k][2n+1]
 *       for n:          C[m][n] = C[m][n] + (temp[2n] + temp[2n+1])
 *
 * where += is one fused multiply-add, rounded to nearest even; subnormal inputs count as 0 and subnormal
 * results become 0; MXCSR is neither read nor written. */
#ifndef AMX_EMULATION_H
#define AMX_EMULATION_H

#if defined(__AVX512F__)
#include <immintrin.h> /* now, so that its names can be taken over below */
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct amx_tile {
  int rows, bytes; /* configured; 0: not */
  uint8_t d[16][64];
} amx_tile;

/* Per thread, as on the processor. */
static _Thread_local amx_tile amx_tiles[8];
static _Thread_local int amx_configured;
/* A processor that is wrong: 1: one chain for both terms of a pair; 2: sums not added to C;
 * 3: the last row of a tile is left as it was; 4: bytes of A without their sign; 5: of B. The self-test
 * must notice. */
static int amx_fault;

static inline void amx_must(int condition, const char *what) {
  if (condition) return;
  fprintf(stderr, "AMX would fault here: %s\n", what);
  abort();
}

static inline void amx_loadconfig(const void *p) {
  uint8_t t[64];
  memcpy(t, p, 64);
  amx_must(t[0] == 1 && t[1] == 0, "palette 1, start row 0");
  for (int i = 2; i < 16; i++) amx_must(t[i] == 0, "reserved bytes of a configuration are 0");
  for (int i = 0; i < 16; i++) {
    const int bytes = t[16 + 2 * i] | t[17 + 2 * i] << 8, rows = t[48 + i];
    amx_must(i < 8 || (bytes == 0 && rows == 0), "there are 8 tiles");
    amx_must(bytes <= 64 && rows <= 16 && !bytes == !rows, "size of a tile");
    if (i < 8) {
      memset(&amx_tiles[i], 0, sizeof amx_tiles[i]);
      amx_tiles[i].rows = rows;
      amx_tiles[i].bytes = bytes;
    }
  }
  amx_configured = 1;
}

static inline void amx_release(void) {
  memset(amx_tiles, 0, sizeof amx_tiles);
  amx_configured = 0;
}

static inline amx_tile *amx_use(int i) {
  amx_must(amx_configured && amx_tiles[i].rows, "a tile that is not configured");
  return &amx_tiles[i];
}

static inline void amx_zero(int i) { memset(amx_use(i)->d, 0, sizeof amx_tiles[i].d); }

static inline void amx_load(int i, const void *base, int64_t stride) {
  amx_tile *t = amx_use(i);
  memset(t->d, 0, sizeof t->d);
  for (int r = 0; r < t->rows; r++)
    memcpy(t->d[r], (const char *)base + r * stride, (size_t)t->bytes);
}

static inline void amx_store(int i, void *base, int64_t stride) {
  const amx_tile *t = amx_use(i);
  for (int r = 0; r < t->rows; r++) memcpy((char *)base + r * stride, t->d[r], (size_t)t->bytes);
}

static inline float amx_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static inline float amx_add(float a, float b) { return amx_flush(amx_flush(a) + amx_flush(b)); }

static inline float amx_fma(float a, float b, float c) {
  a = amx_flush(a), b = amx_flush(b), c = amx_flush(c);
  const float r = fmaf(a, b, c);
  /* Tiny is what would be below the smallest normal number if rounded with any exponent: 2^-126 itself
   * may be a number that was rounded up to it from below only because subnormals are coarser. */
  if (fabsf(r) == 0x1p-126f && fabs((double)a * b + c) < 0x1p-126 - 0x1p-151)
    return copysignf(0, r);
  return amx_flush(r);
}

static inline float amx_bf16(const uint8_t *p) {
  const uint32_t u = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline void amx_shapes(const amx_tile *c, const amx_tile *a, const amx_tile *b) {
  amx_must(c != a && c != b && a != b, "the three tiles of a product differ");
  amx_must(c->bytes % 4 == 0 && a->bytes % 4 == 0 && b->bytes % 4 == 0, "whole words");
  amx_must(c->bytes == b->bytes && c->rows == a->rows && a->bytes / 4 == b->rows,
           "the sizes of a product fit");
}

static inline void amx_dpbf16ps(int ci, int ai, int bi) {
  amx_tile *c = amx_use(ci);
  const amx_tile *a = amx_use(ai), *b = amx_use(bi);
  amx_shapes(c, a, b);
  for (int m = 0; m < c->rows - (amx_fault == 3 && c->rows > 1); m++) {
    float temp[2][16] = {{0}};
    for (int k = 0; k < a->bytes / 4; k++)
      for (int n = 0; n < c->bytes / 4; n++)
        for (int e = 0; e < 2; e++) {
          float *sum = &temp[amx_fault == 1 ? 0 : e][n];
          *sum =
              amx_fma(amx_bf16(a->d[m] + 4 * k + 2 * e), amx_bf16(b->d[k] + 4 * n + 2 * e), *sum);
        }
    for (int n = 0; n < c->bytes / 4; n++) {
      float old;
      memcpy(&old, c->d[m] + 4 * n, 4);
      const float both = amx_add(temp[0][n], temp[1][n]),
                  sum = amx_fault == 2 ? both : amx_add(old, both);
      memcpy(c->d[m] + 4 * n, &sum, 4);
    }
  }
}

/* Signed bytes, four to a word; sums wrap as 32-bit numbers do. */
static inline void amx_dpbssd(int ci, int ai, int bi) {
  amx_tile *c = amx_use(ci);
  const amx_tile *a = amx_use(ai), *b = amx_use(bi);
  amx_shapes(c, a, b);
  for (int m = 0; m < c->rows; m++)
    for (int k = 0; k < a->bytes / 4; k++)
      for (int n = 0; n < c->bytes / 4; n++) {
        uint32_t sum;
        memcpy(&sum, c->d[m] + 4 * n, 4);
        for (int e = 0; e < 4; e++)
          sum += (uint32_t)((amx_fault == 4 ? a->d[m][4 * k + e] : (int8_t)a->d[m][4 * k + e]) *
                            (amx_fault == 5 ? b->d[k][4 * n + e] : (int8_t)b->d[k][4 * n + e]));
        memcpy(c->d[m] + 4 * n, &sum, 4);
      }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(p) amx_loadconfig(p)
#define _tile_release() amx_release()
#define _tile_zero(t) amx_zero(t)
#define _tile_loadd(t, base, stride) amx_load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) amx_load(t, base, stride)
#define _tile_stored(t, base, stride) amx_store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_dpbf16ps(c, a, b)
#define _tile_dpbssd(c, a, b) amx_dpbssd(c, a, b)

/* There is no processor to ask. */
static int amx_enabled(void) { return 1; }

#endif
