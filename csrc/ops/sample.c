/* sample.c - the next token of each row of logits, and its likeliest ones: row by row, on all threads.
 *
 * Only what can decide is put in order.  The likely tokens of a row are few: they stand in a heap, whose
 * best one is taken again and again until the running sum is reached.  The others are one sum, and
 * are listed only where the likely ones do not decide. */
#include <float.h>
#include <math.h>

#include "runtime/internal.h"

#define UNLIKELY 1e-5 /* of the likeliest one's probability */
enum { BLOCK = 2048 /* float32 terms of a sum, of which the sums are added in double */ };

typedef struct one {
  double p;
  float x;
  int32_t id;
} one;

typedef struct job {
  const pylora_kernels *K;
  const pylora_mat *logits;
  const pylora_sampling *how;
  const int64_t *count;
  int64_t most, *token, *best;
  double *lse;
  char *ws;
  size_t each; /* bytes of a thread */
} job;

/* What a thread needs for a row. */
typedef struct room {
  one *list;   /* [n] */
  float *x;    /* [n] */
  int32_t *at; /* [n] */
} room;

/* A row's tokens by rank: the first `likely` of the list, then the rest of them. */
typedef struct ranking {
  one *list;
  int64_t n, likely, listed, taken;
  const float *x;
  float top, low; /* the rest are those that are not above low */
  double temperature;
  int more; /* the rest are not listed yet */
} ranking;

static size_t bytes_of(int64_t n) {
  return round_up((size_t)n * sizeof(one)) + 2 * round_up((size_t)n * sizeof(float));
}

static room room_of(const job *f, int thread) {
  arena a = arena_of(f->ws + (size_t)thread * f->each, f->each);
  const int64_t n = f->logits->cols;
  room r;
  r.list = arena_bytes(&a, (size_t)n * sizeof(one));
  r.x = arena_floats(&a, n);
  r.at = arena_bytes(&a, (size_t)n * sizeof(int32_t));
  return r;
}

/* ---- a heap: its root is the best, or the worst ---- */

static int better(const one *a, const one *b) {
  return a->x > b->x || (a->x == b->x && a->id < b->id);
}

static void sift(one *h, int64_t n, int64_t i, int worst) {
  const one moved = h[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && better(&h[child + 1], &h[child]) != worst) child++;
    if (better(&h[child], &moved) == worst) break;
    h[i] = h[child];
  }
  h[i] = moved;
}

static void make_heap(one *h, int64_t n, int worst) {
  for (int64_t i = n / 2 - 1; i >= 0; i--) sift(h, n, i, worst);
}

/* Takes the root away, to the end of the heap. */
static void take_root(one *h, int64_t n, int worst) {
  const one root = h[0];
  h[0] = h[n - 1];
  h[n - 1] = root;
  sift(h, n - 1, 0, worst);
}

/* The k best of x above -infinity, the worst at the root; how many there are. */
static int64_t best_of(const pylora_kernels *K, int64_t n, const float *x, int64_t k, room r) {
  int64_t have = 0;
  if (k < 1) return 0;
  for (int64_t j = 0; j < n; j += BLOCK) {
    const float above = have == k ? r.list[0].x : -INFINITY;
    const int64_t some = K->pick(min64(BLOCK, n - j), x + j, above, r.at);
    for (int64_t i = 0; i < some; i++) {
      const int64_t id = j + r.at[i];
      const one next = {0, x[id], (int32_t)id};
      if (have < k) {
        r.list[have++] = next;
        if (have == k) make_heap(r.list, k, 1);
      } else if (next.x > r.list[0].x) {
        r.list[0] = next;
        sift(r.list, k, 0, 1);
      }
    }
  }
  if (have < k) make_heap(r.list, have, 1);
  return have;
}

/* ---- a token ---- */

static double share(const ranking *r, float x) {
  return exp(((double)x - r->top) / r->temperature);
}

static void list_one(ranking *r, int64_t id) {
  const one next = {share(r, r->x[id]), r->x[id], (int32_t)id};
  r->list[r->listed++] = next;
}

