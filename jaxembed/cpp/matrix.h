// A matrix to multiply with, and parts of the result. Letters: M tokens, K features of the input, N features of the output.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace jaxembed {

struct Matrix {
  const void* kernel;  // [N, K], in float32 or bfloat16
  const float* bias;   // [N], or nullptr
  float* y;            // [M, N], where it is wanted
  size_t N;
};

// Blocks of `size` output features that matrices have.
inline size_t blocks_of(const std::vector<Matrix>& matrices, size_t size) {
  size_t count = 0;
  for (const Matrix& one : matrices) count += (one.N + size - 1) / size;
  return count;
}

// One of them, counted over all matrices.
struct Block {
  Block(const std::vector<Matrix>& matrices, size_t size, size_t index) : one(matrices.data()), first(index * size) {
    for (; first >= one->N; one++) first -= (one->N + size - 1) / size * size;
    rows = std::min(size, one->N - first);
  }
  const Matrix* one;
  size_t first, rows;  // its features
};

constexpr size_t MOST_ROWS = 48;  // output features of a part: a multiple of 8

// Some features of some tokens of what a matrix gives: out [rows, width], of which behind `tokens` columns nothing is meant.
struct Part {
  const Matrix& one;
  size_t first, rows;    // features
  size_t begin, tokens;  // the first token, and how many
  const float* out;
  size_t width;
};

enum Activation : int32_t { NONE = 0, GELU = 1 };

inline Vector finished(Vector x, Activation activation) { return activation == GELU ? gelu(x) : x; }

// A part to y, with bias and activation.
inline void put(const Part& part, Activation activation) {
  const size_t N = part.one.N, whole = part.rows / LANES * LANES, rest = part.rows - whole;
  const float* bias = part.one.bias ? part.one.bias + part.first : nullptr;
  Vector last{};
  if (bias != nullptr) std::memcpy(&last, bias + whole, rest * sizeof(float));
  alignas(64) float turned[8 * MOST_ROWS];
  for (size_t t = 0; t < part.tokens; t += 8) {
    for (size_t f = 0; f < part.rows; f += 8) turn(part.out + f * part.width + t, part.width, turned + f, MOST_ROWS);
    for (size_t i = 0; i < std::min<size_t>(8, part.tokens - t); i++) {
      const float* from = turned + i * MOST_ROWS;
      float* to = part.one.y + (part.begin + t + i) * N + part.first;
      for (size_t f = 0; f < whole; f += LANES) {
        Vector more = bias != nullptr ? load<Vector>(bias + f) : Vector{};
        store(to + f, finished(load<Vector>(from + f) + more, activation));
      }
      if (rest > 0) {
        Vector value = finished(load<Vector>(from + whole) + last, activation);
        std::memcpy(to + whole, &value, rest * sizeof(float));
      }
    }
  }
}

}  // namespace jaxembed
