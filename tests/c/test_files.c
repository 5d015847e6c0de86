/* test_files.c - GGUF and safetensors: what is in a good file, and that no damaged one is taken or steps outside. */
#include "files.h"

/* ---- GGUF ---- */

static const float four[4] = {1, -2.5f, 3e-3f, 4};

/* A vector of 4 numbers and a [3,32] matrix of Q8_0, with metadata of several types. */
static void good(bytes *b) {
  gguf_begin(b, 2, 5);
  meta_text(b, "general.architecture", "llama");
  meta_u32(b, "answer", 42);
  meta_f32(b, "eps", 0.5f);
  put_text(b, "words");
  put32(b, 9), put32(b, 8), put64(b, 2), put_text(b, "a"), put_text(b, "\xc3\xa9");
  put_text(b, "list");
  put32(b, 9), put32(b, 4), put64(b, 3), put32(b, 1), put32(b, 2), put32(b, 3);
  tensor_entry(b, "v", 0, 4, 0, 0);
  tensor_entry(b, "m", 3, 32, 8, 32);
  put_zeros(b, 32);
  put(b, four, sizeof four);
  put_zeros(b, 32);
  for (int i = 0; i < 3; i++) {
    const uint16_t half[3] = {0x3c00, 0x4000, 0xb800}; /* 1, 2, -0.5 */
    put(b, &half[i], 2);
    for (int j = 0; j < 32; j++) put(b, &(int8_t){(int8_t)(j - 16)}, 1);
  }
}

static void test_gguf(void) {
  static bytes b;
  good(&b);
  pylora_file *file;
  OK(open_bytes(&b, b.n, &file));
  EXPECT(pylora_file_tensors(file) == 2);
  EXPECT(!pylora_file_tensor(file, 2) && !pylora_file_tensor(file, -1));
  EXPECT(!pylora_file_find(file, "") && !pylora_file_find(file, "vv"));
  const pylora_tensor *v = pylora_file_find(file, "v"), *m = pylora_file_find(file, "m");
  EXPECT(v && v->dims == 1 && v->shape[0] == 4 && strcmp(v->type, "F32") == 0);
  EXPECT(m && m->dims == 2 && m->shape[0] == 3 && m->shape[1] == 32 && m->bytes == 3 * 34);
  float out[96];
  OK(pylora_tensor_read(v, 0, 1, out, NULL));
  EXPECT(memcmp(out, four, sizeof four) == 0);
  OK(pylora_tensor_read(m, 1, 2, out, NULL));
  for (int j = 0; j < 32; j++)
    EXPECT(out[j] == 2.0f * (float)(j - 16) && out[32 + j] == -0.5f * (float)(j - 16));
  EXPECT_STATUS(PYLORA_E_INDEX, pylora_tensor_read(m, 2, 2, out, NULL));
  EXPECT_STATUS(PYLORA_E_INDEX, pylora_tensor_read(m, -1, 1, out, NULL));
  int64_t whole;
  double real;
  const char *text;
  size_t n;
  EXPECT(pylora_file_whole(file, "answer", &whole) && whole == 42);
  EXPECT(pylora_file_real(file, "answer", &real) && real == 42);
  EXPECT(pylora_file_real(file, "eps", &real) && real == 0.5);
  EXPECT(!pylora_file_whole(file, "eps", &whole) && !pylora_file_whole(file, "list", &whole));
  EXPECT(pylora_file_text(file, "general.architecture", &text, &n) && n == 5);
  EXPECT(!pylora_file_text(file, "answer", &text, &n) && !pylora_file_text(file, "x", &text, &n));
  pylora_file_close(file);
}

/* Every beginning of a file is refused; a byte that is wrong is, or does no harm. */
static void damage(const bytes *b) {
  static bytes c;
  pylora_file *file;
  for (size_t n = 0; n < b->n; n++) {
    snprintf(context, sizeof context, "the first %zu of %zu bytes", n, b->n);
    EXPECT_STATUS(PYLORA_E_FILE, open_bytes(b, n, &file));
    pylora_file_close(file);
  }
  static const uint8_t wrong[] = {0, 1, 0x7f, 0x80, 0xff};
  for (size_t i = 0; i < b->n; i++)
    for (size_t k = 0; k < sizeof wrong; k++) {
      snprintf(context, sizeof context, "byte %zu is %d", i, wrong[k]);
      c = *b;
      c.p[i] = wrong[k];
      if (!open_bytes(&c, c.n, &file))
        for (int64_t t = 0; t < pylora_file_tensors(file); t++) {
          float *out = malloc((size_t)pylora_columns(&file->tensor[t]) * sizeof *out + 1);
          if (out)
            pylora_tensor_read(&file->tensor[t], pylora_rows(&file->tensor[t]) - 1, 1, out, NULL);
          free(out);
        }
      pylora_file_close(file);
    }
  context[0] = 0;
}

