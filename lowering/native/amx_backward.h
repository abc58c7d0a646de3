// Backward in bfloat16 with tile products: weights and their gradients are narrowed, sums stay in float.
#pragma once
#include "amx.h"
#include "backward.h"
#ifdef DILCOMPILE_TILES

namespace dil {

// Keys and values as they lie, and the keys transposed.
class TileBackwardRows {
 public:
  static constexpr int64_t kBlock = 128, kStep = 32;
  Buffer<uint16_t> keys, values, turned;

  explicit TileBackwardRows(const Call& call) : call_(call) {
    keys.take(kBlock * up_to_32(call.head_dim)), turned.take(kBlock * up_to_32(call.head_dim));
    values.take(kBlock * up_to_32(call.v_dim));
  }

  void gather(const Span& span, const int32_t* rows, int64_t count) {
    pack_rows(call_, call_.k, span, rows, count, call_.head_dim, +keys);
    pack_rows(call_, call_.v, span, rows, count, call_.v_dim, +values);
    turn_rows(+keys, count, call_.head_dim, +turned);
  }

 private:
  const Call& call_;
};

class TileBackward {
  static constexpr int64_t kMaxLanes = 512, kWideTile = 128, kBlock = TileBackwardRows::kBlock;

 public:
  explicit TileBackward(const Call& call)
      : call_(call),
        rows_(call),
        factor_(float(exponent_factor(call))),
        dim_(up_to_32(call.head_dim)),
        v_dim_(up_to_32(call.v_dim)),
        bias_(call),
        bias_gradient_(call),
        dropout_(call, kMaxLanes) {
    queries_.take(kMaxLanes * dim_ / 2), query_pairs_.take(kMaxLanes * dim_ / 2), sums_.take(kMaxLanes * dim_);
    grads_.take(kMaxLanes * v_dim_ / 2), grad_pairs_.take(kMaxLanes * v_dim_ / 2);
    lse_.take(kMaxLanes), delta_.take(kMaxLanes), scales_.take(kWideTile), low_.take(kMaxLanes), high_.take(kMaxLanes);
    scores_.take(kPanelKeys * kWideTile), slopes_.take(kPanelKeys * kWideTile);
    weights_.take(kBlock * kWideTile), slope_rows_.take(kBlock * kWideTile),
        slope_pairs_.take(kBlock / 2 * kWideTile);
    key_sums_.take(kBlock * dim_), value_sums_.take(kBlock * v_dim_);
    std::fill_n(+scales_, kWideTile, float(call.scale));
    clear_sums(kBlock);
    if (call.bias.data) numbers_.take(kPanelKeys * kWideTile);
  }

  void run(const Span& span, const KeySums<float>& into, const BiasSums<float>& bias) {
    TileRegisters registers;
    Plan plan(call_, span);
    plan.each_batch(kMaxLanes, 32,
                    [&](const Lane* lanes, const std::vector<Group>& groups, const std::vector<Keys>& lists) {
      begin(span, lanes, groups);
      for (size_t n = 0; n < lists.size(); ++n)
        attend(span, lists[n], n + 1 < lists.size() ? &lists[n + 1] : nullptr, lanes, into, bias);
      for (const Tile& tile : tiles_)
        write_rows(call_, call_.grad_q, span, tile, lanes, call_.head_dim, sums_ + tile.first * dim_, dim_, +scales_);
    });
  }

 private:
  const Call& call_;
  TileBackwardRows rows_;
  float factor_;
  int64_t dim_, v_dim_;
  std::vector<Tile> tiles_;
  Buffer<uint32_t> queries_, query_pairs_, grads_, grad_pairs_, slope_pairs_;
  Buffer<uint16_t> weights_, slope_rows_;
  Buffer<float> sums_, lse_, delta_, scales_, scores_, slopes_, key_sums_, value_sums_, numbers_;
  Bias<float> bias_;
  BiasGradient<float> bias_gradient_;
  Dropout<float> dropout_;
  Buffer<int32_t> low_, high_;

  void begin(const Span& span, const Lane* lanes, const std::vector<Group>& groups) {
    tiles_ = wide_tiles_of(groups, kWideTile);
    for (const Tile& tile : tiles_) {
      int64_t first = tile.first, width = tile.vectors * 16;
      dropout_.begin(span, tile, lanes);
      read_pairs(call_, call_.q, span, tile, lanes, call_.head_dim, queries_ + first * dim_ / 2);
      read_pairs(call_, call_.grad_out, span, tile, lanes, call_.v_dim, grads_ + first * v_dim_ / 2);
      read_lane_pairs(call_.q, span, tile, lanes, call_.head_dim, dim_, query_pairs_ + first * dim_ / 2);
      read_lane_pairs(call_.grad_out, span, tile, lanes, call_.v_dim, v_dim_, grad_pairs_ + first * v_dim_ / 2);
      std::fill_n(sums_ + first * dim_, width * dim_, 0.0f);
      for (int64_t i = 0; i < width; ++i) {
        const Lane& lane = lanes[first + std::min(i, tile.lanes - 1)];
        float delta = dot(row_of<BFloat16>(call_, call_.out, span, lane), row_of<BFloat16>(call_, call_.grad_out, span, lane));
        if (call_.grad_lse.data) delta -= *row_of<float>(call_, call_.grad_lse, span, lane);
        delta_[first + i] = delta;
        // Lanes without a query, and queries without keys: infinity makes every weight 0.
        float lse = *row_of<float>(call_, call_.lse, span, lane);
        bool used = i < tile.lanes && lse > -std::numeric_limits<float>::infinity();
        lse_[first + i] = used ? (call_.bias.data ? lse : float(lse * kLog2E)) : std::numeric_limits<float>::infinity();
      }
    }
  }

