/* cublaslt_standin.cpp - the functions of cuBLASLt that csrc/cuda/products.cu finds by name, on the host.
 *
 * D = alpha op(A) op(B) + beta C (+ bias), with NVIDIA's numbers for types and attributes. What the real library would
 * refuse is refused, and so is what this one does not know, with a line on stderr that says what it was. An algorithm
 * serves the problem that it was found for and no other, needs its workspace (which it fills with NaN), and pointers as
 * aligned as its search was told. */
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "cuda_runtime.h"

namespace {

enum Status { OK = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, F16 = 2, BF16 = 14 };
enum Compute { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_FAST_TF32 = 77 };
enum Epilogue { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };

struct Layout {
  int32_t type;
  int32_t order = 0; /* 0: columns one behind the other, 1: rows */
  uint64_t rows, cols;
  int64_t ld;
  int32_t batch = 1;
  int64_t stride = 0;
};
struct Desc {
  int32_t compute, scale;
  int32_t pointer_mode = 0, trans_a = 0, trans_b = 0;
  uint32_t epilogue = EPILOGUE_DEFAULT;
  const void *bias = nullptr;
  int32_t bias_type = -1; /* D's */
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reduction = 0xffffffffu, alignment[4] = {256, 256, 256, 256};
};
struct Problem { /* what an algorithm is found for; no padding, as it is compared byte by byte */
  int64_t m, n, k, lda, ldb, ldc, ldd;
  int32_t types[4], orders[4], compute, trans_a, trans_b, epilogue, batch, bias_type;
};
struct Algo { /* 64 bytes, the caller's */
  uint64_t magic, problem, workspace;
  uint32_t alignment[4];
  uint64_t rest[3];
};
static_assert(sizeof(Algo) == 64, "cublasLtMatmulAlgo_t has 64 bytes");
struct Heuristic {
  Algo algo;
  size_t workspace;
  int32_t state;
  float waves;
  int32_t reserved[4];
};
struct Handle {
  uint64_t magic;
};
enum : uint64_t { MAGIC = 0x70796c6f72614c74u };

Status refuse(Status status, const char *why, int64_t number = 0) {
  fprintf(stderr, "stand-in for cuBLASLt: %s (%lld)\n", why, (long long)number);
  return status;
}

bool known(int32_t type) { return type == F32 || type == F16 || type == BF16; }
size_t size_of(int32_t type) { return type == F32 ? 4 : 2; }

/* Copies an attribute of exactly this size. */
template <typename T> Status get(T *to, const void *from, size_t bytes) {
  if (!from || bytes != sizeof(T))
    return refuse(INVALID_VALUE, "an attribute has the wrong size", bytes);
  memcpy(to, from, sizeof(T));
  return OK;
}

float number(const void *p, int32_t type, int64_t i) {
  if (type == F32) return ((const float *)p)[i];
  const uint16_t x = ((const uint16_t *)p)[i];
  return type == BF16 ? emulated_float_of_bits((uint32_t)x << 16) : emulated_widen_f16(x);
}
void put(void *p, int32_t type, int64_t i, float f) {
  if (type == F32) {
    ((float *)p)[i] = f;
  } else if (type == F16) {
    ((uint16_t *)p)[i] = emulated_round_f16(f);
  } else {
    const uint32_t u = emulated_bits_of_float(f);
    ((uint16_t *)p)[i] =
        (uint16_t)(isnan(f) ? u >> 16 | 0x40 : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
  }
}
/* To 10 bits after the point, as tensor cores read float32 when they may. */
float tf32(float f) {
  if (!isfinite(f)) return f;
  return emulated_float_of_bits((emulated_bits_of_float(f) + 0x1000u) & 0xffffe000u);
}
int64_t at(const Layout &l, int64_t i, int64_t j) {
  return l.order == 0 ? j * l.ld + i : i * l.ld + j;
}

Status check_layout(const Layout &l, const char *which) {
  if (!known(l.type))
    return refuse(NOT_SUPPORTED, "a type other than float32, float16, bfloat16", l.type);
  const uint64_t least = l.order == 0 ? l.rows : l.cols;
  if (l.rows == 0 || l.cols == 0 || l.ld < (int64_t)least) {
    fprintf(stderr, "%s: %llu x %llu, ld %lld: ", which, (unsigned long long)l.rows,
            (unsigned long long)l.cols, (long long)l.ld);
    return refuse(INVALID_VALUE, "an empty matrix, or a leading dimension that is too small", l.ld);
  }
  return OK;
}

/* Whether the shapes and types go together; fills the problem. */
Status check(const Desc &d, const Layout *const (&l)[4], Problem *p) {
  static const char *const names[4] = {"A", "B", "C", "D"};
  for (int i = 0; i < 4; i++)
    if (const Status s = check_layout(*l[i], names[i])) return s;
  memset(p, 0, sizeof *p);
  p->m = (int64_t)(d.trans_a ? l[0]->cols : l[0]->rows);
  p->k = (int64_t)(d.trans_a ? l[0]->rows : l[0]->cols);
  p->n = (int64_t)(d.trans_b ? l[1]->rows : l[1]->cols);
  if ((int64_t)(d.trans_b ? l[1]->cols : l[1]->rows) != p->k)
    return refuse(INVALID_VALUE, "op(A) and op(B) do not fit each other", p->k);
  for (int i = 2; i < 4; i++)
    if ((int64_t)l[i]->rows != p->m || (int64_t)l[i]->cols != p->n)
      return refuse(INVALID_VALUE, "C or D does not fit op(A) op(B)", (int64_t)l[i]->rows);
  if (d.scale != F32) return refuse(NOT_SUPPORTED, "alpha and beta must be float32", d.scale);
  if (l[0]->type != l[1]->type || l[2]->type != l[3]->type)
    return refuse(NOT_SUPPORTED, "A and B must have one type, C and D too", l[0]->type);
  if (l[3]->type != F32 && l[3]->type != l[0]->type)
    return refuse(NOT_SUPPORTED, "D must be float32 or of A's type", l[3]->type);
  if (d.compute == COMPUTE_32F_FAST_TF32 && l[0]->type != F32)
    return refuse(NOT_SUPPORTED, "TF32 is for float32", l[0]->type);
  for (int i = 0; i < 4; i++)
    if (l[i]->batch != l[3]->batch)
      return refuse(INVALID_VALUE, "batch counts differ", l[i]->batch);
  if (d.epilogue == EPILOGUE_BIAS && d.bias_type >= 0 && d.bias_type != l[3]->type)
    return refuse(NOT_SUPPORTED, "a bias must have D's type", d.bias_type);
  p->lda = l[0]->ld, p->ldb = l[1]->ld, p->ldc = l[2]->ld, p->ldd = l[3]->ld;
  for (int i = 0; i < 4; i++) p->types[i] = l[i]->type, p->orders[i] = l[i]->order;
  p->compute = d.compute, p->trans_a = d.trans_a, p->trans_b = d.trans_b;
  p->epilogue = (int32_t)d.epilogue, p->batch = l[3]->batch, p->bias_type = d.bias_type;
  return OK;
}

uint64_t hash(const Problem &p) {
  uint64_t h = 14695981039346656037u;
  for (size_t i = 0; i < sizeof p; i++) h = (h ^ ((const unsigned char *)&p)[i]) * 1099511628211u;
  return h;
}

struct Product {
  Desc desc;
  Layout a, b, c, d;
  Problem problem;
  float alpha, beta;
  const void *A, *B, *C;
  void *D, *workspace;
  size_t workspace_bytes;

  cudaError_t run() const {
    if (workspace_bytes) memset(workspace, 0xff, workspace_bytes);
    for (int i = 0; i < problem.batch; i++) one(i);
    return cudaSuccess;
  }
  static const void *of_batch(const void *p, const Layout &l, int i) {
    return (const char *)p + (int64_t)i * l.stride * (int64_t)size_of(l.type);
  }
  void one(int index) const {
    const int64_t m = problem.m, n = problem.n, k = problem.k;
    const void *pa = of_batch(A, a, index), *pb = of_batch(B, b, index);
    const void *pc = of_batch(C, c, index);
    void *pd = (void *)of_batch(D, d, index);
    const bool round = desc.compute == COMPUTE_32F_FAST_TF32;
    std::vector<float> at_(m * k), bt(k * n), sum(n);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < k; j++)
        at_[i * k + j] = number(pa, a.type, desc.trans_a ? at(a, j, i) : at(a, i, j));
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < n; j++)
        bt[i * n + j] = number(pb, b.type, desc.trans_b ? at(b, j, i) : at(b, i, j));
    if (round) {
      for (float &x : at_) x = tf32(x);
      for (float &x : bt) x = tf32(x);
    }
    for (int64_t i = 0; i < m; i++) {
      sum.assign(n, 0.0f);
      for (int64_t l = 0; l < k; l++) {
        const float x = at_[i * k + l], *row = bt.data() + l * n;
        for (int64_t j = 0; j < n; j++) sum[j] += x * row[j];
      }
      for (int64_t j = 0; j < n; j++) {
        float y = alpha * sum[j];
        if (beta != 0) y += beta * number(pc, c.type, at(c, i, j));
        if (desc.epilogue == EPILOGUE_BIAS) y += number(desc.bias, d.type, i);
        put(pd, d.type, at(d, i, j), y);
      }
    }
  }
};

} // namespace

