// Backward: scores are computed again, and the joint log-sum-exp makes every gradient exact.
#pragma once
#include "parallel.h"
#include "scores.h"

namespace dil {

// c[r][..] += sum over i < depth of a[r * a_row + i] * b[i * row ..], for `rows` (whole panels) rows of `row` elements.
template <class T, int N>
inline void add_columns(const T* a, int64_t a_row, const T* b, int64_t row, int64_t depth, T* c, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kPanel) {
    Vec<T> sums[kPanel][N];
    clear<T>(sums);
    multiply<T>(sums, a + r * a_row, a_row, 1, b, row, depth);
    add<T>(sums, c + r * row, row);
  }
}

template <class T>
inline void add_product(const T* a, int64_t a_row, const T* b, int64_t row, int64_t depth, T* c, int64_t rows) {
  constexpr int W = kWidth<T>;
  int64_t at = 0;
  for (; row - at >= 2 * W; at += 2 * W) add_columns<T, 2>(a, a_row, b + at, row, depth, c + at, rows);
  if (row - at > 0) add_columns<T, 1>(a, a_row, b + at, row, depth, c + at, rows);
}

// The derivative of softcap * tanh(s / softcap) by s, from its value and 1 / softcap; hidden pairs (minus infinity) give 0.
template <class V>
inline V cap_slope(V capped, V inverse) {
  V part = capped * inverse;
  return part >= -1 ? 1 - part * part : V{};
}

// Sums of key gradients: [k_rows] rows of grad_k and grad_v side by side.
template <class T>
struct KeySums {
  T *keys, *values;
  int64_t key_row, value_row;
};

template <class X>
class Backward {
  typedef typename Score<X>::T T;
  static constexpr int64_t kMaxLanes = 576;

 public:
  explicit Backward(const Call& call)
      : call_(call),
        rows_(call),
        dim_(whole_vectors<T>(call.head_dim)),
        v_dim_(whole_vectors<T>(call.v_dim)),
        bias_(call),
        bias_gradient_(call),
        dropout_(call, kMaxLanes + kTile<T>) {
    int64_t lanes = kMaxLanes + kTile<T>;
    queries_.take(lanes * call.head_dim), query_rows_.take(lanes * dim_), sums_.take(lanes * rows_.key_row);
    grads_.take(lanes * call.v_dim), grad_rows_.take(lanes * v_dim_), lse_.take(lanes), delta_.take(lanes);
    low_.take(lanes), high_.take(lanes), weights_.take(Rows<X>::kBlock * kTile<T>), slopes_.take(Rows<X>::kBlock * kTile<T>);
    key_sums_.take(Rows<X>::kBlock * dim_), value_sums_.take(Rows<X>::kBlock * v_dim_), one_.take(v_dim_);
    scales_.take(kTile<T>);
    std::fill_n(+scales_, kTile<T>, T(call.scale));
    clear_sums(Rows<X>::kBlock);
    std::fill_n(+one_, v_dim_, T(0));
    if (call.bias.data) numbers_.take(Rows<X>::kBlock * kTile<T>);
    if (call.grad_bias.data && call.softcap != 0) uncapped_.take(Rows<X>::kBlock * kTile<T>);
  }

  void run(const Span& span, const KeySums<T>& into, const BiasSums<T>& bias) {
    Plan plan(call_, span);
    plan.each_batch(kMaxLanes, kWidth<T>,
                    [&](const Lane* lanes, const std::vector<Group>& groups, const std::vector<Keys>& lists) {
      begin(span, lanes, groups);
      for (size_t n = 0; n < lists.size(); ++n)
        attend(span, lists[n], n + 1 < lists.size() ? &lists[n + 1] : nullptr, lanes, into, bias);
      finish(span, lanes);
    });
  }

