// Numbers of a kernel, in float32 or bfloat16, as multiply-adds take them: in float32, or two in bfloat16 at a time.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace jaxembed {

// A number in bfloat16: the upper half of one in float32.
struct Half {
  uint16_t bits;
};

// Two of them, of an even feature and the one behind it, where a processor multiplies and adds those of a word in float32.
struct Pair {
  uint32_t bits;
};

inline float widened(Half number) {
  const uint32_t bits = uint32_t(number.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void widen(const Half* from, size_t count, float* to) {
  typedef uint16_t Halves __attribute__((vector_size(EIGHT * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(EIGHT * sizeof(uint32_t))));
  size_t i = 0;
#pragma GCC unroll 4
  for (; i + EIGHT <= count; i += EIGHT) {
    Halves halves;
    std::memcpy(&halves, from + i, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(to + i, &words, sizeof words);
  }
  for (; i < count; i++) to[i] = widened(from[i]);
}

// A vector of them, or one, at any address.
template <class V> inline V load(const Half* from) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return widened(*from);
  } else {
    V value;
    widen(from, sizeof(V) / sizeof(float), reinterpret_cast<float*>(&value));
    return value;
  }
}

// A vector of row[k] alone.
inline Vector spread(const float* row, size_t k) { return row[k] - Vector{}; }

// Of two numbers, which are read together, since what a processor spreads as it reads are words: behind an even one the next
// must be there. In words of C++ the compiler would take them apart one by one.
inline Vector spread(const Half* row, size_t k) {
  const auto& two = *reinterpret_cast<const char(*)[2 * sizeof(Half)]>(row + k / 2 * 2);
  Words words;
  if (k % 2 == 0) {
    asm("vpbroadcastd %1, %0" : "=v"(words) : "m"(two));
    words <<= 16;
  } else {
    asm("vpbroadcastd %1, %0  # again: there are too few registers to keep them" : "=v"(words) : "m"(two));
    words &= 0xffff0000u;
  }
  Vector value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

inline Vector spread(const Pair* row, size_t k) {
  const Words words = row[k].bits - Words{};
  Vector value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

// The same of row[0], with nothing behind it.
inline Vector spread_last(const float* row) { return *row - Vector{}; }
inline Vector spread_last(const Half* row) { return widened(*row) - Vector{}; }
inline Vector spread_last(const Pair* row) { return spread(row, 0); }

}  // namespace jaxembed
