/* backend.cu - devices, the context, and the sentence that goes with PYLORA_E_DEVICE. */
#include "host.h"

#include <new>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static thread_local char sentence[512];

int device_failure(const char *what, const char *why) {
  snprintf(sentence, sizeof sentence, "%s: %s", what, why);
  return PYLORA_E_DEVICE;
}
int device_status(const char *what, cudaError_t error) {
  if (error == cudaSuccess) return PYLORA_OK;
  char why[420];
  snprintf(why, sizeof why, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError(); /* the next launch reports its own errors */
  return device_failure(what, why);
}
#define CALL(function, ...) TRY(device_status(#function, function(__VA_ARGS__)))

int pylora_cuda_abi_version(void) { return PYLORA_CUDA_ABI_VERSION; }
const char *pylora_cuda_error(void) { return sentence; }

int pylora_cuda_device_count(int32_t *count) {
  if (!count) return PYLORA_E_NULL;
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  *count = error == cudaSuccess ? n : 0;
  if (error == cudaSuccess) {
    if (n == 0) device_failure("cudaGetDeviceCount", "the driver lists no GPU");
    return PYLORA_OK;
  }
  const int status = device_status("cudaGetDeviceCount", error);
  if (error == cudaErrorNoDevice) return PYLORA_OK;
  if (error != cudaErrorInsufficientDriver) return status;
  int driver = 0; /* 0: none is installed */
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  char why[200];
  if (driver == 0)
    snprintf(why, sizeof why, "this machine has no NVIDIA driver");
  else
    snprintf(why, sizeof why,
             "the NVIDIA driver is for CUDA %d.%d and this library needs CUDA %d.%d: update it",
             driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  device_failure("cudaGetDeviceCount", why);
  return PYLORA_OK;
}

static int check_device(int32_t device) {
  int32_t count;
  TRY(pylora_cuda_device_count(&count));
  if (device >= 0 && device < count) return PYLORA_OK;
  if (count == 0) return PYLORA_E_DEVICE; /* the sentence says why there is none */
  char why[100];
  snprintf(why, sizeof why, "there is no device %d; there are %d", (int)device, (int)count);
  return device_failure("pylora_cuda", why);
}

/* Makes a device the thread's own, and the one before again at the end. */
struct Visit {
  int before = -1, status;
  explicit Visit(int device) {
    if (cudaGetDevice(&before) != cudaSuccess) before = -1;
    status = before == device ? PYLORA_OK : device_status("cudaSetDevice", cudaSetDevice(device));
    if (before == device) before = -1;
  }
  ~Visit() {
    if (before >= 0) cudaSetDevice(before);
  }
};

static int attribute(int *value, cudaDeviceAttr attr, int device) {
  return device_status("cudaDeviceGetAttribute", cudaDeviceGetAttribute(value, attr, device));
}

int pylora_cuda_device_info(int32_t device, pylora_cuda_device *out) {
  if (!out) return PYLORA_E_NULL;
  memset(out, 0, sizeof *out);
  TRY(check_device(device));
  cudaDeviceProp properties;
  CALL(cudaGetDeviceProperties, &properties, device);
  snprintf(out->name, sizeof out->name, "%s", properties.name);
  out->major = properties.major, out->minor = properties.minor;
  out->multiprocessors = properties.multiProcessorCount;
  out->l2_bytes = properties.l2CacheSize;
  out->shared_bytes = (int64_t)properties.sharedMemPerBlockOptin;
  int driver, runtime;
  CALL(cudaDriverGetVersion, &driver);
  CALL(cudaRuntimeGetVersion, &runtime);
  out->driver = driver, out->runtime = runtime, out->cublaslt = products_version();
  const Visit visit(device);
  TRY(visit.status);
  size_t free_bytes, total;
  CALL(cudaMemGetInfo, &free_bytes, &total);
  out->free_bytes = (int64_t)free_bytes, out->total_bytes = (int64_t)total;
  return PYLORA_OK;
}

static int fill(pylora_cuda *g, int device, const char *cublaslt) {
  int shared, l2;
  g->device = device;
  TRY(attribute(&g->multiprocessors, cudaDevAttrMultiProcessorCount, device));
  TRY(attribute(&g->major, cudaDevAttrComputeCapabilityMajor, device));
  TRY(attribute(&g->minor, cudaDevAttrComputeCapabilityMinor, device));
  TRY(attribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  TRY(attribute(&l2, cudaDevAttrL2CacheSize, device));
  g->max_shared = (size_t)shared, g->l2_bytes = l2;
  if (g->major < 8) {
    char why[120];
    snprintf(why, sizeof why, "the GPU has compute capability %d.%d; 8.0 or newer is needed",
             g->major, g->minor);
    return device_failure("pylora_cuda_open", why);
  }
  CALL(cudaMalloc, (void **)&g->bad, sizeof *g->bad);
  CALL(cudaMemset, g->bad, 0, sizeof *g->bad);
  CALL(cudaStreamSynchronize,
       (cudaStream_t)NULL); /* streams that do not wait for the default one */
  return products_open(g, cublaslt);
}

int pylora_cuda_open(int32_t device, const char *cublaslt, pylora_cuda **out) {
  if (!out) return PYLORA_E_NULL;
  *out = NULL;
  TRY(check_device(device));
  const Visit visit(device);
  TRY(visit.status);
  pylora_cuda *g = new (std::nothrow) pylora_cuda();
  if (!g) return device_failure("pylora_cuda_open", "out of the host's memory");
  const int status = fill(g, device, cublaslt);
  if (status != PYLORA_OK)
    pylora_cuda_close(g);
  else
    *out = g;
  return status;
}

void pylora_cuda_close(pylora_cuda *g) {
  if (!g) return;
  const Visit visit(g->device);
  products_close(g);
  if (g->bad && cudaFree(g->bad) != cudaSuccess) cudaGetLastError(); /* no later launch's error */
  delete g;
}

int pylora_cuda_set_tf32(pylora_cuda *g, int32_t allow) {
  if (!g) return PYLORA_E_NULL;
  g->tf32 = allow != 0;
  return PYLORA_OK;
}

int pylora_cuda_check(pylora_cuda *g, void *stream) {
  if (!g) return PYLORA_E_NULL;
  const Visit visit(g->device);
  TRY(visit.status);
  int32_t bad = 0;
  const cudaStream_t s = (cudaStream_t)stream;
  CALL(cudaMemcpyAsync, &bad, g->bad, sizeof bad, cudaMemcpyDeviceToHost, s);
  CALL(cudaStreamSynchronize, s);
  if (!bad) return PYLORA_OK;
  CALL(cudaMemsetAsync, g->bad, 0, sizeof bad, s);
  return PYLORA_E_INDEX;
}
