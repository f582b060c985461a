// Attention over rows of tokens that lie in lines.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "amx.h"
#include "crew.h"
#include "numbers.h"
#include "pairs.h"
#include "tiles.h"
#include "vectors.h"

namespace jaxembed {

struct Heads {
  size_t query, key, width;  // heads of queries, of keys and values; features of each, a multiple of STEP
  float scale;
  size_t before, behind;  // keys that a query sees on either side of its own place
};

// Some keys of a row: from one place to another.
struct Keys {
  size_t begin, end;
  size_t count() const { return end - std::min(begin, end); }
  size_t room(size_t step) const { return (count() + step - 1) / step * step; }
};

// Those that the queries of a row from one place to the last one of `count` see, of as many as are seen at all; any begin at
// a multiple of `step`.
inline Keys keys_of(size_t first, size_t count, size_t seen, const Heads& heads, size_t step = 1) {
  const size_t begin = (first - std::min(first, heads.before)) / step * step;
  return {begin, std::min(seen, first + count + std::min(seen, heads.behind))};
}

// scores[room] to e^(scale * (score - their maximum)) for these keys, and next to nothing for the others; their sum. Zeros, and
// 1, for no keys.
inline float soften(float* scores, Keys keys, size_t room, float scale) {
  if (keys.count() == 0) {
    std::memset(scores, 0, room * sizeof(float));
    return 1.0f;
  }
  alignas(64) static constexpr uint32_t PLACES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Words places;
  std::memcpy(&places, PLACES, sizeof places);
  const auto seen = [&](size_t i) {
    return places + uint32_t(i - keys.begin) < uint32_t(keys.count()) ? load<Vector>(scores + i) : Vector{} - 1e30f;
  };
  Vector best = seen(0), total{};
  for (size_t i = LANES; i < room; i += LANES) {
    const Vector more = seen(i);
    best = more > best ? more : best;
  }
  const float most = most_of(best);
  for (size_t i = 0; i < room; i += LANES) {
    const Vector weight = exponential((seen(i) - most) * scale);
    store(scores + i, weight);
    total += weight;
  }
  return sum_of(total);
}

// `soften` for a query's scores of the keys `near` it and its neighbours, which have so much room.
inline float soften_row(float* scores, size_t place, Keys near, size_t room, size_t seen, const Heads& heads) {
  const Keys own = keys_of(place, 1, seen, heads);
  const Keys within{own.begin - near.begin, own.end - std::min(own.end, near.begin)};
  return soften(scores, within, room, heads.scale);
}

// One head of one row: queries [count, width] see keys and values [seen, width], all `apart` numbers from one another.
// C: vectors of keys that are taken at a time.
template <size_t C>
inline void head(const float* query, const float* key, const float* value, float* out, size_t count, size_t seen,
                 const Heads& heads) {
  const size_t width = heads.width, query_apart = heads.query * width, key_apart = heads.key * width;
  constexpr size_t ROWS = TILE / 2;
  constexpr size_t KEYS = C * LANES;
  const size_t room = Keys{0, seen}.room(KEYS);
  static thread_local std::vector<float> scratch;
  if (scratch.size() < room * (2 * width + ROWS)) scratch.resize(room * (2 * width + ROWS));
  float *keys = scratch.data(), *values = keys + room * width, *scores = values + room * width;
  for (size_t s = 0; s < seen; s += KEYS) {
    fill_panel<float>(key + s * key_apart, key_apart, std::min(KEYS, seen - s), width, keys + s * width, KEYS);
  }
  for (size_t f = 0; f < width; f += STEP) {
    for (size_t s = 0; s < seen; s++) {
      std::memcpy(values + f * room + s * STEP, value + s * key_apart + f, STEP * sizeof(float));
    }
  }
  for (size_t first = 0; first < count; first += ROWS) {
    const size_t rows = std::min(ROWS, count - first);
    const Keys near = keys_of(first, rows, seen, heads, KEYS);
    for (size_t k = near.begin; k < near.end; k += KEYS) {
      float* to = scores + k - near.begin;
      tile_of<ROWS, C>(rows, query + first * query_apart, query_apart, keys + k * width, width, to, room);
    }
    float sums[ROWS];
    for (size_t r = 0; r < rows; r++) sums[r] = soften_row(scores + r * room, first + r, near, near.room(KEYS), seen, heads);
    float* to = out + first * query_apart;
    for (size_t f = 0; f < width; f += STEP) {
      const float* values_of = values + f * room + near.begin * STEP;
      tile_of<ROWS, 2>(rows, scores, room, values_of, near.count(), to + f, query_apart);
    }
    for (size_t r = 0; r < rows; r++) {
      const float over = 1.0f / sums[r];
      for (size_t f = 0; f < width; f += LANES) {
        store(to + r * query_apart + f, load<Vector>(to + r * query_apart + f) * over);
      }
    }
  }
}

#if defined(JAXEMBED_PAIRS)

constexpr size_t FEW_KEYS = 32;  // more are worth it to make pairs of them

// Up to ROWS rows of words, [rows, depth], times STEP columns, which lie in panels of PANEL, `apart` words from one another; by
// vectors.
struct PairsByVectors {
  static constexpr size_t ROWS = TILE / 2, PANEL = STEP;
  void times(size_t rows, const float* words, size_t depth, const float* panels, size_t, float* out, size_t out_apart) const {
    tile_of<ROWS, 2>(rows, reinterpret_cast<const Pair*>(words), depth, panels, depth, out, out_apart);
  }
};

#if defined(JAXEMBED_AMX)

// The same by the matrix unit, which takes 16 or 32 rows of words and of the result, whatever stands in them.
struct PairsByAmx {
  static constexpr size_t ROWS = 2 * amx::SIDE, PANEL = amx::SIDE;
  void times(size_t rows, const float* words, size_t depth, const float* panels, size_t apart, float* out,
             size_t out_apart) const {
    const auto multiply = rows > amx::SIDE ? amx::multiply<2, 1> : amx::multiply<1, 1>;
    for (size_t c = 0; c < STEP; c += PANEL, panels += apart) {
      multiply(words, depth * sizeof(float), panels, 2 * depth, false, false, out + c, out_apart);
    }
  }
  const amx::Tiles configured;
};

#endif

// `head` with queries, keys, values and weights rounded to bfloat16.
template <class Unit>
inline void head_in_pairs(const float* query, const float* key, const float* value, float* out, size_t count, size_t seen,
                          const Heads& heads) {
  constexpr size_t ROWS = Unit::ROWS, PANEL = Unit::PANEL;
  const size_t width = heads.width, query_apart = heads.query * width, key_apart = heads.key * width;
  const size_t room = Keys{0, seen}.room(STEP);
  const size_t needed = (room * width + ROWS * (width / 2 + room / 2 + room)) / LINE;
  static thread_local std::vector<Line> scratch;
  if (scratch.size() < needed) scratch.resize(needed);
  float *keys = scratch.data()->numbers, *values = keys + room * width / 2;
  float *queries = values + room * width / 2, *weights = queries + ROWS * width / 2, *scores = weights + ROWS * room / 2;
  for (size_t s = 0; s < room; s += PANEL) {
    const size_t tokens = std::min(PANEL, seen - std::min(seen, s));
    fill_panel<Pair>(key + s * key_apart, key_apart, tokens, width, keys + s * width / 2, PANEL);
  }
  auto of = [&](size_t s, size_t f) { return s < seen ? load<Vector>(value + s * key_apart + f) : Vector{}; };
  for (size_t f = 0; f < width; f += LANES) {
    float* to = values + f / PANEL * PANEL * room / 2 + f % PANEL;
    for (size_t s = 0; s < room; s += 2, to += PANEL) put_words(of(s, f), of(s + 1, f), to);
  }
  const Unit unit;
  for (size_t first = 0; first < count; first += ROWS) {
    const size_t rows = std::min(ROWS, count - first);
    for (size_t r = 0; r < rows; r++) {
      const float* from = query + (first + r) * query_apart;
      for (size_t f = 0; f < width; f += STEP) put_row(from + f, queries + (r * width + f) / 2);
    }
    const Keys near = keys_of(first, rows, seen, heads, STEP);
    const size_t depth = near.room(STEP);
    for (size_t s = 0; s < depth; s += STEP) {
      const float* panels = keys + (near.begin + s) * width / 2;
      unit.times(rows, queries, width / 2, panels, PANEL * width / 2, scores + s, room);
    }
    float sums[ROWS];
    for (size_t r = 0; r < rows; r++) {
      sums[r] = soften_row(scores + r * room, first + r, near, depth, seen, heads);
      for (size_t s = 0; s < depth; s += STEP) put_row(scores + r * room + s, weights + (r * depth + s) / 2);
    }
    for (size_t f = 0; f < width; f += STEP) {
      alignas(64) float mixed[ROWS * STEP];
      const float* panels = values + f * room / 2 + near.begin / 2 * PANEL;
      unit.times(rows, weights, depth / 2, panels, PANEL * room / 2, mixed, STEP);
      for (size_t r = 0; r < rows; r++) {
        float* to = out + (first + r) * query_apart + f;
        const float over = 1.0f / sums[r];
        for (size_t i = 0; i < STEP; i += LANES) store(to + i, load<Vector>(mixed + r * STEP + i) * over);
      }
    }
  }
}

#endif

// Rows of `count` tokens, of which attention sees the first `seen`, stand where `starts` says in lines of `total` tokens.
inline void attention(const float* query, const float* key, const float* value, const int32_t* starts,
                      const int32_t* counts, const int32_t* seen, size_t rows, size_t total, const Heads& heads,
                      [[maybe_unused]] bool half, float* out) {
  const size_t apart = heads.query * heads.width, group = heads.query / heads.key;
  size_t end = 0, work = 0;
  for (size_t row = 0; row < rows; row++) {
    end = std::max<size_t>(end, starts[row] + counts[row]);
    work += size_t(counts[row]) * seen[row] * apart;
  }
  // Zeros where no row stands: nobody looks there, but NaN times 0 would be NaN.
  if (end < total) std::memset(out + end * apart, 0, (total - end) * apart * sizeof(float));
  Crew::get().each(rows * heads.query, work > 200'000, [&](size_t i) {
    size_t row = i / heads.query, h = i % heads.query, start = starts[row], count = counts[row];
    float* to = out + start * apart + h * heads.width;
    if (seen[row] == 0) {
      for (size_t t = 0; t < count; t++) std::memset(to + t * apart, 0, heads.width * sizeof(float));
      return;
    }
    size_t behind = start * heads.key * heads.width + h / group * heads.width;
    auto one = size_t(seen[row]) <= LANES ? head<1> : head<2>;
#if defined(JAXEMBED_PAIRS)
    if (half && size_t(seen[row]) > FEW_KEYS) one = head_in_pairs<PairsByVectors>;
#if defined(JAXEMBED_AMX)
    if (half && size_t(seen[row]) > FEW_KEYS && amx::allowed()) one = head_in_pairs<PairsByAmx>;
#endif
#endif
    one(query + start * apart + h * heads.width, key + behind, value + behind, to, count, seen[row], heads);
  });
}

}  // namespace jaxembed
