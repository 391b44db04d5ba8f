// What the host's CUDA vocabulary asks of the machine that runs the threads of a kernel. Everything here is about the
// thread that runs at the moment; a fault ends the launch and never returns.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "simt/vector_types.h"

namespace fastsam::simt {

constexpr int kWarpSize = 32;
constexpr uint32_t kWholeWarp = 0xffffffff;
constexpr int kMostAccessBytes = 64;  // of one read or write

// A place in a kernel's source. As a parameter with the default FASTSAM_HERE it is the place of the call.
struct Site {
  const char* file;
  int line;
};
inline bool is_same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }
#define FASTSAM_HERE {__builtin_FILE(), __builtin_LINE()}

// What a kernel did wrong: kernel, block, thread, memory object and index, what happened, source file and line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch with a report about the running thread, or about thread `thread` of its block.
[[noreturn]] void fail(Site site, const std::string& what);
[[noreturn]] void fail(Site site, const std::string& what, int thread);

// Runs the kernel once for each thread of each block; throws Fault.
void run_grid(const char* kernel, dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& thread);

// Names are string literals, here and below.

// Waits until all threads of the block are here. Orders memory.
void sync_block(Site site);

// Waits until `threads` threads of the block are at barrier `id`, 1 to 15. Orders memory among them.
void sync_named(int id, int threads, Site site);

// Waits until the lanes of `mask` are here. Orders memory among them.
void sync_warp(uint32_t mask, Site site);

// The payloads of the lanes that came together; nullptr where a lane is not in the mask.
struct Lanes {
  uint32_t mask;
  void* payload[kWarpSize];
  Site site[kWarpSize];
  int first_thread;  // thread index of lane 0 in its block
};

// Waits until the lanes of `mask` have called this for the same operation, and lets one of them run `combine`, which
// reads and writes everybody's payload. Does not order memory. one_place: the lanes must be at the same place of the
// source, as PTX wants of the instructions that it calls aligned.
void gather(const char* operation, uint32_t mask, void* payload, void (*combine)(Lanes&), Site site,
            bool one_place = false);

struct MemoryObject;

// The elements [offset, offset + bytes) of an object, as a thread touches them.
struct Span {
  MemoryObject* object;
  int64_t offset;
  int bytes;
  int element_bytes;
  int alignment;
};

// Check and account for an access of the running thread; the address on the host.
const void* reading(const Span& span, Site site);
void* writing(const Span& span, Site site);

// Ends the launch if `span` could not be copied to or from: null, out of bounds, misaligned.
void check_address(const Span& span, const char* action, Site site);

// cp.async: the copy of the running thread into `to` lands when a wait for its group returns. `source` holds the bytes.
void begin_async_copy(const Span& to, const void* source, int source_bytes, Site site);
void commit_async_copies();
void wait_async_copies(int groups_left);

enum class Content { kDefined, kUndefined };

// Global memory the kernels may touch, until the end of run(). Undefined content must be written before it is read.
// After simt_addresses_only() there is no memory at `address`.
MemoryObject* global_object(const void* address, int64_t bytes, const char* name, int element_bytes, Content content);

// Bytes [start, start + bytes) of the block's dynamic shared memory, undefined until written.
MemoryObject* dynamic_shared_object(int64_t start, int64_t bytes, const char* name, int element_bytes, Site site);

// The static shared memory declared at `site`, the same for all threads of a block.
MemoryObject* static_shared_object(int64_t bytes, const char* name, int element_bytes, Site site);

// Forgets all global objects, and keeps a copy of the error, or nullptr, for the caller.
const char* end_run(const char* error);

}  // namespace fastsam::simt

// The order in which threads and blocks take their turns from now on: always the same (seed < 0), or drawn from a seed.
extern "C" void simt_schedule(int64_t seed);

// From now on global objects have addresses only: reads give 0, writes go nowhere, bounds and alignment are checked. Of
// all launches those of `kernel` run, of these only the blocks with the given numbers; numbers below 0 count from the
// end of the grid. Without a name everything is as usual again.
extern "C" void simt_addresses_only(const char* kernel, const int64_t* blocks, int64_t count);

// A line for each object with addresses only of the last run(): how many elements it has, the last of them that was
// read, the last that was written (-1: none), and its name. The text lasts until the next run().
extern "C" const char* simt_touched();