/* The one at rank t, which has been asked for before, or is the next; NULL behind the last. */
static const one *at_rank(ranking *r, int64_t t) {
  if (t == r->listed && r->more) {
    r->more = 0;
    for (int64_t j = 0; j < r->n; j++)
      if (r->x[j] <= r->low && r->x[j] > -INFINITY) list_one(r, j);
    make_heap(r->list + r->likely, r->listed - r->likely, 0);
  }
  if (t >= r->listed) return NULL;
  const int64_t start = t < r->likely ? 0 : r->likely, end = t < r->likely ? r->likely : r->listed;
  if (t == r->taken) { /* they are taken to the end, one before the other */
    take_root(r->list + start, end - t, 0);
    r->taken++;
  }
  return &r->list[start + (end - 1 - t)];
}

/* Lists the likely ones; the sum of all. */
static double list_likely(const pylora_kernels *K, const pylora_sampling *how, room space,
                          ranking *r) {
  double mass = 0;
  if (how->top_k > 0 && how->top_k < r->n) {
    r->likely = r->listed = best_of(K, r->n, r->x, how->top_k, space);
    for (int64_t i = 0; i < r->listed; i++) r->list[i].p = share(r, r->list[i].x);
  } else {
    r->low = (float)(r->top + how->temperature * log(UNLIKELY));
    if (!(r->low < r->top)) r->low = nextafterf(r->top, -INFINITY);
    const double inverse = 1 / how->temperature;
    const float scale = (float)fmin(fmax(inverse, FLT_MIN), FLT_MAX);
    const int64_t some = K->pick(r->n, r->x, r->low, space.at);
    for (int64_t i = 0; i < some; i++) list_one(r, space.at[i]);
    r->likely = some;
    r->more = 1;
    for (int64_t j = 0; j < r->n; j += BLOCK)
      mass += K->exp_below(min64(BLOCK, r->n - j), r->x + j, r->top, scale, r->low);
  }
  for (int64_t i = 0; i < r->listed; i++) mass += r->list[i].p;
  make_heap(r->list, r->listed, 0);
  return mass;
}

static int64_t draw(const pylora_kernels *K, const pylora_sampling *how, int64_t n, const float *x,
                    float top, room space) {
  ranking r = {.list = space.list, .n = n, .x = x, .top = top, .temperature = how->temperature};
  double mass = list_likely(K, how, space, &r), sum = 0;
  int64_t kept = n;
  const one *next;
  if (how->top_p < 1 || how->min_p > 0) {
    const double enough = how->top_p < 1 ? how->top_p * mass : INFINITY;
    for (kept = 0; sum < enough && (next = at_rank(&r, kept)) && next->p >= how->min_p; kept++)
      sum += next->p; /* the first one's p is 1 */
    mass = sum;
  }
  int64_t token = r.listed ? r.list[0].id : 0;
  sum = 0;
  for (int64_t t = 0; t < kept && sum <= how->u * mass && (next = at_rank(&r, t)); t++) {
    sum += next->p;
    token = next->id;
  }
  return token;
}

/* y = x where a token may come, else -infinity. */
static void only_allowed(const pylora_sampling *how, int64_t n, const float *x, float *y) {
  const int64_t words = min64(how->words, ceil_div(n, 32));
  for (int64_t w = 0; w < words; w++) {
    const uint32_t bits = how->allowed[w];
    const int64_t j = 32 * w, some = min64(32, n - j);
    if (bits == UINT32_MAX)
      memcpy(y + j, x + j, (size_t)some * sizeof *y);
    else
      for (int64_t i = 0; i < some; i++) y[j + i] = bits >> i & 1 ? x[j + i] : -INFINITY;
  }
  for (int64_t j = 32 * words; j < n; j++) y[j] = -INFINITY;
}

