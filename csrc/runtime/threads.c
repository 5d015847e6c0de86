/* threads.c - a small pool of threads that share out the tasks of one call at a time.
 *
 * Started by the first call that can use it, never at load; a child process after fork() starts its
 * own.  Workers spin for a short while after a call (the next one is usually microseconds away) and
 * then sleep.  A second caller that finds the pool busy does its tasks alone, so no caller waits for
 * another; results are the same bits either way.
 *
 * How a call is handed over: the caller writes `call`, opens `gate` under a new number and wakes the
 * workers.  A worker enters through the open gate and is counted there; everyone takes tasks from
 * `next_task` until they run out.  Then the caller closes the gate and waits for those inside alone, so
 * none can still look at an old call, and a worker that sleeps, or whose processor is with another
 * program, is not waited for: its tasks are done by then. */
#if !defined(_WIN32)
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include <stdatomic.h>
#include <stdlib.h>

#include "runtime/internal.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef SRWLOCK mutex_t;
typedef CONDITION_VARIABLE cond_t;
#define MUTEX_INIT SRWLOCK_INIT
#define COND_INIT CONDITION_VARIABLE_INIT
#define lock(m) AcquireSRWLockExclusive(m)
#define unlock(m) ReleaseSRWLockExclusive(m)
#define try_lock(m) (TryAcquireSRWLockExclusive(m) != 0)
#define cond_wait(c, m) SleepConditionVariableSRW(c, m, INFINITE, 0)
#define cond_broadcast(c) WakeAllConditionVariable(c)
#else
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
typedef pthread_mutex_t mutex_t;
typedef pthread_cond_t cond_t;
#define MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#define COND_INIT PTHREAD_COND_INITIALIZER
#define lock(m) pthread_mutex_lock(m)
#define unlock(m) pthread_mutex_unlock(m)
#define try_lock(m) (pthread_mutex_trylock(m) == 0)
#define cond_wait(c, m) pthread_cond_wait(c, m)
#define cond_broadcast(c) pthread_cond_broadcast(c)
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define relax() _mm_pause()
#elif defined(__aarch64__) && defined(__GNUC__)
#define relax() __asm__ volatile("yield")
#else
#define relax() ((void)0)
#endif

enum { MAX_THREADS = 256, SPINS = 4000 };

static mutex_t call_lock = MUTEX_INIT; /* held by the caller whose tasks run */
static mutex_t sleep_lock = MUTEX_INIT;
static cond_t wake = COND_INIT;

static _Atomic int wanted; /* threads per call, the caller's included; 0: not asked yet */
static int workers;        /* running worker threads; guarded by call_lock */
static _Atomic int sleepers;

static struct {
  pylora_task fn;
  void *ctx;
  int64_t n;
} call;
static _Atomic int64_t next_task;
/* One word, so that a worker enters the call it has seen or none.  From the top: the number of the call
 * (32 bits), whether it is open, how many workers may enter (15 bits), how many are inside (16). */
static _Atomic uint64_t gate;
#define GATE_OPEN ((uint64_t)1 << 31)
static uint64_t gate_number(uint64_t g) { return g >> 32; }
static int gate_may_enter(uint64_t g) { return g & GATE_OPEN ? (int)(g >> 16 & 0x7fff) : 0; }
static int gate_inside(uint64_t g) { return (int)(g & 0xffff); }

static int processors(void) {
#if defined(_WIN32)
  return (int)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
#else
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
#endif
}

int pylora_num_threads(void) {
  int n = atomic_load(&wanted);
  if (n) return n;
  const char *env = getenv("PYLORA_NUM_THREADS");
  long asked = env ? strtol(env, NULL, 10) : 0;
  if (asked < 1) asked = processors();
  n = asked < 1 ? 1 : asked > MAX_THREADS ? MAX_THREADS : (int)asked;
  int none = 0;
  atomic_compare_exchange_strong(&wanted, &none, n);
  return atomic_load(&wanted);
}

