// Switching between the stacks of fibers: ten instructions on x86-64, ucontext elsewhere; and telling the sanitizers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sanitizers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;
  size_t bytes = 0;
  void* fiber = nullptr;  // ThreadSanitizer's
};

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* load);
asm(R"(
  .text
  .globl emu_switch
  .hidden emu_switch
  .type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

// A context that will call `entry`, which must not return, on a stack of its own.
inline void make_context(Context& c, void* stack, size_t bytes, void (*entry)()) {
  c.stack = stack;
  c.bytes = bytes;
  renew_fiber(c.fiber, stack, bytes);
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // where the return address of `entry` would be: keeps the stack's alignment of a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
#else
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
#endif
}

inline void switch_context(Context& from, Context& to, bool for_good) {
  void* fake = leaving_context(to.stack, to.bytes, to.fiber, for_good);
#if defined(__x86_64__)
  emu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_in_context(fake);
}

inline void entered_context(Context& main) { remember_main(main.stack, main.bytes); }

}  // namespace emu
