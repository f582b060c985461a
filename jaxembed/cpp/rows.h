// Sums of rows: of tables, which tokens are made of, and of tokens. Letters: M tokens, N features.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crew.h"
#include "norm.h"
#include "numbers.h"
#include "vectors.h"

namespace jaxembed {

struct Table {
  const void* rows;    // [count, N], in float32 or bfloat16
  size_t count;
  const int32_t* ids;  // [M], a row for each token; beyond either end the first or the last
};

// y = norm(the sum of a row of each table), of M tokens.
template <class Number>
void embed(const std::vector<Table>& tables, const Norm& norm, size_t M, size_t N, float* y) {
  each_token(M, N, [&](size_t t) {
    std::vector<const Number*> rows;
    for (const Table& table : tables) {
      const size_t id = std::min<size_t>(std::max(table.ids[t], 0), table.count - 1);
      rows.push_back(static_cast<const Number*>(table.rows) + id * N);
    }
    auto sum = [&](auto kind, size_t i) {
      decltype(kind) value{};
      for (const Number* row : rows) value += load<decltype(kind)>(row + i);
      return value;
    };
    normalise(sum, norm, N, y + t * N);
  });
}

// y [N] = the sum of count tokens x [count, N], each times its weight.
inline void weighted_sum(const float* x, const float* weights, size_t count, size_t N, float* y) {
  along(N, [&](auto kind, size_t i) {
    constexpr size_t APART = 4;  // sums that do not wait for one another
    decltype(kind) sums[APART] = {};
    size_t t = 0;
    for (; t + APART <= count; t += APART) {
#pragma GCC unroll 4
      for (size_t a = 0; a < APART; a++) sums[a] += weights[t + a] * load<decltype(kind)>(x + (t + a) * N + i);
    }
    for (; t < count; t++) sums[0] += weights[t] * load<decltype(kind)>(x + t * N + i);
    store(y + i, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  });
}

}  // namespace jaxembed
