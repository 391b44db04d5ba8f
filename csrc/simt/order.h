// Which memory accesses of a block's threads are ordered by barriers: a vector clock a thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastsam::simt {

// Every thread counts its synchronisations. An access at count c of thread a happens before what thread b does now if b
// has synchronised, directly or through others, with a after c.
class Order {
 public:
  void reset(int threads) {
    count_.assign(threads, 1);
    floor_.assign(threads, 0);
    views_.resize(threads);
    view_phase_.assign(threads, 0);
    phase_ = 1;
  }

  uint32_t now(int thread) const { return count_[thread]; }

  bool before(int earlier, uint32_t count, int thread) const {
    return earlier == thread || count <= (view_phase_[thread] == phase_ ? views_[thread] : floor_)[earlier];
  }

  // A barrier of the whole block: everybody knows everything. The views of part of the block start anew from there.
  void join_all() {
    floor_ = count_;
    ++phase_;
    for (uint32_t& count : count_) ++count;
  }

  void join(const std::vector<int>& threads) {
    joined_ = floor_;
    for (int thread : threads) {
      if (view_phase_[thread] == phase_) {
        for (size_t i = 0; i < joined_.size(); ++i) joined_[i] = std::max(joined_[i], views_[thread][i]);
      }
    }
    for (int thread : threads) joined_[thread] = count_[thread]++;
    for (int thread : threads) {
      views_[thread] = joined_;
      view_phase_[thread] = phase_;
    }
  }

 private:
  std::vector<uint32_t> count_;
  std::vector<uint32_t> floor_;               // what all know since the last barrier of the block
  std::vector<std::vector<uint32_t>> views_;  // what a thread knows beyond, if its phase is the present one
  std::vector<uint32_t> view_phase_;
  uint32_t phase_ = 1;
  std::vector<uint32_t> joined_;
};

}  // namespace fastsam::simt
