/* host.h - what the host's side of the GPU operations shares: the context, checks, the workspace, launches.
 *
 * Included by the .cu files that define the functions of pylora_cuda.h, after the kernels that they launch. */
#ifndef PYLORA_CUDA_HOST_H
#define PYLORA_CUDA_HOST_H

#include <cuda_runtime.h>
#include <math.h>
#include <mutex>
#include <stddef.h>

#include "device.cuh"
#include "pylora_cuda.h"

#define TRY(expr)                \
  do {                           \
    int status_ = (expr);        \
    if (status_) return status_; \
  } while (0)

struct Products; /* products.cu: cuBLASLt and the algorithms found for the shapes seen */

struct pylora_cuda {
  int device, multiprocessors, major, minor;
  size_t max_shared; /* bytes of shared memory that a block may ask for */
  int64_t l2_bytes;
  bool tf32;
  int32_t *bad; /* of the device: not 0 once a kernel met an index out of range */
  Products *products;
};

/* Keeps the sentence "what: why" for pylora_cuda_error() and gives PYLORA_E_DEVICE; PYLORA_OK for success. */
int device_status(const char *what, cudaError_t error);
int device_failure(const char *what, const char *why);

/* The part of a context that is products.cu's: g->products.  Closing what was never opened is nothing. */
int products_open(pylora_cuda *g, const char *cublaslt);
void products_close(pylora_cuda *g);
/* The version of the cuBLASLt that this process has loaded; 0: none yet. */
int products_version(void);

/* Makes the context's device the thread's own for as long as this lives. */
struct OnDevice {
  int before;
  explicit OnDevice(const pylora_cuda *g) {
    if (cudaGetDevice(&before) != cudaSuccess) before = -1;
    if (before != g->device) cudaSetDevice(g->device);
    if (before == g->device) before = -1;
  }
  ~OnDevice() {
    if (before >= 0) cudaSetDevice(before);
  }
};

/* Lets a kernel have `shared` bytes besides its arrays of a known size: together, 48 kB are what a kernel may have that
 * has not asked.  What was once allowed stays so: another thread may be about to launch the same kernel with more. */
static inline cudaError_t allow_shared(const void *kernel, size_t shared) {
  enum { NEVER_TOO_MUCH = 16 * 1024 }; /* no kernel has 32 kB of known size and this, too */
  if (shared <= NEVER_TOO_MUCH) return cudaSuccess;
  static std::mutex lock;
  const std::lock_guard<std::mutex> held(lock);
  cudaFuncAttributes is;
  const cudaError_t error = cudaFuncGetAttributes(&is, kernel);
  if (error != cudaSuccess) return error;
  const size_t allowed = (size_t)is.maxDynamicSharedSizeBytes;
  if (shared <= allowed && (allowed > 48 * 1024 || is.sharedSizeBytes + shared <= 48 * 1024))
    return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
}

/* Queues a kernel; a grid without blocks is nothing to do.  `what` is its name. */
template <typename... P, typename... A>
static inline int launch(const char *what, void (*kernel)(P...), dim3 grid, dim3 block,
                         size_t shared, void *stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return PYLORA_OK;
  TRY(device_status(what, allow_shared((const void *)kernel, shared)));
#ifdef PYLORA_EMULATE
  return device_status(
      what, emulated_launch(what, kernel, grid, block, shared, (cudaStream_t)stream, (P)args...));
#else
  kernel<<<grid, block, shared, (cudaStream_t)stream>>>((P)args...);
  return device_status(what, cudaGetLastError());
#endif
}
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  TRY(launch(#kernel, kernel, grid, block, shared, stream, __VA_ARGS__))

/* ---- checks ------------------------------------------------------------------------------ */

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* As check_mat16 of ../internal.h, with float16 as well. */
static inline int check_view(const pylora_mat *a, int64_t rows, int64_t cols, bool out) {
  if (!a) return PYLORA_E_NULL;
  if (a->rows != rows || a->cols != cols || rows < 0 || cols < 0) return PYLORA_E_SHAPE;
  if ((a->p != NULL) + (a->b != NULL) + (a->h != NULL) > 1) return PYLORA_E_VALUE;
  if (rows == 0 || cols == 0) return PYLORA_OK;
  if (!a->p && !a->b && !a->h) return PYLORA_E_NULL;
  if (out && rows > 1 && a->ld < cols && a->ld > -cols) return PYLORA_E_SHAPE;
  return PYLORA_OK;
}

static inline View view_of(const pylora_mat *a) {
  View v = {NULL, 0, 0, 0, PYLORA_F32};
  if (!a) return v;
  v.p = a->p ? (void *)a->p : a->b ? (void *)a->b : (void *)a->h;
  v.rows = a->rows, v.cols = a->cols, v.ld = a->ld;
  v.dtype = a->b ? PYLORA_BF16 : a->h ? PYLORA_F16 : PYLORA_F32;
  return v;
}

static inline size_t bytes_of(int dtype) { return dtype == PYLORA_F32 ? 4 : 2; }

/* Whether every row of a view can be read in vectors of n elements (load4, or 16 bytes). */
static inline bool vectors_fit(const View &v, int n) {
  const size_t size = n * bytes_of(v.dtype);
  return v.cols % n == 0 && (v.ld % n == 0 || v.rows <= 1) && (uintptr_t)v.p % size == 0;
}

#define PYLORA_MAGIC_CUDA 0x504c4731u /* "PLG1": packed by pylora_cuda_pack */

/* ---- the caller's workspace -------------------------------------------------------------- */

struct Arena {
  char *p, *end;
  Arena(void *ws, size_t bytes) {
    p = (char *)(((uintptr_t)ws + 255) & ~(uintptr_t)255);
    end = (char *)ws + (ws ? bytes : 0);
  }
  /* NULL if the workspace is too small. */
  void *take(size_t bytes) {
    bytes = (bytes + 255) & ~(size_t)255;
    if (!p || p > end || (size_t)(end - p) < bytes) return NULL;
    void *r = p;
    p += bytes;
    return r;
  }
};
/* What query functions add up: the bytes that `take` uses up, and 256 for the first alignment. */
static inline size_t arena_size(size_t bytes) { return (bytes + 255) & ~(size_t)255; }

#endif
