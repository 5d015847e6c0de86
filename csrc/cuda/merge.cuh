/* merge.cuh - kernels of W' = round(W + s B A), of the way back, and of the residue: the bits of csrc/ops/merge.c.
 *
 * What decides the bits is d = s t, t = sum_i B[.,i] A[i,.] in double in the order of i. (Products of two floats are
 * exact in double, so that a fused multiply-add is the same as two operations.)  An H100 does 17e12 such
 * multiply-adds a second, and its memory feeds 0.7e12 16-bit elements a second (read and written at 3 TB/s): r = 16
 * would take two thirds of the FP64 units and, with the scaling and rounding after it, all of them; r = 64 would run
 * at a third of the memory's speed.  float32 elements are half as many, so that double keeps up to about r = 40.
 *
 * So 16-bit results are made in float32 first (twice the rate, and less work around it), with a bound E on how far
 * that is from the double: where round(v - E) = round(v + E), the double between the two rounds to the same.  The
 * rest, about r^1.5 2^-16 |t| / |W| of bfloat16 elements (one in thousands), is made again in double.
 * float32 results need all of double's bits and have no such way.
 *
 * A warp has ROWS rows and V neighbouring columns per lane; the block's part of A lies in shared memory, and each
 * warp's rows of B. */
#ifndef PYLORA_MERGE_CUH
#define PYLORA_MERGE_CUH

#include "device.cuh"

struct Merge {
  const void *W; /* [d,k] of dtype: what is added to (unmerge: taken from) */
  void *out;     /* merge, unmerge: the result; residue: W' */
  const float *A, *B;
  int64_t d, k, ldw, ldo, lda, ldb, r;
  int64_t *row_lossy; /* merge: counts, zeroed before; or NULL */
  const int64_t *row_first;
  int64_t *position;
  uint32_t *bits;
  int32_t dtype;
  int32_t ranks; /* ranks of A and B that are in shared memory at a time */
  float s;
  float sign; /* 1, or -1 for unmerge */
};

#define DEVICE_MEMBER __device__ __forceinline__

/* One rounding; of doubles that hold floats: none for the product. */
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

/* ---- one element, exactly ---- */

/* To dtype, rounded once.  First to float32 "to odd" (towards zero; if that is inexact, with the last bit set): rounded
 * again to fewer bits it is as if rounded once (Boldo & Melquiond 2008). */
DEVICE uint32_t narrow(int dtype, double x) {
  if (x != x) return dtype == PYLORA_F32 ? 0x7fc00000u : dtype == PYLORA_BF16 ? 0x7fc0u : 0x7e00u;
  const float f = (float)x;
  uint32_t u = bits_of_float(f);
  if (dtype == PYLORA_F32) return u;
  if ((double)f != x) {
    if (fabs((double)f) > fabs(x)) u -= 1;
    u |= 1;
  }
  return dtype == PYLORA_BF16 ? round_bf16(float_of_bits(u)) : round_f16(float_of_bits(u));
}
DEVICE float value_of(int dtype, uint32_t bits) {
  return dtype == PYLORA_F32    ? float_of_bits(bits)
         : dtype == PYLORA_BF16 ? float_of_bits(bits << 16)
                                : widen_f16((uint16_t)bits);
}
/* round(w + d); a NaN stays that NaN, quiet, as on a CPU. */
DEVICE uint32_t add_exactly(int dtype, uint32_t w, double d) {
  const float x = value_of(dtype, w);
  if (x != x)
    return dtype == PYLORA_F32    ? w | 0x400000u
           : dtype == PYLORA_BF16 ? w | 0x40u
                                  : (w & 0x8000u) | 0x7e00u;
  return narrow(dtype, add_rn((double)x, d));
}

/* ---- 16-bit elements by way of float32 ---- */

/* How far t, summed in float32, and what follows may be from the double, for |s| <= 2^20 and r <= 64:
 * gamma_r sum |b a| <= r 2^-24 |b|_1 max |a|, a little more for the roundings of the norms and of double, a floor for
 * what underflows; and 2^-22 |v| for the last addition and those of the bound. */
