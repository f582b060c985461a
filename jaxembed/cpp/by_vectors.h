// Products with weights in float32, by multiply-adds of vectors. Letters: M tokens, K features of the input, N features of
// the output.

#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "crew.h"
#include "matrix.h"
#include "tiles.h"
#include "vectors.h"

namespace jaxembed {

// M tokens, in panels of three or four vectors each, where there are enough.
class ByVectors {
 public:
  explicit ByVectors(size_t M)
      : tokens_(M),
        vectors_((M + LANES - 1) / LANES),
        count_(std::max(vectors_ / 3, (vectors_ + MOST - 1) / MOST)) {}

  size_t tokens() const { return tokens_; }

  // Numbers that they have in panels.
  size_t room(size_t K) const { return vectors_ * LANES * K; }

  // x [M, K] in panels.
  void fill(const float* x, size_t K, float* panels) const {
    Crew::get().each(count_, tokens_ * K > 100'000, [&](size_t i) {
      fill_panel(x + begin(i) * K, K, of(i), K, panels + begin(i) * K, width(i));
    });
  }

  // Each matrix times the panels, in parts: take(Part) for each of them.
  template <class Take>
  void multiply(const float* panels, size_t K, const std::vector<Matrix>& matrices, const Take& take) const {
    const size_t groups = (count_ + GROUP - 1) / GROUP, blocks = blocks_of(matrices, BLOCK);
    Crew& crew = Crew::get();
    // The groups of a block follow one another: its part of the kernel stays in the second cache.
    crew.each(blocks * groups, tokens_ * K * blocks * BLOCK > 400'000, [&](size_t task) {
      const Block block(matrices, BLOCK, task / groups);
      const float* kernel = static_cast<const float*>(block.one->kernel) + block.first * K;
      const size_t from = task % groups * GROUP;
      alignas(64) float out[BLOCK * MOST * LANES];
      for (size_t i = from; i < std::min(count_, from + GROUP); i++) {
        constexpr decltype(&rows_times_panel<1>) multiply[] = {rows_times_panel<1>, rows_times_panel<2>, rows_times_panel<3>,
                                                               rows_times_panel<4>};
        // The first panel has to wait for the kernel. The blocks between are other threads'.
        const float* then = i == from ? kernel + crew.share() * BLOCK * K : nullptr;
        multiply[width(i) / LANES - 1](kernel, block.rows, K, panels + begin(i) * K, out, then);
        take(Part{*block.one, block.first, block.rows, begin(i), of(i), out, width(i)});
      }
    });
  }

  // A part, with bias and activation, as these features of panels of all N.
  void keep(const Part& part, Activation activation, float* panels) const {
    float* to = panels + part.begin * part.one.N + part.first * part.width;
    for (size_t f = 0; f < part.rows; f++) {
      const float bias = part.one.bias ? part.one.bias[part.first + f] : 0.0f;
      for (size_t i = f * part.width; i < (f + 1) * part.width; i += LANES) {
        store(to + i, finished(load<Vector>(part.out + i) + bias, activation));
      }
    }
  }

 private:
  static constexpr size_t MOST = 4;            // vectors of a panel
  static constexpr size_t GROUP = 32 / LANES;  // panels that a thread takes at a time
  static constexpr size_t BLOCK = MOST_ROWS;   // output features that it takes: a multiple of a tile's rows

  size_t begin(size_t i) const { return i == count_ ? tokens_ : vectors_ * i / count_ * LANES; }
  size_t of(size_t i) const { return begin(i + 1) - begin(i); }
  size_t width(size_t i) const { return (of(i) + LANES - 1) / LANES * LANES; }

  const size_t tokens_, vectors_, count_;  // the last: panels
};

}  // namespace jaxembed