  float dot(const BFloat16* a, const BFloat16* b) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < call_.v_dim; d += 32) {
      __mmask32 there = first_of_32(call_.v_dim - d);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(there, a + d),
                             (__m512bh)_mm512_maskz_loadu_epi16(there, b + d));
    }
    return _mm512_reduce_add_ps(sum);
  }

  // The rows of a tile's lanes in pairs of lanes: columns of [lanes / 2][16 dims].
  void read_lane_pairs(const Operand& x, const Span& span, const Tile& tile, const Lane* lanes, int64_t dim, int64_t row,
                       uint32_t* to) {
    int64_t pairs = tile.vectors * 8;
    for (int64_t i = 0; i < pairs; ++i) {
      const BFloat16* one = row_of<BFloat16>(call_, x, span, lanes[tile.first + std::min(2 * i, tile.lanes - 1)]);
      const BFloat16* other = row_of<BFloat16>(call_, x, span, lanes[tile.first + std::min(2 * i + 1, tile.lanes - 1)]);
      for (int64_t d = 0; d < row; d += 16) {
        __mmask16 there = d < dim ? first_of_16(dim - d) : 0;
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, one + d));
        __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, other + d)), 16);
        _mm512_storeu_si512(to + (d / 16 * pairs + i) * 16, _mm512_or_si512(low, high));
      }
    }
  }

  void attend(const Span& span, const Keys& keys, const Keys* next, const Lane* lanes, const KeySums<float>& into,
              const BiasSums<float>& bias) {
    auto use = [&](const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
      dropout_.read(span, keys, a, b);
      with_vectors(tile.vectors, std::integer_sequence<int, 2, 4, 6, 8>(),
                   [&](auto n) { this->template block<n()>(span, tile, lanes, a, b, keys, bias); });
    };
    auto after = [&](const KeyBlock& keys) {
      for (int64_t i = 0; i < keys.count; ++i) {
        int64_t row = first_key_row(call_, span) + keys.rows[i];
        add_row(key_sums_ + i * 16, into.keys + row * into.key_row, call_.head_dim, float(call_.scale));
        add_row(value_sums_ + i * 16, into.values + row * into.value_row, call_.v_dim, 1.0f);
      }
      clear_sums((keys.count + TileBackwardRows::kStep - 1) / TileBackwardRows::kStep * TileBackwardRows::kStep);
    };
    each_block<BFloat16>(call_, span, keys, next, lanes, tiles_, +low_, +high_, rows_, use, after);
  }

  // As in backward.h; columns of [kBlock][16].
  void clear_sums(int64_t keys) {
    for (int64_t d = 0; d < dim_; d += 16) std::fill_n(key_sums_ + d * kBlock, keys * 16, 0.0f);
    for (int64_t d = 0; d < v_dim_; d += 16) std::fill_n(value_sums_ + d * kBlock, keys * 16, 0.0f);
  }

  // A row of columns of [kBlock][16].
  static void add_row(const float* from, float* to, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d += 16) {
      __mmask16 there = first_of_16(dim - d);
      __m512 sum = _mm512_maskz_loadu_ps(there, to + d);
      _mm512_mask_storeu_ps(to + d, there, _mm512_fmadd_ps(_mm512_loadu_ps(from + d * kBlock), _mm512_set1_ps(factor), sum));
    }
  }

  template <int N>
  void block(const Span& span, const Tile& tile, const Lane* lanes, int64_t a, int64_t b, const KeyBlock& keys,
             const BiasSums<float>& bias) {
    constexpr int64_t panel = kPanelKeys * 16, width = N * 16, rows = kBlock * 32, pairs = kBlock / 2 * 16;
    const uint32_t *queries = queries_ + tile.first * dim_ / 2, *grads = grads_ + tile.first * v_dim_ / 2;
    const uint32_t *query_pairs = query_pairs_ + tile.first * dim_ / 2, *grad_pairs = grad_pairs_ + tile.first * v_dim_ / 2;
    for (int64_t j = a; j < b; j += kPanelKeys) {
      keys.ahead->step();
      for (int64_t c = 0; c < N; c += 2) {
        tile_product<false>({rows_.keys + j * dim_, 1024}, {queries + c * dim_ * 8, dim_ * 8}, dim_, {scores_ + c * panel, panel});
        tile_product<false>({rows_.values + j * v_dim_, 1024}, {grads + c * v_dim_ * 8, v_dim_ * 8}, v_dim_,
                            {slopes_ + c * panel, panel});
      }
      if (call_.softcap != 0) cap_scores(call_, +scores_, kPanelKeys * width);
      int64_t count = std::min(kPanelKeys, keys.count - j);
      if (call_.bias.data) {
        bias_.read(span, tile, lanes, keys.positions + j, count, kPanelKeys, {+numbers_, 16, panel});
        add_bias<N>(+scores_, float(call_.scale), +numbers_, panel, bias_.by_key);
      }
      if (keys.start + j < tile.low_max || keys.start + j + kPanelKeys > tile.high_min)
        hide_scores<N>(+scores_, low_ + tile.first, high_ + tile.first, keys.start + j);
      with_flag(call_.bias.data, [&](auto biased) {
        with_flag(dropout_.on, [&](auto dropped) { this->template weigh<N, biased(), dropped()>(tile, keys, j); });
      });
      if (call_.grad_bias.data) bias_gradient_.add(span, tile, lanes, keys.positions + j, count, {+slopes_, 16, panel}, bias);
      for (int64_t d = 0; d < v_dim_; d += 32)
        tile_product<true>({weights_ + j * 32, rows}, {grad_pairs + d / 16 * width * 8, width * 8}, width,
                           {value_sums_ + (d * kBlock + j * 16), kBlock * 16});
      for (int64_t d = 0; d < dim_; d += 32)
        tile_product<true>({slope_rows_ + j * 32, rows}, {query_pairs + d / 16 * width * 8, width * 8}, width,
                           {key_sums_ + (d * kBlock + j * 16), kBlock * 16});
    }
    float* sums = sums_ + tile.first * dim_;
    for (int64_t d = 0; d < dim_; d += 32)
      for (int64_t c = 0; c < N; c += 2)
        tile_product<true>({rows_.turned + a * dim_ + d * 32, dim_ * 32}, {slope_pairs_ + c * pairs + a / 2 * 16, pairs}, b - a,
                           {sums + (c * dim_ + d) * 16, dim_ * 16});
  }

  // Weights, and the gradients of the scores, of a panel: narrowed as rows of lanes, the latter as pairs of keys too.
  template <int N, bool kBiased, bool kDropped>
  void weigh(const Tile& tile, const KeyBlock& keys, int64_t j) {
    typedef Vec<float> V;
    const float* times = keys.times ? keys.times + j : nullptr;
    const int64_t count = keys.count - j;
    const V factor = fill(factor_);
    for (int c = 0; c < N; c += 2) {
      V lse[2], delta[2];
      for (int n = 0; n < 2; ++n)
        lse[n] = load(lse_ + tile.first + (c + n) * 16), delta[n] = load(delta_ + tile.first + (c + n) * 16);
      for (int64_t i = 0; i < kPanelKeys; i += 2) {
        V weight[2][2], slope[2][2];
        for (int r = 0; r < 2; ++r)
          for (int n = 0; n < 2; ++n) {
            int64_t at = ((c + n) * kPanelKeys + i + r) * 16;
            V score = load(scores_ + at);
            // Above 0 by rounding alone, which among huge scores may be more than the exponential bears.
            V power = kBiased ? (score - lse[n]) * factor : fma(score, factor, -lse[n]);
            weight[r][n] = exp2_fast((V)_mm512_min_ps(_mm512_setzero_ps(), (__m512)power));
            if (times) weight[r][n] *= fill(i + r < count ? times[i + r] : 1.0f);
            V grad = load(slopes_ + at), keep = fill(1.0f);
            if constexpr (kDropped) keep = dropout_.keep(tile.first + (c + n) * 16, j + i + r), grad *= keep;
            slope[r][n] = weight[r][n] * (grad - delta[n]);
            if constexpr (kDropped) weight[r][n] *= keep;
            if constexpr (kBiased) store(slopes_ + at, slope[r][n]);
            if (call_.softcap != 0) slope[r][n] *= cap_slope(score, fill(float(1 / call_.softcap)));
          }
        for (int r = 0; r < 2; ++r) {
          int64_t row = c / 2 * kBlock * 32 + (j + i + r) * 32;
          _mm512_storeu_si512(weights_ + row, (__m512i)_mm512_cvtne2ps_pbh((__m512)weight[r][1], (__m512)weight[r][0]));
          _mm512_storeu_si512(slope_rows_ + row, (__m512i)_mm512_cvtne2ps_pbh((__m512)slope[r][1], (__m512)slope[r][0]));
        }
        for (int n = 0; n < 2; ++n)
          _mm512_storeu_si512(slope_pairs_ + ((c + n) * kBlock / 2 + (j + i) / 2) * 16,
                              narrow_pair((__m512)slope[0][n], (__m512)slope[1][n]));
      }
    }
  }
};

}  // namespace dil
#endif
