// Products with weights by tiles of the matrix unit, in bfloat16, or in float32 by pieces in bfloat16. Letters: M tokens, K
// features of the input, N features of the output.

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
#include "split.h"
#include "vectors.h"

namespace jaxembed {

// M tokens, in tiles of 16: as ByVectors in everything. Numbers are `Pair`s or, of matrices in float32, `Split`.
template <class Number> class ByAmx {
 public:
  explicit ByAmx(size_t M) : tokens_(M), tiles_((M + SIDE - 1) / SIDE) {}

  size_t tokens() const { return tokens_; }

  size_t room(size_t K) const { return tiles_ * words(K); }

  void fill(const float* x, size_t K, float* tiles) const {
    Crew::get().each(tiles_, tokens_ * K > 100'000, [&](size_t i) {
      fill_panel<Number>(x + i * SIDE * K, K, std::min(SIDE, tokens_ - i * SIDE), K, tiles + i * words(K), SIDE);
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
  void keep(const Part& part, Activation activation, float* tiles) const { stash<Number>(part, activation, tiles); }

 private:
  // Rows of a block where tiles can be read, and how they are taken.
  class Kernel;

  static constexpr size_t SIDE = amx::SIDE;
  static constexpr size_t BLOCK = 2 * SIDE;        // output features that a thread takes at a time, no more than MOST_ROWS
  static constexpr size_t ROOM = size_t(1) << 18;  // words of tokens that it takes with them

  static size_t words(size_t K) { return SIDE * K / 2 * Kernel::PIECES; }

  // A block times tiles of tokens from one to another, pass by pass of its input features.
  template <class Take>
  void times_tiles(const Block& block, const float* tiles, size_t K, size_t from, size_t end, const Take& take) const {
    constexpr size_t SUMS = BLOCK * SIDE, DEPTH = Kernel::DEPTH, TOGETHER = Kernel::TOGETHER;
    static thread_local std::vector<Line> sums;
    Kernel kernel(block, K);
    const size_t passes = end - from > 1 ? (K + DEPTH - 1) / DEPTH : 1, depth = (K / STEP + passes - 1) / passes * STEP;
    const size_t needed = (passes > 1 ? end - from : 1) * SUMS / LINE;
    if (sums.size() < needed) sums.resize(needed);
    const auto multiply = block.rows > SIDE ? amx::multiply<TOGETHER, Kernel::PIECES> : amx::multiply<1, Kernel::PIECES>;
    const amx::Tiles configured;
    for (size_t k = 0; k < K; k += depth) {
      const size_t taken = std::min(depth, K - k);
      const bool last = k + taken == K;
      kernel.go_to(k, taken);
      for (size_t i = from; i < end; i++) {
        float* out = sums.data()->numbers + (passes > 1 ? i - from : 0) * SUMS;
        const Part part{*block.one, block.first, block.rows, i * SIDE, std::min(SIDE, tokens_ - i * SIDE), out, SIDE};
        if (last) call_lines(part);
        for (size_t r = 0; r < block.rows; r += TOGETHER * SIDE) {
          const float* tile = tiles + i * words(K) + words(k);
          multiply(kernel.rows(r), kernel.apart(), tile, taken, Kernel::FAR && i == from, k > 0, out + r * SIDE, SIDE);
        }
        if (last) take(part);
      }
    }
  }

  const size_t tokens_, tiles_;
};

// As they lie, if these are whole tiles, or copied whole.
template <> class ByAmx<Pair>::Kernel {
 public:
  static constexpr size_t PIECES = 1;
  static constexpr size_t DEPTH = 384;   // input features of a block that stay in the first cache
  static constexpr size_t TOGETHER = 2;  // tiles of rows that are multiplied at a time
  static constexpr bool FAR = true;      // they come from beyond the first cache

  Kernel(const Block& block, size_t K) : K_(K), first_(static_cast<const Half*>(block.one->kernel) + block.first * K) {
    if (block.rows % SIDE == 0) return;
    static thread_local std::vector<Line> copy;
    copy.assign(BLOCK * K * sizeof(Half) / sizeof(Line), Line{});
    std::memcpy(copy.data(), first_, block.rows * K * sizeof(Half));
    first_ = reinterpret_cast<const Half*>(copy.data());
  }
  void go_to(size_t k, size_t) { now_ = first_ + k; }
  const void* rows(size_t r) const { return now_ + r * K_; }
  size_t apart() const { return K_ * sizeof(Half); }

 private:
  const size_t K_;
  const Half *first_, *now_ = nullptr;
};

// Taken apart, as many features as go into a pass.
template <> class ByAmx<Split>::Kernel {
 public:
  static constexpr size_t PIECES = Split::PIECES;
  static constexpr size_t DEPTH = 96;
  static constexpr size_t TOGETHER = 1;
  static constexpr bool FAR = false;

  Kernel(const Block& block, size_t K)
      : K_(K), rows_(block.rows), first_(static_cast<const float*>(block.one->kernel) + block.first * K) {}
  void go_to(size_t k, size_t features) {
    static thread_local std::vector<Line> pieces;
    const size_t needed = BLOCK / SIDE * words(features) / LINE;
    if (pieces.size() < needed) pieces.resize(needed);
    tiles_ = pieces.data()->numbers;
    tile_ = words(features);
    for (size_t r = 0; r < rows_; r += SIDE) {
      split_rows(first_ + r * K_ + k, std::min(SIDE, rows_ - r), K_, features, tiles_ + r / SIDE * tile_);
    }
  }
  const void* rows(size_t r) const { return tiles_ + r / SIDE * tile_; }
  size_t apart() const { return amx::ROW; }

 private:
  const size_t K_, rows_;
  const float* first_;
  float* tiles_ = nullptr;
  size_t tile_ = 0;  // words of 16 rows
};

}  // namespace jaxembed

#endif
