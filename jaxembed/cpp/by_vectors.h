// Products by multiply-adds of vectors, in float32, with weights in that or in bfloat16; or in bfloat16, with sums in float32.
// Letters: M tokens, K features of the input, N features of the output.

#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "crew.h"
#include "matrix.h"
#include "numbers.h"
#include "pairs.h"
#include "tiles.h"
#include "vectors.h"

namespace jaxembed {

// M tokens, in panels of three or four vectors each, where there are enough; weights are `Number`s. Where these are pairs, K and
// N are multiples of 32, and panels have words of two features.
template <class Number> class ByVectors {
 public:
  explicit ByVectors(size_t M)
      : tokens_(M),
        vectors_((M + LANES - 1) / LANES),
        count_(std::max(vectors_ / 3, (vectors_ + MOST - 1) / MOST)) {}

  size_t tokens() const { return tokens_; }

  // Numbers that they have in panels.
  size_t room(size_t K) const { return vectors_ * LANES * words(K); }

  // x [M, K] in panels.
  void fill(const float* x, size_t K, float* panels) const {
    Crew::get().each(count_, tokens_ * K > 100'000, [&](size_t i) {
      fill_panel<Number>(x + begin(i) * K, K, of(i), K, panels + begin(i) * words(K), width(i));
    });
  }

  // Each matrix times the panels, in parts: take(Part) for each of them.
  template <class Take>
  void multiply(const float* panels, size_t K, const std::vector<Matrix>& matrices, const Take& take) const {
    Crew& crew = Crew::get();
    const size_t blocks = blocks_of(matrices, BLOCK), depth = words(K);
    // As many panels at a time as leave each thread some tasks.
    const size_t group = std::clamp<size_t>(count_ * blocks / (TASKS * crew.share()), LEAST, LEAST * TASKS);
    const size_t groups = (count_ + group - 1) / group;
    // The groups of a block follow one another: its part of the kernel stays in the second cache.
    crew.each(blocks * groups, tokens_ * K * blocks * BLOCK > 400'000, [&](size_t task) {
      const Block block(matrices, BLOCK, task / groups);
      const Number* kernel = static_cast<const Number*>(block.one->kernel) + block.first * depth;
      const size_t from = task % groups * group, end = std::min(count_, from + group);
      if constexpr (std::is_same_v<Number, Half>) {
        if (end - from > FEW) {
          static thread_local std::vector<float> wide;
          if (wide.size() < BLOCK * K) wide.resize(BLOCK * K);
          widen(kernel, block.rows * K, wide.data());
          return times_panels<float>(wide.data(), nullptr, block, panels, K, from, end, take);
        }
      }
      // The blocks between are other threads'.
      times_panels(kernel, kernel + crew.share() * BLOCK * depth, block, panels, depth, from, end, take);
    });
  }

  // A part, with bias and activation, as these features of panels of all N.
  void keep(const Part& part, Activation activation, float* panels) const { stash<Number>(part, activation, panels); }

 private:
  static constexpr size_t MOST = 4;            // vectors of a panel
  static constexpr size_t LEAST = 32 / LANES;  // panels that a thread takes at a time, if there are as many
  static constexpr size_t TASKS = 4;           // of a thread
  static constexpr size_t FEW = 2;             // panels for which a kernel in bfloat16 is multiplied as it lies
  static constexpr size_t BLOCK = MOST_ROWS;   // output features that a thread takes: a multiple of a tile's rows

  // Rows of a block, as they lie or widened, times the panels from one to another. The first panel has to wait for them, and
  // calls those that come next and, after the last, those at `then` into the cache; nullptr: it calls none.
  template <class Weight, class Take>
  void times_panels(const Weight* rows, const Weight* then, const Block& block, const float* panels, size_t depth, size_t from,
                    size_t end, const Take& take) const {
    constexpr decltype(&rows_times_panel<1, Weight>) multiply[] = {
        rows_times_panel<1, Weight>, rows_times_panel<2, Weight>, rows_times_panel<3, Weight>, rows_times_panel<4, Weight>};
    alignas(64) float out[BLOCK * MOST * LANES];
    for (size_t i = from; i < end; i++) {
      const Part part{*block.one, block.first, block.rows, begin(i), of(i), out, width(i)};
      call_lines(part);
      multiply[part.width / LANES - 1](rows, block.rows, depth, panels + begin(i) * depth, out, i == from ? then : nullptr);
      take(part);
    }
  }

  static size_t words(size_t features) { return std::is_same_v<Number, Pair> ? features / 2 : features; }

  size_t begin(size_t i) const { return i == count_ ? tokens_ : vectors_ * i / count_ * LANES; }
  size_t of(size_t i) const { return begin(i + 1) - begin(i); }
  size_t width(size_t i) const { return (of(i) + LANES - 1) / LANES * LANES; }

  const size_t tokens_, vectors_, count_;  // the last: panels
};

}  // namespace jaxembed
