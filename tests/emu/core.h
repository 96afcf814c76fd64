// The emulator's core: one block of CUDA threads as fibers on one CPU thread, and what they wait for.
//
// A fiber runs until it meets others (a barrier, a warp-wide instruction, an asynchronous copy), so what the schedules
// change is the order of those meetings. Whatever breaks the rules ends the launch with `Error`, which names block,
// thread and what was wrong; a launch in which nobody can go on ends with who waits where.
//
// Compiled without a sanitizer's instrumentation; the happens-before edges are told to ThreadSanitizer by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "sanitizers.h"

namespace emu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

enum class Schedule { kRoundRobin, kRandom, kWarpPriority };
enum class Completion {
  kEager,
  kLazy,
  kRandom
};  // when an asynchronous copy lands: at once, when waited for, any time

struct Thread {
  Index index;
  unsigned linear, warp, lane;
};

// ---- of a launch, as the host sees it

void configure(Schedule schedule, Completion completion, uint64_t seed);
void run(Index grid, Index block, size_t shared_bytes, void (*body)(void*), void* closure);
// 48 KB a launch, and more where the kernel was allowed it.
void allow_shared(const void* kernel, size_t bytes);
void check_shared(const void* kernel, size_t bytes);
extern int planted;  // the number of the planted bug that is switched on; 0 is none

// ---- of a thread

const Thread& self();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Let others run first, if the schedule likes.
void pause();

// Sleep until `woken(condition)`; every wake_all looks again. `what` is what the deadlock report says.
void sleep_until(bool (*ready)(const void*), const void* argument, const char* what, int64_t detail = 0);
void wake_sleepers();

// Barrier `id` of the block, for `count` threads; arrive does not wait.
void barrier_sync(int id, unsigned count);
void barrier_arrive(int id, unsigned count);
unsigned barrier_phase(int id);  // how many times it has been complete

// The lanes of `mask` meet; the last one runs `execute` on all lanes' arguments (null for lanes that are not of the
// mask). Lanes of the mask that come to another meeting, or to none, are errors.
using Execute = void (*)(void* const* lanes, unsigned mask);
void warp_meet(unsigned mask, const char* operation, void* argument, Execute execute, bool orders_memory = false);

// ---- shared memory

constexpr uint32_t kSharedLimit = 227 * 1024;  // bytes a block may have, static and dynamic
size_t shared_bytes();
void* shared_dynamic();                                                // 1024-byte aligned
void* shared_static(const void* key, size_t bytes, size_t alignment);  // one object a key and block, poisoned
uint32_t shared_address(const void* pointer);                          // as the 32-bit addresses of PTX
void* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* operation);  // checked

// ---- asynchronous copies of a thread (cp.async)

void copy_async(void* target, const void* source, unsigned bytes, unsigned filled);
void copy_async_commit();
void copy_async_wait(unsigned groups_in_flight);

// ---- other asynchronous work (bulk copies, matrix products): done at once, at a random time, or when forced

constexpr size_t kTaskBytes = 512;
struct Task {
  void (*complete)(void* data);
  unsigned queue;  // tasks of a queue complete in order; 0 is no queue
  uint64_t ticket;
  alignas(16) unsigned char data[kTaskBytes];
};
uint64_t post(void (*complete)(void*), const void* data, size_t bytes, unsigned queue);
bool complete_one(unsigned queue);  // the queue's oldest task; false where there is none
bool done(unsigned queue, uint64_t ticket);
size_t tasks_in_flight();

// What has to hold when a block ends; run once all of its threads have left.
void at_block_start(void (*check)());
void at_block_end(void (*check)());

uint64_t random_below(uint64_t bound);
Completion completion();

}  // namespace emu
