// Products by a processor's matrix unit, Intel's AMX: tiles of 16 rows of 32 numbers in bfloat16, and sums in float32.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define JAXEMBED_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pairs.h"

namespace jaxembed::amx {

constexpr size_t SIDE = 16;          // rows of a tile, or tokens
constexpr size_t ROW = 64;           // bytes of a row
constexpr size_t SIZE = SIDE * ROW;  // bytes of a tile

// Linux lets a process use the unit once it has asked.
inline bool allowed() {
  constexpr long ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool yes = syscall(SYS_arch_prctl, ASK, TILES) == 0;
  return yes;
}

// While one exists its thread has eight tiles: sums in 0 to 3, a kernel's rows in 4 and 5, tokens in 6 and 7.
class Tiles {
 public:
  Tiles() {
    struct alignas(ROW) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (size_t i = 0; i < 8; i++) config.bytes[i] = ROW, config.rows[i] = SIDE;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The instructions. `apart` is the distance of rows in bytes.
template <size_t T> inline void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <size_t T> inline void read(const char* from, size_t apart) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(apart), "i"(T) : "memory");
}
template <size_t T> inline void write(float* to, size_t apart) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(apart), "i"(T) : "memory");
}
template <size_t Sum, size_t A, size_t B> inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// out [16 R, 16 C] = 16 R rows of a kernel [_, depth] in bfloat16 times C panels of 16 tokens' words, `panels_apart` of these from
// one another.
template <size_t R, size_t C>
inline void multiply(const void* kernel, const float* words, size_t depth, size_t panels_apart, float* out, size_t out_apart) {
  const char *rows = static_cast<const char*>(kernel), *tokens = reinterpret_cast<const char*>(words);
  zero<0>();
  if constexpr (C > 1) zero<1>();
  if constexpr (R > 1) zero<2>();
  if constexpr (R > 1 && C > 1) zero<3>();
  const size_t apart = 2 * depth, next = panels_apart * sizeof(float);
  for (size_t k = 0; k < depth; k += STEP, rows += ROW, tokens += SIZE) {
    // Rows lie apart, and nothing else calls what comes next of each into the cache.
    for (size_t r = 0; r < R * SIDE; r++) __builtin_prefetch(rows + r * apart + 2 * ROW);
    read<4>(rows, apart);
    read<6>(tokens, ROW);
    multiply_add<0, 4, 6>();
    if constexpr (C > 1) {
      read<7>(tokens + next, ROW);
      multiply_add<1, 4, 7>();
    }
    if constexpr (R > 1) {
      read<5>(rows + SIDE * apart, apart);
      multiply_add<2, 5, 6>();
    }
    if constexpr (R > 1 && C > 1) multiply_add<3, 5, 7>();
  }
  const size_t out_bytes = out_apart * sizeof(float);
  write<0>(out, out_bytes);
  if constexpr (C > 1) write<1>(out + SIDE, out_bytes);
  if constexpr (R > 1) write<2>(out + SIDE * out_apart, out_bytes);
  if constexpr (R > 1 && C > 1) write<3>(out + SIDE * out_apart + SIDE, out_bytes);
}

}  // namespace jaxembed::amx

#endif
