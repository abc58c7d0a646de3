// Forward in bfloat16 with tile products.
#pragma once
#include "amx.h"
#ifdef DILCOMPILE_TILES

namespace dil {

class TileForward {
  static constexpr int64_t kMaxLanes = 1152, kWideTile = 32;

 public:
  explicit TileForward(const Call& call)
      : call_(call),
        rows_(call),
        factor_(float(exponent_factor(call))),
        biased_(call.bias.data),
        most_unit_(biased_ ? 1.0f : float(kLn2)),
        pairs_(rows_.key_row / 2),
        bias_(call),
        dropout_(call, kMaxLanes + kWideTile) {
    int64_t lanes = kMaxLanes + kWideTile;
    queries_.take(lanes * pairs_), sums_.take(lanes * rows_.value_rows), most_.take(lanes), total_.take(lanes);
    low_.take(lanes), high_.take(lanes), scores_.take(kPanelKeys * kWideTile), weights_.take(kTileBlock / 2 * kWideTile);
    maxima_.take(kWideTile);
    if (biased_) numbers_.take(kTileBlock * kWideTile);
  }

  void run(const Span& span) {
    TileRegisters registers;
    Plan plan(call_, span);
    plan.each_group(kMaxLanes, [&](const Lane* lanes, int64_t count) {
      begin(span, lanes, count);
      attend(span, plan.shared, lanes), attend(span, plan.windowed, lanes);
      finish(span, lanes);
    });
  }

 private:
  const Call& call_;
  TileRows rows_;
  float factor_;
  // The maxima are exponents of 2, but scores where a bias may be the lowest number, which times log2(e) is infinite.
  bool biased_;
  float most_unit_;
  int64_t pairs_;
  std::vector<Tile> tiles_;
  Buffer<uint32_t> queries_, weights_;
  Buffer<float> sums_, most_, total_, scores_, maxima_, numbers_;
  Bias<float> bias_;
  Dropout<float> dropout_;
  Buffer<int32_t> low_, high_;

  void begin(const Span& span, const Lane* lanes, int64_t count) {
    tiles_ = wide_tiles_of(count, kWideTile);
    for (const Tile& tile : tiles_) {
      int64_t first = tile.first, width = tile.vectors * 16;
      dropout_.begin(span, tile, lanes);
      read_pairs(call_, call_.q, span, tile, lanes, call_.head_dim, queries_ + first * pairs_);
      std::fill_n(most_ + first, width, -std::numeric_limits<float>::infinity());
      std::fill_n(total_ + first, width, 0.0f);
      std::fill_n(sums_ + first * rows_.value_rows, width * rows_.value_rows, 0.0f);
    }
  }

  void attend(const Span& span, const Keys& keys, const Lane* lanes) {
    auto use = [&](const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
      if (biased_)
        bias_.read(span, tile, lanes, keys.positions + a, std::min(b, keys.count) - a, b - a,
                   {numbers_ + (bias_.by_key ? a : a * 16), 16, kTileBlock * 16});
      dropout_.read(span, keys, a, b);
      with_vectors(tile.vectors, std::integer_sequence<int, 2>(),
                   [&](auto n) { this->template block<n()>(tile, a, b, keys); });
    };
    each_block<BFloat16>(call_, span, keys, lanes, tiles_, +low_, +high_, rows_, use, [](const KeyBlock&) {});
  }

  template <int N>
  void block(const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
    constexpr int64_t panel = kPanelKeys * 16;
    const uint32_t* queries = queries_ + tile.first * pairs_;
    int64_t summed = a;
    for (int64_t j = a; j < b; j += kPanelKeys) {
      for (int64_t c = 0; c < N; c += 2)
        tile_product<false>({rows_.keys + j * 32, kTileBlock * 32}, {queries + c * pairs_ * 16, pairs_ * 16}, rows_.key_row,
                            {scores_ + c * panel, panel});
      if (call_.softcap != 0) cap_scores(call_, +scores_, kPanelKeys * N * 16);
      if (biased_)
        add_bias<N>(+scores_, float(call_.softcap != 0 ? 1 : call_.scale), numbers_ + (bias_.by_key ? j : j * 16),
                    kTileBlock * 16, bias_.by_key);
      if (keys.start + j < tile.low_max || keys.start + j + kPanelKeys > tile.high_min)
        hide_scores<N>(+scores_, low_ + tile.first, high_ + tile.first, keys.start + j);
      if (exceeds<N>(tile)) {
        add_up<N>(tile, summed, j), shift<N>(tile);
        summed = j;
      }
      with_flag(biased_, [&](auto biased) {
        with_flag(dropout_.on, [&](auto dropped) { this->template weigh<N, biased(), dropped()>(tile, keys, j); });
      });
    }
    add_up<N>(tile, summed, b);
  }

