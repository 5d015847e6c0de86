/* random.c - named streams, and uniform and normal numbers, bit for bit: docs/random.md. Compile
 * without fused multiply-add (-ffp-contract=off). */
#include <float.h>
#include <math.h>
#include <string.h>

#include "port.h"

_Static_assert(FLT_EVAL_METHOD == 0, "each operation must be rounded to its own type");

uint64_t stream(const char *name) { /* eight bytes, the lowest first */
  unsigned char digest[32];
  uint64_t number = 0;
  sha256(name, strlen(name), digest);
  for (int i = 7; i >= 0; i--) number = number << 8 | digest[i];
  return number;
}

void units(double *u, int64_t n, uint64_t seed, uint64_t stream_number) { /* */
  for (int64_t e = 0; e < n; e++) {
    uint32_t w[2];
    must(pylora_philox(seed, stream_number, 2 * e, 2, w));
    u[e] = ((double)(w[0] >> 6) * 0x1p26 + (double)(w[1] >> 6) + 0.5) * 0x1p-52;
  }
}

static double logarithm(double x) { /* random.md, section 4 */
  int e;
  double f = frexp(x, &e);
  if (f < 0x1.6a09e667f3bcdp-1) f *= 2, e--;
  const double s = (f - 1) / (f + 1), z = s * s;
  double tail = 1.0 / 23;
  for (int odd = 21; odd > 1; odd -= 2) tail = tail * z + 1.0 / odd;
  return e * 0x1.62e42fee00000p-1 + (e * 0x1.a39ef35793c76p-33 + (s + s * (tail * z)) * 2);
}

/* AS 241 (PPND16): P and Q of the centre, the second and the third pair, the constant term first. */
static const double AS241[3][2][8] = {
    {{3.3871328727963665, 133.14166789178438, 1971.5909503065513, 13731.69376550946,
      45921.95393154987, 67265.7709270087, 33430.57558358813, 2509.0809287301227},
     {1, 42.31333070160091, 687.1870074920579, 5394.196021424751, 21213.794301586597,
      39307.89580009271, 28729.085735721943, 5226.495278852854}},
    {{1.4234371107496835, 4.630337846156546, 5.769497221460691, 3.6478483247632045,
      1.2704582524523684, 0.2417807251774506, 0.022723844989269184, 0.0007745450142783414},
     {1, 2.053191626637759, 1.6763848301838038, 0.6897673349851, 0.14810397642748008,
      0.015198666563616457, 0.0005475938084995345, 1.0507500716444169e-09}},
    {{6.657904643501103, 5.463784911164114, 1.7848265399172913, 0.29656057182850487,
      0.026532189526576124, 0.0012426609473880784, 2.7115555687434876e-05, 2.0103343992922881e-07},
     {1, 0.599832206555888, 0.1369298809227358, 0.014875361290850615, 0.0007868691311456133,
      1.8463183175100548e-05, 1.421511758316446e-07, 2.0442631033899397e-15}}};

static double ratio(const double pair[2][8], double t) {
  double p = pair[0][7], q = pair[1][7];
  for (int i = 6; i >= 0; i--) p = p * t + pair[0][i], q = q * t + pair[1][i];
  return p / q;
}

double quantile(double u) { /* */
  const double q = u - 0.5;
  if (fabs(q) <= 0.425) return q * ratio(AS241[0], 0.180625 - q * q);
  const double r = sqrt(-logarithm(q < 0 ? u : 1 - u));
  const double z = r <= 5 ? ratio(AS241[1], r - 1.6) : ratio(AS241[2], r - 5);
  return q < 0 ? -z : z;
}

static void fill(pylora_mat out, double factor, uint64_t seed, const char *name, int is_normal) {
  const int64_t n = out.rows * out.cols;
  double *u = take((size_t)n * sizeof *u);
  units(u, n, seed, stream(name));
  for (int64_t e = 0; e < n; e++)
    out.p[e] = (float)((is_normal ? quantile(u[e]) : u[e] * 2 - 1) * factor);
}

void uniform(pylora_mat out, double bound, uint64_t seed, const char *name) {
  fill(out, bound, seed, name, 0);
}

void normal(pylora_mat out, double deviation, uint64_t seed, const char *name) {
  fill(out, deviation, seed, name, 1);
}
