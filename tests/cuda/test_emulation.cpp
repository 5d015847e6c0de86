/* test_emulation.cpp - the emulation itself: right kernels compute what they should in every order of the threads, and
 * kernels that are wrong on purpose are caught. */
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "device.cuh"
#include "host.h"

static int failures;
#define EXPECT(condition)                                            \
  do {                                                               \
    if (!(condition)) {                                              \
      printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      failures++;                                                    \
    }                                                                \
  } while (0)

template <typename... P, typename... A>
static cudaError_t run(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... args) {
  return emulated_launch("test", kernel, grid, block, shared, nullptr, (P)args...);
}
static bool error_says(cudaError_t error, const char *part) {
  const std::string text = cudaGetErrorString(error);
  if (error == cudaErrorLaunchFailure && text.find(part) != std::string::npos) return true;
  printf("error %d: %s\n", (int)error, text.c_str());
  return false;
}
/* Each order once, and 20 random ones. */
template <typename F> static void each_order(F f) {
  for (int i = 0; i < 22; i++) {
    emulated_set_order(i < 2 ? i : EMULATED_RANDOM, (uint64_t)i);
    f();
  }
}

/* ---- right kernels ---- */

KERNEL reversed_in_block(const float *x, float *y, int64_t n) {
  SHARED(float, tile, 64);
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = tile[blockDim.x - 1 - threadIdx.x];
}
KERNEL place_3d(int32_t *y) {
  const unsigned int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] += (int32_t)(1000 * block + thread);
}
KERNEL sums(const float *x, float *y, double *total) {
  SHARED(float, scratch, 32);
  SHARED(double, scratch2, 32);
  const float v = x[threadIdx.x];
  const float all = block_sum(v, scratch), most = block_max(v, scratch);
  const double twice = block_sum((double)v * 2, scratch2);
  y[threadIdx.x] = all + most;
  total[threadIdx.x] = twice;
}
KERNEL shuffles(uint32_t *y) {
  const int lane = threadIdx.x % 32;
  y[lane] = __shfl_sync(ALL_LANES, (uint32_t)lane, 5) + 100 * __shfl_xor_sync(ALL_LANES, lane, 3) +
            10000 * __shfl_down_sync(ALL_LANES, lane, 4);
  y[32 + lane] = __ballot_sync(ALL_LANES, lane % 3 == 0);
  y[64 + lane] = __shfl_sync(ALL_LANES, lane, 1, 8);
  __syncwarp();
}
template <int D, bool transposed>
static void product(const uint16_t *A, const uint16_t *B, float *d) {
  SHARED(uint16_t, a_tile, 16 * 16);
  SHARED(uint16_t, b_tile, 16 * 16);
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  for (int i = lane; i < 256; i += 32) a_tile[i] = A[i], b_tile[i] = i < 128 ? B[i] : 0;
  __syncwarp();
  uint32_t a[4], b4[4];
  /* matrices: rows 0-7 and 8-15 of columns 0-7, then of 8-15; b is [16,8], or [8,16] when not transposed. */
  load_matrix_x4<false>(a, a_tile + (lane % 16) * 16 + lane / 16 * 8);
  if (transposed)
    load_matrix_x4<true>(b4, b_tile + (lane % 16) * 8);
  else
    load_matrix_x4<false>(b4, b_tile + (lane % 8) * 16 + lane / 8 % 2 * 8);
  const uint32_t b[2] = {b4[0], b4[1]};
  float sum[4] = {1, 1, 1, 1};
  mma_16816<D>(sum, a, b);
  d[group * 8 + 2 * pair] = sum[0], d[group * 8 + 2 * pair + 1] = sum[1];
  d[(group + 8) * 8 + 2 * pair] = sum[2], d[(group + 8) * 8 + 2 * pair + 1] = sum[3];
}
KERNEL product_bf16(const uint16_t *A, const uint16_t *B, float *d) {
  product<PYLORA_BF16, true>(A, B, d);
}
KERNEL product_f16(const uint16_t *A, const uint16_t *B, float *d) {
  product<PYLORA_F16, false>(A, B, d);
}
/* Two stages of copies; `waits`, `barrier`: what a wrong kernel leaves out. */
template <bool waits, bool barrier>
static void copied(const float *x, float *y, int tiles, int last) {
  DYNAMIC_SHARED(float, tile);
  const int t = threadIdx.x;
  copy_async16(tile + 4 * t, x + 4 * t, 16);
  copy_async_commit();
  for (int i = 0; i < tiles; i++) {
    float *now = tile + i % 2 * 128, *next = tile + (i + 1) % 2 * 128;
    if (i + 1 < tiles)
      copy_async16(next + 4 * t, x + (i + 1) * 128 + 4 * t, i + 2 < tiles || t < 31 ? 16 : last);
    copy_async_commit();
    if (waits) copy_async_wait<1>();
    if (barrier) __syncthreads();
    for (int j = 0; j < 4; j++) y[i * 128 + 4 * t + j] = now[127 - (4 * t + j)];
    __syncthreads();
  }
}
KERNEL copied_right(const float *x, float *y, int tiles, int last) {
  copied<true, true>(x, y, tiles, last);
}

