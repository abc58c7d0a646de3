// The bias of a tile of queries, read a block of keys at a time and laid out like the scores: [keys][lanes].
#pragma once
#include "tiles.h"

namespace dil {

// Where the numbers of pairs lie: those of key j and vector c of lanes begin at data + j * key + c * vector.
template <class E>
struct Pairs {
  E* data;
  int64_t key, vector;
};

// All queries of a tile have the same numbers.
inline bool same_for_all(const Call& call, const Square& x) {
  return x.row == 0 && (x.head == 0 || call.heads == call.kv_heads);
}

// `count` positions, at least one, without gaps.
inline bool follow_each_other(const int32_t* positions, int64_t count) {
  return positions[count - 1] - positions[0] == count - 1;
}

// Columns of `from` become rows of `to`: whole vectors of `keys` numbers of a vector of lanes, those from `count` on 0.
template <class T>
inline void turn_lanes(T* from, int64_t row, int64_t count, int64_t keys, T* to, int64_t to_row) {
  for (int64_t i = 0; i < kWidth<T>; ++i) std::fill_n(from + i * row + count, keys - count, T(0));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t j = 0; j < keys; j += 16) {
      __m512i part[16];
      for (int64_t i = 0; i < 16; ++i) part[i] = _mm512_loadu_si512(from + i * row + j);
      transpose(part);
      for (int64_t i = 0; i < std::min<int64_t>(16, keys - j); ++i) _mm512_storeu_si512(to + (j + i) * to_row, part[i]);
    }
    return;
  }
#endif
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < kWidth<T>; ++i) to[j * to_row + i] = from[i * row + j];
}

template <class T>
class Bias {
 public:
  static constexpr int64_t kBlock = 128;  // keys read at once

  // One number a key: `Pairs` with nothing but keys.
  const bool by_key;

  explicit Bias(const Call& call) : by_key(same_for_all(call, call.bias)), call_(call) {
    if (call.bias.data) rows_.take(kRow * kWidth<T>);
  }

  // The numbers of `count` keys, and 0 for those that make them up to `keys` (at most kBlock).
  void read(const Span& span, const Tile& tile, const Lane* lanes, const int32_t* positions, int64_t count, int64_t keys,
            Pairs<T> to) {
    if (by_key) {
      read_row(span, lanes[tile.first], positions, count, to.data);
      std::fill(to.data + count, to.data + keys, T(0));
      return;
    }
    for (int64_t c = 0; c < tile.vectors; ++c) {
      // Unused lanes repeat the last.
      for (int64_t i = 0; i < kWidth<T>; ++i)
        read_row(span, lanes[tile.first + std::min(c * kWidth<T> + i, tile.lanes - 1)], positions, count, rows_ + i * kRow);
      turn_lanes(+rows_, kRow, count, keys, to.data + c * to.vector, to.key);
    }
  }

 private:
  // Rows begin in different cache sets, and a transposed square may read past the last key.
  static constexpr int64_t kRow = kBlock + 16;
  const Call& call_;
  Buffer<T> rows_;

  void read_row(const Span& span, const Lane& lane, const int32_t* positions, int64_t count, T* to) const {
    const Square& bias = call_.bias;
    int64_t head = span.kv_head * (call_.heads / call_.kv_heads) + lane.head;
    int64_t at = span.batch * bias.batch + head * bias.head + lane.row * bias.row + span.origin * bias.key;
    switch (call_.bias_dtype) {
      case kFloat32: return read_keys(static_cast<const float*>(bias.data) + at, positions, count, to);
      case kBFloat16: return read_keys(static_cast<const BFloat16*>(bias.data) + at, positions, count, to);
      case kFloat16: return read_keys(static_cast<const Half*>(bias.data) + at, positions, count, to);
      default: return read_keys(static_cast<const double*>(bias.data) + at, positions, count, to);
    }
  }

