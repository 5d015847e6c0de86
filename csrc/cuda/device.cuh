/* device.cuh - what the kernels share: numbers in three types, sums over a warp and a block, copies and
 * products of the tensor cores behind plain names.
 *
 * Three compilers read the kernels: nvcc, NVRTC (from CuPy, hence no header of the system), and the
 * host's, over an emulation (PYLORA_EMULATE) that defines the names of CUDA that stand here, and checks them.
 * So kernels use no CUDA feature but these: threadIdx, blockIdx, blockDim, gridDim, __syncthreads,
 * __syncwarp, __shfl_sync, __shfl_xor_sync, __shfl_down_sync, __ballot_sync (full warps), SHARED, DYNAMIC_SHARED, float2,
 * float4, uint2, uint4, __restrict__, __launch_bounds__, __grid_constant__, <math.h>'s functions, and the functions of this file.
 * No atomics on floats anywhere: sums have one order. */
#ifndef PYLORA_DEVICE_CUH
#define PYLORA_DEVICE_CUH

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
enum { PYLORA_F32 = 0, PYLORA_BF16 = 1, PYLORA_F16 = 2 }; /* pylora.h */
#define PYLORA_IGNORE (-100)
#else
#include <stdint.h>

#include "pylora.h"
#endif

#ifdef PYLORA_EMULATE
#include "emulate.h"
#else
/* Memory that the threads of a block share: n elements of T, known when it is compiled; or as many
 * bytes as the launch says, 16-byte aligned. */
#define SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) uint8_t pylora_dynamic[]; \
  T *const name = (T *)pylora_dynamic
#endif

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
/* Before a loop over an array that must be in registers: left as a loop, its index would put it into memory. */
#ifdef PYLORA_EMULATE
#define UNROLL
#define ROLLED
#else
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#endif

enum { WARP = 32 };
#define ALL_LANES 0xffffffffu

/* A matrix as a kernel gets it: pylora_mat with one pointer and a type. */
struct View {
  void *p;
  int64_t rows, cols, ld;
  int32_t dtype; /* PYLORA_F32, BF16 or F16 */
};

/* ---- numbers ---------------------------------------------------------------------------- */

DEVICE float float_of_bits(uint32_t u) {
#ifdef PYLORA_EMULATE
  return emulated_float_of_bits(u);
#else
  return __uint_as_float(u);
#endif
}
DEVICE uint32_t bits_of_float(float f) {
#ifdef PYLORA_EMULATE
  return emulated_bits_of_float(f);
#else
  return __float_as_uint(f);
#endif
}

DEVICE float widen_bf16(uint16_t x) { return float_of_bits((uint32_t)x << 16); }
/* To nearest even; NaN stays NaN. */
DEVICE uint16_t round_bf16(float f) {
  const uint32_t u = bits_of_float(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
DEVICE float widen_f16(uint16_t x) {
#ifdef PYLORA_EMULATE
  return emulated_widen_f16(x);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
#endif
}
DEVICE uint16_t round_f16(float f) {
#ifdef PYLORA_EMULATE
  return emulated_round_f16(f);
#else
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#endif
}

/* One element, whatever its type.  The branch is the same for all threads of a launch. */
DEVICE float load(const void *p, int dtype, int64_t i) {
  if (dtype == PYLORA_F32) return ((const float *)p)[i];
  const uint16_t x = ((const uint16_t *)p)[i];
  return dtype == PYLORA_BF16 ? widen_bf16(x) : widen_f16(x);
}
DEVICE void store(void *p, int dtype, int64_t i, float f) {
  if (dtype == PYLORA_F32)
    ((float *)p)[i] = f;
  else
    ((uint16_t *)p)[i] = dtype == PYLORA_BF16 ? round_bf16(f) : round_f16(f);
}
/* Four side by side; p + i must be aligned to four elements (vectors_fit, host.h). */
DEVICE float4 load4(const void *p, int dtype, int64_t i) {
  if (dtype == PYLORA_F32) return *(const float4 *)((const float *)p + i);
  const uint2 u = *(const uint2 *)((const uint16_t *)p + i);
  float4 f;
  if (dtype == PYLORA_BF16) {
    f.x = float_of_bits(u.x << 16), f.y = float_of_bits(u.x & 0xffff0000u);
    f.z = float_of_bits(u.y << 16), f.w = float_of_bits(u.y & 0xffff0000u);
  } else {
    f.x = widen_f16((uint16_t)u.x), f.y = widen_f16((uint16_t)(u.x >> 16));
    f.z = widen_f16((uint16_t)u.y), f.w = widen_f16((uint16_t)(u.y >> 16));
  }
  return f;
}
DEVICE void store4(void *p, int dtype, int64_t i, float4 f) {
  if (dtype == PYLORA_F32) {
    *(float4 *)((float *)p + i) = f;
    return;
  }
  uint2 u;
  if (dtype == PYLORA_BF16) {
    u.x = round_bf16(f.x) | (uint32_t)round_bf16(f.y) << 16;
    u.y = round_bf16(f.z) | (uint32_t)round_bf16(f.w) << 16;
  } else {
    u.x = round_f16(f.x) | (uint32_t)round_f16(f.y) << 16;
    u.y = round_f16(f.z) | (uint32_t)round_f16(f.w) << 16;
  }
  *(uint2 *)((uint16_t *)p + i) = u;
}

DEVICE float quiet_nan(void) { return float_of_bits(0x7fc00000u); }

/* ---- sums ------------------------------------------------------------------------------- */

/* Over the 32 lanes of a warp, in one order; every lane has the result. */
template <typename T> DEVICE T warp_sum(T x) {
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
DEVICE float warp_max(float x) {
  for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}
/* Over a block of one dimension, a whole number of warps, at most 1024 threads.  `scratch` holds 32 elements of
 * shared memory, which may be used again right after. */
template <typename T> DEVICE T block_sum(T x, T *scratch) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < warps; i++) x += scratch[i];
  __syncthreads();
  return x;
}
DEVICE float block_max(float x, float *scratch) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  x = warp_max(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < warps; i++) x = fmaxf(x, scratch[i]);
  __syncthreads();
  return x;
}

