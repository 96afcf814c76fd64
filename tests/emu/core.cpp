// Fibers, schedules, meetings, shared memory and asynchronous work; see core.h.
#include "core.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "sanitizers.h"
#include "switch.h"

namespace emu {
namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr unsigned kMaxThreads = 1024, kMaxWarps = 32, kBarriers = 16;
constexpr size_t kArenaBytes = 256 * 1024, kPage = 4096, kMargin = 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN in fp32, bf16 and fp16

struct Copy {
  void* target;
  const void* source;
  unsigned bytes, filled, group;
};

struct Fiber {
  Thread thread;
  Context context;
  enum State { kReady, kAsleep, kLeft } state;
  const char* waits_for;
  int64_t detail;
  bool (*ready)(const void*);  // of a sleeper
  const void* argument;
  std::vector<Copy> copies;
  unsigned groups;  // of copies, committed so far
};

struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* operation = nullptr;
  void* arguments[32];
};

struct Warp {
  std::vector<Meeting*> open, spare;
  std::deque<Fiber*> ready;
  uint64_t priority;
  int phase;
  char edge[2];
};

struct Barrier {
  unsigned expected = 0, arrived = 0, phase = 0;
  std::vector<Fiber*> waiting;
  char edge[2];  // of ThreadSanitizer: one a phase, or a late waiter would take in what the next phase did
};

struct State {
  Schedule schedule = Schedule::kRoundRobin;
  Completion completion = Completion::kEager;
  uint64_t seed = 0;
  Index grid, block, block_at;
  size_t shared_bytes = 0;
  unsigned threads = 0, warps = 0, left = 0, ready = 0, last_warp = 0;
  Fiber fibers[kMaxThreads];
  Warp warp[kMaxWarps];
  Barrier barrier[kBarriers];
  Fiber* current = nullptr;
  Context main;
  unsigned char* stacks = nullptr;
  unsigned char *arena = nullptr, *dynamic = nullptr;
  size_t static_bytes = 0;
  std::vector<std::pair<const void*, void*>> statics;
  std::vector<std::pair<unsigned char*, size_t>> margins;
  std::vector<Fiber*> sleepers;
  std::deque<Task> tasks;
  std::map<unsigned, uint64_t> completed;
  uint64_t tickets = 0, slowness = 4;  // how long asynchronous work takes, of Completion::kRandom
  std::vector<void (*)()> starts, ends;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  bool failed = false;
  char message[4096];
  sigjmp_buf jump;
  char launch_edge, end_edge;
};

State& state() {
  static State* s = new State;
  return *s;
}

State& g = state();

void switch_to(Fiber* next) {
  Fiber* from = g.current;
  g.current = next;
  if (next != from) switch_context(from ? from->context : g.main, next->context, from && from->state == Fiber::kLeft);
}

void switch_to_main() {
  Fiber* from = g.current;
  g.current = nullptr;
  switch_context(from->context, g.main, from->state == Fiber::kLeft);
}

void make_ready(Fiber* fiber) {
  fiber->state = Fiber::kReady;
  fiber->waits_for = nullptr;
  g.warp[fiber->thread.warp].ready.push_back(fiber);
  ++g.ready;
}

Fiber* take_ready() {
  if (g.ready == 0) return nullptr;
  unsigned w = g.last_warp;
  if (g.schedule == Schedule::kRoundRobin) {
    do w = (w + 1) % g.warps;
    while (g.warp[w].ready.empty());
  } else if (g.schedule == Schedule::kRandom) {
    w = random_below(g.warps);
    while (g.warp[w].ready.empty()) w = (w + 1) % g.warps;
  } else {
    bool found = false;
    for (unsigned i = 0; i < g.warps; ++i) {
      if (!g.warp[i].ready.empty() && (!found || g.warp[i].priority > g.warp[w].priority)) w = i, found = true;
    }
    if (random_below(64) == 0) g.warp[w].priority = random_below(1u << 30);
  }
  g.last_warp = w;
  auto& ready = g.warp[w].ready;
  if (g.schedule != Schedule::kRoundRobin) std::swap(ready.front(), ready[random_below(ready.size())]);
  Fiber* fiber = ready.front();
  ready.pop_front();
  --g.ready;
  return fiber;
}

