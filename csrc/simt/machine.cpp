// Runs the threads of a kernel, one at a time: blocks, turns, barriers and operations of a warp.
#include "simt/machine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "simt/cuda_names.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastsam::simt {
namespace {

constexpr int kMostThreads = 1024;
constexpr char kSyncBlock[] = "__syncthreads";

uint3 unflatten(unsigned index, const dim3& size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string hexadecimal(uint32_t value) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", value);
  return digits;
}

}  // namespace

Machine machine;

void Machine::run_blocks(std::vector<unsigned> numbers, const char* kernel, dim3 grid, dim3 block,
                         const std::function<void()>& thread) {
  kernel_ = kernel;
  grid_ = gridDim = grid;
  block_ = blockDim = block;
  body_ = &thread;
  threads_ = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(thread_.size()) < threads_) thread_.emplace_back();
  random_state_ = static_cast<uint64_t>(seed) * 2 + 1;
  blocks_ = std::move(numbers);
  if (seed >= 0) {
    for (size_t left = blocks_.size(); left > 1; --left) std::swap(blocks_[left - 1], blocks_[random() % left]);
  }
  for (running_block_ = 0; running_block_ < blocks_.size(); ++running_block_) run_block();
}

void Machine::run_block() {
  blockIdx = unflatten(blocks_[running_block_], grid_);
  finished_ = 0;
  ready_.clear();
  gatherings_.assign((threads_ + kWarpSize - 1) / kWarpSize, {});
  for (Barrier& barrier : barriers_) barrier.waiting.clear();
  order.reset(threads_);
  start_block_memory();
  present_.assign(gatherings_.size(), 0);
  for (int thread = 0; thread < threads_; ++thread) {
    thread_[thread].finished = false;
    present_[thread / kWarpSize] |= 1u << thread % kWarpSize;
    thread_[thread].fiber.start(thread_main);
    ready_.push_back(thread);
  }
  while (!ready_.empty()) {
    running_ = next_ready();
    threadIdx = unflatten(running_, block_);
    in_kernel_ = true;
    Fiber::switch_to(scheduler_, thread_[running_].fiber);
    in_kernel_ = false;
    if (report_) throw Fault(*std::exchange(report_, std::nullopt));
  }
  if (finished_ < threads_) fail_stuck();
}

int Machine::next_ready() {
  if (seed >= 0) std::swap(ready_.front(), ready_[random() % ready_.size()]);
  const int thread = ready_.front();
  ready_.pop_front();
  return thread;
}

uint64_t Machine::random() {  // splitmix64
  uint64_t bits = random_state_ += 0x9e3779b97f4a7c15;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  return bits ^ bits >> 31;
}

void Machine::thread_main() {
  (*machine.body_)();
  machine.finish();
}

// A thread that returns must not be awaited by others.
void Machine::finish() {
  thread_[running_].finished = true;
  present_[running_ / kWarpSize] &= ~(1u << running_ % kWarpSize);
  ++finished_;
  if (!barriers_[0].waiting.empty()) {
    const int waiting = barriers_[0].waiting.front();
    fail(thread_[waiting].site,
         std::string("waits at ") + kSyncBlock + ", but thread " + block_thread_name(running_) + " has returned",
         waiting);
  }
  for (const Gathering& gathering : gatherings_[running_ / kWarpSize]) {
    if ((gathering.lanes.mask >> running_ % kWarpSize & 1) == 0) continue;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (gathering.lanes.payload[lane] == nullptr) continue;
      fail(gathering.lanes.site[lane],
           std::string(gathering.operation) + " names lane " + std::to_string(running_ % kWarpSize) +
               ", which has returned",
           gathering.lanes.first_thread + lane);
    }
  }
  Fiber::switch_to(thread_[running_].fiber, scheduler_);
}

void Machine::wait(const char* what, Site site) {
  Thread& thread = thread_[running_];
  thread.waits_at = what;
  thread.site = site;
  Fiber::switch_to(thread.fiber, scheduler_);
  thread.waits_at = nullptr;
}

void Machine::release(const std::vector<int>& threads) {
  for (int thread : threads) {
    if (thread != running_) ready_.push_back(thread);
  }
}

void Machine::arrive(Barrier& barrier, const char* name, int threads, Site site) {
  barrier.threads = threads;
  barrier.waiting.push_back(running_);
  if (static_cast<int>(barrier.waiting.size()) < threads) return wait(name, site);
  if (threads == threads_) {
    order.join_all();
  } else {
    order.join(barrier.waiting);
  }
  release(barrier.waiting);
  barrier.waiting.clear();
}

