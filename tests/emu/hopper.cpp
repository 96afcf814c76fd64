// See hopper.h. What is an error here: a barrier used before it is there or past its count, a tile that is not aligned
// for its swizzle, a product without its fence, with other operands in other lanes, or never waited for. Sums are NaN
// from issue to wait, and a copy's target from issue to landing.
#include "hopper.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "proxy.h"

namespace emu {
namespace {

// ---- mbarriers

struct MBarrier {
  unsigned count, pending, phase;
  int64_t bytes;
  char edge[2];
  unsigned made_by, made_in;  // thread, and phase of __syncthreads
  bool fenced;
};

// A warpgroup's sums of one array in one lane, from its first product in flight to the wait.
struct Sums {
  float* d;
  std::vector<float> values;
  uint64_t last;  // product
};

struct Issued {
  Product product;
  unsigned lanes = 0;
  Sums* sums[128];
  const uint32_t* a[128];
};

struct Lane {
  std::list<Sums> sums;
  uint64_t issued = 0, committed = 0;
  std::deque<uint64_t> groups;  // the number of products issued when each was committed
  bool fenced = false;
};

struct Warpgroup {
  std::deque<std::unique_ptr<Issued>> open;  // not issued by all lanes yet, or not done
  uint64_t first = 0, posted = 0,
           done[4] = {};  // `first`: the number of open.front(); a warp's quarter is done by itself
  unsigned registers = 0, callers = 0;
  Lane lane[128];
};

struct Block {
  std::map<uint32_t, MBarrier> barriers;
  Warpgroup warpgroup[8];
};

Block& block() {
  static Block* b = new Block;
  return *b;
}

void start() {
  Block& b = block();
  b.barriers.clear();
  const unsigned threads = block_size().x * block_size().y * block_size().z;
  for (Warpgroup& w : b.warpgroup) {
    w.open.clear();
    w.first = w.posted = w.done[0] = w.done[1] = w.done[2] = w.done[3] = 0;
    w.callers = 0;
    w.registers = 65536 / threads / 8 * 8;
    for (Lane& l : w.lane) l.sums.clear(), l.groups.clear(), l.issued = l.committed = 0, l.fenced = false;
  }
}

void end() {
  for (const auto& [address, barrier] : block().barriers) {
    if (barrier.bytes != 0) {
      fail("mbarrier at %u: %lld bytes still expected when the block ended", address, (long long)barrier.bytes);
    }
  }
  for (const Warpgroup& w : block().warpgroup) {
    for (const Lane& l : w.lane) {
      if (!l.sums.empty()) fail("a wgmma was never waited for");
    }
  }
}

const bool kRegistered = (at_block_start(start), at_block_end(end), true);

MBarrier& barrier_at(uint32_t address, const char* operation) {
  shared_pointer(address, 8, 8, operation);
  auto found = block().barriers.find(address);
  if (found == block().barriers.end()) fail("%s: no mbarrier at %u yet", operation, address);
  const MBarrier& b = found->second;
  if (!b.fenced) fail("%s: no fence.mbarrier_init since the mbarrier at %u was made", operation, address);
  if (b.made_by != self().linear && b.made_in == barrier_phase(0)) {
    fail("%s: no __syncthreads since the mbarrier at %u was made", operation, address);
  }
  return found->second;
}

void settle(MBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.count;
  ++b.phase;
  wake_sleepers();
}

struct Parity {
  const MBarrier* barrier;
  uint32_t parity;
};

}  // namespace

void mbarrier_init(uint32_t address, uint32_t count) {
  const Ignored ignored;
  shared_pointer(address, 8, 8, "mbarrier.init");
  if (count == 0 || count > (1u << 20) - 1) fail("mbarrier.init: a count of %u", count);
  if (!block()
           .barriers.insert({address, MBarrier{count, count, 0, 0, {}, self().linear, barrier_phase(0), false}})
           .second) {
    fail("mbarrier.init: there is one at %u already", address);
  }
  pause();
}

void fence_mbarrier_init() {
  const Ignored ignored;
  for (auto& [address, b] : block().barriers) b.fenced |= b.made_by == self().linear;
}

void mbarrier_arrive(uint32_t address, int64_t expected_bytes) {
  const Ignored ignored;
  MBarrier& b = barrier_at(address, "mbarrier.arrive");
  release(&b.edge[b.phase & 1]);
  if (b.pending == 0) fail("mbarrier.arrive: more arrivals than the %u of the phase", b.count);
  --b.pending;
  b.bytes += expected_bytes;
  settle(b);
  pause();
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  const Ignored ignored;
  MBarrier& b = barrier_at(address, "mbarrier.wait");
  pause();
  const Parity condition{&b, parity};
  sleep_until(
      [](const void* c) {
        const Parity& p = *static_cast<const Parity*>(c);
        return (p.barrier->phase & 1) != p.parity;
      },
      &condition, "mbarrier at", address);
  acquire(&b.edge[parity & 1]);
}

// ---- tensor copies

namespace {

struct Load {
  CUtensorMap map;
  uint32_t shared, barrier;
  int at[4];
};

unsigned char* shared_byte(uint32_t address) {
  return static_cast<unsigned char*>(shared_dynamic()) + (int64_t(address) - shared_address(shared_dynamic()));
}

void land(void* data) {
  const Load& load = *static_cast<Load*>(data);
  const CUtensorMap& m = load.map;
  unsigned row = 0;
  for (unsigned w = 0; w < m.box[3]; ++w) {
    for (unsigned z = 0; z < m.box[2]; ++z) {
      for (unsigned y = 0; y < m.box[1]; ++y, ++row) {
        for (unsigned x = 0; x < m.box[0]; x += 8) {
          const int64_t at[4] = {load.at[0] + int64_t(x), load.at[1] + int64_t(y), load.at[2] + int64_t(z),
                                 load.at[3] + int64_t(w)};
          uint16_t values[8] = {};
          for (int e = 0; e < 8; ++e) {
            bool inside = at[0] + e >= 0 && at[0] + e < int64_t(m.size[0]);
            for (int i = 1; i < 4; ++i) inside &= at[i] >= 0 && at[i] < int64_t(m.size[i]);
            if (!inside) continue;
            memcpy(&values[e],
                   m.base + (at[0] + e) * 2 + at[1] * m.stride[1] + at[2] * m.stride[2] + at[3] * m.stride[3], 2);
          }
          const uint32_t target = swizzled(load.shared + row * 128 + x * 2);
          memcpy(shared_byte(target), values, 16);
          memcpy(async_byte(target), values, 16);
        }
      }
    }
  }
  MBarrier& b = block().barriers.find(load.barrier)->second;
  b.bytes -= int64_t(row) * 128;
  settle(b);
}

}  // namespace

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void tensor_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, const int (&at)[4]) {
  const unsigned bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2;
  void* target = shared_pointer(shared, bytes, 1024, "cp.async.bulk.tensor");
  wrote(target, bytes);
  const Ignored ignored;
  MBarrier& b = barrier_at(barrier, "cp.async.bulk.tensor");
  release(&b.edge[b.phase & 1]);
  memset(target, 0xff, bytes);
  memset(async_byte(shared), 0xff, bytes);
  Load load{map, shared, barrier, {at[0], at[1], at[2], at[3]}};
  post(land, &load, sizeof load, 0);
  pause();
}

