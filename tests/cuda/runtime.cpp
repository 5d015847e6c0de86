/* runtime.cpp - devices, memory, streams and graphs of the emulation: see cuda_runtime.h. */
#include <atomic>
#include <map>
#include <mutex>
#include <stdio.h>
#include <vector>

#include "engine.h"

using Work = std::function<cudaError_t()>;

struct CUgraph_st {
  std::vector<Work> work;
};
struct CUgraphExec_st {
  std::vector<Work> work;
};
struct CUstream_st {
  CUgraph_st *graph = nullptr; /* while it captures */
  bool invalidated = false;
};
struct CUevent_st {};

static thread_local cudaError_t last_error;
static std::atomic<int> capturing{0};

static cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

/* ---- devices ---- */

const EmulatedDevice &emulated_device() {
  static const EmulatedDevice device = [] {
    const char *name = getenv("PYLORA_EMULATE_DEVICE");
    if (!name || strcmp(name, "h100") == 0)
      return EmulatedDevice{"Emulated H100", 1, 9, 0, 132, 227 << 10, 50 << 20, (size_t)80 << 30};
    if (strcmp(name, "a100") == 0)
      return EmulatedDevice{"Emulated A100", 1, 8, 0, 108, 163 << 10, 40 << 20, (size_t)40 << 30};
    if (strcmp(name, "v100") == 0) /* too old for pylora */
      return EmulatedDevice{"Emulated V100", 1, 7, 0, 80, 96 << 10, 6 << 20, (size_t)16 << 30};
    if (strcmp(name, "none") == 0) return EmulatedDevice{"", 0, 0, 0, 0, 0, 0, 0};
    fprintf(stderr, "PYLORA_EMULATE_DEVICE is '%s'; it may be h100, a100, v100 or none\n", name);
    abort();
  }();
  return device;
}

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(e) \
  case e:       \
    return #e
    NAME(cudaSuccess);
    NAME(cudaErrorInvalidValue);
    NAME(cudaErrorMemoryAllocation);
    NAME(cudaErrorInvalidConfiguration);
    NAME(cudaErrorInsufficientDriver);
    NAME(cudaErrorNoDevice);
    NAME(cudaErrorInvalidDevice);
    NAME(cudaErrorInvalidResourceHandle);
    NAME(cudaErrorIllegalAddress);
    NAME(cudaErrorLaunchFailure);
    NAME(cudaErrorStreamCaptureUnsupported);
    NAME(cudaErrorStreamCaptureInvalidated);
    NAME(cudaErrorStreamCaptureUnmatched);
    NAME(cudaErrorStreamCaptureImplicit);
