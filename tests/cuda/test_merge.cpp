/* Merge, residue and exact unmerge on the device: bit for bit the reference's, and back to the original; in every
 * type, on the ways through float32 and through double, with adapters on which float32 alone would round wrongly. */
#include "check_cuda.h"

/* Numbers of a type in rows with gaps, as merge takes them: no pylora_mat. */
struct Weights {
  int dtype;
  int64_t d, k, ld;
  size_t size;
  std::unique_ptr<char[]> memory;
  char *first;
  Weights(int type, int64_t rows, int64_t cols, bool vectors)
      : dtype(type), d(rows), k(cols), size(type == PYLORA_F32 ? 4 : 2) {
    ld = vectors ? (k + 7) / 8 * 8 + pick({0, 8}) : k + pick({0, 3});
    const size_t bytes = (size_t)(d && k ? (d - 1) * ld + k : 0) * size;
    const size_t shift = vectors ? 0 : size * (size_t)below(3);
    memory.reset(new char[bytes + 32]);
    memset(memory.get(), 0x7f, bytes + 32);
    first = (char *)(((uintptr_t)memory.get() + 15) & ~(uintptr_t)15) + shift;
    if (d && below(3) == 0) first += (d - 1) * ld * (int64_t)size, ld = -ld;
  }
  char *row(int64_t i) const { return first + i * ld * (int64_t)size; }
  uint32_t bits(int64_t i, int64_t j) const {
    uint32_t u = 0;
    memcpy(&u, row(i) + j * (int64_t)size, size);
    return u;
  }
  void set(int64_t i, int64_t j, uint32_t u) { memcpy(row(i) + j * (int64_t)size, &u, size); }
  void set_value(int64_t i, int64_t j, float x) { put_value(dtype, row(i), j, x); }
  void expect_equal(const Weights &other, const char *what) const {
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < k; j++)
        if (bits(i, j) != other.bits(i, j)) {
          EXPECT(false, "%s: [%d,%d] has the bits %x, not %x", what, (int)i, (int)j, bits(i, j),
                 other.bits(i, j));
          return;
        }
  }
  void expect_gaps(void) const {
    const int64_t stride = llabs(ld);
    const char *lowest = ld < 0 ? row(d - 1) : first;
    for (int64_t i = 0; i + 1 < d; i++)
      for (int64_t j = k * (int64_t)size; j < stride * (int64_t)size; j++)
        EXPECT(lowest[i * stride * (int64_t)size + j] == 0x7f, "a gap was written");
  }
};

/* What the bits of W and of the adapter are like. */
enum { ORDINARY, ANY_BITS, TIES, CANCEL, KINDS };

static void fill(Weights &W, Matrix &A, Matrix &B, float s, int kind) {
  for (int64_t i = 0; i < W.d; i++)
    for (int64_t j = 0; j < W.k; j++) {
      W.set_value(i, j, 0.02f * uniform());
      if (kind == ANY_BITS && W.dtype != PYLORA_F32) W.set(i, j, (uint32_t)(bits64() & 0xbfff));
      if (kind == ANY_BITS && W.dtype == PYLORA_F32) W.set(i, j, (uint32_t)bits64() & 0xbfffffffu);
      if (kind == ANY_BITS && below(50) == 0) W.set(i, j, 0);
    }
  if (kind == TIES &&
      A.rows) /* d a power of two, small: W + d is often half way between two, or nearly */
    for (int64_t q = 0; q < A.rows; q++) {
      for (int64_t j = 0; j < A.cols; j++)
        A.put(q, j, q == 0 ? ldexpf(1 / s, -(int)below(20)) : 0x1p-30f * (float)(below(3) - 1));
      for (int64_t i = 0; i < B.rows; i++) B.put(i, q, q == 0 ? 0x1p-8f : 0x1p-20f);
    }
  if (kind == CANCEL) /* W + d near 0, where the bound is large against the result */
    for (int64_t i = 0; i < W.d; i++)
      for (int64_t j = 0; j < W.k; j++) {
        double t = 0;
        for (int64_t q = 0; q < A.rows; q++) t += (double)B.get(i, q) * A.get(q, j);
        W.set_value(i, j, (float)(-s * t));
      }
}

