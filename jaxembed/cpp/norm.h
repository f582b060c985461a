// What follows the products of a layer: their sum with what went in before, normalised. Letters: M tokens, N features.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "crew.h"
#include "vectors.h"

namespace jaxembed {

struct Norm {
  const float* scale;  // [N]
  const float* bias;   // [N], or nullptr
  float eps;
};

// call(Vector{}, i) for each place i of N where a vector begins, and call(0.0f, i) for the last few.
template <class Call> inline void along(size_t N, const Call& call) {
  size_t i = 0;
  for (; i + LANES <= N; i += LANES) call(Vector{}, i);
  for (; i < N; i++) call(0.0f, i);
}

// The sum of N numbers: value(Vector{}, i) is a vector of them from i on, value(0.0f, i) one.
template <class Value> inline float total(size_t N, const Value& value) {
  constexpr size_t APART = 4;  // sums that do not wait for one another
  Vector sums[APART] = {};
  size_t i = 0;
  for (; i + APART * LANES <= N; i += APART * LANES) {
#pragma GCC unroll 4
    for (size_t a = 0; a < APART; a++) sums[a] += value(Vector{}, i + a * LANES);
  }
  for (; i + LANES <= N; i += LANES) sums[0] += value(Vector{}, i);
  float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < N; i++) sum += value(0.0f, i);
  return sum;
}

// y = (z - mean) / sqrt(variance + eps) * scale + bias of one token; z gives numbers as the values of `total`.
template <class Z> inline void normalise(const Z& z, const Norm& norm, size_t N, float* y) {
  const float mean = total(N, [&](auto kind, size_t i) {
    const auto value = z(kind, i);
    store(y + i, value);
    return value;
  }) / N;
  const float variance = total(N, [&](auto kind, size_t i) {
    const auto value = load<decltype(kind)>(y + i) - mean;
    store(y + i, value);
    return value * value;
  }) / N;
  const float over = 1.0f / std::sqrt(variance + norm.eps);
  along(N, [&](auto kind, size_t i) {
    using V = decltype(kind);
    V value = load<V>(y + i) * (over * load<V>(norm.scale + i));
    if (norm.bias != nullptr) value += load<V>(norm.bias + i);
    store(y + i, value);
  });
}

// work(t) for each of M tokens of N features, whose work is next to none.
template <class Work> inline void each_token(size_t M, size_t N, const Work& work) {
  constexpr size_t GROUP = 16;
  Crew::get().each((M + GROUP - 1) / GROUP, M * N > 60'000, [&](size_t group) {
    for (size_t t = group * GROUP; t < std::min(M, (group + 1) * GROUP); t++) work(t);
  });
}

// y = norm(y + residual), of M tokens.
inline void add_norms(const float* residual, const Norm& norm, size_t M, size_t N, float* y) {
  each_token(M, N, [&](size_t t) {
    const float* more = residual + t * N;
    float* to = y + t * N;
    normalise([&](auto kind, size_t i) { return load<decltype(kind)>(to + i) + load<decltype(kind)>(more + i); }, norm, N, to);
  });
}

}  // namespace jaxembed
