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

// Matrices lie in columns of 64 bytes, so that a tile is 1024 bytes in a row: other strides make loads and stores of different
// buffers meet in the same cache sets. c [32][32] = or += a [32][depth] * b [depth / 2][32 pairs], in steps of 32 of the depth;
// `_column` is how many elements further the next column begins.
struct TileProduct {
  const uint16_t* a;
  int64_t a_column;
  const uint32_t* b;
  int64_t b_column, depth;
  float* c;
  int64_t c_column;
  bool add;
  int64_t done = 0;

  // One step; true when it was the last. Registers 0 to 3 hold c between steps, so one product runs at a time.
  inline __attribute__((always_inline)) bool step() {
    // The compiler doesn't know that loads into tile registers read memory.
    asm volatile("" ::: "memory");
    if (done == 0) {
      if (add) {
        _tile_loadd(0, c, 64); _tile_loadd(1, c + c_column, 64);
        _tile_loadd(2, c + 256, 64); _tile_loadd(3, c + c_column + 256, 64);
      } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      }
    }
    const uint16_t* left = a + done / 32 * a_column;
    const uint32_t* right = b + done / 2 * 16;
    _tile_loadd(4, left, 64); _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + b_column, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + 512, 64);
    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    done += 32;
    if (done < depth) return false;
    _tile_stored(0, c, 64); _tile_stored(1, c + c_column, 64);
    _tile_stored(2, c + 256, 64); _tile_stored(3, c + c_column + 256, 64);
    return true;
  }
};

// Products that wait to be done a step at a time between vector work: the tile unit and the vector units then run at once.
class TileQueue {
 public:
  void push_urgent(const TileProduct& product) { urgent_.push(product); }
  void push(const TileProduct& product) {
    if (later_.full()) drain();
    later_.push(product);
  }
  inline __attribute__((always_inline)) void step() {
    if (now_ == nullptr) {
      if (urgent_.empty() && later_.empty()) return;
      now_ = urgent_.empty() ? &later_ : &urgent_;
    }
    if (now_->step()) now_ = nullptr;
  }
  void drain_urgent() {
    while (!urgent_.empty()) step();
  }
  void drain() {
    while (!urgent_.empty() || !later_.empty()) step();
  }

 private:
  class Line {
   public:
    bool empty() const { return first_ == last_; }
    bool full() const { return last_ == kMost; }
    void push(const TileProduct& product) { products_[last_++] = product; }
    inline __attribute__((always_inline)) bool step() {
      if (!products_[first_].step()) return false;
      if (++first_ == last_) first_ = last_ = 0;
      return true;
    }

   private:
    static constexpr int64_t kMost = 64;
    TileProduct products_[kMost];
    int64_t first_ = 0, last_ = 0;
  };
  Line urgent_, later_;
  Line* now_ = nullptr;
};

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

// Keys, columns of [kBlock][dim], and values transposed, columns of [dim][kBlock]; zeros up to whole tiles.
class TileRows {
 public:
  static constexpr int64_t kBlock = 128, kStep = 32;
  const int64_t key_row, value_rows;
  Buffer<uint16_t> keys, values;

  explicit TileRows(const Call& call) : key_row((call.head_dim + 31) / 32 * 32), value_rows((call.v_dim + 31) / 32 * 32), call_(call) {
    keys.take(kBlock * key_row), values.take(kBlock * value_rows), side_by_side_.take(32 * value_rows);
  }

  void gather(const Span& span, const int32_t* positions, int64_t count) {
    const BFloat16* from = key_rows<BFloat16>(call_.k, span);
    int64_t whole = (count + 31) / 32 * 32;
    for (int64_t i = 0; i < whole; ++i)
      copy(i < count ? from + int64_t(positions[i]) * call_.k.row : nullptr, keys + i * 32, kBlock * 32, call_.head_dim, key_row);
    from = key_rows<BFloat16>(call_.v, span);
    for (int64_t first = 0; first < whole; first += 32) {
      for (int64_t i = first; i < first + 32; ++i)
        copy(i < count ? from + int64_t(positions[i]) * call_.v.row : nullptr, side_by_side_ + (i - first) * 32, 32 * 32, call_.v_dim, value_rows);
      for (int64_t d = 0; d < value_rows; d += 32) turn(side_by_side_ + d * 32, values + (first * value_rows + d * 32));
    }
  }

