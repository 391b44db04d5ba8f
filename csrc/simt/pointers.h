// Pointers of a kernel on the host: they know their memory object, and each access through them is checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/runtime.h"

namespace fastsam::simt {

enum class Space { kGlobal, kShared };

// The index of x[i], made from i by the compiler, which fills in where in the source that was.
struct Index {
  Index(int64_t index, Site site_of_use = FASTSAM_HERE) : value(index), site(site_of_use) {}
  int64_t value;
  Site site;
};

template <class V>
V read_as(const Span& span, Site site) {
  V value;
  std::memcpy(&value, reading(span, site), sizeof(V));
  return value;
}

// x[i]: reading converts it, writing assigns to it. It is no variable: `auto v = x[i]` does not compile when v is used;
// name the type of v.
template <class T>
class Element {
  using Value = std::remove_const_t<T>;

 public:
  Element(const Span& span, Site site) : span_(span), site_(site) {}
  Element(const Element&) = delete;

  operator Value() && { return read_as<Value>(span_, site_); }

  template <class U = T, class = std::enable_if_t<!std::is_const_v<U>>>
  void operator=(Value value) && {
    assign(value);
  }
  void operator=(Element&& other) && { assign(static_cast<Element&&>(other)); }

  void operator+=(Value value) && { assign(read_as<Value>(span_, site_) + value); }
  void operator-=(Value value) && { assign(read_as<Value>(span_, site_) - value); }
  void operator*=(Value value) && { assign(read_as<Value>(span_, site_) * value); }

 private:
  void assign(Value value) { std::memcpy(writing(span_, site_), &value, sizeof(Value)); }

  Span span_;
  Site site_;
};

template <class T, Space space>
class Pointer {
 public:
  using Value = std::remove_const_t<T>;

  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(MemoryObject* object, int64_t offset) : object_(object), offset_(offset) {}

  template <class U, class = std::enable_if_t<std::is_same_v<const U, T> && !std::is_const_v<U>>>
  Pointer(const Pointer<U, space>& other) : object_(other.object()), offset_(other.offset()) {}

  Element<T> operator[](Index index) const { return Element<T>(span<Value>(index.value), index.site); }

  // The elements from `index` on that one V covers.
  template <class V>
  Span span(int64_t index = 0) const {
    static_assert(sizeof(V) % sizeof(T) == 0, "a vector holds whole elements");
    static_assert(sizeof(V) <= kMostAccessBytes, "objects with addresses only have no more zeros to read");
    return {object_, offset_ + index * static_cast<int64_t>(sizeof(T)), sizeof(V), sizeof(T), alignof(V)};
  }

  Pointer operator+(int64_t n) const { return {object_, offset_ + n * static_cast<int64_t>(sizeof(T))}; }
  Pointer operator-(int64_t n) const { return *this + -n; }
  Pointer& operator+=(int64_t n) { return *this = *this + n; }
  Pointer& operator-=(int64_t n) { return *this = *this - n; }
  bool operator==(std::nullptr_t) const { return object_ == nullptr; }
  bool operator!=(std::nullptr_t) const { return object_ != nullptr; }
  explicit operator bool() const { return object_ != nullptr; }

  MemoryObject* object() const { return object_; }
  int64_t offset() const { return offset_; }

 private:
  MemoryObject* object_ = nullptr;
  int64_t offset_ = 0;  // in bytes
};

}  // namespace fastsam::simt
