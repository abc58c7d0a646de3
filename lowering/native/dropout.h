// Dropout by position: the generator of lowering/dropout.py, the same draws on any tiling.
#pragma once
#include "tiles.h"

namespace dil {

// The mixer lowbias32 (Chris Wellons, hash-prospector) of 32-bit numbers, one or a vector of them.
template <class U>
inline U mixed(U x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

template <class T>
class Dropout {
 public:
  const bool on;

  Dropout(const Call& call, int64_t lanes) : on(call.dropout_factor != 0), call_(call) {
    if (!on) return;
    lanes_.take(lanes), keys_.take(kMostKeys);
    uint64_t seed = uint64_t(call.dropout_seed);
    seed_ = mixed(uint32_t(seed)) ^ mixed(uint32_t(seed >> 32) + 0x9E3779B9u);
  }

  // The queries of a tile. Unused lanes repeat the last.
  void begin(const Span& span, const Tile& tile, const Lane* lanes) {
    if (!on) return;
    uint32_t of_row = mixed(seed_ + uint32_t(span.batch) * 0x85EBCA6Bu);
    for (int64_t i = 0; i < tile.vectors * kWidth<T>; ++i) {
      const Lane& lane = lanes[tile.first + std::min(i, tile.lanes - 1)];
      int64_t head = call_.dropout_head + span.kv_head * (call_.heads / call_.kv_heads) + lane.head;
      uint32_t of_head = mixed(of_row + uint32_t(head) * 0xC2B2AE35u);
      lanes_[tile.first + i] = mixed(of_head + uint32_t(span.origin + lane.position));
    }
  }

  // The keys of a block from `a` to before `b`, those beyond its end like the last.
  void read(const Span& span, const KeyBlock& keys, int64_t a, int64_t b) {
    if (!on) return;
    for (int64_t j = a; j < b; ++j)
      keys_[j] = mixed(uint32_t(span.origin + keys.positions[std::min(j, keys.count - 1)]) + 0x27D4EB2Fu);
  }

  // 1 / (1 - p) where a lane of the vector at `lane` keeps key `key` of the block, else 0.
  Vec<T> keep(int64_t lane, int64_t key) const {
    typename Lanes<T>::Draws drawn;
    std::memcpy(&drawn, lanes_ + lane, sizeof(drawn));
    auto kept = mixed(drawn ^ keys_[key]) >= uint32_t(call_.dropout_least);
    IntVec<T> bits = (IntVec<T>)fill(T(call_.dropout_factor));
    return (Vec<T>)(__builtin_convertvector(kept, IntVec<T>) & bits);
  }

 private:
  static constexpr int64_t kMostKeys = 128;
  const Call& call_;
  uint32_t seed_ = 0;
  Buffer<uint32_t> lanes_, keys_;
};

}  // namespace dil
