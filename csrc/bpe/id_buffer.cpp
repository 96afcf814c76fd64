#include "bpe/id_buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "bpe/pages.h"

namespace fastgpt::bpe {
namespace {

#ifdef __linux__

constexpr size_t kLeastMapped = size_t{1} << 20;  // bytes; less is malloc's
constexpr size_t kMostKept = size_t{64} << 20;

struct Mapping {
  void* data = nullptr;
  size_t bytes = 0;
};

// What is kept. Nobody waits for the lock: who does not get it does without, so a fork leaves nothing locked for good.
Mapping kept[2];
std::atomic_flag kept_busy;

// Of two, the larger one that is kept stays.
void give_back(Mapping mapping) {
  if (mapping.bytes <= kMostKept && !kept_busy.test_and_set(std::memory_order_acquire)) {
    Mapping& smaller = kept[0].bytes < kept[1].bytes ? kept[0] : kept[1];
    if (smaller.bytes < mapping.bytes) std::swap(smaller, mapping);
    kept_busy.clear(std::memory_order_release);
  }
  if (mapping.data) munmap(mapping.data, mapping.bytes);
}

Mapping take(size_t bytes) {
  Mapping mapping;
  if (!kept_busy.test_and_set(std::memory_order_acquire)) {
    // The smallest that is large enough, else the larger one.
    Mapping& small = kept[0].bytes < kept[1].bytes ? kept[0] : kept[1];
    Mapping& large = &small == &kept[0] ? kept[1] : kept[0];
    std::swap(mapping, small.bytes >= bytes ? small : large);
    kept_busy.clear(std::memory_order_release);
  }
  return mapping;
}

// A new mapping that begins at a large page.
Mapping map_new(size_t bytes) {
  void* const all =
      mmap(nullptr, bytes + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t address = reinterpret_cast<uintptr_t>(all);
  const uintptr_t begin = (address + kLargePage - 1) & ~(kLargePage - 1);
  if (begin > address) munmap(all, begin - address);
  const uintptr_t end = address + bytes + kLargePage;
  if (end > begin + bytes) munmap(reinterpret_cast<void*>(begin + bytes), end - begin - bytes);
  return {reinterpret_cast<void*>(begin), bytes};
}

size_t whole_pages(size_t bytes) { return (bytes + 4095) & ~size_t{4095}; }

#endif

}  // namespace

IdBuffer::~IdBuffer() {
#ifdef __linux__
  if (mapped_bytes_) {
    give_back({data_, mapped_bytes_});
    return;
  }
#endif
  std::free(data_);
}

void IdBuffer::grow(size_t more) {
  const size_t wanted = std::max(size_ + more, capacity_ + capacity_ / 2);
  if (wanted < more || wanted > std::numeric_limits<size_t>::max() / (2 * sizeof(uint32_t))) throw std::bad_alloc();
  const size_t bytes = wanted * sizeof(uint32_t);
#ifdef __linux__
  if (bytes >= kLeastMapped) {
    const size_t rounded = (bytes + kLargePage - 1) & ~(kLargePage - 1);
    Mapping mapping = mapped_bytes_ ? Mapping{data_, mapped_bytes_} : take(rounded);
    if (!mapping.data) {
      mapping = map_new(rounded);
    } else if (mapping.bytes < rounded) {
      void* const moved = mremap(mapping.data, mapping.bytes, rounded, MREMAP_MAYMOVE);
      if (moved == MAP_FAILED) {
        if (!mapped_bytes_) munmap(mapping.data, mapping.bytes);
        throw std::bad_alloc();
      }
      mapping = {moved, rounded};
    }
    wish_large_pages(mapping.data, mapping.bytes);
    if (!mapped_bytes_ && data_) {
      std::memcpy(mapping.data, data_, size_ * sizeof(uint32_t));
      std::free(data_);
    }
    data_ = static_cast<uint32_t*>(mapping.data);
    mapped_bytes_ = mapping.bytes;
    capacity_ = mapped_bytes_ / sizeof(uint32_t);
    return;
  }
#endif
  void* const memory = std::realloc(data_, bytes);
  if (!memory) throw std::bad_alloc();
  data_ = static_cast<uint32_t*>(memory);
  capacity_ = wanted;
}

void IdBuffer::shrink() {
  if (size_ == capacity_ || !data_) return;
#ifdef __linux__
  if (mapped_bytes_) {
    const size_t bytes = whole_pages(std::max<size_t>(size_, 1) * sizeof(uint32_t));
    if (bytes < mapped_bytes_ && !munmap(reinterpret_cast<char*>(data_) + bytes, mapped_bytes_ - bytes)) {
      mapped_bytes_ = bytes;
      capacity_ = bytes / sizeof(uint32_t);
    }
    return;
  }
#endif
  void* const memory = std::realloc(data_, std::max<size_t>(size_, 1) * sizeof(uint32_t));
  if (!memory) return;  // the larger block stays
  data_ = static_cast<uint32_t*>(memory);
  capacity_ = std::max<size_t>(size_, 1);
}

}  // namespace fastgpt::bpe
