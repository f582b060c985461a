// A matrix to multiply with, and parts of the result. Letters: M tokens, K features of the input, N features of the output.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "turn.h"
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

constexpr size_t MOST_ROWS = 48;  // output features of a part: a multiple of LANES

// Some features of some tokens of what a matrix gives: out [rows, width], of which behind `tokens` columns nothing is meant.
struct Part {
  const Matrix& one;
  size_t first, rows;    // features
  size_t begin, tokens;  // the first token, and how many
  float* out;
  size_t width;
  float bias(size_t feature) const { return one.bias ? one.bias[first + feature] : 0.0f; }
};

// Numbers as `cpu_kernels.ACTIVATIONS` has them.
enum Activation : int32_t { NONE = 0, GELU = 1, GELU_BY_TANH = 2, SILU = 3, RELU = 4 };

template <class V> inline V finished(V x, Activation activation) {
  switch (activation) {
    case GELU: return gelu(x);
    case GELU_BY_TANH: return gelu_by_tanh(x);
    case SILU: return silu(x);
    case RELU: return x < V{} ? V{} : x;
    default: return x;
  }
}

// change(number of a part, its feature's bias, its place among all that the matrix gives) for each vector of them. There
// features stand one after another for as many tokens as a part has.
template <class Change> inline void each_number(const Part& part, const Change& change) {
  const size_t first = part.begin * part.one.N + part.first * part.width;
  for (size_t f = 0; f < part.rows; f++) {
    const float bias = part.bias(f);
    for (size_t i = f * part.width; i < (f + 1) * part.width; i += LANES) change(part.out + i, bias, first + i);
  }
}

// A part to that place in `all`, with bias and activation.
template <class Number>
inline void stash(const Part& part, Activation activation, float* all) {
  each_number(part, [&](const float* out, float bias, size_t place) {
    store(all + place, finished(load<Vector>(out) + bias, activation));
  });
}

// A part, with bias, times what was stashed of another matrix.
inline void times_stashed(const Part& part, const float* all) {
  each_number(part, [&](float* out, float bias, size_t place) {
    store(out, (load<Vector>(out) + bias) * load<Vector>(all + place));
  });
}

// Calls what lines a part of y has into the cache, if y is wanted: to write to them later does not wait for memory then.
inline void call_lines(const Part& part) {
  if (part.one.y == nullptr) return;
  const size_t N = part.one.N;
  const float* line = part.one.y + part.begin * N + part.first;
  for (size_t t = 0; t < part.tokens; t++, line += N) {
    for (size_t f = 0; f < part.rows; f += LINE) __builtin_prefetch(line + f, 1, 2);
  }
}

// A part to y, with bias and activation.
inline void put(const Part& part, Activation activation) {
  const size_t N = part.one.N;
  float* y = part.one.y + part.begin * N + part.first;
  for (size_t f = 0; f < part.rows; f += LANES) {
    const size_t features = std::min(LANES, part.rows - f);
    Vector bias{};
    if (part.one.bias) std::memcpy(&bias, part.one.bias + part.first + f, features * sizeof(float));
    for (size_t t = 0; t < part.tokens; t += LANES) {
      const size_t tokens = part.tokens - t;
      Vector turned[LANES];
      turn(part.out + f * part.width + t, part.width, turned);
      for (Vector& one : turned) one += bias;
      if (activation != NONE) {
        for (Vector& one : turned) one = finished(one, activation);
      }
      float* to = y + t * N + f;
      unrolled<LANES>([&](auto i) INLINED {
        if (i >= tokens) return;
        if (features == LANES) {
          store(to + i * N, turned[i]);
        } else {
          std::memcpy(to + i * N, &turned[i], features * sizeof(float));
        }
      });
    }
  }
}

}  // namespace jaxembed