static void test_right(void) {
  std::vector<float> x(1000), y(1000);
  for (size_t i = 0; i < x.size(); i++) x[i] = (float)i;
  each_order([&] {
    EXPECT(run(reversed_in_block, dim3(16), dim3(64), 0, x.data(), y.data(), 1000) == cudaSuccess);
    for (int i = 0; i < 1000; i++) {
      const int from = i / 64 * 64 + 63 - i % 64;
      EXPECT(y[i] == (from < 1000 ? from : 0));
    }
    std::vector<int32_t> at(2 * 3 * 2 * 5 * 2 * 3, 0);
    EXPECT(run(place_3d, dim3(2, 3, 2), dim3(5, 2, 3), 0, at.data()) == cudaSuccess);
    for (size_t i = 0; i < at.size(); i++) EXPECT(at[i] == (int)(i / 30 * 1000 + i % 30));
    std::vector<double> total(256);
    EXPECT(run(sums, dim3(1), dim3(256), 0, x.data(), y.data(), total.data()) == cudaSuccess);
    for (int i = 0; i < 256; i++) EXPECT(y[i] == 32640 + 255 && total[i] == 65280);
    std::vector<uint32_t> lanes(96);
    EXPECT(run(shuffles, dim3(1), dim3(32), 0, lanes.data()) == cudaSuccess);
    for (unsigned i = 0; i < 32; i++) {
      EXPECT(lanes[i] == 5 + 100 * (i ^ 3) + 10000 * (i + 4 < 32 ? i + 4 : i));
      EXPECT(lanes[32 + i] == 0x49249249u);
      EXPECT(lanes[64 + i] == i / 8 * 8 + 1);
    }
  });
}

static void test_products(void) {
  for (int f16 = 0; f16 < 2; f16++)
    each_order([&] {
      std::vector<uint16_t> A(256), B(128);
      std::vector<float> a(256), b(128), d(128);
      for (int i = 0; i < 256; i++) a[i] = (float)((i * 37) % 23 - 11);
      for (int i = 0; i < 128; i++) b[i] = (float)((i * 29) % 19 - 9); /* [16,8] */
      for (int i = 0; i < 256; i++) A[i] = f16 ? round_f16(a[i]) : round_bf16(a[i]);
      for (int i = 0; i < 128; i++)
        if (f16)
          B[i % 8 * 16 + i / 8] = round_f16(b[i]);
        else
          B[i] = round_bf16(b[i]);
      EXPECT(run(f16 ? product_f16 : product_bf16, dim3(1), dim3(32), 0, A.data(), B.data(),
                 d.data()) == cudaSuccess);
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
          float sum = 1;
          for (int k = 0; k < 16; k++) sum += a[i * 16 + k] * b[k * 8 + j];
          EXPECT(d[i * 8 + j] == sum);
        }
    });
}

