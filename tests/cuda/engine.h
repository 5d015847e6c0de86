/* engine.h - what the parts of the emulation tell each other. */
#ifndef PYLORA_ENGINE_H
#define PYLORA_ENGINE_H

#include "cuda_runtime.h"

/* The device that is emulated: PYLORA_EMULATE_DEVICE=h100 (default), a100, v100 or none. */
struct EmulatedDevice {
  const char *name;
  int count, major, minor, multiprocessors;
  size_t shared_bytes, l2_bytes, total_bytes;
};
__attribute__((visibility("default"))) const EmulatedDevice &emulated_device();

/* Fails unless p .. p + bytes is shared memory of the block, 16-byte aligned. */
EMULATED_API void emulated_check_shared(EmulatedSite site, const void *p, size_t bytes);
/* The sentence of this thread's last launch that failed. */
EMULATED_API const char *emulated_error_text(void);

#endif