#undef NAME
  }
  return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emulated_error_text();
  return cudaGetErrorName(error);
}
cudaError_t cudaGetLastError(void) {
  const cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaDriverGetVersion(int *version) {
  *version = emulated_device().count ? 13000 : 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) {
  *count = emulated_device().count;
  return *count ? cudaSuccess : result(cudaErrorInsufficientDriver);
}
cudaError_t cudaGetDevice(int *device) {
  if (!emulated_device().count) return result(cudaErrorInsufficientDriver);
  *device = 0;
  return cudaSuccess;
}
static cudaError_t device_exists(int device) {
  if (!emulated_device().count) return result(cudaErrorInsufficientDriver);
  return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice);
}
cudaError_t cudaSetDevice(int device) { return device_exists(device); }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int device) {
  if (device_exists(device) != cudaSuccess) return last_error;
  const EmulatedDevice &d = emulated_device();
  switch (attr) {
  case cudaDevAttrMultiProcessorCount:
    *value = d.multiprocessors;
    return cudaSuccess;
  case cudaDevAttrL2CacheSize:
    *value = (int)d.l2_bytes;
    return cudaSuccess;
  case cudaDevAttrComputeCapabilityMajor:
    *value = d.major;
    return cudaSuccess;
  case cudaDevAttrComputeCapabilityMinor:
    *value = d.minor;
    return cudaSuccess;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    *value = (int)d.shared_bytes;
    return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device) {
  if (device_exists(device) != cudaSuccess) return last_error;
  const EmulatedDevice &d = emulated_device();
  memset(prop, 0, sizeof *prop);
  snprintf(prop->name, sizeof prop->name, "%s", d.name);
  prop->totalGlobalMem = d.total_bytes;
  prop->sharedMemPerBlockOptin = d.shared_bytes;
  prop->major = d.major, prop->minor = d.minor;
  prop->multiProcessorCount = d.multiprocessors;
  prop->l2CacheSize = (int)d.l2_bytes;
  return cudaSuccess;
}

/* ---- functions ---- */

static std::mutex functions;
static std::map<const void *, int> allowed; /* shared memory that was asked for */

size_t emulated_allowed_shared(const void *kernel) {
  const std::lock_guard<std::mutex> held(functions);
  const auto found = allowed.find(kernel);
  return found == allowed.end() ? 0 : (size_t)found->second;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel) {
  out->sharedSizeBytes = 0;
  out->maxDynamicSharedSizeBytes = (int)emulated_allowed_shared(kernel);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attr, int value) {
  if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      (size_t)value > emulated_device().shared_bytes)
    return result(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> held(functions);
  allowed[kernel] = value;
  return cudaSuccess;
}

/* ---- streams: everything runs at once, or is kept for a graph ---- */

/* Whether the stream may take work now; the default stream may not while any other captures. */
static cudaError_t stream_usable(cudaStream_t stream) {
  if (!stream) return capturing ? cudaErrorStreamCaptureImplicit : cudaSuccess;
  return stream->invalidated ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
/* What waits for the device is an error during a capture, and ends it. */
static cudaError_t stream_waits(cudaStream_t stream) {
  if (stream && stream->graph) {
    stream->invalidated = true;
    return result(cudaErrorStreamCaptureUnsupported);
  }
  return result(stream_usable(stream));
}
cudaError_t emulated_enqueue(cudaStream_t stream, Work work) {
  const cudaError_t usable = stream_usable(stream);
  if (usable != cudaSuccess) return result(usable);
  if (stream && stream->graph) {
    stream->graph->work.push_back(std::move(work));
    return cudaSuccess;
  }
  return result(work());
}
cudaError_t emulated_check_launch(dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (!emulated_device().count) return result(cudaErrorInsufficientDriver);
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return result(cudaErrorInvalidConfiguration);
  if (shared > emulated_device().shared_bytes) return result(cudaErrorInvalidValue);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!stream) return result(cudaErrorInvalidResourceHandle);
  if (stream->graph) capturing--;
  delete stream->graph;
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return stream_waits(stream); }
cudaError_t cudaDeviceSynchronize(void) {
  return result(capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned int) {
  return result(stream_usable(stream));
}
cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) {
  return result(stream_usable(stream));
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }

/* ---- memory: the host's, filled with NaN ---- */

/* Other threads may go on allocating while one captures, as CUDA's relaxed and thread-local modes allow. */
cudaError_t cudaMalloc(void **p, size_t bytes) {
  if (!emulated_device().count) return result(cudaErrorInsufficientDriver);
  if (bytes > emulated_device().total_bytes || posix_memalign(p, 256, bytes ? bytes : 1) != 0)
    return result(cudaErrorMemoryAllocation);
  memset(*p, 0xff, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
  free(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  if (!emulated_device().count) return result(cudaErrorInsufficientDriver);
  *free_bytes = *total = emulated_device().total_bytes;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return emulated_enqueue(stream, [=] {
    if (bytes) memmove(to, from, bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  if (height && (width > to_pitch || width > from_pitch)) return result(cudaErrorInvalidValue);
  return emulated_enqueue(stream, [=] {
    for (size_t i = 0; i < height && width; i++)
      memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
  return emulated_enqueue(stream, [=] {
    if (bytes) memset(p, value, bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream) return result(cudaErrorStreamCaptureUnsupported);
  if (stream->graph) return result(cudaErrorStreamCaptureInvalidated);
  stream->graph = new CUgraph_st;
  stream->invalidated = false;
  capturing++;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = nullptr;
  if (!stream || !stream->graph) return result(cudaErrorStreamCaptureUnmatched);
  capturing--;
  CUgraph_st *made = stream->graph;
  stream->graph = nullptr;
  if (stream->invalidated) {
    delete made;
    stream->invalidated = false;
    return result(cudaErrorStreamCaptureInvalidated);
  }
  *graph = made;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  if (!stream && capturing) return result(cudaErrorStreamCaptureImplicit);
  *status = !stream || !stream->graph ? cudaStreamCaptureStatusNone
            : stream->invalidated     ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
  if (!graph) return result(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!exec) return result(cudaErrorInvalidValue);
  return emulated_enqueue(stream, [exec] {
    for (const Work &work : exec->work) {
      const cudaError_t error = work();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
