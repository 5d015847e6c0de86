/* embed_cuda.c - LoRA on an NVIDIA GPU in a program without Python: a frozen weight is put on the device, an adapter is
 * trained on it, merged, and taken out again bit for bit.
 *
 *   make -C examples/c cuda        needs nvcc's runtime and libpylora_cuda.so (see the Makefile)
 *
 * Everything but the loss, which is the program's own affair, is computed by the device.
 */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pylora_cuda.h"

enum { M = 64, K = 48, D = 40, R = 4, STEPS = 60 };

/* PYLORA_E_DEVICE has a sentence of its own, which names the kernel or the call. */
static void must(int status, const char *what) {
  if (status == PYLORA_OK) return;
  fprintf(stderr, "%s: %s\n", what, pylora_status_text(status));
  if (status == PYLORA_E_DEVICE) fprintf(stderr, "%s\n", pylora_cuda_error());
  exit(1);
}

static void cuda(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

static void *taken[32]; /* all that was allocated on the device */
static int count;

static void *allocate(size_t bytes) {
  cuda(cudaMalloc(&taken[count], bytes ? bytes : 1), "cudaMalloc");
  return taken[count++];
}

/* n floats of the device, from the host's or zeros. */
static float *device(const float *from, size_t n) {
  void *p = allocate(n * sizeof(float));
  if (from)
    cuda(cudaMemcpy(p, from, n * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  else
    cuda(cudaMemset(p, 0, n * sizeof(float)), "cudaMemset");
  return (float *)p;
}

static pylora_mat matrix(float *p, int64_t rows, int64_t cols) {
  const pylora_mat a = {p, rows, cols, cols, NULL, NULL};
  return a;
}

/* Uniform in (-1, 1) times `size`: the generator's words are the same on every processor. */
static void fill(float *x, int64_t n, uint64_t *state, float size) {
  for (int64_t i = 0; i < n; i++) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    x[i] = size * ((float)(*state >> 40) * (1.0f / 8388608.0f) - 1.0f);
  }
}

static float W[D * K], x[M * K], want[M * D], y[M * D], dy[M * D], A[R * K], back[D * K];

int main(void) {
  int32_t devices = 0;
  must(pylora_cuda_device_count(&devices), "device_count");
  if (devices == 0) {
    printf("no GPU: %s\n", pylora_cuda_error());
    return 2;
  }
  pylora_cuda_device about;
  must(pylora_cuda_device_info(0, &about), "device_info");
  printf("%s, compute capability %d.%d\n", about.name, about.major, about.minor);
  pylora_cuda *g = NULL;
  must(pylora_cuda_open(0, getenv("PYLORA_CUBLASLT"), &g), "open");

  uint64_t state = 7;
  fill(W, D * K, &state, 0.1f);
  fill(x, M * K, &state, 1.0f);
  fill(want, M * D, &state, 0.5f);
  fill(A, R * K, &state, 0.2f);
  float *dW = device(W, D * K), *d_x = device(x, M * K), *d_y = device(NULL, M * D),
        *d_dy = device(NULL, M * D), *d_A = device(A, R * K), *d_B = device(NULL, D * R),
        *d_h = device(NULL, M * R), *d_dA = device(NULL, R * K), *d_dB = device(NULL, D * R),
        *mA = device(NULL, R * K), *vA = device(NULL, R * K), *mB = device(NULL, D * R),
        *vB = device(NULL, D * R);
  const pylora_mat Wm = matrix(dW, D, K), xm = matrix(d_x, M, K), ym = matrix(d_y, M, D),
                   dym = matrix(d_dy, M, D), hm = matrix(d_h, M, R), dAm = matrix(d_dA, R, K),
                   dBm = matrix(d_dB, D, R);

  /* A float32 weight that lies row by row is its own packed form: nothing is copied. */
  pylora_packed P;
  must(pylora_cuda_pack(g, NULL, PYLORA_F32, &Wm, dW, &P), "pack");
  const size_t ws_bytes = pylora_cuda_linear_workspace(g, M, 1, D, K, R, 1);
  void *ws = allocate(ws_bytes);

  const pylora_lora lora = {R, d_A, K, d_B, R, 2.0f, NULL, NULL};
  const pylora_lora *const adapters[1] = {&lora};
  const pylora_linear forward = {&P, NULL, adapters, NULL, &ym, &hm, NULL};
  const pylora_linear_grad backward = {&P, &lora, &dym, &hm, &dAm, &dBm};
  double first = 0, loss = 0;
  for (int step = 1; step <= STEPS; step++) {
    must(pylora_cuda_linear_forward(g, NULL, &xm, 1, &forward, 1, NULL, ws, ws_bytes), "forward");
    cuda(cudaMemcpy(y, d_y, sizeof y, cudaMemcpyDeviceToHost), "cudaMemcpy");
    loss = 0;
    for (int i = 0; i < M * D; i++) {
      const float e = y[i] - want[i];
      loss += 0.5 * e * e / M;
      dy[i] = e / M;
    }
    if (step == 1) first = loss;
    cuda(cudaMemcpy(d_dy, dy, sizeof dy, cudaMemcpyHostToDevice), "cudaMemcpy");
    must(pylora_cuda_linear_backward(g, NULL, &xm, 1, &backward, NULL, 0, ws, ws_bytes),
         "backward");
    const pylora_cuda_parameter both[2] = {{R * K, d_A, d_dA, mA, vA, 0.02, 0.0},
                                           {D * R, d_B, d_dB, mB, vB, 0.02, 0.0}};
    const pylora_adamw o = {0, 0.9, 0.999, 1e-8, 0, 1, step};
    must(pylora_cuda_adamw_step(g, NULL, 2, both, &o), "adamw");
  }
  printf("loss %.6f at first, %.6f after %d steps\n", first, loss, STEPS);

  /* Merge; the residue is what rounding loses: a count of each row, then positions and bits. */
  float *merged = device(NULL, D * K), *unmerged = device(NULL, D * K);
  int64_t lossy[D], row_first[D], n = 0;
  int64_t *d_lossy = (int64_t *)device(NULL, 2 * D), *d_first = (int64_t *)device(NULL, 2 * D);
  must(pylora_cuda_merge(g, NULL, PYLORA_F32, D, K, dW, K, &lora, merged, K, d_lossy), "merge");
  cuda(cudaMemcpy(lossy, d_lossy, sizeof lossy, cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (int i = 0; i < D; i++) row_first[i] = n, n += lossy[i];
  cuda(cudaMemcpy(d_first, row_first, sizeof row_first, cudaMemcpyHostToDevice), "cudaMemcpy");
  int64_t *position = (int64_t *)device(NULL, 2 * (size_t)(n ? n : 1));
  uint32_t *bits = (uint32_t *)device(NULL, (size_t)(n ? n : 1));
  must(pylora_cuda_merge_residue(g, NULL, PYLORA_F32, D, K, dW, K, merged, K, &lora, d_first,
                                 position, bits),
       "residue");
  must(pylora_cuda_unmerge(g, NULL, PYLORA_F32, D, K, merged, K, &lora, n, position, bits, unmerged,
                           K),
       "unmerge");
  cuda(cudaMemcpy(back, unmerged, sizeof back, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const int same = memcmp(back, W, sizeof W) == 0;
  printf("merged; %lld of %d elements kept aside; unmerged: %s\n", (long long)n, D * K,
         same ? "bit for bit the base" : "NOT the base");
  must(pylora_cuda_check(g, NULL), "check");
  pylora_cuda_close(g);
  while (count > 0) cudaFree(taken[--count]);
  return same && loss < first ? 0 : 1;
}
