// What the kernels here share: vectors as wide as the processor's, numbers of bf16, exp. native.py compiles them where
// they run, for the processor at hand: AVX-512 where it has it, else 8 lanes; bf16 only where it multiplies it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

struct bf16 { uint16_t bits; };

template <class V> inline V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V> inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }
inline vec all(float x) { return x - vec{}; }
inline vec most(vec a, vec b) { return a > b ? a : b; }
inline long up(long n, long to) { return (n + to - 1) / to * to; }

// exp(x) for x up to 88, to a few units in the last place, and 0 below -87; what is not a number stays so. (Cody and
// Waite's reduction with the polynomial of Cephes' expf.)
inline vec exp_(vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  vec shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vec y = (vec)((bits)p + ((bits)shifted << 23));
  return x < -87.0f ? vec{} : y;
}

// tanh(x) to a few units in the last place. (Cephes' tanhf.)
inline vec tanh_(vec x) {
  vec z = x * x, size = most(x, -x), near = all(-5.70498872745e-3f);
  near = near * z + 2.06390887954e-2f;
  near = near * z - 5.37397155531e-2f;
  near = near * z + 1.33314422036e-1f;
  near = near * z - 3.33332819422e-1f;
  vec far = 1.0f - 2.0f / (exp_(size + size > 40.0f ? all(40.0f) : size + size) + 1.0f);
  return size < 0.625f ? near * z * x + x : x < 0.0f ? -far : far;
}

// A thread's own memory, kept from call to call, in lines of the cache.
template <class T> struct Room {
  T* at = nullptr;
  long size = 0;
  ~Room() { free(at); }
  T* of(long numbers) {
    if (numbers > size) {
      free(at);
      at = (T*)aligned_alloc(64, up(numbers * sizeof(T), 64));
      if (!at) {
        fprintf(stderr, "fitout: no memory for %ld numbers of attention\n", numbers);
        abort();
      }
      size = numbers;
    }
    return at;
  }
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t upper = (uint32_t)x.bits << 16;
  return load<float>(&upper);
}

#if defined(__AVX512BF16__)
inline __m256i rounded(vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
#endif

// LANES numbers as fp32, and back; `n` of them where fewer are left.
inline vec get(const float* from) { return load<vec>(from); }
inline vec get(const bf16* from) {
  typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
  return (vec)(__builtin_convertvector(load<halves>(from), ints) << 16);
}
inline void set(float* to, vec x) { store(to, x); }
inline void set(bf16* to, vec x) {
#if defined(__AVX512BF16__)
  store(to, rounded(x));
#else
  typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
  bits own = (bits)x, nearest = own + 0x7fff + ((own >> 16) & 1);
  bits upper = (x == x ? nearest : own | 0x400000) >> 16;  // what is not a number stays so
  store(to, __builtin_convertvector(upper, halves));
#endif
}
template <class T> inline vec get(const T* from, long n) {
  if (n >= LANES) return get(from);
  T some[LANES] = {};
  memcpy(some, from, n * sizeof(T));
  return get(some);
}
template <class T> inline void set(T* to, vec x, long n) {
  if (n >= LANES) return set(to, x);
  T some[LANES];
  set(some, x);
  memcpy(to, some, n * sizeof(T));
}
inline float sum(vec x) {
  float all = 0;
  for (int i = 0; i < LANES; i++) all += x[i];
  return all;
}

// n numbers of fp32 as others.
template <class T> inline void write(T* to, const float* from, long n) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) set(to + i, load<vec>(from + i));
  if (i < n) set(to + i, get(from + i, n - i), n - i);
}

}  // namespace