void finish_task(size_t place) {
  const Task task = g.tasks[place];
  g.tasks.erase(g.tasks.begin() + place);
  task.complete(const_cast<unsigned char*>(task.data));
  if (task.queue) g.completed[task.queue] = task.ticket;
}

// The oldest task of a queue, or any task of none.
bool finish_any_task() {
  if (g.tasks.empty()) return false;
  size_t place = random_below(g.tasks.size());
  if (g.tasks[place].queue) {
    for (size_t i = 0; i < place; ++i) {
      if (g.tasks[i].queue == g.tasks[place].queue) place = i;
    }
  }
  finish_task(place);
  return true;
}

std::string who_waits() {
  std::map<std::string, std::vector<unsigned>> groups;
  for (unsigned i = 0; i < g.threads; ++i) {
    const Fiber& f = g.fibers[i];
    char key[256];
    if (f.state == Fiber::kLeft) {
      snprintf(key, sizeof key, "left the kernel");
    } else {
      snprintf(key, sizeof key, "wait for %s %lld", f.waits_for ? f.waits_for : "their turn", (long long)f.detail);
    }
    groups[key].push_back(i);
  }
  std::string text;
  for (const auto& [key, threads] : groups) {
    char line[400];
    snprintf(line, sizeof line, "\n  %zu threads (%u to %u) %s", threads.size(), threads.front(), threads.back(),
             key.c_str());
    text += line;
  }
  for (unsigned b = 0; b < kBarriers; ++b) {
    if (g.barrier[b].arrived) {
      char line[100];
      snprintf(line, sizeof line, "\n  barrier %u: %u of %u threads came", b, g.barrier[b].arrived,
               g.barrier[b].expected);
      text += line;
    }
  }
  return text;
}

// Run somebody else; the caller has queued itself where it will be found, or has left.
void reschedule() {
  if (g.completion == Completion::kRandom && !g.tasks.empty() && random_below(g.slowness) == 0) finish_any_task();
  Fiber* next = take_ready();
  if (next == nullptr && g.left == g.threads) return switch_to_main();  // what is in flight now is an error
  while (next == nullptr && finish_any_task()) next = take_ready();
  if (next == nullptr) {
    fail("deadlock%s", who_waits().c_str());
  }
  switch_to(next);
}

void enter_thread() {
  entered_context(g.main);
  acquire(&g.launch_edge);
  g.body(g.closure);
  Fiber& me = *g.current;
  for (const Copy& copy : me.copies) {
    (void)copy;
    fail("a cp.async was never waited for");
  }
  for (Meeting* meeting : g.warp[me.thread.warp].open) {
    if (meeting->mask >> me.thread.lane & 1) {
      fail("lane %u left the kernel while others of its warp wait for it in %s with mask %08x", me.thread.lane,
           meeting->operation, meeting->mask);
    }
  }
  release(&g.end_edge);
  me.state = Fiber::kLeft;
  ++g.left;
  reschedule();
  __builtin_unreachable();
}

