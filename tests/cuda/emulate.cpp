/* emulate.cpp - runs a grid: blocks one after the other, the threads of a block as fibers, each until it waits
 * for others; the order is forward, reversed or pseudo-random, and always the same for the same seed. */
#include "cuda_runtime.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdarg.h>
#include <stdio.h>
#include <string>
#include <vector>

#include "engine.h"
#include "fiber.h"

thread_local EmulatedPlace emulated_place;

namespace {

enum State { READY, AT_BARRIER, WITH_WARP, DONE };

struct Copy {
  void *to;
  const void *from;
  int bytes;
  long group; /* -1: not committed yet */
};

struct Thread {
  Fiber fiber;
  State state = DONE;
  bool fresh =
      true; /* its fiber must be started: new, or left in the middle of a launch that failed */
  uint3 index;
  EmulatedSite site;
  void *mine = nullptr;
  void (*complete)(void **) = nullptr;
  std::vector<Copy> copies;
  long groups = 0;
  ~Thread() { fiber_free(&fiber); }
};

struct Shared {
  const void *site; /* NULL: the dynamic one */
  size_t bytes;
  char *p;
};

/* One per thread of the host. */
struct Engine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Shared> shared;
  size_t shared_bytes = 0, dynamic_bytes = 0, allowed_bytes = 0;
  Thread *current = nullptr;
  int count = 0; /* threads of a block */
  const char *kernel = "";
  void (*body)(void *) = nullptr;
  void *context = nullptr;
  bool failed = false;
  std::string error;
  uint64_t random = 0;
};
thread_local Engine engine;

/* ---- the order ---- */

std::atomic<int> order{-1};
std::atomic<uint64_t> seed{1};

int order_now() {
  int o = order.load();
  if (o >= 0) return o;
  const char *name = getenv("PYLORA_EMULATE_ORDER");
  o = !name || strcmp(name, "forward") == 0 ? EMULATED_FORWARD
      : strcmp(name, "reversed") == 0       ? EMULATED_REVERSED
      : strcmp(name, "random") == 0         ? EMULATED_RANDOM
                                            : -1;
  if (o < 0) {
    fprintf(stderr, "PYLORA_EMULATE_ORDER is '%s'; it may be forward, reversed or random\n", name);
    abort();
  }
  order.store(o);
  return o;
}

uint64_t random_number() {
  uint64_t z = engine.random += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

/* 0 .. n-1 in the order asked for: i -> (first + i * step) mod n, with step and n coprime. */
struct Walk {
  uint64_t n, first = 0, step = 1;
  explicit Walk(uint64_t n_) : n(n_) {
    if (n < 2) return;
    if (order_now() == EMULATED_REVERSED) {
      first = n - 1, step = n - 1;
    } else if (order_now() == EMULATED_RANDOM) {
      first = random_number() % n;
      do step = 1 + random_number() % (n - 1);
      while (std::__gcd(step, n) != 1);
    }
  }
  uint64_t at(uint64_t i) const { return (uint64_t)((first + (unsigned __int128)i * step) % n); }
};

/* ---- failures ---- */

void fail(EmulatedSite site, const Thread *t, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void fail(EmulatedSite site, const Thread *t, const char *format, ...) {
  if (engine.failed) return;
  char why[300], text[900];
  va_list args;
  va_start(args, format);
  vsnprintf(why, sizeof why, format, args);
  va_end(args);
  const char *file = strrchr(site.file, '/');
  const uint3 b = emulated_place.block, at = t->index;
  snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u): %s at %s:%d: %s", b.x, b.y,
           b.z, at.x, at.y, at.z, site.what, file ? file + 1 : site.file, site.line, why);
  engine.failed = true;
  engine.error = text;
}

/* ---- threads ---- */

void leave(State state) {
  engine.current->state = state;
  fiber_yield(&engine.current->fiber);
}

void thread_main() {
  for (;;) { /* the fiber serves one block after the other */
    engine.body(engine.context);
    leave(DONE);
  }
}

void run(Thread *t) {
  if (t->fresh) fiber_start(&t->fiber, thread_main), t->fresh = false;
  engine.current = t;
  emulated_place.thread = t->index;
  fiber_resume(&t->fiber);
  engine.current = nullptr;
}

const char *state_text(const Thread *t) {
  return t->state == DONE         ? "has ended"
         : t->state == AT_BARRIER ? "waits at a barrier"
                                  : t->site.what;
}