 private:
  const Call& call_;
  Rows<X> rows_;
  int64_t dim_, v_dim_;
  std::vector<Tile> tiles_;
  Buffer<T> queries_, query_rows_, sums_, grads_, grad_rows_, lse_, delta_, weights_, slopes_, key_sums_, value_sums_, one_, scales_;
  Buffer<T> numbers_, uncapped_;  // the bias; gradients of the scores that it was added to, where they are others
  Bias<T> bias_;
  BiasGradient<T> bias_gradient_;
  Dropout<T> dropout_;
  Buffer<int32_t> low_, high_;

  void begin(const Span& span, const Lane* lanes, const std::vector<Group>& groups) {
    tiles_ = tiles_of<T>(groups);
    for (const Tile& tile : tiles_) {
      int64_t width = tile.vectors * kWidth<T>;
      if (&tile + 1 < tiles_.data() + tiles_.size()) {
        prefetch_queries<X>(call_, call_.q, span, *(&tile + 1), lanes, call_.head_dim);
        prefetch_queries<X>(call_, call_.grad_out, span, *(&tile + 1), lanes, call_.v_dim);
        prefetch_queries<X>(call_, call_.out, span, *(&tile + 1), lanes, call_.v_dim);
      }
      dropout_.begin(span, tile, lanes);
      read_queries<X>(call_, call_.q, span, tile, lanes, call_.head_dim, T(query_factor(call_)),
                      queries_ + tile.first * call_.head_dim, query_rows_ + tile.first * dim_, dim_, true);
      read_queries<X>(call_, call_.grad_out, span, tile, lanes, call_.v_dim, T(1), grads_ + tile.first * call_.v_dim,
                      grad_rows_ + tile.first * v_dim_, v_dim_, true);
      std::fill_n(sums_ + tile.first * rows_.key_row, width * rows_.key_row, T(0));
      for (int64_t i = 0; i < width; ++i) {
        const Lane& lane = lanes[tile.first + std::min(i, tile.lanes - 1)];
        load_row(row_of<X>(call_, call_.out, span, lane), +one_, int(call_.v_dim));
        T delta = dot(+one_, grad_rows_ + (tile.first + i) * v_dim_, v_dim_);
        if (call_.grad_lse.data) delta -= *row_of<T>(call_, call_.grad_lse, span, lane);
        delta_[tile.first + i] = delta;
        // Lanes without a query, and queries without keys: infinity makes every weight 0.
        T lse = *row_of<T>(call_, call_.lse, span, lane);
        bool used = i < tile.lanes && lse > -std::numeric_limits<T>::infinity();
        lse_[tile.first + i] = used ? (call_.bias.data ? lse : T(lse * kLog2E)) : std::numeric_limits<T>::infinity();
      }
    }
  }

  void attend(const Span& span, const Keys& keys, const Keys* next, const Lane* lanes, const KeySums<T>& into,
              const BiasSums<T>& bias) {
    auto use = [&](const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
      int64_t count = std::min(b, keys.count) - a, width = tile.vectors * kWidth<T>;
      if (call_.bias.data)
        bias_.read(span, tile, lanes, keys.positions + a, count, b - a,
                   {numbers_ + (bias_.by_key ? a : a * width), width, kWidth<T>});
      dropout_.read(span, keys, a, b);
      with_vectors(tile.vectors, std::integer_sequence<int, 1, 2, 3>(),
                   [&](auto n) { this->template block<n()>(tile, a, b, keys); });
      if (call_.grad_bias.data)
        bias_gradient_.add(span, tile, lanes, keys.positions + a, count,
                           {(+uncapped_ ? +uncapped_ : +slopes_) + a * width, width, kWidth<T>}, bias);
    };
    auto after = [&](const KeyBlock& keys) {
      for (int64_t i = 0; i < keys.count; ++i) {
        int64_t row = first_key_row(call_, span) + keys.rows[i];
        add_row(+key_sums_ + i * dim_, into.keys + row * into.key_row, call_.head_dim, T(call_.scale));
        add_row(+value_sums_ + i * v_dim_, into.values + row * into.value_row, call_.v_dim, T(1));
      }
      clear_sums(padded(keys.count));
    };
    each_block<X>(call_, span, keys, next, lanes, tiles_, +low_, +high_, rows_, use, after);
  }