  template <class B>
  void read_keys(const B* from, const int32_t* positions, int64_t count, T* to) const {
    int64_t step = call_.bias.key;
    if (step == 1 && count > 0 && follow_each_other(positions, count)) return load_row(from + positions[0], to, int(count));
    for (int64_t i = 0; i < count; ++i) to[i] = T(widen(from[positions[i] * step]));
  }
};

// The sums of the gradients of a bias: `rows`, each row of which only one worker adds to, or `keys`, which rows share.
template <class T>
struct BiasSums {
  T* rows;
  double* keys;
  int64_t head, row, key;  // strides; heads count inside a key head
};

template <class T>
class BiasGradient {
 public:
  explicit BiasGradient(const Call& call) : call_(call) {
    if (call.grad_bias.data) rows_.take(kRow * kWidth<T>);
  }

  // Add the gradients of the scores of `count` keys.
  void add(const Span& span, const Tile& tile, const Lane* lanes, const int32_t* positions, int64_t count, Pairs<const T> from,
           const BiasSums<T>& into) {
    if (into.keys) return add_to_keys(span, tile, lanes + tile.first, positions, count, from, into);
    for (int64_t c = 0; c < tile.vectors; ++c) {
      int64_t used = std::min<int64_t>(kWidth<T>, tile.lanes - c * kWidth<T>);
      if (used <= 0) return;
      turn_keys(from.data + c * from.vector, from.key, count);
      for (int64_t i = 0; i < used; ++i)
        add_row(span, lanes[tile.first + c * kWidth<T> + i], positions, count, rows_ + i * kRow, into);
    }
  }

 private:
  static constexpr int64_t kBlock = 128, kRow = kBlock + 16;
  const Call& call_;
  Buffer<T> rows_;

  void turn_keys(const T* from, int64_t row, int64_t count) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      for (int64_t j = 0; j < count; j += 16) {
        __m512i part[16];
        for (int64_t i = 0; i < 16; ++i) part[i] = j + i < count ? _mm512_loadu_si512(from + (j + i) * row) : __m512i{};
        transpose(part);
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(rows_ + i * kRow + j, part[i]);
      }
      return;
    }
#endif
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < kWidth<T>; ++i) rows_[i * kRow + j] = from[j * row + i];
  }

  void add_row(const Span& span, const Lane& lane, const int32_t* positions, int64_t count, const T* from,
               const BiasSums<T>& into) const {
    T* to = into.rows + lane.head * into.head + lane.row * into.row;
    if (into.key == 0) {
      T sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += from[j];
      *to += sum;
    } else if (into.key == 1 && follow_each_other(positions, count)) {
      to += span.origin + positions[0];
      for (int64_t j = 0; j < count; ++j) to[j] += from[j];
    } else {
      to += span.origin * into.key;
      for (int64_t j = 0; j < count; ++j) to[positions[j] * into.key] += from[j];
    }
  }

  void add_to_keys(const Span& span, const Tile& tile, const Lane* lanes, const int32_t* positions, int64_t count,
                   Pairs<const T> from, const BiasSums<T>& into) const {
    double* to = into.keys + span.origin * into.key;
    for (int64_t j = 0; j < count; ++j) {
      const T* row = from.data + j * from.key;
      double* at = to + positions[j] * into.key;
      if (into.head == 0) {
        *at += sum_of(row, from.vector, tile.lanes);
      } else {
        for (int64_t i = 0; i < tile.lanes; ++i)
          at[lanes[i].head * into.head] += row[i / kWidth<T> * from.vector + i % kWidth<T>];
      }
    }
  }

  // Whole vectors first: unused lanes may hold anything.
  static T sum_of(const T* row, int64_t vector, int64_t lanes) {
    Vec<T> sums{};
    int64_t c = 0;
    for (; (c + 1) * kWidth<T> <= lanes; ++c) sums += load(row + c * vector);
    T sum = 0;
    for (int64_t i = 0; i < kWidth<T>; ++i) sum += sums[i];
    for (int64_t i = 0; i < lanes - c * kWidth<T>; ++i) sum += row[c * vector + i];
    return sum;
  }
};

}  // namespace dil
