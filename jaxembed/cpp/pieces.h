// Activations whose results are rounded to bfloat16: polynomials of the third degree, piece by piece.

#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstring>

#include "matrix.h"
#include "vectors.h"

namespace jaxembed {

// x / 2 (1 + t(x)) of an odd function t that goes to 1: x / 2 + |x| g(|x|), and g(a) = t(a) / 2 in pieces of one width up to
// `end`, then 1 / 2. Each is the polynomial through four points of it, Chebyshev's.
class Pieces {
 public:
  template <class T> Pieces(const T& t, double end) : each_(float((COUNT - 1) / end)) {
    for (size_t piece = 0; piece + 1 < COUNT; piece++) {
      const double half = end / (COUNT - 1) / 2, middle = (2 * piece + 1) * half;
      double points[POINTS], slopes[POINTS], polynomial[POINTS] = {};
      for (size_t i = 0; i < POINTS; i++) {
        points[i] = middle + half * std::cos((2 * i + 1) * M_PI / (2 * POINTS));
        slopes[i] = t(points[i]) / 2;
      }
      // Newton's: quotients of differences, and from the last one back, times (a - its point) and the one before.
      for (size_t order = 1; order < POINTS; order++) {
        for (size_t i = POINTS - 1; i >= order; i--) {
          slopes[i] = (slopes[i] - slopes[i - 1]) / (points[i] - points[i - order]);
        }
      }
      for (size_t i = POINTS; i-- > 0;) {
        for (size_t power = POINTS - 1; power > 0; power--) {
          polynomial[power] = polynomial[power - 1] - points[i] * polynomial[power];
        }
        polynomial[0] = slopes[i] - points[i] * polynomial[0];
      }
      for (size_t power = 0; power < POINTS; power++) put(piece, power, float(polynomial[power]));
    }
    for (size_t power = 0; power < POINTS; power++) put(COUNT - 1, power, power == 0 ? 0.5f : 0.0f);
  }

  Vector operator()(Vector x) const {
    Words bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= 0x7fffffffu;
    Vector a, last = Vector{} + float(COUNT - 1);
    std::memcpy(&a, &bits, sizeof a);
    const Vector piece = a * each_ < last ? a * each_ : last;
    const __m512i which = (__m512i)__builtin_convertvector(piece, Words);
    auto of = [&](size_t power) INLINED {
      return (Vector)_mm512_permutex2var_ps((__m512)first_[power], which, (__m512)second_[power]);
    };
    return 0.5f * x + a * (of(0) + a * (of(1) + a * (of(2) + a * of(3))));
  }

 private:
  static constexpr size_t POINTS = 4, COUNT = 2 * LANES;

  void put(size_t piece, size_t power, float number) {
    (piece < LANES ? first_ : second_)[power][piece % LANES] = number;
  }

  Vector first_[POINTS], second_[POINTS];  // of each power of a, numbers of the pieces
  float each_;                             // pieces to a number
};

// call(function) with an activation, or with one whose results, rounded to bfloat16, are the same but for a few last bits.
template <class Call> inline void with_rounded(Activation activation, const Call& call) {
  static const Pieces by_erf([](double a) { return std::erf(a * M_SQRT1_2); }, 5.5);
  static const Pieces by_tanh([](double a) { return std::tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)); }, 5.5);
  static const Pieces by_half([](double a) { return std::tanh(a / 2); }, 16.0);
  switch (activation) {
    case GELU: return call(by_erf);
    case GELU_BY_TANH: return call(by_tanh);
    case SILU: return call(by_half);
    default: return call([=](Vector x) { return finished(x, activation); });
  }
}

}  // namespace jaxembed

#endif
