#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace fastsam::simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved; only the pages that are touched take memory
constexpr size_t kGuardBytes = 64 << 10;   // a whole number of pages on every system: an overflow faults at once

// Stacks start at different places of their pages: all at the same one would share a few lines of the cache.
constexpr size_t kShifts = 61, kShift = 320;

void* new_stack() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return memory;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStackBytes);
}

#ifdef FASTSAM_SIMT_UCONTEXT

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) stack_ = new_stack();
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

#else

// Saves the registers a called function must preserve on the present stack, and takes up another stack the same way.
// ucontext does as much and two system calls, which makes kernels with many barriers several times slower.
extern "C" void fastsam_simt_switch(void** save_stack_pointer, void* stack_pointer);

#if defined(__x86_64__)
constexpr int kReturnWord = 6, kFrameWords = 8;
asm(R"(
  .pushsection .text
  .globl fastsam_simt_switch
  .hidden fastsam_simt_switch
  .type fastsam_simt_switch, @function
fastsam_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size fastsam_simt_switch, . - fastsam_simt_switch
  .popsection
)");
#else
constexpr int kReturnWord = 11, kFrameWords = 20;
asm(R"(
  .pushsection .text
  .globl fastsam_simt_switch
  .hidden fastsam_simt_switch
  .type fastsam_simt_switch, %function
fastsam_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size fastsam_simt_switch, . - fastsam_simt_switch
  .popsection
)");
#endif

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    static size_t stacks = 0;
    stack_ = new_stack();
    shift_ = stacks++ % kShifts * kShift;
  }
  // The frame that the first switch takes up: zeros for the registers, and entry as the place to go on.
  uintptr_t* frame = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + kStackBytes - shift_) - kFrameWords;
  for (int word = 0; word < kFrameWords; ++word) frame[word] = 0;
  frame[kReturnWord] = reinterpret_cast<uintptr_t>(entry);
  stack_pointer_ = frame;
}

void Fiber::switch_to(Fiber& from, Fiber& to) { fastsam_simt_switch(&from.stack_pointer_, to.stack_pointer_); }

#endif

}  // namespace fastsam::simt