static void merge_case(int dtype, int64_t d, int64_t k, int64_t r, float s, int kind) {
  const bool vectors = below(2) == 0;
  Weights W(dtype, d, k, vectors), out(dtype, d, k, vectors), out0(dtype, d, k, vectors),
      back(dtype, d, k, vectors);
  Matrix A(PYLORA_F32, r, k, 1), B(PYLORA_F32, d, r, (float)pick({1, 100}) * 1e-2f);
  fill(W, A, B, s, kind);
  const pylora_lora lora = {r, A.mat.p, A.ld, B.mat.p, B.ld, s, NULL, NULL};
  context = "type " + std::to_string(dtype) + ", " + std::to_string(d) + " x " + std::to_string(k) +
            ", r " + std::to_string(r) + ", kind " + std::to_string(kind);
  pylora_cuda *g = device_0();
  std::vector<int64_t> lossy((size_t)d, 77), first((size_t)d), position0((size_t)(d * k));
  std::vector<uint32_t> bits0((size_t)(d * k));
  OK(pylora_cuda_merge(g, NULL, dtype, d, k, W.first, W.ld, &lora, out.first, out.ld,
                       lossy.data()));
  const int64_t n = pylora_ref_merge(dtype, d, k, W.first, W.ld, &lora, out0.first, out0.ld,
                                     position0.data(), bits0.data());
  out.expect_equal(out0, "merged");
  out.expect_gaps();
  int64_t total = 0;
  for (int64_t i = 0; i < d; i++) first[(size_t)i] = total, total += lossy[(size_t)i];
  EXPECT(total == n, "residue of %d, not %d", (int)total, (int)n);
  if (total != n) return;
  std::vector<int64_t> position((size_t)n, -1);
  std::vector<uint32_t> bits((size_t)n);
  OK(pylora_cuda_merge_residue(g, NULL, dtype, d, k, W.first, W.ld, out.first, out.ld, &lora,
                               first.data(), position.data(), bits.data()));
  for (int64_t i = 0; i < n; i++)
    EXPECT(position[(size_t)i] == position0[(size_t)i] && bits[(size_t)i] == bits0[(size_t)i],
           "residue element %d", (int)i);
  /* not counted, and in place */
  for (int64_t i = 0; i < d; i++)
    if (k) memcpy(back.row(i), W.row(i), (size_t)k * W.size);
  OK(pylora_cuda_merge(g, NULL, dtype, d, k, back.first, back.ld, &lora, back.first, back.ld,
                       NULL));
  back.expect_equal(out0, "merged in place");
  OK(pylora_cuda_unmerge(g, NULL, dtype, d, k, back.first, back.ld, &lora, n, position.data(),
                         bits.data(), back.first, back.ld));
  back.expect_equal(W, "unmerged");
  back.expect_gaps();
  /* without the residue it is the reference's too */
  OK(pylora_cuda_unmerge(g, NULL, dtype, d, k, out.first, out.ld, &lora, 0, NULL, NULL, out.first,
                         out.ld));
  pylora_ref_unmerge(dtype, d, k, out0.first, out0.ld, &lora, 0, NULL, NULL, out0.first, out0.ld);
  out.expect_equal(out0, "unmerged without the residue");
  expect_bad_index(false);
}

static void merges(void) {
  for (int c = 0; c < 6; c++)
    for (int dtype = 0; dtype < 3; dtype++)
      for (int kind = 0; kind < KINDS; kind++)
        merge_case(dtype, pick({0, 1, 7, 70}), pick({1, 8, 33, 64, 264, 300}),
                   pick({0, 1, 4, 9, 16}), (float)pick({7, 20, -5}) * 0.1f, kind);
  for (int dtype = 0; dtype < 3; dtype++) /* more ranks than shared memory takes at once */
    for (int64_t r : {63, 64, 65, 150}) merge_case(dtype, 9, 264, r, 0.7f, ORDINARY);
  for (int dtype = 0; dtype < 3;
       dtype++) { /* scales with no way through float32, or with nothing to do */
    merge_case(dtype, 5, 40, 3, 0x1p21f, ORDINARY);
    merge_case(dtype, 5, 40, 3, 0, ORDINARY);
  }
  merge_case(PYLORA_BF16, 300, 520, 8, 0.5f, ORDINARY); /* several blocks in each direction */
  merge_case(PYLORA_F32, 300, 260, 8, 0.5f, ORDINARY);
}

