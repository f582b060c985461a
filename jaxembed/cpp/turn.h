// Numbers that lie token by token put feature by feature, and the other way round.

#pragma once

#include <cstddef>

#include "vectors.h"

namespace jaxembed {

// to[j][i] = from[i, j] of as many rows as a vector has numbers, 0 for those from `rows` on; `apart` is the distance of rows.
inline void turn(const float* from, size_t apart, Vector (&to)[LANES], size_t rows = LANES) {
  Vector a[LANES], b[LANES];
  unrolled<LANES>([&](auto i) INLINED { a[i] = i < rows ? load<Vector>(from + i * apart) : Vector{}; });
#if defined(__AVX512F__)
  unrolled<8>([&](auto pair) INLINED {
    constexpr size_t i = 2 * pair;
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  });
  unrolled<8>([&](auto half) INLINED {
    constexpr size_t i = half / 2 * 4 + half % 2, to = half / 2 * 4 + half % 2 * 2;
    a[to] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    a[to + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  });
  // Fours of numbers are where they belong among themselves; the even fours of two vectors, and the odd ones.
  const auto even = [](Vector one, Vector other) INLINED {
    return __builtin_shufflevector(one, other, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](Vector one, Vector other) INLINED {
    return __builtin_shufflevector(one, other, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  unrolled<8>([&](auto eighth) INLINED {
    constexpr size_t i = eighth / 4 * 8 + eighth % 4;
    b[i] = even(a[i], a[i + 4]);
    b[i + 4] = odd(a[i], a[i + 4]);
  });
  unrolled<8>([&](auto i) INLINED {
    to[i] = even(b[i], b[i + 8]);
    to[i + 8] = odd(b[i], b[i + 8]);
  });
#else
  unrolled<4>([&](auto pair) INLINED {
    constexpr size_t i = 2 * pair;
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  });
  unrolled<4>([&](auto half) INLINED {
    constexpr size_t i = half / 2 * 4 + half % 2, to = half / 2 * 4 + half % 2 * 2;
    a[to] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[to + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  });
  unrolled<4>([&](auto i) INLINED {
    to[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    to[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  });
#endif
}

// The same into memory.
inline void turn(const float* from, size_t from_apart, float* to, size_t to_apart, size_t rows = LANES) {
  Vector turned[LANES];
  turn(from, from_apart, turned, rows);
  unrolled<LANES>([&](auto i) INLINED { store(to + i * to_apart, turned[i]); });
}

}  // namespace jaxembed