#define MERGE_FLOOR 0x1p-120f
/* round(v) if the double, which is within `e` and a rounding of v, rounds to that for sure. */
DEVICE bool round_surely(int dtype, float v, float e, uint32_t *bits) {
  e += fabsf(v) * 0x1p-22f;
  const float low = v - e, high = v + e;
  uint32_t a, b;
  if (dtype == PYLORA_BF16) { /* halves upwards: a tie is never sure */
    a = (bits_of_float(low) + 0x8000u) >> 16;
    b = (bits_of_float(high) + 0x8000u) >> 16;
  } else {
    a = round_f16(low);
    b = round_f16(high);
  }
  *bits = a;
  return a == b && fabsf(v) + e < 3e38f; /* the latter is false for NaN */
}

/* ---- tiles ---- */

/* The V elements of a lane as they are in memory: 16 bytes, or one element. */
template <int V> struct MergeRaw {
  uint32_t u[4];
};
template <int V> DEVICE MergeRaw<V> merge_fetch(int dtype, const void *p, int64_t i) {
  MergeRaw<V> r = {};
  if (V == 1) {
    r.u[0] = dtype == PYLORA_F32 ? ((const uint32_t *)p)[i] : ((const uint16_t *)p)[i];
  } else {
    const uint4 x = *(const uint4 *)((const uint8_t *)p + i * (V == 4 ? 4 : 2));
    r.u[0] = x.x, r.u[1] = x.y, r.u[2] = x.z, r.u[3] = x.w;
  }
  return r;
}
template <int V> DEVICE void merge_put(int dtype, void *p, int64_t i, const MergeRaw<V> &r) {
  if (V == 1) {
    if (dtype == PYLORA_F32)
      ((uint32_t *)p)[i] = r.u[0];
    else
      ((uint16_t *)p)[i] = (uint16_t)r.u[0];
  } else {
    uint4 x;
    x.x = r.u[0], x.y = r.u[1], x.z = r.u[2], x.w = r.u[3];
    *(uint4 *)((uint8_t *)p + i * (V == 4 ? 4 : 2)) = x;
  }
}
template <int V> DEVICE uint32_t merge_get(const MergeRaw<V> &r, int e) {
  return V == 8 ? r.u[e / 2] >> 16 * (e % 2) & 0xffffu : r.u[e];
}
template <int V> DEVICE void merge_set(MergeRaw<V> &r, int e, uint32_t bits) {
  if (V == 8)
    r.u[e / 2] = e % 2 ? (r.u[e / 2] & 0xffffu) | bits << 16 : (r.u[e / 2] & 0xffff0000u) | bits;
  else
    r.u[e] = bits;
}

/* Where column `lane * V + e` of a tile is in a row of A's shared part: 16 bytes of each lane side by side, so that a
 * warp's 16-byte reads have no bank twice. */
template <int V, typename T> DEVICE int merge_slot(int lane, int e) {
  const int side = V == 1 ? 1 : 16 / (int)sizeof(T);
  return e / side * (WARP * side) + lane * side + e % side;
}

