/* kernel_table.cpp - the kernels of kernels.cu by name, with arguments behind pointers: what the tests' stand-in for
 * CuPy launches where CuPy itself would have compiled that source (RawModule). */
#include <utility>

#include "cuda_runtime.h"
#include "kernels.cu"

enum { NO_SUCH_KERNEL = -1, WRONG_ARGUMENTS = -2 };

template <typename... P, size_t... I>
static int call(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                cudaStream_t stream, void **args, const size_t *sizes, size_t count,
                std::index_sequence<I...>) {
  if (count != sizeof...(P) || !((sizes[I] == sizeof(P)) && ... && true)) return WRONG_ARGUMENTS;
  return emulated_launch(name, kernel, grid, block, shared, stream, *(P *)args[I]...);
}
template <typename... P>
static int call(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                cudaStream_t stream, void **args, const size_t *sizes, size_t count) {
  return call(name, kernel, grid, block, shared, stream, args, sizes, count,
              std::index_sequence_for<P...>());
}

/* grid and block: three numbers each; args[i] points to sizes[i] bytes. A cudaError, or one of the above. */
EMULATED_API int emulated_launch_by_name(const char *name, const unsigned int *grid,
                                         const unsigned int *block, size_t shared,
                                         cudaStream_t stream, void **args, const size_t *sizes,
                                         size_t count) {
  const dim3 g(grid[0], grid[1], grid[2]), b(block[0], block[1], block[2]);
#define ENTRY(kernel)             \
  if (strcmp(name, #kernel) == 0) \
    return call(name, kernel, g, b, shared, stream, args, sizes, count);
#include "kernel_names.inc"
#undef ENTRY
  return NO_SUCH_KERNEL;
}
EMULATED_API const char *emulated_kernel_names(void) {
  return ""
#define ENTRY(kernel) #kernel " "
#include "kernel_names.inc"
#undef ENTRY
      ;
}
