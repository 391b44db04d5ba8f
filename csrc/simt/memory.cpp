// Checks every access of a kernel: bounds, alignment, content that nobody wrote, and races. A cell of shadow memory
// remembers the last write of its bytes and two reads since.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "simt/machine.h"

namespace fastsam::simt {

struct Stamp {
  Who who = kNobody;
  uint32_t count = 0;  // of that thread's synchronisations
  uint32_t place = 0;  // in the source
};

struct Cell {
  Stamp write;
  Stamp reads[2];
  bool in_flight = false;  // a cp.async has begun to write it, and nobody has waited for it
};

struct MemoryObject {
  const char* name;
  char* base;
  int64_t bytes;
  int element_bytes;
  int cell_bytes;
  Cell* cells;              // nullptr: it has addresses only
  int64_t last_read = -1;   // byte of an object with addresses only
  int64_t last_write = -1;  // likewise
};

namespace {

constexpr int kSharedCellBytes = 2, kMostStaticShared = 48 << 10, kMostDynamicShared = 227 << 10;

// The block's shared memory of one kind, and the objects laid out in it.
struct Arena {
  struct alignas(128) Line {
    char bytes[128];
  };
  std::vector<Line> memory;
  std::vector<Cell> cells;
  int64_t bytes = 0;
  struct Entry {
    int64_t start;
    Site site;
    MemoryObject object;
  };
  std::deque<Entry> objects;

  void start_launch(int64_t capacity, int64_t used) {
    forget_content();
    memory.resize(capacity / sizeof(Line) + 1);
    cells.resize(capacity / kSharedCellBytes + 1);
    objects.clear();
    bytes = used;
  }

  void forget_content() { std::fill(cells.begin(), cells.begin() + (bytes + 1) / kSharedCellBytes, Cell{}); }

  MemoryObject* add(int64_t start, int64_t size, const char* name, int element_bytes, Site site) {
    char* base = reinterpret_cast<char*>(memory.data()) + start;
    Cell* first = cells.data() + start / kSharedCellBytes;
    objects.push_back({start, site, {name, base, size, element_bytes, kSharedCellBytes, first}});
    return &objects.back().object;
  }
};

struct GlobalObject {
  MemoryObject object;
  std::vector<Cell> cells;
};

struct AsyncCopy {
  Span to;
  const void* source;
  int source_bytes;
  int group;
  Site site;
};

struct AsyncCopies {
  int groups = 0;  // committed so far
  std::vector<AsyncCopy> pending;
};

// Numbers for places in the source: a small hash table, which no kernel fills.
class Places {
 public:
  uint32_t number(Site site) {
    size_t slot = (reinterpret_cast<uintptr_t>(site.file) / 8 + 31 * static_cast<size_t>(site.line)) % kSlots;
    while (sites_[slot].file != nullptr && (sites_[slot].file != site.file || sites_[slot].line != site.line)) {
      slot = (slot + 1) % kSlots;
    }
    sites_[slot] = site;
    return static_cast<uint32_t>(slot);
  }

  std::string name(uint32_t number) const {
    return std::string(sites_[number].file) + ":" + std::to_string(sites_[number].line);
  }

