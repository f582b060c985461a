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

// The sum of one(i) for N places i: of a vector of them from i on, or of the last few one by one.
template <class Several, class One> inline float total(size_t N, const Several& several, const One& one) {
  constexpr size_t APART = 4;  // sums that do not wait for one another
  Vector sums[APART] = {};
  size_t i = 0;
  for (; i + APART * LANES <= N; i += APART * LANES) {
#pragma GCC unroll 4
    for (size_t a = 0; a < APART; a++) sums[a] += several(i + a * LANES);
  }
  for (; i + LANES <= N; i += LANES) sums[0] += several(i);
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.0f;
  for (size_t lane = 0; lane < LANES; lane++) sum += all[lane];
  for (; i < N; i++) sum += one(i);
  return sum;
}

// y = (z - mean) / sqrt(variance + eps) * scale + bias of one token. z(V{}, i) is a vector of it from i on, or one number.
template <class Z> inline void normalise(const Z& z, const Norm& norm, size_t N, float* y) {
  auto first = [&](auto kind, size_t i) {
    const auto value = z(kind, i);
    store(y + i, value);
    return value;
  };
  const float mean = total(N, [&](size_t i) { return first(Vector{}, i); }, [&](size_t i) { return first(0.0f, i); }) / N;
  auto square = [&](auto value, size_t i) {
    value -= mean;
    store(y + i, value);
    return value * value;
  };
  const float variance =
      total(N, [&](size_t i) { return square(load<Vector>(y + i), i); }, [&](size_t i) { return square(y[i], i); }) / N;
  const float over = 1.0f / std::sqrt(variance + norm.eps);
  auto finish = [&](auto value, size_t i) {
    value *= over * load<decltype(value)>(norm.scale + i);
    if (norm.bias != nullptr) value += load<decltype(value)>(norm.bias + i);
    store(y + i, value);
  };
  size_t i = 0;
  for (; i + LANES <= N; i += LANES) finish(load<Vector>(y + i), i);
  for (; i < N; i++) finish(y[i], i);
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
