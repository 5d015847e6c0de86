/* pointwise.cuh - kernels whose threads have a few elements each and nothing to say to each other: the rotary
 * embedding, and SwiGLU with its gradients. */
#ifndef PYLORA_POINTWISE_CUH
#define PYLORA_POINTWISE_CUH

#include "sigmoid.cuh"
#include "vector.cuh"

enum { ROPE_HALF = 0, ROPE_INTERLEAVED = 1 }; /* pylora_rope_layout */

/* ---- rotary embedding ---- */

/* u / n, without the 64-bit division where that is not needed (always, but for rows of 2^32 elements). */
DEVICE int64_t divided(int64_t u, uint32_t n) {
  return u >> 32 ? u / n : (int64_t)((uint32_t)u / n);
}

/* W pairs (a, b) by the angles of columns j .. j+W-1 of row `at` of the tables. */
template <int W>
DEVICE void rotate(Numbers<W> &a, Numbers<W> &b, const View &cosines, const View &sines, int64_t at,
                   int64_t j, float sign) {
  const Numbers<W> c = numbers<W>(cosines.p, cosines.dtype, at * cosines.ld + j),
                   s = numbers<W>(sines.p, sines.dtype, at * sines.ld + j);
  for (int q = 0; q < W; q++) {
    const float x = a.v[q], y = b.v[q], sine = sign * s.v[q];
    a.v[q] = x * c.v[q] - y * sine;
    b.v[q] = y * c.v[q] + x * sine;
  }
}

/* Pairs (j, j + D/2) of each head: a thread has W neighbours of each half. */
template <int W>
DEVICE void rope_half(const View &x, const View &cosines, const View &sines,
                      const int64_t *position, int32_t half, float sign, const View &y,
                      int32_t lanes, int32_t *bad) {
  const Cover c = cover(lanes);
  const int64_t units = x.cols / 2 / W;
  const uint32_t per_head = (uint32_t)(half / W);
  for (int64_t i = c.row; i < x.rows; i += c.row_step) {
    const int64_t at = position[i];
    const bool fine = at >= 0 && at < cosines.rows;
    if (!fine) flag_bad_index(bad);
    for (int64_t u = c.col; u < units; u += c.col_step) {
      const int64_t head = divided(u, per_head), j = (u - head * per_head) * W,
                    first = head * 2 * half + j, second = first + half;
      Numbers<W> a = all<W>(quiet_nan()), b = a;
      if (fine) {
        const Raw<W> p = fetch<W>(x.p, x.dtype, i * x.ld + first),
                     q = fetch<W>(x.p, x.dtype, i * x.ld + second);
        a = widen(p, x.dtype), b = widen(q, x.dtype);
        rotate(a, b, cosines, sines, at, j, sign);
      }
      put(y.p, y.dtype, i * y.ld + first, a);
      put(y.p, y.dtype, i * y.ld + second, b);
    }
  }
}

/* Pairs (2j, 2j + 1) of each head: a thread has W / 2 pairs, or one that it takes apart (W = 1). */
DEVICE void rotate_neighbours(const View &x, const View &cosines, const View &sines, int64_t i,
                              int64_t at, int64_t column, int64_t j, float sign, const View &y,
                              bool fine, bool four) {
  Numbers<1> a[2], b[2];
  const int pairs = four ? 2 : 1;
  if (four && fine) {
    const Numbers<4> v = numbers<4>(x.p, x.dtype, i * x.ld + column);
    a[0].v[0] = v.v[0], b[0].v[0] = v.v[1], a[1].v[0] = v.v[2], b[1].v[0] = v.v[3];
  } else if (fine) {
    a[0] = numbers<1>(x.p, x.dtype, i * x.ld + column);
    b[0] = numbers<1>(x.p, x.dtype, i * x.ld + column + 1);
  }
  for (int p = 0; p < 2; p++) {
    if (p >= pairs) break;
    if (fine)
      rotate(a[p], b[p], cosines, sines, at, j + p, sign);
    else
      a[p].v[0] = b[p].v[0] = quiet_nan();
  }
  if (four) {
    const Numbers<4> v = {{a[0].v[0], b[0].v[0], a[1].v[0], b[1].v[0]}};
    put(y.p, y.dtype, i * y.ld + column, v);
  } else {
    put(y.p, y.dtype, i * y.ld + column, a[0]);
    put(y.p, y.dtype, i * y.ld + column + 1, b[0]);
  }
}
DEVICE void rope_interleaved(const View &x, const View &cosines, const View &sines,
                             const int64_t *position, int32_t half, float sign, const View &y,
                             int32_t lanes, bool four, int32_t *bad) {
  const Cover c = cover(lanes);
  const int32_t width = four ? 4 : 2;
  const int64_t units = x.cols / width;
  const uint32_t per_head = (uint32_t)(2 * half / width);
  for (int64_t i = c.row; i < x.rows; i += c.row_step) {
    const int64_t at = position[i];
    const bool fine = at >= 0 && at < cosines.rows;
    if (!fine) flag_bad_index(bad);
    for (int64_t u = c.col; u < units; u += c.col_step)
      rotate_neighbours(x, cosines, sines, i, at, u * width,
                        (u - divided(u, per_head) * per_head) * (width / 2), sign, y, fine, four);
  }
}

