// Products of bfloat16 matrices in AMX tile registers. Note [tile products]:
//
// A tile register holds 16 rows of 64 bytes; c += a * b takes 32 bfloat16 of a row of a and pairs of rows of b that lie side by
// side. Scores stay transposed, [keys][queries]: a = keys as they lie, b = queries in pairs of dims. Weights are narrowed in
// pairs of keys, which is the layout that b needs in [dims][queries] += values transposed * weights.
#pragma once
#include "scores.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__linux__)
#define DILCOMPILE_TILES
#include <array>
#include <sys/syscall.h>
#include <unistd.h>

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

// A matrix in columns of 64 bytes, so that a tile is 1024 bytes in a row: with other strides loads and stores of different
// buffers meet in the same cache sets. `column` is how many elements further the next column begins.
template <class E>
struct Columns {
  E* data;
  int64_t column;
};

// c [32][32] = or += a [32][depth] * b [depth / 2][32 pairs], depth a multiple of 32.
template <bool kAdd>
inline void tile_product(Columns<const uint16_t> a, Columns<const uint32_t> b, int64_t depth, Columns<float> c) {
  // The compiler doesn't know that loads into tile registers read memory.
  asm volatile("" ::: "memory");
  if constexpr (kAdd) {
    _tile_loadd(0, c.data, 64);
    _tile_loadd(1, c.data + c.column, 64);
    _tile_loadd(2, c.data + 256, 64);
    _tile_loadd(3, c.data + c.column + 256, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += 32, a.data += a.column, b.data += 256) {
    _tile_loadd(4, a.data, 64);
    _tile_loadd(6, b.data, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b.data + b.column, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.data + 512, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.data, 64);
  _tile_stored(1, c.data + c.column, 64);
  _tile_stored(2, c.data + 256, 64);
  _tile_stored(3, c.data + c.column + 256, 64);
}

constexpr int64_t kPanelKeys = 32;

inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }
inline __mmask16 first_of_16(int64_t count) { return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1 << count) - 1); }
inline int64_t up_to_32(int64_t n) { return (n + 31) / 32 * 32; }

// Rows of keys or values in panels of 32, each as columns of [32 rows][32 dims], zeros up to whole tiles.
inline void pack_rows(const Call& call, const Operand& x, const Span& span, const int32_t* rows, int64_t count, int64_t dim,
                      uint16_t* to) {
  const BFloat16* from = key_rows<BFloat16>(call, x, span);
  for (int64_t i = 0; i < up_to_32(count); ++i) {
    const BFloat16* row = from + int64_t(rows[i < count ? i : 0]) * x.row;
    uint16_t* place = to + i / 32 * 32 * up_to_32(dim) + i % 32 * 32;
    for (int64_t d = 0; d < dim; d += 32) {
      __mmask32 there = i < count ? first_of_32(dim - d) : 0;
      _mm512_storeu_si512(place + d * 32, _mm512_maskz_loadu_epi16(there, row + d));
    }
  }
}

// Adds the squares of pairs of numbers.
inline __m512 add_squares(__m512 sums, __m512i pairs) { return _mm512_dpbf16_ps(sums, (__m512bh)pairs, (__m512bh)pairs); }

// The largest root; not a number if any is none.
inline float largest_root(__m512 squares) {
  if (_mm512_cmp_ps_mask(squares, squares, _CMP_UNORD_Q)) return std::numeric_limits<float>::quiet_NaN();
  return std::sqrt(_mm512_reduce_max_ps(squares));
}

// The sums of 16 vectors' elements, in some order.
inline __m512 sums_of(__m512 (&x)[16]) {
  for (int i = 0; i < 8; ++i)
    x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    __m512d one = _mm512_castps_pd(x[2 * i]), other = _mm512_castps_pd(x[2 * i + 1]);
    x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
  }
  for (int i = 0; i < 2; ++i)
    x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x88), _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
}

// The largest Euclidean norm of packed rows.
inline float largest_norm(const uint16_t* packed, int64_t count, int64_t dim) {
  float found = 0;
  for (int64_t first = 0; first < up_to_32(count); first += 16) {
    __m512 squares[16];
    for (int64_t i = 0; i < 16; ++i) {
      squares[i] = _mm512_setzero_ps();
      const uint16_t* row = packed + first / 32 * 32 * up_to_32(dim) + (first % 32 + i) * 32;
      for (int64_t d = 0; d < dim; d += 32) squares[i] = add_squares(squares[i], _mm512_loadu_si512(row + d * 32));
    }
    float norm = largest_root(sums_of(squares));
    found = norm > found || norm != norm ? norm : found;
  }
  return found;
}

