// What lies between products: the loss, gated activations, norms and rotations, each in one pass or two over its rows.
// between.py says what each computes. Numbers are fp32 or bf16; everything is computed in fp32.

#include "lanes.h"

namespace {

template <class T> inline vec as(vec x) {  // rounded to T
  T some[LANES];
  set(some, x);
  return get(some);
}

inline vec sigmoid(vec x) {
  vec minus = -x;
  return 1.0f / (1.0f + exp_(minus > 88.0f ? all(88.0f) : minus));
}
inline ints counting() {
  ints at = {};
  for (int i = 0; i < LANES; i++) at[i] = i;
  return at;
}

// logits (rows, width): losses (rows), and with weights (rows) the gradient of their weighted sum in the logits' place.
// Returns how many targets are none of the width's; of their rows nothing is computed.
template <class T>
int loss(T* logits, const int64_t* targets, const float* weights, float* losses, long rows, long width, int threads) {
  const ints index = counting();
  int outside = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : outside)
  for (long r = 0; r < rows; r++) {
    T* row = logits + r * width;
    if (targets[r] < 0 || targets[r] >= width) {
      outside++;
      continue;
    }
    vec highest = all(-INFINITY), total = {};
    for (long i = 0; i < width; i += LANES) {
      vec x = get(row + i, width - i);
      if (width - i < LANES) x = index < (int32_t)(width - i) ? x : all(-INFINITY);
      highest = x > highest ? x : highest;
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, highest[i]);
    for (long i = 0; i < width; i += LANES) {
      vec e = exp_(get(row + i, width - i) - top);
      total += width - i < LANES ? (index < (int32_t)(width - i) ? e : vec{}) : e;
    }
    float whole = sum(total), at_target = wide(row[targets[r]]);
    losses[r] = std::log(whole) + top - at_target;
    if (!weights) continue;
    float share = weights[r] / whole;
    for (long i = 0; i < width; i += LANES) {
      vec slope = exp_(get(row + i, width - i) - top) * share;
      if (targets[r] >= i && targets[r] < i + LANES) slope[targets[r] - i] -= weights[r];
      set(row + i, slope, width - i);
    }
  }
  return outside;
}

// silu(gate) * up
template <class T> void gated(const T* gate, const T* up, T* out, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < count; i += LANES) {
    vec g = get(gate + i, count - i);
    set(out + i, g * sigmoid(g) * get(up + i, count - i), count - i);
  }
}

template <class T>
void gated_slopes(const T* grad, const T* gate, const T* up, T* gate_slope, T* up_slope, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < count; i += LANES) {
    vec d = get(grad + i, count - i), g = get(gate + i, count - i), s = sigmoid(g);
    set(gate_slope + i, d * get(up + i, count - i) * s * (1.0f + g * (1.0f - s)), count - i);
    set(up_slope + i, d * g * s, count - i);
  }
}

// weight * (x / rms), rounded before it is scaled, as Llama has it; and 1 / rms of each row
template <class T>
void norm(const T* x, const T* weight, T* out, float* inverse, float eps, long rows, long width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < rows; r++) {
    const T* row = x + r * width;
    vec squares = {};
    for (long i = 0; i < width; i += LANES) {
      vec a = get(row + i, width - i);
      squares += a * a;
    }
    float scale = inverse[r] = 1.0f / std::sqrt(sum(squares) / width + eps);
    for (long i = 0; i < width; i += LANES)
      set(out + r * width + i, as<T>(get(row + i, width - i) * scale) * get(weight + i, width - i), width - i);
  }
}

template <class T>
void norm_slope(const T* grad, const T* x, const T* weight, const float* inverse, T* out, long rows, long width,
                int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < rows; r++) {
    const T *g = grad + r * width, *row = x + r * width;
    vec product = {};
    for (long i = 0; i < width; i += LANES)
      product += get(g + i, width - i) * get(weight + i, width - i) * get(row + i, width - i);
    float scale = inverse[r], along = -sum(product) * scale * scale * scale / width;
    for (long i = 0; i < width; i += LANES)
      set(out + r * width + i,
          get(g + i, width - i) * get(weight + i, width - i) * scale + get(row + i, width - i) * along, width - i);
  }
}

// x cos + rotate_half(x) sin of (heads, tokens, width), each with its strides; cos and sin (tokens, width). `back`: the
// gradient of x from that of the result.
template <class T>
void turn(const T* x, long x_head, long x_token, const T* cos, const T* sin, T* out, long out_head, long out_token,
          long heads, long tokens, long width, bool back, int threads) {
  long half = width / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long t = 0; t < tokens; t++)
    for (long h = 0; h < heads; h++) {
      const T *a = x + h * x_head + t * x_token, *c = cos + t * width, *s = sin + t * width;
      T* to = out + h * out_head + t * out_token;
      for (long i = 0; i < half; i += LANES) {
        long n = half - i;
        vec first = get(a + i, n), second = get(a + half + i, n);
        vec s1 = get(s + i, n), s2 = get(s + half + i, n), c1 = get(c + i, n), c2 = get(c + half + i, n);
        set(to + i, back ? first * c1 + second * s2 : first * c1 - second * s1, n);
        set(to + half + i, back ? second * c2 - first * s1 : second * c2 + first * s2, n);
      }
    }
}

}  // namespace

#define FOR(T, NAME)                                                                                                  \
  int32_t loss_##NAME(T* logits, const int64_t* targets, const float* weights, float* losses, int64_t rows,           \
                      int64_t width, int32_t threads) {                                                               \
    return loss(logits, targets, weights, losses, rows, width, threads);                                              \
  }                                                                                                                   \
  void gated_##NAME(const T* gate, const T* up, T* out, int64_t count, int32_t threads) {                             \
    gated(gate, up, out, count, threads);                                                                             \
  }                                                                                                                   \
  void gated_slopes_##NAME(const T* grad, const T* gate, const T* up, T* gate_slope, T* up_slope, int64_t count,      \
                           int32_t threads) {                                                                         \
    gated_slopes(grad, gate, up, gate_slope, up_slope, count, threads);                                               \
  }                                                                                                                   \
  void norm_##NAME(const T* x, const T* weight, T* out, float* inverse, float eps, int64_t rows, int64_t width,       \
                   int32_t threads) {                                                                                 \
    norm(x, weight, out, inverse, eps, rows, width, threads);                                                         \
  }                                                                                                                   \
  void norm_slope_##NAME(const T* grad, const T* x, const T* weight, const float* inverse, T* out, int64_t rows,      \
                         int64_t width, int32_t threads) {                                                            \
    norm_slope(grad, x, weight, inverse, out, rows, width, threads);                                                  \
  }                                                                                                                   \
  void turn_##NAME(const T* x, int64_t x_head, int64_t x_token, const T* cos, const T* sin, T* out, int64_t out_head, \
                   int64_t out_token, int64_t heads, int64_t tokens, int64_t width, int32_t back, int32_t threads) {  \
    turn(x, x_head, x_token, cos, sin, out, out_head, out_token, heads, tokens, width, back, threads);                \
  }

extern "C" {
FOR(float, float32)
FOR(bf16, bfloat16)
}
