// Pairs of numbers in bfloat16, made of numbers in float32, for processors that multiply them.

#pragma once

#if defined(__AVX512BF16__)
#define JAXEMBED_PAIRS

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "numbers.h"
#include "pieces.h"
#include "tiles.h"
#include "vectors.h"

namespace jaxembed {

// Words of two features of as many tokens as a vector has, each of an even one and the one behind it.
inline void put_words(Vector even, Vector odd, float* to) {
  alignas(64) static constexpr uint16_t ORDER[STEP] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both));
}

// STEP features of a token, as many as a vector has with two to a word, rounded to bfloat16.
inline void put_row(const float* from, float* to) {
  const __m512bh words = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + LANES), _mm512_loadu_ps(from));
  std::memcpy(to, &words, sizeof words);
}

// Panels of pairs, with features a multiple of STEP: [features / 2, width] words, rounded to bfloat16.
template <>
inline void fill_panel<Pair>(const float* x, size_t apart, size_t tokens, size_t features, float* panel, size_t width) {
  for (size_t t = 0; t < width; t += LANES) {
    const size_t rows = std::min(LANES, tokens - std::min(tokens, t));
    alignas(64) float rounded[LANES * LANES] = {};
    for (size_t k = 0; k < features; k += STEP) {
      for (size_t i = 0; i < rows; i++) put_row(x + (t + i) * apart + k, rounded + i * LANES);
      turn(rounded, LANES, panel + k / 2 * width + t, width);
    }
  }
}

// As words of two features each, [rows / 2, width].
template <> inline void stash<Pair>(const Part& part, Activation activation, float* all) {
  float* to = all + (part.begin * part.one.N + part.first * part.width) / 2;
  with_rounded(activation, [&](const auto function) {
    for (size_t f = 0; f < part.rows; f += 2, to += part.width) {
      for (size_t i = 0; i < part.width; i += LANES) {
        auto of = [&](size_t feature) INLINED {
          return function(load<Vector>(part.out + feature * part.width + i) + part.bias(feature));
        };
        put_words(of(f), of(f + 1), to + i);
      }
    }
  });
}

}  // namespace jaxembed

#endif
