/* vector.cuh - W elements side by side, W = 4 or, where a matrix's rows are not aligned for that, 1; and how a grid
 * covers a matrix.
 *
 * fetch() and widen() are apart so that a thread can have several loads under way before it looks at the first. */
#ifndef PYLORA_VECTOR_CUH
#define PYLORA_VECTOR_CUH

#include "device.cuh"

template <int W> struct Raw {};
template <> struct Raw<4> {
  float4 f; /* float32; of 16-bit types the bits, two in x and two in y */
};
template <> struct Raw<1> {
  uint32_t u;
};
template <int W> struct Numbers {
  float v[W];
};

DEVICE void fetch_into(Raw<4> &r, const void *p, int dtype, int64_t i) {
  if (dtype == PYLORA_F32) {
    r.f = *(const float4 *)((const float *)p + i);
  } else {
    const uint2 u = *(const uint2 *)((const uint16_t *)p + i);
    r.f.x = float_of_bits(u.x), r.f.y = float_of_bits(u.y);
    r.f.z = r.f.w = 0;
  }
}
DEVICE void fetch_into(Raw<1> &r, const void *p, int dtype, int64_t i) {
  r.u = dtype == PYLORA_F32 ? bits_of_float(((const float *)p)[i]) : ((const uint16_t *)p)[i];
}
/* Elements i .. i + W-1 behind p, as they are. */
template <int W> DEVICE Raw<W> fetch(const void *p, int dtype, int64_t i) {
  Raw<W> r;
  fetch_into(r, p, dtype, i);
  return r;
}

DEVICE Numbers<4> widen(const Raw<4> &r, int dtype) {
  Numbers<4> n = {{r.f.x, r.f.y, r.f.z, r.f.w}};
  if (dtype == PYLORA_F32) return n;
  const uint32_t x = bits_of_float(r.f.x), y = bits_of_float(r.f.y);
  if (dtype == PYLORA_BF16) {
    n.v[0] = float_of_bits(x << 16), n.v[1] = float_of_bits(x & 0xffff0000u);
    n.v[2] = float_of_bits(y << 16), n.v[3] = float_of_bits(y & 0xffff0000u);
  } else {
    n.v[0] = widen_f16((uint16_t)x), n.v[1] = widen_f16((uint16_t)(x >> 16));
    n.v[2] = widen_f16((uint16_t)y), n.v[3] = widen_f16((uint16_t)(y >> 16));
  }
  return n;
}
DEVICE Numbers<1> widen(const Raw<1> &r, int dtype) {
  const Numbers<1> n = {{dtype == PYLORA_F32    ? float_of_bits(r.u)
                         : dtype == PYLORA_BF16 ? widen_bf16((uint16_t)r.u)
                                                : widen_f16((uint16_t)r.u)}};
  return n;
}

DEVICE void put(void *p, int dtype, int64_t i, const Numbers<4> &n) {
  float4 f;
  f.x = n.v[0], f.y = n.v[1], f.z = n.v[2], f.w = n.v[3];
  store4(p, dtype, i, f);
}
DEVICE void put(void *p, int dtype, int64_t i, const Numbers<1> &n) { store(p, dtype, i, n.v[0]); }

/* The bits of another element of the same type. */
DEVICE void put_raw(void *p, int dtype, int64_t i, const Raw<4> &r) {
  if (dtype == PYLORA_F32) {
    *(float4 *)((float *)p + i) = r.f;
    return;
  }
  uint2 u;
  u.x = bits_of_float(r.f.x), u.y = bits_of_float(r.f.y);
  *(uint2 *)((uint16_t *)p + i) = u;
}
DEVICE void put_raw(void *p, int dtype, int64_t i, const Raw<1> &r) {
  if (dtype == PYLORA_F32)
    ((float *)p)[i] = float_of_bits(r.u);
  else
    ((uint16_t *)p)[i] = (uint16_t)r.u;
}

template <int W> DEVICE Numbers<W> numbers(const void *p, int dtype, int64_t i) {
  return widen(fetch<W>(p, dtype, i), dtype);
}
template <int W> DEVICE Numbers<W> all(float x) {
  Numbers<W> n;
  for (int e = 0; e < W; e++) n.v[e] = x;
  return n;
}

/* Four elements, ALIGNED or not; if not, only the first `left` of them need be there, and the others are 0 (and are not
 * written).  What sums along a row goes by fours everywhere, so that the bits do not depend on how a matrix lies. */
template <bool ALIGNED>
DEVICE Raw<4> fetch_four(const void *p, int dtype, int64_t i, int64_t left) {
  Raw<4> r;
  if (ALIGNED) {
    fetch_into(r, p, dtype, i);
  } else {
    uint32_t u[4];
    UNROLL
    for (int q = 0; q < 4; q++) u[q] = q < left ? fetch<1>(p, dtype, i + q).u : 0u;
    if (dtype != PYLORA_F32) u[0] |= u[1] << 16, u[1] = u[2] | u[3] << 16;
    r.f.x = float_of_bits(u[0]), r.f.y = float_of_bits(u[1]);
    r.f.z = float_of_bits(u[2]), r.f.w = float_of_bits(u[3]);
  }
  return r;
}
template <bool ALIGNED>
DEVICE void put_four(void *p, int dtype, int64_t i, int64_t left, const Numbers<4> &n) {
  if (ALIGNED) {
    put(p, dtype, i, n);
  } else {
    UNROLL
    for (int q = 0; q < 4; q++)
      if (q < left) store(p, dtype, i + q, n.v[q]);
  }
}
template <bool ALIGNED> DEVICE Numbers<4> four(const void *p, int dtype, int64_t i, int64_t left) {
  return widen(fetch_four<ALIGNED>(p, dtype, i, left), dtype);
}

/* How threads cover the rows of a matrix and the vectors of a row: `lanes` threads, a power of two, side by side in
 * a row, so that narrow matrices keep blocks full.  (cover.h) */
struct Cover {
  int64_t row, row_step, col, col_step;
};
DEVICE Cover cover(int32_t lanes) {
  const int32_t rows = (int32_t)blockDim.x / lanes;
  Cover c;
  c.row = (int64_t)blockIdx.y * rows + (int32_t)threadIdx.x / lanes;
  c.row_step = (int64_t)gridDim.y * rows;
  c.col = (int64_t)blockIdx.x * lanes + (int32_t)threadIdx.x % lanes;
  c.col_step = (int64_t)gridDim.x * lanes;
  return c;
}

#endif