/* One tensor of these fields, and enough bytes behind it. */
static void one(bytes *b, const char *name, uint32_t dims, const uint64_t *shape, uint32_t type,
                uint64_t offset) {
  gguf_begin(b, 1, 0);
  put_text(b, name);
  put32(b, dims);
  for (uint32_t i = 0; i < dims && i < 8; i++) put64(b, shape[i]);
  put32(b, type);
  put64(b, offset);
  put_zeros(b, 32);
  for (int i = 0; i < 64; i++) put64(b, 0);
}

static void test_gguf_tensors(void) {
  static bytes b;
  const uint64_t ok[8] = {32, 1, 1, 1, 1, 1, 1, 1}, empty[2] = {32, 0}, odd[1] = {31},
                 wide[1] = {1 << 20};
  const uint64_t product[4] = {1ull << 32, 1ull << 32, 2, 2}, top[2] = {32, UINT64_MAX};
  const uint64_t sign[1] = {1ull << 63}, wrapped[2] = {32, (1ull << 59) + 1};
  pylora_file *file;
  one(&b, "t", 4, ok, 0, 0);
  OK(open_bytes(&b, b.n, &file));
  pylora_file_close(file);
  one(&b, "t", 0, ok, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "0 dimensions");
  one(&b, "t", 5, ok, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "5 dimensions");
  one(&b, "t", UINT32_MAX, ok, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "dimensions");
  one(&b, "t", 2, empty, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "empty");
  one(&b, "t", 1, odd, 8, 0);
  REFUSED(PYLORA_E_FILE, &b, "whole Q8_0 blocks");
  one(&b, "t", 1, wide, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "larger than the file");
  one(&b, "t", 4, product, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "larger than the file");
  one(&b, "t", 2, top, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "larger than the file");
  one(&b, "t", 1, sign, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "'t'");
  one(&b, "t", 2, wrapped, 0, 0); /* 2^64 and a bit: as a product of 64 bits it would fit */
  REFUSED(PYLORA_E_FILE, &b, "larger than the file");
  for (uint32_t type = 0; type < 300; type++) {
    one(&b, "t", 1, (uint64_t[]){256}, type, 0);
    const int status = open_bytes(&b, b.n, &file);
    EXPECT(!status || status == PYLORA_E_FILE || status == PYLORA_E_UNSUPPORTED, "type %u", type);
    if (!status && !pylora_kind_of(file->tensor[0].kind)->decode) {
      float out[256];
      EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_tensor_read(file->tensor, 0, 1, out, &why));
    }
    pylora_file_close(file);
  }
  one(&b, "t", 1, ok, 4, 0); /* a type that ggml has removed */
  REFUSED(PYLORA_E_UNSUPPORTED, &b, "unknown ggml type 4");
  one(&b, "t", 1, ok, 0, 16);
  REFUSED(PYLORA_E_FILE, &b, "not aligned");
  one(&b, "t", 1, ok, 0, 1 << 20);
  REFUSED(PYLORA_E_FILE, &b, "truncated");
  one(&b, "t", 1, ok, 0, UINT64_MAX - 31);
  REFUSED(PYLORA_E_FILE, &b, "truncated");
  one(&b, "\xff\xfe", 1, ok, 0, 0);
  REFUSED(PYLORA_E_FILE, &b, "not UTF-8");
}

