/* LoRA linear over the blocks of ggml's K-quants and their kin, as a file has them: products, gradients and rows of
 * every type on every table, against the weight's unpacked values (which test_files.c compares with the decoders). */
#include "check.h"
#include "formats/format_k.h"

/* Rows of random blocks, each allocated to the byte; float16 scales and minimums are ordinary numbers of either sign.
 * codes = 0: with codes of zero, whose values are minimums alone. */
static uint8_t *random_rows(int dtype, int64_t d, int64_t k) {
  const int64_t blocks = d * k / (32 * k_groups(dtype)), size = k_block_bytes(dtype);
  uint8_t *rows = bytes_of((size_t)(blocks * size));
  const int at = dtype == PYLORA_Q2_K   ? 80
                 : dtype == PYLORA_Q3_K ? 108
                 : dtype == PYLORA_Q6_K ? 208
                                        : 0;
  for (int64_t b = 0; b < blocks; b++) {
    uint8_t *block = rows + b * size;
    for (int64_t i = 0; i < size; i++) block[i] = (uint8_t)bits64();
    if (dtype == PYLORA_MXFP4) {
      block[0] = (uint8_t)(110 + below(30));
      continue;
    }
    for (int n = 0; n < (k_has_minimum(dtype) ? 2 : 1); n++)
      block[at + 2 * n + 1] = (uint8_t)((bits64() & 0x80) | (0x18 + below(0x18)));
  }
  return rows;
}

static void clear_codes(int dtype, uint8_t *rows, int64_t blocks) {
  const int first = dtype == PYLORA_Q5_1 ? 4 : 16,
            last = dtype == PYLORA_Q2_K ? 80 : k_block_bytes(dtype);
  for (int64_t b = 0; b < blocks; b++)
    memset(rows + b * k_block_bytes(dtype) + first, 0, (size_t)(last - first));
}

static pylora_mat unpacked(int dtype, int a8, const uint8_t *rows, int64_t d, int64_t k,
                           pylora_packed *P) {
  const int64_t width = k / (32 * k_groups(dtype)) * k_block_bytes(dtype);
  OK(pylora_pack_blocks(dtype + a8, d, k, rows, width,
                        bytes_of(pylora_pack_bytes(dtype + a8, d, k)), P));
  const pylora_mat W = matrix(d, k, 0);
  OK(pylora_unpack(P, &W));
  return W;
}

/* Numbers that x's bits hold: multiples of a power of two for each group of 32. */
static pylora_mat whole_rows(int64_t m, int64_t k, int64_t most) {
  const pylora_mat x = matrix(m, k, 0);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < k; j += 32) {
      const float unit = ldexpf(1, (int)below(20) - 24);
      for (int64_t t = 0; t < 32; t++)
        *el(&x, i, j + t) = unit * (float)(t ? below(2 * most + 1) - most : PICK(most, -most));
    }
  return x;
}

static void one_case(int dtype, int a8, int64_t m) {
  const int64_t unit = 32 * k_groups(dtype),
                k = unit * (unit == 32 ? PICK(1, 3, 9, 40) : PICK(1, 2, 5)),
                d = PICK(1, 31, 32, 70);
  char setup[sizeof context];
  strcpy(setup, context);
  snprintf(context + strlen(context), 64, " dtype %d+%d m%d k%d d%d", dtype, a8, (int)m, (int)k,
           (int)d);
  uint8_t *rows = random_rows(dtype, d, k);
  pylora_packed P, empty;
  const pylora_mat W = unpacked(dtype, a8, rows, d, k, &P);
  if (k_has_minimum(dtype)) clear_codes(dtype, rows, d * k / unit);
  const pylora_mat least = unpacked(dtype, a8, rows, d, k, &empty);
  const pylora_mat x = whole_rows(m, k, a8 ? 127 : 32639), dy = matrix(m, d, 1), ax = abs_of(&x),
                   ady = abs_of(&dy), aW = abs_of(&W), size = abs_of(&W);
  if (k_has_minimum(dtype)) /* a value's parts may be larger than it */
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < k; j++) *el(&size, i, j) += 2 * fabsf(*el(&least, i, j));
  const pylora_mat y = matrix(m, d, 0), y0 = matrix(m, d, 0), ymag = matrix(m, d, 0);
  const size_t bytes = pylora_lora_workspace(m, d, k, 0);
  void *ws = bytes_of(bytes);
  pylora_ref_lora_forward(&x, &W, NULL, NULL, NULL, &y0, NULL);
  pylora_ref_lora_forward(&ax, &size, NULL, NULL, NULL, &ymag, NULL);
  OK(pylora_lora_forward(&x, &P, NULL, NULL, NULL, &y, NULL, ws, bytes));
  expect_near("y", &y, &y0, &ymag, 2 * 32 + (double)k / 1024 + 12);
  for (int64_t i = 0; i < m; i++) {
    pylora_mat xi = row_of(&x, i), yi = row_of(&y, i);
    const pylora_mat one = matrix(1, d, 0);
    OK(pylora_lora_forward(&xi, &P, NULL, NULL, NULL, &one, NULL, ws, bytes));
    expect_same("a row of y alone", &one, &yi);
  }
  const pylora_mat dx = matrix(m, k, 0), dx0 = matrix(m, k, 0), dxmag = matrix(m, k, 0);
  pylora_ref_lora_backward(&dy, NULL, NULL, &W, NULL, &dx0, 0, NULL, NULL);
  pylora_ref_lora_backward(&ady, NULL, NULL, &aW, NULL, &dxmag, 0, NULL, NULL);
  OK(pylora_lora_backward(&dy, NULL, NULL, &P, NULL, &dx, 0, NULL, NULL, ws, bytes));
  expect_near("dx", &dx, &dx0, &dxmag, 2 * (double)d + 4);
  const int64_t ids[2] = {d - 1, 0};
  const pylora_mat some = matrix(2, k, 0), got = row_of(&some, 0), last = row_of(&W, d - 1);
  OK(pylora_embedding_forward(ids, 2, &P, &some));
  expect_same("an embedding's row", &got, &last);
  strcpy(context, setup);
  release();
}

