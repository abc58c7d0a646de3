// Forward in bfloat16 with tile products.
#pragma once
#include "amx.h"
#ifdef DILCOMPILE_TILES

namespace dil {

class TileForward {
  static constexpr int64_t kMaxLanes = 2304, kWideTile = 32, kKeys = 128;
  static constexpr float kLargestExponent = 1 << 20, kMargin = 32;

 public:
  explicit TileForward(const Call& call)
      : call_(call),
        rows_(call),
        factor_(float(exponent_factor(call))),
        unit_(float(score_unit(call))),
        margin_(std::min(kMargin / factor_, std::numeric_limits<float>::max())),
        largest_factor_(call.softcap == 0 ? 1.0f : float(std::max(1.0, call.scale))),
        biased_(call.bias.data),
        pairs_(rows_.key_row / 2),
        bias_(call),
        dropout_(call, kMaxLanes + kWideTile) {
    int64_t lanes = kMaxLanes + kWideTile;
    queries_.take(lanes * pairs_), sums_.take(lanes * rows_.value_rows), most_.take(lanes), total_.take(lanes);
    largest_.take(lanes), least_.take(lanes);
    low_.take(lanes), high_.take(lanes), scores_.take(kPanelKeys * kWideTile), weights_.take(kKeys / 2 * kWideTile);
    maxima_.take(kWideTile);
    if (biased_) numbers_.take(kKeys * kWideTile);
  }

  void run(const Span& span) {
    TileRegisters registers;
    Plan plan(call_, span);
    plan.each_batch(kMaxLanes, kWideTile,
                    [&](const Lane* lanes, const std::vector<Group>& groups, const std::vector<Keys>& lists) {
      begin(span, lanes, groups);
      for (size_t n = 0; n < lists.size(); ++n)
        attend(span, lists[n], n + 1 < lists.size() ? &lists[n + 1] : nullptr, lanes);
      finish(span, lanes);
    });
  }

 private:
  const Call& call_;
  TileRows rows_;
  float factor_, unit_, margin_;
  float largest_factor_;  // of products, before the scores are capped
  bool biased_;
  int64_t pairs_;
  std::vector<Tile> tiles_;
  Buffer<uint32_t> queries_, weights_;
  Buffer<float> sums_, most_, total_, scores_, maxima_, numbers_;
  Buffer<float> largest_, least_;  // norm of a tile's queries, shift of its exponents; at its first lane
  Bias<float> bias_;
  Dropout<float> dropout_;
  Buffer<int32_t> low_, high_;
  float often_[TileRows::kBlock];   // how often a block's keys count, as steps of the exponent
  const float* counted_ = nullptr;  // what they were made from

  void begin(const Span& span, const Lane* lanes, const std::vector<Group>& groups) {
    tiles_ = wide_tiles_of(groups, kWideTile);
    for (const Tile& tile : tiles_) {
      int64_t first = tile.first, width = tile.vectors * 16;
      dropout_.begin(span, tile, lanes);
      largest_[first] = read_pairs(call_, call_.q, span, tile, lanes, call_.head_dim, queries_ + first * pairs_);
      least_[first] = -std::numeric_limits<float>::infinity();
      std::fill_n(most_ + first, width, -std::numeric_limits<float>::infinity());
      std::fill_n(total_ + first, width, 0.0f);
      std::fill_n(sums_ + first * rows_.value_rows, width * rows_.value_rows, 0.0f);
    }
  }