/* What a warp works on: ROWS rows, WARP * V columns. T: float where results are made by way of float32. */
template <int V, int ROWS, typename T> struct MergeTile {
  enum { COLUMNS = WARP * V, FAST = sizeof(T) == 4 };
  T *A;       /* of the block: [ranks][COLUMNS], in slots */
  float *top; /* of the block: [COLUMNS], max_i |A[i,.]|, in slots; FAST only */
  T *B;       /* of this warp: [ranks][ROWS] */
  int lane, warp, warps;

  DEVICE_MEMBER void place(uint8_t *memory, int ranks) {
    lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, warps = (int)blockDim.x / WARP;
    top = (float *)memory;
    A = (T *)(memory + COLUMNS * sizeof(float));
    B = A + ranks * COLUMNS + warp * ranks * ROWS;
  }
  /* Ranks first .. first+n-1.  A barrier must follow, and one must come before if A was in use. */
  DEVICE_MEMBER void load_A(const Merge &q, int64_t column, int64_t first, int n) {
    for (int at = (int)threadIdx.x; at < n * COLUMNS; at += (int)blockDim.x) {
      const int i = at / COLUMNS, c = at % COLUMNS;
      const int64_t j = column + c;
      A[i * COLUMNS + merge_slot<V, T>(c / V, c % V)] =
          j < q.k ? (T)q.A[(first + i) * q.lda + j] : (T)0;
    }
    if (!FAST) return;
    __syncthreads();
    for (int c = (int)threadIdx.x; c < COLUMNS; c += (int)blockDim.x) {
      float most = 0;
      for (int i = 0; i < n; i++) most = fmaxf(most, fabsf((float)A[i * COLUMNS + c]));
      top[c] = most;
    }
  }
  DEVICE_MEMBER void load_B(const Merge &q, int64_t row, int64_t first, int n) {
    for (int at = lane; at < n * ROWS; at += WARP) {
      const int y = at / n, i = at % n; /* a row of B is read side by side */
      B[i * ROWS + y] = row + y < q.d ? (T)q.B[(row + y) * q.ldb + first + i] : (T)0;
    }
  }
  DEVICE_MEMBER void add(T (&t)[ROWS][V], int n) const {
    ROLLED /* there are no registers for a second rank under way */
        for (int i = 0; i < n; i++) {
      T a[V], b[ROWS];
      UNROLL
      for (int e = 0; e < V; e++) a[e] = A[i * COLUMNS + merge_slot<V, T>(lane, e)];
      UNROLL
      for (int y = 0; y < ROWS; y++) b[y] = B[i * ROWS + y];
      UNROLL
      for (int y = 0; y < ROWS; y++) UNROLL
      for (int e = 0; e < V; e++) t[y][e] = multiply_add(b[y], a[e], t[y][e]);
    }
  }
  /* t = B A of the tile, from zero.  `fresh`: A has the tile's columns already, and all ranks fit. */
  DEVICE_MEMBER void delta(const Merge &q, int64_t row, int64_t column, bool fresh,
                           T (&t)[ROWS][V]) {
    UNROLL
    for (int y = 0; y < ROWS; y++) UNROLL
    for (int e = 0; e < V; e++) t[y][e] = 0;
    for (int64_t first = 0; first < q.r; first += q.ranks) {
      const int n = q.r - first < q.ranks ? (int)(q.r - first) : q.ranks;
      if (fresh) {
        __syncwarp();
        load_B(q, row, first, n);
        __syncwarp();
      } else {
        __syncthreads();
        load_A(q, column, first, n);
        load_B(q, row, first, n);
        __syncthreads();
      }
      add(t, n);
    }
  }
  /* s t of one element again, in double, when all ranks are in shared memory. */
  DEVICE_MEMBER double exactly(const Merge &q, int y, int e) const {
    double t = 0;
    for (int i = 0; i < (int)q.r; i++)
      t = fma((double)B[i * ROWS + y], (double)A[i * COLUMNS + merge_slot<V, T>(lane, e)], t);
    return mul_rn(t, (double)q.s);
  }
  /* WARP / ROWS lanes have the bound of a row: lanes y * WARP / ROWS and on that of row y. */
  DEVICE_MEMBER float bound_of_rows(const Merge &q) const {
    enum { PARTS = WARP / ROWS };
    float norm1 = 0;
    for (int i = lane % PARTS; i < (int)q.r; i += PARTS)
      norm1 += fabsf((float)B[i * ROWS + lane / PARTS]);
    for (int step = 1; step < PARTS; step *= 2) norm1 += __shfl_xor_sync(ALL_LANES, norm1, step);
    return fabsf(q.s) * (float)(q.r + 2) * 0x1.01p-24f * norm1;
  }
};

/* ---- merge and unmerge ---- */

/* V elements of row y: their results, and how many the way back does not restore (0 unless they are counted).
 * bound, top: of the row and the columns; see MERGE_FLOOR. */
