/* test_backend.cpp - devices and contexts: also on machines that have none, or one that is too old; and the stand-in for
 * cuBLASLt refuses what the real one does. */
#include <dlfcn.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>

#include "host.h"

static int failures;
#define EXPECT(condition)                                            \
  do {                                                               \
    if (!(condition)) {                                              \
      printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      failures++;                                                    \
    }                                                                \
  } while (0)

static bool error_says(const char *part) {
  const std::string text = pylora_cuda_error();
  if (text.find(part) != std::string::npos) return true;
  printf("the error is: %s\n", text.c_str());
  return false;
}
static const char *const CUBLASLT = BUILD_DIR "/libcublasLt_emulated.so";

static void test_no_device(void) {
  int32_t count = 7;
  pylora_cuda *g = (pylora_cuda *)&count;
  pylora_cuda_device info;
  EXPECT(pylora_cuda_device_count(&count) == PYLORA_OK && count == 0);
  EXPECT(error_says("no NVIDIA driver"));
  EXPECT(pylora_cuda_open(0, CUBLASLT, &g) == PYLORA_E_DEVICE && !g);
  EXPECT(error_says("no NVIDIA driver"));
  EXPECT(pylora_cuda_device_info(0, &info) == PYLORA_E_DEVICE);
}

static void test_old_device(void) {
  pylora_cuda *g = NULL;
  EXPECT(pylora_cuda_open(0, CUBLASLT, &g) == PYLORA_E_DEVICE && !g);
  EXPECT(error_says("compute capability 7.0"));
}

static void test_a100(void) {
  pylora_cuda_device info;
  pylora_cuda *g;
  EXPECT(pylora_cuda_device_info(0, &info) == PYLORA_OK);
  EXPECT(info.major == 8 && info.minor == 0 && info.multiprocessors == 108);
  EXPECT(info.shared_bytes == 163 << 10 && std::string(info.name) == "Emulated A100");
  EXPECT(pylora_cuda_open(0, CUBLASLT, &g) == PYLORA_OK);
  EXPECT(g->max_shared == 163 << 10);
  pylora_cuda_close(g);
}

KERNEL flags_it(int32_t *bad) { flag_bad_index(bad); }
KERNEL never_meets(int32_t *bad) {
  if (threadIdx.x) __syncthreads();
  flag_bad_index(bad);
}
static int launch_one(void (*kernel)(int32_t *), const char *what, int32_t *bad, unsigned blocks) {
  return launch(what, kernel, dim3(blocks), dim3(32), 0, NULL, bad);
}

