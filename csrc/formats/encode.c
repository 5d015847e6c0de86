/* encode.c - weights into ggml's block types, as files hold them: the types of 32 numbers, and the entry for all.
 *
 * In 4 and 5 bits byte i holds the low four bits of code i, and in its high half those of code i + 16.  Which type
 * a tensor should have is not decided here; the types of 256 numbers are in encode_k.c. */
#include "formats/encode.h"
#include "runtime/internal.h"

enum { N = 32, HALF = 16 };

/* The integer part, and 0 of what no 32-bit integer holds, which is what a processor makes of it in a byte: a
 * group whose scale is so small that its inverse is infinite. */
static int whole(float v) { return v > -2147483648.f && v < 2147483648.f ? (int)v : 0; }

static int capped(float v, int most) {
  const int q = (int8_t)whole(v);
  return q < most ? q : most;
}

static float inverse(float d) { return d != 0 ? 1.f / d : 0.f; }

/* The number that is farthest from zero, the first of equal ones. */
static float farthest(const float *x) {
  float size = 0, found = 0;
  for (int i = 0; i < N; i++)
    if (size < fabsf(x[i])) size = fabsf(x[i]), found = x[i];
  return found;
}

static void range(const float *x, float *low, float *high) {
  *low = 0x1.fffffep127f, *high = -0x1.fffffep127f;
  for (int i = 0; i < N; i++) {
    if (x[i] < *low) *low = x[i];
    if (x[i] > *high) *high = x[i];
  }
}

/* d, 32 codes of 4 bits: d (q - 8). */
PYLORA_ENCODER(q4_0) {
  for (; n-- > 0; x += N, b += 18) {
    const float d = farthest(x) / -8, by = inverse(d);
    put_half(b, d);
    for (int i = 0; i < HALF; i++) {
      const int low = capped(x[i] * by + 8.5f, 15), high = capped(x[HALF + i] * by + 8.5f, 15);
      b[2 + i] = (uint8_t)((uint8_t)low | high << 4);
    }
  }
}

/* d, m, 32 codes of 4 bits: d q + m. */
PYLORA_ENCODER(q4_1) {
  for (; n-- > 0; x += N, b += 20) {
    float least, most;
    range(x, &least, &most);
    const float d = (most - least) / 15, by = inverse(d);
    put_half(b, d);
    put_half(b + 2, least);
    for (int i = 0; i < HALF; i++) {
      const int low = capped((x[i] - least) * by + 0.5f, 15),
                high = capped((x[HALF + i] - least) * by + 0.5f, 15);
      b[4 + i] = (uint8_t)((uint8_t)low | high << 4);
    }
  }
}

/* The fifth bits of 32 codes, then their lower four. */
static void put_five(uint8_t *b, const uint8_t *code) {
  uint32_t fifth = 0;
  for (int i = 0; i < N; i++) fifth |= (uint32_t)(code[i] >> 4 & 1) << i;
  for (int i = 0; i < 4; i++) b[i] = (uint8_t)(fifth >> (8 * i));
  for (int i = 0; i < HALF; i++) b[4 + i] = (uint8_t)((code[i] & 15) | (code[HALF + i] & 15) << 4);
}

/* d, fifth bits, 32 codes: d (q - 16). */
PYLORA_ENCODER(q5_0) {
  for (; n-- > 0; x += N, b += 22) {
    uint8_t code[N];
    const float d = farthest(x) / -16, by = inverse(d);
    put_half(b, d);
    for (int i = 0; i < N; i++) code[i] = (uint8_t)capped(x[i] * by + 16.5f, 31);
    put_five(b + 2, code);
  }
}

/* d, m, fifth bits, 32 codes: d q + m. */
PYLORA_ENCODER(q5_1) {
  for (; n-- > 0; x += N, b += 24) {
    uint8_t code[N];
    float least, most;
    range(x, &least, &most);
    const float d = (most - least) / 31, by = inverse(d);
    put_half(b, d);
    put_half(b + 2, least);
    for (int i = 0; i < N; i++) code[i] = (uint8_t)whole((x[i] - least) * by + 0.5f);
    put_five(b + 4, code);
  }
}

/* d, 32 codes of 8 bits: d q. */
PYLORA_ENCODER(q8_0) {
  for (; n-- > 0; x += N, b += 34) {
    float size = 0;
    for (int i = 0; i < N; i++) size = size > fabsf(x[i]) ? size : fabsf(x[i]);
    const float d = size / 127, by = inverse(d);
    put_half(b, d);
    for (int i = 0; i < N; i++) b[2 + i] = (uint8_t)whole(roundf(x[i] * by));
  }
}

/* ---- all types ---- */

typedef struct encoder {
  int type, numbers, bytes;
  void (*encode)(const float *x, int64_t n, uint8_t *b);
} encoder;

static const encoder encoders[] = {
    {PYLORA_BLOCK_Q4_0, 32, 18, pylora_encode_q4_0},
    {PYLORA_BLOCK_Q4_1, 32, 20, pylora_encode_q4_1},
    {PYLORA_BLOCK_Q5_0, 32, 22, pylora_encode_q5_0},
    {PYLORA_BLOCK_Q5_1, 32, 24, pylora_encode_q5_1},
    {PYLORA_BLOCK_Q8_0, 32, 34, pylora_encode_q8_0},
    {PYLORA_BLOCK_Q2_K, 256, 84, pylora_encode_q2_k},
    {PYLORA_BLOCK_Q3_K, 256, 110, pylora_encode_q3_k},
    {PYLORA_BLOCK_Q4_K, 256, 144, pylora_encode_q4_k},
    {PYLORA_BLOCK_Q5_K, 256, 176, pylora_encode_q5_k},
    {PYLORA_BLOCK_Q6_K, 256, 210, pylora_encode_q6_k},
};

static const encoder *encoder_of(int type) {
  for (size_t i = 0; i < sizeof encoders / sizeof *encoders; i++)
    if (encoders[i].type == type) return &encoders[i];
  return NULL;
}

int64_t pylora_blocks_bytes(int type, int64_t k) {
  const encoder *E = encoder_of(type);
  if (!E || k < 0 || k % E->numbers || k > INT64_MAX / E->bytes) return -1;
  return k / E->numbers * E->bytes;
}

typedef struct encode_job {
  const encoder *E;
  const float *x;
  uint8_t *out;
  int64_t k, bytes;
} encode_job;

static void encode_row(void *ctx, int64_t row, int thread) {
  (void)thread;
  const encode_job *j = ctx;
  j->E->encode(j->x + row * j->k, j->k / j->E->numbers, j->out + row * j->bytes);
}

int pylora_encode_blocks(int type, int64_t rows, int64_t k, const float *x, void *out) {
  const encoder *E = encoder_of(type);
  if (!E) return PYLORA_E_UNSUPPORTED;
  const int64_t bytes = pylora_blocks_bytes(type, k);
  if (bytes < 0 || rows < 0 || (k && rows > INT64_MAX / 8 / k)) return PYLORA_E_SHAPE;
  if (!rows || !k) return PYLORA_OK;
  if (!x || !out) return PYLORA_E_NULL;
  encode_job j = {E, x, out, k, bytes};
  pylora_parallel(encode_row, &j, rows, pylora_num_threads());
  return PYLORA_OK;
}
