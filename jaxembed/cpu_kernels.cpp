// Products with weights and attention for CPUs, in float32, called by XLA's executables. `cpu_kernels.py` compiles this
// for the machine it runs on, so the compiler knows the vectors that there are.
//
// Letters: M tokens, K features of the input, N features of the output. Where it says panel, some tokens, the panel's
// width, lie beside each other for one feature after the other: [features, width].

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Sizes
// ---------------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)  // 32 registers
constexpr size_t LANES = 16;
constexpr size_t TILE = 24;  // vectors of a tile, which stay in registers
#else  // 16 registers
constexpr size_t LANES = 8;
constexpr size_t TILE = 12;
#endif
constexpr size_t MOST = 4;          // vectors of tokens in a panel of a product
constexpr size_t PAIR = 2 * LANES;  // tokens, or features, that attention takes at a time
constexpr size_t BLOCK = 48;        // output features that one thread takes at a time: a multiple of 8 and of a tile's rows
constexpr size_t GROUP = 32 / LANES;           // panels that it takes at a time
constexpr size_t LINE = 16;                    // numbers of a line of the cache
constexpr size_t EIGHT = 8;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float Eight __attribute__((vector_size(EIGHT * sizeof(float))));
typedef int32_t EightInts __attribute__((vector_size(EIGHT * sizeof(int32_t))));

// At any address.
template <class V> inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V> inline void store(float* to, V value) { std::memcpy(to, &value, sizeof value); }

// ---------------------------------------------------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that help whoever calls. A call takes the share of the cores that its run of a model has: all of them when that
// is alone, its own when as many runs are under way as there are cores. Helpers look out for more work for a moment before
// they sleep, since the parts of one model follow each other closely.
class Crew {
 public:
  // Never destroyed: a helper may still look out when the process ends.
  static Crew& get() {
    static Crew* crew = new Crew;
    return *crew;
  }

  template <class Work> void each(size_t count, bool large, const Work& work) {
    size_t helpers = large && count > 1 ? std::min(share(), count) - 1 : 0;
    if (helpers == 0) {
      for (size_t i = 0; i < count; i++) work(i);
      return;
    }
    Job job(count, helpers, [](const void* data, size_t i) { (*static_cast<const Work*>(data))(i); }, &work);
    publish(job, helpers);
    job.run();
    withdraw(job);
  }

  // Cores that each run has.
  size_t share() const { return std::max<size_t>(1, cores_ / std::max<size_t>(1, runs_.load(std::memory_order_relaxed))); }

  void begin() { runs_++; }
  void end() { runs_--; }

 private:
  struct Job {
    Job(size_t count, size_t places, void (*function)(const void*, size_t), const void* data)
        : count(count), places(places), function(function), data(data) {}
    void run() {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) function(data, i);
    }
    const size_t count;
    size_t places;  // helpers that may still come; with the lock held
    void (*const function)(const void*, size_t);
    const void* const data;
    std::atomic<size_t> next{0}, inside{0};
  };

  Crew() : cores_(std::max(1u, std::thread::hardware_concurrency())) {
    for (size_t i = 1; i < cores_; i++) std::thread([this] { help(); }).detach();
  }

  void publish(Job& job, size_t helpers) {
    bool wake;
    {
      std::lock_guard<std::mutex> held(lock_);
      jobs_.push_back(&job);
      open_ += helpers;
      wake = asleep_ > 0;
    }
    if (wake) helpers > 1 ? called_.notify_all() : called_.notify_one();
  }

  // Returns when nobody is at the job any more.
  void withdraw(Job& job) {
    {
      std::lock_guard<std::mutex> held(lock_);
      jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
      open_ -= job.places;
    }
    for (int turns = 0; job.inside.load(std::memory_order_acquire) > 0; turns++) turns < 4096 ? pause() : (void)sched_yield();
  }

  void help() {
    for (;;) {
      look_out();
      Job* job;
      {
        std::unique_lock<std::mutex> held(lock_);
        asleep_++;
        called_.wait(held, [this] { return open_ > 0; });
        asleep_--;
        job = *std::find_if(jobs_.begin(), jobs_.end(), [](Job* one) { return one->places > 0; });
        job->places--;
        job->inside++;
        open_--;
      }
      job->run();
      job->inside.fetch_sub(1, std::memory_order_release);
    }
  }

  void look_out() {
    auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (open_.load(std::memory_order_acquire) == 0 && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 16; i++) pause();
    }
  }

  const size_t cores_;
  std::atomic<size_t> runs_{0};
  std::atomic<size_t> open_{0};  // places for helpers; changed with the lock held
  std::mutex lock_;
  std::condition_variable called_;
  std::vector<Job*> jobs_;  // with the lock held
  size_t asleep_ = 0;       // with the lock held
};

