/* tensor.c - a file's tensor as float32 rows, and as a packed weight: 32 rows at a time. */
#include "files/files.h"
#include "formats/format.h"

static int no_decoder(const pylora_tensor *t, pylora_message *why) {
  return pylora_fail(why, PYLORA_E_UNSUPPORTED,
                     "tensor '%.200s': no way is known to decode the type %s", t->name, t->type);
}

/* Row i, `columns` numbers, which are whole blocks. */
static void row(const pylora_tensor *t, int64_t i, float *out) {
  const pylora_kind *kind = pylora_kind_of(t->kind);
  const int64_t blocks = pylora_columns(t) / kind->block;
  kind->decode((const uint8_t *)t->data + i * blocks * kind->bytes, blocks, out);
}

int pylora_tensor_read(const pylora_tensor *t, int64_t first, int64_t rows, float *out,
                       pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!t || (!out && rows))
    return pylora_fail(why, PYLORA_E_NULL, "no tensor or no room was given");
  if (first < 0 || rows < 0 || first > pylora_rows(t) || rows > pylora_rows(t) - first)
    return pylora_fail(why, PYLORA_E_INDEX,
                       "tensor '%.200s': it has %lld rows, not %lld from %lld on", t->name,
                       (long long)pylora_rows(t), (long long)rows, (long long)first);
  if (!pylora_kind_of(t->kind)->decode) return no_decoder(t, why);
  for (int64_t i = 0; i < rows && t->bytes; i++) row(t, first + i, out + i * pylora_columns(t));
  return PYLORA_OK;
}

int pylora_tensor_dtype(const pylora_tensor *t, int precision) {
  if (!t) return precision;
  const pylora_kind *kind = pylora_kind_of(t->kind);
  const int a8 = precision >= PYLORA_A8 ? PYLORA_A8 : 0;
  if (precision - a8 != PYLORA_Q8_0 && precision - a8 != PYLORA_Q4_1) return precision;
  if (pylora_is_float(t)) return precision;
  return (kind->dtype >= 0 ? kind->dtype : PYLORA_Q8_0) + a8;
}

enum { PART = 1 << 22 }; /* bytes of a tensor that are packed before they are let go of */

typedef struct job {
  const pylora_tensor *t;
  const pylora_format *F;
  const pylora_kernels *K;
  int64_t d, k, heads;
  int as_they_are; /* the file's blocks; else they are decoded */
  int transposed;  /* the file has [k,d] */
  char *out, *scratch;
  size_t panel, room; /* bytes of a panel, of a thread's scratch */
  int64_t first;      /* panel of this part */
} job;

static void panel(void *ctx, int64_t p, int thread) {
  const job *j = ctx;
  p += j->first;
  char *scratch = j->scratch + (size_t)thread * j->room, *to = j->out + (size_t)p * j->panel;
  const int64_t first = p * PYLORA_PANEL, n = min64(PYLORA_PANEL, j->d - first);
  if (j->as_they_are) {
    const size_t bytes = j->F->blocks_bytes(j->k);
    for (int64_t i = 0; i < n; i++) {
      const int64_t from = pylora_source_row(j->d, j->heads, first + i);
      memcpy(scratch + (size_t)i * bytes, (const char *)j->t->data + (size_t)from * bytes, bytes);
    }
    j->F->pack_blocks(scratch, (int64_t)bytes, n, j->k, 0, to);
    return;
  }
  float *rows = (float *)(void *)scratch;
  if (j->transposed) {
    const pylora_kind *kind = pylora_kind_of(j->t->kind); /* numbers: its blocks are of one */
    for (int64_t c = 0; c < j->k; c++) {
      float some[PYLORA_PANEL];
      kind->decode((const uint8_t *)j->t->data + (c * j->d + first) * kind->bytes, n, some);
      for (int64_t i = 0; i < n; i++) rows[i * j->k + c] = some[i];
    }
  }
  for (int64_t i = 0; i < n && !j->transposed; i++)
    row(j->t, pylora_source_row(j->d, j->heads, first + i), rows + i * j->k);
  const pylora_mat W = {rows, n, j->k, j->k, NULL, NULL};
  j->F->pack(j->K, &W, 0, to);
}

