// Forward in bfloat16 with AMX tile products. Note [tile products]:
//
// A tile register holds 16 rows of 64 bytes; c += a * b takes 32 bfloat16 of a row of a and pairs of rows of b that lie side by
// side. Scores stay transposed, [keys][queries]: a = keys as they lie, b = queries in pairs of dims. Weights are narrowed in
// pairs of keys, which is the layout that b needs in [dims][queries] += values transposed * weights.
#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define DILCOMPILE_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace dil {

// Whether the system lets this process use the tile registers (Linux asks for a permission first).
inline bool has_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}

// All eight registers as 16 rows of 64 bytes while this lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// c [32][32] (row stride c_row floats) = or += a [32][depth] * b [depth / 2][32 pairs], depth a multiple of 32.
template <bool kAdd>
inline void tile_product(const uint16_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  // The compiler doesn't know that loads into tile registers read memory.
  asm volatile("" ::: "memory");
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_row * 4); _tile_loadd(1, c + 16, c_row * 4);
    _tile_loadd(2, c + 16 * c_row, c_row * 4); _tile_loadd(3, c + 16 * c_row + 16, c_row * 4);
  } else {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += 32) {
    _tile_loadd(4, a + d, a_row * 2); _tile_loadd(6, b + d / 2 * b_row, b_row * 4);
    _tile_loadd(7, b + d / 2 * b_row + 16, b_row * 4); _tile_loadd(5, a + 16 * a_row + d, a_row * 2);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_row * 4); _tile_stored(1, c + 16, c_row * 4);
  _tile_stored(2, c + 16 * c_row, c_row * 4); _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
}