KERNEL pylora_rope_half_4(View x, View cosines, View sines, const int64_t *position, int32_t half,
                          float sign, View y, int32_t lanes, int32_t *bad) {
  rope_half<4>(x, cosines, sines, position, half, sign, y, lanes, bad);
}
KERNEL pylora_rope_half_1(View x, View cosines, View sines, const int64_t *position, int32_t half,
                          float sign, View y, int32_t lanes, int32_t *bad) {
  rope_half<1>(x, cosines, sines, position, half, sign, y, lanes, bad);
}
KERNEL pylora_rope_interleaved_4(View x, View cosines, View sines, const int64_t *position,
                                 int32_t half, float sign, View y, int32_t lanes, int32_t *bad) {
  rope_interleaved(x, cosines, sines, position, half, sign, y, lanes, true, bad);
}
KERNEL pylora_rope_interleaved_1(View x, View cosines, View sines, const int64_t *position,
                                 int32_t half, float sign, View y, int32_t lanes, int32_t *bad) {
  rope_interleaved(x, cosines, sines, position, half, sign, y, lanes, false, bad);
}

/* ---- a part of each head rotated ---- */

/* The first 2 * half numbers of each head, in pairs (j, j + half) or (2j, 2j + 1); the others stay.  A thread has a
 * pair, or one of the others. */
KERNEL pylora_rope_part(View x, View cosines, View sines, const int64_t *position, int32_t head_dim,
                        int32_t half, int32_t layout, float sign, View y, int32_t lanes,
                        int32_t *bad) {
  const Cover c = cover(lanes);
  const uint32_t each = (uint32_t)(head_dim - half); /* threads of a head */
  const int64_t units = x.cols / head_dim * each;
  for (int64_t i = c.row; i < x.rows; i += c.row_step) {
    const int64_t at = position[i];
    const bool fine = at >= 0 && at < cosines.rows;
    if (!fine) flag_bad_index(bad);
    for (int64_t u = c.col; u < units; u += c.col_step) {
      const int64_t head = divided(u, each), j = u - head * each, base = head * head_dim;
      Numbers<1> a = all<1>(quiet_nan()), b = a;
      if (j >= half) {
        if (fine) a = numbers<1>(x.p, x.dtype, i * x.ld + base + j + half);
        put(y.p, y.dtype, i * y.ld + base + j + half, a);
        continue;
      }
      const int64_t first = base + (layout == ROPE_HALF ? j : 2 * j),
                    second = layout == ROPE_HALF ? first + half : first + 1;
      if (fine) {
        a = numbers<1>(x.p, x.dtype, i * x.ld + first);
        b = numbers<1>(x.p, x.dtype, i * x.ld + second);
        rotate(a, b, cosines, sines, at, j, sign);
      }
      put(y.p, y.dtype, i * y.ld + first, a);
      put(y.p, y.dtype, i * y.ld + second, b);
    }
  }
}

/* ---- SwiGLU ---- */

template <int W>
DEVICE void swiglu_forward(const View &gate, const View &up, const View &y, int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < gate.rows; i += c.row_step)
    for (int64_t j = c.col * W; j < gate.cols; j += c.col_step * W) {
      const Raw<W> g_bits = fetch<W>(gate.p, gate.dtype, i * gate.ld + j),
                   u_bits = fetch<W>(up.p, up.dtype, i * up.ld + j);
      const Numbers<W> g = widen(g_bits, gate.dtype), u = widen(u_bits, up.dtype);
      Numbers<W> r;
      for (int q = 0; q < W; q++) {
        float s, t;
        sigmoid(g.v[q], &s, &t);
        r.v[q] = g.v[q] * s * u.v[q];
      }
      put(y.p, y.dtype, i * y.ld + j, r);
    }
}
KERNEL pylora_swiglu_forward_4(View gate, View up, View y, int32_t lanes) {
  swiglu_forward<4>(gate, up, y, lanes);
}
KERNEL pylora_swiglu_forward_1(View gate, View up, View y, int32_t lanes) {
  swiglu_forward<1>(gate, up, y, lanes);
}

/* dgate = dy up σ (1 + gate (1 - σ));  dup = dy gate σ */
template <int W>
DEVICE void swiglu_backward(const View &dy, const View &gate, const View &up, const View &dgate,
                            const View &dup, int32_t lanes) {
  const Cover c = cover(lanes);
  for (int64_t i = c.row; i < gate.rows; i += c.row_step)
    for (int64_t j = c.col * W; j < gate.cols; j += c.col_step * W) {
      const Raw<W> d_bits = fetch<W>(dy.p, dy.dtype, i * dy.ld + j),
                   g_bits = fetch<W>(gate.p, gate.dtype, i * gate.ld + j),
                   u_bits = fetch<W>(up.p, up.dtype, i * up.ld + j);
      const Numbers<W> d = widen(d_bits, dy.dtype), g = widen(g_bits, gate.dtype),
                       u = widen(u_bits, up.dtype);
      Numbers<W> dg, du;
      for (int q = 0; q < W; q++) {
        float s, t;
        sigmoid(g.v[q], &s, &t);
        dg.v[q] = d.v[q] * u.v[q] * (s * (g.v[q] * t + 1.0f));
        du.v[q] = d.v[q] * g.v[q] * s;
      }
      put(dgate.p, dgate.dtype, i * dgate.ld + j, dg);
      put(dup.p, dup.dtype, i * dup.ld + j, du);
    }
}
KERNEL pylora_swiglu_backward_4(View dy, View gate, View up, View dgate, View dup, int32_t lanes) {
  swiglu_backward<4>(dy, gate, up, dgate, dup, lanes);
}
KERNEL pylora_swiglu_backward_1(View dy, View gate, View up, View dgate, View dup, int32_t lanes) {
  swiglu_backward<1>(dy, gate, up, dgate, dup, lanes);
}

#endif