static void test_copies(void) {
  alignas(16) float x[4 * 128];
  for (int i = 0; i < 512; i++) x[i] = (float)i + 1;
  each_order([&] {
    float y[512];
    EXPECT(run(copied_right, dim3(1), dim3(32), 2 * 128 * sizeof(float), x, y, 4, 8) ==
           cudaSuccess);
    for (int i = 0; i < 512; i++) {
      const int from = i / 128 * 128 + 127 - i % 128;
      EXPECT(y[i] == (from < 510 ? x[from] : 0)); /* of the last 16 bytes, 8 were copied */
    }
  });
}

/* ---- wrong kernels ---- */

KERNEL no_barrier(const float *x, float *y) {
  SHARED(float, tile, 64);
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];
}
/* The barrier that keeps a fast thread from overwriting what a slow one has yet to read. */
KERNEL no_second_barrier(const float *x, float *y) {
  SHARED(float, tile, 64);
  for (int i = 0; i < 3; i++) {
    tile[threadIdx.x] = x[threadIdx.x] + i;
    __syncthreads();
    y[64 * i + threadIdx.x] = tile[63 - threadIdx.x];
  }
}
KERNEL one_stays_away(float *y) {
  if (threadIdx.x != 40) __syncthreads();
  y[threadIdx.x] = 1;
}
KERNEL one_ends_early(float *y) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
KERNEL two_barriers(float *y) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}
KERNEL lane_missing(float *y) {
  float x = 1;
  if (threadIdx.x != 7) x += __shfl_xor_sync(ALL_LANES, x, 1);
  y[threadIdx.x] = x;
}
KERNEL two_shuffles(float *y) {
  float x = 1;
  if (threadIdx.x < 16)
    x += __shfl_xor_sync(ALL_LANES, x, 1);
  else
    x += __shfl_xor_sync(ALL_LANES, x, 1);
  y[threadIdx.x] = x;
}
KERNEL half_mask(float *y) { y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }
KERNEL half_warp(float *y) { y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1); }
KERNEL copied_no_wait(const float *x, float *y, int tiles, int last) {
  copied<false, true>(x, y, tiles, last);
}
KERNEL copied_no_barrier(const float *x, float *y, int tiles, int last) {
  copied<true, false>(x, y, tiles, last);
}
KERNEL copied_elsewhere(const float *x, float *y) { copy_async16(y, x, 16); }
KERNEL copied_crooked(const float *x) {
  SHARED(float, tile, 8);
  copy_async16(tile + 1, x, 16);
}
KERNEL loaded_elsewhere(const float *x, uint32_t *y) {
  uint32_t r[4];
  load_matrix_x4<false>(r, x);
  y[threadIdx.x] = r[0];
}
KERNEL outside_shared(float *y, int i) {
  SHARED(float, tile, 33);
  float *p = tile;
  p[threadIdx.x] = 1;
  if (threadIdx.x == 0) y[0] = p[i];
}
KERNEL outside_dynamic(float *y, int i) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1;
  if (threadIdx.x == 0) y[0] = tile[i];
}
KERNEL unwritten(float *y) {
  SHARED(float, tile, 32);
  if (blockIdx.x == 0) tile[threadIdx.x] = 5;
  y[32 * blockIdx.x + threadIdx.x] = tile[threadIdx.x];
}
KERNEL little_shared(float *y) {
  DYNAMIC_SHARED(float, rest);
  SHARED(float, own, 4);
  own[0] = 1, rest[0] = 2;
  y[0] = own[0] + rest[0];
}
KERNEL too_much_shared(float *y) {
  SHARED(float, tile, 13000);
  y[0] = tile[0] = 1;
}
/* The words of a in the order that reads best, which is not the one of the instruction. */
KERNEL wrong_layout(const uint16_t *A, float *d) {
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  const uint32_t *words = (const uint32_t *)A;
  const uint32_t a[4] = {words[group * 8 + pair], words[group * 8 + pair + 4],
                         words[(group + 8) * 8 + pair], words[(group + 8) * 8 + pair + 4]};
  const uint32_t b[2] = {0x3f803f80u, 0};
  float sum[4] = {0, 0, 0, 0};
  mma_16816<PYLORA_BF16>(sum, a, b);
  d[group] = sum[0], d[group + 8] = sum[2];
}

