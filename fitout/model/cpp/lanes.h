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

// n numbers of fp32 as others.
inline void write(float* to, const float* from, long n) { memcpy(to, from, n * sizeof(float)); }
#if defined(__AVX512BF16__)
inline __m256i rounded(vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
inline void write(bf16* to, const float* from, long n) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, rounded(load<vec>(from + i)));
  if (i < n) {
    float rest[LANES] = {};
    memcpy(rest, from + i, (n - i) * sizeof(float));
    __m256i last = rounded(load<vec>(rest));
    memcpy(to + i, &last, (n - i) * sizeof(bf16));
  }
}
#endif

}  // namespace