// ---------------------------------------------------------------------------------------------------------------------
// Products
// ---------------------------------------------------------------------------------------------------------------------

// to[j, i] = from[i, j] for 8 x 8 numbers; `apart` is the distance of rows.
inline void turn(const float* from, size_t from_apart, float* to, size_t to_apart) {
  Eight a[8], b[8];
  for (size_t i = 0; i < 8; i++) a[i] = load<Eight>(from + i * from_apart);
  for (size_t i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (size_t i = 0; i < 8; i += 4) {
    a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    a[i + 2] = __builtin_shufflevector(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 3] = __builtin_shufflevector(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (size_t i = 0; i < 4; i++) {
    store(to + i * to_apart, __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(to + (i + 4) * to_apart, __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

// A panel of `tokens` rows of x, `apart` numbers from one another; zeros behind the last one.
void fill_panel(const float* x, size_t apart, size_t tokens, size_t features, float* panel, size_t width) {
  size_t t = 0;
  for (; t + 8 <= tokens; t += 8) {
    size_t k = 0;
    for (; k + 8 <= features; k += 8) turn(x + t * apart + k, apart, panel + k * width + t, width);
    for (; k < features; k++) {
      for (size_t i = 0; i < 8; i++) panel[k * width + t + i] = x[(t + i) * apart + k];
    }
  }
  for (; t < width; t++) {
    for (size_t k = 0; k < features; k++) panel[k * width + t] = t < tokens ? x[t * apart + k] : 0.0f;
  }
}

// sum += a * b of registers. In words of C++ the compiler reads a panel's column anew for each row of a tile, and of reads a
// core does fewer than of multiply-adds; or it moves sums from register to register.
inline void multiply_add(Vector& sum, Vector a, Vector b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// Pointers to a tile's rows, one for three: a processor adds a distance once or twice as it reads, and has few registers.
template <size_t R> struct Rows {
  const float* every_third[(R + 2) / 3];
  size_t apart;  // bytes
  Rows(const float* first, size_t numbers_apart) : apart(numbers_apart * sizeof(float)) {
    for (size_t i = 0; 3 * i < R; i++) every_third[i] = first + 3 * i * numbers_apart;
  }
  const float* at(size_t r) const {
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(every_third[r / 3]) + r % 3 * apart);
  }
  void go_on(size_t numbers) {
    for (const float*& pointer : every_third) pointer += numbers;
  }
};

// Loops over rows and vectors, here and in `tile`, are unrolled for the largest tile of TILE rows: of a loop that is left the
// sums would stand in memory.

// sums[r, v] += row r's number k times b[v].
template <size_t R, size_t C> inline void step(Vector (&sums)[R][C], const Rows<R>& rows, size_t k, const float* b) {
  // Kept in registers are the fewer of the two: vectors of b, or a number of each row.
  if constexpr (C <= R) {
    Vector columns[C];
#pragma GCC unroll 4
    for (size_t c = 0; c < C; c++) columns[c] = load<Vector>(b + c * LANES);
#pragma GCC unroll 24
    for (size_t r = 0; r < R; r++) {
      Vector spread = rows.at(r)[k] - Vector{};
#pragma GCC unroll 4
      for (size_t c = 0; c < C; c++) multiply_add(sums[r][c], spread, columns[c]);
    }
  } else {
    Vector spread[R];
#pragma GCC unroll 4
    for (size_t r = 0; r < R; r++) spread[r] = rows.at(r)[k] - Vector{};
#pragma GCC unroll 4
    for (size_t c = 0; c < C; c++) {
      Vector column = load<Vector>(b + c * LANES);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; r++) multiply_add(sums[r][c], spread[r], column);
    }
  }
}

// out[r, v] = sum over k of a[r, k] * b[k, v], for R rows and a panel b of C vectors. While it computes, as many lines as the
// rows have are called into the cache from `ahead` on; nullptr: none.
template <size_t R, size_t C>
inline void tile(const float* a, size_t a_apart, const float* b, size_t depth, float* out, size_t out_apart,
                 const float* ahead) {
  Vector sums[R][C];
#pragma GCC unroll 24
  for (size_t r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (size_t c = 0; c < C; c++) sums[r][c] = Vector{};
  }
  Rows<R> rows(a, a_apart);
  size_t k = 0;
  for (; k + LINE <= depth; k += LINE) {
    if (ahead != nullptr) {
#pragma GCC unroll 24
      for (size_t r = 0; r < R; r++) __builtin_prefetch(ahead + r * LINE);
      ahead += R * LINE;
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < LINE; i++) step(sums, rows, i, b + i * C * LANES);
    rows.go_on(LINE);
    b += LINE * C * LANES;
  }
  for (size_t i = 0; k + i < depth; i++) step(sums, rows, i, b + i * C * LANES);
#pragma GCC unroll 24
  for (size_t r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (size_t c = 0; c < C; c++) store(out + r * out_apart + c * LANES, sums[r][c]);
  }
}

// `tile` for any number of rows up to R.
template <size_t R, size_t C>
inline void tile_of(size_t rows, const float* a, size_t a_apart, const float* b, size_t depth, float* out, size_t out_apart,
                    const float* ahead) {
  if constexpr (R > 0) {
    if (rows == R) {
      tile<R, C>(a, a_apart, b, depth, out, out_apart, ahead);
    } else {
      tile_of<R - 1, C>(rows, a, a_apart, b, depth, out, out_apart, ahead);
    }
  }
}

// out[n, v] = n rows of a kernel times a panel of C vectors, in tiles. Each calls the next rows into the cache, and the last
// one those at `then`; nullptr: none does.
template <size_t C>
void rows_times_panel(const float* kernel, size_t rows, size_t depth, const float* panel, float* out, const float* then) {
  constexpr size_t R = TILE / C, width = C * LANES;
  for (size_t r = 0; r < rows; r += R) {
    const float *a = kernel + r * depth, *next = r + R < rows ? a + R * depth : then;
    tile_of<R, C>(std::min(R, rows - r), a, depth, panel, depth, out + r * width, width, then == nullptr ? nullptr : next);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of numbers
// ---------------------------------------------------------------------------------------------------------------------

enum Activation : int32_t { NONE = 0, GELU = 1 };

// x * Phi(x). erf is the quotient of polynomials that XLA computes it by, 1 from 3.83 on.
inline Eight gelu(Eight x) {
  const Eight end = Eight{} + 3.832506856900711f;
  Eight z = x * 0.70710678118654752f;
  z = z > end ? end : z;
  z = z < -end ? -end : z;
  Eight s = z * z;
  Eight above = s * 0.00022905065861350646f + 0.0034082910107109506f;
  above = above * s + 0.050955695062380861f;
  above = above * s + 0.18520832239976145f;
  above = above * s + 1.128379143519084f;
  Eight below = s * -1.1791602954361697e-7f + 0.000023547966471313185f;
  below = below * s + 0.0010179625278914885f;
  below = below * s + 0.014070470171167667f;
  below = below * s + 0.11098505178285362f;
  below = below * s + 0.49746925110067538f;
  below = below * s + 1.0f;
  return 0.5f * x * (1.0f + z * above / below);
}

// e^x for x <= 0: 2^n e^r with |r| <= log(2) / 2, and e^r by its Taylor polynomial of degree 7 (error below 1e-8).
inline Eight exponential(Eight x) {
  const Eight least = Eight{} - 87.0f;
  x = x < least ? least : x;
  Eight n = x * 1.44269504088896341f - 0.5f;
  EightInts whole = __builtin_convertvector(n, EightInts);  // towards 0: the nearest, for n <= 0
  n = __builtin_convertvector(whole, Eight);
  Eight r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Eight e = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  e = e * r + (1.0f / 120.0f);
  e = e * r + (1.0f / 24.0f);
  e = e * r + (1.0f / 6.0f);
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  EightInts power = (whole + 127) << 23;
  Eight two;
  std::memcpy(&two, &power, sizeof two);
  return e * two;
}

// ---------------------------------------------------------------------------------------------------------------------
// linear
// ---------------------------------------------------------------------------------------------------------------------

// What stands in out [features, width] to y [tokens, N], with bias and activation.
void put(const float* out, size_t width, size_t features, size_t tokens, const float* bias, Activation activation, float* y,
         size_t N) {
  const size_t whole = features / 8 * 8, rest = features - whole;
  Eight last{};
  if (bias != nullptr) std::memcpy(&last, bias + whole, rest * sizeof(float));
  auto finished = [&](Eight value, Eight more) { return activation == GELU ? gelu(value + more) : value + more; };
  alignas(64) float turned[8 * BLOCK];
  for (size_t t = 0; t < tokens; t += 8) {
    for (size_t f = 0; f < features; f += 8) turn(out + f * width + t, width, turned + f, BLOCK);
    for (size_t i = 0; i < std::min<size_t>(8, tokens - t); i++) {
      const float* from = turned + i * BLOCK;
      float* to = y + (t + i) * N;
      for (size_t f = 0; f < whole; f += 8) {
        store(to + f, finished(load<Eight>(from + f), bias != nullptr ? load<Eight>(bias + f) : Eight{}));
      }
      if (rest > 0) {
        Eight value = finished(load<Eight>(from + whole), last);
        std::memcpy(to + whole, &value, rest * sizeof(float));
      }
    }
  }
}

struct Matrix {
  const float* kernel;  // [N, K]
  const float* bias;    // [N], or nullptr
  float* y;             // [M, N]
  size_t N;
  size_t blocks() const { return (N + BLOCK - 1) / BLOCK; }
};

// How tokens are shared out to panels: three or four vectors each, where there are enough.
struct Panels {
  explicit Panels(size_t tokens)
      : tokens(tokens), vectors((tokens + LANES - 1) / LANES), count(std::max(vectors / 3, (vectors + MOST - 1) / MOST)) {}
  size_t begin(size_t i) const { return i == count ? tokens : vectors * i / count * LANES; }
  size_t of(size_t i) const { return begin(i + 1) - begin(i); }
  size_t width(size_t i) const { return (of(i) + LANES - 1) / LANES * LANES; }
  const size_t tokens, vectors, count;
};

// y = activation(x kernel^T + bias) of each matrix. `room` is for x in panels.
void linear(const float* x, size_t M, size_t K, const std::vector<Matrix>& matrices, Activation activation, float* room) {
  const Panels panels(M);
  const size_t groups = (panels.count + GROUP - 1) / GROUP;
  size_t blocks = 0;
  for (const Matrix& one : matrices) blocks += one.blocks();
  Crew& crew = Crew::get();
  crew.each(panels.count, M * K > 100'000, [&](size_t i) {
    fill_panel(x + panels.begin(i) * K, K, panels.of(i), K, room + panels.begin(i) * K, panels.width(i));
  });
  // The groups of a block follow one another: its part of the kernel stays in the second cache.
  crew.each(blocks * groups, M * K * blocks * BLOCK > 400'000, [&](size_t task) {
    size_t block = task / groups, begin = task % groups * GROUP;
    const Matrix* one = matrices.data();
    for (; block >= one->blocks(); one++) block -= one->blocks();
    const size_t first = block * BLOCK, rows = std::min(BLOCK, one->N - first);
    const float *kernel = one->kernel + first * K, *bias = one->bias ? one->bias + first : nullptr;
    const size_t end = std::min(panels.count, begin + GROUP);
    alignas(64) float out[BLOCK * MOST * LANES];
    for (size_t i = begin; i < end; i++) {
      const size_t width = panels.width(i);
      constexpr decltype(&rows_times_panel<1>) multiply[] = {rows_times_panel<1>, rows_times_panel<2>, rows_times_panel<3>,
                                                             rows_times_panel<4>};
      // The first panel has to wait for the kernel. The blocks between are other threads'.
      const float* then = i == begin ? kernel + crew.share() * BLOCK * K : nullptr;
      multiply[width / LANES - 1](kernel, rows, K, room + panels.begin(i) * K, out, then);
      put(out, width, rows, panels.of(i), bias, activation, one->y + panels.begin(i) * one->N + first, one->N);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// attention
// ---------------------------------------------------------------------------------------------------------------------

struct Heads {
  size_t query, key, width;  // heads of queries, of keys and values; features of each, a multiple of PAIR
  float scale;
};

// scores[n] to e^(scale * (score - their maximum)), and next to nothing behind them up to `room`; their sum.
float soften(float* scores, size_t n, size_t room, float scale) {
  for (size_t i = n; i < room; i++) scores[i] = -1e30f;
  Eight best = load<Eight>(scores), total{};
  for (size_t i = 8; i < room; i += 8) {
    Eight more = load<Eight>(scores + i);
    best = more > best ? more : best;
  }
  float most = best[0], sum = 0.0f;
  for (size_t i = 1; i < 8; i++) most = std::max(most, best[i]);
  for (size_t i = 0; i < room; i += 8) {
    Eight weight = exponential((load<Eight>(scores + i) - most) * scale);
    store(scores + i, weight);
    total += weight;
  }
  for (size_t i = 0; i < 8; i++) sum += total[i];
  return sum;
}

// One head of one row: queries [count, width] see keys and values [seen, width], all `apart` numbers from one another.
void head(const float* query, const float* key, const float* value, float* out, size_t count, size_t seen,
          const Heads& heads) {
  const size_t width = heads.width, query_apart = heads.query * width, key_apart = heads.key * width;
  constexpr size_t ROWS = TILE / 2;
  const size_t panels = (seen + PAIR - 1) / PAIR, room = panels * PAIR;
  static thread_local std::vector<float> scratch;
  if (scratch.size() < room * (2 * width + ROWS)) scratch.resize(room * (2 * width + ROWS));
  float *keys = scratch.data(), *values = keys + room * width, *scores = values + room * width;
  for (size_t p = 0; p < panels; p++) {
    const size_t begin = p * PAIR;
    fill_panel(key + begin * key_apart, key_apart, std::min(PAIR, seen - begin), width, keys + begin * width, PAIR);
  }
  for (size_t f = 0; f < width; f += PAIR) {
    for (size_t s = 0; s < seen; s++) {
      std::memcpy(values + f * room + s * PAIR, value + s * key_apart + f, PAIR * sizeof(float));
    }
  }
  for (size_t first = 0; first < count; first += ROWS) {
    const size_t rows = std::min(ROWS, count - first);
    for (size_t p = 0; p < panels; p++) {
      const float* keys_of = keys + p * PAIR * width;
      tile_of<ROWS, 2>(rows, query + first * query_apart, query_apart, keys_of, width, scores + p * PAIR, room, nullptr);
    }
    float sums[ROWS];
    for (size_t r = 0; r < rows; r++) sums[r] = soften(scores + r * room, seen, room, heads.scale);
    float* to = out + first * query_apart;
    for (size_t f = 0; f < width; f += PAIR) {
      tile_of<ROWS, 2>(rows, scores, room, values + f * room, seen, to + f, query_apart, nullptr);
    }
    for (size_t r = 0; r < rows; r++) {
      for (size_t f = 0; f < width; f += LANES) {
        store(to + r * query_apart + f, load<Vector>(to + r * query_apart + f) / sums[r]);
      }
    }
  }
}

// Rows of `count` tokens, of which attention sees the first `seen`, stand where `starts` says in lines of `total` tokens.
void attention(const float* query, const float* key, const float* value, const int32_t* starts, const int32_t* counts,
               const int32_t* seen, size_t rows, size_t total, const Heads& heads, float* out) {
  const size_t apart = heads.query * heads.width, group = heads.query / heads.key;
  size_t end = 0, work = 0;
  for (size_t row = 0; row < rows; row++) {
    end = std::max<size_t>(end, starts[row] + counts[row]);
    work += size_t(counts[row]) * seen[row] * apart;
  }
  // Zeros where no row stands: nobody looks there, but NaN times 0 would be NaN.
  std::memset(out + end * apart, 0, (total - end) * apart * sizeof(float));
  Crew::get().each(rows * heads.query, work > 200'000, [&](size_t i) {
    size_t row = i / heads.query, h = i % heads.query, start = starts[row], count = counts[row];
    float* to = out + start * apart + h * heads.width;
    if (seen[row] == 0) {
      for (size_t t = 0; t < count; t++) std::memset(to + t * apart, 0, heads.width * sizeof(float));
      return;
    }
    size_t behind = start * heads.key * heads.width + h / group * heads.width;
    head(query + start * apart + h * heads.width, key + behind, value + behind, to, count, seen[row], heads);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// XLA's calls
// ---------------------------------------------------------------------------------------------------------------------

const XLA_FFI_Buffer& argument(const XLA_FFI_CallFrame* frame, int64_t i) {
  return *static_cast<const XLA_FFI_Buffer*>(frame->args.args[i]);
}

float* result(const XLA_FFI_CallFrame* frame, int64_t i) {
  return static_cast<float*>(static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[i])->data);
}

const float* floats(const XLA_FFI_Buffer& buffer) { return static_cast<const float*>(buffer.data); }

// Attributes come in the order of their names.
template <class T> T attribute(const XLA_FFI_CallFrame* frame, int64_t i) {
  return *static_cast<const T*>(static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i])->value);
}

size_t width_of(const XLA_FFI_Buffer& buffer) { return buffer.dims[buffer.rank - 1]; }

size_t tokens_of(const XLA_FFI_Buffer& buffer) {
  size_t count = 1;
  for (int64_t i = 0; i + 1 < buffer.rank; i++) count *= buffer.dims[i];
  return count;
}

// Whether XLA only asks which version of its interface this is made for; then it is told.
bool asked(XLA_FFI_CallFrame* frame) {
  auto* extension = frame->extension_start;  // its type has another name in each version
  if (extension == nullptr || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* told = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
  told->api_version.major_version = XLA_FFI_API_MAJOR;
  told->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

}  // namespace

// x [..., K], then kernel [N, K] and bias [N] or [0] of each matrix -> y [..., N] of each, room for panels.
// Attribute: activation.
extern "C" XLA_FFI_Error* jaxembed_linear(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer& x = argument(frame, 0);
  const int64_t count = (frame->args.size - 1) / 2;
  std::vector<Matrix> matrices;
  for (int64_t i = 0; i < count; i++) {
    const XLA_FFI_Buffer &kernel = argument(frame, 1 + 2 * i), &bias = argument(frame, 2 + 2 * i);
    matrices.push_back({floats(kernel), bias.dims[0] ? floats(bias) : nullptr, result(frame, i), size_t(kernel.dims[0])});
  }
  linear(floats(x), tokens_of(x), width_of(x), matrices, Activation(attribute<int32_t>(frame, 0)), result(frame, count));
  return nullptr;
}

// Queries [..., N H], keys and values [..., K H], starts, counts and seen [B] -> [..., N H].
// Attributes: head_dim, scale.
extern "C" XLA_FFI_Error* jaxembed_attention(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) return nullptr;
  const XLA_FFI_Buffer &query = argument(frame, 0), &key = argument(frame, 1), &starts = argument(frame, 3);
  const size_t width = attribute<int32_t>(frame, 0);
  const Heads heads{width_of(query) / width, width_of(key) / width, width, attribute<float>(frame, 1)};
  auto numbers = [&](int64_t i) { return static_cast<const int32_t*>(argument(frame, i).data); };
  attention(floats(query), floats(key), floats(argument(frame, 2)), numbers(3), numbers(4), numbers(5), starts.dims[0],
            tokens_of(query), heads, result(frame, 0));
  return nullptr;
}

// A run of a model begins and ends.
extern "C" void jaxembed_begin() { Crew::get().begin(); }
extern "C" void jaxembed_end() { Crew::get().end(); }

// Numbers of a vector, for whoever makes room.
extern "C" int64_t jaxembed_lanes() { return LANES; }