static void test_gguf_header(void) {
  static bytes b;
  gguf_begin(&b, UINT64_MAX, 0);
  REFUSED(PYLORA_E_FILE, &b, "the number of tensors is 18446744073709551615");
  gguf_begin(&b, 0, UINT64_MAX / 13 + 1); /* times 13 it would wrap around */
  REFUSED(PYLORA_E_FILE, &b, "metadata entries");
  gguf_begin(&b, 0, 0);
  b.p[4] = 9;
  REFUSED(PYLORA_E_UNSUPPORTED, &b, "version 9");
  gguf_begin(&b, 0, 1);
  put64(&b, UINT64_MAX); /* the length of a key */
  put(&b, "keykeykey", 9);
  REFUSED(PYLORA_E_FILE, &b, "a metadata key");
  gguf_begin(&b, 0, 1);
  put_text(&b, "k"), put32(&b, 77), put64(&b, 0);
  REFUSED(PYLORA_E_FILE, &b, "unknown value type 77");
  gguf_begin(&b, 0, 1);
  put_text(&b, "k"), put32(&b, 9), put32(&b, 9), put64(&b, 0);
  REFUSED(PYLORA_E_FILE, &b, "array of arrays");
  gguf_begin(&b, 0, 1);
  put_text(&b, "k"), put32(&b, 9), put32(&b, 12), put64(&b, UINT64_MAX / 8 + 1);
  REFUSED(PYLORA_E_FILE, &b, "the length of an array");
  gguf_begin(&b, 0, 1);
  put_text(&b, "k"), put32(&b, 9), put32(&b, 8), put64(&b, UINT64_MAX);
  REFUSED(PYLORA_E_FILE, &b, "array of texts");
  gguf_begin(&b, 0, 2);
  meta_u32(&b, "same", 1), meta_u32(&b, "same", 2);
  REFUSED(PYLORA_E_FILE, &b, "'same' occurs twice");
  static const uint32_t bad[] = {0, 3, 33, 1u << 31};
  for (size_t i = 0; i < 4; i++) {
    gguf_begin(&b, 0, 1);
    meta_u32(&b, "general.alignment", bad[i]);
    REFUSED(PYLORA_E_FILE, &b, "power of two");
  }
  gguf_begin(&b, 2, 0);
  tensor_entry(&b, "a", 0, 16, 0, 0), tensor_entry(&b, "b", 0, 16, 0, 32);
  put_zeros(&b, 32);
  for (int i = 0; i < 16; i++) put64(&b, 0);
  REFUSED(PYLORA_E_FILE, &b, "overlaps");
  gguf_begin(&b, 2, 0);
  tensor_entry(&b, "a", 0, 8, 0, 0), tensor_entry(&b, "a", 0, 8, 0, 32);
  put_zeros(&b, 32);
  for (int i = 0; i < 16; i++) put64(&b, 0);
  REFUSED(PYLORA_E_FILE, &b, "'a' occurs twice");
  gguf_begin(&b, 1, 0);
  put64(&b, 3), put(&b, "a\0b", 3), put32(&b, 1), put64(&b, 8), put32(&b, 0), put64(&b, 0);
  REFUSED(PYLORA_E_FILE, &b, "zero byte");
  b.n = 0;
  put(&b, "version https://git-lfs.github.com/spec/v1\n", 43);
  REFUSED(PYLORA_E_FILE, &b, "Git LFS");
  b.n = 0;
  put(&b, "PK\3\4 something else", 18);
  REFUSED(PYLORA_E_FILE, &b, "neither a GGUF file");
}

/* ---- safetensors ---- */

static const char fine[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
    "\"b\\u00e9\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[24,26]},"
    "\"z\":{\"dtype\":\"I64\",\"shape\":[0,9],\"data_offsets\":[26,26]}}";

static void test_safetensors(void) {
  static bytes b;
  safetensors(&b, fine, 26);
  pylora_file *file;
  OK(open_bytes(&b, b.n, &file));
  EXPECT(pylora_file_tensors(file) == 3);
  const pylora_tensor *t = pylora_file_find(file, "b\xc3\xa9"), *a = pylora_file_find(file, "a");
  EXPECT(t && t->dims == 0 && t->bytes == 2 && strcmp(t->type, "BF16") == 0);
  EXPECT(a && a->shape[0] == 2 && a->shape[1] == 3);
  float out[6];
  OK(pylora_tensor_read(a, 0, 2, out, NULL));
  EXPECT(memcmp(out, b.p + b.n - 26, 24) == 0);
  OK(pylora_tensor_read(t, 0, 1, out, NULL));
  t = pylora_file_find(file, "z");
  EXPECT(t && t->bytes == 0);
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_tensor_read(t, 0, 0, out, NULL));
  pylora_file_close(file);
  damage(&b);
}

static void test_safetensors_refused(void) {
  static const struct {
    const char *header, *says;
    size_t data;
  } cases[] = {
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} x", "behind the value", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},}", "JSON", 8},
      {"{\"a\":3}", "not an object", 0},
      {"{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}", "unknown dtype 'F31'",
       8},
      {"{\"a\":{\"dtype\":\"Q8_0\",\"shape\":[32],\"data_offsets\":[0,34]}}", "unknown dtype", 34},
      {"{\"a\":{\"dtype\":5,\"shape\":[2],\"data_offsets\":[0,8]}}", "unknown dtype", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", "non-negative", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", "non-negative", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,9]}}", "exactly 2", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],\"data_offsets\":["
       "0,"
       "4]}}",
       "at most 16", 4},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}",
       "more than", 0},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", "needs 8 bytes", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "truncated", 4},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", "left over", 12},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", "hole", 12},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\","
       "\"shape\":"
       "[2],\"data_offsets\":[4,12]}}",
       "overlaps", 12},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"a\":{\"dtype\":\"F32\","
       "\"shape\":"
       "[2],\"data_offsets\":[8,16]}}",
       "'a' is there twice", 16},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}",
       "nothing else", 8},
      {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", "must have", 8},
      {"{\"__metadata__\":{\"a\":1}}", "__metadata__", 0},
  };
  static bytes b;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    snprintf(context, sizeof context, "%.150s", cases[i].header);
    safetensors(&b, cases[i].header, cases[i].data);
    REFUSED(PYLORA_E_FILE, &b, cases[i].says);
  }
  context[0] = 0;
  safetensors(&b, "{}", 0);
  memset(b.p, 0xff, 8);
  REFUSED(PYLORA_E_FILE, &b, "the header claims");
  b.p[7] = 0x7f;
  REFUSED(PYLORA_E_FILE, &b, "the header claims");
}