  // Between blocks all sums are zero: a short block, as a row of blocks alone has, clears no more than it used.
  void clear_sums(int64_t keys) {
    std::fill_n(+key_sums_, keys * dim_, T(0)), std::fill_n(+value_sums_, keys * v_dim_, T(0));
  }

  // Of whole vectors.
  static T dot(const T* a, const T* b, int64_t dim) {
    Vec<T> sum{};
    for (int64_t d = 0; d < dim; d += kWidth<T>) sum = fma(load(a + d), load(b + d), sum);
    T parts[kWidth<T>];
    store(parts, sum);
    for (int left = kWidth<T> / 2; left > 0; left /= 2)
      for (int i = 0; i < left; ++i) parts[i] += parts[i + left];
    return parts[0];
  }

  static void add_row(const T* from, T* to, int64_t dim, T factor) {
    int64_t d = 0;
    for (; d + kWidth<T> <= dim; d += kWidth<T>) store(to + d, fma(load(from + d), fill(factor), load(to + d)));
    for (; d < dim; ++d) to[d] += from[d] * factor;
  }

  template <int N>
  void block(const Tile& tile, int64_t a, int64_t b, const KeyBlock& keys) {
    constexpr int W = kWidth<T>;
    T *weights = +weights_, *slopes = +slopes_;
    const T* grads = grads_ + tile.first * call_.v_dim;
    const float* times = keys.times;
    T* uncapped = +uncapped_;
    const bool biased = call_.bias.data;
    const T factor = T(exponent_factor(call_)), cap = T(1 / call_.softcap);
    Vec<T> lse[N], shift[N], delta[N];
    for (int c = 0; c < N; ++c) {
      lse[c] = load(lse_ + tile.first + c * W), delta[c] = load(delta_ + tile.first + c * W);
      // With a bias differences come first: the lowest number times log2(e) is infinite.
      shift[c] = biased ? Vec<T>{} : -lse[c];
    }
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
    auto capped = [&](int64_t j, const Vec<T>(&s)[kPanel][N]) {
      for (int r = 0; r < kPanel; ++r)
        for (int c = 0; c < N; ++c) store(slopes + (j + r) * N * W + c * W, cap_slope(s[r][c], fill(cap)));
    };
    found.each(a, b, tile, capped, [&](int64_t j, Vec<T>(&s)[kPanel][N]) __attribute__((always_inline)) {
      if (biased)
        for (int r = 0; r < kPanel; ++r)
          for (int c = 0; c < N; ++c) s[r][c] -= lse[c];
      for (int r = 0; r < kPanel; ++r) {
        Vec<T> often = fill(times && j + r < keys.count ? T(times[j + r]) : T(1));
        for (int c = 0; c < N; ++c) {
          // Above 0 by rounding alone, which among huge scores may be more than the exponential bears.
          Vec<T> power = fma(s[r][c], fill(factor), shift[c]);
          store(weights + (j + r) * N * W + c * W, exp2_up_to_8(power > 0 ? Vec<T>{} : power) * often);
        }
      }
      keys.ahead->step();
    });
    for (int64_t j = a; j < b; j += kPanel) {
      Vec<T> g[kPanel][N];
      clear<T>(g);
      multiply<T>(g, rows_.values + j * rows_.value_row, rows_.value_row, 1, grads, N * W, call_.v_dim);
      for (int r = 0; r < kPanel; ++r) {
        for (int c = 0; c < N; ++c) {
          int64_t at = (j + r) * N * W + c * W;
          Vec<T> weight = load(weights + at);
          if (dropout_.on) {
            Vec<T> keep = dropout_.keep(tile.first + c * W, j + r);
            g[r][c] *= keep;
            store(weights + at, weight * keep);
          }
          Vec<T> found_slope = weight * (g[r][c] - delta[c]);
          if (uncapped) store(uncapped + at, found_slope);
          store(slopes + at, call_.softcap != 0 ? found_slope * load(slopes + at) : found_slope);
        }
      }
    }
    add_product<T>(weights + a * N * W, N * W, grad_rows_ + tile.first * v_dim_, v_dim_, tile.lanes, value_sums_ + a * v_dim_,
                   b - a);
    add_product<T>(slopes + a * N * W, N * W, query_rows_ + tile.first * dim_, dim_, tile.lanes, key_sums_ + a * dim_, b - a);
    T* sums = sums_ + tile.first * rows_.key_row;
    for (int64_t d = 0; d < rows_.key_row; d += kPanel) {
      Vec<T> q[kPanel][N];
      clear<T>(q);
      multiply<T>(q, +rows_.keys + a * rows_.key_row + d, 1, rows_.key_row, slopes + a * N * W, N * W, b - a);
      add<T>(q, sums + d * N * W, N * W);
    }
  }