static void test_context(void) {
  int32_t count;
  pylora_cuda_device info;
  pylora_cuda *g = NULL;
  EXPECT(pylora_cuda_abi_version() == PYLORA_CUDA_ABI_VERSION);
  EXPECT(std::string(pylora_cuda_error()).empty());
  EXPECT(pylora_cuda_device_count(NULL) == PYLORA_E_NULL);
  EXPECT(pylora_cuda_device_count(&count) == PYLORA_OK && count == 1);
  EXPECT(pylora_cuda_device_info(0, NULL) == PYLORA_E_NULL);
  EXPECT(pylora_cuda_device_info(0, &info) == PYLORA_OK && info.cublaslt == 0);
  EXPECT(info.major == 9 && info.driver == 13000 && info.total_bytes == (int64_t)80 << 30);
  for (int device : {-1, 1}) {
    EXPECT(pylora_cuda_open(device, CUBLASLT, &g) == PYLORA_E_DEVICE && !g);
    EXPECT(error_says("there is no device") && error_says("there are 1"));
  }
  EXPECT(pylora_cuda_open(0, CUBLASLT, NULL) == PYLORA_E_NULL);
  EXPECT(pylora_cuda_open(0, "/nowhere/libcublasLt.so", &g) == PYLORA_E_DEVICE && !g);
  EXPECT(error_says("/nowhere/libcublasLt.so"));
  EXPECT(pylora_cuda_open(0, BUILD_DIR "/libpylora_cuda_emulated.so", &g) == PYLORA_E_DEVICE && !g);
  EXPECT(error_says("cublasLt"));
  EXPECT(pylora_cuda_open(0, CUBLASLT, &g) == PYLORA_OK && g);
  if (!g) return;
  EXPECT(pylora_cuda_device_info(0, &info) == PYLORA_OK && info.cublaslt > 0);
  EXPECT(pylora_cuda_set_tf32(g, 5) == PYLORA_OK && g->tf32);
  EXPECT(pylora_cuda_set_tf32(g, 0) == PYLORA_OK && !g->tf32);
  EXPECT(pylora_cuda_set_tf32(NULL, 0) == PYLORA_E_NULL);
  /* an index out of range is told once */
  EXPECT(pylora_cuda_check(g, NULL) == PYLORA_OK);
  EXPECT(launch_one(flags_it, "flags_it", g->bad, 2) == PYLORA_OK);
  EXPECT(pylora_cuda_check(g, NULL) == PYLORA_E_INDEX);
  EXPECT(pylora_cuda_check(g, NULL) == PYLORA_OK);
  EXPECT(pylora_cuda_check(NULL, NULL) == PYLORA_E_NULL);
  /* a kernel that fails is named; a grid of nothing is nothing; each thread has its own sentence */
  EXPECT(launch_one(never_meets, "never_meets", g->bad, 0) == PYLORA_OK);
  EXPECT(launch_one(never_meets, "never_meets", g->bad, 1) == PYLORA_E_DEVICE);
  EXPECT(error_says("never_meets: ") && error_says("__syncthreads"));
  std::thread([] { EXPECT(std::string(pylora_cuda_error()).empty()); }).join();
  /* nothing that waits may be captured */
  cudaStream_t stream;
  cudaGraph_t graph;
  EXPECT(cudaStreamCreate(&stream) == cudaSuccess);
  EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  EXPECT(pylora_cuda_check(g, stream) == PYLORA_E_DEVICE && error_says("cudaStreamSynchronize"));
  EXPECT(cudaStreamEndCapture(stream, &graph) != cudaSuccess);
  EXPECT(cudaStreamDestroy(stream) == cudaSuccess);
  pylora_cuda_close(g);
  pylora_cuda_close(NULL);
}

/* ---- the stand-in for cuBLASLt ---- */

struct Lt {
  void *file = dlopen(CUBLASLT, RTLD_NOW);
  void *handle = nullptr;
  template <typename... A> int call(const char *name, A... a) const {
    int (*f)(A...) = (int (*)(A...))dlsym(file, name);
    return f ? f(a...) : -1;
  }
};
struct Search {
  int status, found;
  uint64_t results[2][12]; /* algorithm: 8, workspace: 1, and the rest */
};
/* D [2,2] = A [2,3] B [3,2] with these types, leading dimension of A and compute type. */
struct Case {
  int a = 0, b = 0, d = 0, compute = 68;
  int64_t lda = 2;
  uint64_t k = 3;
  uint32_t alignment = 4;
};
static Search search(const Lt &lt, const Case &c, void *(&made)[5]) {
  Search s = {};
  void *preference;
  lt.call("cublasLtMatmulDescCreate", &made[0], c.compute, 0);
  lt.call("cublasLtMatrixLayoutCreate", &made[1], c.a, (uint64_t)2, (uint64_t)3, c.lda);
  lt.call("cublasLtMatrixLayoutCreate", &made[2], c.b, c.k, (uint64_t)2, (int64_t)c.k);
  lt.call("cublasLtMatrixLayoutCreate", &made[3], c.d, (uint64_t)2, (uint64_t)2, (int64_t)2);
  lt.call("cublasLtMatmulPreferenceCreate", &preference);
  const uint64_t workspace = 1 << 20;
  lt.call("cublasLtMatmulPreferenceSetAttribute", preference, 1, (const void *)&workspace,
          sizeof workspace);
  for (int i = 5; i < 9; i++)
    lt.call("cublasLtMatmulPreferenceSetAttribute", preference, i, (const void *)&c.alignment,
            sizeof c.alignment);
  s.status = lt.call("cublasLtMatmulAlgoGetHeuristic", lt.handle, made[0], made[1], made[2],
                     made[3], made[3], preference, 2, (void *)s.results, &s.found);
  lt.call("cublasLtMatmulPreferenceDestroy", preference);
  return s;
}
static void destroy(const Lt &lt, void *(&made)[5]) {
  lt.call("cublasLtMatmulDescDestroy", made[0]);
  for (int i = 1; i < 4; i++) lt.call("cublasLtMatrixLayoutDestroy", made[i]);
}
static int status_of(const Lt &lt, const Case &c) {
  void *made[5];
  const int status = search(lt, c, made).status;
  destroy(lt, made);
  return status;
}