static void test_missing_barriers(void) {
  std::vector<float> x(64), y(192);
  for (int i = 0; i < 64; i++) x[i] = (float)i;
  int first = 0, second = 0;
  each_order([&] {
    EXPECT(run(no_barrier, dim3(1), dim3(64), 0, x.data(), y.data()) == cudaSuccess);
    bool right = true;
    for (int i = 0; i < 64; i++) right &= y[i] == 63 - i;
    first += !right;
    EXPECT(run(no_second_barrier, dim3(1), dim3(64), 0, x.data(), y.data()) == cudaSuccess);
    right = true;
    for (int i = 0; i < 192; i++) right &= y[i] == 63 - i % 64 + i / 64;
    second += !right;
  });
  EXPECT(first == 22);
  EXPECT(second == 22);
}

static void test_divergence(void) {
  std::vector<float> y(64);
  each_order([&] {
    EXPECT(error_says(run(one_stays_away, dim3(2), dim3(64), 0, y.data()), "thread (40, 0, 0)"));
    EXPECT(error_says(run(one_ends_early, dim3(2), dim3(64), 0, y.data()), "has ended"));
    EXPECT(error_says(run(two_barriers, dim3(2), dim3(64), 0, y.data()), "does not come"));
    EXPECT(error_says(run(lane_missing, dim3(1), dim3(32), 0, y.data()), "lane 7 of the warp"));
    EXPECT(error_says(run(two_shuffles, dim3(1), dim3(32), 0, y.data()), "elsewhere"));
    EXPECT(error_says(run(half_mask, dim3(1), dim3(32), 0, y.data()), "mask"));
    EXPECT(error_says(run(half_warp, dim3(1), dim3(16), 0, y.data()), "16 threads"));
    EXPECT(run(half_warp, dim3(1), dim3(64), 0, y.data()) == cudaSuccess); /* and it goes on */
  });
}

static void test_wrong_copies(void) {
  alignas(16) float x[512], y[512];
  for (int i = 0; i < 512; i++) x[i] = (float)i;
  each_order([&] {
    for (int k = 0; k < 2; k++) {
      EXPECT(run(k ? copied_no_wait : copied_no_barrier, dim3(1), dim3(32), 1024, x, y, 4, 16) ==
             cudaSuccess);
      bool right = true;
      for (int i = 0; i < 512; i++) right &= y[i] == x[i / 128 * 128 + 127 - i % 128];
      EXPECT(!right);
    }
    EXPECT(
        error_says(run(copied_elsewhere, dim3(1), dim3(1), 0, x, y), "not in the block's shared"));
    EXPECT(error_says(run(copied_crooked, dim3(1), dim3(1), 0, x), "16-byte aligned"));
    EXPECT(error_says(run(loaded_elsewhere, dim3(1), dim3(32), 0, x, (uint32_t *)y), "not in the"));
  });
}

static void test_wrong_layout(void) {
  uint16_t A[256];
  float d[16];
  for (int i = 0; i < 256; i++) A[i] = round_bf16((float)(i % 16 < 8 ? 1 : 100));
  EXPECT(run(wrong_layout, dim3(1), dim3(32), 0, A, d) == cudaSuccess);
  EXPECT(d[0] == 8 && d[8] == 800); /* were the layout right, row 8 had 8 as well */
}

static void test_limits(void) {
  std::vector<float> y(64);
  EXPECT(run(unwritten, dim3(2), dim3(32), 0, y.data()) == cudaSuccess);
  EXPECT(y[0] == 5 && isnan(y[32])); /* a block does not find what another left */
  EXPECT(error_says(run(too_much_shared, dim3(1), dim3(1), 0, y.data()), "larger than"));
  const size_t most = 48 * 1024; /* with the kernel's own 16 bytes */
  EXPECT(run(little_shared, dim3(1), dim3(1), most - 16, y.data()) == cudaSuccess);
  EXPECT(error_says(run(little_shared, dim3(1), dim3(1), most, y.data()), "nobody asked"));
  EXPECT(cudaFuncSetAttribute((const void *)little_shared,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              (int)most) == cudaSuccess);
  EXPECT(run(little_shared, dim3(1), dim3(1), most, y.data()) == cudaSuccess);
  EXPECT(run(half_mask, dim3(1), dim3(1025), 0, y.data()) == cudaErrorInvalidConfiguration);
  EXPECT(run(half_mask, dim3(1, 65536), dim3(32), 0, y.data()) == cudaErrorInvalidConfiguration);
  EXPECT(run(half_mask, dim3(1), dim3(32), 228 << 10, y.data()) == cudaErrorInvalidValue);
}

