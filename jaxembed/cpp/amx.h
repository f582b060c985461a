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

#include "vectors.h"

namespace jaxembed::amx {

constexpr size_t SIDE = 16;          // rows of a tile, or tokens
constexpr size_t ROW = 64;           // bytes of a row
constexpr size_t SIZE = SIDE * ROW;  // bytes of a tile
constexpr size_t WORDS = SIZE / 4;   // each two numbers in bfloat16, or one sum

// Linux lets a process use the unit once it has asked.
inline bool allowed() {
  constexpr long ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool yes = syscall(SYS_arch_prctl, ASK, TILES) == 0;
  return yes;
}

// While one exists its thread has four tiles: sums in 0 and 1, a kernel's rows in 2, tokens in 3. There are eight, but what a
// tile held until it was written anew takes up one of few that the processor has; where two threads share a core these do not
// suffice for eight to be read while others are multiplied (docs/performance/cpu-kernels.md).
class Tiles {
 public:
  Tiles() {
    struct alignas(ROW) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (size_t i = 0; i < 4; i++) config.bytes[i] = ROW, config.rows[i] = SIDE;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The instructions. `apart` is the distance of rows in bytes.
template <size_t T> inline void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <size_t T> inline void read(const void* from, size_t apart) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(apart), "i"(T) : "memory");
}
template <size_t T> inline void write(void* to, size_t apart) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(apart), "i"(T) : "memory");
}
template <size_t Sum, size_t A, size_t B> inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// out [16 R, 16] = 16 R rows of a kernel, `apart` bytes from one another, times `depth` features of 16 tokens; added to what is
// there if `more`. Where rows come from beyond the first cache, `far` calls them into it. A number is the sum of `Pieces` in
// bfloat16, each of which is smaller than the one before: then 32 features are as many tiles, of rows as of tokens, and
// the smallest products, of pieces whose places sum up to more than the last one's, are left out.
template <size_t R, size_t Pieces>
inline void multiply(const void* kernel, size_t apart, const float* words, size_t depth, bool far, bool more, float* out,
                     size_t out_apart) {
  static_assert(Pieces == 1 ? R == 1 || R == 2 : R == 1);
  const size_t out_bytes = out_apart * sizeof(float);
  float* second = out + SIDE * out_apart;
  if (more) {
    read<0>(out, out_bytes);
    if constexpr (R > 1) read<1>(second, out_bytes);
  } else {
    zero<0>();
    if constexpr (R > 1) zero<1>();
  }
  const char* rows = static_cast<const char*>(kernel);
  for (size_t k = 0; k < depth; k += STEP, rows += Pieces == 1 ? ROW : Pieces * SIZE, words += Pieces * WORDS) {
    if (far) {
      // They lie apart, and nothing else calls what comes next of each into the cache.
      for (size_t r = 0; r < R * SIDE; r++) __builtin_prefetch(rows + r * apart + 2 * ROW);
    }
    unrolled<Pieces>([&](auto i) INLINED {
      constexpr size_t last = i, place = Pieces - 1 - last;
      read<3>(words + place * WORDS, ROW);
      unrolled<last + 1>([&](auto piece) INLINED {
        read<2>(rows + piece * SIZE, apart);
        multiply_add<0, 2, 3>();
        if constexpr (R > 1) {
          read<2>(rows + SIDE * apart, apart);
          multiply_add<1, 2, 3>();
        }
      });
    });
  }
  write<0>(out, out_bytes);
  if constexpr (R > 1) write<1>(second, out_bytes);
}

}  // namespace jaxembed::amx

#endif
