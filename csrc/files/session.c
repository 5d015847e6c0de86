/* session.c - one sequence through a model: its keys and values, a call for new tokens, the likeliest of them. */
#include <math.h>

#include "files/model.h"

struct pylora_session {
  const pylora_model *model;
  int64_t capacity, length;
  pylora_decoder decoder; /* the model with this session's tables of angles */
  pylora_rope_table table[2];
  pylora_mat *keys; /* [layers], then as many of values */
  void *cache, *ws; /* of all keys and values; of the last call */
  size_t ws_bytes;
  float *angles;    /* of each table cosines, then sines */
  float *turned;    /* the same of a step's tokens alone, where angles depend on the length */
  int64_t *numbers; /* positions, which are the rows of the cache, too */
};

static void point(pylora_session *s, int32_t i, float *cosines, int64_t rows) {
  const int64_t n = pylora_pairs(&s->model->s);
  pylora_rope_table *t = &s->table[i];
  t->cosines = (pylora_mat){cosines, rows, n, n, NULL, NULL};
  t->sines = (pylora_mat){cosines + rows * n, rows, n, n, NULL, NULL};
  t->layout = pylora_families[s->model->s.family].layout;
  t->position = NULL;
}

/* The angles of a short sequence; those of a longer one are made in each step. */
static int tables(pylora_session *s, int32_t i) {
  const pylora_settings *m = &s->model->s;
  const int64_t n = pylora_pairs(m), unchanged = pylora_rope_unchanged(m, i);
  float *cosines = s->angles + i * 2 * s->capacity * n;
  if (unchanged < s->capacity && !s->turned) {
    s->turned = pylora_take((size_t)s->capacity,
                            (size_t)(s->model->decoder.ropes * 2 * n) * sizeof *s->turned);
    if (!s->turned) return PYLORA_E_MEMORY;
  }
  point(s, i, cosines, s->capacity);
  return pylora_rope_rows(m, i, 0, 0, s->capacity, cosines, cosines + s->capacity * n);
}

/* Puts the angles of n new tokens in place, where their sequence is long enough to have others. */
static int turn(pylora_session *s, int64_t n, int64_t total) {
  const pylora_settings *m = &s->model->s;
  const int64_t pairs = pylora_pairs(m);
  for (int32_t i = 0; i < s->model->decoder.ropes; i++) {
    float *cosines = s->angles + i * 2 * s->capacity * pairs;
    point(s, i, cosines, s->capacity);
    if (total <= pylora_rope_unchanged(m, i)) continue;
    cosines = s->turned + i * 2 * s->capacity * pairs;
    point(s, i, cosines, n);
    s->table[i].position = s->numbers; /* one row for each */
    TRY(pylora_rope_rows(m, i, total, total - n, n, cosines, cosines + n * pairs));
  }
  return PYLORA_OK;
}

int pylora_session_open(const pylora_model *m, int64_t capacity, pylora_session **out,
                        pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!m || !out) return pylora_fail(why, PYLORA_E_NULL, "no model was given");
  *out = NULL;
  if (capacity < 1 || capacity > m->about.positions)
    return pylora_fail(why, PYLORA_E_SHAPE,
                       "%.300s: a sequence of %lld tokens was asked for; the model's are from 1 to "
                       "%lld",
                       m->path, (long long)capacity, (long long)m->about.positions);
  pylora_session *s = pylora_take(1, sizeof *s);
  if (!s) return pylora_no_memory(why, m->path, sizeof *s);
  const int bf16 = m->decoder.activations == PYLORA_BF16;
  const size_t layers = (size_t)m->s.layers, half = (size_t)pylora_pairs(&m->s);
  const size_t width = (size_t)(m->s.kv_heads * m->s.head_dim);
  const double bytes = 2.0 * (double)layers * (double)width * (double)capacity * (bf16 ? 2 : 4);
  s->model = m, s->capacity = capacity, s->decoder = m->decoder;
  s->keys = pylora_take(2 * layers, sizeof *s->keys);
  s->cache = bytes < (double)SIZE_MAX / 4 ? pylora_take_aligned((size_t)bytes) : NULL;
  s->angles =
      pylora_take((size_t)capacity, (size_t)m->decoder.ropes * 2 * half * sizeof *s->angles);
  s->numbers = pylora_take((size_t)capacity, sizeof *s->numbers);
  if (!s->keys || !s->cache || !s->angles || !s->numbers) {
    pylora_session_close(s);
    return pylora_no_memory(why, m->path, bytes);
  }
  const int64_t each = capacity * (int64_t)width;
  for (int64_t i = 0; i < 2 * (int64_t)layers; i++) {
    pylora_mat *a = &s->keys[i];
    *a = (pylora_mat){NULL, capacity, (int64_t)width, (int64_t)width, NULL, NULL};
    if (bf16)
      a->b = (uint16_t *)s->cache + i * each;
    else
      a->p = (float *)s->cache + i * each;
  }
  for (int64_t i = 0; i < capacity; i++) s->numbers[i] = i;
  int status = PYLORA_OK;
  for (int32_t i = 0; i < m->decoder.ropes && !status; i++) status = tables(s, i);
  if (status) {
    pylora_session_close(s);
    return pylora_no_memory(why, m->path, (double)capacity * (double)half * 16);
  }
  s->decoder.rope = s->table;
  *out = s;
  return PYLORA_OK;
}

