// Ids in memory that grows without being initialised: pages that are never written cost nothing.
//
// Large buffers are mappings of their own, in large pages where the kernel gives them, that grow without being copied.
// The last two of up to 64 MiB are kept when they are given back, as filling the pages of a new one takes up to a fifth
// of the time of encoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastgpt::bpe {

class IdBuffer {
 public:
  IdBuffer() = default;
  IdBuffer(const IdBuffer&) = delete;
  IdBuffer& operator=(const IdBuffer&) = delete;
  IdBuffer(IdBuffer&& other) noexcept { swap(other); }
  IdBuffer& operator=(IdBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~IdBuffer();

  uint32_t* data() { return data_; }
  const uint32_t* data() const { return data_; }
  size_t size() const { return size_; }
  void set_size(size_t size) { size_ = size; }
  void clear() { size_ = 0; }
  void reserve_more(size_t more) {  // room for that many ids after size(); throws std::bad_alloc
    if (__builtin_expect(more > capacity_ - size_, 0)) grow(more);
  }
  void push_back(uint32_t id) {
    reserve_more(1);
    data_[size_++] = id;
  }
  void shrink();  // gives unused memory back

 private:
  void grow(size_t more);
  void swap(IdBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
  }
  uint32_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
  size_t mapped_bytes_ = 0;  // of a mapping that begins at data_; 0: the memory is malloc's
};

}  // namespace fastgpt::bpe
