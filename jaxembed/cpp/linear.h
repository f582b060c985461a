// Products with weights, one way or the other. Letters: M tokens, K features of the input, N features of the output.

#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <vector>

#include "by_amx.h"
#include "by_vectors.h"
#include "matrix.h"
#include "norm.h"

namespace jaxembed {

// Whether in products with weights in bfloat16 inputs of so many features are rounded to that too.
inline bool in_pairs([[maybe_unused]] size_t K) {
#if defined(JAXEMBED_PAIRS)
  return K % STEP == 0;
#else
  return false;
#endif
}

// Numbers that M tokens of K features need room for, by whichever way.
inline size_t room_of(size_t M, size_t K) {
#if defined(JAXEMBED_AMX)
  return std::max(ByVectors<float>(M).room(K), ByAmx<Split>(M).room(K));
#else
  return ByVectors<float>(M).room(K);
#endif
}

// y = activation(x kernel^T + bias) of each matrix. `room` is for x.
template <class Way>
void linear(const Way& way, const float* x, size_t K, const std::vector<Matrix>& matrices, Activation activation,
            float* room) {
  way.fill(x, K, room);
  way.multiply(room, K, matrices, [&](const Part& part) { put(part, activation); });
}

// y of the matrix = norm(residual + x kernel^T + bias). `room` is for x.
template <class Way>
void linear_norm(const Way& way, const float* x, size_t K, const Matrix& matrix, const float* residual, const Norm& norm,
                 float* room) {
  linear(way, x, K, {matrix}, NONE, room);
  add_norms(residual, norm, way.tokens(), matrix.N, matrix.y);
}

// y of `down` = norm(x + activation(x up^T + its bias) down^T + its bias). What is between never lies token by token. `room`
// is for that and for x.
template <class Way>
void feed_forward(const Way& way, const float* x, const Matrix& up, Activation activation, const Matrix& down,
                  const Norm& norm, float* room) {
  float* inner = room + way.room(down.N);
  way.fill(x, down.N, room);
  way.multiply(room, down.N, {up}, [&](const Part& part) { way.keep(part, activation, inner); });
  way.multiply(inner, up.N, {down}, [&](const Part& part) { put(part, NONE); });
  add_norms(x, norm, way.tokens(), down.N, down.y);
}

// y of `down` = (activation(x gate^T + its bias) * (x up^T + its bias)) down^T + its bias. `room` is for x and twice for what is
// between.
template <class Way>
void gated_feed_forward(const Way& way, const float* x, const Matrix& gate, Activation activation, const Matrix& up,
                        const Matrix& down, float* room) {
  float *gates = room + way.room(down.N), *inner = gates + room_of(way.tokens(), gate.N);
  Matrix bare = up;
  bare.bias = nullptr;  // added before
  way.fill(x, down.N, room);
  way.multiply(room, down.N, {gate}, [&](const Part& part) { stash<float>(part, activation, gates); });
  way.multiply(room, down.N, {up}, [&](const Part& part) {
    times_stashed(part, gates);
    way.keep(Part{bare, part.first, part.rows, part.begin, part.tokens, part.out, part.width}, NONE, inner);
  });
  way.multiply(inner, gate.N, {down}, [&](const Part& part) { put(part, NONE); });
}

// call(way) for M tokens with kernels in float32 or in bfloat16, whose inputs have so many features.
template <class Call>
void with_way(size_t M, bool half, [[maybe_unused]] std::initializer_list<size_t> features, const Call& call) {
#if defined(JAXEMBED_PAIRS)
  if (std::all_of(features.begin(), features.end(), in_pairs)) {
#if defined(JAXEMBED_AMX)
    constexpr size_t MANY = 192;  // fewer tokens do not repay it to take a kernel apart
    // An executable from the cache was made by a process that had asked; this one has to as well.
    if ((half || M >= MANY) && amx::allowed()) return half ? call(ByAmx<Pair>(M)) : call(ByAmx<Split>(M));
#endif
    if (half) return call(ByVectors<Pair>(M));
  }
#endif
  half ? call(ByVectors<Half>(M)) : call(ByVectors<float>(M));
}

}  // namespace jaxembed
