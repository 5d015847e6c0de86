/* fiber.cpp - see fiber.h. */
#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

enum { STACK = 256 * 1024 }; /* touched pages alone take memory */

/* The host's side of the switch: one per thread of the host. */
struct Home {
  void *sp = nullptr;
  void *fake = nullptr;
  const void *stack = nullptr;
  size_t bytes = 0;
  void *tsan = nullptr;
};
static thread_local Home home;
static thread_local void (*entry_of)(void);

/* emulated_switch(&save, to): saves what a call must keep on this stack, and goes on where `to` was left. */
#if defined(__x86_64__)
extern "C" void emulated_switch(void **save, void *to);
asm(R"(
.text
.p2align 4
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");
static void *first_frame(char *top, void (*first)(void)) {
  void **sp = (void **)top;
  *--sp = nullptr; /* `first` finds the stack as after a call */
  *--sp = (void *)first;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
extern "C" void emulated_switch(void **save, void *to);
asm(R"(
.text
.p2align 4
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, %function
emulated_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulated_switch, .-emulated_switch
)");
static void *first_frame(char *top, void (*first)(void)) {
  void **sp = (void **)(top - 160);
  memset(sp, 0, 160);
  sp[11] = (void *)first; /* x30 */
  return sp;
}
#else
#include <ucontext.h>
static void emulated_switch(void **save, void *to) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, (ucontext_t *)to);
}
static void *first_frame(char *top, void (*first)(void)) {
  ucontext_t *context = (ucontext_t *)(top - sizeof(ucontext_t) - 64);
  getcontext(context);
  context->uc_stack.ss_sp = top - STACK;
  context->uc_stack.ss_size = STACK - sizeof(ucontext_t) - 128;
  context->uc_link = nullptr;
  makecontext(context, first, 0);
  return context;
}
#endif

/* The first function on a fiber's stack. */
__attribute__((no_sanitize("address", "thread"))) static void first(void) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home.stack, &home.bytes);
#endif
  entry_of();
  abort(); /* entry never returns */
}

void fiber_start(Fiber *f, void (*entry)(void)) {
  if (!f->stack) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *p = (char *)mmap(nullptr, STACK + page, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == (char *)MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) {
      fprintf(stderr, "emulation: no memory for the stack of a thread\n");
      abort();
    }
    f->stack = p + page, f->bytes = STACK; /* running over it ends in the page below */
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f->stack, f->bytes);
  f->sanitizer = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  if (f->sanitizer) __tsan_destroy_fiber(f->sanitizer);
  f->sanitizer = __tsan_create_fiber(0);
#endif
  f->sp = first_frame((char *)f->stack + f->bytes, first);
  f->started = true;
  entry_of = entry;
}

void fiber_free(Fiber *f) {
#if defined(__SANITIZE_THREAD__)
  if (f->sanitizer) __tsan_destroy_fiber(f->sanitizer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  if (f->stack) __asan_unpoison_memory_region(f->stack, f->bytes);
#endif
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  if (f->stack) munmap((char *)f->stack - page, STACK + page);
  *f = Fiber();
}

__attribute__((no_sanitize("address", "thread"))) void fiber_resume(Fiber *f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&home.fake, f->stack, f->bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  home.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(f->sanitizer, 1); /* 1: the switch itself orders nothing */
#endif
  emulated_switch(&home.sp, f->sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(home.fake, nullptr, nullptr);
#endif
}

__attribute__((no_sanitize("address", "thread"))) void fiber_yield(Fiber *f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f->sanitizer, home.stack, home.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(home.tsan, 1);
#endif
  emulated_switch(&f->sp, home.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->sanitizer, &home.stack, &home.bytes);
#endif
}