// ---- products of a warpgroup

namespace {

Warpgroup& my_warpgroup() { return block().warpgroup[self().linear / 128]; }
Lane& my_lane() { return my_warpgroup().lane[self().linear % 128]; }

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
    if (d >> 62 != 1) fail("wgmma: a descriptor with mode %d; the 128-byte swizzle is 1", int(d >> 62));
    if (d >> 49 & 7) fail("wgmma: a descriptor with a base offset");
  }
};

struct Quarter {
  unsigned warpgroup, warp;
};

// 16 rows of a product: what one warp's part of the tensor cores does, at a time of its own.
void multiply(void* data) {
  const auto [group, warp] = *static_cast<Quarter*>(data);
  Warpgroup& w = block().warpgroup[group];
  const Issued& issued = *w.open[w.done[warp] - w.first];
  const Product& p = issued.product;
  const uint32_t begin = shared_address(shared_dynamic()), size = shared_bytes();
  const auto half_at = [&](uint32_t address) {
    address = swizzled(address);
    if (address - begin + 2 > size) fail("wgmma: out of bounds of shared memory");
    uint16_t bits;
    memcpy(&bits, async_byte(address), 2);
    return p.widen(bits);
  };
  static float a[16][16], b[16][256], d[16][256];
  if (p.from_registers) {
    for (int l = 0; l < 32; ++l) {
      for (int r = 0; r < 4; ++r) {
        for (int e = 0; e < 2; ++e) {
          a[l / 4 + 8 * (r & 1)][8 * (r / 2) + 2 * (l % 4) + e] =
              p.widen(uint16_t(issued.a[32 * warp + l][r] >> 16 * e));
        }
      }
    }
  }
  const auto mn_major = [&](const Descriptor& at, int k, int n) {  // eight of K a group, 64 columns a panel
    return half_at(at.start + n / 64 * at.leading + n % 64 * 2 + k / 8 * at.stride + k % 8 * 128);
  };
  if (p.from_registers || p.left_transposed) {
    const Descriptor at(p.b);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < p.columns; ++n) b[k][n] = mn_major(at, k, n);
      for (int m = 0; m < 16 && p.left_transposed; ++m) a[m][k] = mn_major(Descriptor(p.a), k, int(16 * warp) + m);
    }
  } else {
    const Descriptor left(p.a), right(p.b);  // K-major: groups of eight rows
    for (int k = 0; k < 16; ++k) {
      for (int m = 0; m < 16; ++m) {
        a[m][k] = half_at(left.start + (2 * warp + m / 8) * left.stride + m % 8 * 128 + k * 2);
      }
      for (int n = 0; n < p.columns; ++n) b[k][n] = half_at(right.start + n / 8 * right.stride + n % 8 * 128 + k * 2);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < p.columns; ++n) d[m][n] = 0.0f;
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < p.columns; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int l = 0; l < 32; ++l) {
    std::vector<float>& values = issued.sums[32 * warp + l]->values;
    for (int i = 0; i < p.columns / 2; ++i) {
      const float product = d[l / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (l % 4) + i % 2];
      values[i] = p.accumulate ? values[i] + product : product;
    }
  }
  ++w.done[warp];
  while (!w.open.empty() && std::min({w.done[0], w.done[1], w.done[2], w.done[3]}) > w.first) {
    w.open.pop_front();
    ++w.first;
  }
}

