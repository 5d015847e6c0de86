/* fuzz_gguf.c - any bytes as a GGUF file: its header, its tensors' numbers, and as a model that takes two tokens. */
#include "fuzz.h"

static void look(const pylora_file *file) {
  double sum = 0;
  static float row[1 << 16];
  for (int64_t i = 0; i < pylora_file_tensors(file); i++) {
    const pylora_tensor *t = pylora_file_tensor(file, i);
    MUST(pylora_file_find(file, t->name) == t);
    MUST((const uint8_t *)t->data >= file->map.bytes &&
         (const uint8_t *)t->data + t->bytes <= file->map.bytes + file->map.size);
    for (int64_t j = 0; j < t->bytes; j += 997) sum += ((const uint8_t *)t->data)[j];
    if (pylora_columns(t) <= (int64_t)(sizeof row / sizeof *row))
      pylora_tensor_read(t, pylora_rows(t) - 1, 1, row, NULL);
  }
  for (int64_t i = 0; i < file->metas; i++) {
    char key[256];
    const pylora_meta *m = &file->meta[i];
    if (m->key_bytes >= sizeof key || memchr(m->key, 0, m->key_bytes)) continue;
    memcpy(key, m->key, m->key_bytes);
    key[m->key_bytes] = 0;
    int64_t whole;
    const char *text;
    size_t n;
    double real;
    MUST(pylora_file_meta(file, key) == m);
    pylora_file_whole(file, key, &whole);
    pylora_file_real(file, key, &real);
    if (pylora_file_text(file, key, &text, &n)) MUST(pylora_utf8(text, n));
  }
  if (sum < 0) abort();
}

static void run(const pylora_model *model) {
  const pylora_about *about = pylora_model_about(model);
  const int64_t ids[2] = {0, about->vocab - 1};
  pylora_message why;
  pylora_session *session;
  float *logits = malloc((size_t)about->vocab * sizeof *logits);
  if (!logits) return;
  const int64_t capacity = about->positions < 4 ? about->positions : 4;
  int status = pylora_session_open(model, capacity, &session, &why);
  check_message(status, &why);
  for (int i = 0; i < 3 && !status; i++) {
    status = pylora_session_forward(session, NULL, ids, 2, logits, &why);
    check_message(status, &why);
    int64_t token;
    if (!status && !pylora_greedy(logits, about->vocab, &token))
      MUST(token >= 0 && token < about->vocab);
  }
  pylora_session_close(session);
  free(logits);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  pylora_message why;
  pylora_file *file;
  int status = pylora_file_open_memory("bytes", bytes, size, &file, &why);
  check_message(status, &why);
  if (status || !file->gguf) {
    pylora_file_close(file);
    return 0;
  }
  look(file);
  pylora_file_close(file);
  static const int precision[] = {PYLORA_F32, PYLORA_BF16, PYLORA_Q8_0, PYLORA_Q4_1};
  pylora_model *model;
  status = pylora_model_open(path_of(bytes, size), precision[size % 4], &model, &why);
  check_message(status, &why);
  if (!status) run(model);
  pylora_model_close(model);
  return 0;
}