/* An access outside shared memory ends a program under AddressSanitizer: tried in a child. */
static void test_outside(void) {
#ifdef __SANITIZE_ADDRESS__
  float y[1];
  for (int kernel = 0; kernel < 2; kernel++)
    for (int i : {0, 32, 33, -1}) {
      fflush(stdout);
      const pid_t child = fork();
      if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(3);
        if (kernel == 0)
          run(outside_shared, dim3(1), dim3(32), 0, y, i);
        else
          run(outside_dynamic, dim3(1), dim3(32), 33 * sizeof(float), y, i);
        _exit(0);
      }
      int status = 0;
      waitpid(child, &status, 0);
      const bool died = !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
      EXPECT(died == (i < 0 || i > 32));
    }
#endif
}

/* ---- graphs ---- */

KERNEL add_one(float *y) { y[threadIdx.x] += 1; }

static void test_graphs(void) {
  float y[32] = {0};
  cudaStream_t stream, other;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  EXPECT(cudaStreamCreate(&stream) == cudaSuccess && cudaStreamCreate(&other) == cudaSuccess);
  EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  float *p = y;
  EXPECT(launch("add_one", add_one, dim3(1), dim3(32), 0, stream, p) == PYLORA_OK);
  EXPECT(emulated_launch("add_one", add_one, dim3(1), dim3(32), 0, nullptr, p) ==
         cudaErrorStreamCaptureImplicit);
  EXPECT(emulated_launch("add_one", add_one, dim3(1), dim3(32), 0, other, p) == cudaSuccess);
  EXPECT(y[3] == 1); /* of the other stream alone */
  EXPECT(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  EXPECT(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  EXPECT(cudaGraphDestroy(graph) == cudaSuccess);
  for (int i = 0; i < 3; i++) EXPECT(cudaGraphLaunch(exec, stream) == cudaSuccess);
  EXPECT(y[3] == 4 && y[31] == 4);
  EXPECT(cudaGraphExecDestroy(exec) == cudaSuccess);
  EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated && !graph);
  EXPECT(cudaStreamDestroy(stream) == cudaSuccess && cudaStreamDestroy(other) == cudaSuccess);
}

static void test_numbers(void) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    const float f = widen_f16((uint16_t)h);
    if (isnan(f))
      EXPECT((h & 0x7fff) > 0x7c00 && (round_f16(f) & 0x7fff) > 0x7c00);
    else
      EXPECT(round_f16(f) == h);
    if ((h & 0x7fff) >= 0x7c00) continue;
    /* halfway to the next one: to even; a little more or less: to the nearer */
    const float next = widen_f16((uint16_t)(h + 1)), half = (float)(((double)f + next) / 2);
    if ((h & 0x7fff) == 0x7bff) continue;
    EXPECT(round_f16(half) == (h & 1 ? h + 1 : h));
    EXPECT(round_f16(nextafterf(half, f)) == h && round_f16(nextafterf(half, next)) == h + 1);
  }
  EXPECT(round_f16(65519.0f) == 0x7bff && round_f16(65520.0f) == 0x7c00);
  EXPECT(round_f16(-1e30f) == 0xfc00 && round_f16(1e-30f) == 0 && round_f16(-1e-30f) == 0x8000);
  EXPECT(widen_f16(0x3555) == 0.333251953125f && widen_f16(1) == 0x1p-24f);
}

int main(void) {
  test_numbers();
  test_right();
  test_products();
  test_copies();
  test_missing_barriers();
  test_divergence();
  test_wrong_copies();
  test_wrong_layout();
  test_limits();
  test_outside();
  test_graphs();
  printf("%s: %s\n", "test_emulation", failures ? "FAILED" : "passed");
  return failures != 0;
}
