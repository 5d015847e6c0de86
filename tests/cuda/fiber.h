/* fiber.h - a thread of the emulated GPU: a stack of its own that is switched to and from by hand.
 *
 * Hand-written for x86-64 and aarch64, since a block has up to 1024 of them and switches at every barrier;
 * ucontext elsewhere. Sanitizers are told of each switch. */
#ifndef PYLORA_FIBER_H
#define PYLORA_FIBER_H

#include <stddef.h>

struct Fiber {
  void *stack = nullptr; /* lowest address that may be used */
  size_t bytes = 0;
  void *sp = nullptr;        /* where it was left; of ucontext: its context */
  void *sanitizer = nullptr; /* its fake stack, or its thread for ThreadSanitizer */
  bool started = false;
};

/* `entry` never returns; it is entered at the first fiber_resume. A fiber that was left anywhere may be started
 * again: what was on its stack is forgotten. */
void fiber_start(Fiber *f, void (*entry)(void));
void fiber_free(Fiber *f);
/* From the host's thread into the fiber, until it yields; and back. */
void fiber_resume(Fiber *f);
void fiber_yield(Fiber *f);

#endif