void Machine::fail_parted(const char* what, const char* operation, const std::string& other, Site there, Site site) {
  fail(site,
       std::string("divergent ") + what + ": is at this " + operation + ", but " + other + " waits at the one of " +
           text(there),
       running_);
}

void Machine::sync_block(Site site) {
  if (finished_ > 0) {
    const auto finished = std::find_if(thread_.begin(), thread_.end(), [](const Thread& t) { return t.finished; });
    const std::string name = block_thread_name(static_cast<int>(finished - thread_.begin()));
    fail(site, std::string("waits at ") + kSyncBlock + ", but thread " + name + " has returned", running_);
  }
  Barrier& barrier = barriers_[0];
  if (!barrier.waiting.empty()) {
    const int other = barrier.waiting.front();
    const Site there = thread_[other].site;
    if (!is_same(there, site)) fail_parted("barrier", kSyncBlock, "thread " + block_thread_name(other), there, site);
  }
  arrive(barrier, kSyncBlock, threads_, site);
}

void Machine::sync_named(int id, int threads, Site site) {
  if (id < 1 || id > 15) {
    fail(site, "named barrier " + std::to_string(id) + ": 1 to 15 are free, 0 is that of __syncthreads", running_);
  }
  if (threads < kWarpSize || threads % kWarpSize != 0 || threads > threads_) {
    fail(site,
         "named barrier " + std::to_string(id) + " for " + std::to_string(threads) +
             " threads: must be a multiple of 32, at most the block's " + std::to_string(threads_),
         running_);
  }
  Barrier& barrier = barriers_[id];
  if (!barrier.waiting.empty() && barrier.threads != threads) {
    fail(site,
         "named barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads, but thread " +
             block_thread_name(barrier.waiting.front()) + " waits there for " + std::to_string(barrier.threads),
         running_);
  }
  arrive(barrier, "a named barrier", threads, site);
}

void Machine::check_mask(const char* operation, uint32_t mask, Site site) {
  const int lane = running_ % kWarpSize, first = running_ - lane;
  if ((mask >> lane & 1) == 0) {
    fail(site, std::string(operation) + " with mask " + hexadecimal(mask) + ", which lacks the calling lane", running_);
  }
  const uint32_t missing = mask & ~present_[running_ / kWarpSize];
  if (missing == 0) return;
  const int other = __builtin_ctz(missing);
  const bool exists = first + other < threads_;
  fail(site,
       std::string(operation) + " names lane " + std::to_string(other) +
           (exists ? ", which has returned" : ", which this block does not have"),
       running_);
}

// The open gathering that awaits the running lane, or a new one. It must be for the same operation and lanes.
Machine::Gathering& Machine::find_gathering(const char* operation, uint32_t mask, Site site) {
  const int lane = running_ % kWarpSize;
  std::deque<Gathering>& open = gatherings_[running_ / kWarpSize];
  for (Gathering& gathering : open) {
    if ((gathering.lanes.mask >> lane & 1) == 0) continue;
    if (gathering.lanes.mask == mask && std::strcmp(gathering.operation, operation) == 0) return gathering;
    fail(site,
         std::string("is at ") + operation + " with mask " + hexadecimal(mask) +
             ", but lanes of its warp wait for it at " + gathering.operation + " with mask " +
             hexadecimal(gathering.lanes.mask),
         running_);
  }
  Gathering& gathering = open.emplace_back();
  gathering.operation = operation;
  gathering.lanes.mask = mask;
  gathering.lanes.first_thread = running_ - lane;
  return gathering;
}

void Machine::gather(const char* operation, uint32_t mask, void* payload, void (*combine)(Lanes&), Site site,
                     bool one_place) {
  check_mask(operation, mask, site);
  Gathering& gathering = find_gathering(operation, mask, site);
  if (one_place && gathering.arrived != 0) {
    const int other = __builtin_ctz(gathering.arrived);
    const Site there = gathering.lanes.site[other];
    if (!is_same(there, site)) fail_parted("warp", operation, "lane " + std::to_string(other), there, site);
  }
  const int lane = running_ % kWarpSize;
  gathering.arrived |= 1u << lane;
  gathering.lanes.payload[lane] = payload;
  gathering.lanes.site[lane] = site;
  if (gathering.arrived != mask) return wait(operation, site);
  combine(gathering.lanes);
  std::vector<int> members;
  for (int other = 0; other < kWarpSize; ++other) {
    if (mask >> other & 1) members.push_back(gathering.lanes.first_thread + other);
  }
  std::deque<Gathering>& open = gatherings_[running_ / kWarpSize];
  open.erase(std::find_if(open.begin(), open.end(), [&](const Gathering& one) { return &one == &gathering; }));
  release(members);
}

