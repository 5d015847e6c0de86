/* Merge and exact unmerge, in every dtype: bit for bit the reference's, and back to the original. */
#include "check.h"

static void merge(void) {
  for (int c = 0; c < 12; c++)
    for (int dtype = 0; dtype < 3; dtype++) {
      const int64_t d = PICK(0, 1, 7, 70), k = PICK(1, 5, 33, 300), r = PICK(0, 9, 32, 65);
      const int64_t ldw = k + PICK(0, 3), ldo = k + PICK(0, 2);
      const size_t size = dtype == PYLORA_F32 ? 4 : 2;
      const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, PICK(0, 1) ? 1 : 1e-4f);
      const pylora_lora lora = {r, A.p, A.ld, B.p, B.ld, 0.7f, NULL, NULL};
      char *W = bytes_of((size_t)(d * ldw) * size), *out = bytes_of((size_t)(d * ldo) * size);
      char *out0 = bytes_of((size_t)(d * ldo) * size);
      memset(out, 0, (size_t)(d * ldo) * size), memset(out0, 0, (size_t)(d * ldo) * size);
      for (int64_t i = 0; i < d * ldw;
           i++) { /* weights of size 0.02; bit patterns in the narrow dtypes */
        const float w = 0.02f * uniform();
        const uint16_t narrow = (uint16_t)(bits64() & 0xbfff); /* any finite number below 2 */
        memcpy(W + (size_t)i * size, size == 4 ? (const void *)&w : (const void *)&narrow, size);
      }
      int64_t *lossy = ids_below(d, 1), *position0 = ids_below(d * k, 1), total = 0;
      uint32_t *bits0 = bytes_of((size_t)(d * k) * 4);
      OK(pylora_merge(dtype, d, k, W, ldw, &lora, out, ldo, lossy));
      const int64_t n = pylora_ref_merge(dtype, d, k, W, ldw, &lora, out0, ldo, position0, bits0);
      EXPECT(memcmp(out, out0, (size_t)(d * ldo) * size) == 0, "merged bits differ, dtype %d",
             dtype);
      char *own = bytes_of((size_t)(d * ldw) * size); /* in place, and nothing is counted */
      memcpy(own, W, (size_t)(d * ldw) * size);
      OK(pylora_merge(dtype, d, k, own, ldw, &lora, own, ldw, NULL));
      for (int64_t i = 0; i < d; i++)
        EXPECT(memcmp(own + (size_t)(i * ldw) * size, out0 + (size_t)(i * ldo) * size,
                      (size_t)k * size) == 0,
               "row %d in place, dtype %d", (int)i, dtype);
      for (int64_t i = 0; i < d; i++) total += lossy[i];
      EXPECT(total == n, "residue of %d, not %d, dtype %d", (int)total, (int)n, dtype);
      int64_t *position = ids_below(total, 1);
      uint32_t *bits = bytes_of((size_t)total * 4);
      OK(pylora_merge_residue(dtype, d, k, W, ldw, out, ldo, &lora, lossy, position, bits));
      EXPECT(total != n || (memcmp(position, position0, (size_t)n * 8) == 0 &&
                            memcmp(bits, bits0, (size_t)n * 4) == 0));
      OK(pylora_unmerge(dtype, d, k, out, ldo, &lora, total, position, bits, out,
                        ldo)); /* in place */
      for (int64_t i = 0; i < d; i++)
        EXPECT(memcmp(out + (size_t)(i * ldo) * size, W + (size_t)(i * ldw) * size,
                      (size_t)k * size) == 0,
               "row %d did not come back, dtype %d", (int)i, dtype);
      pylora_ref_unmerge(dtype, d, k, out0, ldo, &lora, n, position0, bits0, out0, ldo);
      EXPECT(memcmp(out, out0, (size_t)(d * ldo) * size) == 0);
      release();
    }
}

