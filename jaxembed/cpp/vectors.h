// Vectors of numbers that a processor computes with at a time, and functions of them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define INLINED __attribute__((always_inline))
#define ALWAYS_INLINE inline INLINED

namespace jaxembed {

#if defined(__AVX512F__)  // 32 registers
constexpr size_t LANES = 16;
#else  // 16 registers
constexpr size_t LANES = 8;
#endif
constexpr size_t LINE = 16;         // numbers of a line of the cache
constexpr size_t EIGHT = 8;
constexpr size_t STEP = 2 * LANES;  // tokens, or features, that attention and pairs of numbers go by

// Numbers as they lie in a line of the cache.
struct alignas(LINE * sizeof(float)) Line {
  float numbers[LINE];
};

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef float Eight __attribute__((vector_size(EIGHT * sizeof(float))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

// At any address.
template <class V> inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V> inline void store(float* to, V value) { std::memcpy(to, &value, sizeof value); }

// call(0), ..., call(N - 1), where each number is a constant: what an array holds at constant places stays in registers.
template <class Call, size_t... I> ALWAYS_INLINE void call_each(const Call& call, std::index_sequence<I...>) {
  (call(std::integral_constant<size_t, I>{}), ...);
}
template <size_t N, class Call> ALWAYS_INLINE void unrolled(const Call& call) {
  call_each(call, std::make_index_sequence<N>{});
}

// both(a, b) of all numbers of a vector: of halves, of what these give, and so on.
template <class Both> inline float across(Four v, const Both& both) {
  const Four half = both(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  return both(half[0], half[1]);
}
template <class Both> inline float across(Eight v, const Both& both) {
  return across(both(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)), both);
}
#if defined(__AVX512F__)
template <class Both> inline float across(Vector v, const Both& both) {
  const Eight first = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  return across(both(first, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)), both);
}
#endif

inline float sum_of(Vector v) { return across(v, [](auto a, auto b) { return a + b; }); }
inline float most_of(Vector v) { return across(v, [](auto a, auto b) { return a > b ? a : b; }); }

// x * Phi(x). erf is the quotient of polynomials that XLA computes it by, 1 from 3.83 on.
template <class V> inline V gelu(V x) {
  const V end = V{} + 3.832506856900711f;
  V z = x * 0.70710678118654752f;
  z = z > end ? end : z;
  z = z < -end ? -end : z;
  V s = z * z;
  V above = s * 0.00022905065861350646f + 0.0034082910107109506f;
  above = above * s + 0.050955695062380861f;
  above = above * s + 0.18520832239976145f;
  above = above * s + 1.128379143519084f;
  V below = s * -1.1791602954361697e-7f + 0.000023547966471313185f;
  below = below * s + 0.0010179625278914885f;
  below = below * s + 0.014070470171167667f;
  below = below * s + 0.11098505178285362f;
  below = below * s + 0.49746925110067538f;
  below = below * s + 1.0f;
  return 0.5f * x * (1.0f + z * above / below);
}

// e^x for x <= 0: 2^n e^r with |r| <= log(2) / 2, and e^r by its Taylor polynomial of degree 7 (error below 1e-8).
template <class V> inline V exponential(V x) {
  using Ints = decltype(x < x);
  const V least = V{} - 87.0f;
  x = x < least ? least : x;
  V n = x * 1.44269504088896341f - 0.5f;
  Ints whole = __builtin_convertvector(n, Ints);  // towards 0: the nearest, for n <= 0
  n = __builtin_convertvector(whole, V);
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V e = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  e = e * r + (1.0f / 120.0f);
  e = e * r + (1.0f / 24.0f);
  e = e * r + (1.0f / 6.0f);
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  Ints power = (whole + 127) << 23;
  V two;
  std::memcpy(&two, &power, sizeof two);
  return e * two;
}

// x / (1 + e^-z)
template <class V> inline V gated_by(V x, V z) {
  const V e = exponential(z < V{} ? z : -z), over = x / (1.0f + e);
  return z < V{} ? e * over : over;
}

template <class V> inline V silu(V x) { return gated_by(x, x); }

// x * (1 + tanh(z)) / 2 of z = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V> inline V gelu_by_tanh(V x) { return gated_by(x, x * (1.5957691216057308f + 0.0713548162726002f * x * x)); }

}  // namespace jaxembed