void pylora_session_close(pylora_session *s) {
  if (!s) return;
  pylora_give(s->cache);
  pylora_give(s->ws);
  free(s->keys);
  free(s->angles);
  free(s->turned);
  free(s->numbers);
  free(s);
}

void pylora_session_clear(pylora_session *s) {
  if (s) s->length = 0;
}

int64_t pylora_session_length(const pylora_session *s) { return s ? s->length : 0; }

int pylora_session_forward(pylora_session *s, const pylora_adapter *adapter, const int64_t *ids,
                           int64_t n, float *logits, pylora_message *why) {
  if (why) why->text[0] = 0;
  if (!s || !ids || !logits) return pylora_fail(why, PYLORA_E_NULL, "no session, ids or logits");
  const int64_t vocab = s->model->s.vocab;
  if (n < 1) return pylora_fail(why, PYLORA_E_SHAPE, "at least one new token is needed");
  if (n > s->capacity - s->length)
    return pylora_fail(why, PYLORA_E_INDEX,
                       "the sequence would have %lld tokens; its session holds %lld",
                       (long long)(s->length + n), (long long)s->capacity);
  for (int64_t i = 0; i < n; i++)
    if (ids[i] < 0 || ids[i] >= vocab)
      return pylora_fail(why, PYLORA_E_INDEX, "ids[%lld] is %lld, outside the vocabulary 0 .. %lld",
                         (long long)i, (long long)ids[i], (long long)(vocab - 1));
  const int64_t start[2] = {0, n}, first = 0, total = s->length + n, last = n - 1;
  const pylora_seqs seqs = {1, start, &first, &total};
  const pylora_step step = {
      n,     ids, s->numbers + s->length, s->numbers + s->length, &seqs, 1, start, &adapter, 1,
      &last, NULL};
  const pylora_kv kv = {s->keys, s->keys + s->model->s.layers};
  if (turn(s, n, total)) return pylora_no_memory(why, s->model->path, (double)n * 8);
  const size_t need = pylora_decoder_workspace(&s->decoder, &step);
  if (!need) return pylora_fail(why, PYLORA_E_SHAPE, "the adapter does not fit the model's sizes");
  if (need > s->ws_bytes) {
    pylora_give(s->ws);
    s->ws = pylora_take_aligned(need);
    s->ws_bytes = s->ws ? need : 0;
    if (!s->ws) return pylora_no_memory(why, s->model->path, (double)need);
  }
  const pylora_mat out = {logits, 1, vocab, vocab, NULL, NULL};
  const int status = pylora_decoder_forward(&s->decoder, &kv, &step, &out, s->ws, s->ws_bytes);
  if (status) return pylora_fail(why, status, "%s", pylora_status_text(status));
  s->length = total;
  return PYLORA_OK;
}

int pylora_greedy(const float *logits, int64_t vocab, int64_t *token) {
  if (!logits || !token) return PYLORA_E_NULL;
  if (vocab < 1) return PYLORA_E_SHAPE;
  int64_t best = 0;
  for (int64_t i = 0; i < vocab; i++) {
    if (!isfinite(logits[i])) return PYLORA_E_VALUE;
    if (logits[i] > logits[best]) best = i;
  }
  *token = best;
  return PYLORA_OK;
}
