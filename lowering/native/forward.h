// Forward: one running softmax over all keys of a query.
#pragma once
#include "scores.h"

namespace dil {

template <class X>
class Forward {
  typedef typename Score<X>::T T;
  static constexpr int64_t kMaxLanes = 1152;  // queries that share the gathered keys

 public:
  explicit Forward(const Call& call)
      : call_(call),
        rows_(call),
        row_(rows_.value_row),
        factor_(T(exponent_factor(call))),
        bias_(call),
        dropout_(call, kMaxLanes + kTile<T>) {
    int64_t lanes = kMaxLanes + kTile<T>;
    queries_.take(lanes * call.head_dim), sums_.take(lanes * row_), most_.take(lanes), total_.take(lanes);
    low_.take(lanes), high_.take(lanes), scores_.take(Rows<X>::kBlock * kTile<T>);
    vector_.take(kWidth<T> * whole_vectors<T>(std::max(call.head_dim, call.v_dim)));
    if (call.bias.data) numbers_.take(Rows<X>::kBlock * kTile<T>);
  }

  void run(const Span& span) {
    Plan plan(call_, span);
    plan.each_batch(kMaxLanes, kWidth<T>,
                    [&](const Lane* lanes, const std::vector<Group>& groups, const std::vector<Keys>& lists) {
      begin(span, lanes, groups);
      for (size_t n = 0; n < lists.size(); ++n)
        attend(span, lists[n], n + 1 < lists.size() ? &lists[n + 1] : nullptr, lanes);
      finish(span, lanes);
    });
  }

 private:
  const Call& call_;
  Rows<X> rows_;
  int64_t row_;
  T factor_;
  std::vector<Tile> tiles_;
  Bias<T> bias_;
  Dropout<T> dropout_;
  Buffer<T> queries_, sums_, most_, total_, scores_, numbers_;
  Buffer<T> vector_;  // rows of a vector of lanes
  Buffer<int32_t> low_, high_;

  void begin(const Span& span, const Lane* lanes, const std::vector<Group>& groups) {
    tiles_ = tiles_of<T>(groups);
    for (const Tile& tile : tiles_) {
      const Tile* next = &tile + 1 < tiles_.data() + tiles_.size() ? &tile + 1 : nullptr;
      if (next) prefetch_queries<X>(call_, call_.q, span, *next, lanes, call_.head_dim);
      dropout_.begin(span, tile, lanes);
      read_queries<X>(call_, call_.q, span, tile, lanes, call_.head_dim, T(query_factor(call_)),
                      queries_ + tile.first * call_.head_dim, +vector_, whole_vectors<T>(call_.head_dim), false);
      int64_t width = tile.vectors * kWidth<T>;
      std::fill_n(most_ + tile.first, width, -std::numeric_limits<T>::infinity());
      std::fill_n(total_ + tile.first, width, T(0));
      std::fill_n(sums_ + tile.first * row_, width * row_, T(0));
    }
  }

  void attend(const Span& span, const Keys& keys, const Keys* next, const Lane* lanes) {
    auto use = [&](const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
      if (call_.bias.data) {
        int64_t count = std::min(b, keys.count) - a, width = tile.vectors * kWidth<T>;
        bias_.read(span, tile, lanes, keys.positions + a, count, b - a,
                   {numbers_ + (bias_.by_key ? a : a * width), width, kWidth<T>});
      }
      dropout_.read(span, keys, a, b);
      with_vectors(tile.vectors, std::integer_sequence<int, 1, 2, 3>(),
                   [&](auto n) { this->template block<n()>(tile, a, b, keys); });
    };
    each_block<X>(call_, span, keys, next, lanes, tiles_, +low_, +high_, rows_, use, [](const KeyBlock&) {});
  }

  template <int N>
  void block(const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
    constexpr int W = kWidth<T>;
    T* scores = +scores_;
    T* most = most_ + tile.first;
    T* total = total_ + tile.first;
    const float* times = keys.times;
    Vec<T> before[N], now[N], shift[N], sum[N], keep[N];
    for (int c = 0; c < N; ++c) before[c] = now[c] = load(most + c * W);
    Scores<T, N> found{+rows_.keys,
                       queries_ + tile.first * call_.head_dim,
                       call_.head_dim,
                       rows_.key_row,
                       low_ + tile.first,
                       high_ + tile.first,
                       keys.start,
                       call_.softcap,
                       call_.scale,
                       +numbers_,
                       bias_.by_key};
    auto capped = [](int64_t, const Vec<T>(&)[kPanel][N]) {};
    found.each(a, b, tile, capped, [&](int64_t j, Vec<T>(&s)[kPanel][N]) __attribute__((always_inline)) {
      for (int r = 0; r < kPanel; ++r)
        for (int c = 0; c < N; ++c) now[c] = larger(now[c], s[r][c]);
      write<T>(s, scores + j * N * W, N * W);
      keys.ahead->step();
    });
    const Vec<T> nothing = fill(-std::numeric_limits<T>::infinity());
    for (int c = 0; c < N; ++c) {
      // Differences first: a bias may hide every key of a query with the lowest number, which times log2(e) is infinite.
      shift[c] = now[c] == nothing ? Vec<T>{} : now[c];
      keep[c] = exp2_up_to_8((before[c] - shift[c]) * fill(factor_));
      sum[c] = Vec<T>{};
      store(most + c * W, now[c]);
    }
    for (int64_t j = a; j < b; ++j) {
      T* row = scores + j * N * W;
      Vec<T> often = fill(times && j < keys.count ? T(times[j]) : T(1));
      for (int c = 0; c < N; ++c) {
        Vec<T> p = exp2_up_to_8((load(row + c * W) - shift[c]) * fill(factor_));
        if (times) p *= often;
        sum[c] += p;
        store(row + c * W, p);
      }
    }
    // The sum is that of all weights, dropped ones too.
    if (dropout_.on)
      for (int64_t j = a; j < b; ++j)
        for (int c = 0; c < N; ++c) {
          T* at = scores + (j * N + c) * W;
          store(at, load(at) * dropout_.keep(tile.first + c * W, j));
        }
    for (int c = 0; c < N; ++c) store(total + c * W, fma(load(total + c * W), keep[c], sum[c]));
    T* sums = sums_ + tile.first * row_;
    for (int64_t d = 0; d < row_; d += kPanel) {
      Vec<T> o[kPanel][N];
      clear<T>(o);
      multiply<T>(o, rows_.values + a * row_ + d, 1, row_, scores + a * N * W, N * W, b - a);
      add<T>(o, sums + d * N * W, N * W, keep);
    }
  }

  void finish(const Span& span, const Lane* lanes) {
    for (const Tile& tile : tiles_) {
      for (int64_t i = 0; i < tile.lanes; ++i) {
        T &total = total_[tile.first + i], most = most_[tile.first + i];
        *row_of<T>(call_, call_.lse, span, lanes[tile.first + i]) =
            total == 0 ? -std::numeric_limits<T>::infinity() : T(most * T(score_unit(call_)) + std::log(total));
        total = total == 0 ? 0 : 1 / total;
      }
      write_queries<X>(call_, call_.out, span, tile, lanes, call_.v_dim, sums_ + tile.first * row_, total_ + tile.first, +vector_,
                       whole_vectors<T>(call_.v_dim));
    }
  }
};

}  // namespace dil