int pylora_tensor_pack(const pylora_tensor *t, int dtype, int64_t heads, void *buffer,
                       pylora_packed *out, pylora_message *why) {
  if (heads < 0) heads = INT64_MAX; /* refused below */
  return pylora_tensor_pack_from(NULL, t, dtype, heads, 0, buffer, out, why);
}

int pylora_tensor_pack_from(const pylora_map *map, const pylora_tensor *t, int dtype, int64_t heads,
                            int transposed, void *buffer, pylora_packed *out, pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!t || !buffer || !out)
    return pylora_fail(why, PYLORA_E_NULL, "no tensor or no room was given");
  if (t->dims != 2)
    return pylora_fail(why, PYLORA_E_SHAPE, "tensor '%.200s' has the shape %s; a matrix is wanted",
                       t->name, pylora_shape(t->dims, t->shape).text);
  const pylora_kind *kind = pylora_kind_of(t->kind);
  const int64_t d = t->shape[transposed], k = t->shape[!transposed];
  const pylora_format *F = pylora_format_of(dtype);
  if (!kind->decode) return no_decoder(t, why);
  if (!F || !pylora_pack_bytes(dtype, d, k))
    return pylora_fail(why, PYLORA_E_UNSUPPORTED,
                       "tensor '%.200s' of shape %s cannot be stored in this precision: quantized "
                       "weights have groups of 32 inputs",
                       t->name, pylora_shape(2, t->shape).text);
  if (heads > 0 ? d % heads || d / heads % 2 : heads && d % (-3 * heads))
    return pylora_fail(why, PYLORA_E_SHAPE,
                       "tensor '%.200s': %lld rows are not %lld heads of pairs", t->name,
                       (long long)d, (long long)heads);
  const int threads = pylora_num_threads(), numbers = pylora_is_float(t),
            as_they_are = !transposed && F->pack_blocks && kind->dtype == (dtype & ~PYLORA_A8);
  if (transposed && (!numbers || heads))
    return pylora_fail(
        why, PYLORA_E_UNSUPPORTED,
        "tensor '%.200s' is %s and stored [inputs, outputs]; only numbers are turned", t->name,
        t->type);
  if (!as_they_are && !F->pack)
    return pylora_fail(
        why, PYLORA_E_UNSUPPORTED,
        "tensor '%.200s' is %s, and only a file's own blocks are stored in this type", t->name,
        t->type);
  job j = {t,      F,     pylora_table(),    d,
           k,      heads, as_they_are,       transposed,
           buffer, NULL,  F->panel_bytes(k), round_up((size_t)k * PYLORA_PANEL * sizeof(float)),
           0};
  *out = (pylora_packed){PYLORA_MAGIC, dtype, d, k, buffer};
  if (!t->bytes) return PYLORA_OK;
  j.scratch = pylora_take_aligned((size_t)threads * j.room);
  if (!j.scratch) return pylora_no_memory(why, t->name, (double)threads * (double)j.room);
  /* Heads in another order, and columns, are read from all over the tensor, which is small. */
  const int64_t panels = ceil_div(d, PYLORA_PANEL), each = t->bytes / panels,
                step = heads || transposed ? panels : max64(threads, PART / max64(1, each));
  for (; j.first < panels; j.first += step) {
    const int64_t n = min64(step, panels - j.first), row_bytes = t->bytes / d;
    pylora_parallel(panel, &j, n, threads);
    const int64_t rows = min64(n * PYLORA_PANEL, d - j.first * PYLORA_PANEL);
    pylora_map_forget(map, (const char *)t->data + j.first * PYLORA_PANEL * row_bytes,
                      (size_t)(rows * row_bytes));
  }
  pylora_give(j.scratch);
  return PYLORA_OK;
}
