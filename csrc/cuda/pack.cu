/* pack.cu - pylora_cuda_pack: a frozen weight as the products take it, row-major and of one type. */
#include "host.h"

static bool known(int32_t dtype) {
  return dtype == PYLORA_F32 || dtype == PYLORA_BF16 || dtype == PYLORA_F16;
}

size_t pylora_cuda_pack_bytes(int32_t dtype, int64_t d, int64_t k) {
  const int64_t most = (int64_t)1 << 40;
  if (!known(dtype) || d < 0 || k < 0 || d > most || k > most) return 0;
  if ((double)d * (double)k > 1e17) return 0;
  return (size_t)max64(256, d * k * (int64_t)bytes_of(dtype));
}

int pylora_cuda_pack(pylora_cuda *g, void *stream, int32_t dtype, const pylora_mat *W, void *buffer,
                     pylora_packed *out) {
  if (!g || !W || !out) return PYLORA_E_NULL;
  if (!known(dtype)) return PYLORA_E_UNSUPPORTED;
  TRY(check_view(W, W->rows, W->cols, false));
  if (!pylora_cuda_pack_bytes(dtype, W->rows, W->cols)) return PYLORA_E_SHAPE;
  const View from = view_of(W);
  const bool empty = W->rows == 0 || W->cols == 0;
  if (!buffer && !empty) return PYLORA_E_NULL;
  const bool itself = buffer == from.p && from.dtype == dtype && (W->rows <= 1 || W->ld == W->cols);
  if (!itself && (uintptr_t)buffer % 256) return PYLORA_E_VALUE;
  if (!itself && !empty) {
    pylora_mat to = {NULL, W->rows, W->cols, W->cols, NULL, NULL};
    if (dtype == PYLORA_F32)
      to.p = (float *)buffer;
    else if (dtype == PYLORA_BF16)
      to.b = (uint16_t *)buffer;
    else
      to.h = (uint16_t *)buffer;
    TRY(pylora_cuda_cast(g, stream, W, &to));
  }
  *out = {PYLORA_MAGIC_CUDA, dtype, W->rows, W->cols, buffer};
  return PYLORA_OK;
}
