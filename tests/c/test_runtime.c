/* Kernel tables, threads, callers at the same time, and a child process after fork(). */
#include "check.h"

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

static void tables(void) {
  EXPECT(pylora_abi_version() == PYLORA_ABI_VERSION);
  EXPECT(pylora_isa_name(-1) == NULL && pylora_isa_name(1000) == NULL);
  int n = 0, portable = 0;
  for (; pylora_isa_name(n); n++) {
    OK(pylora_use_isa(pylora_isa_name(n)));
    EXPECT(strcmp(pylora_isa(), pylora_isa_name(n)) == 0);
    portable |= strcmp(pylora_isa(), "portable") == 0;
  }
  EXPECT(n >= 1 && portable, "every build has the portable table");
  EXPECT_STATUS(PYLORA_E_UNSUPPORTED, pylora_use_isa("vax"));
  EXPECT_STATUS(PYLORA_E_NULL, pylora_use_isa(NULL));
  OK(pylora_use_isa(pylora_isa_name(0)));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_set_num_threads(0));
  EXPECT_STATUS(PYLORA_E_VALUE, pylora_set_num_threads(1 << 30));
  OK(pylora_set_num_threads(3));
  EXPECT(pylora_num_threads() == 3);
  for (int s = -2; s < 20; s++) EXPECT(pylora_status_text(s) && *pylora_status_text(s));
}

typedef struct job {
  pylora_mat x, y;
  pylora_packed W;
  void *ws;
  size_t bytes;
  int wrong;
} job;

static job job_of(const pylora_packed *W, const pylora_mat *x) {
  job j = {*x, matrix(x->rows, W->d, 0), *W, NULL, pylora_lora_workspace(x->rows, W->d, W->k, 0),
           0};
  j.ws = bytes_of(j.bytes);
  return j;
}
static void *run(void *p) {
  job *j = p;
  for (int i = 0; i < 50 && !j->wrong; i++)
    j->wrong = pylora_lora_forward(&j->x, &j->W, NULL, NULL, NULL, &j->y, NULL, j->ws, j->bytes);
  return NULL;
}

/* Callers do not wait for each other and do not disturb each other. */
static void concurrent_callers(void) {
  const pylora_mat W = matrix(100, 64, 1), x = matrix(40, 64, 1);
  const pylora_packed P = packed(&W);
  OK(pylora_set_num_threads(3));
  job jobs[4];
  pthread_t threads[3];
  for (int i = 0; i < 4; i++) jobs[i] = job_of(&P, &x);
  run(&jobs[3]);
  for (int i = 0; i < 3; i++) EXPECT(pthread_create(&threads[i], NULL, run, &jobs[i]) == 0);
  for (int i = 0; i < 3; i++) {
    pthread_join(threads[i], NULL);
    OK(jobs[i].wrong);
    expect_same("y of a concurrent caller", &jobs[i].y, &jobs[3].y);
  }
}

#ifndef EMULATED /* qemu's user mode cannot fork a process that has threads */
/* The pool's threads do not exist in a child; it starts its own. */
static void after_fork(void) {
  const pylora_mat W = matrix(100, 64, 1), x = matrix(40, 64, 1);
  const pylora_packed P = packed(&W);
  job parent = job_of(&P, &x), child = job_of(&P, &x);
  run(&parent);
  fflush(stdout);
  const pid_t pid = fork();
  if (pid == 0) {
    run(&child);
    int same = !child.wrong;
    for (int64_t i = 0; i < 40; i++)
      same &= memcmp(el(&child.y, i, 0), el(&parent.y, i, 0), 400) == 0;
    _exit(same ? 0 : 1);
  }
  int status = 1;
  EXPECT(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0, "the child's result differs");
}
#endif

int main(void) {
  tables(), release();
  concurrent_callers(), release();
#ifndef EMULATED
  after_fork(), release();
#endif
  return finish("test_runtime");
}
