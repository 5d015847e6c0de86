/* What must not change a result of products on tiles: how many rows there are and who works on them, where
 * long sums are cut, another thread, a child process, and a signal that comes while tiles are in use and
 * whose handler uses tiles, too.
 *
 * Everything runs on the best table of this machine, and says which one that was; with AMX it is on the
 * hardware that the last three can go wrong. */
#define _DEFAULT_SOURCE /* sigaction, setitimer */
#include "check.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct weight {
  int dtype;
  pylora_packed P;
} weight;

static weight weight_of(int dtype, int64_t d, int64_t k) {
  const pylora_mat W = matrix(d, k, 1);
  weight w = {dtype, {0}};
  OK(pylora_pack(dtype, &W, bytes_of(pylora_pack_bytes(dtype, d, k)), &w.P));
  return w;
}

static pylora_mat row_at(const pylora_mat *a, int64_t i) { /* in either type */
  if (!a->b) return row_of(a, i);
  return (pylora_mat){NULL, 1, a->cols, a->ld, a->b + i * a->ld, NULL};
}

/* y and dx of all rows, then of some rows alone. */
static void rows_alone(int dtype, int64_t m, int64_t k, int64_t d) {
  snprintf(context, sizeof context, "dtype %d, m%d k%d d%d", dtype, (int)m, (int)k, (int)d);
  const weight w = weight_of(dtype, d, k);
  const pylora_mat x32 = matrix(m, k, 1), dy32 = matrix(m, d, 1);
  const pylora_mat x = dtype == PYLORA_BF16 ? rounded(&x32) : x32,
                   dy = dtype == PYLORA_BF16 ? rounded(&dy32) : dy32;
  const pylora_mat A = matrix(8, k, 1), B = matrix(d, 8, 1), h = matrix(m, 8, 0);
  const pylora_lora l = {8, A.p, A.ld, B.p, B.ld, 0.5f, NULL, NULL};
  const size_t bytes = pylora_lora_workspace(m, d, k, 8);
  void *ws = bytes_of(bytes);
  const pylora_mat y = matrix(m, d, 0), dx = matrix(m, k, 0);
  OK(pylora_set_num_threads(1));
  OK(pylora_lora_forward(&x, &w.P, NULL, &l, NULL, &y, &h, ws, bytes));
  OK(pylora_lora_backward(&dy, &x, &h, &w.P, &l, &dx, 0, NULL, NULL, ws, bytes));
  for (int threads = 2; threads <= 3; threads++) {
    const pylora_mat y2 = matrix(m, d, 0), dx2 = matrix(m, k, 0);
    OK(pylora_set_num_threads(threads));
    OK(pylora_lora_forward(&x, &w.P, NULL, &l, NULL, &y2, &h, ws, bytes));
    OK(pylora_lora_backward(&dy, &x, &h, &w.P, &l, &dx2, 0, NULL, NULL, ws, bytes));
    expect_same("y by threads", &y, &y2);
    expect_same("dx by threads", &dx, &dx2);
  }
  for (int t = 0; t < 4; t++) {
    const int64_t i = t < 2 ? t * (m - 1) : below(m);
    const pylora_mat xi = row_at(&x, i), dyi = row_at(&dy, i), yi = row_of(&y, i),
                     dxi = row_of(&dx, i), one = matrix(1, d, 0), done = matrix(1, k, 0),
                     h1 = matrix(1, 8, 0);
    OK(pylora_lora_forward(&xi, &w.P, NULL, &l, NULL, &one, &h1, ws, bytes));
    OK(pylora_lora_backward(&dyi, NULL, NULL, &w.P, &l, &done, 0, NULL, NULL, ws, bytes));
    expect_same("a row of y alone", &one, &yi);
    expect_same("a row of dx alone", &done, &dxi);
  }
  release();
}

/* More rows than a block has, and sums longer than a piece, of a length that no piece divides. */
static void sizes(void) {
  static const int dtypes[] = {PYLORA_BF16, PYLORA_F32X3,   PYLORA_Q8_0,
                               PYLORA_Q4_1, PYLORA_Q8_0_A8, PYLORA_Q4_0_A8};
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
    const int quantized = dtypes[i] != PYLORA_BF16 && dtypes[i] != PYLORA_F32X3;
#ifdef EMULATED /* an instruction at a time: the smallest sizes that are cut into pieces */
    rows_alone(dtypes[i], 65, quantized ? 608 : 577, 70);
#else
    rows_alone(dtypes[i], PICK(257, 290, 517), quantized ? 608 : PICK(577, 1027), PICK(70, 199));
    rows_alone(dtypes[i], PICK(33, 96), quantized ? 1280 : PICK(1153, 1300), PICK(577, 1200));
#endif
  }
}

