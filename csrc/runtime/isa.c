/* isa.c - which kernel table is in use: the best this CPU can run, or the one that was asked for. */
#include <stdatomic.h>
#include <stdlib.h>

#include "runtime/internal.h"

static const pylora_kernels *const tables[] = {
/* best first */
#if defined(PYLORA_AMX) || defined(PYLORA_AMX_EMULATED)
    &pylora_kernels_amx,
#endif
#if defined(PYLORA_X86)
    &pylora_kernels_avx512bf16, &pylora_kernels_avx512vnni,
    &pylora_kernels_avx512,     &pylora_kernels_avx2,
#elif defined(PYLORA_ARM64)
    &pylora_kernels_neon,
#endif
    &pylora_kernels_portable};
enum { TABLES = sizeof tables / sizeof *tables };

static _Atomic(const pylora_kernels *) current;

static const pylora_kernels *find(const char *name) {
  for (int i = 0; i < TABLES; i++)
    if (strcmp(tables[i]->name, name) == 0 && tables[i]->supported()) return tables[i];
  return NULL;
}

const char *pylora_isa_name(int index) {
  for (int i = 0; i < TABLES; i++)
    if (tables[i]->supported() && index-- == 0) return tables[i]->name;
  return NULL;
}

const pylora_kernels *pylora_table(void) {
  const pylora_kernels *t = atomic_load_explicit(&current, memory_order_acquire);
  if (t) return t;
  const char *wanted = getenv("PYLORA_ISA");
  t = wanted ? find(wanted) : NULL; /* an unknown name: the Python layer reports it, C goes on */
  if (!t) t = find(pylora_isa_name(0));
  atomic_store_explicit(&current, t, memory_order_release); /* a race stores the same value twice */
  return t;
}

const char *pylora_isa(void) { return pylora_table()->name; }

int pylora_use_isa(const char *name) {
  if (!name) return PYLORA_E_NULL;
  const pylora_kernels *t = find(name);
  if (!t) return PYLORA_E_UNSUPPORTED;
  atomic_store_explicit(&current, t, memory_order_release);
  return PYLORA_OK;
}
