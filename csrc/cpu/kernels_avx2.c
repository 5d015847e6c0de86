/* The kernel table for x86-64 with AVX2 and FMA. */
#include "runtime/internal.h"

#ifdef PYLORA_X86
/* These files alone are compiled for more than the baseline, so that one build runs everywhere. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma")
#endif
#define VEC_AVX2 1
#define SET avx2
#include "table.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int pylora_not_for_this_cpu; /* ISO C forbids an empty file */
#endif