/* NaN, infinities, the largest numbers, zeros of both signs, subnormals: as the CPU core has them. */
static void special(void) {
  const uint32_t words[3][12] = {
      {0x7fc00001, 0xff800000, 0x7f800000, 0x7f7fffff, 0xff7fffff, 0, 0x80000000, 1, 0x80000001,
       0x7f800001, 0x00800000, 0x3f800000},
      {0x7fc1, 0xff80, 0x7f80, 0x7f7f, 0xff7f, 0, 0x8000, 1, 0x8001, 0x7f81, 0x0080, 0x3f80},
      {0x7e01, 0xfc00, 0x7c00, 0x7bff, 0xfbff, 0, 0x8000, 1, 0x8001, 0x7c01, 0x0400, 0x3c00}};
  const int types[3] = {PYLORA_F32, PYLORA_BF16, PYLORA_F16};
  const float sizes[] = {0, 1e-44f, 1e-30f, 1e-3f, 20, 1e36f, 3e38f};
  for (int t = 0; t < 3; t++)
    for (float size : sizes) {
      const int64_t d = 12, k = 24, r = 2;
      Weights W(types[t], d, k, true), out(types[t], d, k, true), out0(types[t], d, k, true);
      Matrix A(PYLORA_F32, r, k, 1), B(PYLORA_F32, d, r, 1);
      for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < k; j++) W.set(i, j, words[t][i]);
        for (int64_t q = 0; q < r; q++) B.put(i, q, size * B.get(i, q));
      }
      const pylora_lora lora = {r, A.mat.p, A.ld, B.mat.p, B.ld, 1.5f, NULL, NULL};
      std::vector<int64_t> lossy((size_t)d), lossy0((size_t)d);
      context = "special, type " + std::to_string(types[t]) + ", size " + std::to_string(size);
      OK(pylora_cuda_merge(device_0(), NULL, types[t], d, k, W.first, W.ld, &lora, out.first,
                           out.ld, lossy.data()));
      OK(pylora_merge(types[t], d, k, W.first, W.ld, &lora, out0.first, out0.ld, lossy0.data()));
      out.expect_equal(out0, "merged");
      for (int64_t i = 0; i < d; i++)
        EXPECT(lossy[(size_t)i] == lossy0[(size_t)i], "row %d: %d, not %d", (int)i,
               (int)lossy[(size_t)i], (int)lossy0[(size_t)i]);
    }
}

static void errors(void) {
  context = "errors";
  pylora_cuda *g = device_0();
  Weights W(PYLORA_BF16, 4, 8, true);
  Matrix A(PYLORA_F32, 2, 8, 1), B(PYLORA_F32, 4, 2, 1);
  const pylora_lora lora = {2, A.mat.p, A.ld, B.mat.p, B.ld, 1, NULL, NULL};
  pylora_lora bad = lora;
  for (int64_t i = 0; i < 4; i++)
    for (int64_t j = 0; j < 8; j++) W.set_value(i, j, 1);
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_merge(NULL, NULL, PYLORA_BF16, 4, 8, W.first, W.ld,
                                                 &lora, W.first, W.ld, NULL));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_merge(g, NULL, PYLORA_BF16, 4, 8, NULL, W.ld, &lora,
                                                 W.first, W.ld, NULL));
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_cuda_merge(g, NULL, PYLORA_Q8_0, 4, 8, W.first, W.ld,
                                                        &lora, W.first, W.ld, NULL));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_merge(g, NULL, PYLORA_BF16, 4, 8, W.first, W.ld, &lora,
                                                  W.first, 7, NULL));
  bad.r = -1;
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_cuda_merge(g, NULL, PYLORA_BF16, 4, 8, W.first, W.ld, &bad,
                                                  W.first, W.ld, NULL));
  bad = lora, bad.B = NULL;
  EXPECT_STATUS(PYLORA_E_NULL, pylora_cuda_merge(g, NULL, PYLORA_BF16, 4, 8, W.first, W.ld, &bad,
                                                 W.first, W.ld, NULL));
  const std::vector<int64_t> position = {3, -1, 32};
  const std::vector<uint32_t> bits = {1, 2, 3};
  EXPECT_STATUS(PYLORA_E_SHAPE,
                pylora_cuda_unmerge(g, NULL, PYLORA_BF16, 4, 8, W.first, W.ld, &lora, -1,
                                    position.data(), bits.data(), W.first, W.ld));
  OK(pylora_cuda_unmerge(g, NULL, PYLORA_BF16, 4, 8, W.first, W.ld, &lora, 3, position.data(),
                         bits.data(), W.first, W.ld));
  expect_bad_index(true);
  expect_bad_index(false);
  EXPECT(W.bits(0, 3) == 1);
}

int main(void) {
  merges();
  special();
  errors();
  return finish("test_merge");
}
