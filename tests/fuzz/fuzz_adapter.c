/* fuzz_adapter.c - any bytes as an adapter of a tiny model: a GGUF file, or a PEFT configuration and its tensors.
 *
 * Input: a byte 0 and a GGUF file; or another byte, the length of the configuration in two, it, and a safetensors
 * file. What is read is applied to two tokens. */
#include "fuzz.h"

#ifndef MODEL
#error "-DMODEL is the path of the tiny model that seeds.py writes"
#endif

static pylora_model *model(void) {
  static pylora_model *open;
  pylora_message why;
  if (!open && pylora_model_open(MODEL, PYLORA_F32, &open, &why)) {
    fprintf(stderr, "%s\n", why.text);
    abort();
  }
  return open;
}

static void apply(const pylora_adapter_file *adapter) {
  const int64_t ids[2] = {1, 2};
  pylora_message why;
  static float logits[64];
  static pylora_session *session;
  if (!session) MUST(pylora_session_open(model(), 8, &session, &why) == PYLORA_OK);
  MUST(pylora_model_about(model())->vocab <= 64 && pylora_adapter_entry(adapter, 0));
  pylora_session_clear(session);
  const int status =
      pylora_session_forward(session, pylora_adapter_struct(adapter), ids, 2, logits, &why);
  check_message(status, &why);
}

static int peft(const uint8_t *bytes, size_t size, pylora_part *part, pylora_adapter_file **out,
                pylora_message *why) {
  if (size < 2) return pylora_fail(why, PYLORA_E_FILE, "too short");
  const size_t n = load16(bytes);
  if (n > size - 2) return pylora_fail(why, PYLORA_E_FILE, "too short");
  pylora_lora_config config;
  pylora_file *file = NULL;
  int status = pylora_lora_config_parse("config", (const char *)bytes + 2, n, &config, why);
  if (!status) status = pylora_plan(model(), &config, part, why);
  if (!status) status = pylora_file_open_memory("tensors", bytes + 2 + n, size - 2 - n, &file, why);
  if (!status) status = pylora_peft_match(model(), file, part, why);
  if (!status) status = pylora_adapter_make(model(), file, part, out, why);
  pylora_file_close(file);
  pylora_lora_config_free(&config);
  return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  if (!size) return 0;
  pylora_message why = {""};
  pylora_adapter_file *adapter = NULL;
  int status;
  if (bytes[0] == 0) {
    status = pylora_adapter_open(model(), path_of(bytes + 1, size - 1), &adapter, &why);
  } else {
    pylora_part *part = calloc((size_t)pylora_module_count(model()), sizeof *part);
    MUST(part);
    status = peft(bytes + 1, size - 1, part, &adapter, &why);
    free(part);
  }
  check_message(status, &why);
  if (!status) apply(adapter);
  pylora_adapter_close(adapter);
  return 0;
}
