/* The kernel table for x86-64 with AVX-512 VNNI and BF16: bfloat16 products too. */
#include "runtime/internal.h"

#ifdef PYLORA_X86
/* These files alone are compiled for more than the baseline, so that one build runs everywhere. */
#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512bf16"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512bf16")
#endif
#define VEC_AVX512 1
#define VEC_VNNI 1
#define VEC_BF16 1
#define SET avx512bf16
#define F32_SET avx512
#define Q_SET avx512vnni
#define MERGE_SET avx512
#include "table.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int pylora_not_for_this_cpu; /* ISO C forbids an empty file */
#endif