 private:
  const Call& call_;
  Buffer<uint16_t> side_by_side_;

  // A row into columns of 32, zeros behind it; no row: all zeros.
  static void copy(const BFloat16* from, uint16_t* to, int64_t column, int64_t dim, int64_t row) {
    for (int64_t d = 0; d < row; d += 32) {
      int64_t left = from ? std::clamp<int64_t>(dim - d, 0, 32) : 0;
      __mmask32 there = left == 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      _mm512_storeu_si512(to + d / 32 * column, _mm512_maskz_loadu_epi16(there, from + d));
    }
  }

  // 32 rows of 32 dims into 32 columns: pairs of rows become elements of 32 bits, which are transposed.
  static void turn(const uint16_t* from, uint16_t* to) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      __m512i one = _mm512_loadu_si512(from + 2 * i * 32), other = _mm512_loadu_si512(from + (2 * i + 1) * 32);
      low[i] = _mm512_unpacklo_epi16(one, other), high[i] = _mm512_unpackhi_epi16(one, other);
    }
    transpose(low), transpose(high);
    // Interleaving works inside 128 bits, so four dims of eight come from `low` and four from `high`.
    for (int i = 0; i < 16; ++i) {
      int64_t dim = i / 4 * 8 + i % 4;
      _mm512_storeu_si512(to + dim * 32, low[i]), _mm512_storeu_si512(to + (dim + 4) * 32, high[i]);
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
    low_.take(lanes), high_.take(lanes), both_scores_.take(2 * kPanelKeys * kUnit * kMaxUnits), both_weights_.take(TileRows::kBlock * kUnit * kMaxUnits);
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
  TileQueue queue_;
  Buffer<uint32_t> queries_, both_weights_;
  Buffer<float> sums_, most_, total_, both_scores_, maxima_;
  uint32_t* weights_ = nullptr;
  float* scores_ = nullptr;
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

  // Queries in pairs of dims: columns of [dim / 2][lanes].
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
        uint32_t* to = queries_ + (tile.first + first) * pairs_ + d / 2 * 16;
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, rows[i]);
      }
    }
  }

  void attend(const Span& span, const Keys& keys, const Lane* lanes) {
    auto use = [&](const Tile& tile, int64_t a, int64_t b, int64_t start, const float* times, int64_t count) {
      if (tile.vectors == 4) block<4>(tile, a, b, start, times, count);
      if (tile.vectors == 2) block<2>(tile, a, b, start, times, count);
    };
    each_block<BFloat16>(call_, span, keys, lanes, tiles_, +low_, +high_, rows_, use, [&](const int32_t*, int64_t) { queue_.drain(); });
  }

  // While the weights of a panel are computed, the tile unit works on the scores of the next and on earlier weights times values.
  template <int N> void block(const Tile& tile, int64_t a, int64_t b, int64_t start, const float* times, int64_t count) {
    weights_ = weights_ == +both_weights_ ? both_weights_ + TileRows::kBlock / 2 * kUnit * kMaxUnits : +both_weights_;
    int64_t summed = a;
    push_scores<N>(tile, a);
    for (int64_t j = a; j < b; j += kPanelKeys) {
      queue_.drain_urgent();
      scores_ = panel(j);
      if (call_.softcap != 0) cap(kPanelKeys * N * 16);
      if (start + j < tile.low_max || start + j + kPanelKeys > tile.high_min) hide<N>(tile, start + j);
      if (exceeds<N>(tile)) {
        push_sums<N>(tile, summed, j), queue_.drain(), shift<N>(tile);
        summed = j;
      }
      if (j + kPanelKeys < b) push_scores<N>(tile, j + kPanelKeys);
      weigh<N>(tile, times ? times + j : nullptr, count - j, weights_ + j / 2 * 16);
    }
    push_sums<N>(tile, summed, b);
  }

  float* panel(int64_t j) const { return both_scores_ + j / kPanelKeys % 2 * kPanelKeys * kUnit * kMaxUnits; }

  template <int N> void push_scores(const Tile& tile, int64_t j) {
    const uint32_t* queries = queries_ + tile.first * pairs_;
    for (int64_t c = 0; c < N; c += 2)
      queue_.push_urgent({rows_.keys + j * 32, TileRows::kBlock * 32, queries + c * pairs_ * 16, pairs_ * 16, rows_.key_row,
                          panel(j) + c * kPanelKeys * 16, kPanelKeys * 16, false});
  }

  // The weights of keys a to b times the values.
  template <int N> void push_sums(const Tile& tile, int64_t a, int64_t b) {
    constexpr int64_t weights_column = TileRows::kBlock / 2 * 16;
    int64_t rows = rows_.value_rows;
    float* sums = sums_ + tile.first * rows;
    if (a == b) return;
    for (int64_t d = 0; d < rows; d += 32)
      for (int64_t c = 0; c < N; c += 2)
        queue_.push({rows_.values + a * rows + d * 32, rows * 32, weights_ + c * weights_column + a / 2 * 16, weights_column, b - a,
                     sums + (c * rows + d) * 16, rows * 16, true});
  }

  void cap(int64_t count) {
    for (int64_t i = 0; i < count; ++i) scores_[i] = float(call_.softcap) * std::tanh(scores_[i] * float(call_.scale / call_.softcap));
  }

  template <int N> void hide(const Tile& tile, int64_t key) {
    for (int c = 0; c < N; ++c) {
      IntVec<float> from = load_ints<float>(low_ + tile.first + c * 16), to = load_ints<float>(high_ + tile.first + c * 16);
      for (int64_t j = 0; j < kPanelKeys; ++j) {
        float* row = scores_ + (c * kPanelKeys + j) * 16;
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
      const float* scores = scores_ + c * kPanelKeys * 16;
      Vec<float> now = load(scores);
      for (int64_t j = 1; j < kPanelKeys; ++j) now = larger(now, load(scores + j * 16));
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
      float* column = sums + c * rows_.value_rows * 16;
      for (int64_t d = 0; d < rows_.value_rows; ++d) store(column + d * 16, load(column + d * 16) * keep);
    }
  }

  template <int N> void weigh(const Tile& tile, const float* times, int64_t count, uint32_t* weights) {
    typedef Vec<float> V;
    const V none = fill(-std::numeric_limits<float>::infinity()), factor = fill(factor_);
    V shift[N], sum[N];
    for (int c = 0; c < N; ++c) {
      V most = load(most_ + tile.first + c * 16);
      shift[c] = most == none ? V{} : -most, sum[c] = load(total_ + tile.first + c * 16);
    }
    for (int64_t j = 0; j < kPanelKeys; j += 2) {
      V often = fill(times && j < count ? times[j] : 1.0f), next = fill(times && j + 1 < count ? times[j + 1] : 1.0f);
      for (int c = 0; c < N; ++c) {
        V even = exp2_fast(fma(load(scores_ + (c * kPanelKeys + j) * 16), factor, shift[c]));
        V odd = exp2_fast(fma(load(scores_ + (c * kPanelKeys + j + 1) * 16), factor, shift[c]));
        if (times) even *= often, odd *= next;
        sum[c] += even + odd;
        _mm512_storeu_si512(weights + (c * TileRows::kBlock / 2 + j / 2) * 16, narrow_pair((__m512)even, (__m512)odd));
      }
      queue_.step();
    }
    for (int c = 0; c < N; ++c) store(total_ + tile.first + c * 16, sum[c]);
  }

  // 2^x for x <= 127 to 1e-7 of itself: the fraction by a polynomial, the whole part as the exponent.
  static Vec<float> exp2_fast(Vec<float> x) {
    Vec<float> rest = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec<float> p = fill(1.8775765784084797e-3f);
    p = fma(p, rest, fill(8.989340625703335e-3f));
    p = fma(p, rest, fill(5.582631751894951e-2f));
    p = fma(p, rest, fill(2.4015361070632935e-1f));
    p = fma(p, rest, fill(6.931530833244324e-1f));
    p = fma(p, rest, fill(9.999999403953552e-1f));
    return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);
  }

  void finish(const Span& span, const Lane* lanes) {
    __m512i columns[16];
    for (const Tile& tile : tiles_) {
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
          const float* from = sums_ + (tile.first + first) * rows_.value_rows + d * 16;
          for (int64_t i = 0; i < 16; ++i) columns[i] = _mm512_loadu_si512(from + i * 16);
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
