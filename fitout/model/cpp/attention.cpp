// Attention of packed documents and trees of them, forward and backward; native.py says what is computed.
//
// A block of queries stands in the lanes of vectors: scores, weights and their gradients are matrices of keys x queries,
// the softmax needs no sum across lanes, and a mask is a comparison of lanes. Keys come in chunks, with a running maximum
// (Dao et al., arXiv 2205.14135; backward as in section 3 there), so that what stands between two products stays in the
// cache. Every product is one kernel, gemm(), of a left matrix with rows as they are and a right one of "units": what one
// lane multiplies at a time, a number of fp32 or two of bf16 that follow each other along what is summed over.
//
// What a task adds up, it adds up alone and in order, so results do not depend on the number of threads.

#include <vector>

#include "lanes.h"

namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 6, GROUP = 4;  // of a tile of a product that stands in registers: rows, and vectors beside each other
#else
constexpr int ROWS = 4, GROUP = 2;
#endif
constexpr int BLOCK = 64;   // queries at once
constexpr int CHUNK = 128;  // keys at once, before the block
constexpr int INSIDE = 32;  // and inside it, where queries before them are left out
constexpr int SPAN = 512;   // queries of a task of the forward

template <class T> struct Kind;
template <> struct Kind<float> {
  typedef float unit;
  static constexpr int STEP = 1;
};
template <> struct Kind<bf16> {
  typedef uint32_t unit;
  static constexpr int STEP = 2;
};
template <class T> using Unit = typename Kind<T>::unit;

// Products

