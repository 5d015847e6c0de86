/* Merge and exact unmerge, in every dtype: bit for bit the reference's, and back to the original. */
#include "check.h"

static void merge(void) {
  for (int c = 0; c < 12; c++)
    for (int dtype = 0; dtype < 3; dtype++) {
      const int64_t d = PICK(0, 1, 7, 70), k = PICK(1, 5, 33, 300), r = PICK(0, 1, 9, 40);
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

int main(void) {
  each_setup(merge);
  return finish("test_merge");
}