/* ---- doubles without contraction (merge: the same bits as on every other machine) -------- */

DEVICE double add_rn(double a, double b) {
#ifdef PYLORA_EMULATE
  return a + b; /* compiled with -ffp-contract=off */
#else
  return __dadd_rn(a, b);
#endif
}
DEVICE double mul_rn(double a, double b) {
#ifdef PYLORA_EMULATE
  return a * b;
#else
  return __dmul_rn(a, b);
#endif
}

/* ---- copies into shared memory that run beside the arithmetic ---------------------------- */

/* 16 bytes, both sides 16-byte aligned; `bytes` < 16 (a multiple of 4, 0 too): the rest is zeros. */
DEVICE void copy_async16(void *shared, const void *global, int bytes) {
#ifdef PYLORA_EMULATE
  emulated_copy_async16(shared, global, bytes);
#else
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#endif
}
/* Ends a group of copies; a thread then waits until at most `N` of its latest groups are under way.  Other threads
 * see the copies after a __syncthreads that follows the wait. */
DEVICE void copy_async_commit(void) {
#ifdef PYLORA_EMULATE
  emulated_copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> DEVICE void copy_async_wait(void) {
#ifdef PYLORA_EMULATE
  emulated_copy_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* ---- products of the tensor cores -------------------------------------------------------- */

/* d [16,8] += a [16,16] b [16,8], bf16 or f16 factors, float32 sums, by the 32 lanes of a warp together.
 * With group = lane / 4, pair = lane % 4, a lane holds (PTX ISA, mma.m16n8k16), two numbers a word, the lower column
 * or row in the lower half:
 *   a[0]: row group,     columns 2 pair, +1      a[1]: row group + 8, the same columns
 *   a[2]: row group,     columns 2 pair + 8, +9  a[3]: row group + 8, those
 *   b[0]: rows 2 pair, +1 of column group        b[1]: rows 2 pair + 8, +9 of column group
 *   d[0], d[1]: row group, columns 2 pair, +1    d[2], d[3]: row group + 8, the same columns */
template <int DTYPE>
DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef PYLORA_EMULATE
  emulated_mma_16816(DTYPE == PYLORA_BF16, d, a, b);
#else
  if (DTYPE == PYLORA_BF16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* Four 8x8 matrices of 16-bit numbers out of shared memory: lane i gives the address of row i % 8 of matrix
 * i / 8 (16-byte aligned), and gets of each matrix row lane / 4, columns 2 (lane % 4), +1; with `transposed`
 * of each matrix's transpose. */
template <bool transposed> DEVICE void load_matrix_x4(uint32_t (&r)[4], const void *shared) {
#ifdef PYLORA_EMULATE
  emulated_load_matrix_x4(transposed, r, shared);
#else
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(shared);
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
#endif
}

/* ---- counts ------------------------------------------------------------------------------ */

/* *p += n by any number of threads: of whole numbers the order does not matter. */
DEVICE void add_count(int64_t *p, int64_t n) {
#ifdef PYLORA_EMULATE
  *p += n;
#else
  atomicAdd((unsigned long long *)p, (unsigned long long)n);
#endif
}

/* ---- what a kernel cannot return --------------------------------------------------------- */

/* An index was out of range: pylora_cuda_check says so later.  Any order of these writes leaves the same. */
DEVICE void flag_bad_index(int32_t *bad) {
  if (bad) *(volatile int32_t *)bad = 1;
}

#endif
