// Products of some rows with a panel: some tokens, the panel's width, that lie beside each other for one feature after the
// other, [features, width]. Where numbers are pairs, rows and panels have words of two features each.

#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "numbers.h"
#include "turn.h"
#include "vectors.h"

namespace jaxembed {

#if defined(__AVX512F__)  // 32 registers
constexpr size_t TILE = 24;  // vectors of a tile, which stay in registers
#else  // 16 registers
constexpr size_t TILE = 12;
#endif
constexpr size_t WAYS = 8;  // rows whose lines the first cache holds wherever they begin

// A panel of `tokens` rows of x, `apart` numbers from one another; zeros behind the last one.
template <class Number>
inline void fill_panel(const float* x, size_t apart, size_t tokens, size_t features, float* panel, size_t width) {
  const size_t whole = features / LANES * LANES;
  for (size_t t = 0; t < width; t += LANES) {
    const size_t rows = std::min(LANES, tokens - std::min(tokens, t));
    const float* from = x + t * apart;
    float* to = panel + t;
    if (rows == LANES) {
      for (size_t k = 0; k < whole; k += LANES) turn(from + k, apart, to + k * width, width);
    } else if (rows > 0) {
      for (size_t k = 0; k < whole; k += LANES) turn(from + k, apart, to + k * width, width, rows);
    } else {
      for (size_t k = 0; k < whole; k++) store(to + k * width, Vector{});
    }
    for (size_t k = whole; k < features; k++) {
      for (size_t i = 0; i < LANES; i++) to[k * width + i] = i < rows ? from[i * apart + k] : 0.0f;
    }
  }
}

// sum += a * b of registers, of pairs both products. In words of C++ the compiler reads a panel's column anew for each row of
// a tile, and of reads a core does fewer than of multiply-adds; or it moves sums from register to register.
template <class Number> inline void multiply_add(Vector& sum, Vector a, Vector b) {
  if constexpr (std::is_same_v<Number, Pair>) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
}

// Pointers to a tile's rows, one for three: a processor adds a distance once or twice as it reads, and has few registers.
template <size_t R, class Number> struct Rows {
  const Number* every_third[(R + 2) / 3];
  size_t apart;  // bytes
  Rows(const Number* first, size_t numbers_apart) : apart(numbers_apart * sizeof(Number)) {
    for (size_t i = 0; 3 * i < R; i++) every_third[i] = first + 3 * i * numbers_apart;
  }
  const Number* at(size_t r) const {
    return reinterpret_cast<const Number*>(reinterpret_cast<const char*>(every_third[r / 3]) + r % 3 * apart);
  }
  void go_on(size_t numbers) {
    for (const Number*& pointer : every_third) pointer += numbers;
  }
};

// sums[r, v] += spread(r) * b[v], where that is a vector of row r's number.
template <class Number, size_t R, size_t C, class Spread>
ALWAYS_INLINE void step(Vector (&sums)[R][C], const float* b, const Spread& spread) {
  // Kept in registers are the fewer of the two: vectors of b, or a number of each row.
  if constexpr (C <= R) {
    Vector columns[C];
    unrolled<C>([&](auto c) INLINED { columns[c] = load<Vector>(b + c * LANES); });
    unrolled<R>([&](auto r) INLINED {
      const Vector number = spread(r);
      unrolled<C>([&](auto c) INLINED { multiply_add<Number>(sums[r][c], number, columns[c]); });
    });
  } else {
    Vector numbers[R];
    unrolled<R>([&](auto r) INLINED { numbers[r] = spread(r); });
    unrolled<C>([&](auto c) INLINED {
      const Vector column = load<Vector>(b + c * LANES);
      unrolled<R>([&](auto r) INLINED { multiply_add<Number>(sums[r][c], numbers[r], column); });
    });
  }
}

// out[r, v] = sum over k of a[r, k] * b[k, v], for R rows and a panel b of C vectors. While it computes, as many numbers as the
// rows have are called into the cache from `ahead` on; nullptr: none.
template <size_t R, size_t C, class Number>
inline void tile(const Number* a, size_t a_apart, const float* b, size_t depth, float* out, size_t out_apart,
                 const Number* ahead) {
  Vector sums[R][C];
  unrolled<R>([&](auto r) INLINED { unrolled<C>([&](auto c) INLINED { sums[r][c] = Vector{}; }); });
  Rows<R, Number> rows(a, a_apart);
  size_t k = 0;
  for (; k + LINE <= depth; k += LINE) {
    if (ahead != nullptr) {
      unrolled<R>([&](auto r) INLINED { __builtin_prefetch(ahead + r * LINE); });
      ahead += R * LINE;
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < LINE; i++) {
      step<Number>(sums, b + i * C * LANES, [&](size_t r) INLINED { return spread(rows.at(r), i); });
    }
    rows.go_on(LINE);
    b += LINE * C * LANES;
  }
  for (; k < depth; k++) {
    step<Number>(sums, b, [&](size_t r) INLINED { return spread_last(rows.at(r)); });
    rows.go_on(1);
    b += C * LANES;
  }
  unrolled<R>([&](auto r) INLINED {
    unrolled<C>([&](auto c) INLINED { store(out + r * out_apart + c * LANES, sums[r][c]); });
  });
}

// `tile` for any number of rows up to R.
template <size_t R, size_t C, class Number>
inline void tile_of(size_t rows, const Number* a, size_t a_apart, const float* b, size_t depth, float* out, size_t out_apart) {
  if constexpr (R > 0) {
    if (rows == R) {
      tile<R, C, Number>(a, a_apart, b, depth, out, out_apart, nullptr);
    } else {
      tile_of<R - 1, C>(rows, a, a_apart, b, depth, out, out_apart);
    }
  }
}

// out[n, v] = n rows of a kernel times a panel of C vectors, in tiles; what is less than a tile, row by row. Each calls the
// next rows into the cache, and the last one those at `then`; nullptr: none does.
template <size_t C, class Number>
inline void rows_times_panel(const Number* kernel, size_t rows, size_t depth, const float* panel, float* out,
                             const Number* then) {
  constexpr size_t R = std::min(WAYS, TILE / C), width = C * LANES;
  for (size_t r = 0; r < rows;) {
    const size_t taken = r + R <= rows ? R : 1;
    const Number *a = kernel + r * depth, *next = r + taken < rows ? a + taken * depth : then;
    const auto one = taken == R ? tile<R, C, Number> : tile<1, C, Number>;
    one(a, depth, panel, depth, out + r * width, width, then ? next : nullptr);
    r += taken;
  }
}

}  // namespace jaxembed
