// Zeroed memory straight from the kernel, in large pages where it gives them: tables that are probed at random.
//
// A page is only taken when it is first touched, so a table costs nothing until it is used.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace fastgpt::bpe {

inline constexpr uintptr_t kLargePage = uintptr_t{2} << 20;

// Asks for large pages for what of a block can have them: a wish; without it everything works the same. Filling 20 MB
// of small pages takes as long as encoding 4 MB of text.
inline void wish_large_pages(void* begin, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(kLargePage - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

template <class T>
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t size) : size_(size) {
    // Room to begin at a large page.
    mapped_bytes_ = size * sizeof(T) + kLargePage;
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(mapped_) + kLargePage - 1) & ~(kLargePage - 1);
    data_ = reinterpret_cast<T*>(begin);
    // A small table is not worth a large page.
    if (size * sizeof(T) >= kLargePage / 4) {
      wish_large_pages(data_, (size * sizeof(T) + kLargePage - 1) & ~(kLargePage - 1));
    }
  }
  ~Pages() {
    if (mapped_) munmap(mapped_, mapped_bytes_);
  }
  Pages(const Pages&) = delete;
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }

  T& operator[](size_t at) { return data_[at]; }
  const T& operator[](size_t at) const { return data_[at]; }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  void zero() {
    for (size_t i = 0; i < size_; ++i) data_[i] = T{};
  }

 private:
  void swap(Pages& other) {
    std::swap(size_, other.size_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
  }
  size_t size_ = 0, mapped_bytes_ = 0;
  void* mapped_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace fastgpt::bpe