static void sample_task(void *ctx, int64_t i, int thread) {
  const job *f = ctx;
  const pylora_sampling *how = &f->how[i];
  const int64_t n = f->logits->cols;
  const float *x = f->logits->p + i * f->logits->ld;
  const room space = room_of(f, thread);
  float top;
  f->token[i] = -1;
  if (!f->K->look(n, x, &top)) return;
  if (how->allowed) {
    only_allowed(how, n, x, space.x);
    x = space.x;
    f->K->look(n, x, &top);
    f->token[i] = -2;
    if (!(top > -INFINITY)) return;
  }
  if (how->temperature == 0) {
    f->K->pick(n, x, nextafterf(top, -INFINITY), space.at);
    f->token[i] = space.at[0];
  } else {
    f->token[i] = draw(f->K, how, n, x, top, space);
  }
}

/* ---- the likeliest ---- */

static void likeliest_task(void *ctx, int64_t i, int thread) {
  const job *f = ctx;
  const int64_t n = f->logits->cols, k = min64(f->count[i], n);
  const float *x = f->logits->p + i * f->logits->ld;
  float top;
  double sum = 0;
  if (k < 0) return;
  f->lse[i] = NAN;
  if (!f->K->look(n, x, &top)) return;
  for (int64_t j = 0; j < n; j += BLOCK)
    sum += f->K->exp_below(min64(BLOCK, n - j), x + j, top, 1, INFINITY);
  f->lse[i] = top + log(sum);
  const room space = room_of(f, thread);
  const int64_t have = best_of(f->K, n, x, k, space);
  for (int64_t left = have; left > 1; left--) take_root(space.list, left, 1);
  for (int64_t t = 0; t < have; t++) f->best[i * f->most + t] = space.list[t].id;
}

/* ---- what is called ---- */

size_t pylora_sample_workspace(int64_t m, int64_t n) {
  if (m < 0 || n < 0 || n > INT32_MAX) return 0;
  return (size_t)min64(m, pylora_num_threads()) * (bytes_of(n) + PYLORA_ALIGN) + PYLORA_ALIGN;
}

/* Checks what both have in common, and runs it. */
static int run(job *f, pylora_task task, void *ws, size_t ws_bytes) {
  const int64_t m = f->logits->rows, n = f->logits->cols;
  const int threads = (int)min64(m, pylora_num_threads());
  if (m == 0) return PYLORA_OK;
  f->K = pylora_table();
  f->each = bytes_of(n) + PYLORA_ALIGN;
  if (!ws || ws_bytes < (size_t)threads * f->each) return PYLORA_E_WORKSPACE;
  f->ws = ws;
  pylora_parallel(task, f, m, threads);
  return PYLORA_OK;
}

static int check_rows(const pylora_mat *logits) {
  if (!logits) return PYLORA_E_NULL;
  TRY(check_mat(logits, logits->rows, logits->cols, 0));
  if (logits->cols > INT32_MAX || (logits->rows && !logits->cols)) return PYLORA_E_SHAPE;
  return PYLORA_OK;
}

int pylora_sample(const pylora_mat *logits, const pylora_sampling *how, int64_t *token, void *ws,
                  size_t ws_bytes) {
  TRY(check_rows(logits));
  if (logits->rows && (!how || !token)) return PYLORA_E_NULL;
  for (int64_t i = 0; i < logits->rows; i++) {
    const pylora_sampling *s = &how[i];
    const int fine = s->temperature >= 0 && isfinite(s->temperature) && s->top_p > 0 &&
                     s->top_p <= 1 && s->min_p >= 0 && s->min_p <= 1 && s->u > 0 && s->u < 1 &&
                     s->top_k >= 0 && s->words >= 0;
    if (!fine) return PYLORA_E_VALUE;
  }
  job f = {.logits = logits, .how = how, .token = token};
  return run(&f, sample_task, ws, ws_bytes);
}

int pylora_likeliest(const pylora_mat *logits, const int64_t *count, int64_t most, double *lse,
                     int64_t *best, void *ws, size_t ws_bytes) {
  TRY(check_rows(logits));
  if (most < 0) return PYLORA_E_VALUE;
  if (logits->rows && (!count || !lse || (most && !best))) return PYLORA_E_NULL;
  for (int64_t i = 0; i < logits->rows; i++)
    if (count[i] > most) return PYLORA_E_VALUE;
  job f = {.logits = logits, .count = count, .most = most, .lse = lse, .best = best};
  return run(&f, likeliest_task, ws, ws_bytes);
}
