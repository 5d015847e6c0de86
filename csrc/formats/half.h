/* half.h - a float16 number as float32, exactly, by bits alone. */
#ifndef PYLORA_HALF_H
#define PYLORA_HALF_H

#include <stdint.h>
#include <string.h>

static inline float from_half(uint16_t h) {
  uint32_t u = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float v;
  memcpy(&v, &u, 4);
  v *= 0x1p112f; /* float16's exponents are 112 less; subnormal numbers come right, too */
  memcpy(&u, &v, 4);
  u |= sign | ((h & 0x7fff) > 0x7bff ? 0x7f800000u : 0);
  memcpy(&v, &u, 4);
  return v;
}

#endif
