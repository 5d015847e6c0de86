/* number.h - one stored number (float32, bfloat16 or float16) as bits, and its value as a double. */
#ifndef PYLORA_NUMBER_H
#define PYLORA_NUMBER_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pylora.h"

static inline float float_of_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t bits_of_float(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline double widen_f16(uint16_t u) {
  const uint32_t sign = (uint32_t)(u & 0x8000) << 16, e = u >> 10 & 31, f = u & 1023;
  if (e == 31) return (double)float_of_bits(sign | (f ? 0x7fc00000u : 0x7f800000u));
  if (e == 0) return (double)float_of_bits(sign | bits_of_float((float)f * 0x1p-24f));
  return (double)float_of_bits(sign | (e + 112) << 23 | f << 13);
}

/* The following are rounded once, to the nearest, to even between two. */
static inline uint16_t narrow_bf16(double t) {
  float f = (float)t;
  uint32_t u = bits_of_float(f);
  if (f != f) return (uint16_t)((u >> 16) | 0x40);
  uint32_t low = u & 0xffff, up = low > 0x8000;
  if (low ==
      0x8000) { /* a tie of bf16: was the double on it, or did float's rounding put it there? */
    double exact = (double)f;
    up = t == exact ? (u >> 16 & 1) : fabs(t) > fabs(exact);
  }
  return (uint16_t)((u >> 16) + up);
}

static inline uint16_t narrow_f16(double t) {
  const uint16_t sign = signbit(t) ? 0x8000 : 0;
  t = fabs(t);
  if (t != t) return sign | 0x7e00;
  if (t >= 65520) return sign | 0x7c00; /* rounds to infinity */
  if (t < 0x1p-14) {                    /* in steps of 2^-24, as doubles near 2^28 are */
    const double steps = ((t + 0x1p28) - 0x1p28) * 0x1p24;
    return (uint16_t)(sign | (uint16_t)steps);
  }
  uint64_t u;
  memcpy(&u, &t, 8);
  u += ((uint64_t)1 << 41) - 1 + (u >> 42 & 1);
  return (uint16_t)(sign | (uint16_t)((u >> 42) - ((1023 - 15) << 10)));
}

/* A number as bits, and back, rounded once to `dtype`. */
static inline double decode(int dtype, uint32_t u) {
  return dtype == PYLORA_F32    ? (double)float_of_bits(u)
         : dtype == PYLORA_BF16 ? (double)float_of_bits(u << 16)
                                : widen_f16((uint16_t)u);
}
static inline uint32_t encode(int dtype, double t) {
  return dtype == PYLORA_F32    ? bits_of_float((float)t)
         : dtype == PYLORA_BF16 ? narrow_bf16(t)
                                : narrow_f16(t);
}

/* x + t, but a NaN stays itself: which of two NaN a sum has differs from one compiler to the next. */
static inline double moved(double x, double t) {
  uint64_t u;
  memcpy(&u, &x, sizeof u); /* by its bits: a compiler takes one NaN for another */
  return (u << 1) > (uint64_t)0x7ff << 53 ? x : x + t;
}

/* Bytes of an element. */
static inline int64_t width_of(int dtype) { return dtype == PYLORA_F32 ? 4 : 2; }

/* Element i of a row of `dtype`. Rows are floats to one place and bits to another, so that they are
 * read and written as bytes: a compiler may take a float and an integer to lie apart. */
static inline uint32_t get_bits(int dtype, const void *row, int64_t i) {
  uint32_t u;
  uint16_t narrow;
  if (dtype == PYLORA_F32) {
    memcpy(&u, (const char *)row + i * 4, 4);
    return u;
  }
  memcpy(&narrow, (const char *)row + i * 2, 2);
  return narrow;
}
static inline void set_bits(int dtype, void *row, int64_t i, uint32_t u) {
  uint16_t narrow = (uint16_t)u;
  if (dtype == PYLORA_F32)
    memcpy((char *)row + i * 4, &u, 4);
  else
    memcpy((char *)row + i * 2, &narrow, 2);
}

#endif
