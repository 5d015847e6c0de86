/* products.cu - cuBLASLt, loaded when a context is opened, and the algorithms it chose for the shapes seen.
 *
 * Nothing is linked and no header of cuBLAS is needed: what is used of its interface is declared here, and has been
 * the same since CUDA 11.  An algorithm is asked for once per shape, and does not depend on whether the product is
 * added to what is there, so that a term more or less never changes how the others are summed.  Partial sums are
 * kept in float32: schemes that add them up in the output, or in its type, are not allowed. */
#include "products.h"

#include <dlfcn.h>
#include <mutex>
#include <new>
#include <stdio.h>
#include <string.h>

namespace {

typedef int Status; /* cublasStatus_t; 0 is success */
typedef struct LtHandle *Handle;
typedef struct LtDescription *Description;
typedef struct LtLayout *Layout;
typedef struct LtPreference *Preference;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

enum { REAL_32F = 0, REAL_16F = 2, REAL_16BF = 14 };   /* cudaDataType_t */
enum { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 }; /* cublasComputeType_t */
enum { DESC_TRANSPOSE_A = 3 };                         /* cublasLtMatmulDescAttributes_t */
enum { TRANSPOSE = 1 };                                /* cublasOperation_t */
enum {                                                 /* cublasLtMatmulPreferenceAttributes_t */
       PREFER_WORKSPACE = 1,
       PREFER_REDUCTIONS = 3,
       PREFER_ALIGNMENT_A = 5,
       PREFER_ALIGNMENT_B = 6,
       PREFER_ALIGNMENT_C = 7,
       PREFER_ALIGNMENT_D = 8,
};
enum {
  REDUCE_IN_COMPUTE_TYPE = 2
}; /* cublasLtReductionScheme_t; no splitting at all is always allowed */

struct Library {
  void *file;
  Status (*Create)(Handle *);
  Status (*Destroy)(Handle);
  size_t (*GetVersion)(void);
  const char *(*GetStatusString)(Status); /* may be missing: since CUDA 11.4 */
  Status (*MatmulDescCreate)(Description *, int compute, int scale);
  Status (*MatmulDescDestroy)(Description);
  Status (*MatmulDescSetAttribute)(Description, int, const void *, size_t);
  Status (*MatrixLayoutCreate)(Layout *, int type, uint64_t rows, uint64_t cols, int64_t ld);
  Status (*MatrixLayoutDestroy)(Layout);
  Status (*MatmulPreferenceCreate)(Preference *);
  Status (*MatmulPreferenceDestroy)(Preference);
  Status (*MatmulPreferenceSetAttribute)(Preference, int, const void *, size_t);
  Status (*MatmulAlgoGetHeuristic)(Handle, Description, Layout, Layout, Layout, Layout, Preference,
                                   int wanted, Heuristic *, int *found);
  Status (*Matmul)(Handle, Description, const void *alpha, const void *, Layout, const void *,
                   Layout, const void *beta, const void *, Layout, void *, Layout,
                   const Algorithm *, void *ws, size_t, cudaStream_t);
};

int loaded_version; /* of the last library opened; any of them will do for a report */

int open_file(const char *path, void **file) {
  static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11",
                                      "libcublasLt.so"};
  if (path) {
    *file = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (*file) return PYLORA_OK;
    const char *why = dlerror();
    return device_failure("cuBLASLt cannot be loaded", why ? why : path);
  }
  for (const char *name : names)
    if ((*file = dlopen(name, RTLD_NOW | RTLD_NOLOAD))) return PYLORA_OK;
  for (const char *name : names)
    if ((*file = dlopen(name, RTLD_NOW | RTLD_LOCAL))) return PYLORA_OK;
  return device_failure("cuBLASLt cannot be found",
                        "libcublasLt.so is not loaded and not on the system's path: install CUDA's "
                        "cuBLAS (pip install nvidia-cublas), or give its path");
}

template <typename F> bool find(void *file, const char *name, F *function) {
  *function = (F)dlsym(file, name);
  return *function != NULL;
}

