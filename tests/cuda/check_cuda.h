/* check_cuda.h - what the tests of the CUDA core share: expectations, matrices of any type in awkward layouts, bounds.
 *
 * Each test_*.cpp is a program: 0 when everything held.  "Device" memory is the host's.  Matrices are allocated to the
 * byte, so that a sanitizer sees an access outside; the gaps between rows hold a NaN that is looked for at the
 * end.  Half of them allow vectors of four, the others do not. */
#ifndef CHECK_CUDA_H
#define CHECK_CUDA_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "emulate.h"
#include "pylora_cuda.h"
extern "C" {
#include "reference.h"
}

/* ---- expectations ---- */

static int failures;
static std::string context; /* what is being tested, for the message */

#define EXPECT(condition, ...)                                                    \
  do {                                                                            \
    if (!(condition) && failures++ < 20) {                                        \
      printf("%s:%d: %s [%s] ", __FILE__, __LINE__, #condition, context.c_str()); \
      printf(" " __VA_ARGS__);                                                    \
      printf("\n");                                                               \
    }                                                                             \
  } while (0)
#define EXPECT_STATUS(wanted, call)                                              \
  do {                                                                           \
    const int got_ = (call);                                                     \
    EXPECT(got_ == (wanted), "%s gave %s (%s)", #call, pylora_status_text(got_), \
           pylora_cuda_error());                                                 \
  } while (0)
#define OK(call) EXPECT_STATUS(PYLORA_OK, call)

static inline int finish(const char *name) {
  printf(failures ? "%s: %d FAILED\n" : "%s: passed\n", name, failures);
  return failures != 0;
}

/* The emulated device, opened for the whole program. */
static inline pylora_cuda *device_0(void) {
  static pylora_cuda *g;
  if (!g) {
    const int status = pylora_cuda_open(0, BUILD_DIR "/libcublasLt_emulated.so", &g);
    if (status) {
      printf("no device: %s (%s)\n", pylora_status_text(status), pylora_cuda_error());
      exit(1);
    }
  }
  return g;
}
static inline void expect_bad_index(bool wanted) {
  const int got = pylora_cuda_check(device_0(), NULL);
  EXPECT(got == (wanted ? PYLORA_E_INDEX : PYLORA_OK), "pylora_cuda_check gave %s",
         pylora_status_text(got));
}

/* ---- random numbers: splitmix64 ---- */

static uint64_t state = 20210617;
static inline uint64_t bits64(void) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
static inline int64_t below(int64_t n) { return (int64_t)(bits64() % (uint64_t)n); }
static inline float uniform(void) {
  return (float)((int64_t)(bits64() >> 40) - (1 << 23)) / (1 << 23);
}
static inline int64_t pick(std::vector<int64_t> these) {
  return these[(size_t)below((int64_t)these.size())];
}
static inline std::vector<float> floats(int64_t n, float size) {
  std::vector<float> v((size_t)n);
  for (float &f : v) f = size * uniform();
  return v;
}
static inline std::vector<int64_t> ids_below(int64_t n, int64_t end) {
  std::vector<int64_t> v((size_t)n);
  for (int64_t &i : v) i = below(end);
  return v;
}

/* ---- numbers of a type ---- */

static inline float value_of_bits(int dtype, const void *p, int64_t i) {
  if (dtype == PYLORA_F32) return ((const float *)p)[i];
  const uint16_t h = ((const uint16_t *)p)[i];
  return dtype == PYLORA_F16 ? emulated_widen_f16(h) : emulated_float_of_bits((uint32_t)h << 16);
}
static inline void put_value(int dtype, void *p, int64_t i, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (dtype == PYLORA_F32)
    ((float *)p)[i] = x;
  else if (dtype == PYLORA_F16)
    ((uint16_t *)p)[i] = emulated_round_f16(x);
  else
    ((uint16_t *)p)[i] =
        (uint16_t)(isnan(x) ? u >> 16 | 0x40 : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
/* Half the distance of two neighbours, over their size; and the smallest distance of all. */
static inline double roundoff(int dtype) {
  return dtype == PYLORA_F32 ? 0x1p-24 : dtype == PYLORA_F16 ? 0x1p-11 : 0x1p-8;
}
static inline double least(int dtype) { return dtype == PYLORA_F16 ? 0x1p-24 : FLT_MIN; }
static inline int any_type(void) { return (int)pick({PYLORA_F32, PYLORA_BF16, PYLORA_F16}); }

/* ---- matrices ---- */

struct Matrix {
  int dtype;
  int64_t rows, cols, ld, offset,
      n; /* n elements are allocated, the first row's first is `offset` or the last's */
  std::unique_ptr<char[]> memory;
  pylora_mat mat;

  size_t size() const { return dtype == PYLORA_F32 ? 4 : 2; }
  /* rows x cols of numbers in (-scale, scale) */
  Matrix(int type, int64_t r, int64_t c, float scale) : dtype(type), rows(r), cols(c) {
    const bool vectors = below(2) == 0;
    const int64_t gap = vectors ? (4 - cols % 4) % 4 + pick({0, 0, 4, 8}) : pick({0, 0, 1, 5});
    ld = cols + gap;
    offset = vectors ? 0 : pick({0, 1, 3});
    n = rows && cols ? offset + (rows - 1) * ld + cols : 0;
    memory.reset(new char[(size_t)n * size() + 16]);
    for (int64_t i = 0; i < n; i++) poison(i);
    char *first = base() + offset * (int64_t)size();
    if (n && below(3) == 0) first += (rows - 1) * ld * (int64_t)size(), ld = -ld;
    mat = {};
    mat.rows = rows, mat.cols = cols, mat.ld = ld;
    if (n && dtype == PYLORA_F32) mat.p = (float *)first;
    if (n && dtype == PYLORA_BF16) mat.b = (uint16_t *)first;
    if (n && dtype == PYLORA_F16) mat.h = (uint16_t *)first;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) put(i, j, scale * uniform());
  }
  Matrix(Matrix &&) = default;
  ~Matrix() {
    if (!memory) return;
    const int64_t stride = llabs(ld);
    for (int64_t i = 0; i < n; i++)
      if (i < offset || (i - offset) % stride >= cols)
        EXPECT(poisoned(i), "gap of a matrix was written");
  }
  /* 16-byte aligned */
  char *base() const { return (char *)(((uintptr_t)memory.get() + 15) & ~(uintptr_t)15); }
  void poison(int64_t i) {
    const uint32_t word = 0x7fc1c1c1u;
    memcpy(base() + i * (int64_t)size(), (const char *)&word + 4 - size(), size());
  }
  bool poisoned(int64_t i) const {
    const uint32_t word = 0x7fc1c1c1u;
    return memcmp(base() + i * (int64_t)size(), (const char *)&word + 4 - size(), size()) == 0;
  }
  void *first() const { return mat.p ? (void *)mat.p : mat.b ? (void *)mat.b : (void *)mat.h; }
  const void *at(int64_t i, int64_t j) const {
    return (const char *)first() + (i * ld + j) * (int64_t)size();
  }
  float get(int64_t i, int64_t j) const { return value_of_bits(dtype, first(), i * ld + j); }
  void put(int64_t i, int64_t j, float x) { put_value(dtype, first(), i * ld + j, x); }
  void fill(float x) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) put(i, j, x);
  }
  void copy_from(const Matrix &other) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) put(i, j, other.get(i, j));
  }
  Matrix copy() const {
    Matrix m(dtype, rows, cols, 0);
    m.copy_from(*this);
    return m;
  }
  /* The same values in float32, for the reference. */
  Matrix wide() const {
    Matrix m(PYLORA_F32, rows, cols, 0);
    m.copy_from(*this);
    return m;
  }
  const pylora_mat *operator&() const { return &mat; }
};
static inline Matrix wide_zeros(int64_t rows, int64_t cols) {
  return Matrix(PYLORA_F32, rows, cols, 0);
}

