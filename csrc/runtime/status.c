/* status.c - a sentence for every status. */
#include "pylora.h"

const char *pylora_status_text(int status) {
  switch (status) {
  case PYLORA_OK:
    return "success";
  case PYLORA_E_NULL:
    return "a required pointer is NULL";
  case PYLORA_E_SHAPE:
    return "the shapes do not fit each other, or a size is negative or too large";
  case PYLORA_E_WORKSPACE:
    return "the workspace is smaller than its query function says";
  case PYLORA_E_INDEX:
    return "a token id, label or position is out of range";
  case PYLORA_E_VALUE:
    return "a scalar argument is out of its domain";
  case PYLORA_E_UNSUPPORTED:
    return "this build, this processor or this operation does not support it";
  case PYLORA_E_PACKED:
    return "the packed weight was not made by pylora_pack";
  case PYLORA_E_THREADS:
    return "the threads could not be started";
  case PYLORA_E_DEVICE:
    return "the GPU, its driver or cuBLAS reported an error; pylora_cuda_error() says which";
  case PYLORA_E_FILE:
    return "the file is missing, damaged or of another kind; the message says which and why";
  case PYLORA_E_PLAN:
    return "the adapter does not fit the model; the message names what does not";
  case PYLORA_E_MEMORY:
    return "there is no memory left";
  default:
    return "unknown status";
  }
}

int pylora_abi_version(void) { return PYLORA_ABI_VERSION; }
