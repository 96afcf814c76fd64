// operator new for the builds with ThreadSanitizer: the core's lists are not the kernel's memory, and the sanitizer's
// own operators would take them for it. Blocks of powers of two, kept for the next of their size.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace {

struct Block {
  Block* next;
};
Block* spare[48];
unsigned char *at, *end;

}  // namespace

void* operator new(size_t bytes) {
  int size = 5;
  while ((size_t{1} << size) < bytes + 16) ++size;
  if (Block* block = spare[size]) {
    spare[size] = block->next;
    return block;
  }
  if (end - at < ptrdiff_t(size_t{1} << size)) {
    const size_t room = (size_t{1} << size) + (size_t{1} << 24);
    at = static_cast<unsigned char*>(
        mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    end = at + room;
  }
  auto header = reinterpret_cast<uint64_t*>(at);
  at += size_t{1} << size;
  *header = size;
  return header + 2;
}

void operator delete(void* pointer) noexcept {
  if (pointer == nullptr) return;
  auto block = static_cast<Block*>(pointer);
  const uint64_t size = static_cast<uint64_t*>(pointer)[-2];
  block->next = spare[size];
  spare[size] = block;
}

void operator delete(void* pointer, size_t) noexcept { operator delete(pointer); }
