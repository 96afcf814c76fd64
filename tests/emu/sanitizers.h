// What AddressSanitizer and ThreadSanitizer have to be told about fibers; empty in a plain build.
//
// ThreadSanitizer takes each fiber for a thread that no switch orders, and the core tells it which meetings do: so it
// finds the races of the kernel under any schedule, even where the values happen to be right.
#pragma once

#include <cstddef>

#if defined(EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#elif defined(EMU_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}
#endif

namespace emu {

#if defined(EMU_TSAN) || defined(EMU_ASAN)
constexpr bool kCatchSignals = false;  // the sanitizer's report is better
#else
constexpr bool kCatchSignals = true;
#endif

#if defined(EMU_TSAN)
inline void renew_fiber(void*& fiber, void*, size_t) {
  if (fiber) __tsan_destroy_fiber(fiber);
  fiber = __tsan_create_fiber(0);
}
inline void* main_fiber() {
  static void* fiber = __tsan_get_current_fiber();
  return fiber;
}
inline void* leaving_context(void*, size_t, void* fiber, bool) {
  void* main = main_fiber();
  __tsan_switch_to_fiber(fiber ? fiber : main, 1);  // 1: no happens-before edge
  return nullptr;
}
inline void arrived_in_context(void*) {}
inline void remember_main(void*&, size_t&) {}
inline void acquire(const void* object) { __tsan_acquire(const_cast<void*>(object)); }
inline void release(const void* object) { __tsan_release(const_cast<void*>(object)); }
// One lane acts for the others: what it reads and writes of theirs is not the kernel's.
inline void ignore_begin() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
inline void ignore_end() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
inline void wrote(void* pointer, size_t bytes) { __tsan_write_range(pointer, bytes); }
inline void was_read(const void* pointer, size_t bytes) { __tsan_read_range(const_cast<void*>(pointer), bytes); }
#elif defined(EMU_ASAN)
inline void renew_fiber(void*&, void* stack, size_t bytes) { __asan_unpoison_memory_region(stack, bytes); }
inline void* leaving_context(void* stack, size_t bytes, void*, bool for_good) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, stack, bytes);
  return fake;
}
inline void arrived_in_context(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
// The first fiber is entered from the main stack, and learns where that lies.
inline void remember_main(void*& stack, size_t& bytes) {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (stack == nullptr) stack = const_cast<void*>(bottom), bytes = size;
}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void ignore_begin() {}
inline void ignore_end() {}
inline void wrote(void*, size_t) {}
inline void was_read(const void*, size_t) {}
#else
inline void renew_fiber(void*&, void*, size_t) {}
inline void* leaving_context(void*, size_t, void*, bool) { return nullptr; }
inline void arrived_in_context(void*) {}
inline void remember_main(void*&, size_t&) {}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void ignore_begin() {}
inline void ignore_end() {}
inline void wrote(void*, size_t) {}
inline void was_read(const void*, size_t) {}
#endif

struct Ignored {
  Ignored() { ignore_begin(); }
  ~Ignored() { ignore_end(); }
};

}  // namespace emu