std::string Machine::thread_name(Who who) const {
  const unsigned block = (who - 1) / threads_, thread = (who - 1) % threads_;
  const std::string name = text(unflatten(thread, block_));
  return block == running_block_ ? name : name + " of block " + text(unflatten(blocks_[block], grid_));
}

std::string Machine::where(const Thread& thread) const {
  return std::string(thread.waits_at) + " (" + text(thread.site) + ")";
}

// All threads that are left wait for others. Names one thread for each place.
void Machine::fail_stuck() {
  std::string places;
  int first = -1;
  std::vector<std::string> seen;
  for (int index = 0; index < threads_; ++index) {
    if (thread_[index].finished) continue;
    if (first < 0) first = index;
    const std::string place = where(thread_[index]);
    if (std::find(seen.begin(), seen.end(), place) != seen.end()) continue;
    seen.push_back(place);
    places += std::string(places.empty() ? "" : ", ") + "thread " + block_thread_name(index) + " at " + place;
  }
  const std::string returned = finished_ == 0 ? "" : "; " + std::to_string(finished_) + " threads have returned";
  fail(thread_[first].site, "divergent barriers, all wait for ever: " + places + returned, first);
}

void Machine::fail(Site site, const std::string& what, int thread) {
  std::string report = std::string(kernel_) + ": " + what + "\n  in block " + text(blockIdx) + ", thread " +
                       text(unflatten(thread, block_)) + "\n  at " + text(site);
  if (!in_kernel_) throw Fault(report);
  report_ = std::move(report);
  // The stack of the thread is left as it is: nothing on it owns anything but memory.
  Fiber::switch_to(thread_[running_].fiber, scheduler_);
  std::abort();
}

namespace {

// The numbers of the blocks that are to run, of `all` in the grid.
std::vector<unsigned> blocks_to_run(const char* kernel, uint64_t all) {
  std::vector<unsigned> numbers;
  if (!machine.excerpt) {
    numbers.resize(all);
    std::iota(numbers.begin(), numbers.end(), 0u);
  } else if (machine.excerpt->kernel == kernel) {
    for (const int64_t block : machine.excerpt->blocks) {
      const int64_t number = block < 0 ? block + static_cast<int64_t>(all) : block;
      if (number < 0 || number >= static_cast<int64_t>(all)) {
        throw Fault(std::string(kernel) + ": block " + std::to_string(block) + " of a grid of " + std::to_string(all));
      }
      numbers.push_back(static_cast<unsigned>(number));
    }
  }
  return numbers;
}

}  // namespace

void run_grid(const char* kernel, dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& thread) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads) {
    throw Fault(std::string(kernel) + ": a block of " + std::to_string(threads) + " threads, must have 1 to 1024");
  }
  if (blocks == 0 || (!machine.excerpt && blocks * threads >= kBeforeLaunch)) {
    throw Fault(std::string(kernel) + ": a grid of " + std::to_string(blocks) + " blocks of " +
                std::to_string(threads) + " threads, must have at least one block and less than 2^32 threads");
  }
  start_launch_memory(kernel, shared_bytes, static_cast<int>(threads));
  machine.run_blocks(blocks_to_run(kernel, blocks), kernel, grid, block, thread);
}

void fail(Site site, const std::string& what) { machine.fail(site, what, machine.running()); }
void fail(Site site, const std::string& what, int thread) { machine.fail(site, what, thread); }
void sync_block(Site site) { machine.sync_block(site); }
void sync_named(int id, int threads, Site site) { machine.sync_named(id, threads, site); }

void gather(const char* operation, uint32_t mask, void* payload, void (*combine)(Lanes&), Site site, bool one_place) {
  machine.gather(operation, mask, payload, combine, site, one_place);
}

void sync_warp(uint32_t mask, Site site) {
  int lane_is_here = 0;
  const auto combine = [](Lanes& lanes) {
    std::vector<int> threads;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes.payload[lane] != nullptr) threads.push_back(lanes.first_thread + lane);
    }
    machine.order.join(threads);
  };
  gather("__syncwarp", mask, &lane_is_here, combine, site);
}

}  // namespace fastsam::simt

void simt_schedule(int64_t seed) { fastsam::simt::machine.seed = seed; }

void simt_addresses_only(const char* kernel, const int64_t* blocks, int64_t count) {
  std::optional<fastsam::simt::Excerpt>& excerpt = fastsam::simt::machine.excerpt;
  excerpt.reset();
  if (kernel != nullptr) excerpt = {kernel, {blocks, blocks + count}};
}
