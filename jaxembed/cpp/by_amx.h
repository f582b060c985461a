// Products with weights in bfloat16, by tiles of the matrix unit. Letters: M tokens, K features of the input, N features
// of the output.

#pragma once

#include "amx.h"

#if defined(JAXEMBED_AMX)

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "crew.h"
#include "matrix.h"
#include "numbers.h"
#include "pairs.h"
#include "vectors.h"

namespace jaxembed {

// M tokens, in tiles of 16: as ByVectors in everything.
class ByAmx {
 public:
  explicit ByAmx(size_t M) : tokens_(M), tiles_((M + SIDE - 1) / SIDE) {}

  size_t tokens() const { return tokens_; }

  size_t room(size_t K) const { return tiles_ * words(K); }

  void fill(const float* x, size_t K, float* tiles) const {
    Crew::get().each(tiles_, tokens_ * K > 100'000, [&](size_t i) {
      fill_panel<Pair>(x + i * SIDE * K, K, std::min(SIDE, tokens_ - i * SIDE), K, tiles + i * words(K), SIDE);
    });
  }

  template <class Take>
  void multiply(const float* tiles, size_t K, const std::vector<Matrix>& matrices, const Take& take) const {
    const size_t blocks = blocks_of(matrices, BLOCK);
    // As many tiles after each other as stay in the second cache.
    const size_t group = std::max<size_t>(1, ROOM / words(K)), groups = (tiles_ + group - 1) / group;
    Crew::get().each(blocks * groups, tokens_ * K * blocks * BLOCK > 2'000'000, [&](size_t task) {
      const size_t from = task / blocks * group;
      times_tiles(Block(matrices, BLOCK, task % blocks), tiles, K, from, std::min(tiles_, from + group), take);
    });
  }

  // Of a matrix whose features are a multiple of 32.
  void keep(const Part& part, Activation activation, float* tiles) const {
    put_columns(part, 0, SIDE, activation, tiles + part.begin / SIDE * words(part.one.N) + words(part.first));
  }

 private:
  static constexpr size_t SIDE = amx::SIDE;
  static constexpr size_t BLOCK = 2 * SIDE;        // output features that a thread takes at a time, no more than MOST_ROWS
  static constexpr size_t ROOM = size_t(1) << 18;  // words of tokens that it takes with them
  static constexpr size_t DEPTH = 384;             // input features of a block that stay in the first cache

  static size_t words(size_t K) { return SIDE * K / 2; }

  // A block times tiles of tokens from one to another, pass by pass of its input features.
  template <class Take>
  void times_tiles(const Block& block, const float* tiles, size_t K, size_t from, size_t end, const Take& take) const {
    constexpr size_t SUMS = BLOCK * SIDE;
    static thread_local std::vector<Line> copy, sums;
    const Half* rows = static_cast<const Half*>(block.one->kernel) + block.first * K;
    if (block.rows % SIDE > 0) {
      // Tiles are read whole.
      copy.assign(BLOCK * K * sizeof(Half) / sizeof(Line), Line{});
      std::memcpy(copy.data(), rows, block.rows * K * sizeof(Half));
      rows = reinterpret_cast<const Half*>(copy.data());
    }
    const size_t passes = end - from > 1 ? (K + DEPTH - 1) / DEPTH : 1, depth = (K / STEP + passes - 1) / passes * STEP;
    sums.resize(std::max(sums.size(), (passes > 1 ? end - from : 1) * SUMS / LINE));
    const auto multiply = block.rows > SIDE ? amx::multiply<2> : amx::multiply<1>;
    const amx::Tiles configured;
    for (size_t k = 0; k < K; k += depth) {
      const size_t taken = std::min(depth, K - k);
      const bool last = k + taken == K;
      for (size_t i = from; i < end; i++) {
        float* out = sums.data()->numbers + (passes > 1 ? i - from : 0) * SUMS;
        const Part part{*block.one, block.first, block.rows, i * SIDE, std::min(SIDE, tokens_ - i * SIDE), out, SIDE};
        if (last) call_lines(part);
        multiply(rows + k, K * sizeof(Half), tiles + i * words(K) + words(k), taken, i == from, k > 0, out, SIDE);
        if (last) take(part);
      }
    }
  }

  const size_t tokens_, tiles_;
};

}  // namespace jaxembed

#endif
