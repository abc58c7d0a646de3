// Keys of several terms as one ascending list, with which terms hold each.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace dil {

inline int64_t floor_mod(int64_t a, int64_t b) {
  int64_t r = a % b;
  return r < 0 ? r + b : r;
}

// The first number from `at` on that is `start` and a multiple of `step`.
inline int64_t align_up(int64_t at, int64_t start, int64_t step) { return at + floor_mod(start - at, step); }

// x with a * x = 1 modulo b, which have no common divisor (extended Euclid).
inline int64_t inverse_of(int64_t a, int64_t b) {
  int64_t x = 1, y = 0;
  for (int64_t m = b; m != 0;) {
    int64_t whole = a / m;
    a -= whole * m, x -= whole * y;
    std::swap(a, m), std::swap(x, y);
  }
  return floor_mod(x, b);
}

// Positions start, start + step, ... below stop.
struct Steps {
  int64_t start, stop, step;
};

// The positions of `of` that are `start` and a multiple of `step` too (Chinese remainder theorem).
inline Steps meet(Steps of, int64_t start, int64_t step) {
  if (step == 1 || of.start >= of.stop) return of;
  if (of.step >= of.stop - of.start) {
    // One position; the step may be too large to be multiplied.
    return floor_mod(of.start - start, step) == 0 ? of : Steps{0, 0, 1};
  }
  int64_t divisor = std::gcd(of.step, step), gap = floor_mod(start - of.start, step);
  if (gap % divisor != 0) return {0, 0, 1};
  int64_t rest = step / divisor;
  int64_t count = rest == 1 ? 0 : gap / divisor % rest * inverse_of(of.step / divisor % rest, rest) % rest;
  return {of.start + of.step * count, of.stop, of.step * rest};
}

// The keys start, start + step, ... below stop, which the groups of a batch see that are bits of `groups`. `once`: they are not
// counted for a group that has them from an earlier progression.
struct KeyProgression {
  int32_t start, stop, step;
  uint64_t groups;
  bool once;
};

// What several keys have in common: the progressions that hold them and the groups that see them, as bits.
struct KeyKind {
  uint64_t holders, groups;
  std::vector<float> times;  // by group
};

// Progressions merged: every key once, ascending, with its kind.
class MergedKeys {
 public:
  static constexpr size_t kMost = 64;
  std::vector<int32_t> position;
  std::vector<uint32_t> kind;  // of each key, in `kinds`
  std::vector<KeyKind> kinds;

  void merge(const std::vector<KeyProgression>& from, size_t num_groups) {
    position.clear(), kind.clear(), kinds.clear();
    const int64_t count = int64_t(from.size());
    int32_t next[kMost], stop[kMost], step[kMost];
    for (int64_t e = 0; e < count; ++e) {
      next[e] = from[size_t(e)].start < from[size_t(e)].stop ? from[size_t(e)].start : INT32_MAX;
      stop[e] = from[size_t(e)].stop, step[e] = from[size_t(e)].step;
    }
    uint32_t last = 0;
    while (true) {
      int32_t key = INT32_MAX;
      for (int64_t e = 0; e < count; ++e) key = std::min(key, next[e]);
      if (key == INT32_MAX) return;
      uint64_t holders = 0;
      for (int64_t e = 0; e < count; ++e) {
        bool held = next[e] == key;
        holders |= uint64_t(held) << e;
        int32_t after = step[e] < stop[e] - key ? key + step[e] : INT32_MAX;
        next[e] = held ? after : next[e];
      }
      if (kinds.empty() || kinds[last].holders != holders) last = kind_of(holders, from, num_groups);
      position.push_back(key), kind.push_back(last);
    }
  }

  // Leaves out the keys at which `keep`, read every `stride`, is false.
  void keep_only(const bool* keep, int64_t stride) {
    size_t n = 0;
    for (size_t i = 0; i < position.size(); ++i) {
      if (!keep[position[i] * stride]) continue;
      position[n] = position[i], kind[n++] = kind[i];
    }
    position.resize(n), kind.resize(n);
  }

 private:
  uint32_t kind_of(uint64_t holders, const std::vector<KeyProgression>& from, size_t num_groups) {
    for (size_t n = 0; n < kinds.size(); ++n)
      if (kinds[n].holders == holders) return uint32_t(n);
    KeyKind& made = kinds.emplace_back(KeyKind{holders, 0, std::vector<float>(num_groups, 0.0f)});
    for (size_t e = 0; e < from.size(); ++e) {
      if (!(holders >> e & 1)) continue;
      made.groups |= from[e].groups;
      for (size_t g = 0; g < num_groups; ++g)
        if (from[e].groups >> g & 1 && !(from[e].once && made.times[g] > 0)) made.times[g] += 1;
    }
    return uint32_t(kinds.size() - 1);
  }
};

}  // namespace dil
