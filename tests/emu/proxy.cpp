// See proxy.h. A store or a reduction reads shared memory when it is done, at any time until its group is waited for,
// and what it reads is what the async proxy sees: without fence.proxy.async that is the poison of the block's start, or
// what was there before. What is an error: addresses and sizes that are not multiples of 16, a tile not on 1024 bytes,
// and an operation in flight, or never committed, when the block ends.
#include "proxy.h"

#include <cstring>
#include <deque>
#include <vector>

namespace emu {
namespace {

constexpr unsigned kFirstQueue = 64;  // of the core's queues; a thread's operations complete in order

struct Sent {
  uint64_t last = 0;  // ticket
  bool open = false;  // something is not in a group yet
  std::deque<uint64_t> groups;
};

struct State {
  std::vector<unsigned char> view = std::vector<unsigned char>(kSharedLimit);
  Sent thread[1024];
};

State& state() {
  static State* s = new State;
  return *s;
}

void start() {
  memset(state().view.data(), 0xff, state().view.size());
  for (Sent& s : state().thread) s = {};
}

void end() {
  for (const Sent& s : state().thread) {
    if (s.open) fail("a bulk operation was never committed");
  }
}

const bool kRegistered = (at_block_start(start), at_block_end(end), true);

template <class Operation>
void send(void (*complete)(void*), const Operation& operation) {
  Sent& mine = state().thread[self().linear];
  mine.open = true;
  mine.last = post(complete, &operation, sizeof operation, kFirstQueue + self().linear);
  pause();
}

struct Store {
  CUtensorMap map;
  uint32_t shared;
  int at[4];
};

void write_box(void* data) {
  const Store& store = *static_cast<Store*>(data);
  const CUtensorMap& m = store.map;
  unsigned row = 0;
  for (unsigned w = 0; w < m.box[3]; ++w) {
    for (unsigned z = 0; z < m.box[2]; ++z) {
      for (unsigned y = 0; y < m.box[1]; ++y, ++row) {
        for (unsigned x = 0; x < m.box[0]; ++x) {
          const int64_t at[4] = {store.at[0] + int64_t(x), store.at[1] + int64_t(y), store.at[2] + int64_t(z),
                                 store.at[3] + int64_t(w)};
          bool inside = true;
          for (int i = 0; i < 4; ++i) inside &= at[i] >= 0 && at[i] < int64_t(m.size[i]);
          if (!inside) continue;
          auto to = const_cast<unsigned char*>(m.base) + at[0] * 2 + at[1] * m.stride[1] + at[2] * m.stride[2] +
                    at[3] * m.stride[3];
          memcpy(to, async_byte(swizzled(store.shared + row * 128 + x * 2)), 2);
        }
      }
    }
  }
}

struct Addition {
  float* global;
  uint32_t shared, bytes;
};

void add_floats(void* data) {
  const Addition& a = *static_cast<Addition*>(data);
  for (uint32_t i = 0; i < a.bytes / 4; ++i) {
    float value;
    memcpy(&value, async_byte(a.shared + 4 * i), 4);
    a.global[i] += value;
  }
}

}  // namespace

unsigned char* async_byte(uint32_t address) {
  const uint32_t at = address - shared_address(shared_dynamic());
  if (at >= shared_bytes()) fail("the async proxy: out of bounds of shared memory");
  return state().view.data() + at;
}

// What other threads wrote until now comes along, which the hardware does not promise; a thread's own writes are there.
void fence_proxy_async() {
  const Ignored ignored;
  memcpy(state().view.data(), shared_dynamic(), shared_bytes());
  pause();
}

void tensor_store(const CUtensorMap& map, uint32_t shared, const int (&at)[4]) {
  const unsigned bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2;
  was_read(shared_pointer(shared, bytes, 1024, "cp.async.bulk.tensor"), bytes);
  const Ignored ignored;
  send(write_box, Store{map, shared, {at[0], at[1], at[2], at[3]}});
}

void bulk_add_float(float* global, uint32_t shared, uint32_t bytes) {
  was_read(shared_pointer(shared, bytes, 16, "cp.reduce.async.bulk"), bytes);
  const Ignored ignored;
  if (reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) {
    fail("cp.reduce.async.bulk: the global address and the size are multiples of 16");
  }
  send(add_floats, Addition{global, shared, bytes});
}

void bulk_commit() {
  Sent& mine = state().thread[self().linear];
  mine.groups.push_back(mine.last);
  mine.open = false;
}

void bulk_wait(unsigned in_flight) {
  const Ignored ignored;
  Sent& mine = state().thread[self().linear];
  const unsigned queue = kFirstQueue + self().linear;
  while (mine.groups.size() > in_flight) {
    const uint64_t ticket = mine.groups.front();
    mine.groups.pop_front();
    while (ticket != 0 && !done(queue, ticket)) complete_one(queue);
  }
  pause();
}

}  // namespace emu
