// Vectors of the widest kind that the compiler was asked for: AVX-512, AVX2 with FMA, or what it makes of 16 bytes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dil {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Draws __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Draws __attribute__((vector_size(kVectorBytes / 2)));
};
template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using IntVec = typename Lanes<T>::Int;
template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr int kWidth = kVectorBytes / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* x) {
  Vec<T> v;
  std::memcpy(&v, x, kVectorBytes);
  return v;
}
template <class T>
inline IntVec<T> load_ints(const int32_t* x) {
  typedef int32_t Half __attribute__((vector_size(kWidth<T> * 4)));
  Half v;
  std::memcpy(&v, x, sizeof(v));
  return __builtin_convertvector(v, IntVec<T>);
}
template <class T>
inline void store(T* x, Vec<T> v) {
  std::memcpy(x, &v, kVectorBytes);
}

// The build forbids contraction (a * b + c stays two roundings), so fused operations are named.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline Vec<float> fill(float x) { return (Vec<float>)_mm512_set1_ps(x); }
inline Vec<double> fill(double x) { return (Vec<double>)_mm512_set1_pd(x); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec<double> larger(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__) && defined(__FMA__)
inline Vec<float> fill(float x) { return (Vec<float>)_mm256_set1_ps(x); }
inline Vec<double> fill(double x) { return (Vec<double>)_mm256_set1_pd(x); }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
inline Vec<float> larger(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec<double> larger(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
template <class T>
inline Vec<T> fill(T x) {
  return Vec<T>{} + x;
}
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
#endif

#if defined(__AVX512F__)
// 16 rows of 16 elements of 32 bits, transposed.
inline void transpose(__m512i (&r)[16]) {
  __m512i s[16];
  for (int i = 0; i < 8; ++i)
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]), s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
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
#endif

// kWidth rows of kWidth elements, transposed.
template <class T>
inline void turn_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && kWidth<T> == 16) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(from + i * from_row);
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_row, rows[i]);
    return;
  }
#endif
  for (int i = 0; i < kWidth<T>; ++i)
    for (int j = 0; j < kWidth<T>; ++j) to[j * to_row + i] = from[i * from_row + j];
}

// 2^x for x <= 8 to 1e-7 of itself, 0 for x <= -127 (minus infinity among them); what is no number stays none.
inline Vec<float> exp2_up_to_8(Vec<float> x) {
  const Vec<float> shifter = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  // Of two operands of which one is no number, `larger` gives the second.
  Vec<float> clipped = larger(fill(-127.0f), x), shifted = clipped + shifter, rest = clipped - (shifted - shifter);
  Vec<float> p = fill(1.326472614891827e-3f);
  p = fma(p, rest, fill(9.671512991189957e-3f));
  p = fma(p, rest, fill(5.550733581185341e-2f));
  p = fma(p, rest, fill(2.402224242687225e-1f));
  p = fma(p, rest, fill(6.931470036506653e-1f));
  p = fma(p, rest, fill(1.0f));
  // The exponent of 2^-127 is 0 and p is 1 there, so the sum of the two is the bits of 0.
  return (Vec<float>)((IntVec<float>)p + ((IntVec<float>)shifted << 23));
}
inline Vec<double> exp2_up_to_8(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kWidth<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

template <class T>
inline T tanh_of(T x) {
  return std::tanh(x);
}

// Rows in other dtypes, converted on load and store.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline BFloat16 narrow_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7FC0};
  return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
inline float widen(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, rest = x.bits & 0x3FF, bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000 | (rest << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (rest << 13);
  } else {
    float y = float(rest) * 5.9604644775390625e-8f;
    return sign ? -y : y;
  }
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline Half narrow_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return {uint16_t(sign | 0x7E00)};
  if (size >= 0x477FF000) return {uint16_t(sign | 0x7C00)};
  if (size < 0x38800000) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    float y, magnitude;
    std::memcpy(&magnitude, &size, 4);
    y = magnitude + 0.5f;
    std::memcpy(&bits, &y, 4);
    return {uint16_t(sign | (bits - 0x3F000000))};
  }
  size += 0xFFF + ((size >> 13) & 1);
  return {uint16_t(sign | ((size - 0x38000000) >> 13))};
}

template <class T>
inline void copy_row(const T* from, T* to, int n) {
  int i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from[i];
}
inline void load_row(const float* from, float* to, int n) { copy_row(from, to, n); }
inline void load_row(const double* from, double* to, int n) { copy_row(from, to, n); }
inline void load_row(const BFloat16* from, float* to, int n) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  int i = 0;
  for (; i + kWidth<float> <= n; i += kWidth<float>) {
    Short bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(to + i, &wide, sizeof(wide));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}
inline void load_row(const Half* from, float* to, int n) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}
template <class X, class T>
inline void load_row(const X* from, T* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = T(widen(from[i]));
}
inline void put(float* to, float x) { *to = x; }
inline void put(double* to, double x) { *to = x; }
inline void put(BFloat16* to, float x) { *to = narrow_bfloat16(x); }
inline void put(Half* to, float x) { *to = narrow_half(x); }
template <class X, class T>
inline void put_row(const T* from, X* to, int n) {
  for (int i = 0; i < n; ++i) put(to + i, from[i]);
}
inline void put_row(const float* from, BFloat16* to, int n) {
  typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  int i = 0;
  for (; i + kWidth<float> <= n; i += kWidth<float>) {
    Wide bits, rounded;
    std::memcpy(&bits, from + i, sizeof(bits));
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    // Asked of the bits: of numbers the compiler may think that each equals itself.
    Short narrow = __builtin_convertvector((bits & 0x7FFFFFFF) > 0x7F800000 ? Wide{} + 0x7FC0 : rounded, Short);
    std::memcpy(to + i, &narrow, sizeof(narrow));
  }
  for (; i < n; ++i) put(to + i, from[i]);
}
inline void put_row(const float* from, Half* to, int n) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) put(to + i, from[i]);
}

// The dtype of scores and sums for operands of dtype X.
template <class X>
struct Score {
  typedef float T;
};
template <>
struct Score<double> {
  typedef double T;
};

}  // namespace dil
