// The matrix products of attention over one tile of queries. Note [lanes are queries]:
//
// Scores are held transposed, [keys][queries], so that a vector holds one key's scores of neighbouring queries. Maximum, sum
// and limits of a query then need no step across lanes, and keys and values are read as they lie, one element broadcast at a
// time: nothing but the queries is ever transposed.
#pragma once
#include "simd.h"

namespace dil {

#if defined(__AVX512F__)
constexpr int kPanel = 8;  // rows that a product computes at once: 8 x 3 sums, 3 operands and a broadcast in 32 registers
#else
constexpr int kPanel = 4;  // 4 x 3 sums in 16 registers
#endif
constexpr int kMaxVectors = 3;  // vectors of queries in a tile
template <class T>
constexpr int kTile = kMaxVectors * kWidth<T>;

// sums[r][c] += sum over i < depth of a[r * row + i * step] * b[i * b_step + c]; c counts vectors.
template <class T, int R, int N>
inline __attribute__((always_inline)) void multiply(Vec<T> (&sums)[R][N], const T* a, int64_t row, int64_t step, const T* b,
                                                    int64_t b_step, int64_t depth) {
  for (int64_t i = 0; i < depth; ++i) {
    Vec<T> right[N];
    for (int c = 0; c < N; ++c) right[c] = load(b + c * kWidth<T>);
    for (int r = 0; r < R; ++r) {
      Vec<T> left = fill(a[r * row]);
      for (int c = 0; c < N; ++c) sums[r][c] = fma(left, right[c], sums[r][c]);
    }
    a += step, b += b_step;
  }
}

template <class T, int R, int N>
inline __attribute__((always_inline)) void clear(Vec<T> (&sums)[R][N]) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < N; ++c) sums[r][c] = Vec<T>{};
}
// to = to * keep + sums. Long sums are added up from short ones, each begun at zero: the error grows with the root of their
// length.
template <class T, int R, int N>
inline __attribute__((always_inline)) void add(Vec<T> (&sums)[R][N], T* to, int64_t row, const Vec<T> (&keep)[N]) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < N; ++c) {
      T* at = to + r * row + c * kWidth<T>;
      store(at, fma(load(at), keep[c], sums[r][c]));
    }
}
template <class T, int R, int N>
inline __attribute__((always_inline)) void add(Vec<T> (&sums)[R][N], T* to, int64_t row) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < N; ++c) {
      T* at = to + r * row + c * kWidth<T>;
      store(at, load(at) + sums[r][c]);
    }
}
template <class T, int R, int N>
inline __attribute__((always_inline)) void write(Vec<T> (&sums)[R][N], T* to, int64_t row) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < N; ++c) store(to + r * row + c * kWidth<T>, sums[r][c]);
}

inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

}  // namespace dil