  // The weights of keys a to b times the values.
  template <int N>
  void add_up(const Tile& tile, int64_t a, int64_t b) {
    constexpr int64_t column = kTileBlock / 2 * 16;
    int64_t rows = rows_.value_rows;
    float* sums = sums_ + tile.first * rows;
    if (a == b) return;
    for (int64_t d = 0; d < rows; d += 32)
      for (int64_t c = 0; c < N; c += 2)
        tile_product<true>({rows_.values + a * rows + d * 32, rows * 32}, {weights_ + c * column + a / 2 * 16, column}, b - a,
                           {sums + (c * rows + d) * 16, rows * 16});
  }

  // The shift of the exponents lags behind the maximum until that is 2^8 times larger, so that sums are rarely rescaled: a
  // shift is a common factor of sums and total. Here: the new maxima, and whether any is that much larger.
  template <int N>
  bool exceeds(const Tile& tile) {
    __mmask16 left = 0;
    const Vec<float> margin = fill(8 * float(kLn2) / most_unit_);
    for (int c = 0; c < N; ++c) {
      const float* scores = scores_ + c * kPanelKeys * 16;
      Vec<float> now = load(scores);
      for (int64_t j = 1; j < kPanelKeys; ++j) now = larger(now, load(scores + j * 16));
      if (!biased_) now *= fill(factor_);
      store(maxima_ + c * 16, now);
      left |= _mm512_cmp_ps_mask((__m512)now, (__m512)(load(most_ + tile.first + c * 16) + margin), _CMP_GT_OQ);
    }
    return left != 0;
  }

  template <int N>
  void shift(const Tile& tile) {
    float *most = most_ + tile.first, *total = total_ + tile.first, *sums = sums_ + tile.first * rows_.value_rows;
    for (int c = 0; c < N; ++c) {
      Vec<float> before = load(most + c * 16), after = larger(before, load(maxima_ + c * 16));
      Vec<float> none = fill(-std::numeric_limits<float>::infinity()),
                 keep = exp2_up_to_8(after == none ? Vec<float>{} : (before - after) * fill(most_unit_ * float(kLog2E)));
      store(most + c * 16, after), store(total + c * 16, load(total + c * 16) * keep);
      float* column = sums + c * rows_.value_rows * 16;
      for (int64_t d = 0; d < rows_.value_rows; ++d) store(column + d * 16, load(column + d * 16) * keep);
    }
  }

  template <int N, bool kBiased, bool kDropped>
  void weigh(const Tile& tile, const KeyBlock& keys, int64_t key) {
    typedef Vec<float> V;
    const float* times = keys.times ? keys.times + key : nullptr;
    const int64_t count = keys.count - key;
    uint32_t* weights = weights_ + key / 2 * 16;
    const V none = fill(-std::numeric_limits<float>::infinity()), factor = fill(factor_);
    for (int c = 0; c < N; ++c) {
      V most = load(most_ + tile.first + c * 16), shift = most == none ? V{} : -most, sum = load(total_ + tile.first + c * 16);
      const float* scores = scores_ + c * kPanelKeys * 16;
      for (int64_t j = 0; j < kPanelKeys; j += 2) {
        V even = load(scores + j * 16), odd = load(scores + j * 16 + 16);
        if constexpr (kBiased) {
          even = exp2_fast((even + shift) * factor), odd = exp2_fast((odd + shift) * factor);
        } else {
          even = exp2_fast(fma(even, factor, shift)), odd = exp2_fast(fma(odd, factor, shift));
        }
        if (times) even *= fill(j < count ? times[j] : 1.0f), odd *= fill(j + 1 < count ? times[j + 1] : 1.0f);
        sum += even + odd;
        if constexpr (kDropped) {
          int64_t lane = tile.first + c * 16;
          even *= dropout_.keep(lane, key + j), odd *= dropout_.keep(lane, key + j + 1);
        }
        _mm512_storeu_si512(weights + (c * kTileBlock / 2 + j / 2) * 16, narrow_pair((__m512)even, (__m512)odd));
      }
      store(total_ + tile.first + c * 16, sum);
    }
  }

  void finish(const Span& span, const Lane* lanes) {
    for (const Tile& tile : tiles_) {
      for (int64_t i = 0; i < tile.lanes; ++i) {
        float &total = total_[tile.first + i], shift = most_[tile.first + i];
        *row_of<float>(call_, call_.lse, span, lanes[tile.first + i]) =
            total > 0 ? shift * most_unit_ + std::log(total) : -std::numeric_limits<float>::infinity();
        total = total > 0 ? 1 / total : 0;
      }
      write_rows(call_, call_.out, span, tile, lanes, call_.v_dim, sums_ + tile.first * rows_.value_rows, rows_.value_rows,
                 total_ + tile.first);
    }
  }
};

}  // namespace dil
#endif