inline vec dot(vec sum, float a, vec b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline vec dot(vec sum, uint32_t a, vec b) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

template <class T, int R, int N, bool ADD>
inline void tile(const T* a, long lda, const Unit<T>* b, long ldb, long steps, float* c, long ldc) {
  vec sum[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = ADD ? load<vec>(c + r * ldc + n * LANES) : vec{};
  for (long s = 0; s < steps; s++) {
    vec right[N];
    for (int n = 0; n < N; n++) right[n] = load<vec>(b + s * ldb + n * LANES);
    for (int r = 0; r < R; r++) {
      auto left = load<Unit<T>>(a + r * lda + s * Kind<T>::STEP);
      for (int n = 0; n < N; n++) sum[r][n] = dot(sum[r][n], left, right[n]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) store(c + r * ldc + n * LANES, sum[r][n]);
}

template <class T, int R, int N, bool ADD>
void below(long rows, const T* a, long lda, const Unit<T>* b, long ldb, long steps, float* c, long ldc) {
  for (; rows >= R; rows -= R, a += R * lda, c += R * ldc) tile<T, R, N, ADD>(a, lda, b, ldb, steps, c, ldc);
  if constexpr (R > 1)
    if (rows) below<T, R - 1, N, ADD>(rows, a, lda, b, ldb, steps, c, ldc);
}

// c (rows, cols) = a b, or += where ADD: a (rows, steps * STEP) numbers, b (steps, cols) units, cols a multiple of LANES.
template <class T, bool ADD>
void gemm(long rows, long cols, long steps, const T* a, long lda, const Unit<T>* b, long ldb, float* c, long ldc) {
  long at = 0;
  for (; at + GROUP * LANES <= cols; at += GROUP * LANES)
    below<T, ROWS, GROUP, ADD>(rows, a, lda, b + at, ldb, steps, c + at, ldc);
  for (; at < cols; at += LANES) below<T, ROWS, 1, ADD>(rows, a, lda, b + at, ldb, steps, c + at, ldc);
}

// Forms of a matrix

template <int HALF> inline void exchange(ints* v) {
  ints low, high;
  for (int l = 0; l < LANES; l++) {
    low[l] = l & HALF ? LANES + l - HALF : l;
    high[l] = l & HALF ? LANES + l : l + HALF;
  }
  for (int i = 0; i < LANES; i++)
    if (!(i & HALF)) {
      ints a = v[i], b = v[i + HALF];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + HALF] = __builtin_shuffle(a, b, high);
    }
}

// to (cols, rows) = from (rows, cols), 32 bits each; rows are filled up with zeros to a multiple of LANES.
void transpose(void* to_, long ldt, const void* from_, long ldf, long rows, long cols) {
  auto to = (int32_t*)to_;
  auto from = (const int32_t*)from_;
  for (long r = 0; r < rows; r += LANES) {
    long c = 0;
    for (; c + LANES <= cols; c += LANES) {
      ints v[LANES];
      for (int i = 0; i < LANES; i++) v[i] = r + i < rows ? load<ints>(from + (r + i) * ldf + c) : ints{};
      exchange<1>(v), exchange<2>(v), exchange<4>(v);
      if (LANES > 8) exchange<LANES / 2>(v);
      for (int i = 0; i < LANES; i++) store(to + (c + i) * ldt + r, v[i]);
    }
    for (; c < cols; c++)
      for (int i = 0; i < LANES; i++) to[c * ldt + r + i] = r + i < rows ? from[(r + i) * ldf + c] : 0;
  }
}

// to (full / STEP, cols) units that are summed over along rows, of from (rows, cols); rows are filled up with zeros.
void beside(float* to, long ldt, const float* from, long ldf, long rows, long cols, long full) {
  for (long r = 0; r < rows; r++) memcpy(to + r * ldt, from + r * ldf, cols * sizeof(float));
  for (long r = rows; r < full; r++) memset(to + r * ldt, 0, cols * sizeof(float));
}

void beside(uint32_t* to, long ldt, const bf16* from, long ldf, long rows, long cols, long full) {
  long r = 0;
  for (; r + 1 < rows; r += 2)
    for (long c = 0; c < cols; c++)
      to[r / 2 * ldt + c] = from[r * ldf + c].bits | (uint32_t)from[(r + 1) * ldf + c].bits << 16;
  if (r < rows) {
    for (long c = 0; c < cols; c++) to[r / 2 * ldt + c] = from[r * ldf + c].bits;
    r += 2;
  }
  for (; r < full; r += 2) memset(to + r / 2 * ldt, 0, cols * sizeof(uint32_t));
}

// Vectors of two rows that follow each other, into rows and into units of a matrix BLOCK wide; of fp32 both are one.
inline void put(float* rows, float*, long j, int lane, vec a, vec b) {
  store(rows + j * BLOCK + lane, a);
  store(rows + (j + 1) * BLOCK + lane, b);
}
#if defined(__AVX512BF16__)
inline void put(bf16* rows, uint32_t* units, long j, int lane, vec a, vec b) {
  __m256i first = rounded(a), second = rounded(b);
  if (rows) {
    store(rows + j * BLOCK + lane, first);
    store(rows + (j + 1) * BLOCK + lane, second);
  }
  if (units)
    store(units + j / 2 * BLOCK + lane,
          (ints)_mm512_cvtepu16_epi32(first) | (ints)_mm512_cvtepu16_epi32(second) << 16);
}
#endif

template <class T> inline float inner(const T* a, const T* b, long n) {
  vec products = {};
  for (long i = 0; i < n; i += LANES) products += get(a + i, n - i) * get(b + i, n - i);
  return sum(products);
}

// What is asked for

struct Segment {
  int64_t start, end, last, depth;  // tokens [start, end), seen by those up to `last`; the place of its first one
};

struct Call {
  const void *q, *k, *v, *grad;  // (heads, tokens, width), each with its strides; the last is 1
  void *out, *dq, *dk, *dv;      // (tokens, heads, width)
  float* norm;                   // (heads, tokens)
  const float* sinks;            // (heads) or none: a score each that takes part in the softmax and leads nowhere
  const Segment* segments;
  int64_t count, tokens, heads, few, width, value;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head;
  int64_t window;  // 0: none
  float scale, cap;  // with a cap, scores are cap tanh(score / cap); 0: none
  int32_t threads;
};

inline vec capped(vec x, float cap) { return cap * tanh_(x / cap); }

struct Tree {
  int64_t first, past, start, end;  // its segments, its tokens
};

std::vector<Tree> trees(const Call& call) {
  std::vector<Tree> found;
  for (int64_t i = 0; i < call.count; i++) {
    const Segment& s = call.segments[i];
    if (found.empty() || s.start >= found.back().end) found.push_back({i, i, s.start, s.last});
    found.back().past = i + 1;
  }
  return found;
}

// Queries [start, end), at most BLOCK, of one tree, and where each stands in its own document.
struct Block {
  const Call& call;
  const Tree& tree;
  int64_t start, end;
  int lanes;
  int32_t place[BLOCK];

  Block(const Call& call, const Tree& tree, int64_t start, int64_t past)
      : call(call), tree(tree), start(start), end(std::min(start + BLOCK, past)), lanes((int)up(end - start, LANES)) {
    int64_t i = tree.first;
    for (int64_t q = start; q < end; q++) {
      while (call.segments[i].end <= q) i++;
      place[q - start] = (int32_t)(call.segments[i].depth + q - call.segments[i].start);
    }
    for (int64_t q = end - start; q < BLOCK; q++) place[q] = place[end - start - 1];
  }

  // Calls each(first key, past key, first lane, segment, whole) for all keys that some query sees. Before the first lane
  // no query sees any of them; `whole`: every one sees all of them.
  template <class F> void look(F each) const {
    int64_t least = *std::min_element(place, place + BLOCK), largest = *std::max_element(place, place + BLOCK);
    for (int64_t i = tree.first; i < tree.past && call.segments[i].start < end; i++) {
      const Segment& s = call.segments[i];
      if (s.last <= start) continue;
      for (int64_t j = s.start, past; j < std::min(s.end, end); j = past) {
        past = std::min({j < start ? std::min(j + CHUNK, start) : j + INSIDE, s.end, end});
        int64_t early = s.depth + j - s.start, late = early + past - j - 1;
        if (call.window && least - late >= call.window) continue;
        int lane = (int)(std::max<int64_t>(0, j - start) / LANES * LANES);
        each(j, past, lane, s, past - 1 <= start && s.last >= end && (!call.window || largest - early < call.window));
      }
    }
  }
};

// Scores of some queries, minus infinity for a key that they do not see.
struct Mask {
  ints index, place;
  int32_t last;
  int64_t window;

  Mask(const Block& block, int lane, const Segment& s)
      : index{}, place(load<ints>(block.place + lane)), last((int32_t)s.last), window(block.call.window) {
    for (int i = 0; i < LANES; i++) index[i] = (int32_t)block.start + lane + i;
  }

  vec operator()(vec score, int64_t key, const Segment& s) const {
    ints seen = (index >= (int32_t)key) & (index < last);
    if (window) seen &= place - (int32_t)(s.depth + key - s.start) < (int32_t)window;
    return seen ? score : all(-INFINITY);
  }
};

template <class T> struct Memory {
  Room<float> scores, slopes, result, number, keys, values;
  Room<T> turned, rows, slope_rows;
  Room<Unit<T>> query, grad, query_beside, grad_beside, units, pairs;
};

template <class T> Memory<T>& memory() {
  static thread_local Memory<T> mine;
  return mine;
}

// from (rows, width) as (width, *ld), zeros behind: one at least where units are pairs, which may end beyond the last row.
template <class T> const T* turn(Memory<T>& m, const T* from, long ldf, long rows, long width, long* ld) {
  constexpr int STEP = Kind<T>::STEP;
  long units = up(rows / STEP + (STEP > 1), LANES);
  *ld = units * STEP;
  T* to = m.turned.of(width * *ld);
  if constexpr (STEP == 1) {
    transpose(to, *ld, from, ldf, rows, width);
  } else {
    auto pairs = m.pairs.of(LANES * width);
    for (long r = 0; r < *ld; r += LANES * STEP) {
      long some = std::max(0L, std::min<long>(rows - r, LANES * STEP));
      beside(pairs, width, from + r * ldf, ldf, some, width, LANES * STEP);
      transpose((Unit<T>*)to + r / STEP, units, pairs, width, LANES, width);
    }
  }
  return to;
}

template <class T> void forward(const Call& call, const Tree& tree, int64_t head, int64_t from, int64_t past) {
  constexpr int STEP = Kind<T>::STEP;
  Memory<T>& m = memory<T>();
  long D = call.width, V = call.value, most_wide = up(std::max(D, V), LANES), few = head / (call.heads / call.few), ld;
  auto q = (const T*)call.q + head * call.q_head, k = (const T*)call.k + few * call.k_head;
  auto v = (const T*)call.v + few * call.v_head;
  const T* turned = turn(m, v + tree.start * call.v_token, call.v_token, past - tree.start, V, &ld);
  auto query = m.query.of(most_wide * BLOCK);
  float* scores = m.scores.of(CHUNK * BLOCK);
  float *result = m.result.of(most_wide * BLOCK), *number = m.number.of(most_wide * BLOCK);
  auto units = STEP == 1 ? (Unit<T>*)scores : m.units.of(CHUNK * BLOCK);
  for (int64_t start = from; start < past; start += BLOCK) {
    Block block(call, tree, start, past);
    int lanes = block.lanes;
    transpose(query, BLOCK, q + start * call.q_token, call.q_token / STEP, block.end - start, D / STEP);
    float top[BLOCK], sum[BLOCK] = {};
    std::fill(top, top + BLOCK, call.sinks ? call.sinks[head] : -1e30f);
    if (call.sinks) std::fill(sum, sum + BLOCK, 1.0f);
    memset(result, 0, V * BLOCK * sizeof(float));
    block.look([&](int64_t j0, int64_t j1, int first, const Segment& s, bool whole) {
      long n = j1 - j0, even = up(n, 2);
      gemm<T, false>(n, lanes - first, D / STEP, k + j0 * call.k_token, call.k_token, query + first, BLOCK,
                     scores + first, BLOCK);
      for (int lane = first; lane < lanes; lane += LANES) {
        Mask mask(block, lane, s);
        vec before = load<vec>(top + lane), highest = before;
        for (long j = 0; j < n; j++) {
          vec x = load<vec>(scores + j * BLOCK + lane) * call.scale;
          if (call.cap) x = capped(x, call.cap);
          if (!whole) x = mask(x, j0 + j, s);
          store(scores + j * BLOCK + lane, x);
          highest = most(highest, x);
        }
        if (n < even) store(scores + n * BLOCK + lane, all(-INFINITY));
        vec shrunk = exp_(before - highest), total = load<vec>(sum + lane) * shrunk;
        for (long j = 0; j < even; j += 2) {
          vec a = exp_(load<vec>(scores + j * BLOCK + lane) - highest);
          vec b = exp_(load<vec>(scores + (j + 1) * BLOCK + lane) - highest);
          total += a + b;
          put(STEP == 1 ? (T*)scores : nullptr, units, j, lane, a, b);
        }
        store(top + lane, highest);
        store(sum + lane, total);
        for (long d = 0; d < V; d++) store(result + d * BLOCK + lane, load<vec>(result + d * BLOCK + lane) * shrunk);
      }
      gemm<T, true>(V, lanes - first, (n + STEP - 1) / STEP, turned + (j0 - tree.start), ld, units + first, BLOCK,
                    result + first, BLOCK);
    });
    for (int lane = 0; lane < lanes; lane += LANES) {
      vec inverse = 1.0f / load<vec>(sum + lane);
      for (long d = 0; d < V; d++) store(result + d * BLOCK + lane, load<vec>(result + d * BLOCK + lane) * inverse);
    }
    transpose(number, up(V, LANES), result, BLOCK, V, lanes);
    for (int64_t i = start; i < block.end; i++) {
      write((T*)call.out + (i * call.heads + head) * V, number + (i - start) * up(V, LANES), V);
      call.norm[head * call.tokens + i] = top[i - start] + std::log(sum[i - start]);
    }
  }
}

template <class T> void backward(const Call& call, const Tree& tree, int64_t few) {
  constexpr int STEP = Kind<T>::STEP;
  Memory<T>& m = memory<T>();
  long D = call.width, V = call.value, DL = up(D, LANES), VL = up(V, LANES), tokens = tree.end - tree.start, ld;
  auto k = (const T*)call.k + few * call.k_head, v = (const T*)call.v + few * call.v_head;
  const T* turned = turn(m, k + tree.start * call.k_token, call.k_token, tokens, D, &ld);
  float *keys = m.keys.of(tokens * DL), *values = m.values.of(tokens * VL);
  memset(keys, 0, tokens * DL * sizeof(float));
  memset(values, 0, tokens * VL * sizeof(float));
  auto query = m.query.of(std::max(DL, VL) * BLOCK), grad = m.grad.of(VL * BLOCK);
  auto query_beside = m.query_beside.of(DL * BLOCK), grad_beside = m.grad_beside.of(VL * BLOCK);
  float *scores = m.scores.of(CHUNK * BLOCK), *slopes = m.slopes.of(CHUNK * BLOCK);
  float *result = m.result.of(std::max(DL, VL) * BLOCK), *number = m.number.of(std::max(DL, VL) * BLOCK);
  T* rows = STEP == 1 ? (T*)scores : m.rows.of(CHUNK * BLOCK);
  T* slope_rows = STEP == 1 ? (T*)slopes : m.slope_rows.of(CHUNK * BLOCK);
  auto units = STEP == 1 ? (Unit<T>*)slopes : m.units.of(CHUNK * BLOCK);
  if (DL > D) memset(query_beside, 0, DL * BLOCK * sizeof(*query_beside));
  if (VL > V) memset(grad_beside, 0, VL * BLOCK * sizeof(*grad_beside));
  long groups = call.heads / call.few;
  for (int64_t head = few * groups; head < (few + 1) * groups; head++)
    for (int64_t start = tree.start; start < tree.end; start += BLOCK) {
      Block block(call, tree, start, tree.end);
      int lanes = block.lanes, own = (int)(block.end - start);
      auto q = (const T*)call.q + head * call.q_head + start * call.q_token;
      auto g = (const T*)call.grad + head * call.grad_head + start * call.grad_token;
      transpose(query, BLOCK, q, call.q_token / STEP, own, D / STEP);
      transpose(grad, BLOCK, g, call.grad_token / STEP, own, V / STEP);
      beside(query_beside, DL, q, call.q_token, own, D, lanes);
      beside(grad_beside, VL, g, call.grad_token, own, V, lanes);
      float norm[BLOCK] = {}, mean[BLOCK] = {};
      for (int i = 0; i < own; i++) {
        norm[i] = call.norm[head * call.tokens + start + i];
        mean[i] = inner(g + i * call.grad_token, (const T*)call.out + ((start + i) * call.heads + head) * V, V);
      }
      memset(result, 0, D * BLOCK * sizeof(float));
      block.look([&](int64_t j0, int64_t j1, int first, const Segment& s, bool whole) {
        long n = j1 - j0, even = up(n, 2), j = j0 - tree.start, some = lanes - first;
        gemm<T, false>(n, some, D / STEP, k + j0 * call.k_token, call.k_token, query + first, BLOCK, scores + first,
                       BLOCK);
        gemm<T, false>(n, some, V / STEP, v + j0 * call.v_token, call.v_token, grad + first, BLOCK, slopes + first,
                       BLOCK);
        for (int lane = first; lane < lanes; lane += LANES) {
          Mask mask(block, lane, s);
          vec whole_norm = load<vec>(norm + lane), away = load<vec>(mean + lane);
          if (n < even) {
            store(scores + n * BLOCK + lane, all(-INFINITY));
            store(slopes + n * BLOCK + lane, vec{});
          }
          for (long i = 0; call.cap && i < n; i++)
            store(scores + i * BLOCK + lane, capped(load<vec>(scores + i * BLOCK + lane) * call.scale, call.cap));
          float scale = call.cap ? 1.0f : call.scale;
          auto weight = [&](long i) {
            vec x = load<vec>(scores + i * BLOCK + lane) * scale;
            return exp_((whole ? x : mask(x, j0 + i, s)) - whole_norm);
          };
          auto slope = [&](long i, vec weight) {
            vec one = weight * (load<vec>(slopes + i * BLOCK + lane) - away) * call.scale;
            if (!call.cap) return one;
            vec share = most(load<vec>(scores + i * BLOCK + lane) / call.cap, all(-1.0f));
            return one * (1.0f - share * share);
          };
          for (long i = 0; i < even; i += 2) {
            vec a = weight(i), b = weight(i + 1), da = slope(i, a), db = slope(i + 1, b);
            put(rows, (Unit<T>*)nullptr, i, lane, a, b);
            put(slope_rows, units, i, lane, da, db);
          }
        }
        gemm<T, true>(n, VL, some / STEP, rows + first, BLOCK, grad_beside + first / STEP * VL, VL, values + j * VL, VL);
        gemm<T, true>(n, DL, some / STEP, slope_rows + first, BLOCK, query_beside + first / STEP * DL, DL,
                      keys + j * DL, DL);
        gemm<T, true>(D, some, (n + STEP - 1) / STEP, turned + j, ld, units + first, BLOCK, result + first, BLOCK);
      });
      transpose(number, DL, result, BLOCK, D, lanes);
      for (int i = 0; i < own; i++)
        write((T*)call.dq + ((start + i) * call.heads + head) * D, number + i * DL, D);
    }
  for (int64_t i = 0; i < tokens; i++) {
    write((T*)call.dk + ((tree.start + i) * call.few + few) * D, keys + i * DL, D);
    write((T*)call.dv + ((tree.start + i) * call.few + few) * V, values + i * VL, V);
  }
}

struct Task {
  int64_t tree, head, from, past, cost;
};

template <class T> void run(const Call& call, bool back) {
  auto of = trees(call);
  std::vector<Task> tasks;  // of the backward: all queries that look at a head of keys; of the forward: some of one head
  for (int64_t t = 0; t < (int64_t)of.size(); t++) {
    int64_t start = of[t].start, end = of[t].end, span = back ? end - start : SPAN;
    for (int64_t from = start; from < end; from += span)
      for (int64_t head = 0; head < (back ? call.few : call.heads); head++) {
        int64_t past = std::min(from + span, end);
        tasks.push_back({t, head, from, past, (past - from) * (past - start)});
      }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads)
  for (int64_t i = 0; i < (int64_t)tasks.size(); i++) {
    const Task& task = tasks[i];
    if (back)
      backward<T>(call, of[task.tree], task.head);
    else
      forward<T>(call, of[task.tree], task.head, task.from, task.past);
  }
}

}  // namespace

extern "C" {
void attend_float32(const Call* call, int32_t back) { run<float>(*call, back); }
#if defined(__AVX512BF16__)
void attend_bfloat16(const Call* call, int32_t back) { run<bf16>(*call, back); }
#endif
}
