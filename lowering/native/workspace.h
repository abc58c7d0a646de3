// Memory that was there before a call. In a smaller one less is done at once (see `Arrangement`), which costs time and nothing else;
// what even the least arrangement has no room for is allocated.
#pragma once
#include <cstdint>

namespace dil {

constexpr int64_t kLine = 64;

inline int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Handed out from the front, `size` bytes from `memory` on, a whole number of lines at a time.
class Workspace {
 public:
  int64_t taken = 0;  // what was asked for, found or not

  Workspace(void* memory, int64_t size) : next_(static_cast<char*>(memory)), left_(memory ? size : 0) {
    int64_t lost = memory ? -reinterpret_cast<intptr_t>(memory) & (kLine - 1) : 0;
    next_ += lost, left_ -= lost;
  }

  // Null where there is no room.
  void* take(int64_t size) {
    taken += size;
    if (size > left_) return nullptr;
    char* found = next_;
    next_ += size, left_ -= size;
    return found;
  }

 private:
  char* next_;
  int64_t left_;
};

// Of the buffers that this thread makes; null: they are allocated.
inline thread_local Workspace* workspace = nullptr;

class Within {
 public:
  explicit Within(Workspace& of) : before_(workspace) { workspace = &of; }
  ~Within() { workspace = before_; }

 private:
  Workspace* before_;
};

}  // namespace dil
