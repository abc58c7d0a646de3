// Tiles of queries and blocks of gathered keys.
#pragma once
#include <cstdlib>
#include <new>
#include <utility>

#include "plan.h"
#include "products.h"
#include "workspace.h"

namespace dil {

// Uninitialised memory, aligned to a cache line: of the thread's `workspace` as far as that goes.
template <class T>
class Buffer {
 public:
  ~Buffer() {
    if (own_) std::free(data_);
  }
  T* take(int64_t count) {
    if (data_ == nullptr) {
      int64_t size = whole_lines(count * int64_t(sizeof(T)));
      data_ = static_cast<T*>(workspace ? workspace->take(size) : nullptr);
      own_ = data_ == nullptr;
      if (own_) data_ = static_cast<T*>(std::aligned_alloc(kLine, size_t(size)));
    }
    if (data_ == nullptr) throw std::bad_alloc();
    return data_;
  }
  T* operator+() const { return data_; }
  T* operator+(int64_t at) const { return data_ + at; }
  T& operator[](int64_t at) const { return data_[at]; }

 private:
  T* data_ = nullptr;
  bool own_ = false;
};

// Up to kTile queries, one in each lane.
struct Tile {
  int vectors, group;
  int64_t first, lanes;  // in the batch
  int32_t low_min, low_max, high_min, high_max;
};

// body(n) with the number of vectors as a constant, one of N.
template <int... N, class Body>
inline __attribute__((always_inline)) void with_vectors(int vectors, std::integer_sequence<int, N...>, Body body) {
  (void)((vectors == N && (body(std::integral_constant<int, N>()), true)) || ...);
}

// body(true_type or false_type): a flag as a constant.
template <class Body>
inline __attribute__((always_inline)) void with_flag(bool flag, Body body) {
  if (flag) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

template <class T>
std::vector<Tile> tiles_of(const std::vector<Group>& groups) {
  std::vector<Tile> found;
  for (size_t g = 0; g < groups.size(); ++g) {
    int64_t width = kWidth<T>, end = groups[g].first + groups[g].lanes, vectors = (groups[g].lanes + width - 1) / width;
    for (int64_t first = groups[g].first; vectors > 0;) {
      // Four vectors are 2 + 2: a tile of one would wait for its own sums.
      int64_t now = vectors == 4 || vectors == 2 ? 2 : std::min<int64_t>(vectors, kMaxVectors);
      found.push_back({int(now), int(g), first, std::min(end - first, now * width), 0, 0, 0, 0});
      first += now * width, vectors -= now;
    }
  }
  return found;
}

template <class X>
const X* key_rows(const Call& call, const Operand& x, const Span& span) {
  return static_cast<const X*>(x.data) + span.batch * x.batch + span.kv_head * x.head + first_key_row(call, span) * x.row;
}

// The rows of keys and values that the next block gathers. They are fetched a few at each step of the work on this one: many at
// once would wait for one another.
class Ahead {
 public:
  template <class X>
  static Ahead of(const Call& call, const Span& span) {
    auto rows = [&](const Operand& x, int64_t dim) {
      return Part{reinterpret_cast<const char*>(key_rows<X>(call, x, span)), x.row * int64_t(sizeof(X)), dim * int64_t(sizeof(X))};
    };
    return {rows(call.k, call.head_dim), rows(call.v, call.v_dim)};
  }

  void begin(const int32_t* rows, int64_t count, int64_t steps) { rows_ = rows, count_ = count, steps_ = steps, step_ = fetched_ = 0; }

  void step() {
    int64_t until = std::min(count_, count_ * ++step_ / steps_);
    for (; fetched_ < until; ++fetched_) fetch(keys_, rows_[fetched_]), fetch(values_, rows_[fetched_]);
  }

 private:
  struct Part {
    const char* data;
    int64_t row, bytes;
  };
  Part keys_, values_;
  const int32_t* rows_ = nullptr;
  int64_t count_ = 0, steps_ = 1, step_ = 0, fetched_ = 0;

  Ahead(Part keys, Part values) : keys_(keys), values_(values) {}

  static void fetch(const Part& part, int64_t row) {
    const char* data = part.data + row * part.row;
    for (int64_t at = 0; at < part.bytes; at += 64) __builtin_prefetch(data + at, 0, 2);
    // GCC before 14 takes a function that does nothing but prefetch for one without effect, and leaves out its calls.
    asm volatile("");
  }
};

// The tile's limits on a list of keys: whole vectors of lanes, so that unused ones see nothing.
template <class T>
void limit(const Call& call, const Span& span, Tile& tile, const Keys& keys, const Lane* lanes, int32_t* low, int32_t* high) {
  find_ranges(call, span, keys, lanes + tile.first, tile.lanes, low, high);
  tile.low_min = tile.low_max = low[0], tile.high_min = tile.high_max = high[0];
  for (int64_t i = 1; i < tile.lanes; ++i) {
    tile.low_min = std::min(tile.low_min, low[i]), tile.low_max = std::max(tile.low_max, low[i]);
    tile.high_min = std::min(tile.high_min, high[i]), tile.high_max = std::max(tile.high_max, high[i]);
  }
  for (int64_t i = tile.lanes; i < tile.vectors * kWidth<T>; ++i) low[i] = high[i] = 0;
}

// Where a lane's row of a [batch, heads, rows, dim] tensor begins.
template <class Y>
Y* row_of(const Call& call, const Operand& x, const Span& span, const Lane& lane) {
  int64_t head = span.kv_head * (call.heads / call.kv_heads) + lane.head;
  return static_cast<Y*>(x.data) + span.batch * x.batch + head * x.head + lane.row * x.row;
}

template <class T>
inline int64_t whole_vectors(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// Fetching the rows of the next tile goes along with the work on this one.
template <class X>
void prefetch_queries(const Call& call, const Operand& x, const Span& span, const Tile& tile, const Lane* lanes, int64_t dim) {
  for (int64_t i = 0; i < tile.lanes; ++i) {
    const char* row = reinterpret_cast<const char*>(row_of<X>(call, x, span, lanes[tile.first + i]));
    for (int64_t at = 0; at < dim * int64_t(sizeof(X)); at += 64) __builtin_prefetch(row + at, 0, 3);
  }
  asm volatile("");
}

// The rows of a tile's lanes times a factor, transposed: [dim][lanes]. Unused lanes repeat the last. `rows` gets them as they
// are, `row` (whole vectors) apart: of all lanes, [lanes][row], or with `keep` false of the last vector of lanes.
template <class X, class T>
void read_queries(const Call& call, const Operand& x, const Span& span, const Tile& tile, const Lane* lanes, int64_t dim,
                  T factor, T* columns, T* rows, int64_t row, bool keep) {
  constexpr int64_t W = kWidth<T>;
  int64_t width = tile.vectors * W, squares = dim / W * W;
  for (int64_t first = 0; first < width; first += W) {
    T* held = rows + (keep ? first * row : 0);
    for (int64_t i = 0; i < W; ++i) {
      T* one = held + i * row;
      load_row(row_of<X>(call, x, span, lanes[tile.first + std::min(first + i, tile.lanes - 1)]), one, int(dim));
      for (int64_t d = dim; d < row; ++d) one[d] = 0;
    }
    for (int64_t d = 0; d < squares; d += W) turn_square(held + d, row, columns + d * width + first, width);
    for (int64_t d = squares; d < dim; ++d)
      for (int64_t i = 0; i < W; ++i) columns[d * width + first + i] = held[i * row + d];
  }
  if (factor == 1) return;
  for (int64_t i = 0; i < dim * width; i += W) store(columns + i, load(columns + i) * fill(factor));
}

// The inverse: columns [dim][lanes] times a factor for each lane, into the rows of a tensor. `rows`: memory for a vector of lanes.
template <class X, class T>
void write_queries(const Call& call, const Operand& x, const Span& span, const Tile& tile, const Lane* lanes, int64_t dim,
                   T* columns, const T* factors, T* rows, int64_t row) {
  constexpr int64_t W = kWidth<T>;
  int64_t width = tile.vectors * W, squares = dim / W * W;
  for (int64_t first = 0; first < tile.lanes; first += W) {
    Vec<T> factor = load(factors + first);
    for (int64_t d = 0; d < dim; ++d) {
      T* at = columns + d * width + first;
      store(at, load(at) * factor);
    }
    for (int64_t d = 0; d < squares; d += W) turn_square(columns + d * width + first, width, rows + d, row);
    for (int64_t d = squares; d < dim; ++d)
      for (int64_t i = 0; i < W; ++i) rows[i * row + d] = columns[d * width + first + i];
    for (int64_t i = 0; i < std::min(W, tile.lanes - first); ++i) {
      const Lane& lane = lanes[tile.first + first + i];
      if (call.wide) {
        copy_row(rows + i * row, row_of<T>(call, x, span, lane), int(dim));
      } else {
        put_row(rows + i * row, row_of<X>(call, x, span, lane), int(dim));
      }
    }
  }
}

// Keys and values of a block side by side, converted to the score dtype, zeros up to a whole panel.
template <class X>
class Rows {
  typedef typename Score<X>::T T;

 public:
  static constexpr int64_t kBlock = 128, kStep = kPanel;
  const int64_t key_row, value_row;
  Buffer<T> keys, values;

  explicit Rows(const Call& call) : key_row(padded(call.head_dim)), value_row(padded(call.v_dim)), call_(call) {
    keys.take(kBlock * key_row), values.take(kBlock * value_row);
  }

  void gather(const Span& span, const int32_t* from, int64_t count) {
    gather(key_rows<X>(call_, call_.k, span), call_.k.row, from, count, call_.head_dim, key_row, +keys);
    gather(key_rows<X>(call_, call_.v, span), call_.v.row, from, count, call_.v_dim, value_row, +values);
  }

 private:
  const Call& call_;

  static void gather(const X* from, int64_t stride, const int32_t* rows, int64_t count, int64_t dim, int64_t row, T* to) {
    for (int64_t i = 0; i < count; ++i) {
      load_row(from + int64_t(rows[i]) * stride, to + i * row, int(dim));
      for (int64_t d = dim; d < row; ++d) to[i * row + d] = 0;
    }
    std::fill_n(to + count * row, (padded(count) - count) * row, T(0));
  }
};

// Up to kBlock neighbours in a list of keys.
struct KeyBlock {
  int64_t start, count;  // in the list
  const int32_t *positions, *rows;
  const float* times;  // or null: each counts once
  Ahead* ahead;        // a step for each kStep of keys that is computed
};

// Walks a list of keys block by block for the tiles whose groups see them. `Gathered` is the block's memory, `Rows` or another.
// use(tile, a, b, block): keys a to b (whole steps) of the block. after(block): all tiles have used it. after_list: the list that
// comes next, or null.
template <class X, class Gathered, class Use, class After>
void each_block(const Call& call, const Span& span, const Keys& list, const Keys* after_list, const Lane* lanes,
                std::vector<Tile>& tiles, int32_t* low, int32_t* high, Gathered& gathered, Use use, After after) {
  if (list.size() == 0) return;
  Ahead ahead = Ahead::of<X>(call, span);
  int32_t begin = INT32_MAX, end = 0;
  for (Tile& tile : tiles) {
    if (!list.seen_by(tile.group)) continue;
    limit<typename Score<X>::T>(call, span, tile, list, lanes, low + tile.first, high + tile.first);
    begin = std::min(begin, tile.low_min), end = std::max(end, tile.high_max);
  }
  for (int64_t start = begin; start < end; start += Gathered::kBlock) {
    int64_t count = std::min(Gathered::kBlock, list.size() - start);
    const int32_t *positions = &list.position[size_t(start)], *rows = list.rows() + start;
    gathered.gather(span, rows, count);
    const int32_t* ahead_rows = rows + Gathered::kBlock;
    int64_t next = std::clamp<int64_t>(end - start - Gathered::kBlock, 0, Gathered::kBlock), steps = 0;
    if (next == 0 && after_list)
      ahead_rows = after_list->rows(), next = std::min<int64_t>(Gathered::kBlock, after_list->size());
    auto part_of = [&](const Tile& tile) {
      int64_t a = std::max<int64_t>(0, tile.low_min - start) / Gathered::kStep * Gathered::kStep;
      int64_t b = (std::min<int64_t>(count, tile.high_max - start) + Gathered::kStep - 1) / Gathered::kStep * Gathered::kStep;
      return std::pair(a, std::max(a, b));
    };
    auto each_part = [&](auto body) {
      for (const Tile& tile : tiles) {
        if (!list.seen_by(tile.group)) continue;
        auto [a, b] = part_of(tile);
        if (a < b) body(tile, a, b);
      }
    };
    each_part([&](const Tile&, int64_t a, int64_t b) { steps += (b - a) / Gathered::kStep; });
    ahead.begin(ahead_rows, next, steps);
    each_part([&](const Tile& tile, int64_t a, int64_t b) {
      use(tile, a, b, KeyBlock{start, count, positions, rows, list.times_of(tile.group, start), &ahead});
    });
    after(KeyBlock{start, count, positions, rows, nullptr, nullptr});
  }
}

}  // namespace dil