template <int V, int ROWS, typename T>
DEVICE int merge_elements(const Merge &q, const MergeTile<V, ROWS, T> &tile, int y, const T (&t)[V],
                          float bound, const float (&top)[V], const MergeRaw<V> &before,
                          MergeRaw<V> &after) {
  const int dtype = V == 4 ? PYLORA_F32 : q.dtype;
  const bool count = q.row_lossy != 0;
  int lossy = 0;
  uint32_t unsure = 0; /* a bit for each element that float32 does not decide */
  UNROLL
  for (int e = 0; e < V; e++) {
    const uint32_t w = merge_get(before, e);
    uint32_t result, back = w;
    if (sizeof(T) == 4) {
      const float slack = fmaf(bound, top[e], MERGE_FLOOR), x = (float)t[e];
      bool sure = round_surely(dtype, fmaf(q.sign * q.s, x, value_of(dtype, w)), slack, &result);
      if (count)
        sure = round_surely(dtype, fmaf(-q.s, x, value_of(dtype, result)), slack, &back) && sure;
      if (!sure)
        unsure |= 1u << e;
      else if (back != w)
        lossy++;
    } else {
      const double d = (double)q.sign * mul_rn((double)t[e], (double)q.s);
      result = add_exactly(dtype, w, d);
      if (count && add_exactly(dtype, result, -d) != w) lossy++;
    }
    merge_set(after, e, result);
  }
  for (int e = 0; sizeof(T) == 4 && unsure; e++, unsure >>= 1) {
    if (!(unsure & 1)) continue;
    const double d = (double)q.sign * tile.exactly(q, y, e);
    uint32_t w = 0, result;
    UNROLL
    for (int c = 0; c < V; c++) /* registers have no index that is known only now */
      if (c == e) w = merge_get(before, c);
    result = add_exactly(dtype, w, d);
    UNROLL
    for (int c = 0; c < V; c++)
      if (c == e) merge_set(after, c, result);
    if (count && add_exactly(dtype, result, -d) != w) lossy++;
  }
  return lossy;
}

template <int V, int ROWS, typename T> DEVICE void merge_tiles(const Merge &q) {
  DYNAMIC_SHARED(uint8_t, memory);
  MergeTile<V, ROWS, T> tile;
  tile.place(memory, q.ranks);
  const int dtype = V == 4 ? PYLORA_F32 : q.dtype;
  const int64_t column = (int64_t)blockIdx.x * tile.COLUMNS, j = column + tile.lane * V;
  const bool fresh = q.r <= q.ranks;
  if (fresh) tile.load_A(q, column, 0, (int)q.r);
  __syncthreads();
  float top[V] = {};
  UNROLL
  for (int e = 0; sizeof(T) == 4 && e < V; e++) top[e] = tile.top[merge_slot<V, T>(tile.lane, e)];
  const int64_t tall = (int64_t)tile.warps * ROWS;
  for (int64_t block = blockIdx.y; block * tall < q.d; block += gridDim.y) {
    const int64_t row = block * tall + tile.warp * ROWS;
    T t[ROWS][V];
    tile.delta(q, row, column, fresh, t);
    MergeRaw<V> before[4]; /* rows that are loaded together */
    const float bounds = sizeof(T) == 4 ? tile.bound_of_rows(q) : 0.0f;
    UNROLL
    for (int y = 0; y < ROWS; y++) {
      UNROLL
      for (int z = y; z < y + 4; z++)
        if (y % 4 == 0 && row + z < q.d && j < q.k)
          before[z % 4] = merge_fetch<V>(dtype, q.W, (row + z) * q.ldw + j);
      const float bound = sizeof(T) == 4 ? __shfl_sync(ALL_LANES, bounds, y * (WARP / ROWS)) : 0.0f;
      int lossy = 0;
      if (row + y < q.d && j < q.k) {
        MergeRaw<V> after = {};
        lossy = merge_elements(q, tile, y, t[y], bound, top, before[y % 4], after);
        merge_put(dtype, q.out, (row + y) * q.ldo + j, after);
      }
      if (!q.row_lossy) continue;
      lossy = warp_sum(lossy);
      if (tile.lane == 0 && lossy) add_count(q.row_lossy + row + y, lossy);
    }
  }
}