static void test_standin(void) {
  Lt lt;
  EXPECT(lt.file && lt.call("cublasLtCreate", &lt.handle) == 0);
  if (!freopen("/dev/null", "w", stderr)) failures++; /* it says what it refuses */
  Case c;
  EXPECT(status_of(lt, c) == 0);
  EXPECT(status_of(lt, Case{0, 0, 0, 68, 1, 3, 4}) == 7);   /* lda < rows */
  EXPECT(status_of(lt, Case{0, 0, 0, 68, -2, 3, 4}) == 7);  /* lda < 0 */
  EXPECT(status_of(lt, Case{0, 0, 0, 68, 2, 4, 4}) == 7);   /* shapes */
  EXPECT(status_of(lt, Case{0, 14, 0, 68, 2, 3, 4}) == 15); /* two types */
  EXPECT(status_of(lt, Case{14, 14, 2, 68, 2, 3, 4}) == 15);
  EXPECT(status_of(lt, Case{14, 14, 0, 77, 2, 3, 4}) == 15); /* TF32 of bfloat16 */
  EXPECT(status_of(lt, Case{0, 0, 0, 68, 2, 3, 2}) == 15);   /* alignment below the element's */
  void *desc;
  const int32_t value = 1;
  EXPECT(lt.call("cublasLtMatmulDescCreate", &desc, 64, 0) == 15); /* sums in float16 */
  EXPECT(lt.call("cublasLtMatmulDescCreate", &desc, 68, 0) == 0);
  for (int unknown : {5, 15, 99})
    EXPECT(lt.call("cublasLtMatmulDescSetAttribute", desc, unknown, (const void *)&value,
                   sizeof value) == 15);
  EXPECT(lt.call("cublasLtMatmulDescSetAttribute", desc, 3, (const void *)&value, (size_t)8) == 7);
  lt.call("cublasLtMatmulDescDestroy", desc);

  void *made[5];
  const Search s = search(lt, c, made);
  EXPECT(s.status == 0 && s.found == 2 && s.results[0][8] == 4096);
  const float A[6] = {1, 2, 3, 4, 5, 6}, B[6] = {1, 0, 2, 0, 1, 1}, C[4] = {1, 1, 1, 1};
  alignas(16) static char workspace[4096];
  float D[5] = {0};
  const float alpha = 2, beta = 10;
  const auto multiply = [&](const uint64_t *algo, float *d, size_t bytes) {
    return lt.call("cublasLtMatmul", lt.handle, made[0], &alpha, A, made[1], B, made[2], &beta, C,
                   made[3], d, made[3], algo, (void *)workspace, bytes, (void *)NULL);
  };
  EXPECT(multiply(s.results[0], D, sizeof workspace) == 0);
  /* columns of A: (1,2) (3,4) (5,6); of B: (1,0,2) (0,1,1) */
  EXPECT(D[0] == 2 * 11 + 10 && D[1] == 2 * 14 + 10 && D[2] == 2 * 8 + 10 && D[3] == 2 * 10 + 10);
  EXPECT(workspace[0] == (char)0xff);
  EXPECT(multiply(s.results[0], D, 4095) == 7); /* the workspace is too small */
  EXPECT(multiply(s.results[1], D, 0) == 0);
  EXPECT(multiply(s.results[1], (float *)((char *)D + 2), 0) == 7);
  const int32_t transposed = 1;
  lt.call("cublasLtMatmulDescSetAttribute", made[0], 4, (const void *)&transposed,
          sizeof transposed);
  EXPECT(multiply(s.results[1], D, 0) == 7); /* found for another problem */
  destroy(lt, made);
  EXPECT(lt.call("cublasLtDestroy", lt.handle) == 0);
  dlclose(lt.file);
}

/* In a process of its own, since a device does not change while a process runs. */
static void on(const char *device, void (*test)(void)) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    setenv("PYLORA_EMULATE_DEVICE", device, 1);
    test();
    fflush(stdout);
    _exit(failures != 0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  if (status) printf("on %s: failed\n", device), failures++;
}

int main(void) {
  on("none", test_no_device);
  on("v100", test_old_device);
  on("a100", test_a100);
  on("h100", test_context);
  on("h100", test_standin);
  printf("test_backend: %s\n", failures ? "FAILED" : "passed");
  return failures != 0;
}
