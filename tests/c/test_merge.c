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

int main(void) {
  each_setup(merge);
  each_setup(nan_stays);
  return finish("test_merge");
}
