/* attention.cuh - causal grouped-query attention on a GPU, all kernels of it.
 *
 * attention_common.cuh says what a row is.  attention_forward.cuh and attention_backward.cuh are the tensor cores',
 * attention_plain.cuh and attention_plain_backward.cuh take everything else. */
#ifndef PYLORA_ATTENTION_CUH
#define PYLORA_ATTENTION_CUH

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_plain.cuh"
#include "attention_plain_backward.cuh"

#endif