#define MERGE_KERNEL(name, V, ROWS, T) \
  KERNEL __launch_bounds__(256, 2) name(Merge q) { merge_tiles<V, ROWS, T>(q); }
MERGE_KERNEL(pylora_merge_8_float, 8, 8, float)
MERGE_KERNEL(pylora_merge_1_float, 1, 8, float)
MERGE_KERNEL(pylora_merge_8_double, 8, 4, double)
MERGE_KERNEL(pylora_merge_4_double, 4, 8, double)
MERGE_KERNEL(pylora_merge_1_double, 1, 8, double)

/* ---- the residue ---- */

/* The positions, ascending, and W's bits, where round(W' - d) is not W: of a row from row_first on.  A warp goes along
 * its rows from left to right, a column per lane. */
template <int ROWS, typename T> DEVICE void merge_residue(const Merge &q) {
  DYNAMIC_SHARED(uint8_t, memory);
  MergeTile<1, ROWS, T> tile;
  tile.place(memory, q.ranks);
  const int64_t row = ((int64_t)blockIdx.x * tile.warps + tile.warp) * ROWS;
  int64_t at[ROWS];
  UNROLL
  for (int y = 0; y < ROWS; y++) at[y] = row + y < q.d ? q.row_first[row + y] : 0;
  for (int64_t column = 0; column < q.k; column += WARP) {
    const int64_t j = column + tile.lane;
    T t[ROWS][1];
    tile.delta(q, row, column, false, t);
    const float bounds = sizeof(T) == 4 ? tile.bound_of_rows(q) : 0.0f,
                top = sizeof(T) == 4 ? tile.top[tile.lane] : 0.0f;
    UNROLL
    for (int y = 0; y < ROWS; y++) {
      const float bound = sizeof(T) == 4 ? __shfl_sync(ALL_LANES, bounds, y * (WARP / ROWS)) : 0.0f;
      bool lost = false;
      uint32_t w = 0;
      if (row + y < q.d && j < q.k) {
        w = merge_fetch<1>(q.dtype, q.W, (row + y) * q.ldw + j).u[0];
        const uint32_t merged = merge_fetch<1>(q.dtype, q.out, (row + y) * q.ldo + j).u[0];
        uint32_t back;
        const float v = fmaf(-q.s, (float)t[y][0], value_of(q.dtype, merged));
        if (sizeof(T) == 8)
          back = add_exactly(q.dtype, merged, -mul_rn((double)t[y][0], (double)q.s));
        else if (!round_surely(q.dtype, v, fmaf(bound, top, MERGE_FLOOR), &back))
          back = add_exactly(q.dtype, merged, -tile.exactly(q, y, 0));
        lost = back != w;
      }
      const uint32_t lanes = __ballot_sync(ALL_LANES, lost ? 1 : 0);
      if (lost) {
        int64_t to = at[y];
        for (uint32_t left = lanes & ((1u << tile.lane) - 1); left; left &= left - 1) to++;
        q.position[to] = (row + y) * q.k + j;
        q.bits[to] = w;
      }
      for (uint32_t left = lanes; left; left &= left - 1) at[y]++;
    }
  }
}
KERNEL __launch_bounds__(128) pylora_merge_residue_float(Merge q) { merge_residue<8, float>(q); }
KERNEL __launch_bounds__(128) pylora_merge_residue_double(Merge q) { merge_residue<8, double>(q); }

/* The last step of unmerge: the residue's elements are put back. */
KERNEL pylora_merge_put_back(int32_t dtype, int64_t d, int64_t k, int64_t n,
                             const int64_t *position, const uint32_t *bits, void *out, int64_t ldo,
                             int32_t *bad) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t p = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; p < n; p += step) {
    const int64_t at = position[p], row = at / k;
    if (at < 0 || row >= d) {
      flag_bad_index(bad);
      continue;
    }
    const int64_t i = row * ldo + at % k;
    if (dtype == PYLORA_F32)
      ((uint32_t *)out)[i] = bits[p];
    else
      ((uint16_t *)out)[i] = (uint16_t)bits[p];
  }
}

#endif