bool same_site(const EmulatedSite &a, const EmulatedSite &b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

/* Runs the lanes of a warp until all wait at a barrier or are done, or, in random order, one step.  True: something
 * happened. */
bool run_warp(int warp) {
  const int first = warp * 32, lanes = std::min(32, engine.count - first);
  bool progress = false;
  for (;;) {
    const Walk walk(lanes);
    for (int i = 0; i < lanes; i++) {
      Thread *t = engine.threads[first + walk.at(i)].get();
      if (t->state != READY) continue;
      run(t);
      progress = true;
      if (engine.failed) return true;
    }
    Thread *waiting = nullptr, *other = nullptr;
    for (int i = 0; i < lanes; i++) {
      Thread *t = engine.threads[first + i].get();
      if (t->state == WITH_WARP && !waiting) waiting = t;
    }
    if (!waiting) return progress;
    for (int i = 0; i < lanes; i++) {
      Thread *t = engine.threads[first + i].get();
      if (t->state != WITH_WARP || !same_site(t->site, waiting->site) ||
          t->complete != waiting->complete)
        other = t;
    }
    if (other) {
      fail(waiting->site, waiting, "lane %d of the warp is elsewhere: %s (line %d)",
           (int)(other->index.x % 32), state_text(other), other->site.line);
      return true;
    }
    if (lanes < 32) {
      fail(waiting->site, waiting, "the warp has %d threads, not 32", lanes);
      return true;
    }
    void *mine[32];
    for (int i = 0; i < 32; i++) {
      Thread *t = engine.threads[first + i].get();
      mine[i] = t->mine;
      t->state = READY;
    }
    if (waiting->complete) waiting->complete(mine);
    if (order_now() == EMULATED_RANDOM) return true;
  }
}

void run_block() {
  const int warps = (engine.count + 31) / 32;
  for (int i = 0; i < engine.count; i++) {
    Thread *t = engine.threads[i].get();
    t->state = READY;
    t->copies.clear();
    t->groups = 0;
    const dim3 b = emulated_place.block_dim;
    t->index = {(unsigned)i % b.x, (unsigned)i / b.x % b.y, (unsigned)i / b.x / b.y};
  }
  for (Shared &s : engine.shared) memset(s.p, 0xff, s.bytes);
  for (;;) {
    bool progress = true;
    while (progress) {
      progress = false;
      const Walk walk(warps);
      for (int w = 0; w < warps; w++) {
        progress |= run_warp((int)walk.at(w));
        if (engine.failed) return;
      }
    }
    Thread *waiting = nullptr;
    for (int i = 0; i < engine.count && !waiting; i++)
      if (engine.threads[i]->state == AT_BARRIER) waiting = engine.threads[i].get();
    if (!waiting) return; /* all done */
    for (int i = 0; i < engine.count; i++) {
      Thread *t = engine.threads[i].get();
      if (t->state == AT_BARRIER && same_site(t->site, waiting->site)) continue;
      fail(waiting->site, waiting, "thread (%u, %u, %u) does not come: it %s (line %d)", t->index.x,
           t->index.y, t->index.z, state_text(t), t->site.line);
      return;
    }
    for (int i = 0; i < engine.count; i++) engine.threads[i]->state = READY;
  }
}

void free_shared() {
  for (Shared &s : engine.shared) free(s.p);
  engine.shared.clear();
  engine.shared_bytes = 0;
}

void *add_shared(const void *site, size_t bytes) {
  void *p = nullptr;
  /* 16-byte aligned and no more, and exactly as long as asked for. */
  if (posix_memalign(&p, 16, bytes ? bytes : 1) != 0) abort();
  memset(p, 0xff, bytes);
  engine.shared.push_back({site, bytes, (char *)p});
  engine.shared_bytes += bytes;
  return p;
}

} // namespace

/* A kernel has 48 kB, its own arrays and the launch's together, unless cudaFuncSetAttribute was called. */
static void check_asked() {
  if (engine.shared_bytes > 48 * 1024 && engine.allowed_bytes < engine.dynamic_bytes)
    emulated_fail({"", 0, "SHARED"}, "more than 48 kB of shared memory, and nobody asked for it");
}

/* ---- what kernels call ---- */

