/* philox.cuh - Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
 * as one thread needs it, for every kernel that has dropout in it. */
#ifndef PYLORA_PHILOX_CUH
#define PYLORA_PHILOX_CUH

#include "device.cuh"

/* Words 4 block .. 4 block + 3 of the stream: pylora.h, pylora_philox. */
DEVICE uint4 philox(uint64_t seed, uint64_t stream, uint64_t block) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)stream,
           c3 = (uint32_t)(stream >> 32), key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  uint4 words;
  words.x = c0, words.y = c1, words.z = c2, words.w = c3;
  return words;
}

/* pylora_drop for a kernel: an element is kept iff its word is >= threshold, and then multiplied by `scale`.
 * No dropout at all: threshold 0, scale 1. */
struct Drop {
  uint64_t seed, stream;
  int64_t row0;
  uint32_t threshold; /* p 2^32, which is exact in double, and at most 2^32 - 2^8 */
  float scale;        /* 1 / (1 - p) in float32 */
};

/* Elements 4 block .. 4 block + 3, as the words say. */
DEVICE float4 dropped(const Drop &drop, uint64_t block, float4 x) {
  const uint4 w = philox(drop.seed, drop.stream, block);
  x.x = w.x >= drop.threshold ? x.x * drop.scale : 0.0f;
  x.y = w.y >= drop.threshold ? x.y * drop.scale : 0.0f;
  x.z = w.z >= drop.threshold ? x.z * drop.scale : 0.0f;
  x.w = w.w >= drop.threshold ? x.w * drop.scale : 0.0f;
  return x;
}

#endif
