/* sigmoid.cuh - the function that activations are made of. */
#ifndef PYLORA_SIGMOID_CUH
#define PYLORA_SIGMOID_CUH

#include "device.cuh"

/* σ(x) and σ(-x) = 1 - σ(x), both to a few ulp: the exponential never overflows, and the small one of the two is not a
 * difference. */
DEVICE void sigmoid(float x, float *s, float *t) {
  const float e = expf(-fabsf(x)), large = 1.0f / (1.0f + e), small = e * large;
  *s = x < 0 ? small : large;
  *t = x < 0 ? large : small;
}

#endif