void *emulated_shared(const void *site, size_t bytes) {
  for (Shared &s : engine.shared)
    if (s.site == site) return s.p;
  void *p = add_shared(site, bytes);
  const size_t fixed = engine.shared_bytes - engine.dynamic_bytes;
  if (fixed > 48 * 1024 || engine.shared_bytes > emulated_device().shared_bytes)
    emulated_fail({"", 0, "SHARED"}, "the block's shared arrays are larger than the device allows");
  check_asked();
  return p;
}

void *emulated_dynamic_shared(void) {
  check_asked();
  for (Shared &s : engine.shared)
    if (!s.site) return s.p;
  return add_shared(nullptr, engine.dynamic_bytes);
}

void emulated_fail(EmulatedSite site, const char *why) {
  fail(site, engine.current, "%s", why);
  leave(DONE);
  abort(); /* a launch that failed resumes nobody */
}

void emulated_syncthreads(EmulatedSite site) {
  engine.current->site = site;
  leave(AT_BARRIER);
}

void emulated_together(EmulatedSite site, uint32_t mask, void *mine, void (*complete)(void **)) {
  if (mask != 0xffffffffu) emulated_fail(site, "its mask does not name all 32 lanes");
  Thread *t = engine.current;
  t->site = site, t->mine = mine, t->complete = complete;
  leave(WITH_WARP);
}

void emulated_check_shared(EmulatedSite site, const void *p, size_t bytes) {
  for (Shared &s : engine.shared)
    if ((const char *)p >= s.p && (const char *)p + bytes <= s.p + s.bytes) {
      if ((uintptr_t)p % 16) emulated_fail(site, "its shared memory is not 16-byte aligned");
      return;
    }
  emulated_fail(site, "its address is not in the block's shared memory");
}

void emulated_copy_async(EmulatedSite site, void *shared, const void *global, int bytes) {
  if (bytes < 0 || bytes > 16 || bytes % 4)
    emulated_fail(site, "it may copy 0, 4, 8, 12 or 16 bytes");
  emulated_check_shared(site, shared, 16);
  if (bytes && (uintptr_t)global % 16) emulated_fail(site, "its source is not 16-byte aligned");
  memset(shared, 0xff, 16);
  engine.current->copies.push_back({shared, global, bytes, -1});
}

void emulated_copy_async_commit(void) {
  Thread *t = engine.current;
  for (Copy &c : t->copies)
    if (c.group < 0) c.group = t->groups;
  t->groups++;
}

void emulated_copy_async_wait(int n) {
  Thread *t = engine.current;
  size_t kept = 0;
  for (Copy &c : t->copies) {
    if (c.group < 0 || c.group >= t->groups - n) {
      t->copies[kept++] = c;
      continue;
    }
    memset(c.to, 0, 16);
    if (c.bytes) memcpy(c.to, c.from, (size_t)c.bytes);
  }
  t->copies.resize(kept);
}

/* ---- what a launch calls ---- */

void emulated_set_order(int o, uint64_t s) {
  order.store(o);
  seed.store(s);
}

const char *emulated_error_text(void) { return engine.error.c_str(); }

cudaError_t emulated_run_grid(const char *what, const void *kernel, dim3 grid, dim3 block,
                              size_t shared, void (*body)(void *), void *context) {
  Engine &e = engine;
  if (e.current) {
    fprintf(stderr, "emulation: %s launched from inside a kernel\n", what);
    abort();
  }
  e.kernel = what, e.body = body, e.context = context;
  e.count = (int)(block.x * block.y * block.z);
  e.dynamic_bytes = shared;
  e.allowed_bytes = emulated_allowed_shared(kernel);
  e.failed = false;
  e.random = seed.load();
  while ((int)e.threads.size() < e.count) e.threads.emplace_back(new Thread);
  emulated_place.block_dim = block, emulated_place.grid_dim = grid;
  free_shared();
  if (shared) add_shared(nullptr, shared);
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  const Walk walk(blocks);
  for (uint64_t i = 0; i < blocks && !e.failed; i++) {
    const uint64_t b = walk.at(i);
    emulated_place.block = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                            (unsigned)(b / grid.x / grid.y)};
    run_block();
  }
  free_shared();
  if (!e.failed) return cudaSuccess;
  for (int i = 0; i < e.count; i++) e.threads[i]->fresh = true;
  return cudaErrorLaunchFailure;
}