/* Where two NaN meet the weight's stays, with its payload where the kernels keep one, in every table. */
static void nan_stays(void) {
  const uint32_t before[] = {0x7fc01234u, 0x7fd3, 0x7e13}, after[] = {0x7fc01234u, 0x7fd3, 0x7e00};
  for (int dtype = 0; dtype < 3; dtype++)
    for (int count = 0; count < 2; count++) {
      float A[20], B[9];
      for (int i = 0; i < 20; i++) A[i] = NAN;
      for (int i = 0; i < 9; i++) B[i] = 1;
      const pylora_lora lora = {1, A, 20, B, 1, 1.0f, NULL, NULL};
      uint32_t W[9 * 20], want[9 * 20];
      int64_t lossy[9];
      for (int i = 0; i < 9 * 20; i++) {
        const uint16_t narrow = (uint16_t)before[dtype], kept = (uint16_t)after[dtype];
        W[i] = before[dtype], want[i] = after[dtype];
        if (dtype) memcpy((char *)W + 2 * i, &narrow, 2), memcpy((char *)want + 2 * i, &kept, 2);
      }
      OK(pylora_merge(dtype, 9, 20, W, 20, &lora, W, 20, count ? lossy : NULL));
      EXPECT(memcmp(W, want, 9 * 20 * (dtype ? 2 : 4)) == 0, "dtype %d", dtype);
      for (int i = 0; i < 9 && count; i++) EXPECT(lossy[i] == (dtype == PYLORA_F16 ? 20 : 0));
    }
}

/* What kernels that decide in float32 must leave to double, in bfloat16. */
enum { USUAL, TIES, CANCELLING, ANY_WEIGHT, ANY_ADAPTER, ZEROS, TINY, ENORMOUS, KINDS };

