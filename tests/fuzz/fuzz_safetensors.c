/* fuzz_safetensors.c - any bytes as a safetensors file: its header and all of its tensors' numbers. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  pylora_message why;
  pylora_file *file;
  const int status = pylora_file_open_memory("bytes", bytes, size, &file, &why);
  check_message(status, &why);
  int64_t total = 0;
  for (int64_t i = 0; i < pylora_file_tensors(file) && !file->gguf; i++) {
    const pylora_tensor *t = pylora_file_tensor(file, i);
    MUST(pylora_file_find(file, t->name) == t);
    total += t->bytes;
    const int64_t rows = pylora_rows(t), columns = pylora_columns(t);
    float *out =
        rows * columns < 1 << 20 ? malloc((size_t)(rows * columns + 1) * sizeof *out) : NULL;
    if (out && t->bytes) {
      const int read = pylora_tensor_read(t, 0, rows, out, &why);
      check_message(read, &why);
      MUST((read == PYLORA_OK) == pylora_is_float(t));
    }
    free(out);
  }
  if (!status && !file->gguf) MUST((uint64_t)total + 8 + load64(bytes) == size);
  pylora_file_close(file);
  return 0;
}
