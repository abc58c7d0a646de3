// The scores between a tile of queries and a block of keys.
#pragma once
#include "bias.h"
#include "dropout.h"

namespace dil {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// Scores are kept as the plain products where nothing is added to them or bends them: then one is worth `scale`, and 1
// elsewhere. A factor that is not positive would turn the maximum round, so it goes into the queries instead.
inline bool is_plain(const Call& call) { return call.softcap == 0 && !call.bias.data; }
inline double score_unit(const Call& call) { return is_plain(call) && call.scale > 0 ? call.scale : 1; }
inline double query_factor(const Call& call) { return !is_plain(call) || call.scale > 0 ? 1 : call.scale; }
// This times a score is the exponent of 2.
inline double exponent_factor(const Call& call) { return score_unit(call) * kLog2E; }

// Scores of the keys `a` to `b` (multiples of kPanel) of a block that starts at key `start` of the list.
template <class T, int N>
struct Scores {
  const T *keys, *queries;
  int64_t dim, row;  // row: of `keys`
  const int32_t *low, *high;
  int64_t start;
  double softcap, scale;
  const T* bias;  // [keys][lanes], or [keys] with `by_key`; null: none
  bool by_key;

  // capped(j, s): before the bias. use(j, s): minus infinity where a lane does not see the key.
  template <class Capped, class Use>
  inline __attribute__((always_inline)) void each(int64_t a, int64_t b, const Tile& tile, Capped capped, Use use) const {
    for (int64_t j = a; j < b; j += kPanel) {
      Vec<T> s[kPanel][N];
      clear<T>(s);
      multiply<T>(s, keys + j * row, row, 1, queries, N * kWidth<T>, dim);
      if (softcap != 0) {
        cap(s);
        capped(j, s);
      }
      if (bias) add_bias(s, j);
      if (start + j < tile.low_max || start + j + kPanel > tile.high_min) hide(s, start + j);
      use(j, s);
    }
  }

  void cap(Vec<T> (&s)[kPanel][N]) const {
    for (int r = 0; r < kPanel; ++r)
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < kWidth<T>; ++i) s[r][n][i] = T(softcap) * tanh_of(s[r][n][i] * T(scale / softcap));
  }

  void add_bias(Vec<T> (&s)[kPanel][N], int64_t key) const {
    Vec<T> factor = fill(T(softcap != 0 ? 1 : scale));
    for (int r = 0; r < kPanel; ++r)
      for (int n = 0; n < N; ++n) {
        Vec<T> added = by_key ? fill(bias[key + r]) : load(bias + ((key + r) * N + n) * kWidth<T>);
        s[r][n] = fma(s[r][n], factor, added);
      }
  }

  void hide(Vec<T> (&s)[kPanel][N], int64_t key) const {
    for (int n = 0; n < N; ++n) {
      IntVec<T> from = load_ints<T>(low + n * kWidth<T>), to = load_ints<T>(high + n * kWidth<T>);
      for (int r = 0; r < kPanel; ++r) {
        IntVec<T> at = IntVec<T>{} + Int<T>(key + r), seen = (from <= at) & (to > at);
        s[r][n] = seen ? s[r][n] : fill(-std::numeric_limits<T>::infinity());
      }
    }
  }
};

}  // namespace dil
