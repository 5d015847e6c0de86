/* The kernel table for any CPU that the compiler targets. */
#include "runtime/internal.h"

#define TABLE pylora_kernels_portable
#define TABLE_NAME "portable"
#include "table.inc"
