/* The kernel table for any CPU that the compiler targets. */
#include "runtime/internal.h"

#define SET portable
#include "table.inc"