/* ---- packing ---- */

/* Packed out of a file is what pylora_pack makes of the numbers, rows in Hugging Face's order. */
static void test_pack(void) {
  static bytes b;
  const uint32_t types[] = {0, 1, 2, 3, 8, 30, 6, 7, 10, 11, 12, 13, 14, 20, 23, 39};
  const int64_t size[] = {4, 2, 18, 20, 34, 2, 22, 24, 84, 110, 144, 176, 210, 18, 136, 17};
  const int dtypes[] = {PYLORA_F32,  PYLORA_BF16, PYLORA_F32X3,
                        PYLORA_Q8_0, PYLORA_Q4_0, PYLORA_Q4_1};
  enum { D = 40, K = 256, HEADS = 4, TYPES = sizeof types / sizeof *types };
  for (int t = 0; t < TYPES; t++) {
    gguf_begin(&b, 1, 0);
    tensor_entry(&b, "W", D, K, types[t], 0);
    put_zeros(&b, 32);
    const int64_t n = (size[t] > 50 ? D * K / 256 : size[t] > 4 ? D * K / 32 : D * K) * size[t];
    for (int64_t i = 0; i < n; i++) put(&b, &(uint8_t){(uint8_t)below(types[t] == 8 ? 60 : 50)}, 1);
    pylora_file *file;
    OK(open_bytes(&b, b.n, &file));
    const pylora_tensor *W = pylora_file_tensor(file, 0);
    float *read = floats(D * K, 0), *ordered = floats(D * K, 0);
    OK(pylora_tensor_read(W, 0, D, read, NULL));
    for (int heads = 0; heads <= HEADS; heads += HEADS)
      for (int p = 0; p < 6; p++) {
        snprintf(context, sizeof context, "type %u as %d, heads %d", types[t], dtypes[p], heads);
        if (pylora_kind_of(W->kind)->dtype > PYLORA_F16 &&
            pylora_kind_of(W->kind)->dtype == dtypes[p] && size[t] > 4)
          continue; /* blocks are taken as they are: below */
        for (int64_t i = 0; i < D; i++) {
          const int64_t h = i / (D / HEADS), j = i % (D / HEADS), half = D / HEADS / 2;
          const int64_t from = heads ? h * 2 * half + (j < half ? 2 * j : 2 * (j - half) + 1) : i;
          memcpy(ordered + i * K, read + from * K, K * sizeof *read);
        }
        const pylora_mat m = {ordered, D, K, K, NULL, NULL};
        const size_t bytes_ = pylora_pack_bytes(dtypes[p], D, K);
        void *want = bytes_of(bytes_), *got = bytes_of(bytes_);
        pylora_packed a, c;
        OK(pylora_pack(dtypes[p], &m, want, &a));
        OK(pylora_tensor_pack(W, dtypes[p], heads, got, &c, &why));
        EXPECT(memcmp(want, got, bytes_) == 0);
        EXPECT(c.d == D && c.k == K && c.dtype == dtypes[p]);
      }
    context[0] = 0;
    pylora_packed P;
    const int own = pylora_tensor_dtype(W, PYLORA_Q4_1);
    void *room = bytes_of(pylora_pack_bytes(own, D, K));
    OK(pylora_tensor_pack(W, own, 0, room, &P, &why));
    float *unpacked = floats(D * K, 0);
    const pylora_mat m = {unpacked, D, K, K, NULL, NULL};
    OK(pylora_unpack(&P, &m));
    if (size[t] > 4) EXPECT(memcmp(unpacked, read, D * K * sizeof *read) == 0, "type %u", types[t]);
    EXPECT_STATUS(PYLORA_E_SHAPE, pylora_tensor_pack(W, own, 3, room, &P, &why));
    pylora_file_close(file);
    release();
  }
}

int main(void) {
  static bytes b;
  test_gguf();
  good(&b);
  damage(&b);
  test_gguf_tensors();
  test_gguf_header();
  test_safetensors();
  test_safetensors_refused();
  test_pack();
  return finish("test_files");
}
