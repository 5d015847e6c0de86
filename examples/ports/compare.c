/* compare.c - holds what was computed against the expected outputs, and writes it to a file. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "vectors.h"

static int cases, failures, written; /* written: cases that have begun in the file */
static int64_t total;
static double worst;
static FILE *file;

/* What was computed, for `pylora vectors --check`: {"cases": {case: {output: [numbers]}}}. */
static void write_array(const testcase *c, const char *name, const char *dtype, const void *got,
                        int64_t n) {
  const char *between = c->checked ? ",\n  " : "\n  ";
  if (c->checked == 0) fprintf(file, "%s\n \"%s\": {", written++ ? "}," : "", c->name);
  fprintf(file, "%s\"%s\": [", between, name);
  for (int64_t i = 0; i < n; i++) {
    const char *comma = i ? ", " : "";
    const double number = *dtype != 'f'     ? 0
                          : dtype[1] == '3' ? (double)((const float *)got)[i]
                                            : ((const double *)got)[i];
    if (!isfinite(number))
      fprintf(file, "%s\"%s\"", comma, isnan(number) ? "nan" : number > 0 ? "inf" : "-inf");
    else if (*dtype == 'f')
      fprintf(file, "%s%.17g", comma, number);
    else if (dtype[1] == '8')
      fprintf(file, "%s%d", comma, ((const uint8_t *)got)[i]);
    else if (dtype[1] == '1')
      fprintf(file, "%s%d", comma, ((const uint16_t *)got)[i]);
    else if (dtype[1] == '3')
      fprintf(file, "%s%lld", comma, (long long)((const uint32_t *)got)[i]);
    else
      fprintf(file, "%s%lld", comma, (long long)((const int64_t *)got)[i]);
  }
  fprintf(file, "]");
}

void write_to(const char *path) {
  if (!(file = fopen(path, "w"))) stop(path, "cannot be written");
  fprintf(file, "{\"format\": \"pylora-outputs\", \"version\": 1, \"cases\": {");
}

void check_array(testcase *c, const char *name, const char *dtype, const void *got, int64_t n) {
  if (!listed(c, name)) return;
  const array want = output(c, name);
  if (file) write_array(c, name, dtype, got, n);
  const char *bound_entry = value(entry_of(c->outputs, name), "bound");
  const double *bound = bound_entry ? read_array(bound_entry).p : NULL, *expected = want.p;
  const int64_t count = want.rows * want.cols;
  const int fits = n == count && !strcmp(dtype, bound && *dtype == 'f' ? dtype : want.dtype);
  int64_t bad = 0;
  for (int64_t i = 0; i < count && fits; i++)
    if (bound) {
      const double number = dtype[1] == '3' ? ((const float *)got)[i] : ((const double *)got)[i];
      const double error = fabs(number - expected[i]);
      if (!(error <= bound[i]))
        bad++;
      else if (bound[i] > 0 && error / bound[i] > worst)
        worst = error / bound[i];
    } else {
      const size_t at = (size_t)i * want.size;
      bad += memcmp((const char *)got + at, (const char *)want.p + at, want.size) != 0;
    }
  c->checked++, total += count;
  if (!fits) bad = count ? count : 1;
  if (!bad) return;
  fprintf(stderr, "%s/%s: %lld of %lld are wrong\n", c->name, name, (long long)bad,
          (long long)count);
  failures++;
}

void check(testcase *c, const char *name, pylora_mat got) {
  check_array(c, name, "f32", got.p, got.rows * got.cols);
}

void finish_case(testcase *c) {
  int listed = 0;
  cases++;
  for (const char *at = c->outputs; (at = strstr(at, "\"rule\": ")); at++) listed++;
  if (c->checked == listed) return;
  fprintf(stderr, "%s: %d of its %d outputs were checked\n", c->name, c->checked, listed);
  failures++;
}

int report(void) {
  printf("%d cases, %lld numbers, %d failures; the largest error is %.2g of its bound\n", cases,
         (long long)total, failures, worst);
  if (file) {
    fprintf(file, "%s\n}}\n", written ? "}" : "");
    if (fclose(file)) stop("the outputs", "cannot be written");
  }
  return failures != 0;
}
