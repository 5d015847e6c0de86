/* The kernel table for 64-bit Arm. */
#include "runtime/internal.h"

#ifdef PYLORA_ARM64
#define VEC_NEON 1
#define SET neon
#include "table.inc"
#else
typedef int pylora_not_for_this_cpu; /* ISO C forbids an empty file */
#endif