// 32 rows of 32 into 32 columns, 8 at a time: loads lay four rows, 8 apart, side by side, which takes no shuffle, and what is
// left is to transpose 8 x 8 inside of each 128 bits.
inline void turn(const uint16_t* from, uint16_t* to) {
  auto part = [&](int64_t row, int64_t column) { return _mm_loadu_si128((const __m128i*)(from + row * 32 + column)); };
  for (int64_t column = 0; column < 32; column += 8) {
    __m512i x[8], y[8];
    for (int64_t i = 0; i < 8; ++i) {
      x[i] = _mm512_broadcast_i32x4(part(i, column));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00F0, part(i + 8, column));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0F00, part(i + 16, column));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xF000, part(i + 24, column));
    }
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
      y[4 + i] = _mm512_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = _mm512_unpacklo_epi32(y[2 * i], y[2 * i + 1]);
      x[2 * i + 1] = _mm512_unpackhi_epi32(y[2 * i], y[2 * i + 1]);
    }
    // x: the first four columns of the first and of the last four rows, then the last four columns, two columns in each.
    for (int i = 0; i < 4; ++i) {
      const __m512i above = x[i / 2 * 4 + i % 2], below = x[i / 2 * 4 + 2 + i % 2];
      _mm512_storeu_si512(to + (column + 2 * i) * 32, _mm512_unpacklo_epi64(above, below));
      _mm512_storeu_si512(to + (column + 2 * i + 1) * 32, _mm512_unpackhi_epi64(above, below));
    }
  }
}

// Packed rows transposed: panels of [dim][32 keys].
inline void turn_rows(const uint16_t* packed, int64_t count, int64_t dim, uint16_t* to) {
  for (int64_t at = 0; at < up_to_32(count) * up_to_32(dim); at += 1024) turn(packed + at, to + at);
}

// The keys as they lie, the values transposed.
class TileRows {
 public:
  static constexpr int64_t kBlock = 256, kStep = 32;
  const int64_t key_row, value_rows;
  Buffer<uint16_t> keys, values;
  float largest_key = 0;  // norm

  explicit TileRows(const Call& call) : key_row(up_to_32(call.head_dim)), value_rows(up_to_32(call.v_dim)), call_(call) {
    keys.take(kBlock * key_row), values.take(kBlock * value_rows), packed_.take(kBlock * value_rows);
  }

  void gather(const Span& span, const int32_t* rows, int64_t count) {
    pack_rows(call_, call_.k, span, rows, count, call_.head_dim, +keys);
    largest_key = largest_norm(+keys, count, call_.head_dim);
    pack_rows(call_, call_.v, span, rows, count, call_.v_dim, +packed_);
    turn_rows(+packed_, count, call_.v_dim, +values);
  }

 private:
  const Call& call_;
  Buffer<uint16_t> packed_;
};

// Two rows of weights as pairs of bfloat16, rounded to nearest.
inline __m512i narrow_pair(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
  __m512i b = _mm512_add_epi32(_mm512_castps_si512(odd), half);
  return _mm512_mask_blend_epi16(0xAAAAAAAA, a, b);
}

// 2^x for x <= 127 to 1e-7 of itself, 0 for minus infinity: the fraction by a polynomial, the whole part as the exponent.
inline Vec<float> exp2_fast(Vec<float> x) {
  Vec<float> rest = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> p = fill(1.8775765784084797e-3f);
  p = fma(p, rest, fill(8.989340625703335e-3f));
  p = fma(p, rest, fill(5.582631751894951e-2f));
  p = fma(p, rest, fill(2.4015361070632935e-1f));
  p = fma(p, rest, fill(6.931530833244324e-1f));
  p = fma(p, rest, fill(9.999999403953552e-1f));
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// 2^x of two vectors as pairs of bfloat16, 0 below 2^-126. Note [weights in 16 bits]:
//
// x + 127 in steps of 1/128 is already the bfloat16 of 2^n (1 + f) at n + f = x; what is wrong is the fraction, 1 + f for 2^f.
// A table of 64 corrections mends it, one shuffle for 32 weights. Rounding x and the correction together errs by 2.3e-3
// (root mean square), 1.4 times what rounding the exact weight to bfloat16 does. Sums are taken of these very weights, so
// that values that are all alike come out as they are. x must be a number: what is none would weigh 0.
class NarrowExp2 {
 public:
  static constexpr float kStep = 128, kZero = 127 * 128;

  NarrowExp2() : correction_(_mm512_loadu_si512(table().data())), pairs_(interleaving()) {}

  // x: kStep times the exponent, and kZero.
  __m512i operator()(Vec<float> even, Vec<float> odd) const {
    __m512i steps = _mm512_packus_epi32(_mm512_cvtps_epi32((__m512)even), _mm512_cvtps_epi32((__m512)odd));
    __m512i wrong = _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(steps, 1), correction_);
    return _mm512_shuffle_epi8(_mm512_sub_epi16(steps, wrong), pairs_);
  }

 private:
  __m512i correction_, pairs_;

  // 128 (1 + f - 2^f), the mean of f at two steps.
  static const std::array<uint8_t, 64>& table() {
    static const std::array<uint8_t, 64> found = [] {
      std::array<uint8_t, 64> to;
      for (int i = 0; i < 64; ++i) {
        double sum = 0;
        for (int step = 2 * i; step < 2 * i + 2; ++step) sum += 1 + step / 128.0 - std::exp2(step / 128.0);
        to[i] = uint8_t(std::lround(128 * sum / 2));
      }
      return to;
    }();
    return found;
  }

  // Packing puts four numbers of each vector side by side in 128 bits: e e e e o o o o to e o e o e o e o.
  static __m512i interleaving() {
    return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  }
};

