// Numbers in float32 as sums of three in bfloat16, which a matrix unit multiplies: each is the upper half of what those before it
// left, and nothing of 24 bits is left after three (https://arxiv.org/abs/1904.06376).

#pragma once

#include "amx.h"

#if defined(JAXEMBED_AMX)

#include <cstddef>
#include <cstring>

#include "matrix.h"
#include "tiles.h"
#include "turn.h"
#include "vectors.h"

namespace jaxembed {

// The three of a number. Each lies in a word with that of the number LANES features behind; STEP features are three tiles.
struct Split {
  static constexpr size_t PIECES = 3, WORDS = PIECES * amx::WORDS;
};

// Words of two vectors, a row of each of the three tiles.
ALWAYS_INLINE void put_split(Vector one, Vector other, float* to) {
  unrolled<Split::PIECES>([&](auto piece) INLINED {
    Words a, b;
    std::memcpy(&a, &one, sizeof a);
    std::memcpy(&b, &other, sizeof b);
    a &= 0xffff0000u;
    b &= 0xffff0000u;
    const Words both = a >> 16 | b;
    std::memcpy(to + piece * amx::WORDS, &both, sizeof both);
    Vector upper;
    std::memcpy(&upper, &a, sizeof upper);
    one -= upper;
    std::memcpy(&upper, &b, sizeof upper);
    other -= upper;
  });
}

// A panel as wide as a tile, of features a multiple of STEP.
template <>
inline void fill_panel<Split>(const float* x, size_t apart, size_t tokens, size_t features, float* panel, size_t) {
  for (size_t k = 0; k < features; k += STEP, panel += Split::WORDS) {
    Vector one[LANES], other[LANES];
    turn(x + k, apart, one, tokens);
    turn(x + k + LANES, apart, other, tokens);
    for (size_t i = 0; i < LANES; i++) put_split(one[i], other[i], panel + i * LANES);
  }
}

// As tiles of a part as wide as one.
template <> inline void stash<Split>(const Part& part, Activation activation, float* all) {
  float* to = all + (part.begin * part.one.N + part.first * part.width) / 2 * Split::PIECES;
  auto of = [&](size_t feature) INLINED {
    return finished(load<Vector>(part.out + feature * part.width) + part.bias(feature), activation);
  };
  for (size_t f = 0; f < part.rows; f += STEP, to += Split::WORDS) {
    for (size_t i = 0; i < LANES; i++) put_split(of(f + i), of(f + LANES + i), to + i * LANES);
  }
}

// Some features of a kernel's rows, which are `apart` numbers from one another, as tiles; zeros behind the last row.
inline void split_rows(const float* from, size_t rows, size_t apart, size_t features, float* tiles) {
  constexpr size_t AHEAD = 4;  // rows that are called into the cache: they are too short for the processor to do it
  for (size_t r = 0; r < amx::SIDE; r++, from += apart, tiles += LANES) {
    float* to = tiles;
    for (size_t k = 0; k < features; k += STEP, to += Split::WORDS) {
      __builtin_prefetch(from + AHEAD * apart + k);
      __builtin_prefetch(from + AHEAD * apart + k + LINE);
      const auto of = [&](size_t i) INLINED { return r < rows ? load<Vector>(from + i) : Vector{}; };
      put_split(of(k), of(k + LANES), to);
    }
  }
}

}  // namespace jaxembed

#endif