 private:
  static constexpr size_t kSlots = 1 << 16;
  std::vector<Site> sites_ = std::vector<Site>(kSlots);
};

Arena dynamic_shared, static_shared;
std::deque<GlobalObject> global_objects;
std::vector<AsyncCopies> async_copies;  // of each thread
Places places;

// What reads and writes of objects with addresses only go to.
alignas(16) const char kZeros[kMostAccessBytes] = {};
alignas(16) char nowhere[kMostAccessBytes];
std::string touched;  // by the last run()

Stamp stamp(Site site) {
  return {machine.first_of_block() + machine.running(), machine.order.now(machine.running()), places.number(site)};
}

// Whether what `earlier` did is ordered before what the running thread does now.
bool ordered(const Stamp& earlier) {
  if (earlier.who == kNobody || earlier.who == kBeforeLaunch) return true;
  const uint32_t thread = earlier.who - machine.first_of_block();
  return thread < static_cast<uint32_t>(machine.threads()) &&
         machine.order.before(static_cast<int>(thread), earlier.count, machine.running());
}

std::string actor(const Stamp& stamp) {
  return "thread " + machine.thread_name(stamp.who) + " at " + places.name(stamp.place);
}

std::string element(const Span& span) {
  const MemoryObject& object = *span.object;
  // Rounded down, so that what lies just before the object has a negative index.
  const int64_t index = span.offset >= 0 ? span.offset / object.element_bytes
                                         : -((object.element_bytes - 1 - span.offset) / object.element_bytes);
  return std::string(object.name) + "[" + std::to_string(index) + "]";
}

std::string element(const MemoryObject& object, const Cell& cell) {
  const int64_t offset = (&cell - object.cells) * object.cell_bytes;
  return std::string(object.name) + "[" + std::to_string(offset / object.element_bytes) + "]";
}

[[noreturn]] void fail_race(const Span& span, const Cell& cell, const char* now, const char* before,
                            const Stamp& earlier, Site site) {
  const bool same_block = earlier.who - machine.first_of_block() < static_cast<uint32_t>(machine.threads());
  fail(site, "race on " + element(*span.object, cell) + ": " + now + " here, " + before + " by " + actor(earlier) +
                 (same_block ? ", and no barrier orders the two" : ", and nothing orders blocks of one launch"));
}

[[noreturn]] void fail_in_flight(const Span& span, const Cell& cell, const char* now, Site site) {
  fail(site, element(*span.object, cell) + " is " + now + " before the cp.async of " + actor(cell.write) +
                 " has landed: no wait for it came first");
}

struct Cells {
  Cell* first;
  Cell* last;
  Cell* begin() const { return first; }
  Cell* end() const { return last; }
};

Cells cells_of(const Span& span, int bytes) {
  Cell* cells = span.object->cells;
  const int size = span.object->cell_bytes;
  return {cells + span.offset / size, cells + (span.offset + bytes + size - 1) / size};
}

bool same_warp(Who one, Who other) {
  const Who first = machine.first_of_block();
  return (one - first) / kWarpSize == (other - first) / kWarpSize;
}

// Two readers are enough to find every unordered write where all order comes from barriers of the whole block. With
// barriers of a warp or of some warps they should be of two warps.
void remember_read(Cell& cell, const Stamp& now) {
  Stamp &first = cell.reads[0], &second = cell.reads[1];
  if (ordered(first)) {
    first = now;
  } else if (ordered(second) || (same_warp(first.who, second.who) && !same_warp(first.who, now.who))) {
    second = now;
  }
}

void check_read(const Span& span, int bytes, Site site) {
  const Stamp now = stamp(site);
  for (Cell& cell : cells_of(span, bytes)) {
    if (cell.write.who == kNobody) fail(site, element(*span.object, cell) + " is read, but nobody has written it yet");
    if (cell.in_flight) fail_in_flight(span, cell, "read", site);
    if (!ordered(cell.write)) fail_race(span, cell, "read", "written", cell.write, site);
    remember_read(cell, now);
  }
}

void check_write(const Span& span, Site site, bool in_flight) {
  const Stamp now = stamp(site);
  for (Cell& cell : cells_of(span, span.bytes)) {
    if (cell.in_flight) fail_in_flight(span, cell, "written", site);
    if (!ordered(cell.write)) fail_race(span, cell, "written", "written", cell.write, site);
    for (const Stamp& read : cell.reads) {
      if (!ordered(read)) fail_race(span, cell, "written", "read", read, site);
    }
    cell = {now, {}, in_flight};
  }
}

// What simt_touched() gives.
std::string describe_touched() {
  std::string lines;
  for (const GlobalObject& global : global_objects) {
    const MemoryObject& object = global.object;
    const auto element_of = [&](int64_t byte) { return std::to_string(byte < 0 ? -1 : byte / object.element_bytes); };
    if (object.cells != nullptr) continue;
    lines += element_of(object.bytes) + " " + element_of(object.last_read) + " " + element_of(object.last_write) + " " +
             object.name + "\n";
  }
  return lines;
}

char* address(const Span& span) { return span.object->base + span.offset; }

void land(const AsyncCopy& copy) {
  std::memcpy(address(copy.to), copy.source, copy.source_bytes);
  std::memset(address(copy.to) + copy.source_bytes, 0, copy.to.bytes - copy.source_bytes);
  const Stamp now = stamp(copy.site);
  for (Cell& cell : cells_of(copy.to, copy.to.bytes)) cell = {now, {}, false};
}

}  // namespace

void check_address(const Span& span, const char* action, Site site) {
  if (span.object == nullptr) fail(site, std::string(action) + " of a null pointer");
  const MemoryObject& object = *span.object;
  if (span.offset < 0 || span.offset + span.bytes > object.bytes) {
    const std::string size = span.bytes == span.element_bytes ? "" : std::to_string(span.bytes) + "-byte ";
    fail(site, "out-of-bounds " + size + action + " at " + element(span) + ": " + object.name + " has " +
                   std::to_string(object.bytes / object.element_bytes) + " elements");
  }
  if (reinterpret_cast<uintptr_t>(address(span)) % span.alignment != 0) {
    fail(site, "misaligned " + std::to_string(span.bytes) + "-byte " + action + " at " + element(span) +
                   ": its address must be a multiple of " + std::to_string(span.alignment) + " bytes");
  }
}

const void* reading(const Span& span, Site site) {
  check_address(span, "read", site);
  if (MemoryObject& object = *span.object; object.cells == nullptr) {
    object.last_read = std::max(object.last_read, span.offset + span.bytes - 1);
    return kZeros;
  }
  check_read(span, span.bytes, site);
  return address(span);
}

void* writing(const Span& span, Site site) {
  check_address(span, "write", site);
  if (MemoryObject& object = *span.object; object.cells == nullptr) {
    object.last_write = std::max(object.last_write, span.offset + span.bytes - 1);
    return nowhere;
  }
  check_write(span, site, false);
  return address(span);
}

void begin_async_copy(const Span& to, const void* source, int source_bytes, Site site) {
  check_address(to, "cp.async", site);
  check_write(to, site, true);
  AsyncCopies& copies = async_copies[machine.running()];
  copies.pending.push_back({to, source, source_bytes, copies.groups, site});
}

void commit_async_copies() { ++async_copies[machine.running()].groups; }

void wait_async_copies(int groups_left) {
  AsyncCopies& copies = async_copies[machine.running()];
  const auto waits = [&](const AsyncCopy& copy) { return copy.group < copies.groups - groups_left; };
  for (const AsyncCopy& copy : copies.pending) {
    if (waits(copy)) land(copy);
  }
  copies.pending.erase(std::remove_if(copies.pending.begin(), copies.pending.end(), waits), copies.pending.end());
}

MemoryObject* global_object(const void* address, int64_t bytes, const char* name, int element_bytes, Content content) {
  GlobalObject& global = global_objects.emplace_back();
  char* base = const_cast<char*>(static_cast<const char*>(address));
  global.object = {name, base, bytes, element_bytes, element_bytes, nullptr};
  if (machine.excerpt) return &global.object;
  global.cells.resize(bytes / element_bytes);
  if (content == Content::kDefined) {
    for (Cell& cell : global.cells) cell.write.who = kBeforeLaunch;
  }
  global.object.cells = global.cells.data();
  return &global.object;
}

const char* end_run(const char* error) {
  static std::string report;
  touched = describe_touched();
  global_objects.clear();
  if (error == nullptr) return nullptr;
  report = error;
  return report.c_str();
}

MemoryObject* dynamic_shared_object(int64_t start, int64_t bytes, const char* name, int element_bytes, Site site) {
  for (Arena::Entry& entry : dynamic_shared.objects) {
    const MemoryObject& object = entry.object;
    if (entry.start == start && object.bytes == bytes && std::strcmp(object.name, name) == 0) return &entry.object;
  }
  if (start + bytes > dynamic_shared.bytes) {
    fail(site, std::string(name) + " takes bytes " + std::to_string(start) + " to " + std::to_string(start + bytes) +
                   " of dynamic shared memory, the launch gave " + std::to_string(dynamic_shared.bytes));
  }
  return dynamic_shared.add(start, bytes, name, element_bytes, site);
}

MemoryObject* static_shared_object(int64_t bytes, const char* name, int element_bytes, Site site) {
  for (Arena::Entry& entry : static_shared.objects) {
    const bool same_place = entry.site.line == site.line && std::strcmp(entry.site.file, site.file) == 0;
    if (same_place && std::strcmp(entry.object.name, name) == 0) return &entry.object;
  }
  const int64_t start = static_shared.bytes, end = start + (bytes + 127) / 128 * 128;
  if (end > kMostStaticShared) {
    fail(site, std::string(name) + ": static shared memory of " + std::to_string(end) + " bytes, a block has " +
                   std::to_string(kMostStaticShared));
  }
  static_shared.bytes = end;
  return static_shared.add(start, bytes, name, element_bytes, site);
}

void start_launch_memory(const char* kernel, int64_t shared_bytes, int threads) {
  if (shared_bytes < 0 || shared_bytes > kMostDynamicShared) {
    throw Fault(std::string(kernel) + ": a launch with " + std::to_string(shared_bytes) +
                " bytes of dynamic shared memory, at most " + std::to_string(kMostDynamicShared) + " are possible");
  }
  dynamic_shared.start_launch(shared_bytes, shared_bytes);
  static_shared.start_launch(kMostStaticShared, 0);
  async_copies.resize(threads);
  for (GlobalObject& global : global_objects) {
    for (Cell& cell : global.cells) {
      cell = {{cell.write.who == kNobody ? kNobody : kBeforeLaunch}, {}, false};
    }
  }
}

void start_block_memory() {
  dynamic_shared.forget_content();
  static_shared.forget_content();
  for (AsyncCopies& copies : async_copies) copies = {};
}

}  // namespace fastsam::simt

const char* simt_touched() { return fastsam::simt::touched.c_str(); }