/* ---- threads, processes and signals ---- */

typedef struct job {
  weight w;
  pylora_mat x, y, want;
  void *ws;
  size_t bytes;
  int times;
  long wrong;
} job;

static int product(const job *j, const pylora_mat *y) {
  return pylora_lora_forward(&j->x, &j->w.P, NULL, NULL, NULL, y, NULL, j->ws, j->bytes);
}
static int differs(const pylora_mat *a, const pylora_mat *b) {
  for (int64_t i = 0; i < a->rows; i++)
    for (int64_t c = 0; c < a->cols; c++)
      if (memcmp(el(a, i, c), el(b, i, c), sizeof(float))) return 1;
  return 0;
}
static job job_of(int dtype, int64_t m, int64_t k, int64_t d, int times) {
  job j = {.w = weight_of(dtype, d, k), .x = matrix(m, k, 1), .y = matrix(m, d, 0)};
  j.want = matrix(m, d, 0);
  j.bytes = pylora_lora_workspace(m, d, k, 0);
  j.ws = bytes_of(j.bytes);
  j.times = times;
  OK(product(&j, &j.want));
  return j;
}
static void *work(void *p) {
  job *j = p;
  for (int t = 0; t < j->times; t++)
    j->wrong += product(j, &j->y) != PYLORA_OK || differs(&j->y, &j->want);
  return NULL;
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static job *handed;
static void *work_later(void *unused) { /* starts before the table was looked at, works after */
  (void)unused;
  pthread_mutex_lock(&gate);
  pthread_mutex_unlock(&gate);
  return work(handed);
}

#if !defined(PYLORA_AMX_EMULATED) && !defined(EMULATED)
static job inner;
static volatile sig_atomic_t signals;
static void on_signal(int number) { /* a product in the middle of a product */
  (void)number;
  signals = signals + 1;
  inner.wrong += product(&inner, &inner.y) != PYLORA_OK || differs(&inner.y, &inner.want);
}

static void interrupted(int dtype) {
  snprintf(context, sizeof context, "signals, dtype %d", dtype);
  OK(pylora_set_num_threads(1)); /* the handler must not wait for a thread that it interrupted */
  job outer = job_of(dtype, 64, 512, 256, 200);
  inner = job_of(dtype, 9, 96, 40, 1);
  const sig_atomic_t before = signals;
  struct sigaction action, old;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  sigaction(SIGALRM, &action, &old);
  const struct itimerval often = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
  setitimer(ITIMER_REAL, &often, NULL);
  for (int t = 0; t < 1000 && (t == 0 || signals - before < 20); t++) work(&outer);
  setitimer(ITIMER_REAL, &never, NULL);
  sigaction(SIGALRM, &old, NULL);
  EXPECT(signals > before, "no signal came");
  EXPECT(outer.wrong == 0, "%ld results changed by a signal", outer.wrong);
  EXPECT(inner.wrong == 0, "%ld results of the handler are wrong", inner.wrong);
  release();
}
#endif

int main(void) {
  pthread_t early, late;
  pthread_mutex_lock(&gate);
  EXPECT(pthread_create(&early, NULL, work_later, NULL) == 0);
  printf("the table is %s\n", pylora_isa()); /* the permission is asked for here */

  snprintf(context, sizeof context, "threads");
  OK(pylora_set_num_threads(1));
  job a = job_of(PYLORA_BF16, 40, 300, 70, 50), b = job_of(PYLORA_Q8_0, 40, 320, 70, 50);
  handed = &a;
  pthread_mutex_unlock(&gate);
  EXPECT(pthread_create(&late, NULL, work, &b) == 0);
  pthread_join(early, NULL);
  pthread_join(late, NULL);
  EXPECT(a.wrong == 0 && b.wrong == 0, "in a thread: %ld, %ld wrong", a.wrong, b.wrong);

#ifndef EMULATED /* qemu's user mode cannot fork a process that has threads */
  snprintf(context, sizeof context, "fork");
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    a.wrong = b.wrong = 0;
    work(&a), work(&b);
    _exit(a.wrong || b.wrong);
  }
  int status = 1;
  EXPECT(child > 0 && waitpid(child, &status, 0) == child && status == 0, "child: %x",
         (unsigned)status);
#endif
  release();

#if !defined(PYLORA_AMX_EMULATED) && \
    !defined(EMULATED) /* whose tiles the system does not put aside for a handler */
  interrupted(PYLORA_BF16);
  interrupted(PYLORA_F32X3);
  interrupted(PYLORA_Q8_0);
#endif
  sizes();
  return finish("test_tiles");
}
