// Threads of a block as fibers: stacks of their own that hand the processor to one another when they have to wait.
#pragma once

#if !defined(FASTSAM_SIMT_UCONTEXT) && !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#define FASTSAM_SIMT_UCONTEXT
#endif

#ifdef FASTSAM_SIMT_UCONTEXT
#include <ucontext.h>
#else
#include <cstddef>
#endif

namespace fastsam::simt {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to this fiber call entry() on an empty stack. entry must never return.
  void start(void (*entry)());

  // Goes on in `to`; comes back when some fiber switches to `from`.
  static void switch_to(Fiber& from, Fiber& to);

 private:
  void* stack_ = nullptr;
#ifdef FASTSAM_SIMT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
  size_t shift_ = 0;
#endif
};

}  // namespace fastsam::simt
