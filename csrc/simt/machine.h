// The state of a launch, shared by the scheduler (machine.cpp) and the memory checks (memory.cpp).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/order.h"
#include "simt/runtime.h"

namespace fastsam::simt {

// A thread of the launch, over all blocks, counted from 1; or nobody; or the host and all that ran before this launch.
using Who = uint32_t;
constexpr Who kNobody = 0, kBeforeLaunch = 0xffffffff;

// What runs where global objects have addresses only.
struct Excerpt {
  std::string kernel;
  std::vector<int64_t> blocks;  // below 0 from the end
};

class Machine {
 public:
  // Runs the blocks of these numbers.
  void run_blocks(std::vector<unsigned> numbers, const char* kernel, dim3 grid, dim3 block,
                  const std::function<void()>& thread);
  void sync_block(Site site);
  void sync_named(int id, int threads, Site site);
  void gather(const char* operation, uint32_t mask, void* payload, void (*combine)(Lanes&), Site site, bool one_place);
  [[noreturn]] void fail(Site site, const std::string& what, int thread);

  int running() const { return running_; }
  bool in_kernel() const { return in_kernel_; }
  int threads() const { return threads_; }
  Who first_of_block() const { return 1 + running_block_ * threads_; }
  std::string thread_name(Who who) const;

  Order order;
  int64_t seed = -1;
  std::optional<Excerpt> excerpt;

 private:
  struct Thread {
    Fiber fiber;
    bool finished = false;
    const char* waits_at = nullptr;  // barrier or warp operation
    Site site{};
  };
  struct Barrier {
    int threads = 0;
    std::vector<int> waiting;
  };
  struct Gathering {
    const char* operation;
    uint32_t arrived;
    Lanes lanes;
  };

  static void thread_main();
  void run_block();
  int next_ready();
  void finish();
  void wait(const char* what, Site site);
  void release(const std::vector<int>& threads);
  void arrive(Barrier& barrier, const char* name, int threads, Site site);
  void check_mask(const char* operation, uint32_t mask, Site site);
  Gathering& find_gathering(const char* operation, uint32_t mask, Site site);
  [[noreturn]] void fail_parted(const char* what, const char* operation, const std::string& other, Site there,
                                Site site);
  [[noreturn]] void fail_stuck();
  std::string where(const Thread& thread) const;
  std::string block_thread_name(int thread) const { return thread_name(first_of_block() + thread); }
  uint64_t random();

  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  dim3 grid_, block_;
  int threads_ = 0;
  std::vector<unsigned> blocks_;  // those that run, in their order
  unsigned running_block_ = 0;    // which of them
  int running_ = 0;
  bool in_kernel_ = false;
  int finished_ = 0;
  uint64_t random_state_ = 0;
  Fiber scheduler_;
  std::deque<Thread> thread_;  // stacks are kept from block to block and from launch to launch
  std::deque<int> ready_;
  Barrier barriers_[16];
  std::vector<std::deque<Gathering>> gatherings_;  // of each warp
  std::vector<uint32_t> present_;                  // lanes of each warp that have not returned
  std::optional<std::string> report_;
};

extern Machine machine;

// Memory of the launch: memory.cpp.
void start_launch_memory(const char* kernel, int64_t shared_bytes, int threads);
void start_block_memory();

}  // namespace fastsam::simt
