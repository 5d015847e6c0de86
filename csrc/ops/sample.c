/* sample.c - the next token of each row of logits, and its likeliest ones: row by row, on all threads.
 *
 * Only what can decide is put in order.  The likely tokens of a row are few; the others are one sum, and
 * are listed and ordered only where the likely ones do not decide. */
#include <float.h>
#include <math.h>

#include "runtime/internal.h"

#define UNLIKELY 1e-5 /* of the likeliest one's probability */
enum {
  BLOCK = 2048, /* float32 terms of a sum, of which the sums are added in double */
  BUCKETS = 4096,
  SMALL = 24 /* tokens that are ordered one by one */
};

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
  one *list, *ordered; /* [n] each */
  float *x;            /* [n] */
  int32_t *at;         /* [n] */
} room;

/* A row's tokens by rank: first the likely ones, then, once they are asked for, the rest. */
typedef struct ranking {
  room space;
  int64_t n, listed;
  const float *x;
  float top, low; /* the rest are those that are not above low */
  double temperature;
  int more; /* the rest are not listed yet */
} ranking;

static size_t bytes_of(int64_t n) {
  return 2 * round_up((size_t)n * sizeof(one)) + 2 * round_up((size_t)n * sizeof(float));
}

static room room_of(const job *f, int thread) {
  arena a = arena_of(f->ws + (size_t)thread * f->each, f->each);
  const int64_t n = f->logits->cols;
  room r;
  r.list = arena_bytes(&a, (size_t)n * sizeof(one));
  r.ordered = arena_bytes(&a, (size_t)n * sizeof(one));
  r.x = arena_floats(&a, n);
  r.at = arena_bytes(&a, (size_t)n * sizeof(int32_t));
  return r;
}

/* ---- order: the best first, of equals the lower index ---- */

static int better(const one *a, const one *b) {
  return a->x > b->x || (a->x == b->x && a->id < b->id);
}

/* A heap whose root is the worst. */
static void sift(one *h, int64_t n, int64_t i) {
  const one moved = h[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && better(&h[child], &h[child + 1])) child++;
    if (!better(&moved, &h[child])) break;
    h[i] = h[child];
  }
  h[i] = moved;
}

static void make_heap(one *h, int64_t n) {
  for (int64_t i = n / 2 - 1; i >= 0; i--) sift(h, n, i);
}

/* A heap becomes a list, the best first. */
static void unheap(one *h, int64_t n) {
  for (int64_t left = n - 1; left > 0; left--) {
    const one root = h[0];
    h[0] = h[left];
    h[left] = root;
    sift(h, left, 0);
  }
}

static void sort_few(one *h, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const one moved = h[i];
    int64_t j = i;
    for (; j > 0 && better(&moved, &h[j - 1]); j--) h[j] = h[j - 1];
    h[j] = moved;
  }
}

static void sort(one *h, int64_t n) {
  if (n <= SMALL) {
    sort_few(h, n);
    return;
  }
  make_heap(h, n);
  unheap(h, n);
}

/* to = from in order: by buckets of scores that are equally wide, each of which holds few as a rule. */
static void put_in_order(int64_t n, const one *from, one *to) {
  int32_t end[BUCKETS + 1] = {0};
  float high = -INFINITY, low = INFINITY;
  for (int64_t i = 0; i < n; i++) {
    high = from[i].x > high ? from[i].x : high;
    low = from[i].x < low ? from[i].x : low;
  }
  const double width = (double)high - low;
  if (n <= SMALL || !(width > 0)) {
    memcpy(to, from, (size_t)n * sizeof *to);
    sort(to, n);
    return;
  }
  const int64_t buckets = n < BUCKETS ? BUCKETS / 4 : BUCKETS;
  const double scale = (double)(buckets - 1) / width;
#define BUCKET(i) ((int64_t)(((double)high - from[i].x) * scale))
  for (int64_t i = 0; i < n; i++) end[BUCKET(i) + 1]++;
  for (int64_t b = 0; b < buckets; b++) end[b + 1] += end[b]; /* now where each begins */
  for (int64_t i = 0; i < n; i++) to[end[BUCKET(i)]++] = from[i];
#undef BUCKET
  for (int64_t b = 0, start = 0; b < buckets; start = end[b++]) sort(to + start, end[b] - start);
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
        if (have == k) make_heap(r.list, k);
      } else if (next.x > r.list[0].x) {
        r.list[0] = next;
        sift(r.list, k, 0);
      }
    }
  }
  if (have < k) make_heap(r.list, have);
  return have;
}

/* ---- a token ---- */

static double share(const ranking *r, float x) {
  return exp(((double)x - r->top) / r->temperature);
}

/* The one at rank t; NULL behind the last. */
static const one *at_rank(ranking *r, int64_t t) {
  if (t == r->listed && r->more) {
    r->more = 0;
    int64_t n = 0;
    for (int64_t j = 0; j < r->n; j++)
      if (r->x[j] <= r->low && r->x[j] > -INFINITY)
        r->space.list[n++] = (one){share(r, r->x[j]), r->x[j], (int32_t)j};
    put_in_order(n, r->space.list, r->space.ordered + r->listed);
    r->listed += n;
  }
  return t < r->listed ? &r->space.ordered[t] : NULL;
}

/* Lists the likely ones; the sum of all. */
static double list_likely(const pylora_kernels *K, const pylora_sampling *how, ranking *r) {
  const room space = r->space;
  double mass = 0;
  if (how->top_k > 0 && how->top_k < r->n) {
    r->listed = best_of(K, r->n, r->x, how->top_k, space);
    for (int64_t i = 0; i < r->listed; i++) space.list[i].p = share(r, space.list[i].x);
  } else {
    r->low = (float)(r->top + how->temperature * log(UNLIKELY));
    if (!(r->low < r->top)) r->low = nextafterf(r->top, -INFINITY);
    const float scale = (float)fmin(fmax(1 / how->temperature, FLT_MIN), FLT_MAX);
    r->listed = K->pick(r->n, r->x, r->low, space.at);
    for (int64_t i = 0; i < r->listed; i++) {
      const float x = r->x[space.at[i]];
      space.list[i] = (one){share(r, x), x, space.at[i]};
    }
    r->more = 1;
    for (int64_t j = 0; j < r->n; j += BLOCK)
      mass += K->exp_below(min64(BLOCK, r->n - j), r->x + j, r->top, scale, r->low);
  }
  put_in_order(r->listed, space.list, space.ordered);
  for (int64_t i = 0; i < r->listed; i++) mass += space.ordered[i].p;
  return mass;
}

static int64_t draw(const pylora_kernels *K, const pylora_sampling *how, int64_t n, const float *x,
                    float top, room space) {
  ranking r = {.space = space, .n = n, .x = x, .top = top, .temperature = how->temperature};
  double mass = list_likely(K, how, &r), sum = 0;
  int64_t kept = n;
  const one *next;
  if (how->top_p < 1 || how->min_p > 0) {
    const double enough = how->top_p < 1 ? how->top_p * mass : INFINITY;
    for (kept = 0; sum < enough && (next = at_rank(&r, kept)) && next->p >= how->min_p; kept++)
      sum += next->p; /* the first one's p is 1 */
    mass = sum;
  }
  int64_t token = space.ordered[0].id;
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
  unheap(space.list, have);
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
