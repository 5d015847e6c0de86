/* Weights into ggml's block types: sizes and statuses, blocks that can be worked out by hand, how far what is stored
 * may be from what was given, and the same bytes for any number of threads.  That the bytes are ggml's is proved
 * beside ggml itself (tests/parity/test_encode.py). */
#include "check.h"
#include "ops/number.h"

static const struct {
  int type, numbers, bytes;
} types[] = {{PYLORA_BLOCK_Q4_0, 32, 18},   {PYLORA_BLOCK_Q4_1, 32, 20},
             {PYLORA_BLOCK_Q5_0, 32, 22},   {PYLORA_BLOCK_Q5_1, 32, 24},
             {PYLORA_BLOCK_Q8_0, 32, 34},   {PYLORA_BLOCK_Q2_K, 256, 84},
             {PYLORA_BLOCK_Q3_K, 256, 110}, {PYLORA_BLOCK_Q4_K, 256, 144},
             {PYLORA_BLOCK_Q5_K, 256, 176}, {PYLORA_BLOCK_Q6_K, 256, 210}};
enum { TYPES = sizeof types / sizeof *types };

static void sizes(void) {
  for (int t = 0; t < TYPES; t++) {
    EXPECT(pylora_blocks_bytes(types[t].type, 0) == 0, "no numbers");
    EXPECT(pylora_blocks_bytes(types[t].type, 3 * types[t].numbers) == 3 * types[t].bytes, "three");
    EXPECT(pylora_blocks_bytes(types[t].type, types[t].numbers + 1) == -1, "no whole blocks");
    EXPECT(pylora_blocks_bytes(types[t].type, -256) == -1, "negative");
    EXPECT(pylora_blocks_bytes(types[t].type, INT64_MAX / 256 * 256) == -1, "too many");
  }
  EXPECT(pylora_blocks_bytes(16, 256) == -1, "IQ2_XXS is not written");
}

static void statuses(void) {
  float x[256] = {0};
  uint8_t out[256];
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_encode_blocks(0, 1, 32, x, out));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_encode_blocks(PYLORA_BLOCK_Q8_0, 1, 31, x, out));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_encode_blocks(PYLORA_BLOCK_Q8_0, -1, 32, x, out));
  EXPECT_STATUS(PYLORA_E_SHAPE, pylora_encode_blocks(PYLORA_BLOCK_Q8_0, INT64_MAX, 32, x, out));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_encode_blocks(PYLORA_BLOCK_Q8_0, 1, 32, NULL, out));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_encode_blocks(PYLORA_BLOCK_Q8_0, 1, 32, x, NULL));
  OK(pylora_encode_blocks(PYLORA_BLOCK_Q8_0, 0, 32, NULL, NULL));
}

/* -16 .. 15 in steps of 1: d = 1 in Q5_0, and each code is the number itself. */
static void by_hand(void) {
  float x[32];
  uint8_t out[22];
  for (int i = 0; i < 32; i++) x[i] = (float)(i - 16);
  OK(pylora_encode_blocks(PYLORA_BLOCK_Q5_0, 1, 32, x, out));
  EXPECT(out[0] == 0 && out[1] == 0x3c, "d = 1 in float16");
  for (int i = 0; i < 32; i++) {
    const int low = out[6 + i % 16] >> (i < 16 ? 0 : 4) & 15, high = out[2 + i / 8] >> (i % 8) & 1;
    EXPECT((low | high << 4) == i, "the code of a number");
  }
}

/* Q8_0 has its numbers back within half a step, and what rounding the step to float16 moves 127 of them. */
static void near(int t, const float *x, const uint8_t *b) {
  const int n = types[t].numbers;
  if (types[t].type != PYLORA_BLOCK_Q8_0) return;
  uint16_t h;
  memcpy(&h, b, 2);
  const double d = widen_f16(h);
  for (int i = 0; i < n; i++)
    EXPECT(fabs(d * (int8_t)b[2 + i] - x[i]) <= d * 0.5 * (1 + 0x1p-9) + 127 * d * 0x1p-11,
           "within half a step");
}

static void threads_and_rows(void) {
  const int64_t rows = 37, k = 768;
  const float *x = floats(rows * k, 0.3f);
  for (int t = 0; t < TYPES; t++) {
    const int64_t bytes = pylora_blocks_bytes(types[t].type, k);
    uint8_t *one = bytes_of((size_t)(rows * bytes)), *more = bytes_of((size_t)(rows * bytes)),
            *alone = bytes_of((size_t)bytes);
    OK(pylora_set_num_threads(1));
    OK(pylora_encode_blocks(types[t].type, rows, k, x, one));
    OK(pylora_set_num_threads(5));
    OK(pylora_encode_blocks(types[t].type, rows, k, x, more));
    EXPECT(memcmp(one, more, (size_t)(rows * bytes)) == 0, "for any number of threads");
    OK(pylora_encode_blocks(types[t].type, 1, k, x + 11 * k, alone));
    EXPECT(memcmp(alone, one + 11 * bytes, (size_t)bytes) == 0, "a row without its neighbours");
    near(t, x, one);
  }
}

/* Numbers that are not finite mean nothing in a block, and are no undefined behaviour. */
static void anything(void) {
  float x[256];
  uint8_t out[8 * 34];
  for (int kind = 0; kind < 4; kind++) {
    for (int i = 0; i < 256; i++) {
      const uint32_t u = (uint32_t)bits64();
      memcpy(&x[i], &u, 4);
      if (kind == 1) x[i] = i % 2 ? INFINITY : -1;
      if (kind == 2) x[i] = NAN;
      if (kind == 3) x[i] = (float)i * 1e-44f;
    }
    for (int t = 0; t < TYPES; t++) OK(pylora_encode_blocks(types[t].type, 1, 256, x, out));
  }
}

int main(void) {
  sizes();
  statuses();
  by_hand();
  threads_and_rows();
  anything();
  return finish("test_encode");
}
