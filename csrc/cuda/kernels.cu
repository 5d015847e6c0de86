/* kernels.cu - all kernels in one source, for the tests' emulation; and, with PYLORA_SMALL_KERNELS, those that CuPy's
 * NVRTC compiles for the cupy backend.  The library compiles each group beside its host functions. */
#include "device.cuh"
/* Order does not matter: a group uses device.cuh alone. */
#include "random.cuh"
#include "copy.cuh"
#include "norm.cuh"
#include "pointwise.cuh"
#include "features.cuh"
#include "loss.cuh"
#include "optim.cuh"
#include "merge.cuh"
/* What takes compilers long, and CuPy alone does not use: products and attention. */
#ifndef PYLORA_SMALL_KERNELS
#include "attention.cuh"
#include "few_rows.cuh"
#include "low_down.cuh"
#include "low_outer.cuh"
#include "low_up.cuh"
#endif
