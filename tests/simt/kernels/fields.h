// A call as the tests hand it over: the members of its struct in params.h as one array of numbers, in their order.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastsam/params.h"

namespace fastsam::cuda {

// Reads such an array, one member after the other.
class Fields {
 public:
  explicit Fields(const int64_t* fields) : next_(fields) {}

  template <class... Values>
  void read(Values&... values) {
    (read_one(values), ...);
  }

 private:
  void read_one(int64_t& value) { value = *next_++; }
  void read_one(int& value) { value = static_cast<int>(*next_++); }
  void read_one(Update& value) { value = static_cast<Update>(*next_++); }
  void read_one(Form& value) { value = static_cast<Form>(*next_++); }

  template <class T>
  void read_one(T*& address) {
    address = reinterpret_cast<T*>(*next_++);
  }

  template <class T>
  void read_one(Map<T>& map) {
    read(map.data, map.stride_batch, map.stride_channel);
  }

  const int64_t* next_;
};

inline void check_workspace(int64_t given, int64_t needed) {
  if (given < needed) {
    throw std::runtime_error("a workspace of " + std::to_string(given) + " bytes, needed are " +
                             std::to_string(needed));
  }
}

}  // namespace fastsam::cuda