  void attend(const Span& span, const Keys& keys, const Keys* next, const Lane* lanes) {
    counted_ = nullptr;
    auto use = [&](const Tile& tile, int64_t a, int64_t b, const KeyBlock& all) {
      if (all.times) count(all);
      for (int64_t first = a; first < b; first += kKeys) {
        int64_t count = std::min(kKeys, b - first);
        KeyBlock keys{all.start + first, all.count - first, all.positions + first, all.rows + first,
                      all.times ? all.times + first : nullptr, all.ahead};
        if (biased_)
          bias_.read(span, tile, lanes, keys.positions, std::min(count, keys.count), count, {+numbers_, 16, kKeys * 16});
        dropout_.read(span, keys, 0, count);
        with_vectors(tile.vectors, std::integer_sequence<int, 2>(),
                     [&](auto n) { this->template block<n()>(tile, first, count, keys); });
      }
    };
    each_block<BFloat16>(call_, span, keys, next, lanes, tiles_, +low_, +high_, rows_, use, [](const KeyBlock&) {});
  }

  void count(const KeyBlock& keys) {
    if (counted_ == keys.times) return;
    counted_ = keys.times;
    for (int64_t j = 0; j < TileRows::kBlock; ++j)
      often_[j] = j < keys.count && keys.times[j] != 1 ? NarrowExp2::kStep * std::log2(keys.times[j]) : 0.0f;
  }

  // Keys `first` to `first + count` of those that are held; `keys`: these.
  template <int N>
  void block(const Tile& tile, int64_t first, int64_t count, const KeyBlock& keys) {
    constexpr int64_t panel = kPanelKeys * 16;
    const uint32_t* queries = queries_ + tile.first * pairs_;
    // No exponent is larger than this. A comparison with what is no number is false.
    float most = largest_[tile.first] * rows_.largest_key * factor_ * largest_factor_;
    bool narrow = !call_.exact_lse && !biased_ && !dropout_.on && most < kLargestExponent;
    bool settled = !biased_ && most <= least_[tile.first] * factor_ + kMargin;
    int64_t summed = 0;
    for (int64_t j = 0; j < count; j += kPanelKeys) {
      keys.ahead->step();
      for (int64_t c = 0; c < N; c += 2)
        tile_product<false>({rows_.keys + (first + j) * rows_.key_row, 1024}, {queries + c * pairs_ * 16, pairs_ * 16}, rows_.key_row,
                            {scores_ + c * panel, panel});
      if (call_.softcap != 0) cap_scores(call_, +scores_, kPanelKeys * N * 16);
      if (biased_)
        add_bias<N>(+scores_, float(call_.softcap != 0 ? 1 : call_.scale), numbers_ + (bias_.by_key ? j : j * 16),
                    kKeys * 16, bias_.by_key);
      if (keys.start + j < tile.low_max || keys.start + j + kPanelKeys > tile.high_min)
        hide_scores<N>(+scores_, low_ + tile.first, high_ + tile.first, keys.start + j);
      if (!settled && exceeds<N>(tile)) {
        add_up<N>(tile, first, summed, j), shift<N>(tile);
        summed = j;
      }
      if (narrow) {
        with_flag(keys.times != nullptr, [&](auto times) { this->template weigh_narrow<N, times()>(tile, first, j); });
      } else {
        with_flag(dropout_.on, [&](auto dropped) { this->template weigh<N, dropped()>(tile, keys, j); });
      }
    }
    add_up<N>(tile, first, summed, count);
  }

  // The weights of keys a to b, counted from `first`, times the values.
  template <int N>
  void add_up(const Tile& tile, int64_t first, int64_t a, int64_t b) {
    constexpr int64_t column = kKeys / 2 * 16;
    int64_t rows = rows_.value_rows;
    float* sums = sums_ + tile.first * rows;
    if (a == b) return;
    for (int64_t d = 0; d < rows; d += 32)
      for (int64_t c = 0; c < N; c += 2)
        tile_product<true>({rows_.values + (first + a) * rows + d * 32, rows * 32}, {weights_ + c * column + a / 2 * 16, column}, b - a,
                           {sums + (c * rows + d) * 16, rows * 16});
  }