int load(const char *path, Library *l) {
  TRY(open_file(path, &l->file));
#define FIND(name)                                \
  if (!find(l->file, "cublasLt" #name, &l->name)) \
  return device_failure("cuBLASLt", "the library has no function cublasLt" #name)
  FIND(Create);
  FIND(Destroy);
  FIND(GetVersion);
  FIND(MatmulDescCreate);
  FIND(MatmulDescDestroy);
  FIND(MatmulDescSetAttribute);
  FIND(MatrixLayoutCreate);
  FIND(MatrixLayoutDestroy);
  FIND(MatmulPreferenceCreate);
  FIND(MatmulPreferenceDestroy);
  FIND(MatmulPreferenceSetAttribute);
  FIND(MatmulAlgoGetHeuristic);
  FIND(Matmul);
#undef FIND
  find(l->file, "cublasLtGetStatusString", &l->GetStatusString);
  return PYLORA_OK;
}

/* What an algorithm depends on. */
struct Key {
  int64_t m, n, terms, lda, ldw, ldo;
  int32_t dtype, rows_of_W, tf32;
  int32_t align_a, align_w, align_out; /* bytes, at most 256 */
};

struct Entry {
  Key key;
  Entry *next;
  Description description;
  Layout W, a, out;
  Algorithm algorithm;
};

int32_t alignment(const void *p) {
  const uintptr_t bits = (uintptr_t)p | 256;
  return (int32_t)(bits & (~bits + 1));
}

int type_of(int dtype) {
  return dtype == PYLORA_F32 ? REAL_32F : dtype == PYLORA_BF16 ? REAL_16BF : REAL_16F;
}

} // namespace

struct Products {
  enum { BUCKETS = 256, MOST = 4096 };
  Library lt;
  Handle handle;
  std::mutex lock; /* held while a product is queued: an entry may be let go by another thread's */
  Entry *bucket[BUCKETS];
  int64_t entries;
};

static int failed(const Products *s, const char *what, Status status) {
  if (status == 0) return PYLORA_OK;
  char why[200];
  const char *text = s->lt.GetStatusString ? s->lt.GetStatusString(status) : NULL;
  snprintf(why, sizeof why, "status %d%s%s", status, text ? ", " : "", text ? text : "");
  return device_failure(what, why);
}
#define LT(name, ...) TRY(failed(s, "cublasLt" #name, s->lt.name(__VA_ARGS__)))

static void let_go(Products *s, Entry *e) {
  if (e->description) s->lt.MatmulDescDestroy(e->description);
  if (e->W) s->lt.MatrixLayoutDestroy(e->W);
  if (e->a) s->lt.MatrixLayoutDestroy(e->a);
  if (e->out) s->lt.MatrixLayoutDestroy(e->out);
  delete e;
}

static void forget(Products *s) {
  for (Entry *&first : s->bucket)
    while (Entry *e = first) {
      first = e->next;
      let_go(s, e);
    }
  s->entries = 0;
}

int products_open(pylora_cuda *g, const char *cublaslt) {
  Products *s = new (std::nothrow) Products();
  if (!s) return device_failure("products_open", "out of the host's memory");
  g->products = s; /* closed by products_close, whatever happens here */
  TRY(load(cublaslt, &s->lt));
  LT(Create, &s->handle);
  loaded_version = (int)s->lt.GetVersion();
  return PYLORA_OK;
}

void products_close(pylora_cuda *g) {
  Products *s = g->products;
  if (!s) return;
  forget(s);
  if (s->handle) s->lt.Destroy(s->handle);
  if (s->lt.file) dlclose(s->lt.file);
  delete s;
  g->products = NULL;
}

int products_version(void) { return loaded_version; }

size_t products_workspace(const pylora_cuda *g) {
  return (size_t)(g->major >= 9 ? 32 : 8)
         << 20; /* what NVIDIA recommends for Hopper; enough before */
}

/* In the column-major words of cuBLAS, with every row-major matrix read as its transpose:
 * outᵀ [n,m] = Wᵀ' aᵀ, W first. */
static int describe(Products *s, const Key &k, size_t ws_bytes, Entry *e) {
  const int type = type_of(k.dtype);
  LT(MatmulDescCreate, &e->description, k.tf32 ? COMPUTE_32F_FAST_TF32 : COMPUTE_32F, REAL_32F);
  const uint64_t n = (uint64_t)k.n, m = (uint64_t)k.m, terms = (uint64_t)k.terms;
  if (k.rows_of_W) {
    LT(MatrixLayoutCreate, &e->W, type, n, terms, k.ldw);
  } else {
    const int32_t transpose = TRANSPOSE;
    LT(MatmulDescSetAttribute, e->description, DESC_TRANSPOSE_A, &transpose, sizeof transpose);
    LT(MatrixLayoutCreate, &e->W, type, terms, n, k.ldw);
  }
  LT(MatrixLayoutCreate, &e->a, type, terms, m, k.lda);
  LT(MatrixLayoutCreate, &e->out, REAL_32F, n, m, k.ldo);

  struct Preferring {
    Products *s;
    Preference p;
    ~Preferring() {
      if (p) s->lt.MatmulPreferenceDestroy(p);
    }
  } want = {s, NULL};
  LT(MatmulPreferenceCreate, &want.p);
  const uint64_t bytes = ws_bytes;
  LT(MatmulPreferenceSetAttribute, want.p, PREFER_WORKSPACE, &bytes, sizeof bytes);
  const uint32_t reductions = REDUCE_IN_COMPUTE_TYPE;
  LT(MatmulPreferenceSetAttribute, want.p, PREFER_REDUCTIONS, &reductions, sizeof reductions);
  const struct {
    int what;
    uint32_t bytes;
  } aligned[] = {{PREFER_ALIGNMENT_A, (uint32_t)k.align_w},
                 {PREFER_ALIGNMENT_B, (uint32_t)k.align_a},
                 {PREFER_ALIGNMENT_C, (uint32_t)k.align_out},
                 {PREFER_ALIGNMENT_D, (uint32_t)k.align_out}};
  for (const auto &a : aligned)
    LT(MatmulPreferenceSetAttribute, want.p, a.what, &a.bytes, sizeof a.bytes);
  Heuristic best;
  memset(&best, 0, sizeof best);
  int found = 0;
  LT(MatmulAlgoGetHeuristic, s->handle, e->description, e->W, e->a, e->out, e->out, want.p, 1,
     &best, &found);
  if (found < 1 || best.state != 0) {
    char why[200];
    snprintf(why, sizeof why, "it has no algorithm for a product [%lld,%lld] of %lld terms",
             (long long)k.m, (long long)k.n, (long long)k.terms);
    return device_failure("cuBLASLt", why);
  }
  e->algorithm = best.algorithm;
  return PYLORA_OK;
}

/* The entry of a shape, made if it is new. */
static int entry_of(Products *s, const Key &key, size_t ws_bytes, Entry **out) {
  uint64_t hash = 14695981039346656037u; /* FNV-1a over the words of the key */
  const uint32_t *words = (const uint32_t *)&key;
  for (size_t i = 0; i < sizeof key / 4; i++) hash = (hash ^ words[i]) * 1099511628211u;
  Entry **first = &s->bucket[(hash >> 32) % Products::BUCKETS];
  for (Entry *e = *first; e; e = e->next)
    if (memcmp(&e->key, &key, sizeof key) == 0) {
      *out = e;
      return PYLORA_OK;
    }
  if (s->entries >= Products::MOST) forget(s);
  Entry *e = new (std::nothrow) Entry();
  if (!e) return device_failure("cuBLASLt", "out of the host's memory");
  e->key = key;
  const int status = describe(s, key, ws_bytes, e);
  if (status != PYLORA_OK) {
    let_go(s, e);
    return status;
  }
  e->next = *first;
  *first = e;
  s->entries++;
  *out = e;
  return PYLORA_OK;
}

int product(pylora_cuda *g, void *stream, const Product &p, void *ws, size_t ws_bytes) {
  if (p.m == 0 || p.n == 0) return PYLORA_OK;
  Products *s = g->products;
  if (!s) return device_failure("cuBLASLt", "the context was opened without it");
  if (p.m > INT32_MAX || p.n > INT32_MAX || p.terms > INT32_MAX || ws_bytes < products_workspace(g))
    return p.terms > INT32_MAX || p.m > INT32_MAX || p.n > INT32_MAX ? PYLORA_E_SHAPE
                                                                     : PYLORA_E_WORKSPACE;
  ws_bytes = products_workspace(g); /* the same for every caller: the choice depends on it */
  Key key;
  memset(&key, 0, sizeof key);
  key.m = p.m, key.n = p.n, key.terms = p.terms;
  key.lda = p.lda, key.ldw = p.ldw, key.ldo = p.ldo;
  key.dtype = p.dtype, key.rows_of_W = p.rows_of_W;
  key.tf32 = g->tf32 && p.dtype == PYLORA_F32;
  key.align_a = alignment(p.a), key.align_w = alignment(p.W), key.align_out = alignment(p.out);
  const std::lock_guard<std::mutex> held(s->lock);
  Entry *e = NULL;
  TRY(entry_of(s, key, ws_bytes, &e));
  const float one = 1, beta = p.add ? 1 : 0;
  LT(Matmul, s->handle, e->description, &one, p.W, e->W, p.a, e->a, &beta, p.out, e->out, p.out,
     e->out, &e->algorithm, ws, ws_bytes, (cudaStream_t)stream);
  return PYLORA_OK;
}
