/* cuda_runtime.h - the part of CUDA's runtime that csrc/cuda uses, over the host's memory: for the tests.
 *
 * Numbers and names are CUDA's. Streams run what they are given at once, in order; a stream that captures keeps it for
 * the graph, and what CUDA forbids during a capture fails here too. */
#ifndef PYLORA_EMULATED_CUDA_RUNTIME_H
#define PYLORA_EMULATED_CUDA_RUNTIME_H

#include <functional>
#include <stdlib.h>

#include "emulate.h"

#define CUDART_VERSION 13000

typedef enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureImplicit = 906,
} cudaError_t;

typedef enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
} cudaMemcpyKind;

typedef enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
} cudaDeviceAttr;

typedef enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
} cudaStreamCaptureMode;
typedef enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
} cudaStreamCaptureStatus;

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;

/* The fields that are used. */
typedef struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlockOptin;
  int major, minor, multiProcessorCount, l2CacheSize;
} cudaDeviceProp;

/* The fields that are used.  A kernel's own arrays are met only as it runs: their size is 0 here, and nothing besides
 * them is allowed before it is asked for. */
typedef struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxDynamicSharedSizeBytes;
} cudaFuncAttributes;
typedef enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
} cudaFuncAttribute;

EMULATED_API const char *cudaGetErrorName(cudaError_t error);
EMULATED_API const char *cudaGetErrorString(cudaError_t error);
EMULATED_API cudaError_t cudaGetLastError(void);
EMULATED_API cudaError_t cudaPeekAtLastError(void);
EMULATED_API cudaError_t cudaDriverGetVersion(int *version);
EMULATED_API cudaError_t cudaRuntimeGetVersion(int *version);
EMULATED_API cudaError_t cudaGetDeviceCount(int *count);
EMULATED_API cudaError_t cudaGetDevice(int *device);
EMULATED_API cudaError_t cudaSetDevice(int device);
EMULATED_API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int device);
EMULATED_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device);
EMULATED_API cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total);
EMULATED_API cudaError_t cudaDeviceSynchronize(void);

EMULATED_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel);
EMULATED_API cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attr,
                                              int value);

EMULATED_API cudaError_t cudaMalloc(void **p, size_t bytes);
EMULATED_API cudaError_t cudaFree(void *p);
EMULATED_API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
EMULATED_API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                         cudaMemcpyKind kind, cudaStream_t stream);
EMULATED_API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from,
                                           size_t from_pitch, size_t width, size_t height,
                                           cudaMemcpyKind kind, cudaStream_t stream);
EMULATED_API cudaError_t cudaMemset(void *p, int value, size_t bytes);
EMULATED_API cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
template <typename T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) {
  return cudaMalloc((void **)p, bytes);
}

EMULATED_API cudaError_t cudaStreamCreate(cudaStream_t *stream);
EMULATED_API cudaError_t cudaStreamDestroy(cudaStream_t stream);
EMULATED_API cudaError_t cudaStreamSynchronize(cudaStream_t stream);
EMULATED_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event,
                                             unsigned int flags);
EMULATED_API cudaError_t cudaEventCreate(cudaEvent_t *event);
EMULATED_API cudaError_t cudaEventDestroy(cudaEvent_t event);
EMULATED_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
EMULATED_API cudaError_t cudaEventSynchronize(cudaEvent_t event);

EMULATED_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
EMULATED_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
EMULATED_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                               cudaStreamCaptureStatus *status);
EMULATED_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                              unsigned long long flags);
EMULATED_API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
EMULATED_API cudaError_t cudaGraphDestroy(cudaGraph_t graph);
EMULATED_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

/* ---- not of CUDA -------------------------------------------------------------------------- */

/* The order in which threads and blocks run: PYLORA_EMULATE_ORDER=forward|reversed|random. */
enum { EMULATED_FORWARD = 0, EMULATED_REVERSED = 1, EMULATED_RANDOM = 2 };
EMULATED_API void emulated_set_order(int order, uint64_t seed);

/* Gives a piece of work to a stream, as a launch does: runs it, or keeps it for the graph. */
__attribute__((visibility("default"))) cudaError_t
emulated_enqueue(cudaStream_t stream, std::function<cudaError_t()> work);
/* Runs body(context) once for each thread of each block. */
EMULATED_API cudaError_t emulated_run_grid(const char *what, const void *kernel, dim3 grid,
                                           dim3 block, size_t shared, void (*body)(void *),
                                           void *context);
/* What cudaFuncSetAttribute allowed; 0: nothing was asked. */
EMULATED_API size_t emulated_allowed_shared(const void *kernel);

/* What a launch checks by itself before anything runs. */
EMULATED_API cudaError_t emulated_check_launch(dim3 grid, dim3 block, size_t shared);

template <typename... P>
static inline cudaError_t emulated_launch(const char *what, void (*kernel)(P...), dim3 grid,
                                          dim3 block, size_t shared, cudaStream_t stream,
                                          P... args) {
  static_assert((sizeof(P) + ... + 0) <= 32764, "a kernel's parameters must fit in 32764 bytes");
  const cudaError_t error = emulated_check_launch(grid, block, shared);
  if (error != cudaSuccess) return error;
  return emulated_enqueue(stream, [=]() {
    auto body = [=]() { kernel(args...); };
    return emulated_run_grid(
        what, (const void *)kernel, grid, block, shared,
        [](void *context) { (*(decltype(body) *)context)(); }, &body);
  });
}

#endif