/* |got - want| <= gamma_n magnitude, one rounding to got's type, and one for the reference's own result. */
static inline void expect_near(const char *what, const Matrix &got, const Matrix &want,
                               const Matrix &magnitude, double n) {
  const double u = 0x1p-24, gamma = n * u / (1 - n * u);
  for (int64_t i = 0; i < got.rows; i++)
    for (int64_t j = 0; j < got.cols; j++) {
      const double g = got.get(i, j), w = want.get(i, j);
      const double error = gamma * fabs((double)magnitude.get(i, j)) + u * fabs(w) + FLT_MIN;
      const double bound = error + roundoff(got.dtype) * (fabs(w) + error) + least(got.dtype);
      EXPECT(g == w || fabs(g - w) <= bound, "%s[%d,%d] %.9g, not %.9g: off %.3g, allowed %.3g",
             what, (int)i, (int)j, g, w, fabs(g - w), bound);
    }
}
static inline void expect_same(const char *what, const Matrix &a, const Matrix &b) {
  for (int64_t i = 0; i < a.rows; i++)
    EXPECT(a.cols == 0 || memcmp(a.at(i, 0), b.at(i, 0), (size_t)a.cols * a.size()) == 0,
           "%s: row %d has other bits", what, (int)i);
}
static inline void expect_near(const char *what, const std::vector<float> &got,
                               const std::vector<float> &want, const std::vector<float> &magnitude,
                               double n) {
  for (size_t i = 0; i < got.size(); i++) {
    const double g = got[i], w = want[i];
    const double bound = n * 0x1p-24 * fabs((double)magnitude[i]) + 0x1p-24 * fabs(w) + FLT_MIN;
    EXPECT(g == w || fabs(g - w) <= bound, "%s[%d] %.9g, not %.9g: off %.3g, allowed %.3g", what,
           (int)i, g, w, fabs(g - w), bound);
  }
}

enum { EXP = 8 }; /* roundings that an exp or log may be off by: 2 ulp are at most 4 u */

#endif