void on_bad_access(int, siginfo_t* info, void*) {
  auto address = static_cast<unsigned char*>(info->si_addr);
  const char* where = "memory that is not the launch's";
  long long offset = 0;
  if (address >= g.arena - kPage && address < g.arena + kArenaBytes + kPage) {
    where = "shared memory";
    offset = address - g.dynamic;
  }
  if (g.current == nullptr) {  // not a kernel's doing
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const Index b = g.block_at;
  snprintf(g.message, sizeof g.message, "block (%u, %u, %u), thread %u: out of bounds of %s (byte %lld of %zu)", b.x,
           b.y, b.z, g.current->thread.linear, where, offset, g.shared_bytes);
  siglongjmp(g.jump, 1);
}

void set_up() {
  if (g.arena) return;
  g.stacks = static_cast<unsigned char*>(mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  auto map = static_cast<unsigned char*>(
      mmap(nullptr, kArenaBytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  g.arena = map + kPage;
  mprotect(g.arena, kArenaBytes, PROT_READ | PROT_WRITE);
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(g.stacks + i * kStackBytes, kPage, PROT_NONE);
}

void poison_margin(unsigned char* at, size_t bytes) {
  memset(at, kPoison, bytes);
  g.margins.push_back({at, bytes});
}

void run_block() {
  g.statics.clear();
  g.margins.clear();
  g.static_bytes = 0;
  g.tasks.clear();
  g.completed.clear();
  g.sleepers.clear();
  g.left = g.ready = g.last_warp = 0;
  // The dynamic part ends where the guard page begins, as nearly as its alignment to 1024 bytes lets it.
  g.dynamic = g.arena + ((kArenaBytes - g.shared_bytes) & ~size_t{1023});
  memset(g.dynamic, kPoison, g.shared_bytes);
  poison_margin(g.dynamic + g.shared_bytes, g.arena + kArenaBytes - g.dynamic - g.shared_bytes);
  poison_margin(g.dynamic - kMargin, kMargin);
  for (Barrier& b : g.barrier) b.arrived = 0, b.waiting.clear();
  for (unsigned w = 0; w < g.warps; ++w) {
    Warp& warp = g.warp[w];
    for (Meeting* m : warp.open) warp.spare.push_back(m);
    warp.open.clear();
    warp.ready.clear();
    warp.priority = random_below(1u << 30);
  }
  g.slowness = 4u << random_below(9);
  for (void (*start)() : g.starts) start();
  release(&g.launch_edge);
  for (unsigned i = 0; i < g.threads; ++i) {
    Fiber& f = g.fibers[i];
    f.thread = {{i % g.block.x, i / g.block.x % g.block.y, i / (g.block.x * g.block.y)}, i, i / 32, i % 32};
    f.copies.clear();
    f.groups = 0;
    f.detail = 0;
    make_context(f.context, g.stacks + i * kStackBytes + kPage, kStackBytes - kPage, enter_thread);
    make_ready(&f);
  }
  switch_to(take_ready());
  if (g.failed) return;
  acquire(&g.end_edge);
  if (!g.tasks.empty()) fail("%zu asynchronous operations in flight when the block ended", g.tasks.size());
  for (unsigned b = 0; b < kBarriers; ++b) {
    if (g.barrier[b].arrived)
      fail("barrier %u: %u of %u threads came, and the block ended", b, g.barrier[b].arrived, g.barrier[b].expected);
  }
  for (const auto& [at, bytes] : g.margins) {
    for (size_t i = 0; i < bytes; ++i) {
      if (at[i] != kPoison) fail("written beside shared memory, at byte %td of the dynamic part", at + i - g.dynamic);
    }
  }
  for (void (*end)() : g.ends) end();
}

}  // namespace

int planted = 0;

namespace {
std::map<const void*, size_t> allowed;
}

void allow_shared(const void* kernel, size_t bytes) { allowed[kernel] = bytes; }

void check_shared(const void* kernel, size_t bytes) {
  if (bytes > 48 * 1024 && bytes > allowed[kernel]) {
    throw Error(std::to_string(bytes) + " bytes of shared memory, and no cudaFuncSetAttribute that allows them");
  }
}

uint64_t random_below(uint64_t bound) {  // splitmix64
  uint64_t z = (g.seed += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) % bound;
}

void configure(Schedule schedule, Completion completion, uint64_t seed) {
  g.schedule = schedule;
  g.completion = completion;
  g.seed = seed * 2654435761u + 1;
}

Completion completion() { return g.completion; }

void run(Index grid, Index block, size_t shared_bytes, void (*body)(void*), void* closure) {
  set_up();
  g.grid = grid;
  g.block = block;
  g.shared_bytes = shared_bytes;
  g.threads = block.x * block.y * block.z;
  g.warps = (g.threads + 31) / 32;
  if (g.threads == 0 || g.threads > kMaxThreads)
    throw Error("a block of " + std::to_string(g.threads) + " threads; 1 to 1024 are possible");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid that is empty, or more than 65535 in y or z");
  if (shared_bytes > kSharedLimit)
    throw Error(std::to_string(shared_bytes) + " bytes of shared memory; a block has at most 232448");
  g.body = body;
  g.closure = closure;
  g.failed = false;
  alignas(16) static unsigned char signal_stack[64 * 1024];
  stack_t stack{}, stack_before{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  struct sigaction action{}, before{}, bus_before{};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  if (kCatchSignals) {
    sigaltstack(&stack, &stack_before);
    sigaction(SIGSEGV, &action, &before);
    sigaction(SIGBUS, &action, &bus_before);
  }
  if (sigsetjmp(g.jump, 1) == 0) {
    for (unsigned z = 0; z < grid.z && !g.failed; ++z) {
      for (unsigned y = 0; y < grid.y && !g.failed; ++y) {
        for (unsigned x = 0; x < grid.x && !g.failed; ++x) {
          g.block_at = {x, y, z};
          run_block();
        }
      }
    }
  } else {
    g.failed = true;
    g.current = nullptr;
  }
  if (kCatchSignals) {
    sigaction(SIGSEGV, &before, nullptr);
    sigaction(SIGBUS, &bus_before, nullptr);
    sigaltstack(&stack_before, nullptr);
  }
  if (g.failed) throw Error(g.message);
}

const Thread& self() { return g.current->thread; }
const Index& block_index() { return g.block_at; }
const Index& block_size() { return g.block; }
const Index& grid_size() { return g.grid; }

void fail(const char* format, ...) {
  const Index b = g.block_at;
  int n = snprintf(g.message, sizeof g.message, "block (%u, %u, %u)", b.x, b.y, b.z);
  if (g.current) n += snprintf(g.message + n, sizeof g.message - n, ", thread %u", g.current->thread.linear);
  n += snprintf(g.message + n, sizeof g.message - n, ": ");
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(g.message + n, sizeof g.message - n, format, arguments);
  va_end(arguments);
  g.failed = true;
  if (g.current == nullptr) throw Error(g.message);
  switch_to_main();  // for good: what the fibers hold is given up with them
  __builtin_unreachable();
}

void pause() {
  const Ignored ignored;
  Fiber* me = g.current;
  if (g.completion == Completion::kRandom && !me->copies.empty() && random_below(2) == 0) {
    const size_t place = random_below(me->copies.size());
    const Copy copy = me->copies[place];
    me->copies.erase(me->copies.begin() + place);
    memcpy(copy.target, copy.source, copy.filled);
    memset(static_cast<char*>(copy.target) + copy.filled, 0, copy.bytes - copy.filled);
  }
  if (g.schedule == Schedule::kRoundRobin || random_below(4) != 0) return;
  make_ready(me);
  reschedule();
}

void sleep_until(bool (*ready)(const void*), const void* argument, const char* what, int64_t detail) {
  const Ignored ignored;
  Fiber* me = g.current;
  while (!ready(argument)) {
    me->state = Fiber::kAsleep;
    me->waits_for = what;
    me->detail = detail;
    me->ready = ready;
    me->argument = argument;
    g.sleepers.push_back(me);
    reschedule();
  }
}

void wake_sleepers() {
  const Ignored ignored;
  size_t kept = 0;
  for (size_t i = 0; i < g.sleepers.size(); ++i) {
    Fiber* f = g.sleepers[i];
    if (f->ready(f->argument))
      make_ready(f);
    else
      g.sleepers[kept++] = f;
  }
  g.sleepers.resize(kept);
}

namespace {

// True where this arrival completed the phase.
bool arrive(int id, unsigned count) {
  if (id < 0 || id >= int(kBarriers)) fail("barrier %d; there are 16", id);
  Barrier& b = g.barrier[id];
  if (count == 0 || count % 32 != 0) {
    if (id != 0 || count != g.threads) fail("barrier %d for %u threads, not a multiple of 32", id, count);
  }
  if (b.arrived == 0) b.expected = count;
  if (b.expected != count) fail("barrier %d for %u threads, and others came to it for %u", id, count, b.expected);
  release(&b.edge[b.phase & 1]);
  if (++b.arrived < count) return false;
  b.arrived = 0;
  ++b.phase;
  for (Fiber* f : b.waiting) make_ready(f);
  b.waiting.clear();
  return true;
}

}  // namespace

unsigned barrier_phase(int id) { return g.barrier[id].phase; }

void barrier_arrive(int id, unsigned count) {
  const Ignored ignored;
  arrive(id, count);
  pause();
}

void barrier_sync(int id, unsigned count) {
  const Ignored ignored;
  Fiber* me = g.current;
  const unsigned phase = id >= 0 && id < int(kBarriers) ? g.barrier[id].phase : 0;
  if (arrive(id, count)) {
    make_ready(me);
  } else {
    me->state = Fiber::kAsleep;
    me->waits_for = "barrier";
    me->detail = id;
    g.barrier[id].waiting.push_back(me);
  }
  reschedule();
  acquire(&g.barrier[id].edge[phase & 1]);
}

void warp_meet(unsigned mask, const char* operation, void* argument, Execute execute, bool orders_memory) {
  const Ignored ignored;
  pause();
  Fiber* me = g.current;
  Warp& warp = g.warp[me->thread.warp];
  const unsigned lane = me->thread.lane;
  if (!(mask >> lane & 1)) fail("%s with mask %08x, which lane %u is not of", operation, mask, lane);
  Meeting* here = nullptr;
  for (Meeting* m : warp.open) {
    if (!(m->mask & mask)) continue;
    if (m->mask != mask || strcmp(m->operation, operation) != 0) {
      fail("the lanes of a warp part: %s with mask %08x, while others of it wait in %s with mask %08x", operation, mask,
           m->operation, m->mask);
    }
    here = m;
  }
  if (here == nullptr) {
    if (warp.spare.empty()) warp.spare.push_back(new Meeting);
    here = warp.spare.back();
    warp.spare.pop_back();
    warp.open.push_back(here);
    here->mask = mask;
    here->arrived = 0;
    here->operation = operation;
    for (void*& a : here->arguments) a = nullptr;
  }
  here->arrived |= 1u << lane;
  here->arguments[lane] = argument;
  char* edge = &warp.edge[warp.phase & 1];
  if (orders_memory) release(edge);
  const unsigned present = g.threads - me->thread.warp * 32;
  if (present < 32 && mask >> present) fail("%s with mask %08x in a warp of %u threads", operation, mask, present);
  if (here->arrived == mask) {
    if (execute) execute(here->arguments, mask);
    warp.open.erase(std::find(warp.open.begin(), warp.open.end(), here));
    warp.spare.push_back(here);
    if (orders_memory) ++warp.phase;
    for (unsigned l = 0; l < 32; ++l) {
      if (l != lane && mask >> l & 1) make_ready(&g.fibers[me->thread.warp * 32 + l]);
    }
    make_ready(me);
  } else {
    me->state = Fiber::kAsleep;
    me->waits_for = operation;
    me->detail = mask;
  }
  reschedule();
  if (orders_memory) acquire(edge);
}

size_t shared_bytes() { return g.shared_bytes; }
void* shared_dynamic() { return g.dynamic; }

void* shared_static(const void* key, size_t bytes, size_t alignment) {
  const Ignored ignored;
  for (const auto& [k, pointer] : g.statics) {
    if (k == key) return pointer;
  }
  const size_t aligned = std::max<size_t>(alignment, 16);
  size_t at = (g.static_bytes + kMargin + aligned - 1) / aligned * aligned;  // a margin before each
  if (at + bytes + 2 * kMargin > size_t(g.dynamic - g.arena)) fail("too much static shared memory");
  poison_margin(g.arena + g.static_bytes, at - g.static_bytes);
  memset(g.arena + at, kPoison, bytes);
  g.static_bytes = at + bytes;
  const size_t slack = -g.static_bytes & 15;
  poison_margin(g.arena + g.static_bytes, slack);
  g.static_bytes += slack;
  g.statics.push_back({key, g.arena + at});
  return g.arena + at;
}

uint32_t shared_address(const void* pointer) {
  const auto at = static_cast<const unsigned char*>(pointer) - g.arena;
  if (at < 0 || at > ptrdiff_t(kArenaBytes)) fail("a pointer that is not of shared memory, taken as one");
  return static_cast<uint32_t>(at);
}

void* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* operation) {
  const size_t begin = g.dynamic - g.arena;
  if (address % alignment) fail("%s: shared address %u is not a multiple of %zu", operation, address, alignment);
  const bool in_dynamic = address >= begin && address + bytes <= begin + g.shared_bytes;
  if (!in_dynamic && address + bytes > g.static_bytes) {
    fail("%s: out of bounds of shared memory (bytes %lld to %lld of %zu)", operation,
         (long long)address - (long long)begin, (long long)(address + bytes) - (long long)begin, g.shared_bytes);
  }
  return g.arena + address;
}

void copy_async(void* target, const void* source, unsigned bytes, unsigned filled) {
  Fiber* me = g.current;
  wrote(target, bytes);
  if (filled) was_read(source, filled);
  const Ignored ignored;
  if (g.completion == Completion::kEager) {
    memcpy(target, source, filled);
    memset(static_cast<char*>(target) + filled, 0, bytes - filled);
    me->copies.push_back({target, source, 0, 0, me->groups});
  } else {
    memset(target, kPoison, bytes);
    me->copies.push_back({target, source, bytes, filled, me->groups});
  }
  pause();
}

void copy_async_commit() { ++g.current->groups; }

void copy_async_wait(unsigned in_flight) {
  const Ignored ignored;
  Fiber* me = g.current;
  size_t kept = 0;
  for (const Copy& copy : me->copies) {
    if (copy.group + in_flight < me->groups) {
      memcpy(copy.target, copy.source, copy.filled);
      memset(static_cast<char*>(copy.target) + copy.filled, 0, copy.bytes - copy.filled);
    } else {
      me->copies[kept++] = copy;
    }
  }
  me->copies.resize(kept);
  pause();
}

uint64_t post(void (*complete)(void*), const void* data, size_t bytes, unsigned queue) {
  const Ignored ignored;
  if (bytes > kTaskBytes) fail("a task of %zu bytes", bytes);
  g.tasks.emplace_back();
  Task& task = g.tasks.back();
  task.complete = complete;
  task.queue = queue;
  task.ticket = ++g.tickets;
  memcpy(task.data, data, bytes);
  const uint64_t ticket = task.ticket;
  if (g.completion == Completion::kEager) finish_task(g.tasks.size() - 1);
  return ticket;
}

bool complete_one(unsigned queue) {
  const Ignored ignored;
  for (size_t i = 0; i < g.tasks.size(); ++i) {
    if (g.tasks[i].queue == queue) {
      finish_task(i);
      return true;
    }
  }
  return false;
}

bool done(unsigned queue, uint64_t ticket) {
  const Ignored ignored;
  return g.completed[queue] >= ticket;
}
size_t tasks_in_flight() { return g.tasks.size(); }
void at_block_start(void (*check)()) { state().starts.push_back(check); }
void at_block_end(void (*check)()) { state().ends.push_back(check); }

}  // namespace emu

// Global memory for the tests: it ends where a guard page begins (16-byte alignment kept), and begins after one.
extern "C" void* emu_allocate(size_t bytes) {
  const size_t body = (bytes + emu::kPage - 1) / emu::kPage * emu::kPage;
  auto map =
      static_cast<unsigned char*>(mmap(nullptr, body + 2 * emu::kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(map + emu::kPage, body, PROT_READ | PROT_WRITE);
  memset(map + emu::kPage, 0xa5, body);
  return map + emu::kPage + (body - (bytes + 15) / 16 * 16);
}

// False where the bytes between the end of the memory and its guard page, or before it, were written.
extern "C" int emu_free(void* pointer, size_t bytes) {
  const size_t body = (bytes + emu::kPage - 1) / emu::kPage * emu::kPage;
  auto at = static_cast<unsigned char*>(pointer);
  unsigned char* map = at - (body - (bytes + 15) / 16 * 16) - emu::kPage;
  bool clean = true;
  for (unsigned char* p = map + emu::kPage; p < at; ++p) clean &= *p == 0xa5;
  for (unsigned char* p = at + bytes; p < map + emu::kPage + body; ++p) clean &= *p == 0xa5;
  munmap(map, body + 2 * emu::kPage);
  return clean;
}
