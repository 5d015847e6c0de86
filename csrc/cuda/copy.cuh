/* copy.cuh - kernels that move rows, from one type to another if need be: cast, gather, scatter, and the
 * embedding's two directions. */
#ifndef PYLORA_COPY_CUH
#define PYLORA_COPY_CUH

#include "vector.cuh"

/* y[to(i),:] = x[from(i),:] for i < m, where `index` [m] is one of the two and the other is i; no index: both are i.
 * Out of range: with `scatter` nothing is written, else the row is NaN. */
template <int W>
DEVICE void copy_rows(const View &x, const View &y, const int64_t *index, bool scatter, int64_t m,
                      int32_t lanes, int32_t *bad) {
  enum { EACH = 4 }; /* loads under way */
  const Cover c = cover(lanes);
  const int64_t vectors = x.cols / W, limit = scatter ? y.rows : x.rows;
  for (int64_t i = c.row; i < m; i += c.row_step) {
    const int64_t at = index ? index[i] : i;
    const bool fine = at >= 0 && at < limit;
    if (!fine) {
      flag_bad_index(bad);
      if (scatter) continue;
    }
    const int64_t from = (scatter ? i : fine ? at : 0) * x.ld, to = (scatter ? at : i) * y.ld;
    for (int64_t v = c.col; v < vectors; v += EACH * c.col_step) {
      Raw<W> r[EACH];
      for (int e = 0; e < EACH; e++)
        if (fine && v + e * c.col_step < vectors)
          r[e] = fetch<W>(x.p, x.dtype, from + (v + e * c.col_step) * W);
      for (int e = 0; e < EACH; e++) {
        const int64_t j = (v + e * c.col_step) * W;
        if (j >= x.cols) continue;
        if (!fine)
          put(y.p, y.dtype, to + j, all<W>(quiet_nan()));
        else if (x.dtype == y.dtype)
          put_raw(y.p, y.dtype, to + j, r[e]);
        else
          put(y.p, y.dtype, to + j, widen(r[e], x.dtype));
      }
    }
  }
}

KERNEL pylora_copy_rows_4(View x, View y, const int64_t *index, int32_t scatter, int64_t m,
                          int32_t lanes, int32_t *bad) {
  copy_rows<4>(x, y, index, scatter != 0, m, lanes, bad);
}
KERNEL pylora_copy_rows_1(View x, View y, const int64_t *index, int32_t scatter, int64_t m,
                          int32_t lanes, int32_t *bad) {
  copy_rows<1>(x, y, index, scatter != 0, m, lanes, bad);
}

/* y = 0 */
template <int W> DEVICE void zero(const View &y, int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < y.rows; i += c.row_step)
    for (int64_t v = c.col; v < y.cols / W; v += c.col_step)
      put(y.p, y.dtype, i * y.ld + v * W, all<W>(0));
}
KERNEL pylora_zero_4(View y, int32_t lanes) { zero<4>(y, lanes); }
KERNEL pylora_zero_1(View y, int32_t lanes) { zero<1>(y, lanes); }

/* dW[ids[i],:] = 0 + the dy rows of that id in the order of i; the rest of dW has been zeroed.
 *
 * One block per i and tile of columns; only the block whose i is the first of its id goes on, and adds up the
 * others in its registers.  So no two blocks write one row, nothing is sorted, and there is no workspace; the price is
 * that every block looks through ids (from the L2 cache: 64 kB for 8192 tokens). */
template <int W>
DEVICE void embedding_backward(const int64_t *ids, const View &dy, const View &dW, int32_t *bad) {
  enum { THREADS = 256, EACH = 2 }; /* columns of a tile: THREADS * EACH * W */
  SHARED(uint32_t, found, THREADS / WARP);
  const int t = (int)threadIdx.x, warp = t / WARP, lane = t % WARP;
  const int64_t vectors = dy.cols / W, first = (int64_t)blockIdx.y * THREADS * EACH + t;
  for (int64_t i = blockIdx.x; i < dy.rows; i += gridDim.x) {
    const int64_t id = ids[i];
    if (id < 0 || id >= dW.rows) {
      flag_bad_index(bad);
      continue;
    }
    Numbers<W> sum[EACH];
    for (int e = 0; e < EACH; e++) sum[e] = all<W>(0);
    bool owner = true;
    for (int64_t base = 0; base < dy.rows && owner; base += THREADS) {
      const uint32_t hits =
          __ballot_sync(ALL_LANES, base + t < dy.rows && ids[base + t] == id ? 1 : 0);
      if (lane == 0) found[warp] = hits;
      __syncthreads();
      for (int w = 0; w < THREADS / WARP && owner; w++)
        for (uint32_t left = found[w]; left && owner; left &= left - 1) {
          int bit = 0; /* the lowest one that is set */
          while (!(left >> bit & 1)) bit++;
          const int64_t row = base + w * WARP + bit;
          owner = row >= i;
          for (int e = 0; e < EACH; e++) {
            const int64_t v = first + e * THREADS;
            if (!owner || v >= vectors) continue;
            const Numbers<W> x = numbers<W>(dy.p, dy.dtype, row * dy.ld + v * W);
            for (int q = 0; q < W; q++) sum[e].v[q] += x.v[q];
          }
        }
      __syncthreads();
    }
    for (int e = 0; e < EACH; e++)
      if (owner && first + e * THREADS < vectors)
        put(dW.p, dW.dtype, id * dW.ld + (first + e * THREADS) * W, sum[e]);
  }
}
KERNEL pylora_embedding_backward_4(const int64_t *ids, View dy, View dW, int32_t *bad) {
  embedding_backward<4>(ids, dy, dW, bad);
}
KERNEL pylora_embedding_backward_1(const int64_t *ids, View dy, View dW, int32_t *bad) {
  embedding_backward<1>(ids, dy, dW, bad);
}

#endif
