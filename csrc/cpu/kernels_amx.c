/* The kernel table for x86-64 with AMX: that of AVX-512 BF16, with products on tiles of bfloat16 numbers
 * and of bytes.
 *
 * Linux only (it must be asked for permission), and where the compiler knows the instructions. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif
#include "runtime/internal.h"

#if defined(PYLORA_AMX_EMULATED) /* tests/c/amx_emulation.h came first: tiles in software */
#define PYLORA_AMX_BUILD 1
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__FMA__)
#define VEC_AVX512 1 /* compiled for a machine that has all but the tiles */
#define VEC_VNNI 1
#define VEC_BF16 1
#endif
#elif defined(PYLORA_AMX)
#define PYLORA_AMX_BUILD 1
#if defined(__clang__)
#pragma clang attribute push(                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512bf16," \
                          "amx-tile,amx-bf16,amx-int8"))),                                     \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8")
#endif
#define VEC_AVX512 1
#define VEC_VNNI 1
#define VEC_BF16 1
#endif

#if defined(PYLORA_AMX_BUILD)
#define VEC_AMX 1
#if !defined(SET) /* the tests have a second one */
#define SET amx
#endif
#if defined(VEC_AVX512)
#define F32_SET avx512
#define PAIR_SET avx512bf16
#define Q_SET avx512vnni
#define ROW_SET avx512bf16
#define ATTEND_SET avx512bf16
#define MERGE_SET avx512
#else /* tiles in software beside what any machine runs */
#define F32_SET portable
#define PAIR_SET portable
#define Q_SET portable
#define ROW_SET portable
#define ATTEND_SET portable
#define MERGE_SET portable
#endif
#include "table.inc"
#if defined(__clang__) && !defined(PYLORA_AMX_EMULATED)
#pragma clang attribute pop
#endif
#else
typedef int pylora_not_for_this_cpu; /* ISO C forbids an empty file */
#endif
