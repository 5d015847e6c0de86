/* ceilings.c - what this machine can do at most: operations of each kind, and bytes to and from memory.
 *
 * Compiled at run time for the machine at hand (ceilings.py). A function does `n` rounds on every
 * thread and returns the operations or bytes of all of them; 0: this machine has no such instruction.
 * The loops hold enough independent chains to hide the latency of the instruction. */
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#define CHAINS 14
#elif defined(__AVX__)
#define WIDTH 32
#define CHAINS 12
#else
#define WIDTH 16
#define CHAINS 12
#endif
typedef float lanes __attribute__((vector_size(WIDTH)));

static volatile float sink;

static double threads(void) { return omp_get_max_threads(); }

double fp32_fma(int64_t n) {
#pragma omp parallel
  {
    lanes a[CHAINS], x, y;
    for (int i = 0; i < WIDTH / 4; i++) x[i] = 0.999f, y[i] = 1e-3f;
    for (int c = 0; c < CHAINS; c++) a[c] = x * (float)c;
    for (int64_t t = 0; t < n; t++)
#pragma GCC unroll 16
      for (int c = 0; c < CHAINS; c++) a[c] = a[c] * x + y;
    lanes sum = a[0];
    for (int c = 1; c < CHAINS; c++) sum += a[c];
    sink = sum[0];
  }
  return 2.0 * CHAINS * (WIDTH / 4) * n * threads();
}

double bf16_dot(int64_t n) {
#if defined(__AVX512BF16__)
#pragma omp parallel
  {
    __m512 a[14];
    __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f01), y = (__m512bh)_mm512_set1_epi16(0x3c02);
    for (int c = 0; c < 14; c++) a[c] = _mm512_set1_ps((float)c);
    for (int64_t t = 0; t < n; t++)
#pragma GCC unroll 16
      for (int c = 0; c < 14; c++) a[c] = _mm512_dpbf16_ps(a[c], x, y);
    for (int c = 0; c < 14; c++) sink = _mm512_cvtss_f32(a[c]);
  }
  return 4.0 * 16 * 14 * n * threads();
#else
  return 0 * (double)n;
#endif
}

double int8_dot(int64_t n) {
#if defined(__AVX512VNNI__)
#pragma omp parallel
  {
    __m512i a[14], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
    for (int c = 0; c < 14; c++) a[c] = _mm512_set1_epi32(c);
    for (int64_t t = 0; t < n; t++)
#pragma GCC unroll 16
      for (int c = 0; c < 14; c++) a[c] = _mm512_dpbusd_epi32(a[c], x, y);
    for (int c = 0; c < 14; c++) sink = (float)_mm_cvtsi128_si32(_mm512_castsi512_si128(a[c]));
  }
  return 8.0 * 16 * 14 * n * threads();
#else
  return 0 * (double)n;
#endif
}

double int16_dot(int64_t n) {
#if defined(__AVX512VNNI__)
#pragma omp parallel
  {
    __m512i a[14], x = _mm512_set1_epi16(3), y = _mm512_set1_epi16(5);
    for (int c = 0; c < 14; c++) a[c] = _mm512_set1_epi32(c);
    for (int64_t t = 0; t < n; t++)
#pragma GCC unroll 16
      for (int c = 0; c < 14; c++) a[c] = _mm512_dpwssd_epi32(a[c], x, y);
    for (int c = 0; c < 14; c++) sink = (float)_mm_cvtsi128_si32(_mm512_castsi512_si128(a[c]));
  }
  return 4.0 * 16 * 14 * n * threads();
#else
  return 0 * (double)n;
#endif
}

/* Matrix tiles: four accumulators, two tiles of each factor. kind 0: bfloat16, 1: int8. */
double amx(int64_t n, int kind) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
  if (syscall(SYS_arch_prctl, 0x1023 /* ask for permission */, 18 /* tile data */)) return 0;
#pragma omp parallel
  {
    uint8_t config[64] __attribute__((aligned(64))) = {1};
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64; /* bytes in a row */
      config[48 + i] = 16;     /* rows */
    }
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
    uint8_t data[1024] __attribute__((aligned(64)));
    memset(data, 0, sizeof data);
    __asm__ volatile("" : : "r"(data) : "memory");
    _tile_zero(0); /* statements, each: in gcc these are macros around asm */
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, data, 64);
    _tile_loadd(5, data, 64);
    _tile_loadd(6, data, 64);
    _tile_loadd(7, data, 64);
    if (kind)
      for (int64_t t = 0; t < n; t++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    else
      for (int64_t t = 0; t < n; t++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    _tile_release();
  }
  return 4.0 * 16 * 16 * (kind ? 128 : 64) * n * threads();
#else
  return 0 * (double)n * kind;
#endif
}

/* Memory: `bytes` (a multiple of 1 MiB for each thread), each thread its own part of it. */
static void part(int64_t bytes, int64_t *from, int64_t *to) {
  int64_t unit = WIDTH, units = bytes / unit, k = omp_get_thread_num(), all = omp_get_num_threads();
  *from = units * k / all;
  *to = units * (k + 1) / all;
}

double read_bytes(const char *p, int64_t bytes) {
#pragma omp parallel
  {
    int64_t i, end;
    part(bytes, &i, &end);
    const lanes *v = (const lanes *)p;
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    for (; i + 4 <= end; i += 4) a += v[i], b += v[i + 1], c += v[i + 2], d += v[i + 3];
    a += b + c + d;
    sink = a[0];
  }
  return (double)bytes;
}

double copy_bytes(char *to, const char *from, int64_t bytes) {
#pragma omp parallel
  {
    int64_t i, end;
    part(bytes, &i, &end);
    memcpy(to + i * WIDTH, from + i * WIDTH, (size_t)((end - i) * WIDTH));
  }
  return 2.0 * bytes;
}

double change_bytes(char *p, int64_t bytes) { /* read, modify, write in place */
#pragma omp parallel
  {
    int64_t i, end;
    part(bytes, &i, &end);
    lanes *v = (lanes *)p, one;
    for (int j = 0; j < WIDTH / 4; j++) one[j] = 1.0f;
    for (; i < end; i++) v[i] += one;
  }
  return 2.0 * bytes;
}