int pylora_set_num_threads(int n) {
  if (n < 1 || n > MAX_THREADS) return PYLORA_E_VALUE;
  atomic_store(&wanted, n); /* a surplus of workers sleeps on */
  return PYLORA_OK;
}

static void take_tasks(int thread) {
  int64_t t;
  while ((t = atomic_fetch_add(&next_task, 1)) < call.n) call.fn(call.ctx, t, thread);
}

static void await_call(uint64_t seen) {
  for (int i = 0; i < SPINS; i++) {
    if (gate_number(atomic_load(&gate)) != seen) return;
    relax();
  }
  lock(&sleep_lock);
  atomic_fetch_add(&sleepers, 1);
  while (gate_number(atomic_load(&gate)) == seen) cond_wait(&wake, &sleep_lock);
  atomic_fetch_sub(&sleepers, 1);
  unlock(&sleep_lock);
}

typedef struct start {
  int id;
  uint64_t seen; /* the number of the last call that is not for this worker */
} start;
static start starts[MAX_THREADS];

static void work(int id, uint64_t seen) {
  for (;;) {
    await_call(seen);
    uint64_t g = atomic_load(&gate);
    int inside = 0;
    while (!inside && id <= gate_may_enter(g)) /* a failed exchange loads g again */
      inside = atomic_compare_exchange_weak(&gate, &g, g + 1);
    seen = gate_number(g);
    if (inside) {
      take_tasks(id);
      atomic_fetch_sub(&gate, 1);
    }
  }
}

#if defined(_WIN32)
static DWORD WINAPI worker_main(void *p) {
  work(((start *)p)->id, ((start *)p)->seen);
  return 0;
}
static int spawn(start *s) {
  HANDLE h = CreateThread(NULL, 0, worker_main, s, 0, NULL);
  if (!h) return 0;
  CloseHandle(h);
  return 1;
}
#else
static void *worker_main(void *p) {
  work(((start *)p)->id, ((start *)p)->seen);
  return NULL;
}

/* In a child after fork() only the forking thread exists: forget the workers and every lock. */
static void after_fork_in_child(void) {
  mutex_t m = MUTEX_INIT;
  cond_t c = COND_INIT;
  call_lock = m;
  sleep_lock = m;
  wake = c;
  workers = 0;
  atomic_store(&sleepers, 0);
  atomic_store(&gate, gate_number(atomic_load(&gate)) << 32);
}

static int spawn(start *s) {
  static int hooked;
  if (!hooked) {
    if (pthread_atfork(NULL, NULL, after_fork_in_child)) return 0;
    hooked = 1;
  }
  pthread_t t;
  if (pthread_create(&t, NULL, worker_main, s)) return 0;
  pthread_detach(t);
  return 1;
}
#endif

void pylora_parallel(pylora_task fn, void *ctx, int64_t n, int threads) {
  threads = (int)min64(threads, n);
  if (threads < 2 || !try_lock(&call_lock)) {
    for (int64_t t = 0; t < n; t++) fn(ctx, t, 0);
    return;
  }
  while (workers < threads - 1) { /* if the system refuses a thread, those there are do the work */
    starts[workers] = (start){workers + 1, gate_number(atomic_load(&gate))};
    if (!spawn(&starts[workers])) break;
    workers++;
  }
  call.fn = fn;
  call.ctx = ctx;
  call.n = n;
  const uint64_t helpers = (uint64_t)min64(threads - 1, workers);
  const uint64_t number = gate_number(atomic_load(&gate)) + 1;
  atomic_store(&next_task, 0);
  atomic_store(&gate, number << 32 | GATE_OPEN | helpers << 16);
  if (atomic_load(&sleepers)) {
    lock(&sleep_lock);
    cond_broadcast(&wake);
    unlock(&sleep_lock);
  }
  take_tasks(0);
  atomic_fetch_and(&gate, ~GATE_OPEN);
  for (int i = 0; gate_inside(atomic_load(&gate)); i++) {
    relax();
    if (i > SPINS) { /* more threads than processors: let them run */
#if defined(_WIN32)
      SwitchToThread();
#else
      sched_yield();
#endif
    }
  }
  unlock(&call_lock);
}