// Tiles of up to `widest` lanes, in whole tile registers of 32.
inline std::vector<Tile> wide_tiles_of(const std::vector<Group>& groups, int64_t widest) {
  std::vector<Tile> found;
  for (size_t g = 0; g < groups.size(); ++g)
    for (int64_t done = 0; done < groups[g].lanes; done += widest) {
      int64_t now = std::min(groups[g].lanes - done, widest);
      found.push_back({int(up_to_32(now) / 16), int(g), groups[g].first + done, now, 0, 0, 0, 0});
    }
  return found;
}

// The rows of a tile's lanes in pairs of dims: columns of [dim / 2][lanes]. Unused lanes repeat the last. Returns the largest
// norm.
inline float read_pairs(const Call& call, const Operand& x, const Span& span, const Tile& tile, const Lane* lanes, int64_t dim,
                       uint32_t* to) {
  __m512i rows[16];
  float found = 0;
  int64_t column = (dim + 31) / 32 * 16 * 16;
  for (int64_t first = 0; first < tile.vectors * 16; first += 16, to += column) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 32) {
      for (int64_t i = 0; i < 16; ++i) {
        const Lane& lane = lanes[tile.first + std::min(first + i, tile.lanes - 1)];
        rows[i] = _mm512_maskz_loadu_epi16(first_of_32(dim - d), row_of<BFloat16>(call, x, span, lane) + d);
      }
      transpose(rows);
      for (int64_t i = 0; i < 16; ++i) {
        squares = add_squares(squares, rows[i]);
        _mm512_storeu_si512(to + (d / 2 + i) * 16, rows[i]);
      }
    }
    float norm = largest_root(squares);
    found = norm > found || norm != norm ? norm : found;
  }
  return found;
}

// Columns of [row][lanes] times a factor for each lane, into the rows of a tensor.
inline void write_rows(const Call& call, const Operand& x, const Span& span, const Tile& tile, const Lane* lanes, int64_t dim,
                       const float* columns, int64_t row, const float* factors) {
  __m512i part[16];
  for (int64_t first = 0; first < tile.lanes; first += 16, columns += row * 16) {
    for (int64_t d = 0; d < dim; d += 16) {
      for (int64_t i = 0; i < 16; ++i) part[i] = _mm512_loadu_si512(columns + (d + i) * 16);
      transpose(part);
      for (int64_t i = 0; i < std::min<int64_t>(16, tile.lanes - first); ++i) {
        __m512 values = _mm512_mul_ps(_mm512_castsi512_ps(part[i]), _mm512_set1_ps(factors[first + i]));
        const Lane& lane = lanes[tile.first + first + i];
        if (call.wide) {
          _mm512_mask_storeu_ps(row_of<float>(call, x, span, lane) + d, first_of_16(dim - d), values);
        } else {
          BFloat16* to = row_of<BFloat16>(call, x, span, lane) + d;
          _mm256_mask_storeu_epi16(to, first_of_16(dim - d), (__m256i)_mm512_cvtneps_pbh(values));
        }
      }
    }
  }
}

// A panel of scores, columns of [kPanelKeys][lanes]: capped, and minus infinity where a lane does not see key `key` + row.
inline void cap_scores(const Call& call, float* scores, int64_t count) {
  for (int64_t i = 0; i < count; ++i) scores[i] = float(call.softcap) * std::tanh(scores[i] * float(call.scale / call.softcap));
}

// Scores in units of 1: times a factor, and the bias added, [kPanelKeys] numbers or columns of [..][lanes] `vector` apart.
template <int N>
void add_bias(float* scores, float factor, const float* numbers, int64_t vector, bool by_key) {
  for (int c = 0; c < N; ++c)
    for (int64_t j = 0; j < kPanelKeys; ++j, scores += 16)
      store(scores, fma(load(scores), fill(factor), by_key ? fill(numbers[j]) : load(numbers + c * vector + j * 16)));
}

template <int N>
void hide_scores(float* scores, const int32_t* low, const int32_t* high, int64_t key) {
  for (int c = 0; c < N; ++c) {
    IntVec<float> from = load_ints<float>(low + c * 16), to = load_ints<float>(high + c * 16);
    for (int64_t j = 0; j < kPanelKeys; ++j, scores += 16) {
      IntVec<float> at = IntVec<float>{} + int32_t(key + j), seen = (from <= at) & (to > at);
      store(scores, seen ? load(scores) : fill(-std::numeric_limits<float>::infinity()));
    }
  }
}

}  // namespace dil
#endif