#define API EMULATED_API int

EMULATED_API size_t cublasLtGetVersion(void) { return 130101; }
EMULATED_API const char *cublasLtGetStatusString(int status) {
  return status == OK              ? "the operation completed successfully"
         : status == INVALID_VALUE ? "an unsupported value or parameter was passed to the function"
         : status == NOT_SUPPORTED ? "the functionality requested is not supported"
                                   : "the function failed to launch on the GPU";
}

API cublasLtCreate(Handle **handle) {
  *handle = new Handle{MAGIC};
  return OK;
}
API cublasLtDestroy(Handle *handle) {
  if (!handle || handle->magic != MAGIC) return refuse(INVALID_VALUE, "not a handle");
  delete handle;
  return OK;
}

API cublasLtMatmulDescCreate(Desc **desc, int32_t compute, int32_t scale) {
  if (compute != COMPUTE_32F && compute != COMPUTE_32F_PEDANTIC && compute != COMPUTE_32F_FAST_TF32)
    return refuse(NOT_SUPPORTED, "an unknown compute type", compute);
  *desc = new Desc;
  (*desc)->compute = compute, (*desc)->scale = scale;
  return OK;
}
API cublasLtMatmulDescDestroy(Desc *desc) {
  delete desc;
  return OK;
}
API cublasLtMatmulDescSetAttribute(Desc *d, int32_t attribute, const void *value, size_t bytes) {
  if (!d) return refuse(INVALID_VALUE, "no descriptor");
  switch (attribute) {
  case 2: {
    if (const Status s = get(&d->pointer_mode, value, bytes)) return s;
    return d->pointer_mode == 0 ? OK : refuse(NOT_SUPPORTED, "alpha and beta must be the host's");
  }
  case 3:
  case 4: {
    int32_t *const t = attribute == 3 ? &d->trans_a : &d->trans_b;
    if (const Status s = get(t, value, bytes)) return s;
    return *t == 0 || *t == 1 ? OK : refuse(INVALID_VALUE, "an unknown transposition", *t);
  }
  case 7: {
    if (const Status s = get(&d->epilogue, value, bytes)) return s;
    if (d->epilogue == EPILOGUE_DEFAULT || d->epilogue == EPILOGUE_BIAS) return OK;
    return refuse(NOT_SUPPORTED, "an unknown epilogue", d->epilogue);
  }
  case 8:
    return get(&d->bias, value, bytes);
  case 26:
    return get(&d->bias_type, value, bytes);
  }
  return refuse(NOT_SUPPORTED, "an unknown attribute of a product", attribute);
}

