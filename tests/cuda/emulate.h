/* emulate.h - the names of CUDA that csrc/cuda/device.cuh lists, for the host's compiler: kernels become
 * functions, the threads of a block are fibers (emulate.cpp).
 *
 * What it checks, beside computing: barriers and warp operations that not every thread reaches (the launch fails with
 * a sentence), memory outside a block's shared arrays (each is allocated to the byte, for a sanitizer), shared
 * memory read before it is written (it holds NaN), copies used before they are waited for (NaN until then),
 * alignment of vector copies, and, by changing the order of the threads, barriers that are missing.
 * What it will not do: timing, caches, more than one device. */
#ifndef PYLORA_EMULATE_H
#define PYLORA_EMULATE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EMULATED_API extern "C" __attribute__((visibility("default")))

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1)
      : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
static inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
  return {x, y, z, w};
}

/* Those of the thread that runs now. */
struct EmulatedPlace {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern __attribute__((visibility("default"),
                      tls_model("initial-exec"))) thread_local EmulatedPlace emulated_place;
#define threadIdx (emulated_place.thread)
#define blockIdx (emulated_place.block)
#define blockDim (emulated_place.block_dim)
#define gridDim (emulated_place.grid_dim)

/* ---- shared memory: each array of a block is its own allocation, NaN at the block's start --- */

EMULATED_API void *emulated_shared(const void *site, size_t bytes);
EMULATED_API void *emulated_dynamic_shared(void);
#define SHARED(T, name, n) \
  static char name##_;     \
  T(&name)[n] = *(T(*)[n])emulated_shared(&name##_, sizeof(T) * (n))
#define DYNAMIC_SHARED(T, name) T *const name = (T *)emulated_dynamic_shared()

/* ---- barriers and what a warp does together ------------------------------------------------ */

struct EmulatedSite { /* where in the source */
  const char *file;
  int line;
  const char *what;
};
#define EMULATED_SITE(what) \
  EmulatedSite { __FILE__, __LINE__, what }

EMULATED_API void emulated_syncthreads(EmulatedSite site);
/* Every lane gives `mine`; once all 32 have, complete() gets them in the order of the lanes. */
EMULATED_API void emulated_together(EmulatedSite site, uint32_t mask, void *mine,
                                    void (*complete)(void **lanes));
/* Ends the launch with this sentence as its error; does not return. */
EMULATED_API void emulated_fail(EmulatedSite site, const char *why) __attribute__((noreturn));

#define __syncthreads() emulated_syncthreads(EMULATED_SITE("__syncthreads"))

enum EmulatedShuffle { EMULATED_FROM, EMULATED_XOR, EMULATED_DOWN };
EMULATED_API uint64_t emulated_exchange(EmulatedSite site, EmulatedShuffle kind, uint32_t mask,
                                        uint64_t bits, int arg, int width);
EMULATED_API uint32_t emulated_ballot(EmulatedSite site, uint32_t mask, int predicate);
EMULATED_API void emulated_syncwarp(EmulatedSite site, uint32_t mask);

template <typename T>
static inline T emulated_shuffle(EmulatedSite site, EmulatedShuffle kind, uint32_t mask, T x,
                                 int arg, int width = 32) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  bits = emulated_exchange(site, kind, mask, bits, arg, width);
  memcpy(&x, &bits, sizeof x);
  return x;
}
#define __shfl_sync(...) emulated_shuffle(EMULATED_SITE("__shfl_sync"), EMULATED_FROM, __VA_ARGS__)
#define __shfl_xor_sync(...) \
  emulated_shuffle(EMULATED_SITE("__shfl_xor_sync"), EMULATED_XOR, __VA_ARGS__)
#define __shfl_down_sync(...) \
  emulated_shuffle(EMULATED_SITE("__shfl_down_sync"), EMULATED_DOWN, __VA_ARGS__)
#define __ballot_sync(mask, predicate) \
  emulated_ballot(EMULATED_SITE("__ballot_sync"), mask, (predicate) ? 1 : 0)
#define __syncwarp(...) emulated_syncwarp(EMULATED_SITE("__syncwarp"), emulated_mask(__VA_ARGS__))
static inline uint32_t emulated_mask(uint32_t mask = 0xffffffffu) { return mask; }

/* ---- numbers --------------------------------------------------------------------------- */

static inline float emulated_float_of_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
static inline uint32_t emulated_bits_of_float(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
EMULATED_API float emulated_widen_f16(uint16_t h);
EMULATED_API uint16_t emulated_round_f16(float f); /* to nearest even */

/* ---- copies beside the arithmetic, tensor cores ------------------------------------------ */

/* Done as late as the rules allow: by the wait that asks for it; NaN until then. */
EMULATED_API void emulated_copy_async(EmulatedSite site, void *shared, const void *global,
                                      int bytes);
EMULATED_API void emulated_copy_async_commit(void);
EMULATED_API void emulated_copy_async_wait(int n);
#define emulated_copy_async16(...) emulated_copy_async(EMULATED_SITE("copy_async16"), __VA_ARGS__)

EMULATED_API void emulated_mma(EmulatedSite site, bool bf16, float *d, const uint32_t *a,
                               const uint32_t *b);
#define emulated_mma_16816(...) emulated_mma(EMULATED_SITE("mma_16816"), __VA_ARGS__)
EMULATED_API void emulated_load_matrix(EmulatedSite site, bool transposed, uint32_t *r,
                                       const void *shared);
#define emulated_load_matrix_x4(...) \
  emulated_load_matrix(EMULATED_SITE("load_matrix_x4"), __VA_ARGS__)

#endif
