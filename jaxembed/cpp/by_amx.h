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
#include "pairs.h"
#include "vectors.h"

namespace jaxembed {

// M tokens, in tiles of 16: as ByVectors in everything.
class ByAmx {
 public:
  explicit ByAmx(size_t M) : tokens_(M), tiles_((M + SIDE - 1) / SIDE) {}

  size_t tokens() const { return tokens_; }

  size_t room(size_t K) const { return tiles_ * SIDE * K / 2; }

  void fill(const float* x, size_t K, float* tiles) const {
    Crew::get().each(tiles_, tokens_ * K > 100'000, [&](size_t i) {
      fill_panel<Pair>(x + i * SIDE * K, K, std::min(SIDE, tokens_ - i * SIDE), K, tile(tiles, i, K), SIDE);
    });
  }

  template <class Take>
  void multiply(float* tiles, size_t K, const std::vector<Matrix>& matrices, const Take& take) const {
    const size_t blocks = blocks_of(matrices, BLOCK);
    // Two tiles are taken at a time, and as many after each other as stay in the second cache.
    const size_t group = std::max<size_t>(2, ROOM / (SIDE * K) / 2 * 2), groups = (tiles_ + group - 1) / group;
    Crew::get().each(blocks * groups, tokens_ * K * blocks * BLOCK > 2'000'000, [&](size_t task) {
      const Block block(matrices, BLOCK, task % blocks);
      const char* rows = static_cast<const char*>(block.one->kernel) + block.first * K * 2;
      if (block.rows % SIDE > 0) {
        // Tiles are read whole.
        static thread_local std::vector<char> copy;
        copy.assign(BLOCK * K * 2, 0);
        std::memcpy(copy.data(), rows, block.rows * K * 2);
        rows = copy.data();
      }
      alignas(amx::ROW) float out[BLOCK * 2 * SIDE];
      const amx::Tiles configured;
      const size_t from = task / blocks * group, end = std::min(tiles_, from + group);
      for (size_t i = from; i < end; i += 2) {
        const size_t columns = std::min<size_t>(2, end - i);
        constexpr decltype(&amx::multiply<1, 1>) multiply[2][2] = {{amx::multiply<1, 1>, amx::multiply<1, 2>},
                                                                   {amx::multiply<2, 1>, amx::multiply<2, 2>}};
        const size_t tokens = std::min(tokens_ - i * SIDE, columns * SIDE);
        const Part part{*block.one, block.first, block.rows, i * SIDE, tokens, out, columns * SIDE};
        call_lines(part);
        multiply[block.rows > SIDE][columns == 2](rows, tile(tiles, i, K), K, SIDE * K / 2, out, part.width);
        take(part);
      }
    });
  }

  // Of a matrix whose features are a multiple of 32.
  void keep(const Part& part, Activation activation, float* tiles) const {
    for (size_t c = 0; c < part.width; c += SIDE) {
      put_columns(part, c, SIDE, activation, tile(tiles, (part.begin + c) / SIDE, part.one.N) + part.first / 2 * SIDE);
    }
  }

 private:
  static constexpr size_t SIDE = amx::SIDE;
  static constexpr size_t BLOCK = 2 * SIDE;        // output features that a thread takes at a time, no more than MOST_ROWS
  static constexpr size_t ROOM = size_t(1) << 19;  // numbers of tokens that it takes with them

  static float* tile(float* tiles, size_t i, size_t K) { return tiles + i * SIDE * K / 2; }

  const size_t tokens_, tiles_;
};

}  // namespace jaxembed

#endif