  void finish(const Span& span, const Lane* lanes) {
    // The queries' rows are not read any more: one vector of lanes of them is memory for those of the gradient.
    for (const Tile& tile : tiles_)
      write_queries<X>(call_, call_.grad_q, span, tile, lanes, call_.head_dim, sums_ + tile.first * rows_.key_row, +scales_,
                       +query_rows_, dim_);
  }
};

// Sums for one key head, or a part of it: [k_rows] rows of head_dim + v_dim.
template <class T>
struct HeadSums {
  Buffer<T> rows;

  static int64_t size(const Call& call) { return whole_lines(count(call) * int64_t(sizeof(T))); }

  explicit HeadSums(const Call& call) { rows.take(count(call)); }

  // Set to zero.
  KeySums<T> begin(const Call& call) const {
    int64_t row = call.head_dim + call.v_dim;
    std::fill_n(+rows, call.k_rows * row, T(0));
    return {+rows, rows + call.head_dim, row, row};
  }

  void add(const Call& call, const HeadSums& other) const {
    for (int64_t i = 0; i < count(call); ++i) rows[i] += other.rows[i];
  }

 private:
  static int64_t count(const Call& call) { return call.k_rows * (call.head_dim + call.v_dim); }
};

// The rows of one key head in the gradients.
template <class X>
KeySums<X> grads_of_head(const Call& call, int64_t head) {
  int64_t b = head / call.kv_heads, h = head % call.kv_heads;
  return {static_cast<X*>(call.grad_k.data) + b * call.grad_k.batch + h * call.grad_k.head,
          static_cast<X*>(call.grad_v.data) + b * call.grad_v.batch + h * call.grad_v.head, call.grad_k.row, call.grad_v.row};
}

// Rows of the bias's gradient that several key heads add to.
inline bool heads_share_rows(const Call& call) {
  const Square& grad = call.grad_bias;
  return grad.data && grad.row != 0 && ((grad.batch == 0 && call.batch > 1) || (grad.head == 0 && call.kv_heads > 1));
}

// A key head's part of the bias's gradient: one number for each key, or one for all, of each query head, or of all.
struct SharedBias {
  Buffer<double> numbers;
  int64_t heads, keys;

  static int64_t size(const Call& call) {
    int64_t heads = call.grad_bias.head ? call.heads / call.kv_heads : 1, keys = call.grad_bias.key ? call.k_len : 1;
    return whole_lines(heads * keys * int64_t(sizeof(double)));
  }

  explicit SharedBias(const Call& call)
      : heads(call.grad_bias.head ? call.heads / call.kv_heads : 1), keys(call.grad_bias.key ? call.k_len : 1) {
    numbers.take(heads * keys);
  }

  // Set to zero.
  double* begin() const {
    std::fill_n(+numbers, heads * keys, 0.0);
    return +numbers;
  }
};

template <class T>
T* bias_grads_of_head(const Call& call, int64_t head) {
  const Square& grad = call.grad_bias;
  int64_t first = head % call.kv_heads * (call.heads / call.kv_heads);
  return static_cast<T*>(grad.data) + head / call.kv_heads * grad.batch + first * grad.head;
}

