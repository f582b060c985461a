// Products of some rows with a panel: some tokens, the panel's width, that lie beside each other for one feature after the
// other, [features, width].

#pragma once

#include <algorithm>
#include <cstddef>

#include "vectors.h"

namespace jaxembed {

#if defined(__AVX512F__)  // 32 registers
constexpr size_t TILE = 24;         // vectors of a tile, which stay in registers
constexpr bool CALL_AHEAD = false;  // whether to call what comes next into the cache (docs/performance.md)
#else  // 16 registers
constexpr size_t TILE = 12;
constexpr bool CALL_AHEAD = true;
#endif

// A panel of `tokens` rows of x, `apart` numbers from one another; zeros behind the last one.
inline void fill_panel(const float* x, size_t apart, size_t tokens, size_t features, float* panel, size_t width) {
  const size_t whole = features / 8 * 8;
  for (size_t t = 0; t < width; t += 8) {
    const size_t rows = std::min<size_t>(8, tokens - std::min(tokens, t));
    const float* from = x + t * apart;
    float* to = panel + t;
    if (rows == 8) {
      for (size_t k = 0; k < whole; k += 8) turn(from + k, apart, to + k * width, width);
    } else if (rows > 0) {
      for (size_t k = 0; k < whole; k += 8) turn(from + k, apart, to + k * width, width, rows);
    } else {
      for (size_t k = 0; k < whole; k++) store(to + k * width, Eight{});
    }
    for (size_t k = whole; k < features; k++) {
      for (size_t i = 0; i < 8; i++) to[k * width + i] = i < rows ? from[i * apart + k] : 0.0f;
    }
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
    if (CALL_AHEAD && ahead != nullptr) {
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
inline void rows_times_panel(const float* kernel, size_t rows, size_t depth, const float* panel, float* out, const float* then) {
  constexpr size_t R = TILE / C, width = C * LANES;
  for (size_t r = 0; r < rows; r += R) {
    const float *a = kernel + r * depth, *next = r + R < rows ? a + R * depth : then;
    tile_of<R, C>(std::min(R, rows - r), a, depth, panel, depth, out + r * width, width, then ? next : nullptr);
  }
}

}  // namespace jaxembed