API cublasLtMatrixLayoutCreate(Layout **layout, int32_t type, uint64_t rows, uint64_t cols,
                               int64_t ld) {
  *layout = new Layout{type, 0, rows, cols, ld, 1, 0};
  return OK;
}
API cublasLtMatrixLayoutDestroy(Layout *layout) {
  delete layout;
  return OK;
}
API cublasLtMatrixLayoutSetAttribute(Layout *l, int32_t attribute, const void *value,
                                     size_t bytes) {
  if (!l) return refuse(INVALID_VALUE, "no layout");
  switch (attribute) {
  case 0:
    return get(&l->type, value, bytes);
  case 1: {
    if (const Status s = get(&l->order, value, bytes)) return s;
    return l->order == 0 || l->order == 1 ? OK
                                          : refuse(NOT_SUPPORTED, "an unknown order", l->order);
  }
  case 2:
    return get(&l->rows, value, bytes);
  case 3:
    return get(&l->cols, value, bytes);
  case 4:
    return get(&l->ld, value, bytes);
  case 5:
    return get(&l->batch, value, bytes);
  case 6:
    return get(&l->stride, value, bytes);
  }
  return refuse(NOT_SUPPORTED, "an unknown attribute of a layout", attribute);
}

API cublasLtMatmulPreferenceCreate(Preference **preference) {
  *preference = new Preference;
  return OK;
}
API cublasLtMatmulPreferenceDestroy(Preference *preference) {
  delete preference;
  return OK;
}
API cublasLtMatmulPreferenceSetAttribute(Preference *p, int32_t attribute, const void *value,
                                         size_t bytes) {
  if (!p) return refuse(INVALID_VALUE, "no preference");
  switch (attribute) {
  case 1:
    return get(&p->workspace, value, bytes);
  case 3:
    return get(&p->reduction, value, bytes);
  case 5:
  case 6:
  case 7:
  case 8: {
    uint32_t *const a = &p->alignment[attribute - 5];
    if (const Status s = get(a, value, bytes)) return s;
    return *a && !(*a & (*a - 1)) ? OK : refuse(INVALID_VALUE, "not a power of two", *a);
  }
  }
  return refuse(NOT_SUPPORTED, "an unknown preference", attribute);
}