template <class T>
void add_bias_grads(const Call& call, int64_t head, const SharedBias& from) {
  T* to = bias_grads_of_head<T>(call, head);
  for (int64_t h = 0; h < from.heads; ++h)
    for (int64_t k = 0; k < from.keys; ++k) {
      T& at = to[h * call.grad_bias.head + k * call.grad_bias.key];
      at = T(at + from.numbers[h * from.keys + k]);
    }
}

// How many key heads are computed together. Those that add to the same rows of the bias's gradient take turns, each as parts of
// different rows.
inline int64_t heads_together(const Call& call) { return heads_share_rows(call) ? 1 : call.batch * call.kv_heads; }

// Into how many parts each of `heads` key heads is split.
inline int64_t parts_of_head(const Call& call, int64_t heads) {
  int64_t parts = 1;
  if (heads < 4 * call.threads)
    while (heads * parts % call.threads != 0) ++parts;
  return parts;
}

// Are gradients in the dtype of the sums?
template <class X>
bool in_sums_dtype(const Call& call) {
  return call.wide || std::is_same_v<X, typename Score<X>::T>;
}

// Are the sums of keys the gradients themselves? In their dtype and one part a head.
template <class X>
bool sums_in_place(const Call& call, int64_t parts) {
  return in_sums_dtype<X>(call) && parts == 1;
}

// Is the bias's gradient one row for all queries, which each task sums by itself?
inline bool sums_bias(const Call& call) { return call.grad_bias.data && call.grad_bias.row == 0; }

// A task is a part of a key head. Sums of keys are the task's, or where a head has one part the worker's, which has one at a time.
template <class X>
Demand backward_demand(const Call& call, int64_t worker) {
  int64_t heads = heads_together(call), parts = parts_of_head(call, heads);
  int64_t keys = sums_in_place<X>(call, parts) ? 0 : HeadSums<typename Score<X>::T>::size(call);
  int64_t bias = sums_bias(call) ? SharedBias::size(call) : 0;
  return {worker + (parts == 1 ? keys : 0), bias + (parts == 1 ? 0 : keys), call.threads, heads * parts, parts};
}

// The gradients of key heads. A key head is one worker's; where heads are too few for the threads each is split into parts with
// sums of their own, every part taking each `parts`-th span. Sums are added in the order of the parts, however many are held.
template <class X, class Worker>
class HeadsBackward {
  typedef typename Score<X>::T T;

 public:
  explicit HeadsBackward(const Call& call)
      : call_(call),
        heads_(heads_together(call)),
        parts_(parts_of_head(call, heads_)),
        of_head_(static_cast<size_t>(call.batch * call.kv_heads)),
        workers_(call),
        at_once_(arranged(call, backward_demand<X>(call, workers_.size()))),
        keys_(sums_in_place<X>(call, parts_) ? 0 : size_t(parts_ == 1 ? at_once_.workers : at_once_.tasks)),
        bias_(sums_bias(call) ? size_t(at_once_.tasks) : 0) {
    workers_.grow(at_once_.workers);
    // Sums are made by the threads that need them, at places that are known before.
    for (auto& held : keys_) held.place = workspace->take(HeadSums<T>::size(call));
    for (auto& held : bias_) held.place = workspace->take(SharedBias::size(call));
    for (const Span& span : spans_of(call, rows_of_span(call, heads_)))
      of_head_[size_t(span.batch * call.kv_heads + span.kv_head)].push_back(span);
  }

  void run() {
    int64_t group = std::max<int64_t>(1, at_once_.tasks / parts_);
    for (int64_t first = 0; first < int64_t(of_head_.size()); first += heads_)
      for (int64_t head = 0; head < heads_; head += group) run(first + head, std::min(group, heads_ - head));
  }

 private:
  // Made when it is first used, at its place or, where that is null, somewhere.
  template <class Sums>
  struct Held {
    void* place = nullptr;
    std::unique_ptr<Sums> sums;