  // The shift of the exponents lags behind the maximum until that is 2^32 times larger, so that sums are rarely rescaled: a
  // shift is a common factor of sums and total. Here: the new maxima, and whether any is that much larger. Nobody asks where
  // the norms of queries and keys say that none can be.
  template <int N>
  bool exceeds(const Tile& tile) {
    __mmask16 left = 0;
    const Vec<float> margin = fill(margin_);
    for (int c = 0; c < N; ++c) {
      const float* scores = scores_ + c * kPanelKeys * 16;
      Vec<float> now = load(scores);
      for (int64_t j = 1; j < kPanelKeys; ++j) now = larger(now, load(scores + j * 16));
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
                 keep = exp2_up_to_8(after == none ? Vec<float>{} : (before - after) * fill(factor_));
      store(most + c * 16, after), store(total + c * 16, load(total + c * 16) * keep);
      float* column = sums + c * rows_.value_rows * 16;
      for (int64_t d = 0; d < rows_.value_rows; ++d) store(column + d * 16, load(column + d * 16) * keep);
    }
    least_[tile.first] = *std::min_element(most, most + tile.lanes);
  }

  // The weights of a panel where nothing is to be done with them but to add them up.
  template <int N, bool kTimes>
  void weigh_narrow(const Tile& tile, int64_t first, int64_t key) {
    typedef Vec<float> V;
    uint32_t* weights = weights_ + key / 2 * 16;
    const V none = fill(-std::numeric_limits<float>::infinity()), factor = fill(factor_ * NarrowExp2::kStep);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    const NarrowExp2 narrow;
    for (int c = 0; c < N; ++c) {
      V most = load(most_ + tile.first + c * 16);
      V shift = fma(most == none ? V{} : -most, factor, fill(NarrowExp2::kZero));
      __m512 sum = (__m512)load(total_ + tile.first + c * 16);
      const float* scores = scores_ + c * kPanelKeys * 16;
      for (int64_t j = 0; j < kPanelKeys; j += 2) {
        V even = fma(load(scores + j * 16), factor, shift), odd = fma(load(scores + j * 16 + 16), factor, shift);
        if constexpr (kTimes) even += fill(often_[first + key + j]), odd += fill(often_[first + key + j + 1]);
        __m512i pairs = narrow(even, odd);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs, ones);
        _mm512_storeu_si512(weights + (c * kKeys / 2 + j / 2) * 16, pairs);
      }
      store(total_ + tile.first + c * 16, (Vec<float>)sum);
    }
  }

  template <int N, bool kDropped>
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
        // Differences first: a bias may hide every key of a query with the lowest number, which times log2(e) is infinite.
        even = exp2_fast((even + shift) * factor), odd = exp2_fast((odd + shift) * factor);
        if (times) even *= fill(j < count ? times[j] : 1.0f), odd *= fill(j + 1 < count ? times[j + 1] : 1.0f);
        sum += even + odd;
        if constexpr (kDropped) {
          int64_t lane = tile.first + c * 16;
          even *= dropout_.keep(lane, key + j), odd *= dropout_.keep(lane, key + j + 1);
        }
        _mm512_storeu_si512(weights + (c * kKeys / 2 + j / 2) * 16, narrow_pair((__m512)even, (__m512)odd));
      }
      store(total_ + tile.first + c * 16, sum);
    }
  }

  void finish(const Span& span, const Lane* lanes) {
    for (const Tile& tile : tiles_) {
      for (int64_t i = 0; i < tile.lanes; ++i) {
        float &total = total_[tile.first + i], shift = most_[tile.first + i];
        *row_of<float>(call_, call_.lse, span, lanes[tile.first + i]) =
            total == 0 ? -std::numeric_limits<float>::infinity() : shift * unit_ + std::log(total);
        total = total == 0 ? 0 : 1 / total;
      }
      write_rows(call_, call_.out, span, tile, lanes, call_.v_dim, sums_ + tile.first * rows_.value_rows, rows_.value_rows,
                 total_ + tile.first);
    }
  }
};

}  // namespace dil
#endif