// 16 rows of 16 elements of 32 bits, transposed.
inline void transpose(__m512i (&r)[16]) {
  __m512i s[16];
  for (int i = 0; i < 8; ++i) s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]), s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(s[4 * i + j], s[4 * i + 2 + j]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(s[4 * i + j], s[4 * i + 2 + j]);
    }
  for (int j = 0; j < 4; ++j) {
    s[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), s[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    s[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), s[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(s[j], s[8 + j], 0x88), r[8 + j] = _mm512_shuffle_i32x4(s[j], s[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(s[4 + j], s[12 + j], 0x88), r[12 + j] = _mm512_shuffle_i32x4(s[4 + j], s[12 + j], 0xdd);
  }
}

// Keys as they lie, [kBlock][dim], and values transposed, [dim][kBlock]; zeros up to whole tiles.
class TileRows {
 public:
  static constexpr int64_t kStep = 32;
  const int64_t key_row, value_rows;
  Buffer<uint16_t> keys, values;

  explicit TileRows(const Call& call) : key_row((call.head_dim + 31) / 32 * 32), value_rows((call.v_dim + 31) / 32 * 32), call_(call) {
    keys.take(kBlock * key_row), values.take(kBlock * value_rows), side_by_side_.take(32 * value_rows);
  }

  void gather(const Span& span, const int32_t* positions, int64_t count) {
    const BFloat16* from = key_rows<BFloat16>(call_.k, span);
    for (int64_t i = 0; i < count; ++i) copy(from + int64_t(positions[i]) * call_.k.row, keys + i * key_row, call_.head_dim, key_row);
    int64_t whole = (count + 31) / 32 * 32;
    std::fill_n(keys + count * key_row, (whole - count) * key_row, uint16_t(0));
    from = key_rows<BFloat16>(call_.v, span);
    for (int64_t first = 0; first < whole; first += 32) {
      for (int64_t i = 0; i < 32; ++i) {
        if (first + i < count) copy(from + int64_t(positions[first + i]) * call_.v.row, side_by_side_ + i * value_rows, call_.v_dim, value_rows);
        else std::fill_n(side_by_side_ + i * value_rows, value_rows, uint16_t(0));
      }
      for (int64_t d = 0; d < value_rows; d += 32) turn(side_by_side_ + d, values + d * kBlock + first);
    }
  }

 private:
  const Call& call_;
  Buffer<uint16_t> side_by_side_;

  static void copy(const BFloat16* from, uint16_t* to, int64_t dim, int64_t row) {
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) _mm512_storeu_si512(to + d, _mm512_loadu_si512(from + d));
    for (; d < row; ++d) to[d] = d < dim ? from[d].bits : 0;
  }

  // 32 rows of 32 dims into 32 columns: pairs of rows become elements of 32 bits, which are transposed.
  void turn(const uint16_t* from, uint16_t* to) const {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      __m512i one = _mm512_loadu_si512(from + 2 * i * value_rows), other = _mm512_loadu_si512(from + (2 * i + 1) * value_rows);
      low[i] = _mm512_unpacklo_epi16(one, other), high[i] = _mm512_unpackhi_epi16(one, other);
    }
    transpose(low), transpose(high);
    // Interleaving works inside 128 bits, so four dims of eight come from `low` and four from `high`.
    for (int i = 0; i < 16; ++i) {
      int64_t dim = i / 4 * 8 + i % 4;
      _mm512_storeu_si512(to + dim * kBlock, low[i]), _mm512_storeu_si512(to + (dim + 4) * kBlock, high[i]);
    }
  }
};

// Two rows of weights as pairs of bfloat16, rounded to nearest.
inline __m512i narrow_pair(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  __m512i b = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_mask_blend_epi16(0xAAAAAAAA, a, b);
}

class TileForward {
  static constexpr int64_t kMaxLanes = 1152, kUnit = 32, kMaxUnits = 2, kPanelKeys = 32;

 public:
  explicit TileForward(const Call& call)
      : call_(call), rows_(call), factor_(float(exponent_factor(call))), pairs_(rows_.key_row / 2) {
    int64_t lanes = kMaxLanes + kUnit * kMaxUnits;
    queries_.take(lanes * pairs_), sums_.take(lanes * rows_.value_rows), most_.take(lanes), total_.take(lanes);
    low_.take(lanes), high_.take(lanes), scores_.take(kPanelKeys * kUnit * kMaxUnits), weights_.take(kBlock / 2 * kUnit * kMaxUnits);
    maxima_.take(kUnit * kMaxUnits);
  }

  void run(const Span& span) {
    Plan plan(call_, span);
    for (size_t g = 0; g + 1 < plan.group_starts.size(); ++g) {
      plan.find_keys(int64_t(g));
      for (int64_t first = plan.group_starts[g]; first < plan.group_starts[g + 1]; first += kMaxLanes) {
        const Lane* lanes = &plan.lanes[size_t(first)];
        begin(span, lanes, std::min(kMaxLanes, plan.group_starts[g + 1] - first));
        attend(span, plan.shared, lanes), attend(span, plan.windowed, lanes);
        finish(span, lanes);
      }
    }
  }

 private:
  const Call& call_;
  TileRows rows_;
  float factor_;
  int64_t pairs_;
  TileRegisters registers_;
  std::vector<Tile> tiles_;
  Buffer<uint32_t> queries_, weights_;
  Buffer<float> sums_, most_, total_, scores_, maxima_;
  Buffer<int32_t> low_, high_;

  void begin(const Span& span, const Lane* lanes, int64_t count) {
    tiles_.clear();
    for (int64_t first = 0; first < count; first += kUnit * kMaxUnits) {
      int64_t now = std::min(count - first, kUnit * kMaxUnits), units = (now + kUnit - 1) / kUnit;
      tiles_.push_back({int(units * 2), first, now, 0, 0, 0, 0});
      read(span, tiles_.back(), lanes, units * kUnit);
      std::fill_n(most_ + first, units * kUnit, -std::numeric_limits<float>::infinity());
      std::fill_n(total_ + first, units * kUnit, 0.0f);
      std::fill_n(sums_ + first * rows_.value_rows, units * kUnit * rows_.value_rows, 0.0f);
    }
  }

  // Queries in pairs of dims: [dim / 2][lanes].
  void read(const Span& span, const Tile& tile, const Lane* lanes, int64_t width) {
    __m512i rows[16];
    for (int64_t first = 0; first < width; first += 16) {
      for (int64_t d = 0; d < call_.head_dim; d += 32) {
        __mmask32 there = call_.head_dim - d >= 32 ? ~__mmask32(0) : (__mmask32(1) << (call_.head_dim - d)) - 1;
        for (int64_t i = 0; i < 16; ++i) {
          const Lane& lane = lanes[tile.first + std::min(first + i, tile.lanes - 1)];
          rows[i] = _mm512_maskz_loadu_epi16(there, row_of<BFloat16>(call_, call_.q, span, lane) + d);
        }
        transpose(rows);
        uint32_t* to = queries_ + tile.first * pairs_ + d / 2 * width + first;
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * width, rows[i]);
      }
    }
  }

  void attend(const Span& span, const Keys& keys, const Lane* lanes) {
    auto use = [&](const Tile& tile, int64_t a, int64_t b, int64_t start, const float* times, int64_t count) {
      if (tile.vectors == 4) block<4>(tile, a, b, start, times, count);
      if (tile.vectors == 2) block<2>(tile, a, b, start, times, count);
    };
    each_block<BFloat16>(call_, span, keys, lanes, tiles_, +low_, +high_, rows_, use, [](const int32_t*, int64_t) {});
  }

  template <int N> void block(const Tile& tile, int64_t a, int64_t b, int64_t start, const float* times, int64_t count) {
    constexpr int64_t width = N * 16;
    const uint32_t* queries = queries_ + tile.first * pairs_;
    int64_t summed = a;
    for (int64_t j = a; j < b; j += kPanelKeys) {
      for (int64_t c = 0; c < width; c += 32)
        tile_product<false>(rows_.keys + j * rows_.key_row, rows_.key_row, queries + c, width, rows_.key_row, scores_ + c, width);
      if (call_.softcap != 0) cap(kPanelKeys * width);
      if (start + j < tile.low_max || start + j + kPanelKeys > tile.high_min) hide<N>(tile, start + j);
      if (exceeds<N>(tile)) {
        add_up<N>(tile, summed, j), shift<N>(tile);
        summed = j;
      }
      weigh<N>(tile, times ? times + j : nullptr, count - j, weights_ + j / 2 * width);
    }
    add_up<N>(tile, summed, b);
  }

  // The weights of keys a to b times the values.
  template <int N> void add_up(const Tile& tile, int64_t a, int64_t b) {
    constexpr int64_t width = N * 16;
    float* sums = sums_ + tile.first * rows_.value_rows;
    if (a == b) return;
    for (int64_t d = 0; d < rows_.value_rows; d += 32)
      for (int64_t c = 0; c < width; c += 32)
        tile_product<true>(rows_.values + d * kBlock + a, kBlock, weights_ + a / 2 * width + c, width, b - a, sums + d * width + c, width);
  }

  void cap(int64_t count) {
    for (int64_t i = 0; i < count; ++i) scores_[i] = float(call_.softcap) * std::tanh(scores_[i] * float(call_.scale / call_.softcap));
  }

  template <int N> void hide(const Tile& tile, int64_t key) {
    for (int c = 0; c < N; ++c) {
      IntVec<float> from = load_ints<float>(low_ + tile.first + c * 16), to = load_ints<float>(high_ + tile.first + c * 16);
      for (int64_t j = 0; j < kPanelKeys; ++j) {
        float* row = scores_ + (j * N + c) * 16;
        IntVec<float> at = IntVec<float>{} + int32_t(key + j), seen = (from <= at) & (to > at);
        store(row, seen ? load(row) : fill(-std::numeric_limits<float>::infinity()));
      }
    }
  }

  // The shift of the exponents lags behind the maximum until that is 2^8 times larger, so that sums are rarely rescaled: a
  // shift is a common factor of sums and total. Here: the new maxima, and whether any is that much larger.
  template <int N> bool exceeds(const Tile& tile) {
    __mmask16 left = 0;
    for (int c = 0; c < N; ++c) {
      Vec<float> now = load(scores_ + c * 16);
      for (int64_t j = 1; j < kPanelKeys; ++j) now = larger(now, load(scores_ + (j * N + c) * 16));
      now *= fill(factor_);
      store(maxima_ + c * 16, now);
      left |= _mm512_cmp_ps_mask((__m512)now, (__m512)(load(most_ + tile.first + c * 16) + fill(8.0f)), _CMP_GT_OQ);
    }
    return left != 0;
  }

  template <int N> void shift(const Tile& tile) {
    float *most = most_ + tile.first, *total = total_ + tile.first, *sums = sums_ + tile.first * rows_.value_rows;
    for (int c = 0; c < N; ++c) {
      Vec<float> before = load(most + c * 16), after = larger(before, load(maxima_ + c * 16));
      Vec<float> none = fill(-std::numeric_limits<float>::infinity()), keep = exp2_up_to_8(after == none ? Vec<float>{} : before - after);
      store(most + c * 16, after), store(total + c * 16, load(total + c * 16) * keep);
      for (int64_t d = 0; d < rows_.value_rows; ++d) store(sums + (d * N + c) * 16, load(sums + (d * N + c) * 16) * keep);
    }
  }

  template <int N> void weigh(const Tile& tile, const float* times, int64_t count, uint32_t* weights) {
    typedef Vec<float> V;
    const V none = fill(-std::numeric_limits<float>::infinity()), factor = fill(factor_);
    for (int c = 0; c < N; ++c) {
      V most = load(most_ + tile.first + c * 16), shift = most == none ? V{} : most, sum = load(total_ + tile.first + c * 16);
      for (int64_t j = 0; j < kPanelKeys; j += 2) {
        V even = exp2_up_to_8(fma(load(scores_ + (j * N + c) * 16), factor, -shift));
        V odd = exp2_up_to_8(fma(load(scores_ + ((j + 1) * N + c) * 16), factor, -shift));
        if (times) even *= fill(j < count ? times[j] : 1.0f), odd *= fill(j + 1 < count ? times[j + 1] : 1.0f);
        sum += even + odd;
        _mm512_storeu_si512(weights + (j / 2 * N + c) * 16, narrow_pair((__m512)even, (__m512)odd));
      }
      store(total_ + tile.first + c * 16, sum);
    }
  }

  void finish(const Span& span, const Lane* lanes) {
    __m512i columns[16];
    for (const Tile& tile : tiles_) {
      int64_t width = tile.vectors * 16;
      for (int64_t first = 0; first < tile.lanes; first += 16) {
        int64_t lanes_here = std::min<int64_t>(16, tile.lanes - first);
        float inverse[16];
        for (int64_t i = 0; i < lanes_here; ++i) {
          float total = total_[tile.first + first + i], shift = most_[tile.first + first + i];
          inverse[i] = total > 0 ? 1 / total : 0;
          *row_of<float>(call_, call_.lse, span, lanes[tile.first + first + i]) =
              total > 0 ? shift * float(kLn2) + std::log(total) : -std::numeric_limits<float>::infinity();
        }
        for (int64_t d = 0; d < call_.v_dim; d += 16) {
          const float* from = sums_ + tile.first * rows_.value_rows + d * width + first;
          for (int64_t i = 0; i < 16; ++i) columns[i] = _mm512_loadu_si512(from + i * width);
          transpose(columns);
          __mmask16 there = call_.v_dim - d >= 16 ? __mmask16(0xFFFF) : __mmask16((1 << (call_.v_dim - d)) - 1);
          for (int64_t i = 0; i < lanes_here; ++i) {
            __m512 row = _mm512_mul_ps(_mm512_castsi512_ps(columns[i]), _mm512_set1_ps(inverse[i]));
            BFloat16* out = row_of<BFloat16>(call_, call_.out, span, lanes[tile.first + first + i]) + d;
            _mm256_mask_storeu_epi16(out, there, (__m256i)_mm512_cvtneps_pbh(row));
          }
        }
      }
    }
  }
};

}  // namespace dil
#endif