API cublasLtMatmulAlgoGetHeuristic(Handle *handle, Desc *desc, Layout *A, Layout *B, Layout *C,
                                   Layout *D, Preference *preference, int32_t requested,
                                   Heuristic *results, int32_t *returned) {
  if (!handle || handle->magic != MAGIC || !desc || !A || !B || !C || !D || !preference ||
      !results || !returned || requested < 1)
    return refuse(INVALID_VALUE, "an argument of the search is missing");
  *returned = 0;
  const Layout *const layouts[4] = {A, B, C, D};
  Problem problem;
  if (const Status s = check(*desc, layouts, &problem)) return s;
  for (int i = 0; i < 4; i++)
    if (preference->alignment[i] < size_of(layouts[i]->type))
      return refuse(NOT_SUPPORTED, "an alignment below the element's", preference->alignment[i]);
  for (int i = 0; i < 2 && i < requested; i++) {
    Heuristic *const h = &results[(*returned)++];
    memset(h, 0, sizeof *h);
    /* The first takes some workspace if it may, so that one that is not given shows. */
    h->workspace = i == 0 && preference->workspace >= 4096 ? 4096 : 0;
    h->algo.magic = MAGIC, h->algo.problem = hash(problem), h->algo.workspace = h->workspace;
    memcpy(h->algo.alignment, preference->alignment, sizeof h->algo.alignment);
    h->waves = 1;
  }
  return OK;
}

API cublasLtMatmul(Handle *handle, Desc *desc, const void *alpha, const void *A, Layout *a,
                   const void *B, Layout *b, const void *beta, const void *C, Layout *c, void *D,
                   Layout *d, const Algo *algo, void *workspace, size_t workspace_bytes,
                   cudaStream_t stream) {
  if (!handle || handle->magic != MAGIC || !desc || !a || !b || !c || !d || !alpha || !beta || !A ||
      !B || !D)
    return refuse(INVALID_VALUE, "an argument of the product is missing");
  const Layout *const layouts[4] = {a, b, c, d};
  Product p = {*desc, *a, *b, *c, *d, {}, 0, 0, A, B, C, D, nullptr, 0};
  if (const Status s = check(*desc, layouts, &p.problem)) return s;
  memcpy(&p.alpha, alpha, sizeof p.alpha);
  memcpy(&p.beta, beta, sizeof p.beta);
  if (p.beta != 0 && !C) return refuse(INVALID_VALUE, "beta asks for C, which is missing");
  if (C == D && (c->ld != d->ld || c->order != d->order))
    return refuse(INVALID_VALUE, "in place, C and D must have one layout", c->ld);
  if (desc->epilogue == EPILOGUE_BIAS && !desc->bias)
    return refuse(INVALID_VALUE, "the epilogue asks for a bias, which is missing");
  const void *const pointers[4] = {A, B, C, D};
  for (int i = 0; i < 4; i++) {
    const size_t needed = algo ? algo->alignment[i] : size_of(layouts[i]->type);
    if ((i == 2 && p.beta == 0) || (uintptr_t)pointers[i] % needed == 0) continue;
    return refuse(INVALID_VALUE, "a pointer is less aligned than the algorithm needs", i);
  }
  if (algo) {
    if (algo->magic != MAGIC || algo->problem != hash(p.problem))
      return refuse(INVALID_VALUE, "an algorithm that was found for another problem");
    if (algo->workspace > workspace_bytes || (algo->workspace && !workspace))
      return refuse(INVALID_VALUE, "the workspace is too small", (int64_t)workspace_bytes);
    if (algo->workspace && (uintptr_t)workspace % 16)
      return refuse(INVALID_VALUE, "the workspace is not aligned");
    p.workspace = workspace, p.workspace_bytes = algo->workspace;
  }
  return emulated_enqueue(stream, [p] { return p.run(); }) == cudaSuccess ? OK : EXECUTION_FAILED;
}