    Sums& made(const Call& call) {
      if (!sums) {
        Workspace given(place, Sums::size(call));
        Within within(given);
        sums = std::make_unique<Sums>(call);
      }
      return *sums;
    }
  };

  const Call& call_;
  int64_t heads_, parts_;
  std::vector<std::vector<Span>> of_head_;
  Workers<Worker> workers_;
  Arrangement at_once_;
  std::vector<Held<HeadSums<T>>> keys_;
  std::vector<Held<SharedBias>> bias_;

  // As many heads as have all their parts open at once, or one in several rounds.
  void run(int64_t first, int64_t heads) {
    int64_t tasks = heads * parts_, open = 0;
    for (int64_t done = 0, count; done < tasks; done += count) {
      for (int64_t i = 1; i < open; ++i) keys_[0].sums->add(call_, *keys_[size_t(i)].sums);
      int64_t before = open > 0;
      count = std::min(at_once_.tasks - before, tasks - done), open = before + count;
      workers_.deal_out(count, [&](Worker& worker, int64_t i) { compute(worker, first, done + i, before + i); });
      for (int64_t i = before; i < open && !bias_.empty(); ++i)
        add_bias_grads<T>(call_, first + (done + i - before) / parts_, *bias_[size_t(i)].sums);
    }
    if (parts_ == 1) return;
    for (int64_t head = 0; head < heads; ++head) write(first + head, head * parts_, std::min(open, parts_));
  }

  // The part `task` of the heads from `first` on, with the sums of this number.
  void compute(Worker& worker, int64_t first, int64_t task, int64_t number) {
    int64_t head = first + task / parts_, keys = parts_ == 1 ? this_worker() : number;
    const std::vector<Span>& spans = of_head_[size_t(head)];
    KeySums<T> into = keys_.empty() ? cleared_grads(head) : keys_[size_t(keys)].made(call_).begin(call_);
    BiasSums<T> bias = bias_sums(head, number);
    for (size_t n = size_t(task % parts_); n < spans.size(); n += size_t(parts_)) worker.run(spans[n], into, bias);
    if (!keys_.empty() && parts_ == 1) write(head, keys, 1);
  }

  KeySums<T> cleared_grads(int64_t head) {
    KeySums<T> found = grads_of_head<T>(call_, head);
    for (int64_t k = 0; k < call_.k_rows; ++k) {
      std::fill_n(found.keys + k * found.key_row, call_.head_dim, T(0));
      std::fill_n(found.values + k * found.value_row, call_.v_dim, T(0));
    }
    return found;
  }

  BiasSums<T> bias_sums(int64_t head, int64_t number) {
    const Square& grad = call_.grad_bias;
    if (!grad.data) return {nullptr, nullptr, 0, 0, 0};
    if (bias_.empty()) return {bias_grads_of_head<T>(call_, head), nullptr, grad.head, grad.row, grad.key};
    const SharedBias& held = bias_[size_t(number)].made(call_);
    return {nullptr, held.begin(), held.heads > 1 ? held.keys : 0, 0, held.keys > 1};
  }

  // The gradients of one head from `count` sums of its parts, in their order.
  void write(int64_t head, int64_t first, int64_t count) {
    if (in_sums_dtype<X>(call_)) {
      write_as<T>(grads_of_head<T>(call_, head), first, count);
    } else {
      write_as<X>(grads_of_head<X>(call_, head), first, count);
    }
  }

  template <class Y>
  void write_as(const KeySums<Y>& to, int64_t first, int64_t count) {
    int64_t row = call_.head_dim + call_.v_dim;
    std::vector<const T*> parts;
    for (int64_t p = 0; p < count; ++p) parts.push_back(+keys_[size_t(first + p)].sums->rows);
    for (int64_t k = 0; k < call_.k_rows; ++k)
      for (int64_t d = 0; d < row; ++d) {
        T sum = 0;
        for (const T* part : parts) sum += part[k * row + d];
        put(d < call_.head_dim ? to.keys + k * to.key_row + d : to.values + k * to.value_row + d - call_.head_dim, sum);
      }
  }
};

}  // namespace dil
