/* kernels.cu - all kernels in one source: what CuPy's NVRTC compiles where there is no compiled library, and
 * what the emulation of the tests runs.  The library compiles each group beside its host functions. */
#include "device.cuh"
/* Order does not matter: a group uses device.cuh alone. */
#include "random.cuh"
#include "copy.cuh"
#include "norm.cuh"
#include "pointwise.cuh"
#include "loss.cuh"
#include "optim.cuh"
#include "attention.cuh"
#include "merge.cuh"
#include "few_rows.cuh"
#include "low_down.cuh"
#include "low_outer.cuh"
#include "low_up.cuh"