static void cases(void) {
  for (int dtype = PYLORA_Q5_0; dtype <= PYLORA_MXFP4; dtype++) {
    const int64_t rows[] = {0, 1, 2, 3, 4, 7, 8, 16, 23, 70, 5, 17};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
      one_case(dtype, i % 2 ? PYLORA_A8 : 0, rows[i]);
    one_case(dtype, 0, 1);
    one_case(dtype, 0, 70);
  }
}

/* Tables with fused multiply-adds give the same bits. */
static void tables_agree(int a8) {
  for (int dtype = PYLORA_Q5_0; dtype <= PYLORA_MXFP4; dtype++) {
    enum { M = 21, D = 40, K = 1280 };
    pylora_packed P;
    const uint8_t *rows = random_rows(dtype, D, K);
    const pylora_mat W = unpacked(dtype, a8, rows, D, K, &P), x = matrix(M, K, 1),
                     first = matrix(M, D, 0);
    (void)W;
    const size_t bytes = pylora_lora_workspace(M, D, K, 0);
    void *ws = bytes_of(bytes);
    const char *name;
    int some = 0;
    for (int t = 0; (name = pylora_isa_name(t)); t++) {
      if (strcmp(name, "portable") == 0) continue;
      snprintf(context, sizeof context, "%s, dtype %d", name, dtype);
      OK(pylora_use_isa(name));
      const pylora_mat y = matrix(M, D, 0);
      OK(pylora_lora_forward(&x, &P, NULL, NULL, NULL, &y, NULL, ws, bytes));
      if (some++)
        expect_same("y of another table", &y, &first);
      else
        copy(&y, &first);
    }
    release();
  }
}

/* Blocks alone are packed, and whole ones. */
static void refused(void) {
  const pylora_mat W = matrix(3, 256, 1);
  pylora_packed P;
  char buffer[32 * 256 * 4];
  for (int dtype = PYLORA_Q5_0; dtype <= PYLORA_MXFP4; dtype++) {
    snprintf(context, sizeof context, "dtype %d", dtype);
    EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_pack(dtype, &W, buffer, &P));
    const int64_t odd = k_groups(dtype) == 8 ? 128 : 48;
    EXPECT(pylora_pack_bytes(dtype, 3, odd) == 0);
    EXPECT_STATUS(PYLORA_E_SHAPE, pylora_pack_blocks(dtype, 3, odd, buffer, 256, buffer, &P));
    EXPECT_STATUS(PYLORA_E_SHAPE, pylora_pack_blocks(dtype, 3, 256, buffer, 16, buffer, &P));
    /* As many bytes as in the file, but for the last panel and what a panel is rounded up to. */
    const size_t bytes = pylora_pack_bytes(dtype, 64, 512);
    EXPECT(bytes - 64 * (size_t)(512 / (32 * k_groups(dtype)) * k_block_bytes(dtype)) < 128);
  }
  EXPECT(pylora_pack_bytes(PYLORA_MXFP4 + 1, 32, 256) == 0);
  EXPECT(pylora_pack_bytes(-1, 32, 256) == 0);
  release();
}

int main(void) {
  each_setup(cases);
  if (!getenv("PYLORA_TEST_ISA")) {
    tables_agree(0);
    tables_agree(PYLORA_A8);
  }
  refused();
  return finish("test_blocks");
}