static float any_float(void) {
  const uint32_t u = (uint32_t)bits64();
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

static float adapter_element(int kind) {
  const float x = uniform();
  switch (kind) {
  case USUAL:
    return 0.1f * x;
  case ANY_ADAPTER:
    return below(500) ? x : any_float();
  case ZEROS:
    return (float)PICK(0, 0, 1) * (below(2) ? 1.0f : -1.0f);
  case TINY:
    return ldexpf(x, (int)-PICK(0, 40, 50, 60, 70, 130));
  case ENORMOUS:
    return ldexpf(x, (int)PICK(0, 30, 60, 64, 100, 127));
  default:
    return x;
  }
}

/* Columns whose sum over the ranks (B is 1) is at, or a little off, an odd multiple of half a last place of
 * the weights in [1, 2); terms that cancel each other cost a sum in float32 its last bits. */
static void near_ties(const pylora_mat *A, const pylora_mat *B) {
  for (int64_t i = 0; i < B->rows; i++)
    for (int64_t p = 0; p < B->cols; p++) *el(B, i, p) = 1;
  for (int64_t j = 0; j < A->cols; j++) {
    const float large = (float)PICK(0, 1, 1, 1024);
    for (int64_t p = 0; p < A->rows; p++) {
      const float x = p == 0            ? ldexpf((float)(2 * below(8) + 1), -8)
                      : p == 1          ? (float)PICK(-1, 0, 1) * 0x1p-48f
                      : p % 2           ? -*el(A, p - 1, j)
                      : p + 1 < A->rows ? large * uniform()
                                        : 0;
      *el(A, p, j) = p == 0 && below(3) == 0 ? nextafterf(x, (float)PICK(-1, 1)) : x;
    }
  }
}

static uint16_t weight(int kind, double t) {
  const uint16_t any = (uint16_t)bits64();
  switch (kind) {
  case USUAL:
    return bf16(0.02f * uniform());
  case TIES:
    return (any & 0x807f) | 0x3f80;
  case CANCELLING:
    return bf16((float)-t);
  case ZEROS:
    return (uint16_t)PICK(0, 0x8000, 0x8000, 1, 0x8001, 0x3f80);
  case TINY:
    return any & 0x8fff; /* below 2^-95, most of them normal */
  case ENORMOUS:
    return any | 0x7e00;
  default:
    return any;
  }
}

/* The reference's bits; a weight that is NaN stays, and another NaN is as good as the reference's. */
static void expect_merged(const char *what, int64_t d, int64_t k, const uint16_t *W, int64_t ldw,
                          const uint16_t *got, const uint16_t *want, int64_t ldo) {
  for (int64_t i = 0; i < d; i++)
    for (int64_t j = 0; j < ldo; j++) {
      const uint16_t w = j < k ? W[i * ldw + j] : 0, x = got[i * ldo + j], y = want[i * ldo + j];
      const int same = isnan(from_bf16(w))   ? x == (w | 0x40)
                       : isnan(from_bf16(y)) ? isnan(from_bf16(x))
                                             : x == y;
      EXPECT(same, "%s [%d,%d]: %04x became %04x, not %04x", what, (int)i, (int)j, w, x, y);
    }
}

static void doubtful(int kind) {
  const int64_t d = PICK(1, 8, 19, 70), k = PICK(1, 31, 32, 33, 160, 300);
  const int64_t r = PICK(0, 0, 1, 2, 8, 31, 32, 33, 64, 65);
  const pylora_mat A = matrix(r, k, 1), B = matrix(d, r, 1);
  for (int64_t p = 0; p < r; p++) {
    for (int64_t j = 0; j < k; j++) *el(&A, p, j) = adapter_element(kind);
    for (int64_t i = 0; i < d; i++) *el(&B, i, p) = adapter_element(kind);
  }
  if (kind == TIES) near_ties(&A, &B);
  const float scales[] = {1, -1, 2, -0.7f, 0, -0.0f, 1e-30f, 1e30f, INFINITY, NAN};
  const float s = scales[below(kind == TIES ? 2 : r && below(3) ? 4 : 10)];
  const pylora_lora lora = {r, A.p, A.ld, B.p, B.ld, s, NULL, NULL};
  const int64_t ldw = k + PICK(0, 3), ldo = k + PICK(0, 2);
  const size_t bytes = (size_t)(d * ldw) * 2, out_bytes = (size_t)(d * ldo) * 2;
  uint16_t *W = bytes_of(bytes), *own = bytes_of(bytes), *own0 = bytes_of(bytes);
  uint16_t *out = bytes_of(out_bytes), *out0 = bytes_of(out_bytes);
  int64_t *position = ids_below(d * k, 1);
  uint32_t *bits = bytes_of((size_t)(d * k) * 4);
  for (int64_t i = 0; i < d; i++)
    for (int64_t j = 0; j < ldw; j++) {
      double t = 0;
      for (int64_t p = 0; p < r && j < k; p++) t += (double)*el(&B, i, p) * (double)*el(&A, p, j);
      W[i * ldw + j] = weight(kind, t * (double)s);
    }
  for (int back = 0; back < 2; back++) {
    memcpy(own, W, bytes), memcpy(own0, W, bytes);
    memset(out, 0, out_bytes), memset(out0, 0, out_bytes);
    if (back) {
      OK(pylora_unmerge(PYLORA_BF16, d, k, W, ldw, &lora, 0, NULL, NULL, out, ldo));
      OK(pylora_unmerge(PYLORA_BF16, d, k, own, ldw, &lora, 0, NULL, NULL, own, ldw));
      pylora_ref_unmerge(PYLORA_BF16, d, k, W, ldw, &lora, 0, NULL, NULL, out0, ldo);
      pylora_ref_unmerge(PYLORA_BF16, d, k, W, ldw, &lora, 0, NULL, NULL, own0, ldw);
    } else {
      OK(pylora_merge(PYLORA_BF16, d, k, W, ldw, &lora, out, ldo, NULL));
      OK(pylora_merge(PYLORA_BF16, d, k, own, ldw, &lora, own, ldw, NULL));
      pylora_ref_merge(PYLORA_BF16, d, k, W, ldw, &lora, out0, ldo, position, bits);
      pylora_ref_merge(PYLORA_BF16, d, k, W, ldw, &lora, own0, ldw, position, bits);
    }
    char what[80];
    snprintf(what, sizeof what, "kind %d, r %d, s %g%s", kind, (int)r, (double)s,
             back ? ", back" : "");
    expect_merged(what, d, k, W, ldw, out, out0, ldo);
    expect_merged(what, d, k, W, ldw, own, own0, ldw);
  }
}

static void all_kinds(void) {
  for (int i = 0; i < 20; i++)
    for (int kind = 0; kind < KINDS; kind++) {
      doubtful(kind);
      release();
    }
}

int main(void) {
  each_setup(merge);
  each_setup(nan_stays);
  each_setup(all_kinds);
  return finish("test_merge");
}