struct Needed {
  const Warpgroup* warpgroup;
  uint64_t products;
};

}  // namespace

void wgmma_issue(const Product& p, float* d, const uint32_t* a_registers) {
  const Ignored ignored;
  Warpgroup& w = my_warpgroup();
  Lane& lane = my_lane();
  const unsigned t = self().linear % 128;
  if (!lane.fenced) fail("wgmma without a wgmma.fence since its registers were free to be used");
  const uint64_t number = lane.issued++;
  if (number - w.first >= w.open.size()) {
    w.open.push_back(std::make_unique<Issued>());
    w.open.back()->product = p;
  }
  Issued& issued = *w.open[number - w.first];
  const Product& q = issued.product;
  if (p.b != q.b || p.columns != q.columns || p.accumulate != q.accumulate || p.from_registers != q.from_registers ||
      p.left_transposed != q.left_transposed || (!p.from_registers && p.a != q.a)) {
    fail("wgmma: the lanes of a warpgroup issue different products");
  }
  Sums* sums = nullptr;
  for (Sums& s : lane.sums) {
    if (s.d == d) sums = &s;
  }
  if (sums == nullptr) {
    lane.sums.push_back({d, std::vector<float>(d, d + p.columns / 2), 0});
    sums = &lane.sums.back();
    for (int i = 0; i < p.columns / 2; ++i) d[i] = NAN;
  }
  sums->last = number;
  issued.sums[t] = sums;
  issued.a[t] = a_registers;
  if (++issued.lanes == 128) {
    ++w.posted;
    for (unsigned warp = 0; warp < 4; ++warp) {
      const Quarter quarter{self().linear / 128, warp};
      post(multiply, &quarter, sizeof quarter, 1 + 4 * quarter.warpgroup + warp);
    }
    wake_sleepers();
  }
  pause();
}

void wgmma_fence() { my_lane().fenced = true; }

void wgmma_commit() {
  const Ignored ignored;
  my_lane().groups.push_back(my_lane().issued);
}

void wgmma_wait(unsigned in_flight) {
  const Ignored ignored;
  Warpgroup& w = my_warpgroup();
  Lane& lane = my_lane();
  warp_meet(0xffffffffu, "wgmma.wait_group", nullptr, nullptr);
  lane.fenced = false;
  uint64_t products = 0;
  while (lane.groups.size() > in_flight) {
    products = lane.groups.front();
    lane.groups.pop_front();
  }
  const Needed needed{&w, products};
  sleep_until(
      [](const void* n) {
        const Needed& needed = *static_cast<const Needed*>(n);
        return needed.warpgroup->posted >= needed.products;
      },
      &needed, "the warpgroup's other lanes to issue wgmma", int64_t(products));
  while (w.done[self().warp % 4] < products) complete_one(1 + self().warp);
  for (auto s = lane.sums.begin(); s != lane.sums.end();) {
    if (s->last < products) {
      memcpy(s->d, s->values.data(), s->values.size() * sizeof(float));
      s = lane.sums.erase(s);
    } else {
      ++s;
    }
  }
  pause();
}

// ---- registers

namespace {

struct Wanted {
  unsigned warpgroup, count;
};

bool there_are_registers(const void* wanted) {
  const Wanted& w = *static_cast<const Wanted*>(wanted);
  const unsigned groups = block_size().x / 128;
  unsigned taken = 0;
  for (unsigned i = 0; i < groups; ++i) taken += 128 * (i == w.warpgroup ? w.count : block().warpgroup[i].registers);
  return taken <= 65536;
}

}  // namespace

void set_registers(unsigned count, bool increase) {
  const Ignored ignored;
  const Wanted wanted{self().linear / 128, count};
  Warpgroup& w = block().warpgroup[wanted.warpgroup];
  if (count % 8 || count < 24 || count > 256) fail("setmaxnreg: %u; a multiple of 8 from 24 to 256", count);
  if (increase ? w.registers > count : w.registers < count) {
    fail("setmaxnreg.%s to %u of a warpgroup that has %u", increase ? "inc" : "dec", count, w.registers);
  }
  if (increase) sleep_until(there_are_registers, &wanted, "registers:", count);
  if (++w.callers == 128) {
    w.callers = 0;
    w.registers = count;
    wake_sleepers();
  }
}

}  // namespace emu
